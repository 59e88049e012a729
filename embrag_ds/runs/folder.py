"""The run folder: which one a run takes, the lock that keeps others out, and the file that says how it ended."""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
import time
from pathlib import Path
from typing import Any

from embrag_ds.errors import UserError
from embrag_ds.files import make_folder, unused, write_json, written_over
from embrag_ds.runs.record import METRICS

CHECKPOINTS, OUTCOME = "checkpoints", "outcome.json"
"""Names of the folder of checkpoints, and of the file that says whether a run is to be started again."""
_LOCK = ".lock"
_LONGEST_REASON = 500  # with what stands beside it less than any disk's block


def choose(given: Path | None, stem: str, resume: bool, parent: Path = Path("runs")) -> Path:
    """The folder of a run: the one ``given``, the newest one of the configuration ``stem`` to resume, or a new one.

    Those to resume are the folders that are named by configuration and time, as new ones are.

    Raises :class:`UserError` where nothing can be resumed, and where a new run would fill a folder that holds one.
    """
    if given is None and resume:
        return _newest(stem, parent)
    folder = given or unused(parent / f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}")
    if not resume and (held := _held(folder)):
        raise UserError(f"{folder}: holds a run already ({held}); add --resume, or choose another --run-dir")
    return folder


def _newest(stem: str, parent: Path) -> Path:
    """The newest run of the configuration ``stem`` that has a checkpoint, of those that were not given a name."""
    # The name of another configuration may begin with this one's. A number follows where two began in one second.
    named = re.compile(re.escape(stem) + r"-(\d{8}-\d{6})(?:-(\d+))?")
    found = []
    for checkpoints in parent.glob(f"*/{CHECKPOINTS}"):
        if made := named.fullmatch(checkpoints.parent.name):
            found.append((made[1], int(made[2] or 1), checkpoints.parent))
    if not found:
        raise UserError(f"--resume: no run of {stem} with a checkpoint under {parent}/; name one with --run-dir")
    return max(found)[2]


def never_saved(folder: Path) -> bool:
    """Whether a run was begun in ``folder`` that has ended before its first checkpoint."""
    return _held(folder) is not None and not any((folder / CHECKPOINTS).glob("step*"))


def _held(folder: Path) -> str | None:
    """File of a run in a folder, or None."""
    return next((name for name in (METRICS, CHECKPOINTS, OUTCOME) if os.path.lexists(folder / name)), None)


class RunLock:
    """Lock of a run folder, held by one process (rank 0) until it ends, however it ends.

    Raises :class:`UserError` if another process of any machine that shares the folder holds it.
    """

    def __init__(self, folder: Path):
        make_folder(folder)
        path = folder / _LOCK
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as fault:
            raise UserError(f"{folder}: cannot write in this folder ({fault.strerror}); choose another") from fault
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as fault:
            holder = os.pread(self._descriptor, 200, 0).decode(errors="replace").strip() or "another process"
            os.close(self._descriptor)
            raise UserError(
                f"{folder}: {holder} is training in this folder; wait for its end, or choose another --run-dir"
            ) from fault
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)

    def release(self) -> None:
        """Let others in."""
        os.close(self._descriptor)


def leave_no_trace(folder: Path) -> None:
    """Remove the folder of a run that has failed before it began, if nothing but the lock and the outcome is in it."""
    if not os.path.isdir(folder) or {path.name for path in folder.iterdir()} - {_LOCK, OUTCOME}:
        return
    for name in (_LOCK, OUTCOME):
        (folder / name).unlink(missing_ok=True)
    folder.rmdir()


def write_outcome(folder: Path, state: str, restart: bool, reason: str, step: int) -> None:
    """Write ``outcome.json``: what state the run is in, and whether to start it again with ``--resume``.

    Launchers do not pass on exit statuses, so a script that starts runs reads this file. ``step`` is that of the newest
    checkpoint. On a full disk the file is written over, which takes no space.
    """
    values: dict[str, Any] = {"state": state, "restart": restart, "reason": reason, "step": step, "time": time.time()}
    path = folder / OUTCOME
    try:
        write_json(path, values)
    except UserError:
        values["reason"] = reason[:_LONGEST_REASON]
        if not written_over(path, json.dumps(values).encode()):
            raise


def read_outcome(folder: Path) -> dict[str, Any]:
    """Content of ``outcome.json``; empty where there is none."""
    try:
        found = json.loads((folder / OUTCOME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
