"""The command ``embrag train``, which runs one rank; ``deepspeed launch/train.py`` starts several."""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import sys
from pathlib import Path
from typing import Any

from embrag_ds.cli.panel_options import add_panel, panel_files
from embrag_ds.errors import UserError
from embrag_ds.runs.stop import Stopped
from embrag_ds.runtime.imports import uncollected

logger = logging.getLogger(__name__)

DESCRIPTION = "Train a model on a phased reference panel."
USAGE = "--deepspeed_config JSON [--panel VCF] [--map MAP] [--run-dir DIR]"
EXAMPLES = """\
  embrag train --deepspeed_config v18
      the production model on the simulated default panel, one rank
  deepspeed launch/train.py --deepspeed_config ds_configs/v18.json --panel PANEL.vcf.gz --map MAP
      your own panel, on every GPU of this machine
  embrag train --deepspeed_config v18_cpu --panel PANEL.vcf.gz --run-dir runs/mine --resume
      go on from the newest checkpoint
"""
OF_EXTRA = {"deepspeed": "DeepSpeed", "psutil": "psutil", "pynvml": "nvidia-ml-py"}
"""Packages that the extra ``train`` brings, and what they are called where they are installed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    run = parser.add_argument_group("run")
    run.add_argument(
        "--deepspeed_config", required=True, metavar="JSON", help="settings: a file, or the name of a shipped one (v18)"
    )
    run.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="e.g. embrag.model.dims=128; repeatable"
    )
    run.add_argument("--run-dir", type=Path, metavar="DIR", help="default: runs/<config>-<date>-<time>")
    run.add_argument("--max-steps", type=int, metavar="N", help="stop at step N (the schedule stays)")
    run.add_argument("--dry-run", action="store_true", help="say what the run would do and take, and do not train")
    run.add_argument("--resume", action="store_true", help="continue the run in --run-dir (default: the newest)")
    run.add_argument("--init-from", type=Path, metavar="FILE", help="start from the weights of a model.safetensors")
    run.add_argument(
        "--profile", choices=("nvml", "snapshot"), help="measure time and memory; snapshot: allocations, too (CUDA)"
    )
    run.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # given by the launcher
    data = parser.add_argument_group("data (default: a panel simulated on first use)")
    add_panel(data)


def run(options: argparse.Namespace) -> None:
    """Run the command with parsed options; raises :class:`UserError`."""
    for package, name in OF_EXTRA.items():
        if importlib.util.find_spec(package) is None:
            raise UserError(f"training needs {name}, which is not installed; pip install 'embrag_ds[train]'")
    with uncollected():
        from embrag_ds.training.run import train

    overrides = list(options.set)
    if options.max_steps is not None:
        overrides.append(f"embrag.train.max_steps={options.max_steps}")
    if options.cache_dir is not None:
        overrides.append(f"embrag.data.cache_dir={json.dumps(str(options.cache_dir))}")
    given: dict[str, Any] = {
        "overrides": overrides,
        "run_dir": options.run_dir,
        "resume": options.resume,
        "init_from": options.init_from,
    }
    if options.dry_run:
        if options.profile:
            raise UserError("--dry-run trains nothing, so there is nothing to profile; leave --profile out")
        from embrag_ds.planning.plan import plan

        lines = plan(options.deepspeed_config, panel_files(options), **given)
        print("\n".join(lines), end="\n" if lines else "")
        return
    try:
        train(options.deepspeed_config, panel_files(options), **given, profile=options.profile)
    except Stopped as stopped:
        logger.info("%s: the checkpoint is saved; go on with --resume", stopped)
        sys.exit(128 + stopped.number)
