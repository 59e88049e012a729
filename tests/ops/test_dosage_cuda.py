"""CUDA kernels of the copied dosage against torch and autograd, compiled for the host and on a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from embrag_ds.ops import cuda
from embrag_ds.ops.dosage import DenseAlleles, FlankingSites, expected_allele, interpolated
from embrag_ds.ops.dosage_cuda import CudaDosage


def random_case(seed: int, typed: int, neighbours: int, sites: int) -> tuple[Tensor, Tensor, FlankingSites]:
    rng = np.random.default_rng(seed)
    left, other = (torch.from_numpy(np.sort(rng.integers(0, typed, (3, sites)), axis=1)) for _ in range(2))
    right = left.maximum(other)
    posterior = torch.from_numpy(rng.dirichlet(np.ones(neighbours), (3, typed))).float()
    alleles = torch.from_numpy(rng.integers(0, 2, (3, neighbours, sites), dtype=np.uint8))
    return alleles, posterior, FlankingSites(left, right, torch.from_numpy(rng.random((3, sites))).float())


CASES = pytest.mark.parametrize(
    ("typed", "neighbours", "sites"), [(1, 1, 1), (3, 4, 8), (5, 9, 30), (2, 30, 5), (40, 3, 17)]
)


@pytest.mark.parametrize("threads", [4, 128])
@CASES
@pytest.mark.usefixtures("kernels_on_host")
def test_values_and_gradients_are_torchs(
    monkeypatch: pytest.MonkeyPatch, typed: int, neighbours: int, sites: int, threads: int
) -> None:
    monkeypatch.setattr(cuda, "TILE_THREADS", threads)
    alleles, posterior, flanking = random_case(typed, typed, neighbours, sites)
    leaves, gradient = [posterior.clone().requires_grad_() for _ in range(2)], torch.randn(3, sites)
    found = CudaDosage.apply(leaves[0], alleles, flanking.left, flanking.right, flanking.share)
    expected = (interpolated(leaves[1], flanking) * alleles).sum(1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for dosage in (found, expected):
        (dosage * gradient).sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("kernels_on_host")
def test_strided_tensors_are_copied() -> None:
    """Gradients of a sum are expanded, and posteriors may be slices."""
    alleles, posterior, flanking = random_case(1, 5, 9, 30)
    posterior = torch.cat([posterior, posterior])[::2]
    leaf = torch.cat([posterior, posterior], dim=-1)[..., ::2].requires_grad_()
    swapped, *others = (each.mT.contiguous().mT for each in (alleles, flanking.left, flanking.right, flanking.share))
    CudaDosage.apply(leaf, swapped, *others).sum().backward()
    expected = leaf.detach().clone().requires_grad_()
    (interpolated(expected, flanking) * alleles).sum().backward()
    torch.testing.assert_close(leaf.grad, expected.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@CASES
def test_on_the_gpu_they_are_torchs(typed: int, neighbours: int, sites: int) -> None:
    alleles, posterior, flanking = random_case(typed, typed, neighbours, sites)
    gradient, found = torch.randn(3, sites), []
    for device in ("cpu", "cuda"):
        leaf = posterior.detach().clone().to(device).requires_grad_()
        between = FlankingSites(*(each.to(device) for each in (flanking.left, flanking.right, flanking.share)))
        dosage = expected_allele(DenseAlleles(alleles.to(device)), leaf, between)
        (dosage * gradient.to(device)).sum().backward()
        assert leaf.grad is not None
        found.append((dosage.detach().cpu(), leaf.grad.cpu()))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
