"""Retrieval mode ``token`` (V17): neighbours found, haplotypes in the transformer, and memory beside V18."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from embrag_ds.data.tokens import MASK
from embrag_ds.model.confidence import minor_is_likely
from embrag_ds.model.numbers import LEAST_TRANSFORMED
from embrag_ds.model.poolings import fusions
from embrag_ds.retrieval.reference import Reference
from embrag_ds.retrieval.settings import RetrievalConfig


def token_collator(world, embedding, **settings):
    exclusions = np.arange(len(world.samples))[:, None]
    reference = Reference(
        RetrievalConfig(mode="token", **settings), world.data, embedding, torch.device("cpu"), exclusions
    )
    collate = reference.collator(len(world.samples))
    return lambda queries: collate(queries, 0)


@pytest.mark.parametrize("token_k", [1, 3])
def test_neighbours_are_nearest_by_plain_hamming_distance(build, token_k: int) -> None:
    world = build(3, outside=2)
    queries = world.batch_of(1, [0, 1, 5], world.masked(1, 3, 1))
    found = token_collator(world, build.imputer().embedding, k=5, token_k=token_k)(queries)
    window = world.data.windows[1]
    reference = world.data.reference_alleles(1)
    owner = world.data.reference.sample_of
    for row, ids in enumerate(found.retrieved.ids.tolist()):
        observed = ~queries.masked[row // 2]
        distance = (reference[:, observed] != queries.alleles[row][observed]).sum(1).astype(float)
        distance[owner == queries.samples[row // 2]] = np.inf
        assert distance[ids].tolist() == np.sort(distance)[:5].tolist()
        expected = reference[ids[:token_k]][:, window.core]
        assert found.retrieved.tokens[row].tolist() == expected.tolist()
    assert found.retrieved.codebook is None and found.retrieved.embeddings is None


@pytest.mark.parametrize("fusion", fusions())
@pytest.mark.parametrize("token_k", [1, 3])
def test_every_haplotype_goes_through_the_transformer_alone_and_is_fused_after_it(build, fusion, token_k: int) -> None:
    world = build(3, outside=1)
    network = build.imputer(fusion=fusion, layers=2)
    batch = token_collator(world, network.embedding, k=6, token_k=token_k)(
        world.batch_of(1, [0, 4], world.masked(1, 2, 1))
    )
    core = batch.window.core
    sites = replace(
        batch.window.sites, position=batch.window.sites.position[core], frequency=batch.window.sites.frequency[core]
    )
    with torch.no_grad():
        prediction = network(batch)
        confidence = torch.zeros_like(prediction.prior)
        weight = network.embedding.site_weights(batch.window.sites.frequency)
        pooled = network.pooling(batch, batch.retrieved, weight / weight.mean())
        expected = (pooled.ancestry * batch.core.population_frequency).sum(1)
        if network.confidence is not None:
            confidence = network.confidence(prediction.prior, pooled.evidence, batch.core.frequency)

        def passed(tokens: torch.Tensor) -> torch.Tensor:
            return network.transformer(network.embedding(tokens[None], sites), sites.position)

        corrected = 0
        for row in range(4):
            query = passed(batch.core.tokens[row])
            references = torch.stack([passed(tokens) for tokens in batch.retrieved.tokens[row]]).mean(0)
            one = slice(row, row + 1)
            states = network.fusion(query, references, batch.core.frequency[one], expected[one])
            likely = minor_is_likely(prediction.prior[one], batch.core.frequency[one], LEAST_TRANSFORMED)
            corrected += int(likely.sum())
            residual = torch.where(likely, network.head(states)[..., 0], 0.0)
            logits = prediction.prior[one] + residual + confidence[one]
            assert torch.allclose(prediction.logits[one], logits, atol=1e-4)
        assert corrected > len(batch.core.sites.position)


def test_both_paths_have_the_same_weights_and_the_same_prior_from_the_same_neighbours(build) -> None:
    """A change of the mode needs no other change; only the residual's use of the neighbours differs."""
    world = build(3, outside=1)
    network = build.imputer()
    queries = world.batch_of(1, [3, 4], world.masked(1, 2, 1))
    # All haplotypes but a query's own are neighbours, so that both distances find the same.
    after = token_collator(world, network.embedding, k=24)(queries)
    before = world.collator(network.embedding, k=24)(queries)
    with torch.no_grad():
        one, two = network(after), network(before)
    assert torch.allclose(one.prior.sigmoid(), two.prior.sigmoid(), atol=1e-5)
    assert not torch.allclose(one.logits, two.logits, atol=1e-3)


class Largest(TorchDispatchMode):
    """Dispatch mode that measures the largest tensor, in numbers of 4 bytes, that any operation makes."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        tensors = [each for each in tree_leaves(made) if isinstance(each, torch.Tensor)]
        self.numbers = max([self.numbers, *(each.untyped_storage().nbytes() // 4 for each in tensors)])
        return made


def largest(network, batch) -> int:
    with Largest() as seen:
        network(batch).logits.sum().backward()
    return seen.numbers


@pytest.mark.parametrize("fusion", fusions())
def test_neighbours_add_no_tensor_of_their_number_times_width_to_v18(build, fusion: str) -> None:
    """A tensor [B, K, L, D] would be by far the largest; V17 has one, which shows that it is counted."""
    world = build(1, sites=30, samples=20, window_sites=24, overlap=4, flank=3)
    queries = world.batch_of(0, [0, 1], world.masked(0, 2, 1, rate=0.9))
    network = build.imputer(dims=64, ffn_multiple=1, fusion=fusion)
    k = 32
    width = 4 * k * 24 * 64
    assert largest(network, world.collator(network.embedding, k=k, mode="factored")(queries)) < width / 4
    assert largest(network, token_collator(world, network.embedding, k=k, token_k=k)(queries)) >= width


def test_masked_sites_are_mask_tokens_in_the_query_only(build) -> None:
    world = build(3)
    batch = token_collator(world, build.imputer().embedding, k=4)(world.batch_of(0, [1], world.masked(0, 1, 1)))
    assert (batch.core.tokens == MASK).any()
    assert int(batch.retrieved.tokens.max()) < MASK
