"""Score imputed VCF or BCF files against the truth, by minor-allele frequency in the panel.

    python launch/evaluate.py --truth truth.vcf.gz --panel panel.vcf.gz --target target.vcf.gz \\
        --imputed ours=ours.vcf.gz --imputed beagle=beagle.vcf.gz --baselines --samples samples.tsv
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

# Run as a script from a checkout, the package is beside this folder.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from embrag_ds.engine.evaluation import evaluate
from embrag_ds.errors import UserError


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Score imputed files against the truth at untyped sites.")
    parser.add_argument("--truth", required=True, help="VCF/BCF of the same people at all sites")
    parser.add_argument(
        "--panel", required=True, help="phased reference panel; decides the minor allele and the bins"
    )
    parser.add_argument("--target", required=True, help="the typed sites, which are not scored")
    parser.add_argument(
        "--imputed", action="append", default=[], metavar="[NAME=]FILE", help="may be repeated"
    )
    parser.add_argument("--baselines", action="store_true", help="add two cheap methods")
    parser.add_argument("--samples", help="tab-separated: sample, population; adds scores by population")
    parser.add_argument(
        "--bootstrap", type=int, default=200, help="resamples of people for the 95 %% intervals"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write every number here")
    parser.add_argument("--markdown", type=Path, metavar="OUT", help="write the tables here")
    return parser.parse_args(arguments)


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


def run(options: argparse.Namespace) -> None:
    files = (options.truth, named(options.imputed), options.panel, options.target)
    report = evaluate(*files, options.baselines, options.samples, options.bootstrap, options.seed)
    print(report.table(), end="")
    if options.json:
        options.json.write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
    if options.markdown:
        options.markdown.write_text(report.markdown(), encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        run(parse(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
