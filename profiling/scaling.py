"""Samples a second of several ranks beside one rank, with the same batch and one thread a rank, as a Markdown row.

    python profiling/scaling.py [--ranks 2] [--rounds 3] [--steps 60] [--deepspeed_config v18_cpu] [--set KEY=VALUE]

Each round trains once with one rank and once with all, through DeepSpeed's launcher, and the order alternates, so that
a machine that slows down does not favour either. A run's speed is the median over its log lines, without the first
third. A rank's loader runs beside its step on a thread of its own; ``--set embrag.retrieval.prefetch=0`` does without.
The machine must be idle: the first column after the ratio is the load that others put on it before the first run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

from machine import free_port

ROOT = Path(__file__).resolve().parent.parent
_LOG_EVERY = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", default="v18_cpu", metavar="JSON")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="runs of either kind")
    parser.add_argument("--steps", type=int, default=60, help="of a run")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as in training; repeatable")
    parser.add_argument("--panel", type=Path, help="default: the simulated default panel")
    parser.add_argument("--map", type=Path)
    options = parser.parse_args()
    if options.ranks < 2 or options.rounds < 1 or options.steps < 3 * _LOG_EVERY:
        parser.error(f"at least 2 ranks, 1 round and {3 * _LOG_EVERY} steps are needed")
    before = os.getloadavg()[0]
    speeds: dict[int, list[float]] = {1: [], options.ranks: []}
    with tempfile.TemporaryDirectory(prefix="scaling-") as folder:
        for number in range(options.rounds):
            order = (1, options.ranks) if number % 2 == 0 else (options.ranks, 1)
            for ranks in order:
                speeds[ranks].append(_speed(ranks, Path(folder) / f"{number}-{ranks}", options))
                print(f"round {number + 1}: {ranks} x 1 thread, {speeds[ranks][-1]:.1f} samples/s", file=sys.stderr)
    print(row(options.deepspeed_config, options.set, speeds[1], speeds[options.ranks], options.ranks, before))


def _speed(ranks: int, run_dir: Path, options: argparse.Namespace) -> float:
    """Samples a second of one run, of all its ranks together."""
    never = 10 * options.steps
    settings = (
        f"embrag.train.max_steps={options.steps}",
        f"embrag.train.log_every={_LOG_EVERY}",
        f"embrag.train.eval_every={never}",
        f"embrag.train.checkpoint_every={never}",
        *options.set,
    )
    files = {"--panel": options.panel, "--map": options.map}
    command = [
        sys.executable,
        str(Path(sys.executable).with_name("deepspeed")),
        f"--num_accelerators={ranks}",
        f"--master_port={free_port()}",
        str(ROOT / "launch" / "train.py"),
        *("--deepspeed_config", options.deepspeed_config, "--run-dir", str(run_dir)),
        *(part for name, path in files.items() if path for part in (name, str(path))),
        *(part for each in settings for part in ("--set", each)),
    ]
    ours = {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, env={**os.environ, **ours}, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return speed_of((run_dir / "metrics.jsonl").read_text(encoding="utf-8"))


def speed_of(metrics: str) -> float:
    """Median samples a second in the lines of a ``metrics.jsonl`` about training, without the first third."""
    lines = [json.loads(line) for line in metrics.splitlines()]
    speeds = [line["samples_per_second"] for line in lines if line["kind"] == "train"]
    return statistics.median(speeds[len(speeds) // 3 :])


def row(config: str, settings: list[str], one: list[float], all_: list[float], ranks: int, load: float) -> str:
    """Table with the median over the rounds, and the smallest and the largest ratio of a round."""
    ratios = [together / alone for alone, together in zip(one, all_, strict=True)]
    shown = ", ".join((config, *settings))
    cells = (
        f"{date.today():%Y-%m-%d}",
        f"{shown}; {os.cpu_count()} cores",
        f"{statistics.median(one):.1f}",
        f"{statistics.median(all_):.1f}",
        f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}, {len(ratios)} rounds)",
        f"{load:.2f}",
    )
    heads = ("date", "run", "1 rank, samples/s", f"{ranks} ranks, samples/s", "ratio", "load before")
    return "\n".join(f"| {' | '.join(each)} |" for each in (heads, ("---",) * len(heads), cells))


if __name__ == "__main__":
    main()
