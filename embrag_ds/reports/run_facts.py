"""What a run folder holds, read for its report: also of a run that is under way, has failed, or was killed."""

from __future__ import annotations

import json
import logging
import os
import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from embrag_ds.runs.folder import CHECKPOINTS, OUTCOME
from embrag_ds.runs.record import CONFIG, METRICS, PROFILE, RUN_LOG, VERSIONS, Metrics, whole_metrics

logger = logging.getLogger(__name__)

EVALUATION = "evaluation.json"
"""Where ``embrag evaluate --json`` may have put the scores of the run's model."""
_FILES = (METRICS, OUTCOME, CONFIG, VERSIONS, PROFILE, RUN_LOG, EVALUATION)
_LAST_LINES = 30
_MOST_COMPLAINTS = 20
_COMPLAINT = re.compile(r"\S+ \S+ (WARNING|ERROR|CRITICAL) ")
_Content = TypeVar("_Content")


@dataclass(frozen=True)
class Log:
    """A run's log: its last lines, the first warnings and errors, and how many of these there are."""

    last: list[str]
    complaints: list[str]
    complained: int


@dataclass
class RunFacts:
    """Files of a run folder; None for one that is absent or, in ``unreadable`` with the reason, cannot be read.

    ``profiles`` are those of all ranks, by file.
    """

    folder: Path
    metrics: Metrics | None = None
    outcome: dict[str, Any] | None = None
    config: dict[str, Any] | None = None
    versions: dict[str, Any] | None = None
    evaluation: dict[str, Any] | None = None
    log: Log | None = None
    profiles: dict[str, dict[str, Any]] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)

    def lines(self, kind: str) -> list[dict[str, Any]]:
        """Lines of ``metrics.jsonl`` of a kind that count, by step."""
        held = [] if self.metrics is None else self.metrics.held
        return sorted((line for line in held if line["kind"] == kind), key=lambda line: line["step"])

    def setting(self, path: str) -> Any:
        """A setting by its dotted path, None where ``config.json`` has none."""
        value: Any = self.config
        for name in path.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        return value


def is_run_folder(folder: Path) -> bool:
    """Whether a folder holds a run, or what is left of one."""
    return any(os.path.lexists(folder / name) for name in (METRICS, OUTCOME, CONFIG, CHECKPOINTS))


def files_of(folder: Path) -> list[Path]:
    """The files of a run folder that :func:`read_run` reads, as far as they are there."""
    return [path for name in _FILES if (path := folder / name).is_file()] + _other_profiles(folder)


def read_run(folder: Path) -> RunFacts:
    """Read a run folder. What cannot be read is left out, with a warning, and listed."""
    facts = RunFacts(folder)

    def read(name: str, how: Callable[[Path], _Content]) -> _Content | None:
        path = folder / name
        if not os.path.lexists(path):
            return None
        try:
            return how(path)
        except (OSError, ValueError) as fault:
            reason = getattr(fault, "strerror", None) or str(fault)
            facts.unreadable[name] = reason
            logger.warning("%s: cannot be read (%s); the report goes without it", path, reason)
            return None

    facts.metrics = read(METRICS, whole_metrics)
    facts.outcome = read(OUTCOME, _record)
    facts.config = read(CONFIG, _record)
    facts.versions = read(VERSIONS, _record)
    facts.evaluation = read(EVALUATION, _record)
    facts.log = read(RUN_LOG, _log)
    for path in [folder / PROFILE, *_other_profiles(folder)]:
        if (found := read(path.name, _record)) is not None:
            facts.profiles[path.name] = found
    return facts


def _other_profiles(folder: Path) -> list[Path]:
    found = {path: re.fullmatch(r"profile-rank(\d+)\.json", path.name) for path in folder.glob("profile-rank*.json")}
    return [path for _, path in sorted((int(match.group(1)), path) for path, match in found.items() if match)]


def _record(path: Path) -> dict[str, Any]:
    """A JSON object; raises ValueError for anything else, such as a file that is cut off."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as fault:
        raise ValueError("it is nested too deeply") from fault
    if not isinstance(found, dict):
        raise ValueError("it is no JSON object")
    return found


def _log(path: Path) -> Log:
    last: deque[str] = deque(maxlen=_LAST_LINES)
    complaints: list[str] = []
    complained = 0
    with path.open(encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            line = line.rstrip("\n")
            last.append(line)
            if _COMPLAINT.match(line):
                complained += 1
                if len(complaints) < _MOST_COMPLAINTS:
                    complaints.append(line)
    return Log(list(last), complaints, complained)
