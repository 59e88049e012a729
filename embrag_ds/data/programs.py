"""Other programs, run with their output in a log file."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from embrag_ds.errors import UserError

_MOST_SHOWN = 200
_PYTHON = "Traceback (most recent call last):"
_FAILURE = re.compile(r"exception|\berror\b", re.IGNORECASE)


def run_logged(command: Sequence[str | Path], log: Path, folder: Path | None = None) -> None:
    """Run a command, in ``folder`` if given, with its output in ``log``; raises :class:`UserError` if it fails."""
    with log.open("wb") as out:
        code = subprocess.run(command, stdout=out, stderr=subprocess.STDOUT, check=False, cwd=folder).returncode
    check_ended_well(command, code, log)


def check_ended_well(command: Sequence[str | Path], code: int, log: Path) -> None:
    """Raise :class:`UserError` with the line of ``log`` that tells why, unless the exit status ``code`` is 0.

    That is the last line of a Python traceback. Otherwise it is the first line about an error or a Java exception,
    which a stack trace follows; else the last line.
    """
    if code:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        last = lines[-1] if lines else ""
        why = last if _PYTHON in lines else next((line for line in lines if _FAILURE.search(line)), last)
        printable = "".join(each if each.isprintable() else "?" for each in why.strip()[:_MOST_SHOWN])
        raise UserError(f"{command[0]} ended with {code} ({printable}); see {log}")
