"""CUDA kernel of the Hamming distance, compiled for the host, against plain sums."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embrag_ds.ops.hamming_cuda import SOURCE

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
    """The kernel as a function of tokens [B, T], weights [B, T], packed alleles [T, ceil(H / 8)] and H."""
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
