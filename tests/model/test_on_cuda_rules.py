"""The whole network's training step on the stand-in for a GPU: its rules are kept, and its results are the CPU's."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch

from embrag_ds.data.sampler import exclusion_table
from embrag_ds.model.losses import imputation_loss
from embrag_ds.model.settings import LossConfig
from embrag_ds.retrieval.collate import receive
from embrag_ds.retrieval.prefetch import Prefetcher
from embrag_ds.retrieval.reference import Reference
from embrag_ds.retrieval.schedule import RefreshConfig
from embrag_ds.retrieval.settings import RetrievalConfig
from tests.cuda_rules import Machine

CPU = torch.device("cpu")
STEPS = 4


def trained(build: Any, device: torch.device, steady: Any, **settings: Any) -> list[torch.Tensor]:
    """Losses of some steps, and the weights after them; ``steady`` is a context for all steps but the first."""
    world = build(3, samples=12)
    network = build.imputer().to(device).train()
    reference = Reference(
        RetrievalConfig(k=6, backend="torch", **settings),
        world.data,
        network.embedding,
        device,
        exclusion_table(world.samples, None),
    )
    collate = reference.collator(len(world.samples), slots=reference.prefetch + 2)
    # Not Adam, which would make rounding errors as large as other gradients.
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-2)
    reference.begin_refresh(0)
    count = len(world.data)

    def batch(number: int) -> Any:
        window = number % count
        return collate(world.batch_of(window, [0, 4, 9], world.masked(window, 3, number)), number)

    batches, losses = Prefetcher(batch, 0, STEPS, reference.prefetch), []
    try:
        for step in range(STEPS):
            reference.begin_refresh(step)
            with steady() if step else torch.enable_grad():
                made = batches.next()
                loss = imputation_loss(
                    network(made).logits,
                    made.core.alleles,
                    made.core.scored,
                    made.core.sites.frequency,
                    LossConfig(rarity=0.5),
                ).total
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.detach())
        late = receive(batch(STEPS))
        with torch.no_grad():
            losses.append(network.eval()(late).logits.sigmoid().mean())
    finally:
        batches.close()
        reference.close()
    return [each.cpu() for each in (*losses, *(weight.detach() for weight in network.parameters()))]


@pytest.mark.long
@pytest.mark.parametrize(("encoding", "mode"), [("refresh", "embedding"), ("live", "embedding"), ("fixed", "token")])
def test_a_training_run_keeps_the_rules_and_equals_the_cpus(
    build: Any, monkeypatch: pytest.MonkeyPatch, encoding: str, mode: str
) -> None:
    settings = {"mode": mode, "encoding": encoding, "refresh": RefreshConfig(every_steps=2, lag_steps=1)}
    expected = trained(build, CPU, torch.enable_grad, **settings)
    monkeypatch.setattr("embrag_ds.ops.cuda.available", lambda: False)  # torch's operations in place of the kernels
    with Machine() as machine:

        def steady() -> AbstractContextManager[None]:
            machine.device_catches_up()  # so that a staging slot is free when it is used again
            return machine.no_waits()

        found = trained(build, machine.device, steady, **settings)
    for there, here in zip(found, expected, strict=True):
        torch.testing.assert_close(there, here, rtol=1e-3, atol=1e-4)
