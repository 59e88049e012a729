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
