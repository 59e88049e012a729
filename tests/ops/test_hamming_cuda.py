"""CUDA kernel of the Hamming distance, compiled for the host, against plain sums."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embrag_ds.ops import cuda
from embrag_ds.ops.hamming_cuda import mismatch_distances


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32),
    sites=st.integers(1, 40),
    haplotypes=st.integers(1, 70),
    threads=st.sampled_from([2, 128]),
)
@pytest.mark.usefixtures("kernels_on_host")
def test_the_kernel_adds_the_weights_of_mismatches(
    monkeypatch: pytest.MonkeyPatch, seed: int, sites: int, haplotypes: int, threads: int
) -> None:
    monkeypatch.setattr(cuda, "TILE_THREADS", threads)
    maker = np.random.default_rng(seed)
    reference = maker.integers(0, 2, (sites, haplotypes), dtype=np.uint8)
    tokens = maker.integers(0, 4, (3, sites))
    weights = maker.random((3, sites), dtype=np.float32) * (tokens < 2)
    packed = np.packbits(reference, axis=1, bitorder="little")
    explicit = ((tokens[:, :, None] != reference) * weights[:, :, None]).sum(1)
    found = mismatch_distances(*map(torch.from_numpy, (tokens, weights, packed)), haplotypes)
    assert np.allclose(found.numpy(), explicit, atol=1e-4)


@pytest.mark.usefixtures("kernels_on_host")
def test_strided_tensors_are_copied() -> None:
    tokens, weights = torch.tensor([[0, 1], [1, 1], [0, 0]]).T, torch.rand(3, 2).T
    packed = torch.tensor([[1], [2], [3]], dtype=torch.uint8)
    expected = mismatch_distances(tokens.contiguous(), weights.contiguous(), packed, 2)
    assert torch.equal(mismatch_distances(tokens, weights, packed, 2), expected)
