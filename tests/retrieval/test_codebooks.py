"""Reference cache: the codebooks of a generation, and equality of the asynchronous and the synchronous cache."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from embrag_ds.data.sampler import exclusion_table
from embrag_ds.errors import UserError
from embrag_ds.model.embedding import HaplotypeEmbedding
from embrag_ds.ops.dosage import dense_alleles
from embrag_ds.retrieval.batch import Batch
from embrag_ds.retrieval.codebooks import LiveCodebooks, ReferenceCache
from embrag_ds.retrieval.collate import site_tensors
from embrag_ds.retrieval.reference import Reference
from embrag_ds.retrieval.schedule import Generation, RefreshConfig, RefreshSchedule
from embrag_ds.retrieval.settings import RetrievalConfig

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world(build):
    return build(build.random_alleles(1, 60, 10), window_sites=30, overlap=4, flank=5)


def make_reference(world, embedding: HaplotypeEmbedding, **settings) -> Reference:
    exclusions = exclusion_table(world.samples, None)
    return Reference(RetrievalConfig(k=4, **settings), world.data, embedding, CPU, exclusions, steps_per_epoch=5)


def make_embedding(seed: int = 1) -> HaplotypeEmbedding:
    torch.manual_seed(seed)
    return HaplotypeEmbedding(8)


def change(embedding: HaplotypeEmbedding) -> None:
    """Change all parameters, as an optimiser step does."""
    with torch.no_grad():
        for parameter in embedding.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def codebook_now(world, embedding: HaplotypeEmbedding, window: int) -> torch.Tensor:
    core = world.data.windows[window].core
    with torch.no_grad():
        return embedding.codebook(site_tensors(world.data, window, CPU))[core, :2].clone()


def batch_of(world, reference: Reference, step: int, window: int = 1) -> Batch:
    return reference.collator(2)(world.batch_of(window, [0, 3], world.masked(window, 2, 1)), step)


def refreshing_cache(world, lag: int = 0, asynchronous: bool = False, every: int = 1) -> ReferenceCache:
    schedule = RefreshSchedule(RefreshConfig(every_steps=every, lag_steps=lag))
    return ReferenceCache(world.data.windows, 3, torch.float32, CPU, schedule, asynchronous)


def test_a_codebook_is_what_the_encoder_made_and_does_not_change(world) -> None:
    """Later generations use both buffers meanwhile."""
    cache = refreshing_cache(world)
    held = []
    for step in range(5):
        cache.begin(Generation(step, step, step), world.embedding(step))
        held.append([cache.code(window, step) for window in range(len(world.data))])
    for step, codes in enumerate(held):
        for window, code in enumerate(codes):
            whole = world.embedding(step).codebooks[window]
            assert code.generation == Generation(step, step, step)
            assert torch.equal(code.codebook, whole[world.data.windows[window].core, :2])
            assert torch.allclose(code.weights, (whole[:, 1] - whole[:, 0]).square().sum(-1))


def test_host_memory_is_twice_the_codebooks_and_once_where_nothing_changes(world) -> None:
    cores = sum(window.core_stop - window.core_start for window in world.data.windows)
    one = 4 * (cores * 2 * 3 + sum(map(len, world.data.windows)))
    assert refreshing_cache(world).host_bytes == 2 * one
    assert ReferenceCache(world.data.windows, 3, torch.float32, CPU, RefreshSchedule(None)).host_bytes == one
    half = ReferenceCache(world.data.windows, 3, torch.bfloat16, CPU, RefreshSchedule(None)).host_bytes
    assert half == one - 2 * cores * 2 * 3


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("store", ["factored", "dense"])
@pytest.mark.parametrize(("every", "lag"), [(1, 0), (3, 0), (3, 2), (3, 3), (2, 3)])
def test_a_batch_carries_the_snapshot_its_step_prescribes(
    world, asynchronous: bool, store: str, every: int, lag: int
) -> None:
    embedding = make_embedding()
    refresh = RefreshConfig(every_steps=every, lag_steps=lag, asynchronous=asynchronous)
    reference = make_reference(world, embedding, encoding="refresh", store=store, refresh=refresh)
    snapshots, skipped = {}, 0
    current = pending = (0, 0)
    for step in range(12):
        if pending[1] == step:
            current = pending
        if step and step % every == 0:
            if step < pending[1]:
                skipped += 1
            else:
                pending = (step, step + lag)
                current = pending if lag == 0 else current
        snapshots[step] = codebook_now(world, embedding, 1)
        reference.begin_refresh(step)
        change(embedding)  # later training must not change the generation
        retrieved = batch_of(world, reference, step).retrieved
        assert retrieved.snapshot_step == current[0]
        assert torch.equal(retrieved.codebook, snapshots[current[0]])
        if store == "dense":
            rows = snapshots[current[0]][torch.arange(len(retrieved.codebook)), dense_alleles(retrieved.alleles).long()]
            assert torch.equal(retrieved.embeddings, rows)
        age = {"generation": retrieved.generation, "staleness": step - current[0], "refreshes_skipped": skipped}
        assert reference.age(step) == age
    assert (skipped > 0) == (lag > every)
    reference.close()


def test_fixed_never_changes(world) -> None:
    embedding = make_embedding()
    reference = make_reference(world, embedding, encoding="fixed", refresh=RefreshConfig(every_steps=1))
    reference.begin_refresh(0)
    first = batch_of(world, reference, 0)
    for step in range(1, 8):
        change(embedding)
        reference.begin_refresh(step)
        later = batch_of(world, reference, step)
        assert torch.equal(later.retrieved.codebook, first.retrieved.codebook)
        assert torch.equal(later.retrieved.ids, first.retrieved.ids)
        assert later.retrieved.generation == 0 and later.retrieved.snapshot_step == 0


def test_live_searches_with_the_current_weights_and_leaves_the_codebook_to_the_model(world) -> None:
    embedding = make_embedding()
    reference = make_reference(world, embedding, encoding="live")
    assert reference.prefetch == 0  # weights that are being trained cannot be read ahead
    for step in range(3):
        change(embedding)
        reference.begin_refresh(step)
        fresh = make_reference(world, embedding, encoding="fixed")
        fresh.begin_refresh(0)
        batch, expected = batch_of(world, reference, step), batch_of(world, fresh, 0)
        assert batch.retrieved.codebook is None and batch.retrieved.embeddings is None
        assert torch.equal(batch.retrieved.ids, expected.retrieved.ids)


def test_a_live_source_encodes_anew_at_every_call(world) -> None:
    current = [world.embedding(1)]
    source = LiveCodebooks(lambda window, tokens: current[0](window, tokens), world.data.windows, CPU)
    first = source.code(1, 0)
    current[0] = world.embedding(2)
    second = source.code(1, 1)
    core = world.data.windows[1].core
    assert torch.equal(first.codebook, world.embedding(1).codebooks[1][core, :2])
    assert torch.equal(second.codebook, world.embedding(2).codebooks[1][core, :2])
    assert not torch.equal(first.weights, second.weights)


def test_mode_none_retrieves_nothing(world) -> None:
    reference = make_reference(world, make_embedding(), mode="none")
    reference.begin_refresh(0)
    assert reference.cache is None and reference.age(3) == {}
    assert batch_of(world, reference, 0).retrieved is None


@pytest.mark.parametrize("store", ["factored", "dense"])
def test_restored_generations_give_the_same_batches(world, store: str) -> None:
    """Cut at step 7, between the snapshot of generation 1 (6) and its publication (9)."""
    refresh = RefreshConfig(every_steps=6, lag_steps=3)
    embedding = make_embedding()
    reference = make_reference(world, embedding, encoding="refresh", store=store, refresh=refresh)
    for step in range(7):
        change(embedding)
        reference.begin_refresh(step)
    state = reference.state_dict(7)
    assert [each["generation"]["number"] for each in state] == [0, 1]
    change(embedding)
    again = make_reference(world, make_embedding(9), encoding="refresh", store=store, refresh=refresh)
    again.load_state_dict(state)
    for step in (7, 8, 9, 11):
        before, after = (batch_of(world, each, step).retrieved for each in (reference, again))
        assert torch.equal(before.ids, after.ids) and torch.equal(before.codebook, after.codebook)
        assert (before.generation, before.snapshot_step) == (after.generation, after.snapshot_step)
    for each in (reference, again):
        each.close()


def test_training_goes_on_while_a_generation_is_encoded(world) -> None:
    cache = refreshing_cache(world, lag=2, asynchronous=True, every=4)
    cache.begin(Generation(0, 0, 0), world.embedding(0))
    go = threading.Event()

    def slow(window: int, tokens: torch.Tensor) -> torch.Tensor:
        go.wait(10)
        return world.embedding(1)(window, tokens)

    cache.begin(Generation(1, 4, 6), slow)
    for step in (4, 5):
        assert cache.code(0, step).generation.number == 0
        cache.raise_failure()
    threading.Timer(0.2, go.set).start()
    began = time.monotonic()
    code = cache.code(0, 6)  # published at step 6 in any case, so this batch waits
    assert time.monotonic() - began > 0.1
    assert torch.equal(code.codebook, world.embedding(1).codebooks[0][world.data.windows[0].core, :2])
    cache.close()


def test_a_failure_on_the_refresh_thread_is_raised_in_the_training_thread(world) -> None:
    cache = refreshing_cache(world, lag=2, asynchronous=True)
    cache.begin(Generation(0, 0, 0), world.embedding(0))
    cache.code(0, 0)
    cache.raise_failure()

    def broken(window: int, tokens: torch.Tensor) -> torch.Tensor:
        raise SystemExit("the encoder died")  # not an Exception, as when a thread is killed

    cache.begin(Generation(1, 1, 3), broken)
    with pytest.raises(SystemExit, match="the encoder died"):
        cache.code(0, 3)
    with pytest.raises(SystemExit, match="the encoder died"):
        cache.raise_failure()
    cache.close()


def test_closing_releases_a_batch_that_waits_for_a_generation(world) -> None:
    cache = refreshing_cache(world, asynchronous=True)
    outcome: list[BaseException] = []

    def wait() -> None:
        try:
            cache.code(0, 0)
        except RuntimeError as fault:
            outcome.append(fault)

    waiting = threading.Thread(target=wait)
    waiting.start()
    cache.close()
    waiting.join(5)
    assert len(outcome) == 1 and "closed while a batch waited" in str(outcome[0])


def test_the_dense_store_does_not_go_with_live() -> None:
    with pytest.raises(UserError, match=r"embrag\.retrieval\.store"):
        RetrievalConfig(store="dense", encoding="live")
