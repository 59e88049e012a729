"""Exported models of networks that nothing has trained."""

from __future__ import annotations

import torch

from embrag_ds.config import RunConfig
from embrag_ds.export import ExportedModel
from embrag_ds.model.imputer import Imputer


def untrained(config: RunConfig, head: float) -> ExportedModel:
    """Network with random weights; a ``head`` above 0 makes its residual matter.

    Its snapshot embeds sites otherwise, as that of a training does, but weighs them alike.
    """
    torch.manual_seed(4)
    network = Imputer(config.embrag.model)
    torch.nn.init.normal_(network.head.weight, std=head)
    weights = network.state_dict()
    # Copies, because safetensors refuses tensors that share their memory.
    encoded = {
        name.removeprefix("embedding."): value.clone() for name, value in weights.items() if "embedding." in name
    }
    encoded["frequency.weight"] += torch.randn_like(encoded["frequency.weight"])
    return ExportedModel.of(config.embrag, weights, encoded)
