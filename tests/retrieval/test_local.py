"""Local retrieval: the nearest in every chunk of typed sites, then those over the whole window."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from embrag_ds.data.tokens import MASK
from embrag_ds.errors import UserError
from embrag_ds.retrieval.search import make_search
from embrag_ds.retrieval.settings import LocalRetrieval, RetrievalConfig
from embrag_ds.retrieval.store import FactoredStore, first_distinct

CPU = torch.device("cpu")
BACKENDS = ["torch", "faiss-cpu"]


@given(seed=st.integers(0, 2**32), count=st.integers(1, 12), width=st.integers(0, 20), data=st.data())
def test_the_first_distinct_are_those_of_a_loop(seed: int, count: int, width: int, data: st.DataObject) -> None:
    maker = np.random.default_rng(seed)
    rows = [np.concatenate([maker.integers(0, count, width), maker.permutation(count)]) for _ in range(3)]
    k = data.draw(st.integers(1, count))
    found = first_distinct(torch.from_numpy(np.stack(rows)), k, count)
    assert found.tolist() == [list(dict.fromkeys(row.tolist()))[:k] for row in rows]


@given(observed=st.integers(1, 400), typed=st.floats(0.5, 400), chunk=st.integers(1, 60), context=st.integers(0, 60))
def test_chunks_cover_the_observed_sites_in_order(observed: int, typed: float, chunk: int, context: int) -> None:
    typed = min(typed, observed)
    chunks = LocalRetrieval(chunk, context, 4).chunks(observed, typed)
    assert chunks[0].start == 0 and chunks[-1].stop == observed
    for left, right in pairwise(chunks):
        assert left.start <= right.start <= left.stop <= right.stop
    spread = observed / max(typed, 1.0)
    wanted = chunk * spread + 2 * context * spread
    assert all(0 < each.stop - each.start <= 1.5 * wanted + 3 for each in chunks)


@settings(max_examples=25)
@given(seed=st.integers(0, 2**32), backend=st.sampled_from(BACKENDS), per_chunk=st.integers(1, 4), k=st.integers(1, 12))
def test_ids_are_the_union_by_rank_of_explicit_searches(build, seed: int, backend: str, per_chunk: int, k: int) -> None:
    """A mask per sample and continuous weights; examples with ties in float32 are discarded."""
    world = build(build.random_alleles(seed, 80, 8), reference=range(1, 8))
    local = LocalRetrieval(10, 5, per_chunk)
    masked = world.masked(0, 2, seed, 0.4)
    tokens = torch.from_numpy(world.batch_of(0, [0, 0], masked).alleles).long()
    tokens = tokens.masked_fill(torch.from_numpy(masked).repeat_interleave(2, 0), MASK)
    observed = np.flatnonzero(~masked.all(0))
    query = world.query(0, tokens, observed, torch.zeros(4, 14, dtype=torch.bool))
    embedding = world.embedding(seed)
    store = FactoredStore(make_search(backend, CPU), local)
    found = store.search(query, world.cache(embedding).code(0, 0), k)

    weight = (embedding.codebooks[0][:, 1] - embedding.codebooks[0][:, 0]).square().sum(-1).double()
    reference = torch.from_numpy(world.data.reference_alleles(0))

    def ranking(row: int, sites: np.ndarray) -> list[int]:
        used = [site for site in sites.tolist() if tokens[row, site] < MASK]
        differs = reference[:, used] != tokens[row, used]
        distance = (differs * weight[used]).sum(1)
        assume(torch.diff(distance.sort().values).min() > 1e-4)
        return torch.argsort(distance).tolist()

    for row in range(4):
        chunks = [ranking(row, observed[chunk]) for chunk in local.chunks(len(observed), query.typed_per_haplotype)]
        near = [each[rank] for rank in range(min(per_chunk, k)) for each in chunks]
        expected = list(dict.fromkeys(near + ranking(row, observed)))[:k]
        assert found[row].tolist() == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_haplotype_shared_over_a_stretch_is_found_by_local_retrieval_alone(build, backend: str) -> None:
    alleles = build.random_alleles(7, 200, 40)
    alleles[90:120, 33] = alleles[90:120, 0]
    alleles[:90, 33] = 1 - alleles[:90, 0]
    alleles[120:, 33] = 1 - alleles[120:, 0]
    world = build(alleles)
    masked = np.zeros((1, 200), dtype=bool)
    for local, expected in ((None, False), (LocalRetrieval(20, 5, 2), True)):
        collate = world.collator(world.embedding(), "factored", backend, 24, local=local)
        assert (33 in collate(world.batch_of(0, [0], masked)).retrieved.ids[0].tolist()) == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_local_retrieval_never_finds_an_excluded_haplotype(build, backend: str) -> None:
    alleles = np.tile(build.random_alleles(1, 60, 1), 8)  # all samples are identical
    world = build(alleles)
    collate = world.collator(world.embedding(), "factored", backend, 64, local=LocalRetrieval(8, 4, 3))
    ids = collate(world.batch_of(0, range(8), world.masked(0, 8, 1))).retrieved.ids
    for row, found in enumerate(ids.tolist()):
        assert sorted(found) == [each for each in range(16) if each // 2 != row // 2]


def test_local_retrieval_needs_the_factored_store() -> None:
    with pytest.raises(UserError, match=r"embrag\.retrieval\.per_chunk"):
        RetrievalConfig(store="dense", per_chunk=4)
