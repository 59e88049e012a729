"""The same short run under every ZeRO stage, on one rank and on two: how far are the losses from stage 0 on one rank?

    DS_ACCELERATOR=cpu python profiling/zero_stages.py --out FOLDER [--steps 50]

The runs are in fp32, without dropout. Two ranks take half of the micro-batches each, so that all runs see the same
samples in the same steps. FOLDER gets zero_stages.md, zero_stages.json and the run folders. The largest difference must
not exceed 1e-5 of the loss, else the exit status is 1.
"""

from __future__ import annotations

import argparse
import logging
import sys
from datetime import date
from pathlib import Path
from typing import Any

from training_runs import ROOT, add_inputs, trained

from embrag_ds.cli.command import run_command
from embrag_ds.files import make_folder, write_json, write_text

logger = logging.getLogger("embrag_ds.profiling.zero_stages")

CONFIG = ROOT / "ds_configs" / "quickstart.json"
MOST = 1e-5
"""Largest difference of a loss, as a fraction of the loss, that rounding explains."""
MICRO_BATCHES = 2
"""In a step, over all ranks."""
TINY: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 4,
    "embrag.data.window_sites": 128,
    "embrag.data.overlap_sites": 16,
    "embrag.data.flank_sites": 128,
    "embrag.retrieval.k": 16,
    "embrag.retrieval.refresh": {"every_steps": 10, "lag_steps": 2},
    "embrag.model.dims": 32,
    "embrag.model.dropout": 0.0,
}
EVERYTHING = {"stage3_param_persistence_threshold": 0}
"""ZeRO-3 partitions small parameters, too."""
ON_THE_HOST = {"device": "cpu"}
STAGES: dict[str, dict[str, Any]] = {
    "0": {"stage": 0},
    "1": {"stage": 1},
    "2": {"stage": 2},
    "3": {"stage": 3, **EVERYTHING},
    "2, optimiser offloaded": {"stage": 2, "offload_optimizer": ON_THE_HOST},
    "3, all offloaded": {
        "stage": 3,
        **EVERYTHING,
        "offload_optimizer": ON_THE_HOST,
        "offload_param": ON_THE_HOST,
    },
}
"""Name -> section zero_optimization."""


def settings(zero: dict[str, Any], ranks: int, steps: int) -> dict[str, Any]:
    """Settings of a run on some ranks."""
    return {
        **TINY,
        "gradient_accumulation_steps": MICRO_BATCHES // ranks,
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "scheduler.params.total_num_steps": steps,
        "scheduler.params.warmup_num_steps": max(2, steps // 10),
        "embrag.masking.curriculum_steps": steps,
        "embrag.train.max_steps": steps,
        "embrag.train.log_every": 1,
        "embrag.train.eval_every": steps + 1,
        "embrag.train.checkpoint_every": steps,
    }


def losses(lines: list[dict[str, Any]]) -> list[float]:
    """Loss of every step."""
    return [line["loss"] for line in lines if line["kind"] == "train"]


def difference(found: list[float], expected: list[float]) -> float:
    """Largest difference of two runs' losses, as a fraction of the expected loss."""
    return max(abs(one - other) / other for one, other in zip(found, expected, strict=True))


def table(differences: dict[str, dict[int, float]], steps: int) -> str:
    """Markdown table of the largest differences by stage and number of ranks."""
    ranks = next(iter(differences.values()))
    head = " | ".join(f"{count} rank{'s' * (count > 1)}" for count in ranks)
    lines = [f"| ZeRO stage, {steps} steps | {head} |", "|---" * (len(ranks) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(f'{each:.1e}' for each in row.values())} |" for name, row in differences.items()]
    return "\n".join(lines) + "\n"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The same short run under every ZeRO stage, on one and two ranks.")
    parser.add_argument("--steps", type=int, default=50)
    add_inputs(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    make_folder(options.out)
    found: dict[str, dict[int, list[float]]] = {}
    for name, zero in STAGES.items():
        for ranks in (1, 2):
            logger.info(f"stage {name}, {ranks} rank{'s' * (ranks > 1)}")
            folder = options.out / f"{name.replace(', ', '-').replace(' ', '-')}-{ranks}"
            lines = trained(CONFIG, folder, settings(zero, ranks, options.steps), options, ranks)
            found.setdefault(name, {})[ranks] = losses(lines)
    expected = found["0"][1]
    differences = {
        name: {ranks: difference(each, expected) for ranks, each in runs.items()} for name, runs in found.items()
    }
    command = " ".join(sys.argv)
    result = {"date": date.today().isoformat(), "command": command, "differences": differences, "losses": found}
    write_json(options.out / "zero_stages.json", result)
    text = table(differences, options.steps)
    write_text(options.out / "zero_stages.md", text)
    sys.stdout.write(text)
    if max(max(row.values()) for row in differences.values()) > MOST:
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
