"""Samples x sites a second of imputation alone, without reading files and writing the output.

    python profiling/impute_rate.py [--panel P --target T [T ...]] [--map M] [--device cuda] [--json FILE]

For each target, with and without the transformer, all windows or stretches are imputed several times in this process.
The first time compiles kernels or loops and does not count. ``profiling/bench_impute.py`` times the whole command.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

from embrag_ds.cli.command import run_command
from embrag_ds.data.inputs import PanelFiles, default_data, open_inputs
from embrag_ds.data.packing.reading import TARGET
from embrag_ds.data.panel import open_panel
from embrag_ds.data.targets import Targets, match_targets, open_targets
from embrag_ds.export import PRETRAINED, read_export
from embrag_ds.files import require_writable, write_json
from embrag_ds.imputation.computing.stretches import Precision
from embrag_ds.imputation.engine import Imputation
from embrag_ds.runs.record import device_name


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Samples x sites a second of imputation alone.")
    parser.add_argument("--panel", type=Path, help="default: that of the default data, and its target")
    parser.add_argument("--target", type=Path, nargs="+")
    parser.add_argument("--map", type=Path)
    parser.add_argument("--model", type=Path, default=PRETRAINED)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--samples-per-batch", type=int, metavar="N")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if (options.panel is None) != (options.target is None):
        parser.error("--panel and --target go together")
    return options


def seconds_of(imputation: Imputation) -> float:
    """Seconds in which all windows are imputed."""
    began = time.perf_counter()
    for _ in imputation.windows():
        pass
    return time.perf_counter() - began


def main() -> None:
    options = parse_arguments()
    if options.json is not None:
        require_writable(options.json)
    device = torch.device(options.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", 0)
    model = read_export(options.model)
    if options.panel is None:
        made = default_data(model.config.data)
        options.panel, options.map, options.target = made.panel, made.genetic_map, [made.target]
    inputs = open_inputs(PanelFiles(options.panel, options.map), model.config.data)
    sites = len(inputs.panel.sites)
    rows: list[dict[str, Any]] = []
    for path in options.target:
        with tempfile.TemporaryDirectory() as scratch:
            target = open_panel(path, Path(scratch), reading=TARGET)
            match = match_targets(target, inputs.panel, "report", False)
            targets: Targets = open_targets(target, match, inputs.panel)
            for transformer in (False, True):
                precision: Precision = "bf16" if device.type == "cuda" else "fp32"
                block = options.samples_per_batch
                imputation = Imputation(model, inputs, targets, str(device), block, transformer, precision)
                first, *others = [seconds_of(imputation) for _ in range(1 + options.rounds)]
                rate = len(targets.samples) * sites / statistics.median(others)
                way = "with" if transformer else "without"
                sys.stdout.write(
                    f"{path.name}, {way} the transformer: {rate:.3g} samples x sites a second "
                    f"({statistics.median(others):.2f} s; the first time {first:.1f} s)\n"
                )
                sys.stdout.flush()
                rows.append(
                    {"target": path.name, "transformer": transformer, "rate": rate, "first_s": first, "seconds": others}
                )
    if options.json is not None:
        found = {"date": date.today().isoformat(), "device": device_name(device), "sites": sites, "rows": rows}
        write_json(options.json, found)


if __name__ == "__main__":
    run_command(main)
