"""The command ``embrag impute``."""

from __future__ import annotations

import argparse
from pathlib import Path

from embrag_ds.data.inputs import PanelFiles

DESCRIPTION = "Impute every panel site of phased targets."
EXAMPLES = """\
  embrag impute --panel PANEL.vcf.gz --map MAP --target TARGET.vcf.gz --out IMPUTED.vcf.gz
      with the model that comes with the package
  embrag impute --run-dir runs/mine --panel PANEL.vcf.gz --target TARGET.vcf.gz --out IMPUTED.vcf.gz
      with a model of your own
  embrag impute --out IMPUTED.vcf.gz
      the targets of the simulated default data
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    files = parser.add_argument_group("files (default: the simulated default data)")
    files.add_argument("--panel", type=Path, metavar="VCF", help="phased, indexed .vcf.gz or .bcf")
    files.add_argument("--target", type=Path, metavar="VCF", help="phased targets, indexed")
    files.add_argument("--out", type=Path, required=True, metavar="VCF.GZ", help="imputed, bgzipped and indexed")
    files.add_argument("--map", type=Path, help="genetic map (default: 1 cM/Mb)")
    files.add_argument("--samples", type=Path, metavar="TSV", help="panel sample and population")
    files.add_argument("--allow-overlap", action="store_true", help="targets may also be in the panel")
    group = parser.add_argument_group("model (default: the one that comes with the package)")
    model = group.add_mutually_exclusive_group()
    model.add_argument("--run-dir", type=Path, metavar="DIR", help="run folder of embrag train")
    model.add_argument("--model", type=Path, metavar="FILE", help="a model.safetensors")
    speed = parser.add_argument_group("speed and memory")
    speed.add_argument("--samples-per-batch", type=int, default=32, metavar="N", help="memory against speed (32)")
    speed.add_argument(
        "--without-transformer",
        action="store_true",
        help="retrieval, copying and confidence alone, in longer windows: faster on a CPU",
    )
    speed.add_argument(
        "--precision",
        choices=("bf16", "fp32"),
        help="of the network's products (default: bf16 on a GPU, fp32 on a CPU); all else is fp32",
    )
    speed.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")


def run(options: argparse.Namespace) -> None:
    """Run the command with parsed options; raises :class:`UserError`."""
    from embrag_ds.export import MODEL_FILE, PRETRAINED
    from embrag_ds.imputation.impute import impute

    impute(
        PanelFiles(options.panel, options.map, options.samples),
        options.target,
        options.out,
        model=options.model or (options.run_dir / MODEL_FILE if options.run_dir else PRETRAINED),
        samples_per_batch=options.samples_per_batch,
        transformer=not options.without_transformer,
        allow_overlap=options.allow_overlap,
        device=options.device,
        precision=options.precision,
    )
