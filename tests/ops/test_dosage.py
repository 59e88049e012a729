"""Copied dosage: lists of carriers and sequences against the table of alleles, on sites of every frequency."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from embrag_ds.ops.dosage import (
    Blocks,
    Carriers,
    DenseAlleles,
    FlankingSites,
    Neighbours,
    Sequences,
    WindowAlleles,
    dense_alleles,
    expected_allele,
    interpolated,
)

HAPLOTYPES, SITES, TYPED = 40, 150, 5
CUTS = np.array([3, 20, 21, 60])


def case(seed: int, k: int, queries: int = 3):
    """Alleles [L, H] from absent to fixed, neighbours of ``queries`` haplotypes, a posterior and its flanking sites."""
    rng = np.random.default_rng(seed)
    maker = torch.Generator().manual_seed(seed)
    frequency = np.linspace(0, 1, SITES)
    frequency[:20] = 1 / HAPLOTYPES  # most are rare
    alleles = (rng.random((SITES, HAPLOTYPES)) < frequency[:, None]).astype(np.uint8)
    ids = torch.from_numpy(np.stack([rng.permutation(HAPLOTYPES)[:k] for _ in range(queries)]))
    posterior = torch.softmax(torch.randn(queries, TYPED, k, generator=maker), dim=-1)
    # The flanking sites change at the cuts only, except at some sites.
    left = torch.from_numpy(np.searchsorted(CUTS, np.arange(SITES), side="right")).repeat(queries, 1)
    left[:, 100:120] = torch.randint(0, TYPED, (queries, 20), generator=maker)
    right = (left + torch.randint(0, 2, left.shape, generator=maker)).clamp_max(TYPED - 1)
    return (
        torch.from_numpy(alleles),
        ids,
        posterior,
        FlankingSites(left, right, torch.rand(left.shape, generator=maker)),
    )


def all_ways(alleles: torch.Tensor, ids: torch.Tensor) -> tuple[Neighbours, ...]:
    """Table, carriers, and sequences in blocks at the cuts and in blocks of 64 sites, within which the posterior
    changes.
    """
    window = WindowAlleles(alleles)
    carriers, sequences = window.of(ids), window.of(ids, CUTS)
    long = Sequences(ids, Blocks.made(alleles.numpy(), np.empty(0, dtype=np.int64)))
    assert isinstance(carriers, Carriers) and isinstance(sequences, Sequences)
    return DenseAlleles(alleles.T.contiguous()[ids]), carriers, sequences, long


@pytest.mark.parametrize("k", [1, 7, HAPLOTYPES])
@pytest.mark.parametrize("seed", range(3))
def test_all_forms_hold_the_same_alleles(seed: int, k: int) -> None:
    alleles, ids, *_ = case(seed, k)
    expected = torch.tensor([[[int(alleles[site, which]) for site in range(SITES)] for which in row] for row in ids])
    for found in all_ways(alleles, ids):
        assert torch.equal(dense_alleles(found).long(), expected)


@pytest.mark.parametrize("k", [1, 7, HAPLOTYPES])
@pytest.mark.parametrize("seed", range(3))
def test_a_dosage_is_a_plain_sum(seed: int, k: int) -> None:
    alleles, ids, posterior, flanking = case(seed, k)
    dosages = [expected_allele(each, posterior, flanking) for each in all_ways(alleles, ids)]
    weights = interpolated(posterior, flanking)
    for query in range(len(ids)):
        for site in range(SITES):
            part, expected = float(flanking.share[query, site]), 0.0
            for number in range(k):
                before = float(posterior[query, flanking.left[query, site], number])
                after = float(posterior[query, flanking.right[query, site], number])
                mixed = (1 - part) * before + part * after
                assert float(weights[query, number, site]) == pytest.approx(mixed, abs=1e-6)
                expected += mixed * int(alleles[site, ids[query, number]])
            assert [float(each[query, site]) for each in dosages] == pytest.approx([expected] * 4, abs=1e-6)


def test_gradients_of_all_are_those_of_autograd() -> None:
    alleles, ids, posterior, flanking = case(1, 7)
    gradients = []
    for found in all_ways(alleles, ids):
        leaf = posterior.clone().requires_grad_()
        (expected_allele(found, leaf, flanking) * torch.arange(SITES)).sum().backward()
        assert leaf.grad is not None
        gradients.append(leaf.grad)
    for each in gradients[1:]:
        torch.testing.assert_close(each, gradients[0], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("way", range(4))
def test_writing_to_what_the_backward_pass_needs_is_an_error(way: int) -> None:
    alleles, ids, posterior, flanking = case(1, 7)
    dosage = expected_allele(all_ways(alleles, ids)[way], posterior.requires_grad_(), flanking)
    flanking.share.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        dosage.sum().backward()


def test_a_window_serves_queries_with_any_number_of_neighbours() -> None:
    alleles, ids, *_ = case(4, HAPLOTYPES)
    window = WindowAlleles(alleles)
    for k in (3, HAPLOTYPES, 3):
        for cuts in (None, CUTS, CUTS[:2], np.empty(0, dtype=np.int64)):
            assert torch.equal(dense_alleles(window.of(ids[:, :k], cuts)), alleles.T[ids[:, :k]])


def test_blocks_are_cut_and_end_with_the_word() -> None:
    alleles, *_ = case(0, 3)
    blocks = Blocks.made(alleles.numpy(), np.array([0, 10, 20, SITES]))
    assert blocks.bounds.tolist() == [0, 10, 20, 84, 148, SITES]
    for first, last, sequence, count in zip(
        blocks.bounds, blocks.bounds[1:], blocks.sequence, blocks.count, strict=False
    ):
        distinct, number = np.unique(alleles.numpy()[first:last], axis=1, return_inverse=True)
        assert count == distinct.shape[1] == len(set(zip(sequence.tolist(), number.ravel().tolist(), strict=True)))


def test_sequences_are_for_few_typed_sites() -> None:
    alleles, ids, *_ = case(2, 7)
    window = WindowAlleles(alleles)
    assert isinstance(window.of(ids, np.arange(12, SITES, 12)), Sequences)
    assert isinstance(window.of(ids, np.arange(4, SITES, 4)), Carriers)
