"""Memory of one rank by component, from shapes and settings; the activations come from :mod:`embrag_ds.planning.trace`.

A run on a CPU holds everything in the host's memory. On a GPU the packed panel, the network, its activations and the
batches lie on the device, and the reference cache and the staging in pinned memory of the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from embrag_ds.config import EmbragConfig
from embrag_ds.data.windows import WindowedPanel
from embrag_ds.planning.first_batches import FirstBatches
from embrag_ds.planning.trace import parameter_count, trace_step

HOST, DEVICE = "host", "device"
_FP32 = 4
_BUCKET = 500_000_000
"""DeepSpeed's default of ``reduce_bucket_size``, in numbers."""
_SLOTS = 3


@dataclass(frozen=True)
class Component:
    """Part of a rank's memory: ``size`` bytes in ``place``, which is the host's memory or a GPU's."""

    name: str
    place: str
    size: int


def on_cpu(
    config: EmbragConfig, deepspeed: dict[str, Any], ranks: int, data: WindowedPanel, first: FirstBatches, tables: int
) -> list[Component]:
    """Components of a rank on a CPU. ``tables`` are the bytes of the opened panel, without what is memory-mapped."""
    step = trace_step(config, deepspeed, first.largest, on_gpu=False)
    ahead = _ahead(config)
    parts = [
        Component("tables of samples, sites and windows", HOST, tables),
        *(Component(name, HOST, size) for name, size in states(config, deepspeed, ranks, on_gpu=False).items()),
        Component("reference cache", HOST, cache_bytes(config, data, _FP32)),
        Component("dense store", HOST, dense_bytes(config, data)),
        Component(f"batches: one in use, {ahead} queued", HOST, first.in_flight(ahead)),
        Component("building a batch: search and lists", HOST, first.building),
        Component("activations, forward and backward", HOST, step.peak),
    ]
    return [
        *parts,
        Component("free memory that the allocator keeps", HOST, step.held - step.peak + first.kept_free),
    ]


def on_gpu(
    config: EmbragConfig, deepspeed: dict[str, Any], ranks: int, data: WindowedPanel, first: FirstBatches, tables: int
) -> list[Component]:
    """Components of a rank on a GPU, and of its process on the host. Not measured."""
    step = trace_step(config, deepspeed, first.largest, on_gpu=True)
    packed = int(data.reference.panel.packed.nbytes)
    resident = packed if packed <= config.retrieval.device_budget_gb * (1 << 30) else 0
    kind = 2 if _is_16_bit(deepspeed) else _FP32
    zero = deepspeed.get("zero_optimization", {})
    host = set()
    for section, names in (("offload_param", {"parameters"}), ("offload_optimizer", {"master weights", "optimiser"})):
        if (zero.get(section) or {}).get("device", "none") == "cpu":
            host |= names
    ahead = _ahead(config)
    return [
        Component("tables of samples, sites and windows", HOST, tables),
        Component("reference cache, pinned", HOST, cache_bytes(config, data, kind)),
        Component("staging, pinned", HOST, (ahead + _SLOTS) * _staged(data, first, packed, resident)),
        *(
            Component(name, HOST if name.split(" (")[0] in host else DEVICE, size)
            for name, size in states(config, deepspeed, ranks, on_gpu=True).items()
        ),
        Component("packed panel", DEVICE, resident),
        Component("dense store", DEVICE, dense_bytes(config, data)),
        Component(f"batches: one in use, {ahead} queued", DEVICE, _dense_batches(first, ahead)),
        Component("building a batch: search", DEVICE, first.building),
        Component("activations, forward and backward", DEVICE, step.peak),
    ]


