"""Log lines: on the terminal, in the run's log, and by rank."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from embrag_ds import logs

LOGGER = logging.getLogger("embrag_ds.somewhere")


@pytest.mark.parametrize(
    ("rank", "verbose", "expected"),
    [
        ("0", False, ["a remark", "warning: careful"]),
        ("0", True, ["a detail", "a remark", "warning: careful"]),
        ("3", True, ["rank 3: warning: careful"]),
    ],
)
def test_rank_0_logs_everything_and_other_ranks_only_warnings(
    rank: str, verbose: bool, expected: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", rank)
    with logs.on_terminal(verbose):
        LOGGER.debug("a detail")
        LOGGER.info("a remark")
        LOGGER.warning("careful")
    LOGGER.info("too late")
    streams = capsys.readouterr()
    assert streams.err.splitlines() == expected and streams.out == ""


def test_a_run_log_has_the_records_from_before_it_had_a_file(tmp_path: Path) -> None:
    path = tmp_path / "run" / "run.log"
    with logs.kept_for_run() as run_log:
        LOGGER.debug("before")
        assert not path.parent.exists()
        run_log.write_to(path)
        LOGGER.info("after")
        lines = path.read_text().splitlines()
        assert [line.split("embrag_ds.somewhere: ")[1] for line in lines] == ["before", "after"]
    LOGGER.warning("too late")
    assert path.read_text().splitlines() == lines


def test_names_of_no_encoding_are_logged_with_escapes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging, "raiseExceptions", True)  # a handler that fails prints a traceback
    with logs.on_terminal(), logs.kept_for_run() as run_log:
        run_log.write_to(tmp_path / "run.log")
        LOGGER.warning("sample %s, population S\u00e9n\u00e9gal", "caf\udce9")
    logged = (tmp_path / "run.log").read_text(encoding="utf-8")
    assert logged.endswith("sample caf\\udce9, population S\u00e9n\u00e9gal\n")
    assert "Traceback" not in capsys.readouterr().err


def test_a_run_log_without_a_file_leaves_none(tmp_path: Path) -> None:
    with logs.kept_for_run():
        LOGGER.info("lost")
    assert list(tmp_path.iterdir()) == []
