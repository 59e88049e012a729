"""Memory that ``embrag train --dry-run`` estimates, beside the peak of a real run on a CPU, as a Markdown table.

    python profiling/dry_run.py --steps 3 --out dry_run.json
    python profiling/dry_run.py --only quickstart --panel PANEL.vcf.gz --map MAP

Every case is three starts of one rank or more. The first trains a tiny network on a tiny panel: its memory at the end
is what imports and compiled code take. The second is the run itself, whose peak counts above that. The third is the
estimate. The peak is the system's (VmHWM), without the pages of mapped files.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from embrag_ds.cli.command import run_command
from embrag_ds.data.inputs import PanelFiles, open_inputs
from embrag_ds.data.simulate import SimulationSettings, simulate_default
from embrag_ds.engine.deepspeed_settings import load_training_config
from embrag_ds.files import write_json
from embrag_ds.planning.memory import HOST
from embrag_ds.planning.plan import estimate, total
from embrag_ds.runtime.processor import memory_field
from embrag_ds.training.run import train
from tests.ranks import free_port

QUIET = ("embrag.train.eval_every=1000", "embrag.train.checkpoint_every=1000")
FP32 = ("bf16.enabled=false", "data_types=null", "embrag.retrieval.backend=torch")
V18 = (*FP32, "embrag.model.dims=64", "embrag.model.layers=4")
WIDE = (
    "embrag.model.dims=512",
    "embrag.model.layers=6",
    "embrag.model.heads=8",
    "embrag.data.window_sites=64",
    "embrag.data.overlap_sites=8",
    "train_micro_batch_size_per_gpu=4",
)
TINY = (
    "embrag.model.dims=8",
    "embrag.model.layers=1",
    "embrag.model.heads=1",
    "embrag.data.window_sites=64",
    "embrag.data.overlap_sites=8",
    "embrag.data.flank_sites=64",
    "embrag.retrieval.k=8",
    "train_micro_batch_size_per_gpu=2",
    "embrag.train.max_steps=2",
    *QUIET,
)
MIB = 1 << 20


@dataclass(frozen=True)
class Case:
    """A configuration with overrides, on a number of ranks."""

    name: str
    config: str
    overrides: tuple[str, ...] = ()
    ranks: int = 1


CASES = (
    Case("quickstart", "quickstart"),
    Case("quickstart, micro-batch 4", "quickstart", ("train_micro_batch_size_per_gpu=4",)),
    Case("quickstart, micro-batch 48", "quickstart", ("train_micro_batch_size_per_gpu=48",)),
    Case("quickstart, 2 ranks", "quickstart", (), 2),
    Case("v18_cpu, micro-batch 8", "v18_cpu", ("train_micro_batch_size_per_gpu=8",)),
    Case("v18_cpu", "v18_cpu"),
    Case("v18_cpu, micro-batch 32", "v18_cpu", ("train_micro_batch_size_per_gpu=32",)),
    Case("v18_cpu, micro-batch 64", "v18_cpu", ("train_micro_batch_size_per_gpu=64",)),
    Case("v18, 64 dims, 4 layers, micro-batch 16", "v18", (*V18, "train_micro_batch_size_per_gpu=16")),
    Case("v18, 64 dims, 4 layers", "v18", V18),
    Case("v18, 64 dims, 4 layers, recomputed projections", "v18", (*V18, "embrag.train.recompute_projections=true")),
    Case("wide, stage 0", "quickstart", (*WIDE, "zero_optimization.stage=0")),
    Case("wide, stage 1", "quickstart", WIDE),
    Case("wide, stage 2", "quickstart", (*WIDE, "zero_optimization.stage=2")),
    Case("wide, stage 3", "quickstart", (*WIDE, "zero_optimization.stage=3")),
    Case("wide, stage 1, 2 ranks", "quickstart", WIDE, 2),
    Case("wide, stage 2, 2 ranks", "quickstart", (*WIDE, "zero_optimization.stage=2"), 2),
    Case("wide, stage 3, 2 ranks", "quickstart", (*WIDE, "zero_optimization.stage=3"), 2),
)


def tiny_panel(folder: Path) -> PanelFiles:
    """A panel of 30 simulated samples."""
    settings = SimulationSettings(length_bp=150_000, panel_samples=60, target_samples=3, typed_spacing_bp=2_000)
    made = simulate_default(folder, settings)
    return PanelFiles(made.panel, made.genetic_map, made.samples)


def child(task: dict[str, Any]) -> dict[str, int]:
    """One start, in this process: ``imports``, ``run`` or ``estimate``."""
    panel, genetic_map, samples = (each and Path(each) for each in task["files"])
    files = PanelFiles(panel, genetic_map, samples)
    overrides, config = task["overrides"], task["config"]
    if task["kind"] == "estimate":
        settings = load_training_config(config, overrides)
        before = memory_field("RssAnon") or 0
        inputs = open_inputs(files, settings.embrag.data)
        _, memory = estimate(settings, inputs, task["ranks"], before)
        parts = {each.name: each.size for each in memory.cpu}
        return {"bytes": total(memory.cpu, HOST), **parts}
    train(config, files, overrides=overrides, run_dir=Path(task["folder"]))
    if task["kind"] == "imports":
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        return {"bytes": memory_field("VmRSS") or 0, "mapped": memory_field("RssFile") or 0}
    return {"bytes": memory_field("VmHWM") or 0, "mapped": memory_field("RssFile") or 0}


def start(kind: str, case: Case, files: PanelFiles, steps: int, folder: Path) -> dict[str, int]:
    """Start the ranks of a child, and return what the one with the most memory says."""
    overrides = [*case.overrides, f"embrag.train.max_steps={steps}", *QUIET]
    if kind == "imports":
        overrides += TINY
    paths = [each and str(each) for each in (files.panel, files.genetic_map, files.samples)]
    task = {"kind": kind, "config": case.config, "overrides": overrides, "files": paths, "ranks": case.ranks}
    task["folder"] = str(folder / f"{kind}-run")
    ranks = 1 if kind == "estimate" else case.ranks
    place = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    running = []
    for rank in range(ranks):
        own = {**os.environ, "OMP_NUM_THREADS": "1"}
        if ranks > 1:
            own |= {**place, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks)}
        out = folder / f"{kind}-{rank}.json"
        command = [sys.executable, __file__, "--child", json.dumps(task), "--out", str(out)]
        running.append((subprocess.Popen(command, env=own, stdout=subprocess.DEVNULL), out))
    for process, _ in running:
        if process.wait():
            raise SystemExit(f"{case.name}: {kind} failed")
    found = [json.loads(out.read_text(encoding="utf-8")) for _, out in running]
    return max(found, key=lambda each: each["bytes"])


def measure(case: Case, files: PanelFiles, steps: int) -> dict[str, Any]:
    """Estimate and measurement of a case, in bytes."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        imports = start("imports", case, tiny_panel(folder / "tiny"), steps, folder)
        run = start("run", case, files, steps, folder)
        estimated = start("estimate", case, files, steps, folder)
    measured = run["bytes"] - run["mapped"] - (imports["bytes"] - imports["mapped"])
    return {**asdict(case), "measured": measured, "estimated": estimated.pop("bytes"), "parts": estimated}


def row(result: dict[str, Any]) -> str:
    """A row of the table."""
    measured, estimated = result["measured"] / MIB, result["estimated"] / MIB
    return f"| {result['name']} | {result['ranks']} | {estimated:,.0f} | {measured:,.0f} | {estimated / measured:.2f} |"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--panel", type=Path)
    parser.add_argument("--map", type=Path)
    parser.add_argument("--samples", type=Path)
    parser.add_argument("--out", type=Path, metavar="JSON")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    if options.child:
        write_json(options.out, child(options.child))
        return
    files = PanelFiles(options.panel, options.map, options.samples)
    print("| case | ranks | estimated, MiB | measured, MiB | ratio |\n|---|---|---|---|---|", flush=True)
    results = []
    for case in CASES:
        if options.only in case.name:
            results.append(measure(case, files, options.steps))
            print(row(results[-1]), flush=True)
    if options.out:
        write_json(options.out, results)


if __name__ == "__main__":
    run_command(main)
