"""The command ``embrag report``."""

from __future__ import annotations

import argparse
import logging
import os
import time
from pathlib import Path

from embrag_ds.errors import UserError
from embrag_ds.files import require_writable, source_of
from embrag_ds.preflight import require_distinct, require_readable

DESCRIPTION = "Write a page (one HTML file) about a training run or an imputed file."
USAGE = "INPUT"
EXAMPLES = """\
  embrag report runs/mine
      runs/mine/report.html: curves, memory, settings and the end of a run, which may still be under way
  embrag report IMPUTED.vcf.gz --impute-report REPORT.json --excluded EXCLUDED.tsv --out IMPUTED.html
      estimated r2, typed sites, samples, and what the imputation left out
"""
_RUN_REPORT = "report.html"
_SUFFIXES = (".vcf.gz", ".vcf.bgz", ".vcf", ".bcf")

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    files = parser.add_argument_group("files")
    files.add_argument(
        "input", type=Path, metavar="INPUT", help="run folder of embrag train, or an imputed VCF or BCF of any program"
    )
    files.add_argument(
        "--out", type=Path, metavar="HTML", help="the page (INPUT/report.html, or IMPUTED.report.html beside the file)"
    )
    imputation = parser.add_argument_group("of an imputed file")
    imputation.add_argument("--impute-report", type=Path, metavar="JSON", help="what embrag impute --report wrote")
    imputation.add_argument("--excluded", type=Path, metavar="TSV", help="what embrag impute --excluded wrote")


def run(options: argparse.Namespace) -> None:
    """Run the command with parsed options; raises :class:`UserError`."""
    began = time.monotonic()
    if os.path.isdir(options.input):
        out = options.out or options.input / _RUN_REPORT
        _of_run(options, out)
    else:
        out = options.out or _beside(options.input)
        _of_imputed(options, out)
    logger.info("report written to %s in %.1f s", out, time.monotonic() - began)


def _beside(path: Path) -> Path:
    """The page's name for an imputed file; raises :class:`UserError` for one that is not on a disk."""
    source = source_of(path)
    if path == Path("-") or (os.path.exists(source) and not os.path.isfile(source)):
        raise UserError(f"{path}: a report has no place beside a pipe; name one with --out")
    suffix = next((each for each in _SUFFIXES if path.name.endswith(each)), "")
    return path.with_name(f"{path.name.removesuffix(suffix)}.report.html")


def _of_run(options: argparse.Namespace, out: Path) -> None:
    from embrag_ds.reports.page import write_page
    from embrag_ds.reports.run_facts import files_of, is_run_folder, read_run
    from embrag_ds.reports.run_page import run_numbers, run_page

    folder = options.input
    for option, value in (("--impute-report", options.impute_report), ("--excluded", options.excluded)):
        if value is not None:
            raise UserError(f"{option} is of an imputed file, and {folder} is a folder; leave it out, or name the file")
    if not is_run_folder(folder):
        raise UserError(
            f"{folder}: it is no run folder, which has a metrics.jsonl, outcome.json, config.json or checkpoints; give "
            "the --run-dir of embrag train, or an imputed file"
        )
    _require_place(out, {"INPUT": files_of(folder)})
    facts = read_run(folder)
    write_page(out, run_page(facts), run_numbers(facts))


def _of_imputed(options: argparse.Namespace, out: Path) -> None:
    from embrag_ds.reports.imputed_facts import read_imputed
    from embrag_ds.reports.imputed_page import imputed_numbers, imputed_page
    from embrag_ds.reports.left_out_part import read_excluded, read_impute_report, require_same_samples
    from embrag_ds.reports.page import write_page

    read = {"INPUT": options.input, "--impute-report": options.impute_report, "--excluded": options.excluded}
    require_readable(read)
    _require_place(out, read)
    report = None if options.impute_report is None else read_impute_report(options.impute_report)
    excluded = None if options.excluded is None else read_excluded(options.excluded)
    facts = read_imputed(options.input)
    if report is not None:
        require_same_samples(report, (each.name for each in facts.samples), options.impute_report, options.input)
    write_page(out, imputed_page(facts, report, excluded), imputed_numbers(facts, report, excluded))


def _require_place(out: Path, read: dict[str, Path | list[Path] | None]) -> None:
    from embrag_ds.reports.page import require_replaceable

    require_distinct({"--out": out}, read)
    require_writable(out)
    if require_replaceable(out):
        logger.info("%s: an older report is there, and is replaced by this one when it is whole", out)
