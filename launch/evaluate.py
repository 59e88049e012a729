"""Score imputed VCF or BCF files against the truth, by minor-allele frequency in the panel.

    python launch/evaluate.py --truth truth.vcf.gz --panel panel.vcf.gz --target target.vcf.gz \\
        --imputed ours=ours.vcf.gz --imputed other=other.vcf.gz --baselines --samples samples.tsv \\
        --peers work --map map.txt --json scores.json --plots plots

Without truth, panel and target it scores against the embedded default data set.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from pathlib import Path

from embrag_ds.data.dataset import DataConfig
from embrag_ds.engine.evaluation import evaluate
from embrag_ds.engine.inputs import default_data
from embrag_ds.engine.peers import impute_with_peers
from embrag_ds.engine.plots import plot_report
from embrag_ds.errors import UserError
from embrag_ds.launching import run_main


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Score imputed files against the truth at untyped sites.")
    parser.add_argument("--truth", type=Path, help="VCF/BCF of the same people at all sites")
    parser.add_argument("--panel", type=Path, help="phased reference panel; decides the minor allele and the bins")
    parser.add_argument("--target", type=Path, help="the typed sites, which are not scored")
    parser.add_argument("--imputed", action="append", default=[], metavar="[NAME=]FILE", help="may be repeated")
    parser.add_argument("--baselines", action="store_true", help="add two cheap methods")
    parser.add_argument(
        "--peers",
        type=Path,
        metavar="DIR",
        help="impute with Beagle and minimac4, where installed, into DIR, and add them",
    )
    parser.add_argument("--map", type=Path, help="genetic map for the peers")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the peers")
    parser.add_argument("--samples", type=Path, help="tab-separated: sample, population; adds scores by population")
    parser.add_argument("--bootstrap", type=int, default=200, help="resamples of people for the 95 %% intervals")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write every number here")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="write r2.png and calibration.png here")
    parser.add_argument("--markdown", type=Path, metavar="OUT", help="write the tables here")
    return parser.parse_args()


def named(imputed: list[str]) -> dict[str, str]:
    """{name: file}; a file given without a name goes by its path."""
    files: dict[str, str] = {}
    for each in imputed:
        name, equals, path = each.partition("=")
        if not equals or Path(each).exists():
            name, path = each, each
        if name in files:
            raise UserError(f"{path}: the name {name!r} is given twice; choose another with NAME=FILE")
        files[name] = path
    return files


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    options = parse_arguments()
    given = [options.truth, options.panel, options.target]
    if not any(given):
        default = default_data(DataConfig())
        given = [default.truth, default.panel, default.target]
        options.samples = options.samples or default.samples
        options.map = options.map or default.genetic_map
    if not all(given):
        raise UserError("--truth, --panel and --target go together")
    truth, panel, target = given
    imputed: dict[str, str | Path] = {**named(options.imputed)}
    if options.peers:
        for name, path in impute_with_peers(panel, target, options.map, options.peers, options.threads).items():
            if name in imputed:
                raise UserError(f"{imputed[name]}: the name {name!r} belongs to a peer; choose another name")
            imputed[name] = path
    report = evaluate(
        truth, imputed, panel, target, options.baselines, options.samples, options.bootstrap, options.seed
    )
    print(report.table(), end="")
    if options.json:
        options.json.write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
    if options.markdown:
        options.markdown.write_text(report.markdown(), encoding="utf-8")
    if options.plots:
        plot_report(report, options.plots)


if __name__ == "__main__":
    run_main(main)
