"""No two uses of random numbers share a stream, and the simulator's streams are what they have always been."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embrag_ds.errors import UserError
from embrag_ds.seeds import Purpose, generator, torch_seed

SIMULATOR = (Purpose.SIMULATION, Purpose.SIMULATED_ERRORS)
# Numbers that once made streams meet: zeros, which pad, and words beyond the first.
number = st.one_of(st.integers(0, 3), st.integers(0, 2**32 - 1))
seed = st.one_of(
    st.integers(0, 9), st.sampled_from([2**32, 2**32 + 1, 3 * 2**32, 2**64 - 1]), st.integers(0, 2**64 - 1)
)
stream = st.one_of(
    st.tuples(st.sampled_from([each for each in Purpose if each not in SIMULATOR]), seed, st.lists(number, max_size=4)),
    st.tuples(st.sampled_from(SIMULATOR), st.integers(1, 2**32 - 1), st.just([])),
)
Stream = tuple[Purpose, int, list[int]]


def state(one: Stream) -> int:
    purpose, seed, key = one
    return generator(purpose, seed, *key).bit_generator.state["state"]["state"]


def different(one: Stream, other: Stream) -> bool:
    draws = [generator(each[0], each[1], *each[2]).integers(2**63, size=3).tolist() for each in (one, other)]
    return state(one) != state(other) and draws[0] != draws[1]


@given(one=stream, other=stream)
def test_streams_are_equal_only_where_purpose_seed_and_key_are(one: Stream, other: Stream) -> None:
    assert state(one) == state(one)
    assert one == other or different(one, other)


@given(
    one=stream,
    purpose=st.sampled_from([each for each in Purpose if each not in SIMULATOR]),
    more=number,
    data=st.data(),
)
def test_streams_differ_in_every_part(one: Stream, purpose: Purpose, more: int, data: st.DataObject) -> None:
    was, seed, key = one
    if purpose != was:
        assert different(one, (purpose, seed, key))
    others = [(was, seed, [*key, more]), (was, seed, [*key, 0])] if was not in SIMULATOR else []
    if was not in SIMULATOR:
        others.append((was, (seed + 2**32) % 2**64, key))
        # What a seed's upper word, or a first number of the key, would be in the other's place.
        others.append((was, seed % 2**32, [seed >> 32, *key]))
    if key:
        place = data.draw(st.integers(0, len(key) - 1))
        others += [(was, seed, [*key[:place], (key[place] + 1) % 2**32, *key[place + 1 :]]), (was, seed, key[:-1])]
        others += [(was, seed, key[1:]), (was, seed, [*reversed(key)])]
    assert all(other == one or different(one, other) for other in others)


def test_purposes_do_not_meet_at_small_seeds_and_keys() -> None:
    keys = [[], [0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0], [0, 0, 1], [1, 2, 3]]
    streams = [
        (purpose, seed, key) for purpose in Purpose if purpose not in SIMULATOR for seed in range(14) for key in keys
    ]
    streams += [(purpose, seed, []) for purpose in SIMULATOR for seed in range(1, 14)]
    assert len({state(each) for each in streams}) == len(streams)


def test_purposes_keep_their_numbers() -> None:
    """Changing one changes all that was drawn for it; frozen masks would need new names."""
    assert [(each.name, each.value) for each in Purpose] == [
        ("SPLIT", 0),
        ("EPOCH_ORDER", 1),
        ("SAMPLE_GROUPS", 2),
        ("AUGMENTATION", 3),
        ("TRAINING_MASKS", 4),
        ("VALIDATION_MASKS", 5),
        ("INITIAL_WEIGHTS", 6),
        ("DROPOUT", 7),
        ("BOOTSTRAP", 8),
        ("SIMULATION", 9),
        ("SIMULATED_ERRORS", 10),
        ("BENCHMARK_PANEL", 11),
        ("BENCHMARK_QUERIES", 12),
        ("FAULTS", 13),
        ("ARRAY_SITES", 14),
        ("HEAD_ROWS", 15),
    ]


@pytest.mark.parametrize("seed", [1, 11, 2**32 - 1])
def test_the_simulator_draws_what_it_always_has(seed: int) -> None:
    for purpose, entropy in ((Purpose.SIMULATION, seed), (Purpose.SIMULATED_ERRORS, [seed, 3])):
        expected = np.random.default_rng(entropy).random(5)
        np.testing.assert_array_equal(generator(purpose, seed).random(5), expected)


def drawn(seed: int) -> tuple[float, ...]:
    torch.manual_seed(seed)
    return tuple(torch.rand(4).tolist())


def test_torch_is_given_all_of_a_seed() -> None:
    assert drawn(5) == drawn(5 + 2**32)  # its generator on the CPU looks at 32 bits only
    seeds = [torch_seed(purpose, seed, *key) for purpose, seed, key in (
        (Purpose.INITIAL_WEIGHTS, 5, ()),
        (Purpose.INITIAL_WEIGHTS, 5 + 2**32, ()),
        (Purpose.INITIAL_WEIGHTS, 5 + 2**63, ()),
        (Purpose.DROPOUT, 5, (0, 0)),
        (Purpose.DROPOUT, 5 + 2**32, (0, 0)),
        (Purpose.DROPOUT, 5, (0, 1)),
        (Purpose.DROPOUT, 5, (1, 0)),
    )]  # fmt: skip
    assert all(0 <= each < 2**64 for each in seeds)
    assert len({drawn(each) for each in seeds}) == len(seeds)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_other_seeds_are_users_errors(seed: int) -> None:
    for make in (generator, torch_seed):
        with pytest.raises(UserError, match=rf"the seed {seed} does not lie in \[0, 2\^64\)"):
            make(Purpose.BOOTSTRAP, seed)


@pytest.mark.parametrize("key", [(-1,), (0, 2**32)])
def test_numbers_of_a_key_that_another_key_could_equal_are_bugs(key: tuple[int, ...]) -> None:
    with pytest.raises(AssertionError):
        generator(Purpose.TRAINING_MASKS, 1, *key)


def test_nothing_else_makes_random_numbers(root: Path) -> None:
    """In the package, its benchmarks and its examples a seed is always one of embrag_ds.seeds."""
    found = []
    for path in [each for room in ("embrag_ds", "profiling", "examples") for each in (root / room).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or path == root / "embrag_ds" / "seeds.py":
                continue
            call = ast.unparse(node)
            seeded = call.startswith("torch.manual_seed(torch_seed(Purpose.")
            made = any(
                name in ast.unparse(node.func) for name in ("default_rng", "SeedSequence", "manual_seed", "RandomState")
            )
            if (made and not seeded) or call.startswith(("np.random.", "random.")):
                found.append(f"{path.name}: {call}")
    assert found == []
