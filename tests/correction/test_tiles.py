"""The transformer's correction on a CPU beside the network that it was trained as."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch

from embrag_ds.config import RunConfig
from embrag_ds.copying.along import Copied
from embrag_ds.correction import loops
from embrag_ds.correction.network import network_part
from embrag_ds.correction.tiles import TransformerTiles
from embrag_ds.data.tokens import MASK
from embrag_ds.data.windows import DataConfig
from embrag_ds.export import ExportedModel
from embrag_ds.model.compiled import CoreInputs
from embrag_ds.model.numbers import LEAST_TRANSFORMED
from embrag_ds.model.site_tiles import SiteTiles
from tests.digests import digest_of
from tests.untrained import untrained

MakeConfig = Callable[..., RunConfig]


class Case(NamedTuple):
    """Targets that were copied in a core, and their probabilities before the correction."""

    copied: Copied
    position: np.ndarray
    frequency: np.ndarray
    typed: np.ndarray
    alleles: np.ndarray
    probability: np.ndarray


def random_case(seed: int, sites: int, haplotypes: int = 6, rows: int = 2, turing: float = 0.0) -> Case:
    rng = np.random.default_rng(seed)
    frequency = rng.beta(0.3, 1, sites).clip(1e-4, 1 - 1e-4).astype(np.float32)
    frequency[:2] = (0.5, 1e-7)[:sites]
    overall = np.stack([frequency, *(frequency * rng.uniform(0.5, 1) for _ in range(rows - 1))]).astype(np.float32)
    dosage = np.where(rng.random((haplotypes, sites)) < 0.4, rng.random((haplotypes, sites)), frequency > 0.5)
    expected = (frequency * rng.uniform(0.5, 1.5, (haplotypes, sites))).clip(0, 1)
    copied = Copied(
        np.stack([dosage, expected], axis=1).astype(np.float32),
        overall,
        rng.normal(0, turing, overall.shape).astype(np.float32),
        rng.integers(0, rows, haplotypes),
    )
    typed = np.flatnonzero(rng.random(sites) < 0.2)
    alleles = rng.choice(3, (haplotypes, len(typed)), p=[0.45, 0.45, 0.1]).astype(np.uint8)
    position = np.cumsum(rng.exponential(0.01, sites)).astype(np.float32)
    return Case(copied, position, frequency, typed, alleles, dosage.clip(1e-3, 1 - 1e-3).astype(np.float32))


def disturbed(model: ExportedModel) -> ExportedModel:
    """The model with noise on all weights: those of norms and biases are 0 or 1 before training."""
    rng = np.random.default_rng(1)
    arrays = {
        name: (each + rng.normal(0, 0.1, each.shape)).astype(np.float32)
        for name, each in model.arrays.items()
        if "pooling" not in name
    }
    return dataclasses.replace(model, arrays={**model.arrays, **arrays})


def corrected(model: ExportedModel, case: Case) -> np.ndarray:
    probability = case.probability.copy()
    tiles = TransformerTiles(network_part(*model.parts, model.config.model), model.config.data)
    given = case.copied, case.position, case.frequency, case.typed, case.alleles
    tiles.add(probability, *given, lambda sites: lambda begun: None)
    return probability


def by_network(model: ExportedModel, case: Case) -> tuple[np.ndarray, np.ndarray]:
    """The corrected probabilities, and where the minor allele is as likely as the least that is corrected."""
    network, settings = model.network(), model.config.data
    layer = network.embedding
    if model.snapshot is not None:
        layer = layer.twin().requires_grad_(False)
        layer.load_state_dict(model.snapshot)
    tiles = SiteTiles(settings.window_sites, settings.overlap_sites, lambda sites: layer.codebook(sites)[:, :2])
    copied, (haplotypes, sites) = case.copied, case.probability.shape
    tokens = np.full((haplotypes, sites), MASK, dtype=np.int64)
    tokens[:, case.typed] = case.alleles
    values = torch.from_numpy(copied.values)
    given = CoreInputs(
        position=torch.from_numpy(case.position),
        site_frequency=torch.from_numpy(case.frequency),
        tokens=torch.from_numpy(tokens),
        alleles=torch.from_numpy(tokens),
        scored=torch.from_numpy(tokens),
        frequency=torch.from_numpy(copied.frequency[copied.row_of]),
        population_frequency=values[:, 1:],
        good_turing=torch.from_numpy(copied.good_turing[copied.row_of]),
        dosage=values[:, 0],
        ancestry=torch.ones(1, 1, 1).expand(haplotypes, 1, sites),
    )
    with torch.no_grad():
        prior, _ = network._prior(given)
        (correction,) = tiles(lambda tile: (network._transformed(tile, *network._prior(tile), None),), given)
    minor = torch.where(given.frequency > 0.5, -prior, prior).sigmoid().numpy()
    odds = torch.logit(torch.from_numpy(case.probability).double()) + correction
    found = torch.where(correction == 0, torch.from_numpy(case.probability).double(), odds.sigmoid())
    return found.numpy(), np.abs(minor / LEAST_TRANSFORMED - 1) < 1e-4


def assert_equal(found: np.ndarray, of_network: tuple[np.ndarray, np.ndarray]) -> None:
    """Assert equality within rounding, of which the highest octave of a frequency's features has most."""
    expected, either_way = of_network
    apart = np.abs(found - expected)[~either_way]
    assert apart.max() < 1e-3 and np.median(apart) < 1e-5


