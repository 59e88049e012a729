"""Both stores and all backends against an explicit search by squared L2 distance."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embrag_ds.data.tokens import MASK
from embrag_ds.errors import UserError
from embrag_ds.model.embedding import HaplotypeEmbedding, gather_embeddings
from embrag_ds.retrieval.codebooks import encode_window, site_weights
from embrag_ds.retrieval.collate import site_tensors
from embrag_ds.retrieval.dense import DenseStore
from embrag_ds.retrieval.schedule import Generation
from embrag_ds.retrieval.search import FaissCpuSearch, TorchSearch, barred, make_search
from embrag_ds.retrieval.store import Query

CPU = torch.device("cpu")
FIRST = Generation(0, 0, 0)


def make_query(world, samples: int, seed: int, rate: float = 0.5, excluded_samples: int = 1) -> Query:
    """Query of samples in window 0, each with a mask; it excludes the sample and the next ``excluded_samples - 1``."""
    number = np.arange(samples)
    queries = world.batch_of(0, number, world.masked(0, samples, seed, rate))
    masked = torch.from_numpy(queries.masked).repeat_interleave(2, 0)
    tokens = torch.from_numpy(queries.alleles).long().masked_fill(masked, MASK)
    owner = torch.from_numpy(world.data.reference.sample_of)
    sample = torch.arange(samples).repeat_interleave(2)[:, None]
    excluded = (owner >= sample) & (owner < sample + excluded_samples)
    observed = np.flatnonzero(~queries.masked.all(0))
    return world.query(0, tokens, observed if observed.size else np.zeros(1, dtype=np.int64), excluded)


def barred_from(query: Query) -> np.ndarray:
    return barred(query.excluded, query.alleles.shape[1]).numpy()


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32),
    sites=st.integers(1, 20),
    samples=st.integers(2, 6),
    rate=st.sampled_from([0.0, 0.5, 0.9]),
    data=st.data(),
)
def test_every_store_and_backend_finds_the_nearest_by_explicit_squared_l2(
    build, seed: int, sites: int, samples: int, rate: float, data: st.DataObject
) -> None:
    world = build(build.random_alleles(seed, sites, samples))
    barred = data.draw(st.integers(1, samples - 1))
    k = data.draw(st.integers(1, 2 * (samples - barred)))
    query = make_query(world, samples, seed, rate, barred)
    embedding = world.embedding(seed)
    oracle = build.distances(query, embedding, world.data)
    for way in build.ways:
        build.check_nearest(build.search(world, embedding, query, way, k), oracle, barred_from(query), k)


@pytest.mark.parametrize("seed", range(3))
def test_stores_and_backends_agree_on_ids_where_distances_are_distinct(build, seed: int) -> None:
    world = build(build.random_alleles(seed, 60, 20))
    query, embedding = make_query(world, 5, seed, 0.6), world.embedding(seed)
    k = 15
    first, *others = (build.search(world, embedding, query, way, k + 1) for way in build.ways)
    gap = torch.diff(first.distance) > 1e-3
    alone = torch.cat([gap[:, :1], gap[:, 1:] & gap[:, :-1]], dim=1)
    assert alone.float().mean() > 0.9
    for other in others:
        assert torch.allclose(first.distance, other.distance, rtol=1e-4, atol=1e-3)
        assert torch.equal(first.ids[:, :k][alone], other.ids[:, :k][alone])


@pytest.mark.parametrize("sites", [1, 30])
def test_torch_and_faiss_agree_on_random_weights(sites: int) -> None:
    maker = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 2, (7, sites), generator=maker)
    weights = torch.rand(7, sites, generator=maker) * (torch.rand(7, sites, generator=maker) < 0.7)
    reference = torch.randint(0, 2, (sites, 90), generator=maker, dtype=torch.uint8)
    excluded = torch.randint(0, 91, (7, 25), generator=maker)
    one, two = (
        each.nearest(tokens, weights, reference, 90, excluded, 20) for each in (TorchSearch(), FaissCpuSearch())
    )
    explicit = (weights[:, :, None] * (tokens[:, :, None] != reference)).sum(1)
    for distance, ids in (one, two):
        assert torch.allclose(distance, explicit.gather(1, ids), atol=1e-4)
        assert not barred(excluded, 90).gather(1, ids).any()
        assert (torch.diff(distance) >= -1e-5).all()
    assert torch.allclose(one[0], two[0], atol=1e-4)


def test_the_faiss_backend_and_the_dense_store_really_run_faiss(build, monkeypatch: pytest.MonkeyPatch) -> None:
    import faiss

    ran = []
    knn, index = faiss.knn, faiss.IndexFlatL2
    monkeypatch.setattr(faiss, "knn", lambda *given, **named: (ran.append("knn"), knn(*given, **named))[1])
    monkeypatch.setattr(faiss, "IndexFlatL2", lambda width: (ran.append("flat"), index(width))[1])
    world = build(build.random_alleles(1, 10, 4))
    for way, name in ((("factored", "torch"), None), (("factored", "faiss-cpu"), "knn"), (("dense", "torch"), "flat")):
        ran.clear()
        build.search(world, world.embedding(), make_query(world, 2, 1), way, 2)
        assert set(ran) == ({name} if name else set())


def test_a_dense_store_without_faiss_is_refused_in_one_line(build, monkeypatch: pytest.MonkeyPatch) -> None:
    world = build(build.random_alleles(1, 10, 4))
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "faiss" else found(name))
    with pytest.raises(UserError, match=r"store=dense: FAISS is not installed; install the 'cpu' extra or use"):
        DenseStore(world.data, 8, 1.0, CPU)


def test_auto_is_torch() -> None:
    assert make_search("auto", CPU).name == "torch"


@pytest.mark.parametrize("name", ["faiss-gpu", "cupy"])
def test_a_gpu_backend_without_a_gpu_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(UserError, match=f"backend={name}: there is no CUDA device here; choose torch"):
        make_search(name, CPU)


@pytest.mark.parametrize("way", range(3))
def test_planted_neighbours_are_found_first(build, way: int) -> None:
    rng = np.random.default_rng(5)
    alleles = build.random_alleles(5, 80, 30)
    # Haplotypes 20, 31 and 44 are copies of the first query, with none, two and four sites changed.
    planted = [20, 31, 44]
    for changes, haplotype in zip((0, 2, 4), planted, strict=True):
        alleles[:, haplotype] = alleles[:, 0]
        alleles[rng.choice(80, changes, replace=False), haplotype] ^= 1
    world = build(alleles)
    found = build.search(world, world.embedding(), make_query(world, 1, 1, rate=0.0), build.ways[way], 3)
    assert found.ids[0].tolist() == planted
    assert found.distance[0, 0] == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("way", range(3))
def test_masked_sites_never_change_ids_or_distances(build, way: int) -> None:
    alleles = build.random_alleles(3, 50, 12)
    world = build(alleles, reference=range(4, 12))
    masked = world.masked(0, 4, 1, 0.6)
    flipped = alleles.copy()
    for haplotype in range(8):
        flipped[masked[haplotype // 2], haplotype] ^= 1
    assert not np.array_equal(alleles, flipped)
    found = []
    for truth in (alleles, flipped):
        again = build(truth, reference=range(4, 12))
        batch = again.collator(again.embedding(), *build.ways[way], 6)(again.batch_of(0, range(4), masked))
        query = again.query(0, batch.core.tokens, np.arange(50), torch.zeros(8, 16, dtype=torch.bool))
        found.append((batch.retrieved.ids, build.search(again, again.embedding(), query, build.ways[way], 6)))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1].ids, found[1][1].ids)
    assert torch.equal(found[0][1].distance, found[1][1].distance)


@pytest.mark.parametrize("way", range(3))
def test_reference_alleles_at_masked_sites_do_not_count(build, way: int) -> None:
    """Even where the site is observed in other samples of the batch."""
    alleles = build.random_alleles(3, 40, 10)
    masked = np.zeros((2, 40), dtype=bool)
    masked[0, :20], masked[1, 20:] = True, True
    changed = alleles.copy()
    changed[:20, 4:] ^= np.random.default_rng(1).integers(0, 2, (20, 16), dtype=np.uint8)
    ids = []
    for panel in (alleles, changed):
        world = build(panel, reference=range(2, 10))
        batch = world.collator(world.embedding(), *build.ways[way], 5)(world.batch_of(0, [0, 1], masked))
        ids.append(batch.retrieved.ids)
    assert torch.equal(ids[0][:2], ids[1][:2])
    assert not torch.equal(ids[0][2:], ids[1][2:])


@pytest.mark.parametrize("way", range(3))
@pytest.mark.parametrize("seed", range(3))
def test_permuting_the_panel_only_permutes_ids(build, way: int, seed: int) -> None:
    alleles = build.random_alleles(seed, 60, 15)
    order = np.random.default_rng(seed).permutation(np.arange(3, 15))
    shuffled = alleles.copy()
    for place, sample in enumerate(order):
        shuffled[:, 6 + 2 * place : 8 + 2 * place] = alleles[:, 2 * sample : 2 * sample + 2]
    found = []
    for panel in (alleles, shuffled):
        world = build(panel, reference=range(3, 15))
        found.append(build.search(world, world.embedding(), make_query(world, 3, 1), build.ways[way], 10))
    where = torch.from_numpy((2 * (order[:, None] - 3) + np.arange(2)).reshape(-1))
    assert torch.allclose(found[0].distance, found[1].distance, rtol=1e-4, atol=1e-3)
    gap = torch.diff(found[0].distance) > 1e-3
    alone = torch.cat([gap[:, :1], gap[:, 1:] & gap[:, :-1]], dim=1)
    assert alone.float().mean() > 0.7
    assert torch.equal(found[0].ids[:, :9][alone], where[found[1].ids][:, :9][alone])


@pytest.mark.parametrize("way", range(3))
def test_a_query_with_nothing_observed_is_equally_far_from_all_but_still_barred_from_itself(build, way: int) -> None:
    world = build(build.random_alleles(1, 12, 5))
    query = make_query(world, 2, 1, rate=2.0)
    found = build.search(world, world.embedding(), query, build.ways[way], 8)
    assert (found.distance == 0).all()
    build.check_nearest(found, np.zeros((4, 10)), barred_from(query), 8)


@pytest.mark.parametrize("way", range(3))
def test_a_missing_allele_adds_nothing_to_a_distance(build, way: int) -> None:
    world = build(build.random_alleles(1, 30, 8))
    query = make_query(world, 2, 1)
    missing = replace(query, tokens=query.tokens.masked_fill(query.tokens == MASK, 3))
    one, two = (build.search(world, world.embedding(), each, build.ways[way], 6) for each in (query, missing))
    assert torch.equal(one.ids, two.ids) and torch.equal(one.distance, two.distance)


def real_encoder(world, dims: int, seed: int):
    torch.manual_seed(seed)
    embedding = HaplotypeEmbedding(dims).requires_grad_(False)
    return lambda window, tokens: embedding(tokens, site_tensors(world.data, window, CPU))


@pytest.mark.parametrize("seed", range(3))
def test_reference_embeddings_from_the_codebook_are_bit_equal_to_stored_rows(build, seed: int) -> None:
    world = build(build.random_alleles(seed, 90, 10), window_sites=30, overlap=6, flank=11)
    encoder = real_encoder(world, 16, seed)
    dense, cache = world.dense_store(encoder, 16), world.cache(encoder, 16)
    for window in world.data.windows:
        ids = torch.randint(0, 20, (4, 5), generator=torch.Generator().manual_seed(seed))
        alleles = torch.from_numpy(world.data.reference_alleles(window.index)).long()[ids][:, :, window.core]
        gathered = gather_embeddings(cache.code(window.index, 0).codebook, alleles)
        stored = dense.embeddings(window.index, ids, FIRST)
        assert stored.shape == (4, 5, window.core_stop - window.core_start, 16)
        assert torch.equal(gathered, stored)


def test_site_weights_are_the_squared_distance_of_the_two_alleles(build) -> None:
    world = build(build.random_alleles(1, 20, 3), window_sites=12, overlap=3, flank=4)
    embedding = world.embedding()
    for window in world.data.windows:
        codebook, weights = encode_window(embedding, window, CPU)
        whole = embedding.codebooks[window.index]
        explicit = [float(((whole[l, 1] - whole[l, 0]) ** 2).sum()) for l in range(len(window))]  # noqa: E741
        assert weights.tolist() == pytest.approx(explicit, rel=1e-5)
        assert torch.equal(codebook, whole[window.core, :2])
        assert torch.equal(site_weights(whole), weights)


def test_the_dense_store_refuses_above_its_budget_naming_the_key_and_the_way_out(build) -> None:
    world = build(build.random_alleles(1, 100, 10))
    exact = 100 * 20 * 8 * 4 / 2**30
    DenseStore(world.data, 8, exact * 1.001, CPU)
    with pytest.raises(UserError, match=r"embrag\.retrieval\.dense_budget_gb") as fault:
        DenseStore(world.data, 8, exact * 0.999, CPU)
    assert "\n" not in str(fault.value) and "store=factored" in str(fault.value)
