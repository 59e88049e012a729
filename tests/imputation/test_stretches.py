"""Stretches that a CPU copies whole, with the transformer and without, and what the options make of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embrag_ds.cli.main import main
from embrag_ds.config import RunConfig
from embrag_ds.copying import stretch
from embrag_ds.data.inputs import PanelFiles, PanelInputs
from embrag_ds.data.panel import Panel
from embrag_ds.data.simulate import DefaultData
from embrag_ds.data.targets import Targets, match_targets, open_targets
from embrag_ds.data.windows import Window
from embrag_ds.errors import UserError
from embrag_ds.export import ExportedModel, write_export
from embrag_ds.imputation import engine
from embrag_ds.imputation import impute as imputation_module
from embrag_ds.imputation.computing import stretches
from embrag_ds.imputation.computing.stretches import Precision
from embrag_ds.imputation.engine import Imputation, impute_to_vcf
from embrag_ds.imputation.impute import impute
from embrag_ds.ops import li_stephens
from embrag_ds.retrieval.prefetch import Prefetcher
from tests.untrained import untrained
from tests.whole_files import PhasedData, read_dosages, read_phased

MakeConfig = Callable[..., RunConfig]
CPU = "cpu"
SAID = "imputing without the transformer, which adds no accuracy so far; --transformer on runs it"


def matched(target: PhasedData, inputs: PanelInputs, overlap: bool = False) -> Targets:
    packed = np.packbits(target.alleles, axis=1, bitorder="little")
    panel = Panel(Path("target.vcf.gz"), target.sites, target.samples, packed, target.skipped)
    return open_targets(panel, match_targets(panel, inputs.panel, "report", overlap), inputs.panel)


@pytest.fixture
def target(simulated: DefaultData) -> PhasedData:
    return read_phased(simulated.target)


@pytest.fixture
def targets(target: PhasedData, inputs: PanelInputs) -> Targets:
    return matched(target, inputs)


@pytest.fixture
def own(target: PhasedData, inputs: PanelInputs) -> Targets:
    """Targets that are in the panel, under their names there."""
    panel = read_phased(inputs.panel.path)
    row = {site: number for number, site in enumerate(panel.sites.identities())}
    typed = np.array([row[site] for site in target.sites.identities()])
    chosen = [5, 30, 41]
    columns = [2 * each + half for each in chosen for half in (0, 1)]
    names = tuple(panel.samples[each] for each in chosen)
    return matched(
        dataclasses.replace(target, samples=names, alleles=panel.alleles[typed][:, columns]), inputs, overlap=True
    )


def found(model: ExportedModel, inputs: PanelInputs, targets: Targets, block: int = 4, transformer: bool = False):
    """Each window with its probabilities."""
    return list(Imputation(model, inputs, targets, CPU, block, transformer).windows())


@pytest.mark.parametrize("transformer", [False, True])
def test_with_all_haplotypes_as_neighbours_stretches_and_windows_give_the_same(
    make_config: MakeConfig, inputs: PanelInputs, own: Targets, monkeypatch: pytest.MonkeyPatch, transformer: bool
) -> None:
    """Targets in the panel copy all samples but themselves either way; the simulated panel has several populations."""
    monkeypatch.setattr(stretches, "_MOST_STRETCH_SITES", 1)  # stretches are the windows then
    haplotypes = 2 * len(inputs.panel.samples)
    model = untrained(make_config(f"embrag.retrieval.k={haplotypes - 2}", "embrag.model.good_turing=true"), head=0.3)
    assert len(inputs.populations.names) > 1
    whole = found(model, inputs, own, transformer=transformer)
    others = found(model, inputs, dataclasses.replace(own, samples=("X", "Y", "Z")), transformer=transformer)
    monkeypatch.setattr(engine, "_way", lambda *given: "windows")
    one_by_one = found(model, inputs, own, transformer=transformer)
    assert len(whole) == len(one_by_one) > 3
    for (window, one), (same, copied) in zip(whole, one_by_one, strict=True):
        assert window == same
        np.testing.assert_allclose(one, copied, atol=1e-4 if transformer else 2e-5)
    # Under other names they copy themselves, too.
    assert max(np.abs(one - other).max() for (_, one), (_, other) in zip(whole, others, strict=True)) > 0.5


@pytest.mark.parametrize(
    "setting", ["embrag.retrieval.mode=token", "embrag.model.fusion=rare_variant", "on a GPU without CuPy"]
)
def test_a_model_that_does_not_copy_stretches_loses_its_residual_alone(
    make_config: MakeConfig, inputs: PanelInputs, targets: Targets, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head of zeros adds no residual, so a network with it must give the same."""
    if setting == "on a GPU without CuPy":
        monkeypatch.setattr(engine, "_way", lambda *given: "windows")  # one without kernels for it
        setting = "embrag.model.fusion=copying"
    model = untrained(make_config(setting), head=0.3)
    weights = {
        name: torch.zeros_like(each) if name.startswith("head.") else each for name, each in model.weights.items()
    }
    headless = ExportedModel.of(model.config, weights, model.snapshot)
    everything = (
        found(model, inputs, targets),
        found(headless, inputs, targets, transformer=True),
        found(model, inputs, targets, transformer=True),
    )
    for (_, one), (_, other), (_, all_of_it) in zip(*everything, strict=True):
        np.testing.assert_array_equal(one, other)
        assert not np.allclose(one, all_of_it)


