"""The CUDA kernel's source, compiled for the host, and the packing of alleles, against plain sums."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embrag_ds.retrieval.kernels import SOURCE
from embrag_ds.retrieval.packed import PackedReference, pack, unpack
from embrag_ds.retrieval.search import make_search
from embrag_ds.retrieval.streams import Staging

CPU = torch.device("cpu")
HOST = r"""
#define __global__
struct Place { int x, y; };
static Place blockIdx, blockDim, threadIdx;
%s
extern "C" void launch(int blocks, int queries, int threads, const unsigned char* reference,
                       const unsigned char* query, const float* weight, float* distance,
                       int sites, int bytes, int haplotypes) {
    blockDim.x = threads;
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
        for (blockIdx.y = 0; blockIdx.y < queries; ++blockIdx.y)
            for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x)
                mismatch_distances(reference, query, weight, distance, sites, bytes, haplotypes);
}
"""


@pytest.fixture(scope="module")
def kernel(host_library: Callable[[str], ctypes.CDLL]) -> Callable[..., np.ndarray]:
    """The kernel as a function of tokens [B, T], weights [B, T], packed [T, W] and H."""
    launch = host_library(HOST % SOURCE).launch

    def run(tokens: np.ndarray, weights: np.ndarray, packed: np.ndarray, haplotypes: int) -> np.ndarray:
        (queries, sites), width, threads = tokens.shape, packed.shape[1], 2
        distance = np.full((queries, haplotypes), np.nan, dtype=np.float32)
        arrays = [packed, (tokens == 1).astype(np.uint8), weights.astype(np.float32), distance]
        pointers = [each.ctypes.data_as(ctypes.c_void_p) for each in arrays]
        launch(-(-width // threads), queries, threads, *pointers, sites, width, haplotypes)
        return distance

    return run


@given(seed=st.integers(0, 2**32), sites=st.integers(1, 40), haplotypes=st.integers(1, 70))
def test_the_kernel_adds_the_weights_of_mismatches(
    kernel: Callable[..., np.ndarray], seed: int, sites: int, haplotypes: int
) -> None:
    maker = np.random.default_rng(seed)
    reference = maker.integers(0, 2, (sites, haplotypes), dtype=np.uint8)
    tokens = maker.integers(0, 4, (3, sites))
    weights = maker.random((3, sites)) * (tokens < 2)
    packed = np.packbits(reference, axis=1, bitorder="little")
    explicit = ((tokens[:, :, None] != reference) * weights[:, :, None]).sum(1)
    assert np.allclose(kernel(tokens, weights, packed, haplotypes), explicit, atol=1e-4)


@given(seed=st.integers(0, 2**32), rows=st.integers(0, 5), count=st.integers(1, 40))
def test_packing_is_numpys_and_undone_by_unpacking(seed: int, rows: int, count: int) -> None:
    alleles = np.random.default_rng(seed).integers(0, 2, (rows, count), dtype=np.uint8)
    packed = pack(torch.from_numpy(alleles))
    assert np.array_equal(packed.numpy(), np.packbits(alleles, axis=1, bitorder="little"))
    assert torch.equal(unpack(packed, count), torch.from_numpy(alleles))


@pytest.mark.parametrize("reference", [range(6), [0, 2, 5]])
def test_rows_of_the_packed_panel_are_its_alleles(build, reference) -> None:
    alleles = build.random_alleles(3, 50, 6)
    world = build(alleles, reference=reference, window_sites=20, overlap=4, flank=3)
    panel = PackedReference(world.data, CPU, 1.0)
    staging = Staging(CPU, 1, 0)
    for window in world.data.windows:
        sites = np.array([0, 3, len(window) - 1])
        expected = alleles[window.start + sites][:, world.data.reference.haplotypes]
        assert np.array_equal(panel.alleles(window.index, sites, staging).numpy(), expected)


CUDA = torch.device("cuda", 0)


@pytest.mark.gpu
@pytest.mark.parametrize("budget", [1.0, 0.0])
def test_rows_on_the_gpu_are_those_on_the_cpu(build, budget: float) -> None:
    """Resident, and streamed through pinned staging."""
    world = build(build.random_alleles(3, 50, 6), reference=[0, 2, 5], window_sites=20, overlap=4, flank=3)
    panel, host = PackedReference(world.data, CUDA, budget), PackedReference(world.data, CPU, 1.0)
    staging, sites = Staging(CUDA, 2, 1 << 16), np.array([0, 3, 7])
    assert (panel.device_bytes > 0) == (budget > 0)
    for window in world.data.windows:
        staging.begin()
        there = panel.alleles(window.index, sites, staging)
        staging.end()
        assert torch.equal(there.cpu(), host.alleles(window.index, sites, Staging(CPU, 1, 0)))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["torch", "faiss-gpu", "cupy"])
@pytest.mark.parametrize("seed", range(3))
def test_backends_on_the_gpu_find_what_torch_finds_on_the_cpu(name: str, seed: int) -> None:
    maker = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 2, (64, 500), generator=maker)
    weights = torch.rand(64, 500, generator=maker) * (torch.rand(64, 500, generator=maker) < 0.7)
    reference = torch.randint(0, 2, (500, 3001), generator=maker, dtype=torch.uint8)
    excluded = torch.randint(0, 3002, (64, 4), generator=maker)
    expected = make_search("torch", CPU).nearest(tokens, weights, reference, 3001, excluded, 100)
    search = make_search(name, CUDA)
    given_form = pack(reference) if search.packed else reference
    distance, ids = search.nearest(tokens.to(CUDA), weights.to(CUDA), given_form.to(CUDA), 3001, excluded.to(CUDA), 100)
    torch.testing.assert_close(distance.cpu(), expected[0], rtol=1e-4, atol=1e-2)
    assert not (ids.cpu()[:, :, None] == excluded[:, None]).any()
    explicit = (weights[:, :, None] * (tokens[:, :, None] != reference)).sum(1)
    torch.testing.assert_close(explicit.gather(1, ids.cpu()), expected[0], rtol=1e-4, atol=1e-2)
