"""The command ``embrag evaluate``."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path

from embrag_ds.cli.command import show
from embrag_ds.cli.panel_options import add_reading, reading
from embrag_ds.errors import UserError
from embrag_ds.files import require_writable, write_json, write_text
from embrag_ds.preflight import require_distinct, require_folder, require_readable

DESCRIPTION = "Score imputed VCF or BCF files against the truth, at untyped sites, by minor-allele frequency and count."
USAGE = "--truth VCF --panel VCF --target VCF --imputed [NAME=]FILE"
EXAMPLES = """\
  embrag evaluate --truth TRUTH.vcf.gz --panel PANEL.vcf.gz --target TARGET.vcf.gz --imputed ours=IMPUTED.vcf.gz
      one imputed file
  embrag evaluate --truth TRUTH.vcf.gz --panel PANEL.vcf.gz --target TARGET.vcf.gz --imputed ours=IMPUTED.vcf.gz \\
      --run-tools WORK --map MAP --baselines --samples SAMPLES.tsv --plots PLOTS --json OUT.json
      beside Beagle, minimac4 and Selphi (where installed) and two cheap methods, by population, with plots
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    files = parser.add_argument_group("files (default: the simulated default data)")
    files.add_argument("--truth", type=Path, metavar="VCF", help="the same samples at all sites")
    files.add_argument("--panel", type=Path, metavar="VCF", help="reference panel; decides the minor allele")
    files.add_argument("--target", type=Path, metavar="VCF", help="the typed sites, which are not scored")
    files.add_argument("--imputed", action="append", default=[], metavar="[NAME=]FILE", help="may be repeated")
    files.add_argument(
        "--samples", type=Path, metavar="TSV", help="sample and population; adds scores by population to --details"
    )
    files.add_argument("--cache-dir", type=Path, metavar="DIR", help="packed panels and scratch (~/.cache/embrag_ds)")
    add_reading(files)
    others = parser.add_argument_group("methods to compare with")
    others.add_argument("--baselines", action="store_true", help="add two cheap methods")
    others.add_argument(
        "--run-tools",
        type=Path,
        metavar="DIR",
        help="impute with Beagle, minimac4 and Selphi, where installed, into DIR, and add them",
    )
    others.add_argument("--map", type=Path, metavar="MAP", help="genetic map for these tools; Selphi needs one")
    others.add_argument("--threads", type=int, metavar="N", default=os.cpu_count(), help="of these tools")
    intervals = parser.add_argument_group("intervals")
    intervals.add_argument(
        "--bootstrap",
        type=int,
        metavar="N",
        default=200,
        help="draws of the samples, with replacement, for the 95 %% intervals (200)",
    )
    intervals.add_argument("--seed", type=int, metavar="N", default=0, help="of the bootstrap")
    output = parser.add_argument_group("output (the first tables always go to stdout)")
    output.add_argument(
        "--details",
        action="store_true",
        help="print all tables: also by allele count, intervals, called carriers, DR2 and populations",
    )
    output.add_argument("--json", type=Path, metavar="OUT", help="write every number here")
    output.add_argument("--markdown", type=Path, metavar="OUT", help="write all tables here")
    output.add_argument("--excluded", type=Path, metavar="TSV", help="write the sites left out here, with the reason")
    output.add_argument("--plots", type=Path, metavar="DIR", help="write r2.png and calibration.png here")


def named(imputed: list[str]) -> dict[str, str | Path]:
    """Imputed files {name: path} of the options ``[NAME=]FILE``; without a name, the path is the name.

    Raises :class:`UserError` for a repeated name.
    """
    files: dict[str, str | Path] = {}
    for each in imputed:
        name, equals, path = each.partition("=")
        if not equals or Path(each).exists():
            name, path = each, each
        if not name or not path:
            raise UserError(f"--imputed {each}: it lacks a name or a file; give NAME=FILE or FILE")
        if name in files:
            raise UserError(f"{path}: the name {name!r} is given twice; choose another with NAME=FILE")
        files[name] = path
    return files


