"""A training step does not synchronise: no operation returns a value or a data-dependent size to the host."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from embrag_ds.model.losses import imputation_loss
from embrag_ds.model.poolings import fusions
from embrag_ds.model.settings import LossConfig
from embrag_ds.ops import li_stephens

# Operations that copy a value, or the size of a result, to the host.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique", "repeat_interleave.Tensor")


class Waits(TorchDispatchMode):
    """Dispatch mode that counts the operations of :data:`WAITS`, and indexing by a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function).removeprefix("aten.")
        by_truth = name.startswith("index") and any(
            each.dtype == torch.bool for each in tree_leaves(args[1:]) if isinstance(each, torch.Tensor)
        )
        if name.startswith(WAITS) or by_truth:
            self.seen[name] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "torch"])
@pytest.mark.parametrize("fusion", fusions())
@pytest.mark.parametrize("mode", ["none", "token", "factored", "live"])
def test_forward_loss_and_backward_never_synchronise(
    build, monkeypatch, mode: str, fusion: str, compiled: bool
) -> None:
    if not compiled:  # as on a GPU without CuPy
        monkeypatch.setattr(li_stephens, "copying_backend", lambda device: "torch")
    world = build(3, samples=12)
    network = build.imputer(fusion=fusion).train()
    batch = world.collator(network.embedding, mode=mode)(world.batch_of(1, [0, 4, 9], world.masked(1, 3, 1)))
    with Waits() as waits:
        logits = network(batch).logits
        frequency = batch.core.sites.frequency
        imputation_loss(
            logits, batch.core.alleles, batch.core.scored, frequency, LossConfig(rarity=0.5)
        ).total.backward()
    assert not waits.seen


def test_synchronising_operations_are_counted() -> None:
    values = torch.arange(4.0)
    with Waits() as waits:
        values.sum().item()
        values[values > 1]
        torch.repeat_interleave(torch.tensor([1, 2]))
    assert set(waits.seen) == {"_local_scalar_dense.default", "index.Tensor", "repeat_interleave.Tensor"}
