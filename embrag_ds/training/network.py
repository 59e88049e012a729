"""The network of a run in DeepSpeed's engine, with its first weights."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import deepspeed
import torch

from embrag_ds.config import EmbragConfig
from embrag_ds.engine.distributed import compute_type, initialize_engine
from embrag_ds.engine.masters import set_masters
from embrag_ds.engine.saving import record_saves
from embrag_ds.errors import UserError
from embrag_ds.export import read_export, start_from
from embrag_ds.model.attention import prefer_fastest_attention
from embrag_ds.model.imputer import Imputer
from embrag_ds.seeds import Purpose, torch_seed
from embrag_ds.training.monitors import starts_said


def network_in_engine(
    config: EmbragConfig,
    settings: dict[str, Any],
    core_lengths: Collection[int],
    init_from: Path | None,
    device: torch.device,
) -> deepspeed.DeepSpeedEngine:
    """DeepSpeed's engine of a new network (collective).

    ``settings`` are DeepSpeed's, ``core_lengths`` those of the run's windows. ``init_from`` is an exported model whose
    weights the network starts from. Raises :class:`UserError` for faulty settings, and for a model that does not fit.
    """
    torch.manual_seed(torch_seed(Purpose.INITIAL_WEIGHTS, config.seed))
    model = Imputer(config.model)
    export = None if init_from is None else read_export(init_from)
    if export is not None and init_from is not None:
        start_from(model, config, export, init_from)
    freeze(model, config.train.frozen)
    compiled, recompute = config.train.compile, config.train.recompute_projections
    with starts_said():
        engine = initialize_engine(model, settings, compiled, recompute, core_lengths)
    record_saves(engine)
    passes = 1 + (config.retrieval.token_k if config.retrieval.mode == "token" else 0)
    shape = config.model
    prefer_fastest_attention(
        (
            2 * settings["train_micro_batch_size_per_gpu"] * passes,
            max(core_lengths),
            shape.heads,
            shape.dims // shape.heads,
        ),
        compute_type(settings),
        device,
        compiled=bool(config.train.compile),
    )
    if export is not None:
        set_masters(engine, export.weights)
    return engine


def freeze(model: Imputer, parts: tuple[str, ...]) -> None:
    """Leave ``parts`` of a network untrained; raises :class:`UserError` for one that it does not have."""
    known: dict[str, torch.nn.Module | torch.nn.Parameter] = {
        **dict(model.named_children()),
        **dict(model.named_parameters(recurse=False)),
    }
    for part in parts:
        if part not in known:
            raise UserError(f"embrag.train.frozen: the network has no part {part!r}; it has {', '.join(known)}")
        known[part].requires_grad_(False)
