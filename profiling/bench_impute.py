"""Benchmark of imputation: speed and memory beside Beagle and minimac4, on one machine in one run.

    python profiling/bench_impute.py --panel P --target T [--map M] [--run-dir DIR] [--no-transformer] --json FILE

Every tool runs as its user would run it, in a process of its own, from reading the files to the finished output. The
tools take turns, and the median of the rounds is reported. minimac4's time includes the conversion of the panel, and is
also given without it; ours includes packing it, in an empty cache. We also run with the panel packed, with and without
the transformer. The model never adapts to the panel. A run before all others compiles our loops where numba has not
kept them; its time is reported apart. Tools that cannot run are reported as missing.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import torch

from embrag_ds.cli.command import run_command
from embrag_ds.data.inputs import default_data
from embrag_ds.data.programs import check_ended_well
from embrag_ds.data.windows import DataConfig
from embrag_ds.errors import UserError
from embrag_ds.evaluation.external_tools import TOOLS, able, plink_map
from embrag_ds.files import require_writable, write_json
from embrag_ds.runs.record import device_name
from embrag_ds.runtime.processor import peak_resident_bytes
from embrag_ds.variants.records import VariantReader

logger = logging.getLogger("embrag_ds.profiling.bench_impute")

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Cost:
    """Seconds of every round, and the peak resident memory in GB (1e9 bytes)."""

    seconds: list[float]
    peak_gb: float = 0.0


class Meter:
    """Runs commands and keeps the seconds of each, and their peak memory."""

    def __init__(self) -> None:
        self.each: list[float] = []
        self.peak_gb = 0.0

    def run(self, command: Sequence[str | Path], log: Path) -> None:
        """Run a command with its output in ``log``; raises :class:`UserError` if it fails."""
        began = time.monotonic()
        with log.open("wb") as out:
            process = subprocess.Popen(list(map(str, command)), stdout=out, stderr=subprocess.STDOUT)
            # Sampled, because the kernel's account of a child starts with its parent's memory.
            while process.poll() is None:
                self.peak_gb = max(self.peak_gb, (peak_resident_bytes(process.pid) or 0) / 1e9)
                time.sleep(0.02)
        check_ended_well(command, process.returncode, log)
        self.each.append(time.monotonic() - began)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Imputation beside Beagle and minimac4.")
    parser.add_argument("--panel", type=Path)
    parser.add_argument("--target", type=Path)
    parser.add_argument("--map", type=Path)
    parser.add_argument("--run-dir", type=Path, help="our model (default: the pretrained one)")
    parser.add_argument("--no-transformer", action="store_true", help="leave out our run with it, the longest")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, required=True)
    return parser.parse_args()


WITH_TRANSFORMER = ", panel packed, with the transformer"
OURS = {"": (), ", panel packed": (), WITH_TRANSFORMER: ("--transformer", "on")}
"""Our runs in this order, with their options; the first one packs the panel."""


def ours(options: argparse.Namespace, device: str, more: Sequence[str], folder: Path, meter: Meter) -> None:
    """Impute with launch/impute.py, with the options ``more`` and without adaptation."""
    model = ["--run-dir", options.run_dir] if options.run_dir else []
    given = ["--map", options.map] if options.map else []
    files = ["--panel", options.panel, "--target", options.target, "--out", folder / "ours.vcf.gz"]
    always = ["--device", device, "--adapt", "off"]
    command = [sys.executable, ROOT / "launch" / "impute.py", *files, *given, *model, *more, *always]
    meter.run(command, folder / "ours.out")


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Cost]:
    """Measure every tool, in turns: name -> cost."""
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    os.environ["PYTHONPATH"] = str(ROOT)
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    genetic_map = plink_map(options.map, options.panel, folder) if options.map else None
    costs: dict[str, Cost] = {}

    def note(name: str, meter: Meter, seconds: float) -> None:
        cost = costs.setdefault(name, Cost([]))
        cost.seconds.append(seconds)
        cost.peak_gb = max(cost.peak_gb, meter.peak_gb)
        logger.info("%s: %.1f s, %.2f GB", name, seconds, meter.peak_gb)

    first = Meter()
    ours(options, "cpu", (), folder, first)
    note("embrag_ds cpu, first run", first, sum(first.each))
    for _ in range(options.rounds):
        for name in able(genetic_map):
            meter = Meter()
            TOOLS[name](options.panel, options.target, genetic_map, folder, options.threads, meter.run)
            note(name, meter, sum(meter.each))
            if len(meter.each) > 1:  # the last command imputes, those before prepare the panel
                note(f"{name}, panel converted", meter, meter.each[-1])
        for device in devices:
            shutil.rmtree(folder / "cache", ignore_errors=True)
            for what, more in OURS.items():
                if what == WITH_TRANSFORMER and options.no_transformer:
                    continue
                meter = Meter()
                ours(options, device, more, folder, meter)
                note(f"embrag_ds {device}{what}", meter, sum(meter.each))
    return costs


def main() -> None:
    options = parse_arguments()
    require_writable(options.json)
    if (options.panel is None) != (options.target is None):
        raise UserError("--panel and --target go together")
    if options.panel is None:
        default = default_data(DataConfig())
        options.panel, options.target, options.map = default.panel, default.target, default.genetic_map
    with VariantReader(options.target) as vcf:
        samples = len(vcf.samples)
    with VariantReader(options.panel) as vcf:
        reference, sites = len(vcf.samples), sum(1 for _ in vcf.sites())
    with tempfile.TemporaryDirectory() as folder:
        costs = measure(options, Path(folder))
    result = {
        "date": date.today().isoformat(),
        "device": device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "threads": options.threads,
        "shape": {"panel_samples": reference, "sites": sites, "samples": samples},
        "tools": {
            name: {
                **asdict(cost),
                "median_seconds": statistics.median(cost.seconds),
                "samples_x_sites_per_second": samples * sites / statistics.median(cost.seconds),
            }
            for name, cost in costs.items()
        },
        "missing": [name for name in TOOLS if name not in costs],
    }
    write_json(options.json, result)
    sys.stdout.write(json.dumps(result["tools"], indent=2) + "\n")


if __name__ == "__main__":
    run_command(main)
