"""Whole steps of training on the stand-in for CUDA: the order of streams, threads' devices, and waits of the host."""

from __future__ import annotations

import gc
import mmap
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from embrag_ds.data.sampler import QueryBatch, exclusion_table
from embrag_ds.model.embedding import HaplotypeEmbedding
from embrag_ds.ops import cuda
from embrag_ds.retrieval import reference
from embrag_ds.retrieval.batch import Batch
from embrag_ds.retrieval.codebooks import ReferenceCache, SnapshotCodebooks
from embrag_ds.retrieval.collate import receive
from embrag_ds.retrieval.dense import DenseStore
from embrag_ds.retrieval.prefetch import Prefetcher
from embrag_ds.retrieval.reference import Reference
from embrag_ds.retrieval.schedule import Generation, RefreshConfig, RefreshSchedule
from embrag_ds.retrieval.settings import RetrievalConfig
from embrag_ds.runtime.streams import SideStream, hand_over
from embrag_ds.runtime.timeline import Timeline
from tests.cuda_rules import Machine
from tests.retrieval.conftest import RandomEmbedding

CPU = torch.device("cpu")
STEPS, ACCUMULATION = 7, 2


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    monkeypatch.setattr(cuda, "available", lambda: False)  # torch's operations in place of the kernels
    with Machine() as machine:
        yield machine


@pytest.fixture(scope="module")
def world(build):
    return build(build.random_alleles(1, 60, 10), window_sites=30, overlap=4, flank=5)


def tensors(part: object) -> Iterator[Tensor]:
    for field in fields(part):  # type: ignore[arg-type]
        value = getattr(part, field.name)
        if isinstance(value, Tensor):
            yield value
        elif is_dataclass(value):
            yield from tensors(value)


class Network(nn.Module):
    """Stand-in for the network: it reads the whole batch and the live embedding layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding = HaplotypeEmbedding(8)

    def forward(self, batch: Batch) -> Tensor:
        for tensor in tensors(batch):
            tensor.sum()
        return self.embedding.codebook(batch.core.sites).square().mean()


class Run:
    """Training as the trainer does it; the optimiser's step is exact, so that a CPU computes the same."""

    def __init__(self, world: Any, device: torch.device, **settings: Any) -> None:
        self.world = world
        self.network = Network().to(device)
        self.reference = Reference(
            RetrievalConfig(k=4, backend="torch", **settings),
            world.data,
            self.network.embedding,
            device,
            exclusion_table(world.samples, None),
            timeline=Timeline(device),
        )
        self.collate = self.reference.collator(2, slots=self.reference.prefetch + 2)
        self.validation = self.reference.collator(2)
        self.reference.begin_refresh(0)
        self.batches = Prefetcher(self._build, 0, STEPS * ACCUMULATION, self.reference.prefetch)
        self.seen: list[Tensor | None] = []

    def _build(self, number: int) -> Batch:
        return self.collate(self._queries(number), number // ACCUMULATION)

    def _queries(self, number: int) -> QueryBatch:
        window = number % len(self.world.data)
        return self.world.batch_of(window, [number % 9, 9], self.world.masked(window, 2, number))

    def step(self, step: int) -> None:
        self.reference.begin_refresh(step)
        for _ in range(ACCUMULATION):
            batch = self.batches.next()
            self.network(batch).backward()
            self._keep(batch)
        with torch.no_grad():
            for parameter in self.network.parameters():
                parameter.mul_(0.5 if step % 2 else 1.5)
                parameter.grad = None

    def validate(self, step: int) -> None:
        batch = receive(self.validation(self._queries(step), step))
        with torch.no_grad():
            self.network(batch)
        self._keep(batch)

    def _keep(self, batch: Batch) -> None:
        if batch.retrieved is not None:
            self.seen += [batch.retrieved.ids, batch.retrieved.codebook, batch.retrieved.embeddings]
        self.seen.append(batch.core.tokens)

    def close(self) -> list[Tensor]:
        """Every batch's neighbours and their embeddings, on the CPU."""
        self.batches.close()
        self.reference.close()
        return [each.cpu() for each in self.seen if each is not None]


REFRESH = {"encoding": "refresh", "refresh": RefreshConfig(every_steps=2, lag_steps=1)}
SETTINGS = {
    "fixed": {"encoding": "fixed"},
    "fixed-dense": {"encoding": "fixed", "store": "dense"},
    "refresh": REFRESH,
    "refresh-streamed": {**REFRESH, "device_budget_gb": 0.0},
    "refresh-on-demand": {**REFRESH, "prefetch": 0},
    "refresh-dense": {**REFRESH, "store": "dense"},
    "refresh-at-once": {"encoding": "refresh", "refresh": RefreshConfig(every_steps=2, asynchronous=False)},
    "live": {"encoding": "live"},
    "token": {"mode": "token", "token_k": 2},
    "none": {"mode": "none"},
}


@pytest.mark.long
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=list(SETTINGS))
def test_training_keeps_cudas_rules_and_finds_what_the_cpu_does(
    world, machine: Machine, settings: dict[str, Any]
) -> None:
    results = []
    for device in (CPU, machine.device):
        run = Run(world, device, **settings)
        for step in range(STEPS):
            run.step(step)
            if step % 3 == 2:
                run.validate(step)
        results.append(run.close())
    assert machine.breaches == []
    assert {thread for thread, stream in machine.launched if stream == "the default stream"} == {"MainThread"}
    assert len(results[0]) == len(results[1])
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


STEADY = {name: each for name, each in SETTINGS.items() if name not in ("refresh-at-once", "fixed-dense")}


