"""Layers without memory."""

from __future__ import annotations

import torch
from torch import nn

from embrag_ds.runtime.weightless import WithoutMemory


def test_layers_have_shapes_but_no_memory() -> None:
    make = lambda: nn.Sequential(nn.Embedding(4, 8), nn.Linear(8, 2), nn.LayerNorm(2))  # noqa: E731
    with WithoutMemory():
        found = make().state_dict()
        nn.Linear(1 << 20, 1 << 20)  # 4 TiB
    assert {name: value.shape for name, value in found.items()} == {n: v.shape for n, v in make().state_dict().items()}
    assert all(value.is_meta for value in found.values())
    assert not nn.Linear(2, 2).weight.is_meta


def test_other_operations_are_as_ever() -> None:
    with WithoutMemory():
        assert torch.equal(torch.tensor([2.0, 4.0]) / 2, torch.tensor([1.0, 2.0]))