def test_the_way_follows_from_model_and_device(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    copying, dense = make_config().embrag, make_config("embrag.retrieval.store=dense").embrag
    others = [
        make_config(each).embrag
        for each in ("embrag.retrieval.mode=none", "embrag.retrieval.mode=token", "embrag.model.fusion=rare_variant")
    ]
    gpu = torch.device("cuda", 0)
    assert engine._way(copying, CPU, 100) == "loop"
    assert engine._way(copying, gpu, 100) == "windows"  # there is no CuPy here, or it has no device
    monkeypatch.setattr(li_stephens, "copying_backend", lambda device: "cuda kernel")
    assert engine._way(copying, gpu, 16384) == "whole"
    assert engine._way(copying, gpu, 16386) == "windows"
    assert engine._way(dense, gpu, 100) == "windows"
    assert {engine._way(each, where, 100) for each in others for where in (CPU, gpu)} == {"windows"}


def test_nothing_is_retrieved_for_a_stretch(
    make_config: MakeConfig, inputs: PanelInputs, targets: Targets, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: object, **named: object) -> None:
        raise AssertionError("a batch is made")

    monkeypatch.setattr(Prefetcher, "__init__", refuse)
    for transformer in (False, True):
        assert len(found(untrained(make_config(), head=0.0), inputs, targets, transformer=transformer)) == 1


def test_with_the_transformer_neither_threads_nor_blocks_change_a_number(
    make_config: MakeConfig, inputs: PanelInputs, targets: Targets
) -> None:
    model = untrained(make_config("embrag.model.layers=2"), head=0.3)
    ((_, expected),) = found(model, inputs, targets, transformer=True)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        ((_, other),) = found(model, inputs, targets, transformer=True)
    finally:
        torch.set_num_threads(threads)
    np.testing.assert_array_equal(expected, other)
    ((_, other),) = found(model, inputs, targets, block=3, transformer=True)
    np.testing.assert_array_equal(expected, other)


def test_stretches_are_as_long_as_memory_allows(
    make_config: MakeConfig, inputs: PanelInputs, targets: Targets, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = untrained(make_config(), head=0.0)
    shortest = model.config.data.window_sites
    haplotypes, sites = 2 * len(inputs.panel.samples), len(inputs.panel.sites)

    def windows(of: Targets, transformer: bool = False) -> list[Window]:
        return Imputation(model, inputs, of, CPU, 4, transformer).data.windows

    def longest(of: Targets = targets) -> int:
        return max(each.core_stop - each.core_start for each in windows(of))

    assert longest() == sites > 2 * shortest
    # Twelve bytes for each haplotype in a block, which ends after 64 sites or with a typed one.
    of_a_site = 12 * haplotypes * (1 / 64 + targets.typed.mean())

    def limited(most: float) -> None:
        for module in (stretches, stretch):
            monkeypatch.setattr(module, "MOST_STRETCH_BYTES", most)

    limited(2 * shortest * of_a_site)
    assert shortest < longest() <= 2 * shortest
    fewer = dataclasses.replace(targets, typed=np.arange(sites) % 100 == 0)
    assert longest() < longest(fewer) <= 2 * shortest * of_a_site / haplotypes
    # Eight bytes for each target's dosages: so many of these take twice the memory.
    many = dataclasses.replace(targets, samples=tuple(map(str, range(int(of_a_site / 4)))))
    assert longest(many) <= shortest + 1 < longest()
    limited(haplotypes)
    assert windows(targets) == windows(targets, transformer=True)
    limited(1 << 28)
    monkeypatch.setattr(stretches, "_MOST_STRETCH_SITES", 2 * shortest)
    assert shortest < longest() <= 2 * shortest


def written(model: ExportedModel, inputs: PanelInputs, targets: Targets, path: Path) -> np.ndarray:
    """Haplotype dosages [sites, 2N] of an imputed file."""
    impute_to_vcf(Imputation(model, inputs, targets, CPU, 4, transformer=False), path)
    dosage = read_dosages(path).haplotype_dosage
    assert dosage is not None
    return dosage


def test_two_stretches_are_blended_and_give_nearly_the_dosages_of_the_whole(
    make_config: MakeConfig, inputs: PanelInputs, targets: Targets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies beyond a long flank hardly matters; without one, a stretch's ends would differ."""
    sites = len(inputs.panel.sites)
    half = sites // 2 + 8  # two stretches with an overlap of 16 sites
    apart: dict[int, np.ndarray] = {}
    for flank in (0, 100):
        model = untrained(make_config(f"embrag.data.flank_sites={flank}"), head=0.0)
        with monkeypatch.context() as patch:
            whole = written(model, inputs, targets, tmp_path / "whole.vcf.gz")
            patch.setattr(stretches, "_MOST_STRETCH_SITES", half)
            both = found(model, inputs, targets)
            assert len(both) == 2
            blended = written(model, inputs, targets, tmp_path / "two.vcf.gz")
        (left, before), (right, after) = both
        size = left.core_stop - right.core_start
        assert size == 16 and left.core_start == 0 and right.core_stop == sites
        for site in np.flatnonzero(~targets.typed).tolist():
            weight = min(max((site - right.core_start + 1) / (size + 1), 0), 1)
            expected = np.zeros(len(before))
            if weight < 1:
                expected += (1 - weight) * before[:, site]
            if weight > 0:
                expected += weight * after[:, site - right.core_start]
            np.testing.assert_allclose(blended[site], expected, atol=0.00051)
        apart[flank] = np.abs(blended - whole)[~targets.typed]
    assert apart[100].mean() < 0.002 and np.quantile(apart[100], 0.99) < 0.02
    assert apart[0].mean() > 2 * apart[100].mean()


def test_samples_do_not_depend_on_their_block_or_on_one_another(
    make_config: MakeConfig, inputs: PanelInputs, target: PhasedData, targets: Targets
) -> None:
    model = untrained(make_config(), head=0.0)
    ((_, expected),) = found(model, inputs, targets, block=9)
    for block in (1, 4, 50):
        ((_, other),) = found(model, inputs, targets, block=block)
        np.testing.assert_array_equal(other, expected)
    alone = dataclasses.replace(target, samples=target.samples[4:5], alleles=target.alleles[:, 8:10])
    ((_, other),) = found(model, inputs, matched(alone, inputs))
    np.testing.assert_array_equal(other, expected[8:10])


def test_where_nothing_is_typed_the_frequency_is_given(
    make_config: MakeConfig, inputs: PanelInputs, target: PhasedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a stretch without typed sites, and for a haplotype that misses all its calls in one."""
    monkeypatch.setattr(stretches, "_MOST_STRETCH_SITES", 1)
    model = untrained(make_config(), head=0.0)
    first = target.sites.take(np.arange(3))
    few = matched(dataclasses.replace(target, sites=first, alleles=target.alleles[:3]), inputs)
    imputation = Imputation(model, inputs, few, CPU, 4, transformer=False)
    empty = 0
    for window, probability in imputation.windows():
        if not few.typed[window.sites].any():
            frequency = imputation.data.reference.allele_frequency[window.core_sites]
            np.testing.assert_array_equal(probability, np.repeat(frequency[None], 18, axis=0))
            empty += 1
    assert empty > 2
    targets = matched(target, inputs)

    def missing(self: Targets, sites: slice, samples: slice) -> np.ndarray:
        lost = np.zeros((18, sites.stop - sites.start), dtype=bool)
        lost[[3, 10]] = True
        return lost[2 * samples.start : 2 * samples.stop]

    imputation = Imputation(model, inputs, targets, CPU, 4, transformer=False)
    expected = list(imputation.windows())
    monkeypatch.setattr(Targets, "missing_alleles", missing)
    for (window, probability), (_, whole) in zip(imputation.windows(), expected, strict=True):
        frequency = imputation.data.reference.allele_frequency[window.core_sites]
        others = np.setdiff1d(np.arange(18), [3, 10])
        np.testing.assert_array_equal(probability[[3, 10]], np.repeat(frequency[None], 2, axis=0))
        np.testing.assert_array_equal(probability[others], whole[others])


@pytest.mark.parametrize(("way", "purpose"), [("loop", "copy"), ("windows", "retrieve")])
def test_a_panel_of_one_sample_is_refused(
    make_config: MakeConfig,
    inputs: PanelInputs,
    targets: Targets,
    monkeypatch: pytest.MonkeyPatch,
    way: str,
    purpose: str,
) -> None:
    """Nothing would be left to copy."""
    panel = inputs.panel
    alone = dataclasses.replace(
        panel,
        samples=panel.samples[:1],
        packed=np.packbits(panel.alleles_at(np.arange(len(panel.sites)))[:, :2], axis=1, bitorder="little"),
    )
    small = dataclasses.replace(
        inputs,
        panel=alone,
        populations=dataclasses.replace(inputs.populations, of=inputs.populations.of[:1]),
    )
    model = untrained(make_config(), head=0.0)
    monkeypatch.setattr(engine, "_way", lambda *given: way)
    with pytest.raises(UserError, match=f"2 reference haplotypes are too few to {purpose} from"):
        Imputation(model, small, targets, CPU, 4)


@pytest.fixture
def run(
    make_config: MakeConfig, simulated: DefaultData, cache_dir: Path, tmp_path: Path
) -> Callable[..., tuple[bytes, np.ndarray]]:
    """Function that runs the command with these options; returns the file and its dosages."""
    model = untrained(make_config(), head=0.3)
    write_export(tmp_path / "model.safetensors", model)
    files = [f"--{name}={getattr(simulated, name)}" for name in ("panel", "target", "samples")]
    given = [*files, f"--map={simulated.genetic_map}", f"--model={tmp_path / 'model.safetensors'}", "--adapt=off"]
    out = tmp_path / "out.vcf.gz"

    def impute(*options: str) -> tuple[bytes, np.ndarray]:
        main(arguments=["impute", *given, f"--cache-dir={cache_dir}", f"--out={out}", "--device=cpu", *options])
        return out.read_bytes(), read_dosages(out).dosage

    return impute


def test_the_transformer_is_off_on_a_cpu_unless_asked_for(
    run: Callable[..., tuple[bytes, np.ndarray]], caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level("INFO")
    by_default, _ = run()
    assert caplog.messages.count(SAID) == 1
    caplog.clear()
    off, without = run("--transformer", "off")
    on, whole = run("--transformer=on")
    assert SAID not in caplog.messages, "who chose needs no advice"
    assert by_default == off != on
    assert np.abs(whole - without).max() > 0.05
    for wrong in ("auto", ""):
        with pytest.raises(SystemExit) as ended:
            run(f"--transformer={wrong}")
        assert ended.value.code == 2
        assert "argument --transformer: invalid choice" in capsys.readouterr().err.splitlines()[-1]


class Reached(Exception):
    """The imputation would begin."""


@pytest.mark.parametrize(("asked", "expected"), [(None, False), (True, True), (False, False)])
def test_the_transformer_is_off_on_a_gpu_unless_asked_for(
    asked: bool | None,
    expected: bool,
    make_config: MakeConfig,
    simulated: DefaultData,
    cache_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    seen: list[Any] = []

    def begin(
        model: object,
        inputs: object,
        targets: object,
        device: object,
        block: int,
        transformer: bool,
        precision: Precision,
    ) -> None:
        seen.append(transformer)
        raise Reached

    caplog.set_level("INFO")
    monkeypatch.setattr(imputation_module, "_device", lambda name: "cuda:0")
    monkeypatch.setattr(imputation_module, "Imputation", begin)
    model = untrained(make_config(), head=0.3)
    write_export(tmp_path / "model.safetensors", model)
    files = PanelFiles(simulated.panel, simulated.genetic_map, simulated.samples)
    with pytest.raises(Reached):
        impute(
            files,
            simulated.target,
            tmp_path / "out.vcf.gz",
            model=tmp_path / "model.safetensors",
            transformer=asked,
            adapt="off",
            cache_dir=cache_dir,
        )
    assert seen == [expected] and (SAID in caplog.messages) == (asked is None)
