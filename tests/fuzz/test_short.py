"""A short run of the fuzzer, and its own parts: an input that should fail does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.fuzz import mutate, oracle, runner, seeds
from tests.fuzz.inputs import KINDS, Kind, files_of
from tests.fuzz.runner import Fuzzer, Result, Tally

INPUTS = 600
"""Over all parsers; imputation is left out, because it compiles for seconds."""


@pytest.fixture(scope="module")
def fuzzer() -> Iterator[Fuzzer]:
    with runner.fuzzer() as made:
        yield made


@pytest.mark.parametrize("name", [name for name in KINDS if name != "impute"])
def test_mutated_inputs_hold(fuzzer: Fuzzer, name: str) -> None:
    count = runner.numbers(INPUTS, KINDS)[name]
    results = [fuzzer.run(KINDS[name], number) for number in range(count)]
    assert runner.summary(results) == ""
    if KINDS[name].oracle:
        assert any(each.compared == "same" for each in results)


@pytest.mark.parametrize("name", list(KINDS))
def test_an_input_is_a_function_of_its_number(name: str) -> None:
    made = [files_of(KINDS[name], number) for number in (7, 7, 8)]
    assert made[0] == made[1] and len({str(each) for each in made}) == 2


@pytest.mark.parametrize("name", list(KINDS))
def test_inputs_differ_from_one_another(name: str) -> None:
    assert len({str(files_of(KINDS[name], number)) for number in range(20)}) > 10


@pytest.mark.parametrize(
    ("reader", "files", "outcome"),
    [
        ("variants", {"in.vcf": seeds.VARIANTS[0]}, "read"),
        ("variants", {"in.vcf": seeds.VARIANTS[0][:-2]}, "refused"),
        ("variants", {"in.bcf": mutate.bgzf(seeds.bcfs()[1])}, "read"),
        ("imputed", {"in.vcf": seeds.IMPUTED[0]}, "read"),
        ("truth", {"in.vcf": seeds.TRUTHS[0]}, "read"),
        ("samples", {"samples.tsv": seeds.SAMPLES[0]}, "read"),
        ("windows", {"windows": b"1 1 x\n"}, "refused"),
    ],
)
def test_seeds_are_read(fuzzer: Fuzzer, reader: str, files: dict[str, bytes], outcome: str) -> None:
    (name,) = files
    kind = Kind("kind", lambda rng: files, 1, reader, name if name.startswith("in.") else None)
    result = run(fuzzer, kind)
    assert result.outcome == outcome, result
    assert outcome == "refused" or not kind.oracle or result.compared == "same"


def run(fuzzer: Fuzzer, kind: Kind) -> Result:
    """Run the one input of a kind that is made for a test."""
    KINDS[kind.name] = kind
    try:
        return fuzzer.run(kind, 0)
    finally:
        del KINDS[kind.name]


@pytest.mark.parametrize(
    ("reader", "outcome"), [("_die", "crash"), ("_sleep", "hang"), ("_fail", "traceback"), ("_take", "memory")]
)
def test_findings_are_found(fuzzer: Fuzzer, reader: str, outcome: str) -> None:
    kind = Kind("kind", lambda rng: {"file": b""}, 1, reader, seconds=1.0 if outcome == "hang" else 60.0)
    result = run(fuzzer, kind)
    assert result.is_finding and result.outcome == outcome
    # The process that died or was killed is started again.
    assert run(fuzzer, Kind("kind", lambda rng: {"samples.tsv": seeds.SAMPLES[0]}, 1, "samples")).outcome == "read"


@pytest.mark.parametrize(
    ("message", "is_good"),
    [
        ("/a/in.vcf: 1:5: REF is 'x'; give bases", True),
        ("--set x: write it as dotted.key=value", True),
        ("/a/in.vcf: 1:5:\nREF", False),
        ("REF is 'x': give bases", False),
        ("/a/in.vcf: " + "x" * 10_000, False),
    ],
)
def test_a_good_error_is_one_line_that_names_something(message: str, is_good: bool) -> None:
    assert runner._is_good_error(message) is is_good


def test_a_record_less_and_another_call_are_misread() -> None:
    found = {"records": 1, "events": [["site", "1", 5, ".", "A", "C", ["0|1"], ""]]}
    theirs: dict[str, Any] = {"records": [["1", "5", ".", "A", "C", ".", ["0|1"]]], "split": 1}
    assert runner._site_difference(found, theirs) == ""
    assert "calls" in runner._site_difference(found, {**theirs, "records": [["1", "5", ".", "A", "C", ".", ["1|1"]]]})
    assert "records" in runner._site_difference(found, {**theirs, "records": theirs["records"] * 2})
    assert "norm" in runner._site_difference(found, {**theirs, "split": 2})


def test_the_oracle_splits_calls() -> None:
    assert oracle.site_calls(["1|2", "0/2", ".|1", "2", ".", "|1|0", "1/2"], 2) == [
        "0|1", "0/1", ".|0", "1", ".", "0|0", "0/1",
    ]  # fmt: skip


def test_bgzip_without_pysam() -> None:
    rng = np.random.default_rng(0)
    content = rng.bytes(200_000)
    blocks = mutate.blocks_of(mutate.bgzf(content, 700))
    assert b"".join(blocks) == mutate.bgzf(content, 700) and blocks[-1] == mutate.BGZF_EOF and len(blocks) == 287


def test_tables_count_results() -> None:
    results = [
        Result("vcf", 0, "read", compared="same", seconds=0.5, peak=2_000_000),
        Result("vcf", 1, "refused", "/dev/shm/embrag-fuzz-a/vcf-1/in.vcf: 1:5: REF is 'x'; give bases", "read"),
        Result("vcf", 2, "traceback", "ValueError at variants/records.py:3: x"),
    ]
    tally = Tally("vcf", results)
    assert tally.row() == ["vcf", "3", "1", "1", "0", "1", "1", "0.50", "2"]
    assert runner.table([tally]).count("\n") == 4
    assert "| 1 | read | FILE: RECORD: REF is '...'; give bases |" in runner.refusals([tally])
    assert runner.summary(results) == "1 x vcf: traceback: ValueError at variants/records.py:N: x (number 2)\n"
