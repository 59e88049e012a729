"""Whole steps of training on the stand-in for CUDA: the order of streams, threads' devices, and waits of the host."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass

import numpy as np
import pytest
import torch

from embrag_ds.data.sampler import exclusion_table
from embrag_ds.model.embedding import HaplotypeEmbedding
from embrag_ds.model.imputer import Imputer, ModelConfig
from embrag_ds.ops import cuda
from embrag_ds.retrieval.batch import Batch
from embrag_ds.retrieval.collate import receive
from embrag_ds.retrieval.prefetch import Prefetcher
from embrag_ds.retrieval.reference import Reference
from embrag_ds.retrieval.schedule import RefreshConfig
from embrag_ds.retrieval.settings import RetrievalConfig
from embrag_ds.runtime.timeline import Timeline
from tests.cuda_rules import Machine

STEPS, ACCUMULATION = 10, 2


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    monkeypatch.setattr(cuda, "available", lambda: False)  # torch's operations in place of the kernels
    with Machine() as machine:
        yield machine


@pytest.fixture(scope="module")
def world(build):
    return build(build.random_alleles(1, 60, 10), window_sites=30, overlap=4, flank=5)


def tensors(part: object) -> Iterator[torch.Tensor]:
    for field in fields(part):  # type: ignore[arg-type]
        value = getattr(part, field.name)
        if isinstance(value, torch.Tensor):
            yield value
        elif is_dataclass(value):
            yield from tensors(value)


class Run:
    """Training as the trainer does it, with a network that reads the whole batch and an optimiser that writes it."""

    def __init__(self, world, device: torch.device, reads: int = 1, **settings) -> None:
        self.world, self.device = world, device
        torch.manual_seed(3)
        self.network = Imputer(ModelConfig(dims=8, layers=1, heads=2)).to(device)
        self.optimiser = torch.optim.SGD(self.network.parameters(), lr=0.01)
        self.timeline = Timeline(device)
        self.reference = Reference(
            RetrievalConfig(k=4, backend="torch", **settings),
            world.data,
            self.network.embedding,
            device,
            exclusion_table(world.samples, None),
            timeline=self.timeline,
        )
        self.collate = self.reference.collator(2, slots=self.reference.prefetch + 2)
        self.validation = self.reference.collator(2)
        self.reference.begin_refresh(0)
        self.batches = Prefetcher(self._build, 0, STEPS * ACCUMULATION, self.reference.prefetch)
        self.seen: list[torch.Tensor] = []

    def _build(self, number: int) -> Batch:
        return self.collate(self._queries(number), number // ACCUMULATION)

    def _queries(self, number: int):
        window = number % len(self.world.data)
        return self.world.batch_of(window, [number % 9, 9], self.world.masked(window, 2, number))

    def step(self, step: int) -> None:
        self.reference.begin_refresh(step)
        for _ in range(ACCUMULATION):
            batch = self.batches.next()
            logits = self.network(batch).logits
            for tensor in tensors(batch):
                tensor.sum()
            logits.square().mean().backward()
            self.seen.append(logits.detach())
        self.optimiser.step()
        self.optimiser.zero_grad()

    def validate(self, step: int) -> None:
        batch = receive(self.validation(self._queries(step), step))
        with torch.no_grad():
            self.seen.append(self.network(batch).logits)

    def close(self) -> list[torch.Tensor]:
        """Everything that the network put out, on the CPU."""
        self.batches.close()
        self.reference.close()
        return [each.cpu() for each in self.seen]


ENCODINGS = [
    {"encoding": "fixed"},
    {"encoding": "fixed", "store": "dense"},
    {"encoding": "refresh", "refresh": RefreshConfig(every_steps=2, lag_steps=1)},
    {"encoding": "refresh", "refresh": RefreshConfig(every_steps=2, lag_steps=1), "prefetch": 0},
    {"encoding": "refresh", "refresh": RefreshConfig(every_steps=2, lag_steps=1), "store": "dense"},
    {"encoding": "refresh", "refresh": RefreshConfig(every_steps=3, lag_steps=0, asynchronous=False)},
    {"encoding": "live"},
    {"mode": "token", "token_k": 2},
    {"mode": "none"},
]


def name(settings: dict) -> str:
    return "-".join(str(value) for key, value in settings.items() if key not in ("refresh", "token_k"))


@pytest.mark.parametrize("budget", [1.0, 0.0], ids=["resident", "streamed"])
@pytest.mark.parametrize("settings", ENCODINGS, ids=name)
def test_training_keeps_cudas_rules_and_computes_what_the_cpu_does(
    world, machine: Machine, settings: dict, budget: float
) -> None:
    results = []
    for device in (torch.device("cpu"), machine.device):
        run = Run(world, device, **settings, device_budget_gb=budget)
        for step in range(STEPS):
            run.step(step)
            if step % 3 == 2:
                run.validate(step)
        results.append(run.close())
    assert machine.breaches == []
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-4)