SETTINGS = [
    (),
    ("embrag.model.layers=3",),
    ("embrag.model.dims=24", "embrag.model.heads=3", "embrag.model.ffn_multiple=3"),
    ("embrag.model.dims=36", "embrag.model.heads=1", "embrag.model.layers=2"),
    ("embrag.model.dims=80", "embrag.model.heads=2", "embrag.model.good_turing=true"),
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("sites", [1, 41, 300])
def test_the_loop_computes_what_the_network_does(
    make_config: MakeConfig, settings: tuple[str, ...], sites: int
) -> None:
    """In tiles, for targets in the panel and outside, with missing calls, whatever the sizes of its layers."""
    shape = ["embrag.data.window_sites=130", "embrag.data.overlap_sites=16"]
    model = disturbed(untrained(make_config(*shape, *settings), head=0.5))
    case = random_case(sites, sites, turing=0.1 * model.config.model.good_turing)
    found = corrected(model, case)
    assert_equal(found, by_network(model, case))
    assert sites == 1 or (np.abs(found - case.probability) > 0.01).sum() > sites / 2


def test_without_a_snapshot_the_network_encodes_the_panel(make_config: MakeConfig) -> None:
    model = disturbed(untrained(make_config(), head=0.5))
    live = ExportedModel.of(model.config, model.weights, None)
    case = random_case(5, 60)
    assert_equal(corrected(live, case), by_network(live, case))
    assert np.abs(corrected(live, case) - corrected(model, case)).max() > 1e-3


def test_no_haplotype_depends_on_another(make_config: MakeConfig) -> None:
    model, case = disturbed(untrained(make_config(), head=0.5)), random_case(6, 90, haplotypes=7)
    whole = corrected(model, case)
    for n in range(7):
        copied = case.copied
        alone = copied._replace(values=copied.values[n : n + 1], row_of=copied.row_of[n : n + 1])
        one = case._replace(copied=alone, alleles=case.alleles[n : n + 1], probability=case.probability[n : n + 1])
        np.testing.assert_array_equal(corrected(model, one)[0], whole[n])


def test_certain_and_uncorrected_probabilities_stay_as_they_are(make_config: MakeConfig) -> None:
    model, case = untrained(make_config(), head=0.0), random_case(7, 80)
    np.testing.assert_array_equal(corrected(model, case), case.probability)
    certain = case._replace(probability=np.round(case.probability))
    assert set(np.unique(certain.probability)) == {0, 1}
    large = disturbed(untrained(make_config(), head=50.0))
    np.testing.assert_array_equal(corrected(large, certain), certain.probability)
    found = corrected(large, case)
    assert np.isfinite(found).all() and found.min() >= 0 and found.max() <= 1


def test_progress_is_told_of_every_tile(make_config: MakeConfig) -> None:
    model, case = untrained(make_config(), head=0.3), random_case(8, 200)
    data = dataclasses.replace(model.config.data, window_sites=70, overlap_sites=10)
    assert isinstance(data, DataConfig)
    told: list[list[int]] = []

    def watch(sites: int) -> Callable[[int], None]:
        told.append([sites])
        return told[-1].append

    given = case.copied, case.position, case.frequency, case.typed, case.alleles
    TransformerTiles(network_part(*model.parts, model.config.model), data).add(case.probability, *given, watch)
    assert sum(each[0] for each in told) == 200 and len(told) > 2
    assert all(each[-1] == 6 for each in told)


def test_the_loop_changes_with_its_parts() -> None:
    """Or numba would go on with what it has kept of it, whose parts are older."""
    assert digest_of("correction", "layers", "records") == loops.PARTS