def _check_for_tools(options: argparse.Namespace, panel: Path, target: Path, cache: Path) -> None:
    """Raise :class:`UserError` for files that other tools, which get them as they are, would not read."""
    from embrag_ds.data.panel import open_panel

    for pipe in (panel, target):
        if pipe.is_fifo():
            raise UserError(f"{pipe}: --run-tools has it read more than once, and this is a pipe; give a file")
    if options.panel_missing != "error":
        raise UserError(
            "--run-tools gives the panel to the tools as it is, without --panel-missing; leave out one of them, or "
            "give a panel without missing and unphased calls"
        )
    open_panel(panel, cache, reading=reading(options))  # Beagle does not end where a call of the panel is missing


def run(options: argparse.Namespace) -> None:
    """Run the command with parsed options; raises :class:`UserError`."""
    from embrag_ds.data.cache import require_cache
    from embrag_ds.data.inputs import cache_directory, default_data, settings_for
    from embrag_ds.evaluation.external_tools import able, impute_with_tools, not_run, tool_files
    from embrag_ds.evaluation.score import evaluate

    if options.plots:
        from embrag_ds.evaluation.plots import plot_files, plot_report

    for name, least, most in (("bootstrap", 0, 1_000_000), ("threads", 1, 100_000)):
        value = getattr(options, name)
        if value is not None and not least <= value <= most:
            raise UserError(f"--{name} must lie between {least} and {most}")
    settings = settings_for(options.cache_dir)
    cache = cache_directory(settings)
    given = [options.truth, options.panel, options.target]
    if not any(given):
        default = default_data(settings)
        given = [default.truth, default.panel, default.target]
        options.samples = options.samples or default.samples
        options.map = options.map or default.genetic_map
    if not all(given):
        lacking = [f"--{name}" for name, path in zip(("truth", "panel", "target"), given, strict=True) if not path]
        raise UserError(
            f"--truth, --panel and --target go together: add {' and '.join(lacking)}, or give none of them for the "
            "simulated data"
        )
    for result in filter(None, (options.json, options.markdown, options.excluded)):
        require_writable(result)
    truth, panel, target = given
    imputed = named(options.imputed)
    read: dict[str, Path | list[Path] | None] = {
        "--truth": truth,
        "--panel": panel,
        "--target": target,
        "--map": options.map,
        "--samples": options.samples,
        "--imputed": [Path(path) for path in imputed.values()],
    }
    made = {
        "--json": options.json,
        "--markdown": options.markdown,
        "--excluded": options.excluded,
        "--plots": options.plots and plot_files(options.plots),
        "--run-tools": options.run_tools and tool_files(options.run_tools),
    }
    require_distinct(made, read)
    for folder in filter(None, (options.plots, options.run_tools)):
        require_folder(folder)
    if imputed or options.baselines or options.run_tools:
        require_readable(read)
        require_cache(cache)
    tools_not_run: dict[str, str] = {}
    if options.run_tools:
        for name in able(options.map):
            if name in imputed:
                raise UserError(f"{imputed[name]}: the name {name!r} belongs to a tool that is run; choose another")
        _check_for_tools(options, panel, target, cache)
        made_by_tools, failed = impute_with_tools(panel, target, options.map, options.run_tools, options.threads)
        tools_not_run = not_run(options.map) | failed
        if not made_by_tools and not imputed and not options.baselines:
            raise UserError(f"--run-tools: no tool imputed: {'; '.join(failed.values())}")
        imputed |= made_by_tools
    report = evaluate(
        truth,
        imputed,
        panel,
        target,
        options.baselines,
        options.samples,
        options.bootstrap,
        options.seed,
        cache,
        reading=reading(options),
        excluded=options.excluded,
    )
    report = replace(report, tools_not_run=tools_not_run)
    show(report.table() if options.details else report.summary())
    if options.json:
        write_json(options.json, report.to_json())
    if options.markdown:
        write_text(options.markdown, report.markdown())
    if options.plots:
        plot_report(report, options.plots)
