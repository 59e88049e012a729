"""Refresh schedule against a simulation step by step."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embrag_ds.errors import UserError
from embrag_ds.retrieval.schedule import Generation, RefreshConfig, RefreshSchedule

STEPS = 60


def account(due: set[int], lag: int) -> tuple[list[Generation], list[int], list[int]]:
    """Simulated generations, number in use at every step, and number of refreshes skipped up to every step."""
    generations, in_use, skipped = [Generation(0, 0, 0)], [], []
    missed, pending = 0, None
    current = generations[0]
    for step in range(STEPS):
        if pending is not None and pending.first_step == step:
            current, pending = pending, None
        if step in due:
            if pending is None:
                pending = Generation(len(generations), step, step + lag)
                generations.append(pending)
                if lag == 0:
                    current, pending = pending, None
            else:
                missed += 1
        in_use.append(current.number)
        skipped.append(missed)
    return generations, in_use, skipped


def schedules() -> st.SearchStrategy[tuple[RefreshConfig, int, set[int]]]:
    """Strategy for settings, steps per epoch, and the steps at which a refresh is due."""
    lag = st.integers(0, 7)
    by_steps = st.builds(
        lambda n, lag: (RefreshConfig(every_steps=n, lag_steps=lag), 5, set(range(n, STEPS, n))),
        st.integers(1, 12),
        lag,
    )
    by_epochs = st.builds(
        lambda n, size, lag: (
            RefreshConfig(every_epochs=n, lag_steps=lag),
            size,
            {step for step in range(1, STEPS) if step % size == 0 and step // size % n == 0},
        ),
        st.integers(1, 4),
        st.integers(1, 9),
        lag,
    )
    listed = st.builds(
        lambda steps, lag: (RefreshConfig(at_steps=tuple(sorted(steps)), lag_steps=lag), 5, steps),
        st.sets(st.integers(1, STEPS - 1), min_size=1, max_size=12),
        lag,
    )
    return st.one_of(by_steps, by_epochs, listed)


@given(schedules(), st.permutations(range(STEPS)))
def test_the_schedule_is_a_pure_function_of_the_step(made, order) -> None:
    """The order of calls does not matter, as for a prefetch thread beside the training loop."""
    config, steps_per_epoch, due = made
    generations, in_use, skipped = account(due, config.lag_steps)
    schedule = RefreshSchedule(config, steps_per_epoch)
    taken = {each.snapshot_step: each for each in generations}
    for step in order:
        assert schedule.in_use(step).number == in_use[step]
        assert schedule.taken_at(step) == taken.get(step)
        assert schedule.skipped_until(step) == skipped[step]


@given(schedules(), st.integers(1, STEPS - 1))
def test_a_resumed_run_is_given_what_it_cannot_take_again(made, steps: int) -> None:
    config, steps_per_epoch, due = made
    generations, in_use, _ = account(due, config.lag_steps)
    kept = RefreshSchedule(config, steps_per_epoch).needed_after(steps)
    assert 1 <= len(kept) <= 2 and kept[0].number == in_use[steps - 1]
    later = {generations[in_use[step]] for step in range(steps, STEPS)}
    assert {each for each in later if each.snapshot_step < steps} <= set(kept)


def test_a_fixed_cache_has_one_generation() -> None:
    schedule = RefreshSchedule(None)
    assert schedule.taken_at(0) == schedule.in_use(10**6) == Generation(0, 0, 0)
    assert schedule.taken_at(7) is None and schedule.skipped_until(10**6) == 0


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"every_steps": 1, "every_epochs": 1},
        {"every_steps": 0},
        {"every_epochs": 0},
        {"at_steps": ()},
        {"at_steps": (3, 3)},
        {"at_steps": (0, 3)},
        {"every_steps": 1, "lag_steps": -1},
    ],
)
def test_a_schedule_is_exactly_one_positive_rule(settings) -> None:
    with pytest.raises(UserError, match=r"embrag\.retrieval\.refresh"):
        RefreshConfig(**settings)