def states(config: EmbragConfig, deepspeed: dict[str, Any], ranks: int, on_gpu: bool) -> dict[str, int]:
    """Bytes of parameters, gradients, master weights and optimiser of one rank, by ZeRO stage and precision."""
    zero = deepspeed.get("zero_optimization", {})
    stage = int(zero.get("stage", 0))
    weights, trained = parameter_count(config), parameter_count(config, trained=True)
    kind = 2 if _is_16_bit(deepspeed) else _FP32
    of_rank = -(-trained // ranks)
    gradients = trained * kind + (of_rank * _FP32 if stage in (1, 2) else 0)
    if deepspeed.get("data_types", {}).get("grad_accum_dtype") == "fp32" and kind == 2:
        gradients = trained * (kind + _FP32)
    if stage == 3:
        gradients = trained * kind + of_rank * _FP32
    bucket = int(zero.get("reduce_bucket_size", _BUCKET))
    # On a CPU the system gives pages of the bucket only where gradients are written.
    exchange = 0 if stage == 0 and ranks == 1 else (bucket if on_gpu and stage else min(bucket, trained)) * kind
    has_masters = stage > 0 or kind == 2
    moments = _moments(deepspeed)
    masters = of_rank if stage else trained
    return {
        "parameters": weights * kind if stage < 3 else -(-weights // ranks) * kind + weights * kind,
        "gradients": gradients,
        "exchange of gradients": exchange,
        "master weights": masters * _FP32 if has_masters else 0,
        "optimiser": masters * _FP32 * moments,
    }


def _moments(deepspeed: dict[str, Any]) -> int:
    """Numbers that the optimiser keeps for every weight."""
    kind = str(deepspeed["optimizer"].get("type", "")).lower()
    params = deepspeed["optimizer"].get("params") or {}
    if kind == "sgd":
        return 1 if params.get("momentum") else 0
    return 1 if kind in ("adagrad", "lion", "muon") else 3 if params.get("amsgrad") else 2


def _is_16_bit(deepspeed: dict[str, Any]) -> bool:
    return any(deepspeed.get(name, {}).get("enabled") for name in ("bf16", "fp16"))


def _ahead(config: EmbragConfig) -> int:
    live = config.retrieval.mode == "embedding" and config.retrieval.encoding == "live"
    return 0 if live else config.retrieval.prefetch


def cache_bytes(config: EmbragConfig, data: WindowedPanel, kind: int) -> int:
    """Bytes of the reference cache: codebooks of all cores and weights of all sites, twice where they are refreshed."""
    settings = config.retrieval
    if settings.mode != "embedding" or settings.encoding == "live":
        return 0
    cores = sum(window.core_stop - window.core_start for window in data.windows)
    one = cores * 2 * config.model.dims * kind + sum(map(len, data.windows)) * 4
    return one * (2 if settings.encoding == "refresh" else 1)


def dense_bytes(config: EmbragConfig, data: WindowedPanel) -> int:
    """Bytes of the dense store."""
    settings = config.retrieval
    if settings.store != "dense" or settings.mode != "embedding":
        return 0
    generations = 2 if settings.encoding == "refresh" else 1
    return generations * sum(map(len, data.windows)) * len(data.reference) * config.model.dims * _FP32


def _staged(data: WindowedPanel, first: FirstBatches, packed: int, resident: int) -> int:
    """Bytes of a staging slot: alleles, masks, typed sites and features of a batch, and panel rows if streamed."""
    samples = len(first.largest.core.tokens) // 2
    sites = max(map(len, data.windows))
    core = max(window.core_stop - window.core_start for window in data.windows)
    row = 8 if resident else packed // max(1, len(data.reference.panel.sites))
    return samples * sites * 13 + sites * 24 + (sites + core) * row


def _dense_batches(first: FirstBatches, ahead: int) -> int:
    """Bytes of the batches of a GPU, which holds the neighbours' alleles as a table."""
    core = first.largest.core
    table = len(core.tokens) * first.neighbours * core.tokens.shape[1] if first.largest.retrieved else 0
    count = ahead + 2 if ahead else 1
    return first.in_flight(ahead) + count * table
