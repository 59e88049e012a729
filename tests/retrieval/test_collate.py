"""Collator: contents of a batch, excluded samples, and no leak of masked alleles."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from embrag_ds.data.sampler import QueryBatch
from embrag_ds.data.tokens import MASK
from embrag_ds.errors import UserError
from embrag_ds.ops.dosage import Carriers, Sequences, dense_alleles

WAY = pytest.mark.parametrize("way", range(3), ids=["factored-torch", "factored-faiss", "dense"])


def leaves(value: Any, name: str = "batch") -> Iterator[tuple[str, Any]]:
    """All tensors and plain values of a batch, with their paths."""
    if isinstance(value, Carriers | Sequences):
        yield name, dense_alleles(value)  # list entries after the last carrier or sequence are undefined
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from leaves(getattr(value, field.name), f"{name}.{field.name}")
    else:
        yield name, value


def equal(one: Any, two: Any) -> bool:
    return torch.equal(one, two) if isinstance(one, Tensor) else one == two


def owners(world, ids: Tensor) -> np.ndarray:
    return world.data.reference.sample_of[ids.numpy()]


@WAY
@pytest.mark.parametrize("seed", range(3))
def test_no_sample_retrieves_itself_or_a_relative_even_among_identical_samples(
    build, tmp_path: Path, way: int, seed: int
) -> None:
    alleles = build.random_alleles(seed, 40, 14)
    # Samples 0 to 5 are identical; 0 is related to 3, and 1 to none.
    alleles[:, :12] = np.tile(alleles[:, :2], 6)
    relatives = tmp_path / "relatives.txt"
    relatives.write_text("p3 p0\np0 p9\np12 p13\n", encoding="utf-8")
    world = build(alleles)
    collate = world.collator(world.embedding(seed), *build.ways[way], 6, relatives)
    samples = [5, 0, 12, 1]
    batch = collate(world.batch_of(0, samples, world.masked(0, 4, seed)))
    found = owners(world, batch.retrieved.ids)
    barred = {5: {5}, 0: {0, 3, 9}, 12: {12, 13}, 1: {1}}
    for row, neighbours in enumerate(found):
        sample = samples[row // 2]
        assert not set(neighbours.tolist()) & barred[sample]
    # The other identical samples are found, so the excluded ones are not absent because of their distance.
    for row, sample in ((0, 5), (1, 5), (2, 0), (3, 0), (6, 1), (7, 1)):
        closest = set(found[row, :3].tolist())
        assert closest <= set(range(6)) - barred[sample], (row, found[row])


@settings(max_examples=30)
@given(seed=st.integers(0, 2**32), samples=st.integers(3, 7), way=st.integers(0, 2), data=st.data())
def test_no_training_sample_ever_retrieves_an_excluded_sample(
    build, tmp_path_factory: pytest.TempPathFactory, seed: int, samples: int, way: int, data: st.DataObject
) -> None:
    """With two distinct haplotypes, nearly all distances are tied."""
    rng = np.random.default_rng(seed)
    kinds = build.random_alleles(seed, 6, 1)
    alleles = kinds[:, rng.integers(0, 2, 2 * samples)]
    pair = st.lists(st.integers(0, samples - 1), min_size=2, max_size=2, unique=True)
    pairs = data.draw(st.lists(pair, max_size=1))
    path = tmp_path_factory.mktemp("relatives") / "relatives.txt"
    path.write_text("".join(f"p{a} p{b}\n" for a, b in pairs), encoding="utf-8")
    world = build(alleles)
    collate = world.collator(world.embedding(seed), *build.ways[way], 64, path)
    all_samples = np.arange(samples)
    batch = collate(world.batch_of(0, all_samples, world.masked(0, samples, seed)))
    found = owners(world, batch.retrieved.ids)
    assert batch.retrieved.ids.shape == (2 * samples, collate.k)
    for row, neighbours in enumerate(found.tolist()):
        sample = row // 2
        relatives = {a for a, b in pairs if b == sample} | {b for a, b in pairs if a == sample}
        assert not set(neighbours) & ({sample} | relatives)


@WAY
def test_samples_outside_the_panel_may_retrieve_any_haplotype(build, way: int) -> None:
    alleles = build.random_alleles(2, 20, 6)
    world = build(alleles)
    collate = world.collator(world.embedding(), *build.ways[way], 4)
    masked = np.zeros((1, 20), dtype=bool)
    outside = QueryBatch(0, np.array([-1]), np.ascontiguousarray(alleles[:, 4:6].T), masked)
    assert owners(world, collate(outside).retrieved.ids)[:, 0].tolist() == [2, 2]


@WAY
def test_autocast_around_it_changes_nothing(build, way: int) -> None:
    """The network's products may be in bf16; distances in bf16 would rank other haplotypes first."""
    world = build(build.random_alleles(5, 50, 12), flank=9)
    collate = world.collator(world.embedding(5), *build.ways[way], 5)
    queries = world.batch_of(0, [0, 4, 7], world.masked(0, 3, 5))
    expected = collate(queries)
    with torch.autocast("cpu", torch.bfloat16):
        found = collate(queries)
    for (name, first), (_, second) in zip(leaves(expected), leaves(found), strict=True):
        assert equal(first, second), name


