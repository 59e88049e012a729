"""What an imputation left out, from the files of its ``--report`` and ``--excluded``."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embrag_ds.data.left_out import COLUMNS
from embrag_ds.errors import UserError
from embrag_ds.files import source_of
from embrag_ds.variants.header import as_text

_MOST_REASONS = 1000
_OTHER = "other reasons"


@dataclass(frozen=True)
class ImputeReport:
    """What the ``--report`` of an imputation says, added up over its panel files.

    ``left_out`` counts sites by file (``panel`` or ``target``) and reason, ``matched`` those of the targets by their
    relation to the panel's. ``call_rates`` are the targets' shares of called genotypes, {sample: share}, from the
    first panel file. ``adaptations`` are its sections of that name.
    """

    left_out: dict[tuple[str, str], int]
    matched: dict[str, int]
    typed_sites: int
    call_rates: dict[str, float]
    adaptations: list[dict[str, Any]]


def read_impute_report(path: Path) -> ImputeReport:
    """Read the JSON of ``embrag impute --report``; raises :class:`UserError` for anything else."""
    try:
        found = json.loads(source_of(path).read_text(encoding="utf-8"))
        return _added_up(found.get("files", [found]), found.get("targets", []))
    except OSError as fault:
        raise UserError(f"{path}: cannot read it ({fault.strerror}); check what --impute-report names") from fault
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as fault:
        raise UserError(
            f"{path}: it is no report of an imputation ({type(fault).__name__}: {fault}); give what embrag impute "
            "--report wrote"
        ) from fault


def require_same_samples(report: ImputeReport, samples: Iterable[str], path: Path, imputed: Path) -> None:
    """Raise :class:`UserError` unless the ``report`` at ``path`` names all ``samples`` of the file ``imputed``."""
    foreign = [each for each in samples if each not in report.call_rates]
    if foreign and report.call_rates:
        raise UserError(
            f"{path}: it lacks {len(foreign)} samples of {imputed}, the first is {foreign[0]}; give the --report of "
            "the same imputation"
        )


def _added_up(reports: list[dict[str, Any]], targets: list[dict[str, Any]]) -> ImputeReport:
    left_out: Counter[tuple[str, str]] = Counter()
    matched: Counter[str] = Counter()
    typed = 0
    for each in reports:
        for what in ("panel", "target"):
            left_out.update({(what, reason): int(count) for reason, count in each[what]["left_out"].items()})
        both = each["harmonisation"]
        left_out.update({("target", reason): int(count) for reason, count in both["dropped"].items()})
        matched.update({relation: int(count) for relation, count in both["matched_by_relation"].items()})
        typed += int(each["typed_sites"])
    for each in targets:
        if each["sites_without_panel"]:
            left_out["target", "no panel file has it"] += int(each["sites_without_panel"])
    samples = reports[0]["samples"] if reports else []
    return ImputeReport(
        dict(left_out),
        dict(matched),
        typed,
        {each["sample"]: float(each["call_rate"]) for each in samples},
        [dict(each["adaptation"]) for each in reports if "adaptation" in each],
    )


def read_excluded(path: Path) -> dict[tuple[str, str], int]:
    """Count the sites of ``embrag impute --excluded`` by file and reason, line by line.

    Raises :class:`UserError` for a file that is no such table.
    """
    counts: Counter[tuple[str, str]] = Counter()
    for what, reason in _excluded(path):
        key = (what, reason)
        counts[key if key in counts or len(counts) < _MOST_REASONS else (what, _OTHER)] += 1
    return dict(counts)


def _excluded(path: Path) -> Iterator[tuple[str, str]]:
    names = COLUMNS.rstrip("\n").split("\t")
    try:
        with source_of(path).open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                fields = as_text(line.rstrip(b"\r\n")).split("\t")
                if number == 1 and fields != names:
                    raise UserError(
                        f"{path}: its first line is not {' '.join(names)!r} with tabs between; give what embrag impute "
                        "--excluded wrote"
                    )
                if len(fields) != len(names):
                    raise UserError(
                        f"{path}: line {number} has {len(fields)} fields, not {len(names)}; write or copy it again"
                    )
                if number > 1:
                    yield fields[0], fields[-1]
    except OSError as fault:
        raise UserError(f"{path}: cannot read it ({fault.strerror}); check what --excluded names") from fault
