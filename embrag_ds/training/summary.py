"""First lines of a run: what it trains on, and with what."""

from __future__ import annotations

import deepspeed

from embrag_ds.data.inputs import PanelInputs
from embrag_ds.data.panel import skipped_records
from embrag_ds.data.sampler import TrainingSampler
from embrag_ds.engine.distributed import DistributedContext
from embrag_ds.engine.masters import parameters_of
from embrag_ds.model.poolings.copying import CopyingPooling
from embrag_ds.ops.li_stephens import copying_backend
from embrag_ds.retrieval.collate import RetrievalCollator
from embrag_ds.retrieval.reference import Reference


def summary(
    inputs: PanelInputs,
    sampler: TrainingSampler,
    engine: deepspeed.DeepSpeedEngine,
    reference: Reference,
    collators: list[RetrievalCollator],
    distributed: DistributedContext,
) -> list[str]:
    """Lines about panel, model and retrieval; the first of ``collators`` is that of training."""
    panel, device = inputs.panel, distributed.device
    skipped = skipped_records(panel.skipped)
    samples = len(sampler.samples)
    is_copying = isinstance(engine.module.pooling, CopyingPooling)
    copying = f"copying model {copying_backend(device)}; " if is_copying else ""
    return [
        f"panel {panel.path}: {len(panel.sites)} sites, {len(sampler.data)} windows, {samples} samples to train on, "
        f"{len(panel.samples) - samples} held out, {len(inputs.populations.names)} populations"
        + (f"; {skipped}" if skipped else ""),
        f"model: {parameters_of(engine) / 1e6:.2f} M parameters on {distributed.ranks} x {device.type}, "
        f"{engine.train_batch_size()} samples a step, {sampler.steps_per_epoch} steps an epoch",
        f"retrieval: {reference}, {collators[0].backend}, k {collators[0].k}; {copying}{reference.memory(collators)}",
    ]
