"""Copied dosage of queries that copy from the same haplotypes, beside the table of alleles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embrag_ds.ops import dosage_shared
from embrag_ds.ops.dosage import DenseAlleles, FlankingSites, WindowAlleles, dense_alleles, expected_allele


def case(seed: int, sites: int, haplotypes: int, queries: int, cuts: int):
    """Window's alleles, cuts, a posterior, and flanking sites that change at the cuts only."""
    rng = np.random.default_rng(seed)
    alleles = torch.from_numpy((rng.random((sites, haplotypes)) < 0.3).astype(np.uint8))
    where = np.sort(rng.choice(sites + 1, min(cuts, sites + 1), replace=False))
    posterior = torch.from_numpy(rng.random((queries, len(where) + 2, haplotypes)).astype(np.float32))
    left = torch.from_numpy(np.searchsorted(where, np.arange(sites), side="right"))
    right = left + torch.from_numpy(rng.integers(0, 2, len(where) + 1))[left]
    share = torch.from_numpy(rng.random(sites).astype(np.float32))
    flanking = FlankingSites(*(each.expand(queries, -1) for each in (left, right, share)))
    return WindowAlleles(alleles), where, posterior, flanking


@given(
    seed=st.integers(0, 2**20),
    sites=st.integers(1, 150),
    haplotypes=st.integers(1, 40),
    queries=st.integers(1, 4),
    cuts=st.integers(0, 30),
    part=st.sampled_from([1, 1 << 14, 1 << 27]),
)
def test_dosages_and_gradients_are_those_of_the_table(
    seed: int, sites: int, haplotypes: int, queries: int, cuts: int, part: int
) -> None:
    window, where, posterior, flanking = case(seed, sites, haplotypes, queries, cuts)
    shared, whole = window.shared(where), dosage_shared._PART_BYTES
    assert torch.equal(dense_alleles(shared)[0], window.by_haplotype)
    found = []
    for form in (DenseAlleles(window.by_haplotype.expand(queries, -1, -1)), shared):
        leaf = posterior.clone().requires_grad_()
        dosage_shared._PART_BYTES = part
        try:
            dosage = expected_allele(form, leaf, flanking)
        finally:
            dosage_shared._PART_BYTES = whole
        (dosage * torch.arange(sites)).sum().backward()
        found.append((dosage.detach(), leaf.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-4)


@pytest.mark.gpu
def test_on_a_gpu_they_are_those_of_the_cpu() -> None:
    window, where, posterior, flanking = case(3, 2000, 700, 6, 50)
    expected = expected_allele(window.shared(where), posterior, flanking)
    there = WindowAlleles(window.by_haplotype.T.cuda())
    moved = FlankingSites(*(each.cuda() for each in (flanking.left, flanking.right, flanking.share)))
    found = expected_allele(there.shared(where), posterior.cuda(), moved)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-5)
