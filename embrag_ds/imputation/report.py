"""Report of what was read and harmonised: a table for the log, JSON, and the table of the sites left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from embrag_ds.data.left_out import left_out_table
from embrag_ds.data.panel import Panel
from embrag_ds.data.targets import Targets
from embrag_ds.variants.harmonise import LEAST_ODDS, MOST_MINOR, Harmonised, Strand


def describe(panel: Panel, target: Panel, match: Harmonised, strand: Strand) -> dict[str, Any]:
    """Numbers of both files and of their harmonisation, for JSON."""
    return {
        "panel": _file(panel),
        "target": _file(target),
        "harmonisation": {
            "strand": strand,
            **match.numbers(),
            "palindromic_rule": {"likelihood_ratio": LEAST_ODDS, "greatest_minor_allele_frequency": MOST_MINOR},
        },
    }


def _file(panel: Panel) -> dict[str, Any]:
    return {
        "file": str(panel.path),
        "samples": len(panel.samples),
        "records": panel.records,
        "sites": len(panel.sites),
        "monomorphic_sites": int(panel.monomorphic.sum()),
        "left_out": panel.skipped,
        "filled_with_major_allele": panel.filled,
        "haploid_samples": 0 if panel.ploidy is None else int(panel.ploidy.haploid.any(axis=0).sum()),
    }


def describe_targets(targets: Targets, samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Numbers of the targets at the panel's sites, and each of the ``samples``, for JSON."""
    return {
        "typed_sites": len(targets.sites),
        "phased_by": None
        if targets.phased is None
        else {"version": targets.phased.version, "command": targets.phased.command},
        "samples": samples,
    }


def table(report: dict[str, Any]) -> str:
    """The report of :func:`describe` as lines of text."""
    rows: list[tuple[str, object]] = []
    for what in ("panel", "target"):
        each = report[what]
        rows += [(f"{what}: records", each["records"]), (f"{what}: sites", each["sites"])]
        rows.append((f"{what}: monomorphic sites", each["monomorphic_sites"]))
        rows += [(f"{what}: left out, {reason}", count) for reason, count in each["left_out"].items()]
        if each["filled_with_major_allele"]:
            rows.append((f"{what}: sites with the major allele for missing calls", each["filled_with_major_allele"]))
        if each["haploid_samples"]:
            rows.append((f"{what}: samples with haploid calls", each["haploid_samples"]))
    both = report["harmonisation"]
    rows += [(f"matched, {relation}", count) for relation, count in both["matched_by_relation"].items()]
    rows.append(("of these palindromic", both["matched_palindromic"]))
    rows += [(f"dropped, {reason}", count) for reason, count in both["dropped"].items()]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {count}" for name, count in rows)


def write_left_out(path: Path | None, panel: Panel, target: Panel, match: Harmonised) -> None:
    """Write the table of the sites of both files that were left out, unless ``path`` is None."""
    with left_out_table(path) as table:
        table.add_packed("panel", panel)
        table.add_packed("target", target)
        table.add_dropped("target", match, target.sites)
