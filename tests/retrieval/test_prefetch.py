"""Prefetcher: order of batches, one generation in each, and exceptions on its thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch

from embrag_ds.model.embedding import HaplotypeEmbedding
from embrag_ds.ops.dosage import dense_alleles
from embrag_ds.retrieval.batch import Batch
from embrag_ds.retrieval.codebooks import ReferenceCache
from embrag_ds.retrieval.collate import RetrievalCollator
from embrag_ds.retrieval.device_panel import DevicePanel
from embrag_ds.retrieval.prefetch import Prefetcher
from embrag_ds.retrieval.reference import Reference
from embrag_ds.retrieval.schedule import RefreshConfig, RefreshSchedule
from embrag_ds.retrieval.search import TorchSearch
from embrag_ds.retrieval.settings import RetrievalConfig
from embrag_ds.retrieval.store import FactoredStore

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world(build):
    return build(build.random_alleles(1, 60, 10), window_sites=30, overlap=4, flank=5)


def builder(world) -> Callable[[int], Batch]:
    collate = world.collator(world.embedding(), "factored", "torch", 4)
    return lambda number: collate(world.batch_of(number % 2, [number % 10], world.masked(number % 2, 1, number)))


@pytest.mark.parametrize("depth", [1, 4])
def test_prefetched_batches_are_those_built_on_demand(world, depth: int) -> None:
    ahead, on_demand = (Prefetcher(builder(world), 3, 40, each) for each in (depth, 0))  # a collator serves one thread
    for _ in range(3, 40):
        one, two = ahead.next(), on_demand.next()
        assert torch.equal(one.core.tokens, two.core.tokens) and torch.equal(one.retrieved.ids, two.retrieved.ids)
    assert on_demand.waited_seconds > 0
    ahead.close()


def test_it_runs_so_far_ahead_and_no_farther() -> None:
    built: list[int] = []
    batches = Prefetcher(lambda number: built.append(number) or FakeBatch(), 0, 100, 3)  # type: ignore[arg-type,func-returns-value]
    for taken in range(5):
        deadline = time.monotonic() + 5
        # Three are in the queue, and a fourth waits for a place in it.
        while len(built) < taken + 4 and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.02)
        assert built == list(range(taken + 4))
        batches.next()
    batches.close()
    assert threading.active_count() < 50 and "retrieval-prefetch" not in [each.name for each in threading.enumerate()]


class FakeBatch:
    ready = None


@pytest.mark.parametrize("depth", [0, 1, 4])
def test_what_fails_is_raised_in_its_place(depth: int) -> None:
    def build(number: int) -> FakeBatch:
        if number == 2:
            raise KeyError("no such window")
        return FakeBatch()

    batches = Prefetcher(build, 0, 9, depth)  # type: ignore[arg-type]
    batches.next(), batches.next()
    with pytest.raises(KeyError, match="no such window"):
        batches.next()
    batches.close()


def test_a_thread_that_was_killed_is_noticed() -> None:
    batches = Prefetcher(lambda number: FakeBatch(), 0, 2, 1)  # type: ignore[arg-type,return-value]
    batches.next(), batches.next()
    with pytest.raises(RuntimeError, match="ended without a word"):
        batches.next()


@pytest.mark.parametrize(("every", "lag"), [(1, 0), (1, 1), (2, 3), (5, 4)])
def test_a_batch_never_mixes_generations(world, every: int, lag: int) -> None:
    """Fast refreshes, whose embeddings all equal the number of the generation, with hundreds of prefetched batches."""
    steps = 800
    schedule = RefreshSchedule(RefreshConfig(every_steps=every, lag_steps=lag))
    cache = ReferenceCache(world.data.windows, 2, torch.float32, CPU, schedule, asynchronous=True)
    collate = RetrievalCollator(
        world.data,
        CPU,
        panel=DevicePanel(world.data, CPU, 1.0),
        store=FactoredStore(TorchSearch()),
        source=cache,
        k=2,
        exclusions=np.arange(10)[:, None],
        samples=1,
    )
    queries = [world.batch_of(window, [3], world.masked(window, 1, window)) for window in range(2)]

    def constant_encoder(number: int):
        def encode(window: int, tokens: torch.Tensor) -> torch.Tensor:
            return torch.full((*tokens.shape, 2), float(number))

        return encode

    batches = Prefetcher(lambda number: collate(queries[number % 2], number), 0, steps, 4)
    seen = set()
    for step in range(steps):
        taken = schedule.taken_at(step)
        cache.raise_failure()
        if taken is not None:
            cache.begin(taken, constant_encoder(taken.number))
        batch = batches.next()
        expected = schedule.in_use(step)
        assert batch.retrieved.generation == expected.number
        assert batch.retrieved.snapshot_step == expected.snapshot_step
        assert (batch.retrieved.codebook == float(expected.number)).all()
        seen.add(expected.number)
    assert len(seen) > steps / (2 * max(every, lag + 1))
    batches.close()
    cache.close()


@pytest.mark.gpu
@pytest.mark.parametrize("budget", [1.0, 0.0])
def test_side_streams_on_the_gpu_build_the_batches_of_the_cpu(build, budget: float) -> None:
    """With prefetching, asynchronous refreshes, a resident or streamed panel, and a busy default stream."""
    world = build(build.random_alleles(1, 600, 100), window_sites=200, overlap=20, flank=50)
    runs = []
    for device, prefetch in ((CPU, 0), (torch.device("cuda", 0), 4)):
        torch.manual_seed(1)
        embedding = HaplotypeEmbedding(64).to(device).requires_grad_(False)
        refresh = RefreshConfig(every_steps=3, lag_steps=2, asynchronous=device.type == "cuda")
        settings = RetrievalConfig(k=16, refresh=refresh, backend="torch", prefetch=prefetch, device_budget_gb=budget)
        reference = Reference(settings, world.data, embedding, device, np.arange(100)[:, None])
        collate = reference.collator(4, slots=prefetch + 2)
        count = len(world.data)

        def built(number: int, collate=collate, count=count) -> Batch:
            masked = world.masked(number % count, 4, number)
            return collate(world.batch_of(number % count, range(number % 90, number % 90 + 4), masked), number)

        batches, seen = Prefetcher(built, 0, 60, prefetch), []
        busy = torch.ones(2048, 2048, device=device)
        for step in range(60):
            reference.begin_refresh(step)
            batch = batches.next()
            if device.type == "cuda":
                busy = (busy @ busy).clamp_(0, 1)
            assert batch.retrieved is not None and batch.retrieved.codebook is not None
            seen.append(
                (batch.core.tokens.cpu(), dense_alleles(batch.retrieved.alleles).cpu(), batch.retrieved.codebook.cpu())
            )
            for parameter in embedding.parameters():
                parameter.mul_(0.99)
        batches.close()
        reference.close()
        runs.append(seen)
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one[0], other[0])
        assert (one[1] == other[1]).float().mean() > 0.99  # up to near ties
        torch.testing.assert_close(one[2], other[2], rtol=1e-4, atol=1e-5)
