"""Throughput of a run: how far it is, how much it computes a second beside what the machine can, and its peak memory.

Model FLOPs utilisation (MFU; Chowdhery et al. 2022, PaLM, arXiv:2204.02311) is the share of the machine's rate of
matrix products that a run reaches. Counted are the floating-point operations of the network's matrix products, forward
and backward, as if nothing were computed twice. Retrieval and copying model are left out. The rate is measured here, in
the type that the run computes in.
"""

from __future__ import annotations

import functools
import time
from typing import Any

import torch

from embrag_ds.config import EmbragConfig
from embrag_ds.data.sampler import TrainingSampler
from embrag_ds.model.numbers import FREQUENCY_FEATURES
from embrag_ds.model.settings import ModelConfig
from embrag_ds.runtime.processor import peak_resident_bytes

BACKWARD = 2
"""Matrix products in the backward pass for each one in the forward pass."""
_ROUNDS = 7
_BUDGET_S = 0.1
_FIRST_SIZE = 256
_LARGEST_SIZE = {"cuda": 8192}
_LARGEST_SIZE_ELSEWHERE = 1024


class Throughput:
    """Counter of a run's floating-point operations, and author of the keys that it adds to the metrics.

    Construct it on all ranks at once: those that share a processor then measure what each of them gets of it.
    """

    def __init__(self, config: EmbragConfig, sampler: TrainingSampler, device: torch.device, dtype: torch.dtype):
        """``dtype`` is the type of the transformer's products on ``device``."""
        self._model = config.model
        self._references = config.retrieval.token_k if config.retrieval.mode == "token" else 0
        self._sampler = sampler
        self._device = device
        self._flops, self._micro_batches = 0.0, 0
        self.matrix_rate = measured_rate(device, dtype, torch.get_num_threads())
        """FLOP a second of this rank's device in products of two large matrices."""

    def add(self, tokens: torch.Tensor) -> None:
        """Count a micro-batch with the core's ``tokens`` [B, L]."""
        haplotypes, sites = tokens.shape
        self._flops += step_flops(self._model, haplotypes, sites, self._references)
        self._micro_batches += 1

    def values(self, step: int, step_ms: float) -> dict[str, Any]:
        """Keys of a line of metrics at ``step``; a step since the last call took ``step_ms`` milliseconds.

        Other ranks are taken to compute as much as this one.
        """
        rate = 1000 * self._flops * self._sampler.accumulation / (self._micro_batches * step_ms)
        self._flops, self._micro_batches = 0.0, 0
        values = {
            **progress(self._sampler, step),
            "flops_per_second": rate * self._sampler.ranks,
            "mfu": rate / self.matrix_rate,
            "host_peak_bytes": peak_resident_bytes(),
        }
        if self._device.type == "cuda":
            values["device_peak_bytes"] = torch.cuda.max_memory_allocated(self._device)
        return values


def progress(sampler: TrainingSampler, step: int) -> dict[str, float]:
    """Epochs, as a fraction, and samples seen by all ranks up to ``step``; a sample counts once for every window.

    Both follow from the step alone, as a resumed run keeps the micro-batches of a step, on any number of ranks.
    """
    micro_batches = step * sampler.accumulation
    return {
        "epoch": sampler.number(micro_batches) / sampler.micro_batches_per_epoch,
        "samples_seen": micro_batches * sampler.ranks * sampler.group_size,
    }


def products_of_step(model: ModelConfig, haplotypes: int, sites: int, references: int = 0) -> dict[str, float]:
    """Floating-point operations of a training step's matrix products, by part of the network.

    ``haplotypes`` queries have ``sites`` sites each. ``references`` haplotypes per query also go through the
    transformer (V17; 0 in V18). A multiplication and an addition are two operations. Attention counts all pairs of
    sites. The backward pass is included, recomputation is not.
    """
    dims, hidden = model.dims, model.ffn_multiple * model.dims
    places = haplotypes * sites
    passed = model.layers * places * (1 + references)
    multiplications = {
        "queries, keys, values": passed * dims * 3 * dims,
        "attention": passed * 2 * sites * dims,
        "output of attention": passed * dims * dims,
        "feed-forward, in": passed * dims * hidden,
        "feed-forward, out": passed * hidden * dims,
        "fusion and head": places * (dims * (6 * dims + 2 * FREQUENCY_FEATURES) + dims),
    }
    return {name: 2.0 * (1 + BACKWARD) * count for name, count in multiplications.items()}


def step_flops(model: ModelConfig, haplotypes: int, sites: int, references: int) -> float:
    """Floating-point operations of a training step: the sum of :func:`products_of_step`."""
    return sum(products_of_step(model, haplotypes, sites, references).values())


@functools.cache
def measured_rate(device: torch.device, dtype: torch.dtype, threads: int) -> float:
    """FLOP a second in matrix products of ``dtype`` with torch's number of ``threads``; a process measures it once.

    The matrices grow from 256 x 256, so that a slow device takes some .1 s as well.
    """
    size, largest = _FIRST_SIZE, _LARGEST_SIZE.get(device.type, _LARGEST_SIZE_ELSEWHERE)
    rate = matrix_rate(device, dtype, size, rounds=1)
    while size < largest and _ROUNDS * 2 * (2 * size) ** 3 / rate < _BUDGET_S:
        size *= 2
        rate = matrix_rate(device, dtype, size, rounds=1)
    return matrix_rate(device, dtype, size, _ROUNDS)


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int, rounds: int = _ROUNDS) -> float:
    """FLOP a second of a product of two ``size`` x ``size`` matrices.

    It is that of the fastest: other programs, which may use the device, too, make products slower only.
    """
    # Not drawn: the run's own random numbers stay as they are. Uneven, because a GPU is faster with even numbers.
    angles = torch.linspace(0, 1e4, size * size, device=device).view(size, size)
    one, other = angles.sin().to(dtype), angles.cos().to(dtype)
    taken = []
    for _ in range(rounds + 1):
        _wait(device)
        began = time.perf_counter()
        torch.mm(one, other)
        _wait(device)
        taken.append(time.perf_counter() - began)
    return 2 * size**3 / min(taken[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
