"""Imputation of chromosome X with haploid males, beside Beagle and minimac4, in one run.

    python profiling/chr_x.py --variants shared/data/chrX_kgp26/chrX.kgp26.phased.vcf.gz --out DIR

26 samples of 1000 Genomes on X:2,700,000-30,000,000, where males are haploid: the targets are four males and two
females, and the panel the other 20 samples. Every fifth site of the panel is typed. The scores of all installed tools
are printed, and the files stay in ``--out``. Ours is the model of the package, without a genetic map, as for the
others.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

import pysam.bcftools

from embrag_ds.cli.command import run_command
from embrag_ds.data.inputs import PanelFiles
from embrag_ds.errors import UserError
from embrag_ds.evaluation.external_tools import impute_with_tools
from embrag_ds.evaluation.score import evaluate
from embrag_ds.files import make_folder
from embrag_ds.imputation.impute import impute

REGION = "X:2700000-30000000"
MALES = ("HG00096", "HG00103", "HG00109", "HG00116")
FEMALES = ("HG00097", "HG00110")
EVERY = 5

logger = logging.getLogger("embrag_ds.profiling.chr_x")


def split(variants: Path, folder: Path) -> dict[str, Path]:
    """Write panel, target and truth into ``folder``."""
    targets = ",".join((*MALES, *FEMALES))
    paths = {name: folder / f"{name}.vcf.gz" for name in ("panel", "truth", "target")}
    rest = folder / "rest.bcf"
    bcftools = pysam.bcftools
    bcftools.view("-r", REGION, "-s", f"^{targets}", "-Ob", "-o", str(rest), str(variants), catch_stdout=False)
    # In a second step, because `-c` counts the alleles before `-s` leaves samples out.
    bcftools.view("-c1:nonmajor", "-Oz", "-o", str(paths["panel"]), str(rest), catch_stdout=False)
    bcftools.view("-r", REGION, "-s", targets, "-Oz", "-o", str(paths["truth"]), str(variants), catch_stdout=False)
    sites = str(bcftools.query("-f", "%CHROM\\t%POS\\n", str(paths["panel"]))).splitlines()
    (folder / "typed.tsv").write_text("\n".join([*sites[::EVERY], ""]), encoding="utf-8")
    typed = str(folder / "typed.tsv")
    bcftools.view("-T", typed, "-Oz", "-o", str(paths["target"]), str(paths["truth"]), catch_stdout=False)
    for path in paths.values():
        bcftools.index("-t", "-f", str(path))
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--variants", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    make_folder(options.out)
    paths = split(options.variants, options.out)
    imputed: dict[str, Path | str] = {"embrag_ds": options.out / "embrag_ds.vcf.gz"}
    impute(PanelFiles(paths["panel"]), paths["target"], options.out / "embrag_ds.vcf.gz", adapt="off")
    others, failed = impute_with_tools(
        paths["panel"], paths["target"], None, options.out / "tools", os.cpu_count() or 1
    )
    for fault in failed.values():
        raise UserError(fault)
    imputed |= others
    report = evaluate(paths["truth"], imputed, paths["panel"], paths["target"])
    sys.stdout.write(report.table())


if __name__ == "__main__":
    run_command(main)
