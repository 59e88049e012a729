"""Minutes become steps by sizes alone, and what is no number of minutes is one line."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from embrag_ds.adaptation.settings import StepSize, least_minutes, parse_adapt, steps_within
from embrag_ds.cli.main import main
from embrag_ds.errors import UserError
from embrag_ds.model.settings import ModelConfig

SIZE = StepSize(rows=32, haplotypes=4_000, typed=500.0, neighbours=1536, core=768.0)
MANY = 1_000_000
"""Batches that limit nothing."""


@pytest.fixture
def handler() -> Iterator[None]:
    """The command's handler of SIGTERM is taken back."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "-inf", "1440.1", "1441", "x", "", " ", "2 minutes", "AUTO"])
def test_a_bad_value_is_one_line_before_any_work(
    handler: None, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments=["impute", f"--adapt={text}", f"--out={tmp_path / 'out.vcf.gz'}"])
    assert ended.value.code == 2 and list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err.splitlines() == [
        f"error: --adapt {text}: give auto, off, or minutes of two cores, more than 0 and at most a day's 1440"
    ]


def test_what_is_read() -> None:
    assert [parse_adapt(each) for each in ("auto", "off", "2", "0.5", "1e-3", "1440")] == [
        "auto",
        "off",
        2,
        0.5,
        1e-3,
        1440,
    ]
    with pytest.raises(UserError, match=r"^--adapt off : "):
        parse_adapt("off ")


def test_steps_are_the_minutes_over_a_steps_seconds() -> None:
    for seconds in (0.4, 0.5, 1.1):
        assert steps_within("off", seconds, MANY) == 0
        # Two minutes give twice the steps of one minute, which auto has.
        assert steps_within(2.0, seconds, MANY) == int(120 / seconds)
        assert steps_within("auto", seconds, MANY) == steps_within(1.0, seconds, MANY) == int(60 / seconds)
        assert steps_within(2.0, seconds, MANY) == pytest.approx(2 * steps_within("auto", seconds, MANY), abs=2)


def test_more_than_three_hundred_steps_only_if_asked_for_and_fewer_than_twenty_never() -> None:
    assert steps_within("auto", 0.01, MANY) == 300 and steps_within(1.0, 0.01, MANY) == 6000
    assert steps_within("auto", 3.0, MANY) == steps_within(1.0, 3.0, MANY) == 20
    assert steps_within("auto", 3.1, MANY) == steps_within(1.0, 3.1, MANY) == 0
    assert steps_within(1e-9, 0.04, MANY) == 0
    for seconds in (0.1, 4.6, 12.1, 300.0):
        assert steps_within(float(least_minutes(seconds)), seconds, MANY) >= 20


def test_a_panels_batches_are_learnt_from_fifteen_times_at_most_whatever_was_asked_for() -> None:
    for how in ("auto", 1.0, 1440.0):
        assert [steps_within(how, 0.01, batches) for batches in (0, 1, 2, 10)] == [0, 0, 30, 150]
        assert steps_within(how, 3.0, 2) == (30 if how == 1440.0 else 20)


def test_a_step_takes_longer_with_every_size_and_the_network_adds_to_it() -> None:
    model = ModelConfig(dims=32, layers=1, heads=2)
    seconds = SIZE.seconds(model, "cpu")
    assert 0.1 < SIZE.seconds(None, "cpu") < seconds < 1
    for name in ("rows", "haplotypes", "typed", "neighbours", "core"):
        longer = StepSize(**{**vars(SIZE), name: 2 * getattr(SIZE, name)})
        assert seconds < longer.seconds(model, "cpu") < 2 * seconds
    for wider in (ModelConfig(dims=64, layers=1, heads=2), ModelConfig(dims=32, layers=4, heads=2)):
        assert SIZE.seconds(wider, "cpu") > seconds
    assert SIZE.seconds(model, "cuda") < seconds / 10
