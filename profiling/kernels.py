"""Where the time of a training step goes on a GPU: its kernels, as torch's profiler records them.

    python profiling/kernels.py --out FOLDER [--deepspeed_config JSON] [--micro-batch N] [--steps N] [--set KEY=VALUE]

FOLDER gets kernels.md and kernels.json: the time per step of each kernel, those that take longest first. Kernels on
side streams run beside others, so times can add up to more than a step takes.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from datetime import date
from pathlib import Path

import torch
from stepper import Block, Kernel, Recipe, Stepper
from training_runs import ROOT, add_inputs

from embrag_ds.cli.command import run_command
from embrag_ds.data.inputs import PanelFiles
from embrag_ds.errors import UserError
from embrag_ds.files import make_folder, write_json, write_text

_NAMED = 40
_LONGEST_NAME = 110


def table(kernels: list[Kernel], block: Block, steps: int) -> str:
    """Markdown table of the kernels of ``steps`` steps, beside the time of a step in ``block``, not profiled."""
    busy = sum(each.ms for each in kernels) / steps
    lines = [f"A step takes {1000 * block.seconds / block.steps:.1f} ms, its kernels {busy:.1f} ms.", ""]
    lines += ["| kernel | launches a step | ms a step |", "|---|---|---|"]
    for each in kernels[:_NAMED]:
        name = each.name.replace("|", "\\|")[:_LONGEST_NAME]
        lines.append(f"| `{name}` | {each.launches / steps:.1f} | {each.ms / steps:.3f} |")
    others = kernels[_NAMED:]
    if others:
        launches, ms = sum(each.launches for each in others), sum(each.ms for each in others)
        lines.append(f"| {len(others)} others | {launches / steps:.1f} | {ms / steps:.3f} |")
    return "\n".join(lines) + "\n"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Kernels of a training step on a GPU.")
    parser.add_argument("--deepspeed_config", type=Path, default=ROOT / "ds_configs" / "v18.json", metavar="JSON")
    add_inputs(parser)
    parser.add_argument("--micro-batch", type=int, default=32, metavar="N", help="samples")
    parser.add_argument("--steps", type=int, default=8, help="that are recorded")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    options = parser.parse_args()
    if options.steps < 1 or options.micro_batch < 1:
        parser.error("--steps and --micro-batch must be positive")
    return options


def main() -> None:
    options = parse_arguments()
    if not torch.cuda.is_available():
        raise UserError("profiling/kernels.py records what runs on a GPU, and torch finds none here")
    make_folder(options.out)
    files = PanelFiles(options.panel, options.map, options.samples)
    stepper = Stepper(Recipe(options.deepspeed_config, tuple(options.set), files))
    stepper.build(options.micro_batch)
    stepper.steps(4)  # warm-up
    block = stepper.steps(options.steps)
    if block is None:
        raise UserError("the GPU's memory does not suffice; lower --micro-batch")
    kernels = stepper.kernels(options.steps)
    stepper.close()
    text = table(kernels, block, options.steps)
    write_text(options.out / "kernels.md", text)
    write_json(
        options.out / "kernels.json",
        {
            "date": date.today().isoformat(),
            "device": torch.cuda.get_device_name(),
            "settings": options.set,
            "samples": options.micro_batch,
            "step_ms": 1000 * block.seconds / block.steps,
            "steps": options.steps,
            "kernels": [asdict(each) for each in kernels],
        },
    )
    sys.stdout.write(text)


if __name__ == "__main__":
    run_command(main)
