"""Stretches as a GPU copies them, on a CPU beside its loop and beside windows; and the GPU beside the CPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from embrag_ds.config import RunConfig
from embrag_ds.data.inputs import PanelInputs
from embrag_ds.data.simulate import DefaultData
from embrag_ds.data.targets import Targets
from embrag_ds.data.windows import Window, cut_tiles, make_windows
from embrag_ds.imputation import engine
from embrag_ds.imputation.computing import stretches
from embrag_ds.imputation.computing.stretches import Stretches
from embrag_ds.imputation.computing.windows import _samples_at_once
from embrag_ds.imputation.engine import Imputation
from embrag_ds.ops.li_stephens import copying_backend
from tests.imputation.test_stretches import matched
from tests.untrained import untrained
from tests.whole_files import read_phased

MakeConfig = Callable[..., RunConfig]
CPU = "cpu"


@pytest.fixture
def targets(simulated: DefaultData, inputs: PanelInputs) -> Targets:
    """Targets of which one is in the panel, and has a missing haplotype."""
    target = read_phased(simulated.target)
    panel = read_phased(inputs.panel.path)
    row = {site: number for number, site in enumerate(panel.sites.identities())}
    typed = np.array([row[site] for site in target.sites.identities()])
    alleles = target.alleles.copy()
    alleles[:, 2:4] = panel.alleles[typed][:, 60:62]
    names = (target.samples[0], panel.samples[30], *target.samples[2:])
    return matched(dataclasses.replace(target, samples=names, alleles=alleles), inputs, overlap=True)


@pytest.fixture
def as_on_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Choose the way by which haplotypes are copied."""
    return lambda way: monkeypatch.setattr(engine, "_way", lambda *given: way)


def probabilities(imputation: Imputation) -> np.ndarray:
    """Probabilities float32 [2N, sites of all stretches]."""
    return np.concatenate([found for _, found in imputation.windows()], axis=1)


@pytest.mark.parametrize("sites", [1 << 15, 100])
@pytest.mark.parametrize("layers", [None, 1, 2])
def test_they_are_those_of_the_loop(
    make_config: MakeConfig,
    inputs: PanelInputs,
    targets: Targets,
    as_on_gpu: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    layers: int | None,
    sites: int,
) -> None:
    """With the transformer of so many layers, or without; in one stretch, and in several of so many ``sites``."""
    monkeypatch.setattr(stretches, "_MOST_STRETCH_SITES", sites)
    transformer = layers is not None
    settings = ["embrag.model.good_turing=true", f"embrag.model.layers={layers or 1}"]
    model = untrained(make_config(*settings), head=0.3 if transformer else 0.0)
    loop = Imputation(model, inputs, targets, CPU, 4, transformer)
    expected = probabilities(loop)
    assert isinstance(loop._computing, Stretches)
    as_on_gpu("whole")
    for block in (1, 4, 100):
        found = probabilities(Imputation(model, inputs, targets, CPU, block, transformer))
        np.testing.assert_allclose(found, expected, atol=5e-5 if transformer else 2e-5)
    without = probabilities(Imputation(model, inputs, targets, CPU, 4, False))
    assert np.abs(found - without).max() > 0.1 or not transformer
    assert (len(loop.data.windows) > 1) == (sites == 100)
    if sites > 100:  # several overlap
        assert np.abs(without[2:4] - inputs.panel.alleles_at(np.arange(without.shape[1]))[:, 60:62].T).max() > 0.5


def test_they_need_no_search_that_the_model_names(
    make_config: MakeConfig, inputs: PanelInputs, targets: Targets, as_on_gpu: Callable[[str], None]
) -> None:
    as_on_gpu("whole")
    found = [
        probabilities(Imputation(untrained(make_config(*named), head=0.0), inputs, targets, CPU, 4, transformer=False))
        for named in ((), ("embrag.retrieval.backend=cupy",))  # which a CPU does not have
    ]
    np.testing.assert_array_equal(*found)