@WAY
@pytest.mark.parametrize("seed", range(4))
def test_the_truth_at_masked_sites_reaches_nothing_but_the_truth_itself(build, way: int, seed: int) -> None:
    world = build(build.random_alleles(seed, 50, 12), window_sites=20, overlap=4, flank=9)
    collate = world.collator(world.embedding(seed), *build.ways[way], 5)
    for window in range(len(world.data)):
        queries = world.batch_of(window, [0, 4, 7], world.masked(window, 3, seed))
        lying = queries.alleles ^ np.repeat(queries.masked, 2, axis=0)
        assert not np.array_equal(lying, queries.alleles)
        one, two = collate(queries), collate(dataclasses.replace(queries, alleles=lying))
        for (name, first), (_, second) in zip(leaves(one), leaves(two), strict=True):
            if name == "batch.core.alleles":
                assert torch.equal(first == second, ~one.core.masked)
            else:
                assert equal(first, second), name


@WAY
def test_a_batch_holds_what_its_docstring_states(build, way: int) -> None:
    alleles = build.random_alleles(3, 50, 12)
    world = build(alleles, populations=[0, 1, 2] * 4, window_sites=20, overlap=4, flank=9)
    embedding = world.embedding()
    collate = world.collator(embedding, *build.ways[way], 5)
    for number, window in enumerate(world.data.windows):
        samples = [2, 8]
        queries = world.batch_of(number, samples, world.masked(number, 2, number))
        batch, length = collate(queries), len(window)
        found = batch.retrieved
        assert (batch.window.number, batch.window.core) == (number, window.core)
        for row in range(4):
            truth = alleles[window.start : window.stop, 2 * samples[row // 2] + row % 2]
            masked = queries.masked[row // 2]
            observed = [site for site in range(length) if not masked[site]]
            tokens = [MASK if masked[site] else int(truth[site]) for site in range(length)]
            assert batch.core.tokens[row].tolist() == tokens[window.core]
            assert batch.core.masked[row].tolist() == masked.tolist()[window.core]
            assert batch.core.alleles[row].tolist() == truth.tolist()[window.core]
            assert int(batch.window.typed_count[row]) == len(observed)
            filling = batch.window.typed.shape[1] - len(observed)
            assert batch.window.typed[row].tolist() == observed + [length - 1] * filling
            for place, haplotype in enumerate(found.ids[row].tolist()):
                reference = alleles[window.start : window.stop, haplotype]
                assert dense_alleles(found.alleles)[row, place].tolist() == reference.tolist()[window.core]
                mismatch = [bool(reference[site] != truth[site]) for site in observed]
                assert found.mismatch[row, :, place].tolist() == mismatch + [False] * filling
                assert int(found.population[row, place]) == haplotype // 2 % 3
        assert batch.window.typed.shape[1] == int(batch.window.typed_count.max())
        assert torch.equal(found.codebook, embedding.codebooks[number][window.core, :2])
        assert batch.window.sites.position.shape == batch.window.sites.frequency.shape == (length,)


@WAY
def test_neighbours_come_nearest_first(build, way: int) -> None:
    world = build(build.random_alleles(3, 50, 12), reference=range(2, 12))
    embedding = world.embedding()
    queries = world.batch_of(0, [0, 1], world.masked(0, 2, 1))
    batch = world.collator(embedding, *build.ways[way], 20)(queries)
    weight = ((embedding.codebooks[0][:, 1] - embedding.codebooks[0][:, 0]) ** 2).sum(-1)
    distance = (batch.retrieved.mismatch * weight[batch.window.typed][..., None]).sum(1)
    assert (torch.diff(distance, dim=1) > -1e-3).all()
    assert float(distance.min()) < float(distance.max())


def test_the_neighbours_of_a_sample_do_not_depend_on_its_batch_mates(build) -> None:
    world = build(build.random_alleles(3, 50, 12))
    for way in build.ways:
        collate = world.collator(world.embedding(), *way, 5)
        masked = world.masked(0, 3, 1)
        together = collate(world.batch_of(0, [1, 5, 7], masked))
        for place, sample in enumerate((1, 5, 7)):
            alone = collate(world.batch_of(0, [sample], masked[place : place + 1]))
            assert torch.equal(alone.retrieved.ids, together.retrieved.ids[2 * place : 2 * place + 2])


@pytest.mark.parametrize(("samples", "wanted", "given"), [(6, 100, 10), (6, 10, 10), (6, 3, 3), (2, 9, 2)])
def test_k_is_what_every_query_can_have(build, samples: int, wanted: int, given: int) -> None:
    world = build(build.random_alleles(1, 10, samples))
    collate = world.collator(world.embedding(), "factored", "torch", wanted)
    assert collate.k == given
    batch = collate(world.batch_of(0, range(samples), world.masked(0, samples, 1)))
    assert batch.retrieved.ids.shape == (2 * samples, given)


def test_too_few_reference_haplotypes_are_a_user_error(build) -> None:
    world = build(build.random_alleles(1, 10, 3), reference=[1])
    with pytest.raises(UserError, match="2 reference haplotypes are too few"):
        world.collator(world.embedding(), "factored", "torch", 4)