@pytest.mark.long
@pytest.mark.parametrize("settings", STEADY.values(), ids=list(STEADY))
def test_the_training_thread_never_waits_for_the_device(world, machine: Machine, settings: dict[str, Any]) -> None:
    """From the second step on, if the device has copied a batch before two more are built."""
    run = Run(world, machine.device, **settings)
    run.step(0)
    machine.device_catches_up()
    with machine.no_waits():
        for step in range(1, STEPS):
            run.step(step)
            machine.device_catches_up()
    run.close()


def refreshing_cache(world, device: torch.device, asynchronous: bool = False) -> ReferenceCache:
    schedule = RefreshSchedule(RefreshConfig(every_steps=1, lag_steps=0))
    return ReferenceCache(world.data.windows, 3, torch.float32, device, schedule, asynchronous)


def moved(world, device: torch.device, seed: int) -> RandomEmbedding:
    """Random embedding on the device, after whose making the host has waited."""
    return RandomEmbedding([each.to(device) for each in world.embedding(seed).codebooks])


def test_a_buffer_is_encoded_again_after_the_reads_of_all_streams(world, machine: Machine) -> None:
    """Prefetch and validation may read on one thread."""
    cache = refreshing_cache(world, machine.device)
    cache.begin(Generation(0, 0, 0), moved(world, machine.device, 0))
    sides = [SideStream(machine.device) for _ in range(2)]
    held = []
    for side in sides:
        with side:
            held.append(cache.code(0, 0))
    for number in (1, 2):
        cache.begin(Generation(number, number, number), moved(world, machine.device, number))
    for side in sides:
        hand_over((), side.event())
    for code in held:
        expected = world.embedding(0).codebooks[0][world.data.windows[0].core, :2]
        assert torch.equal(code.codebook.cpu(), expected)


def test_a_refresh_leaves_the_default_stream_to_training(world, machine: Machine) -> None:
    """The dense store is encoded at its end."""
    cache, found = refreshing_cache(world, machine.device, asynchronous=True), []
    embedding = moved(world, machine.device, 1)

    def encode(window: int, tokens: Tensor) -> Tensor:
        found.append(torch.cuda.current_stream(machine.device))
        return embedding(window, tokens)

    cache.begin(Generation(0, 0, 0), encode, lambda: found.append(torch.cuda.current_stream(machine.device)))
    cache.code(0, 0)
    cache.close()
    assert len(found) == len(world.data) + 1 and len(set(found)) == 1
    assert found[0] != torch.cuda.default_stream(machine.device)


def test_stored_embeddings_are_usable_on_every_stream(world, machine: Machine) -> None:
    store = DenseStore(world.data, 3, 1.0, machine.device)
    store.refresh(Generation(0, 0, 0), moved(world, machine.device, 1))
    side = SideStream(machine.device)
    with side:
        ids = torch.arange(6, device=machine.device).reshape(2, 3)
        found = store.embeddings(1, ids, Generation(0, 0, 0))
    del store  # its memory is kept until the side stream has read it
    hand_over([found], side.event())
    expected = world.embedding(1).codebooks[1]
    alleles = torch.from_numpy(world.data.reference_alleles(1)).long()[:6].reshape(2, 3, -1)
    stored = expected[torch.arange(len(expected)), alleles][:, :, world.data.windows[1].core]
    assert torch.equal(found.cpu(), stored)


def test_batches_that_are_not_taken_leave_nothing_in_use(world, machine: Machine) -> None:
    run = Run(world, machine.device, **SETTINGS["fixed"])
    while run.batches._ready.qsize() < 2:
        time.sleep(0.01)
    run.close()
    del run
    gc.collect()
    assert machine.breaches == []


def test_a_snapshots_codebook_is_usable_on_all_streams_of_a_thread(world, machine: Machine) -> None:
    source = SnapshotCodebooks(moved(world, machine.device, 1), world.data.windows, machine.device)
    for _ in range(2):
        with SideStream(machine.device) as side:
            code = source.code(1, 0)
            code.codebook.sum(), code.weights.sum()
        hand_over((code.codebook, code.weights), side.event())
    source.code(0, 0)  # drops the other window's


@pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities of their own on Linux only")
@pytest.mark.parametrize(("on_gpu", "nice"), [(True, 0), (False, 19)])
def test_the_refresh_thread_yields_to_training_on_a_cpu_only(world, machine: Machine, on_gpu: bool, nice: int) -> None:
    device = machine.device if on_gpu else CPU
    cache, found = refreshing_cache(world, device, asynchronous=True), []
    embedding = moved(world, device, 1)

    def encode(window: int, tokens: Tensor) -> Tensor:
        found.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        return embedding(window, tokens)

    cache.begin(Generation(0, 0, 0), encode)
    cache.code(0, 0)
    cache.close()
    assert set(found) == {os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) if on_gpu else nice}


def test_the_memory_line_says_what_is_held(world, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "GIB", 1)
    run = Run(world, machine.device, **SETTINGS["refresh-dense"])
    collators = [run.collate, run.validation]
    pages = run.reference.cache.host_bytes, sum(each.staging.host_bytes for each in collators)
    assert machine.registered_bytes == sum(pages) and all(each % mmap.PAGESIZE == 0 for each in pages)
    dense = 2 * sum(map(len, world.data.windows)) * 20 * 8 * 4
    assert run.reference.memory(collators) == (
        f"reference cache {pages[0]:.3f} GiB, staging {pages[1]:.3f} GiB of pinned host memory; dense store up to "
        f"{dense:.3f} GiB; packed panel {60 * 3:.3f} GiB on the device"
    )
    run.close()
