"""What neighbours carry: lists of carriers against the plain table, on sites of every frequency."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from embrag_ds.retrieval.alleles import Alleles, Carriers, Places, WindowAlleles, interpolated

HAPLOTYPES, SITES, TYPED = 40, 60, 5


def case(seed: int, k: int, queries: int = 3):
    """Alleles [L, H] from absent to fixed, the neighbours of ``queries``, and a posterior with its places."""
    rng = np.random.default_rng(seed)
    maker = torch.Generator().manual_seed(seed)
    frequency = np.linspace(0, 1, SITES)
    frequency[:20] = 1 / HAPLOTYPES  # most are rare
    alleles = (rng.random((SITES, HAPLOTYPES)) < frequency[:, None]).astype(np.uint8)
    ids = torch.from_numpy(np.stack([rng.permutation(HAPLOTYPES)[:k] for _ in range(queries)]))
    posterior = torch.softmax(torch.randn(queries, TYPED, k, generator=maker), dim=-1)
    left = torch.randint(0, TYPED, (queries, SITES), generator=maker)
    right = (left + torch.randint(0, 2, left.shape, generator=maker)).clamp_max(TYPED - 1)
    return torch.from_numpy(alleles), ids, posterior, Places(left, right, torch.rand(left.shape, generator=maker))


def both_ways(alleles: torch.Tensor, ids: torch.Tensor) -> tuple[Alleles, Carriers]:
    carriers = WindowAlleles(alleles).of(ids)
    assert isinstance(carriers, Carriers)
    return Alleles(alleles.T.contiguous()[ids]), carriers


@pytest.mark.parametrize("k", [1, 7, HAPLOTYPES])
@pytest.mark.parametrize("seed", range(3))
def test_both_say_what_the_neighbours_carry(seed: int, k: int) -> None:
    alleles, ids, *_ = case(seed, k)
    expected = torch.tensor([[[int(alleles[site, which]) for site in range(SITES)] for which in row] for row in ids])
    for found in both_ways(alleles, ids):
        assert torch.equal(found.dense().long(), expected)
        torch.testing.assert_close(found.share(), expected.float().mean(1))


@pytest.mark.parametrize("k", [1, 7, HAPLOTYPES])
@pytest.mark.parametrize("seed", range(3))
def test_a_dosage_is_a_plain_sum(seed: int, k: int) -> None:
    alleles, ids, posterior, places = case(seed, k)
    dosages = [each.dosage(posterior, places) for each in both_ways(alleles, ids)]
    weights = interpolated(posterior, places)
    for query in range(len(ids)):
        for site in range(SITES):
            part, expected = float(places.share[query, site]), 0.0
            for number in range(k):
                before = float(posterior[query, places.left[query, site], number])
                after = float(posterior[query, places.right[query, site], number])
                mixed = (1 - part) * before + part * after
                assert float(weights[query, number, site]) == pytest.approx(mixed, abs=1e-6)
                expected += mixed * int(alleles[site, ids[query, number]])
            assert [float(each[query, site]) for each in dosages] == pytest.approx([expected] * 2, abs=1e-6)


def test_slopes_of_both_are_those_of_autograd() -> None:
    alleles, ids, posterior, places = case(1, 7)
    slopes = []
    for found in both_ways(alleles, ids):
        leaf = posterior.clone().requires_grad_()
        (found.dosage(leaf, places) * torch.arange(SITES)).sum().backward()
        assert leaf.grad is not None
        slopes.append(leaf.grad)
    torch.testing.assert_close(*slopes, rtol=1e-5, atol=1e-4)


def test_a_window_serves_queries_with_any_number_of_neighbours() -> None:
    alleles, ids, *_ = case(4, HAPLOTYPES)
    window = WindowAlleles(alleles)
    for k in (3, HAPLOTYPES, 3):
        assert torch.equal(window.of(ids[:, :k]).dense(), Alleles(alleles.T[ids[:, :k]]).dense())
