"""Generations of the reference cache, and when they are taken."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embrag_ds.data.dataset import exclusion_table
from embrag_ds.engine.reference import Reference
from embrag_ds.errors import UserError
from embrag_ds.model.embedding import HaplotypeEmbedding
from embrag_ds.retrieval.cache import LiveReference, ReferenceCache, refresh_due
from embrag_ds.retrieval.collate import site_tensors
from embrag_ds.retrieval.settings import RefreshConfig, RetrievalConfig

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world(build):
    return build(build.random_alleles(1, 60, 10), window_sites=30, overlap=4, flank=5)


def make_reference(world, embedding: HaplotypeEmbedding, **settings) -> Reference:
    exclusions = exclusion_table(world.samples, None)
    return Reference(RetrievalConfig(k=4, **settings), world.data, embedding, CPU, exclusions)


def make_embedding(seed: int = 1) -> HaplotypeEmbedding:
    torch.manual_seed(seed)
    return HaplotypeEmbedding(8)


def change(embedding: HaplotypeEmbedding) -> None:
    """What an optimiser step does to it."""
    with torch.no_grad():
        for parameter in embedding.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def codebook_now(world, embedding: HaplotypeEmbedding, window: int) -> torch.Tensor:
    core = world.data.windows[window].core
    with torch.no_grad():
        return embedding.codebook(site_tensors(world.data, window, CPU))[core].clone()


def batch_of(world, reference: Reference, window: int = 1):
    return reference.collate(world.batch_of(window, [0, 3], world.hidden(window, 2, 1)))


def test_generations_number_up_from_zero_and_carry_their_step(world) -> None:
    cache = ReferenceCache(world.data.windows, CPU)
    for generation, step in enumerate((0, 3, 17)):
        cache.refresh(world.embedding(generation), step)
        for window in range(len(world.data)):
            code = cache.code(window)
            assert (code.generation, code.step) == (generation, step)


def test_a_reader_keeps_the_generation_it_holds(world) -> None:
    cache = ReferenceCache(world.data.windows, CPU)
    cache.refresh(world.embedding(1), 0)
    held = cache.code(0)
    codebook, weights = held.codebook.clone(), held.weights.clone()
    cache.refresh(world.embedding(2), 5)
    assert torch.equal(held.codebook, codebook) and torch.equal(held.weights, weights) and held.generation == 0
    assert not torch.equal(cache.code(0).codebook, codebook)


@pytest.mark.parametrize("store", ["factored", "dense"])
def test_a_batch_carries_the_codebook_of_its_own_generation(world, store: str) -> None:
    embedding = make_embedding()
    reference = make_reference(world, embedding, encoding="refresh", store=store)
    expected, batches = [], []
    for step in (0, 4, 9):
        reference.take_snapshot(step)
        expected.append(codebook_now(world, embedding, 1))
        change(embedding)  # what is trained afterwards must not reach the generation
        batches.append(batch_of(world, reference))
    for generation, (batch, codebook) in enumerate(zip(batches, expected, strict=True)):
        retrieved = batch.retrieved
        assert (retrieved.generation, retrieved.snapshot_step) == (generation, (0, 4, 9)[generation])
        assert torch.equal(retrieved.codebook, codebook)
        if store == "dense":
            rows = codebook[torch.arange(len(codebook)), retrieved.alleles.long()]
            assert torch.equal(retrieved.embeddings, rows)
        else:
            assert retrieved.embeddings is None


def test_fixed_never_changes(world) -> None:
    embedding = make_embedding()
    reference = make_reference(world, embedding, encoding="fixed", refresh=RefreshConfig(every_steps=1))
    reference.take_snapshot(0)
    first = batch_of(world, reference)
    for step in range(1, 8):
        change(embedding)
        assert not reference.refresh_if_due(step, steps_per_epoch=2)
        later = batch_of(world, reference)
        assert torch.equal(later.retrieved.codebook, first.retrieved.codebook)
        assert torch.equal(later.retrieved.ids, first.retrieved.ids)
        assert later.retrieved.generation == 0 and later.retrieved.snapshot_step == 0


def test_refresh_takes_the_weights_of_the_step_it_is_due(world) -> None:
    embedding = make_embedding()
    reference = make_reference(world, embedding, encoding="refresh", refresh=RefreshConfig(every_steps=3))
    reference.take_snapshot(0)
    expected = codebook_now(world, embedding, 1)
    for step in range(1, 10):
        change(embedding)
        due = reference.refresh_if_due(step, steps_per_epoch=100)
        assert due == (step in (3, 6, 9))
        if due:
            expected = codebook_now(world, embedding, 1)
        retrieved = batch_of(world, reference).retrieved
        assert torch.equal(retrieved.codebook, expected)
        assert (retrieved.generation, retrieved.snapshot_step) == (step // 3, step // 3 * 3)


def test_live_searches_with_the_current_weights_and_leaves_the_codebook_to_the_model(world) -> None:
    embedding = make_embedding()
    reference = make_reference(world, embedding, encoding="live")
    reference.take_snapshot(0)
    for step in range(3):
        change(embedding)
        assert not reference.refresh_if_due(step + 1, steps_per_epoch=1)
        fresh = make_reference(world, embedding, encoding="refresh")
        fresh.take_snapshot(0)
        batch, expected = batch_of(world, reference), batch_of(world, fresh)
        assert batch.retrieved.codebook is None and batch.retrieved.embeddings is None
        assert torch.equal(batch.retrieved.ids, expected.retrieved.ids)


def test_a_live_source_encodes_anew_at_every_call(world) -> None:
    current = [world.embedding(1)]
    source = LiveReference(lambda window, tokens: current[0](window, tokens), world.data.windows, CPU)
    first = source.code(1)
    current[0] = world.embedding(2)
    second = source.code(1)
    core = world.data.windows[1].core
    assert torch.equal(first.codebook, world.embedding(1).codebooks[1][core])
    assert torch.equal(second.codebook, world.embedding(2).codebooks[1][core])
    assert not torch.equal(first.weights, second.weights)


def test_mode_none_retrieves_nothing(world) -> None:
    reference = make_reference(world, make_embedding(), mode="none")
    reference.take_snapshot(0)
    assert reference.cache is None and reference.store is None
    assert batch_of(world, reference).retrieved is None


@pytest.mark.parametrize("store", ["factored", "dense"])
def test_a_restored_generation_gives_the_same_batches_and_number(world, store: str) -> None:
    embedding = make_embedding()
    reference = make_reference(world, embedding, encoding="refresh", store=store)
    for step in (0, 6):
        change(embedding)
        reference.take_snapshot(step)
    state = reference.state_dict()
    before = batch_of(world, reference)
    change(embedding)
    again = make_reference(world, make_embedding(9), encoding="refresh", store=store)
    again.load_state_dict(state)
    after = batch_of(world, again)
    assert torch.equal(before.retrieved.ids, after.retrieved.ids)
    assert torch.equal(before.retrieved.codebook, after.retrieved.codebook)
    assert (after.retrieved.generation, after.retrieved.snapshot_step) == (1, 6)
    again.take_snapshot(8)
    assert batch_of(world, again).retrieved.generation == 2


@settings(deadline=None)
@given(interval=st.integers(1, 12))
def test_refresh_every_steps_is_due_at_each_multiple_after_the_start(interval: int) -> None:
    due, waited = [], 0
    for step in range(60):
        if waited == interval:
            due.append(step)
            waited = 0
        waited += 1
    schedule = RefreshConfig(every_steps=interval)
    assert [step for step in range(60) if refresh_due(step, schedule, 7)] == due


@settings(deadline=None)
@given(epochs=st.integers(1, 4), steps_per_epoch=st.integers(1, 9))
def test_refresh_every_epochs_is_due_when_that_many_epochs_are_over(epochs: int, steps_per_epoch: int) -> None:
    due, step = [], 0
    for epoch in range(12):
        if epoch > 0 and epoch % epochs == 0:
            due.append(step)
        step += steps_per_epoch
    schedule = RefreshConfig(every_epochs=epochs)
    assert [later for later in range(step) if refresh_due(later, schedule, steps_per_epoch)] == due


@pytest.mark.parametrize("settings", [{}, {"every_steps": 1, "every_epochs": 1}, {"every_steps": 0}])
def test_a_schedule_is_exactly_one_positive_interval(settings: dict[str, int]) -> None:
    with pytest.raises(UserError, match=r"embrag\.retrieval\.refresh"):
        RefreshConfig(**settings)


def test_the_dense_store_does_not_go_with_live() -> None:
    with pytest.raises(UserError, match=r"embrag\.retrieval\.store"):
        RetrievalConfig(store="dense", encoding="live")
