"""Fixtures of the reports' tests: the command in this process, and what its page says."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from embrag_ds.cli.main import main
from tests.reports.pages import Parsed, parsed

Report = Callable[..., Parsed]
Refused = Callable[..., str]


@pytest.fixture(autouse=True)
def _same_signals() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def report(tmp_path: Path) -> Report:
    """Run ``embrag report`` and take its page apart."""

    def run(path: Path, *options: object) -> Parsed:
        out = tmp_path / "page.html"
        main(arguments=["report", str(path), f"--out={out}", *map(str, options)])
        return parsed(out)

    return run


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run ``embrag report``, which must end with status 2 and one line; returns the line."""

    def run(*arguments: object) -> str:
        logging.getLogger("embrag_ds").handlers.clear()
        with pytest.raises(SystemExit) as ended:
            main(arguments=["report", *map(str, arguments)])
        lines = capsys.readouterr().err.splitlines()
        assert ended.value.code == 2 and lines[-1].startswith("error: ") and "Traceback" not in "".join(lines)
        return lines[-1].removeprefix("error: ")

    return run
