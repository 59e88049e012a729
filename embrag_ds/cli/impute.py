"""The command ``embrag impute``."""

from __future__ import annotations

import argparse
from pathlib import Path

from embrag_ds.cli.panel_options import add_panel, several_panel_files
from embrag_ds.data.inputs import PanelFiles
from embrag_ds.imputation.ahead import packing_ahead
from embrag_ds.runtime.imports import uncollected

DESCRIPTION = "Impute every panel site of targets typed at some."
USAGE = "--panel VCF --target VCF --out FILE [--map MAP]"
RARE = (
    "--cm-per-mb",
    "--effective-size",
    "--samples",
    "--cache-dir",
    "--panel-missing",
    "--duplicates",
    "--allow-overlap",
    "--excluded",
    "--untyped-contigs",
    "--sites-only",
    "--typed-only",
    "--join-multiallelic",
    "--save-model",
    "--samples-per-batch",
    "--precision",
    "--transformer",
    "--debug",
)
EXAMPLES = """\
  embrag impute --panel PANEL.vcf.gz --map MAP --target TARGET.vcf.gz --out IMPUTED.vcf.gz
      with the model that comes with the package, which adapts to the panel first
  embrag impute --run-dir runs/mine --panel PANEL.vcf.gz --target TARGET.vcf.gz --out IMPUTED.vcf.gz
      with a model of your own
  embrag impute --panel PANEL.vcf.gz --target BATCH1.vcf.gz --out OUT1.vcf.gz --save-model ADAPTED.safetensors
  embrag impute --panel PANEL.vcf.gz --target BATCH2.vcf.gz --out OUT2.vcf.gz --model ADAPTED.safetensors --adapt off
      two batches by one model, adapted to the sites of the first
  embrag impute --panel chr1.vcf.gz chr2.vcf.gz --map MAP --target TARGET.vcf.gz --out IMPUTED.vcf.gz
      a genome whose panel is several files
  deepspeed launch/impute.py --panel PANEL.vcf.gz --map MAP --target TARGET.vcf.gz --out IMPUTED.vcf.gz
      by every GPU of this machine
  embrag impute --out IMPUTED.vcf.gz
      the targets of the simulated default data
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    files = parser.add_argument_group("files (default: the simulated default data)")
    add_panel(files, several=True)
    files.add_argument(
        "--target", type=Path, nargs="+", metavar="VCF", help="targets, typed at some of the panel's sites; or several"
    )
    files.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="imputed, .vcf.gz or .bcf, with its index"
    )
    targets = parser.add_argument_group("targets")
    targets.add_argument(
        "--phase", choices=("none", "beagle"), default="none", help="what phases unphased targets (none: refused)"
    )
    targets.add_argument(
        "--strand",
        choices=("report", "flip", "drop"),
        default="report",
        help="sites on the other strand: left out, flipped (palindromic ones by frequency), or left out with all "
        "palindromic ones (report)",
    )
    targets.add_argument("--allow-overlap", action="store_true", help="targets may also be in the panel")
    targets.add_argument("--report", type=Path, metavar="JSON", help="write what was read and matched here")
    targets.add_argument("--excluded", type=Path, metavar="TSV", help="write the sites left out here, with the reason")
    extent = parser.add_argument_group("sites to impute (default: those of contigs with typed sites)")
    extent.add_argument("--region", metavar="CONTIG[:START-END]", help="write these sites only")
    extent.add_argument(
        "--untyped-contigs",
        choices=("drop", "frequency"),
        default="drop",
        help="contigs without typed sites: left out, or allele frequencies (drop)",
    )
    output = parser.add_argument_group("output (default: every site, all fields)")
    output.add_argument("--format", metavar="LIST", default="GT,DS,HDS,GP", help="FORMAT fields (GT,DS,HDS,GP)")
    output.add_argument("--sites-only", action="store_true", help="no sample columns")
    output.add_argument("--typed-only", action="store_true", help="no imputed sites")
    output.add_argument("--min-r2", type=float, default=0.0, metavar="X", help="no imputed sites with DR2 below X")
    output.add_argument(
        "--join-multiallelic",
        action="store_true",
        help="one record for the ALTs of one panel record, with AP1 and AP2 in place of HDS",
    )
    group = parser.add_argument_group("model (default: the one that comes with the package)")
    model = group.add_mutually_exclusive_group()
    model.add_argument("--run-dir", type=Path, metavar="DIR", help="run folder of embrag train")
    model.add_argument("--model", type=Path, metavar="FILE", help="a model.safetensors")
    group.add_argument(
        "--adapt",
        default="auto",
        metavar="auto|off|MINUTES",
        help="have the model adapt to the panel and the typed sites first: for a minute or two of two cores (auto), "
        "not at all (off), or for MINUTES of two cores (default: auto)",
    )
    group.add_argument(
        "--save-model", type=Path, metavar="FILE", help="write the model that imputes, adapted or not, to this file"
    )
    speed = parser.add_argument_group("speed and memory")
    speed.add_argument(
        "--samples-per-batch",
        type=int,
        metavar="N",
        help="samples computed at once: fewer take less memory and more time",
    )
    speed.add_argument(
        "--transformer",
        choices=("on", "off"),
        help="whether its residual is added (default: off, because it adds no accuracy so far)",
    )
    speed.add_argument(
        "--precision",
        choices=("bf16", "fp32"),
        help="of products on a GPU and in adaptation (default: bf16 on a GPU, fp32 on a CPU); all else is fp32",
    )
    speed.add_argument("--threads", type=int, metavar="N", help="of the CPU; the output is the same (default: all)")
    speed.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # given by DeepSpeed's launcher


def run(options: argparse.Namespace) -> None:
    """Run the command with parsed options; raises :class:`UserError`."""
    files = several_panel_files(options)
    if options.threads == 1:
        _run(options, files)
        return
    with packing_ahead(files[0], options.cache_dir):
        _run(options, files)


def _run(options: argparse.Namespace, files: list[PanelFiles]) -> None:
    with uncollected():
        from embrag_ds.export import MODEL_FILE, PRETRAINED
        from embrag_ds.imputation.impute import impute
        from embrag_ds.imputation.preparation import TargetOptions
        from embrag_ds.runtime.processor import share_threads, use_threads
        from embrag_ds.variants.output import OutputOptions

    output = OutputOptions(
        formats=tuple(options.format.split(",")),
        sites_only=options.sites_only,
        typed_only=options.typed_only,
        min_r2=options.min_r2,
        join_multiallelic=options.join_multiallelic,
    )
    if options.threads is not None:
        use_threads(options.threads)
    else:
        share_threads()
    impute(
        files,
        options.target,
        options.out,
        model=options.model or (options.run_dir / MODEL_FILE if options.run_dir else PRETRAINED),
        options=TargetOptions(
            duplicates=options.duplicates,
            strand=options.strand,
            phase=options.phase,
            allow_overlap=options.allow_overlap,
            region=options.region,
            untyped_contigs=options.untyped_contigs,
            report=options.report,
            excluded=options.excluded,
        ),
        samples_per_batch=options.samples_per_batch,
        transformer=None if options.transformer is None else options.transformer == "on",
        device=options.device,
        precision=options.precision,
        adapt=options.adapt,
        save_model=options.save_model,
        cache_dir=options.cache_dir,
        output=output,
    )
