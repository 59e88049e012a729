"""The command ``embrag evaluate``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from embrag_ds.errors import UserError
from embrag_ds.files import require_writable, write_json, write_text

DESCRIPTION = "Score imputed VCF or BCF files against the truth, at untyped sites, by minor-allele frequency."
EXAMPLES = """\
  embrag evaluate --truth TRUTH.vcf.gz --panel PANEL.vcf.gz --target TARGET.vcf.gz --imputed ours=IMPUTED.vcf.gz
      one imputed file
  embrag evaluate --truth TRUTH.vcf.gz --panel PANEL.vcf.gz --target TARGET.vcf.gz --imputed ours=IMPUTED.vcf.gz \\
      --run-tools WORK --map MAP --baselines --samples SAMPLES.tsv --plots PLOTS --json OUT.json
      beside Beagle and minimac4 (where installed) and two cheap methods, by population, with plots
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    files = parser.add_argument_group("files (default: the simulated default data)")
    files.add_argument("--truth", type=Path, metavar="VCF", help="the same samples at all sites")
    files.add_argument("--panel", type=Path, metavar="VCF", help="reference panel; decides the minor allele")
    files.add_argument("--target", type=Path, metavar="VCF", help="the typed sites, which are not scored")
    files.add_argument("--imputed", action="append", default=[], metavar="[NAME=]FILE", help="may be repeated")
    files.add_argument("--samples", type=Path, metavar="TSV", help="sample and population; adds scores by population")
    others = parser.add_argument_group("methods to compare with")
    others.add_argument("--baselines", action="store_true", help="add two cheap methods")
    others.add_argument(
        "--run-tools",
        type=Path,
        metavar="DIR",
        help="impute with Beagle and minimac4, where installed, into DIR, and add them",
    )
    others.add_argument("--map", type=Path, help="genetic map for these tools")
    others.add_argument("--threads", type=int, default=os.cpu_count(), help="of these tools")
    intervals = parser.add_argument_group("intervals")
    intervals.add_argument(
        "--bootstrap",
        type=int,
        default=200,
        help="draws of the samples, with replacement, for the 95 %% intervals (200)",
    )
    intervals.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    output = parser.add_argument_group("output (the tables always go to stdout)")
    output.add_argument("--json", type=Path, metavar="OUT", help="write every number here")
    output.add_argument("--markdown", type=Path, metavar="OUT", help="write the tables here")
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
        if name in files:
            raise UserError(f"{path}: the name {name!r} is given twice; choose another with NAME=FILE")
        files[name] = path
    return files


def run(options: argparse.Namespace) -> None:
    """Run the command with parsed options; raises :class:`UserError`."""
    from embrag_ds.data.inputs import default_data
    from embrag_ds.data.windows import DataConfig
    from embrag_ds.evaluation.external_tools import impute_with_tools
    from embrag_ds.evaluation.plots import plot_report
    from embrag_ds.evaluation.score import evaluate

    given = [options.truth, options.panel, options.target]
    if not any(given):
        default = default_data(DataConfig())
        given = [default.truth, default.panel, default.target]
        options.samples = options.samples or default.samples
        options.map = options.map or default.genetic_map
    if not all(given):
        raise UserError("--truth, --panel and --target go together")
    for result in filter(None, (options.json, options.markdown)):
        require_writable(result)
    truth, panel, target = given
    imputed = named(options.imputed)
    if options.run_tools:
        for name, path in impute_with_tools(panel, target, options.map, options.run_tools, options.threads).items():
            if name in imputed:
                raise UserError(f"{imputed[name]}: the name {name!r} belongs to a tool that is run; choose another")
            imputed[name] = path
    report = evaluate(
        truth, imputed, panel, target, options.baselines, options.samples, options.bootstrap, options.seed
    )
    sys.stdout.write(report.table())
    if options.json:
        write_json(options.json, report.to_json())
    if options.markdown:
        write_text(options.markdown, report.markdown())
    if options.plots:
        plot_report(report, options.plots)
