"""V17 beside V18 at equal training time: validation r2 by minor-allele frequency, on one panel and from one seed.

    python profiling/equal_time.py --out FOLDER [--minutes 4] [--panel VCF --map MAP --samples TSV]

A short run of each configuration measures its time per step. From this follow the steps that fit into the minutes, and
the learning-rate schedule of exactly as many. Then each trains in a process of its own, one after the other. FOLDER
gets equal_time.md, equal_time.json and both run folders. On a GPU, 4 minutes each take less than ten in all.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from training_runs import ROOT, add_inputs, trained

from embrag_ds.cli.command import run_command
from embrag_ds.engine.deepspeed_settings import load_training_config
from embrag_ds.evaluation.metrics import BIN_NAMES
from embrag_ds.files import make_folder, write_json, write_text

logger = logging.getLogger("embrag_ds.profiling.equal_time")

WARM_UP = 0.05
"""Share of a run's steps in which the learning rate rises."""


@dataclass(frozen=True)
class Trained:
    """A finished run: ``steps`` in ``seconds`` of training, and validation r2 by mask and bin (None: undefined)."""

    steps: int
    seconds: float
    r2: dict[str, dict[str, float | None]]


def train(config: Path, run_dir: Path, steps: int, log_every: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Train ``steps`` steps with a schedule of that length, and return the lines of ``metrics.jsonl``."""
    settings = {
        "scheduler.params.total_num_steps": steps,
        "scheduler.params.warmup_num_steps": max(1, round(WARM_UP * steps)),
        "embrag.masking.curriculum_steps": max(1, steps // 2),
        "embrag.train.max_steps": steps,
        "embrag.train.log_every": log_every,
        "embrag.train.eval_every": steps,
        "embrag.train.checkpoint_every": steps,
    }
    return trained(config, run_dir, settings, options)


def step_seconds(lines: list[dict[str, Any]]) -> float:
    """Median time of a step in a run's log lines, in seconds; the first line, the warm-up, does not count."""
    taken = [line["step_ms"] / 1000 for line in lines if line["kind"] == "train"]
    return statistics.median(taken[1:])


def measured(lines: list[dict[str, Any]]) -> Trained:
    """Sum up a run."""
    train_lines = [line for line in lines if line["kind"] == "train"]
    previous, seconds = 0, 0.0
    for line in train_lines:
        seconds += (line["step"] - previous) * line["step_ms"] / 1000
        previous = line["step"]
    last = [line for line in lines if line["kind"] == "validation"][-1]
    r2 = {name: value["r2"] for name, value in last.items() if isinstance(value, dict)}
    return Trained(previous, seconds, r2)


def table(found: dict[str, Trained]) -> str:
    """Markdown table of the runs: steps, seconds, and r2 by mask and bin."""
    lines = [f"| | {' | '.join(found)} |", "|---" * (len(found) + 1) + "|"]
    lines.append(f"| steps | {' | '.join(str(each.steps) for each in found.values())} |")
    lines.append(f"| seconds of training | {' | '.join(f'{each.seconds:.0f}' for each in found.values())} |")
    for mask in next(iter(found.values())).r2:
        for name in BIN_NAMES:
            values = [each.r2[mask].get(name) for each in found.values()]
            shown = ("" if value is None else f"{value:.4f}" for value in values)
            lines.append(f"| r2, {mask}, {name} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="V17 beside V18 at equal training time.")
    for name in ("v17", "v18"):
        parser.add_argument(f"--{name}", type=Path, default=ROOT / "ds_configs" / f"{name}.json", metavar="JSON")
    add_inputs(parser)
    parser.add_argument("--minutes", type=float, default=4.0, help="of training, each")
    parser.add_argument("--probe-steps", type=int, default=30, metavar="N", help="that measure the time of a step")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    options = parser.parse_args()
    if options.minutes <= 0 or options.probe_steps < 2:
        parser.error("--minutes must be positive, --probe-steps at least 2")
    return options


def main() -> None:
    options = parse_arguments()
    make_folder(options.out)
    configs = {"V17": options.v17, "V18": options.v18}
    for config in configs.values():
        load_training_config(config, options.set)
    found: dict[str, Trained] = {}
    for name, config in configs.items():
        probe_every = max(1, options.probe_steps // 3)
        probe = train(config, options.out / f"{name}-probe", options.probe_steps, probe_every, options)
        seconds = step_seconds(probe)
        steps = max(1, round(60 * options.minutes / seconds))
        logger.info(f"{name}: {1000 * seconds:.1f} ms a step, so {steps} steps in {options.minutes:g} minutes")
        found[name] = measured(train(config, options.out / name, steps, max(1, steps // 20), options))
    versions = json.loads((options.out / "V18" / "versions.json").read_text(encoding="utf-8"))
    result = {"date": date.today().isoformat(), "versions": versions, "minutes": options.minutes}
    result["runs"] = {name: asdict(each) for name, each in found.items()}
    write_json(options.out / "equal_time.json", result)
    text = table(found)
    write_text(options.out / "equal_time.md", text)
    sys.stdout.write(text)


if __name__ == "__main__":
    run_command(main)
