"""Choice of the fused attention that is fastest on a GPU for a run's shapes."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

logger = logging.getLogger(__name__)

FUSED = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
"""torch's fused kernels by name. Which one is fastest depends on the GPU and on torch's version."""
KEPT_BY_COMPILER = ("flash", "efficient")
"""Kernels whose output torch.compile stores. It would run cuDNN's again in the backward pass, as of torch 2.13."""
_TIMES = 10
_chosen = ExitStack()


def prefer_fastest_attention(
    shape: tuple[int, int, int, int],
    kind: torch.dtype,
    device: torch.device,
    milliseconds: Callable[[SDPBackend], float] | None = None,
    compiled: bool = False,
) -> str | None:
    """Time torch's fused kernels, forward and backward, and let the process use the fastest one from now on.

    ``shape`` is (B, L, heads, head_dims) and ``kind`` the type of a run's queries. The kernel's name is logged with the
    times and returned. Nothing changes on a CPU, under deterministic algorithms, and where fewer than two kernels take
    the shape; the result is None. ``milliseconds`` replaces the measurement, and raises RuntimeError for a kernel that
    cannot run. With ``compiled``, only those of :data:`KEPT_BY_COMPILER` are candidates.
    """
    if milliseconds is None:
        if device.type != "cuda" or torch.are_deterministic_algorithms_enabled():
            return None
        milliseconds = partial(_milliseconds, shape, kind, device)
    times: dict[str, float] = {}
    for name in KEPT_BY_COMPILER if compiled else FUSED:
        try:
            times[name] = milliseconds(FUSED[name])
        except RuntimeError:  # this kernel does not take the shape, the type or the GPU
            continue
    if len(times) < 2:
        return None
    order = sorted(times, key=lambda name: times[name])
    # For good: a block that is recomputed in the backward pass must use the kernel that it used before.
    _chosen.close()
    _chosen.enter_context(sdpa_kernel([*(FUSED[name] for name in order), SDPBackend.MATH], set_priority=True))
    said = ", ".join(f"{name} {times[name]:.2f}" for name in order)
    logger.info(f"attention: {order[0]}, by time of a layer, forward and backward in ms: {said}")
    return order[0]


def forget_attention() -> None:
    """Go back to torch's own order of kernels."""
    _chosen.close()


def _milliseconds(
    shape: tuple[int, int, int, int], kind: torch.dtype, device: torch.device, kernel: SDPBackend
) -> float:
    """Milliseconds that a pass forward and backward takes on a GPU; the first ones are not timed."""
    rows, sites, heads, width = shape
    size = rows, sites, 3, heads, width
    # Not random: the run's own random numbers stay as they are.
    qkv = torch.linspace(-2, 2, math.prod(size), device=device).sin().to(kind).view(size)
    query, key, value = (each.transpose(1, 2) for each in qkv.requires_grad_().unbind(2))
    gradient = torch.ones_like(query)

    def run() -> None:
        mixed = scaled_dot_product_attention(query, key, value)
        torch.autograd.grad(mixed, (query, key, value), gradient)

    with sdpa_kernel(kernel), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # why a kernel does not run
        run()
        run()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(_TIMES):
            run()
        end.record()
    end.synchronize()
    return begin.elapsed_time(end) / _TIMES
