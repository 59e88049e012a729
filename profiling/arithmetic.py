"""Floating-point operations of the network, and the rate of matrix products that the machine reaches."""

from __future__ import annotations

import statistics
import time

import torch
from machine import synchronise

from embrag_ds.model.embedding import FREQUENCY_FEATURES
from embrag_ds.model.imputer import ModelConfig

_BACKWARD = 2
"""Matrix products in the backward pass for each one in the forward pass."""


def step_flops(model: ModelConfig, haplotypes: int, sites: int, references: int) -> float:
    """Floating-point operations of the matrix products of a training step, without recomputation.

    ``haplotypes`` queries have ``sites`` sites each. ``references`` haplotypes per query also go through the
    transformer (V17; 0 in V18). A multiplication and an addition are two operations. Attention counts all pairs of
    sites. The backward pass is included.
    """
    dims, places = model.dims, haplotypes * sites
    linear = 2 * dims * dims * (4 + 2 * model.ffn_multiple)
    attention = 4 * sites * dims
    transformer = model.layers * (linear + attention) * (1 + references)
    fusion = 2 * dims * (6 * dims + 2 * FREQUENCY_FEATURES)
    head = 2 * dims
    return (1 + _BACKWARD) * places * (transformer + fusion + head)


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int, rounds: int = 7) -> float:
    """Operations per second of a product of two ``size`` x ``size`` matrices, a median after a warm-up."""
    one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    taken = []
    for _ in range(rounds + 2):
        synchronise(device)
        began = time.perf_counter()
        torch.mm(one, other)
        synchronise(device)
        taken.append(time.perf_counter() - began)
    return 2 * size**3 / statistics.median(taken[2:])
