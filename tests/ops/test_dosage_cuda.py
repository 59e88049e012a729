"""CUDA kernels of the copied dosage against torch and autograd, compiled for the host and on a GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from embrag_ds.ops import dosage_cuda
from embrag_ds.ops.dosage import DenseAlleles, FlankingSites, expected_allele, interpolated
from embrag_ds.ops.dosage_cuda import SOURCE, CudaDosage

HOST = r"""
#define __global__
struct Place { int x; };
static Place blockIdx, blockDim, threadIdx;
%s
typedef const unsigned char* Alleles;
typedef const float* In;
typedef const long long* At;
#define EVERY_THREAD blockDim.x = threads; \
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) \
        for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x)
extern "C" void dosage(int blocks, int threads, Alleles a, In p, At l, At r, In s, float* o,
                       int t, int M, int K, int L) {
    EVERY_THREAD copied_dosage(a, p, l, r, s, o, t, M, K, L);
}
extern "C" void adjoint(int blocks, int threads, Alleles a, In g, At l, At r, In s, float* o,
                        int t, int M, int K, int L) {
    EVERY_THREAD copied_dosage_adjoint(a, g, l, r, s, o, t, M, K, L);
}
"""
THREADS = 4


@pytest.fixture(scope="module")
def kernels(host_library: Callable[[str], ctypes.CDLL]) -> Callable[..., None]:
    """Function that runs a kernel by name over ``over`` sites or neighbours, on tensors and the sizes M, K, L."""
    loaded = host_library(HOST % SOURCE)

    def run(name: str, over: int, tensors: list[Tensor], *sizes: int) -> None:
        tiles = -(-over // THREADS)
        pointers = [ctypes.c_void_p(each.data_ptr()) for each in tensors]
        getattr(loaded, name)(len(tensors[0]) * tiles, THREADS, *pointers, tiles, *sizes)

    return run


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


@CASES
def test_values_and_gradients_are_torchs(kernels: Callable[..., None], typed: int, neighbours: int, sites: int) -> None:
    alleles, posterior, flanking = random_case(typed, typed, neighbours, sites)
    sizes, between = (typed, neighbours, sites), [flanking.left, flanking.right, flanking.share]
    leaf, gradient = posterior.clone().requires_grad_(), torch.randn(3, sites)
    expected = (interpolated(leaf, flanking) * alleles).sum(1)
    (expected * gradient).sum().backward()

    dosage, posterior_gradient = torch.full((3, sites), torch.nan), torch.zeros(posterior.shape)
    kernels("dosage", sites, [alleles, posterior, *between, dosage], *sizes)
    torch.testing.assert_close(dosage, expected.detach(), rtol=1e-5, atol=1e-6)
    kernels("adjoint", neighbours, [alleles, gradient, *between, posterior_gradient], *sizes)
    torch.testing.assert_close(posterior_gradient, leaf.grad, rtol=1e-4, atol=1e-5)


@CASES
def test_what_launches_them_hands_over_what_they_take(
    kernels: Callable[..., None], monkeypatch: pytest.MonkeyPatch, typed: int, neighbours: int, sites: int
) -> None:
    """The autograd function runs with the host's kernels in place of a GPU's."""

    def launch(name: str, blocks: tuple[int], threads: tuple[int], tensors: list[Tensor], sizes: Sequence[int]) -> None:
        tiles, *others = sizes
        assert (blocks, threads) == ((3 * tiles,), (THREADS,)) and all(each.is_contiguous() for each in tensors)
        over = {"copied_dosage": sites, "copied_dosage_adjoint": neighbours}[name]
        assert tiles == -(-over // THREADS)
        kernels({"copied_dosage": "dosage"}.get(name, "adjoint"), over, tensors, *others)

    monkeypatch.setattr("embrag_ds.ops.cuda.TILE_THREADS", THREADS)
    monkeypatch.setattr(dosage_cuda, "_kernel", lambda name: name)
    monkeypatch.setattr("embrag_ds.ops.cuda.launch", launch)
    alleles, posterior, flanking = random_case(typed, typed, neighbours, sites)
    leaves, gradient = [posterior.clone().requires_grad_() for _ in range(2)], torch.randn(3, sites)
    found = CudaDosage.apply(leaves[0], alleles, flanking.left, flanking.right, flanking.share)
    expected = expected_allele(DenseAlleles(alleles), leaves[1], flanking)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for dosage in (found, expected):
        (dosage * gradient).sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-4, atol=1e-5)


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
