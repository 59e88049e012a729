"""Settings that DeepSpeed accepts, and that would have no effect on a run or break it.

A run folder records the settings of its run. So a setting that is not in force is refused, not recorded.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from embrag_ds.errors import UserError

_INSTEAD = {
    "autotuning": "choose train_micro_batch_size_per_gpu with embrag train --dry-run",
    "checkpoint.parallel_write": "it belongs to pipelines of layers",
    "compile": "set embrag.train.compile",
    "data_efficiency": "samples and masks follow embrag.masking and embrag.augmentation",
    "dataloader_drop_last": "samples beyond the last full micro-batch of an epoch are always left out",
    "disable_allgather": "DeepSpeed does not read it",
    "expert_parallel": "the network has no experts",
    "pipeline": "the network is not cut into a pipeline",
    "seq_parallel_communication_data_type": "windows are not split among ranks",
    "use_data_before_expert_parallelism": "the network has no experts",
    "weight_quantization": "it is for inference",
}
"""Key -> what is done instead, or why it has no effect."""
_BREAKING = {
    "checkpoint.writer": "it writes checkpoints while training goes on, so that they could not be checked",
    "datastates_ckpt": "it writes checkpoints while training goes on, so that they could not be checked",
    "hybrid_engine": "it is for text generation",
    "tensor_parallel": "layers are not split among ranks, which would then draw other samples",
}
"""Key -> why a run would not work with it."""
_STAGE_3_ONLY = (
    "gather_16bit_weights_on_model_save",
    "leaf_module",
    "max_live_parameters",
    "max_reuse_distance",
    "memory_efficient_linear",
    "model_persistence_threshold",
    "module_granularity_threshold",
    "offload_param",
    "param_persistence_threshold",
    "prefetch_bucket_size",
    "sub_group_size",
    "use_all_reduce_for_fetch_params",
    "zero_hpz_partition_size",
    "zero_quantized_weights",
)
"""Keys of ``zero_optimization`` that only stage 3 reads, besides those that begin with ``stage3_``."""


def refuse_unused(tree: dict[str, Any], source: str) -> None:
    """Raise :class:`UserError` if ``tree``, DeepSpeed's half, sets what has no effect; ``source`` names the file."""
    for key, why in _BREAKING.items():
        if _is_set(key, tree):
            raise UserError(f"{source}: {key} cannot be used in embrag_ds: {why}; leave it out")
    for key, why in _unused(tree):
        raise UserError(f"{source}: {key} has no effect in embrag_ds: {why}; leave it out")


def _is_set(key: str, tree: dict[str, Any]) -> bool:
    section, _, name = key.rpartition(".")
    return name in (tree.get(section) or {} if section else tree)


def _unused(tree: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Keys without effect, and why."""
    for key, why in _INSTEAD.items():
        if _is_set(key, tree):
            yield key, why
    if not tree.get("managed_gradient_accumulation", True):
        yield "managed_gradient_accumulation", "gradient_accumulation_steps decides when the optimiser steps"
    zero = tree.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    for key, value in zero.items():
        if stage != 3 and value is not None and (key in _STAGE_3_ONLY or key.startswith("stage3_")):
            yield f"zero_optimization.{key}", f"stage {stage} does not read it, only stage 3 does"
    if stage == 0 and zero.get("offload_optimizer"):
        yield "zero_optimization.offload_optimizer", "stage 0 does not offload, stages 1 to 3 do"
    offloads = (zero.get(key) or {} for key in ("offload_param", "offload_optimizer"))
    if "aio" in tree and not any(each.get("device") == "nvme" for each in offloads):
        yield "aio", "nothing is offloaded to an NVMe drive"