def test_the_transformer_runs_in_tiles_that_are_the_windows(
    make_config: MakeConfig, inputs: PanelInputs, targets: Targets, as_on_gpu: Callable[[str], None]
) -> None:
    haplotypes, sites = 2 * len(inputs.panel.samples), len(inputs.panel.sites)
    settings = [f"embrag.retrieval.k={haplotypes - 2}", f"embrag.data.flank_sites={sites}"]
    model = untrained(make_config(*settings), head=0.3)
    as_on_gpu("windows")
    # Samples outside the panel lack two neighbours in windows: the sample that is inside counts alone.
    one = dataclasses.replace(targets, samples=targets.samples[:2])
    windows = list(Imputation(model, inputs, one, CPU, 4, transformer=True).windows())
    as_on_gpu("whole")
    found = probabilities(Imputation(model, inputs, one, CPU, 4, transformer=True))
    without = probabilities(Imputation(model, inputs, one, CPU, 4, transformer=False))
    assert len(windows) > 2 and np.abs(found - without).max() > 0.01
    start = 0
    for (window, expected), (following, _) in zip(windows, [*windows[1:], (None, None)], strict=True):
        stop = sites if following is None else following.core_start
        np.testing.assert_allclose(
            found[2:4, start:stop], expected[2:4, start - window.core_start : stop - window.core_start], atol=1e-4
        )
        start = window.core_stop


@pytest.mark.parametrize("sites", [1, 40, 41, 75, 200, 1033])
def test_tiles_are_cut_as_windows_are(build_sites: Callable[[int], object], sites: int) -> None:
    windows = make_windows(build_sites(sites), 40, 9, 0)  # type: ignore[arg-type]
    tiles = cut_tiles(sites, 40, 9)
    assert [(each.core_start, each.core_stop) for each in windows] == [tile[:2] for tile in tiles]
    firsts, lasts = [tile[2] for tile in tiles], [tile[3] for tile in tiles]
    assert firsts == [0, *lasts[:-1]] and lasts[-1] == sites
    assert all(start <= first < last <= stop for start, stop, first, last in tiles)


@pytest.fixture
def build_sites() -> Callable[[int], object]:
    """Maker of what stands for a table of sites on one contig."""

    class OneContig:
        def __init__(self, sites: int):
            self.sites = sites

        def contig_runs(self) -> list[tuple[int, int]]:
            return [(0, self.sites)]

    return OneContig


def test_a_batch_has_the_samples_whose_posteriors_fit() -> None:
    windows = [Window(0, 0, 60, 0, 50), Window(1, 40, 100, 50, 100)]
    typed = np.arange(100) % 10 == 0  # six in each window
    of_a_sample = 2 * 64 * 6 * 1000
    assert _samples_at_once(32, windows, typed, 1000, 2 * 5 * of_a_sample) == 5
    assert _samples_at_once(4, windows, typed, 1000, 2 * 5 * of_a_sample) == 4
    assert _samples_at_once(4, windows, typed, 1000, 10) == 1


def test_a_stretch_is_as_long_as_a_samples_posteriors_fit(
    make_config: MakeConfig, inputs: PanelInputs, targets: Targets, as_on_gpu: Callable[[str], None], monkeypatch: Any
) -> None:
    model = untrained(make_config("embrag.data.flank_sites=50"), head=0.0)
    haplotypes, shortest = 2 * len(inputs.panel.samples), model.config.data.window_sites
    of_a_site = 2 * 64 * haplotypes * targets.typed.mean()
    as_on_gpu("whole")

    def made(sites: int) -> tuple[int, int]:
        """Longest core and samples of a batch, where a sample's posteriors at so many sites fill half of the memory."""
        monkeypatch.setattr(engine, "_memory", lambda device: 2 * of_a_site * sites)
        imputation = Imputation(model, inputs, targets, CPU, 4, transformer=False)
        return max(each.core_stop - each.core_start for each in imputation.data.windows), imputation._computing._block

    whole = len(inputs.panel.sites)
    longest, block = made(2 * shortest + 100)  # a flank of 50 sites on either side
    assert shortest < longest <= 2 * shortest < whole and block <= 2
    assert made(2)[0] <= shortest and made(2)[1] == 1  # no shorter than windows
    assert made(100 * whole) == (whole, 4)


@pytest.mark.gpu
@pytest.mark.parametrize("transformer", [False, True])
def test_on_a_gpu_they_are_those_of_the_cpu(
    make_config: MakeConfig,
    inputs: PanelInputs,
    targets: Targets,
    as_on_gpu: Callable[[str], None],
    transformer: bool,
) -> None:
    gpu = torch.device("cuda", 0)
    assert copying_backend(gpu) == "cuda kernel"
    model = untrained(make_config("embrag.model.good_turing=true"), head=0.3)
    there = Imputation(model, inputs, targets, str(gpu), 3, transformer)
    assert there._computing._network.site_tiles is not None
    found = probabilities(there)
    as_on_gpu("whole")
    expected = probabilities(Imputation(model, inputs, targets, CPU, 4, transformer))
    np.testing.assert_allclose(found, expected, atol=1e-3)
