"""Impute phased targets: ``python launch/impute.py --panel P --target T --out O.vcf.gz``.

Without a model it uses the one that comes with the package; without a panel it imputes the target people of
the embedded default data set.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from embrag_ds.data.panel import open_panel
from embrag_ds.data.targets import harmonise_targets
from embrag_ds.engine.checkpoint import PRETRAINED, read_export
from embrag_ds.engine.imputation import Imputation, impute_to_vcf
from embrag_ds.engine.inputs import PanelFiles, cache_directory, default_data, open_inputs
from embrag_ds.engine.trainer import MODEL_FILE
from embrag_ds.errors import UserError
from embrag_ds.launching import run_main


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Impute every panel site of phased target people.")
    model = parser.add_mutually_exclusive_group()
    model.add_argument(
        "--run-dir", type=Path, metavar="DIR", help="run folder of launch/train.py (default: the pretrained model)"
    )
    model.add_argument("--model", type=Path, metavar="FILE", help="a model.safetensors")
    parser.add_argument("--panel", type=Path, metavar="VCF", help="phased, indexed .vcf.gz or .bcf")
    parser.add_argument("--target", type=Path, metavar="VCF", help="phased targets, indexed")
    parser.add_argument("--out", type=Path, required=True, metavar="VCF.GZ", help="imputed, bgzipped and indexed")
    parser.add_argument("--map", type=Path, help="genetic map (default: 1 cM/Mb)")
    parser.add_argument("--samples", type=Path, metavar="TSV", help="panel sample and population")
    parser.add_argument("--people-per-batch", type=int, default=32, metavar="N", help="memory against speed (32)")
    parser.add_argument(
        "--without-transformer",
        action="store_true",
        help="retrieval, copying and confidence alone, in longer windows: faster on a CPU",
    )
    parser.add_argument("--allow-overlap", action="store_true", help="targets may also be in the panel")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def say(text: str) -> None:
    print(text, flush=True)


def main() -> None:
    arguments = parse_arguments()
    if arguments.people_per_batch < 1:
        raise UserError("--people-per-batch must be at least 1")
    try:
        device = torch.device(arguments.device)
    except RuntimeError as fault:
        raise UserError(f"--device {arguments.device}: no such device; use cpu or cuda") from fault
    began = time.monotonic()
    path = arguments.model or (arguments.run_dir / MODEL_FILE if arguments.run_dir else PRETRAINED)
    model = read_export(path)
    say(f"model {path}")
    if (arguments.panel is None) != (arguments.target is None):
        raise UserError("--panel and --target go together")
    files = PanelFiles(arguments.panel, arguments.map, arguments.samples)
    target_path = arguments.target or default_data(model.config.data).target
    inputs = open_inputs(files, model.config.data)
    say(f"panel {inputs.panel.path}: {len(inputs.panel.samples)} people, {len(inputs.panel.sites)} sites")
    with tempfile.TemporaryDirectory(dir=cache_directory(model.config.data)) as scratch:
        packed = open_panel(target_path, Path(scratch))
        targets = harmonise_targets(packed, inputs.panel, arguments.allow_overlap, say)
        transformer = not arguments.without_transformer
        imputation = Imputation(model, inputs, device, arguments.people_per_batch, transformer)
        impute_to_vcf(imputation, targets, arguments.out, say)
    say(f"{arguments.out}: {len(targets.samples)} people in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    run_main(main)
