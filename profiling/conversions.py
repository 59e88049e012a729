"""Resuming on other ranks, under another ZeRO stage and in another precision: losses beside those of the whole run.

    python profiling/conversions.py --out FOLDER [--steps 3]

Every run of a small network on a simulated panel takes ``2 x steps`` steps of 4 micro-batches. Half way it is saved,
converted, and goes on under every other layout. FOLDER gets conversions.md and conversions.json. The ranks are
processes of this machine, at most 4 at a time; on two cores the whole takes about ten minutes.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from machine import free_port

from embrag_ds.cli.command import run_command
from embrag_ds.config import RunConfig, parse_config
from embrag_ds.data.inputs import PanelFiles, PanelInputs, open_inputs
from embrag_ds.data.simulate import SimulationSettings, simulate_default
from embrag_ds.data.windows import DataConfig
from embrag_ds.engine import distributed as engine_settings
from embrag_ds.engine.distributed import DistributedContext, start_distributed
from embrag_ds.engine.universal import layout_of, needs_conversion
from embrag_ds.errors import UserError
from embrag_ds.files import make_folder, write_json, write_text
from embrag_ds.runs.record import read_metrics
from embrag_ds.training.trainer import Trainer

logger = logging.getLogger("embrag_ds.profiling.conversions")

MICRO_BATCHES = 4
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "torch_autocast": {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
    "bf16": {"bf16": {"enabled": True}},
    "bf16 with fp32 gradients": {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
}
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Case:
    """A layout of the tables."""

    ranks: int
    stage: int
    precision: str

    def settings(self) -> dict[str, Any]:
        """DeepSpeed's half of the configuration."""
        # Parameters and groups of no round size, so that every rank's part is padded; a strong rate shows faults.
        zero = {"stage": self.stage} | ({"stage3_param_persistence_threshold": 0} if self.stage == 3 else {})
        return {
            "train_micro_batch_size_per_gpu": 6,
            "gradient_accumulation_steps": MICRO_BATCHES // self.ranks,
            "gradient_clipping": 1.0,
            "steps_per_print": 1_000_000_000,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}},
            "scheduler": {
                "type": "WarmupCosineLR",
                "params": {"total_num_steps": 20, "warmup_num_steps": 2, "warmup_type": "linear"},
            },
            "zero_optimization": zero,
            **PRECISIONS[self.precision],
        }

    def __str__(self) -> str:
        return f"{self.ranks} x stage {self.stage}, {self.precision}"


RANKS = [Case(ranks, stage, "fp32") for ranks in (1, 2, 4) for stage in (1, 2, 3)]
KINDS = [Case(2, stage, precision) for precision in PRECISIONS for stage in (1, 2, 3)]
ONE = [Case(1, case.stage, case.precision) for case in KINDS]
UNSHARDED = [Case(ranks, 0, precision) for ranks in (1, 2) for precision in ("fp32", "torch_autocast", "bf16")]
GROUPS: dict[str, tuple[list[Case], list[Case]]] = {
    "Ranks and stages, fp32": (RANKS, RANKS),
    "Precisions and stages, 2 ranks to 1": (KINDS, ONE),
    "Stage 0": (UNSHARDED, UNSHARDED),
}
"""Title of a table: the layouts of its rows, which save, and of its columns, which go on."""


def make_trainer(
    case: Case, inputs: PanelInputs, run_dir: Path, steps: int, distributed: DistributedContext, resume: bool
) -> Trainer:
    """Trainer of the small run."""
    ours = {
        "seed": 5,
        "data": {
            "window_sites": 64,
            "overlap_sites": 16,
            "flank_sites": 32,
            "validation_samples": 6,
            "cache_dir": str(run_dir.parent / "cache"),
        },
        "masking": {"curriculum_steps": 10, "array_spacing_bp": [1000, 3000]},
        "retrieval": {"encoding": "fixed", "k": 16, "backend": "torch"},
        "model": {"dims": 20, "layers": 1, "heads": 2, "dropout": 0.0},
        "train": {
            "max_steps": steps,
            "log_every": 1,
            "eval_every": 1000,
            "checkpoint_every": 1000,
            "workers": 0,
            "frozen": ["confidence"],
        },
        "validation": {"windows": 1, "samples": 6},
    }
    config: RunConfig = parse_config({**case.settings(), "embrag": ours}, "conversions.py")
    return Trainer(config, inputs, run_dir, distributed, resume)


def move_frozen(trainer: Trainer) -> None:
    """Give frozen weights other values than those that every run begins with (collective)."""
    frozen = [weight for weight in trainer.engine.module.parameters() if not weight.requires_grad]
    with deepspeed.zero.GatheredParameters(frozen, modifier_rank=0), torch.no_grad():
        for weight in frozen:
            weight.add_(0.25)


def state_of(trainer: Trainer, moments: bool = True) -> dict[str, Any]:
    """Weights, moments and steps by parameter, and the scheduler's state; whole under every stage (collective).

    Under stage 0 only frozen weights are in it. They are rounded to bf16, as the network may hold them.
    """
    found: dict[str, Any] = {}
    for name, weight in trainer.engine.module.named_parameters():
        if not weight.requires_grad:
            with deepspeed.zero.GatheredParameters([weight]):
                found[name] = weight.detach().bfloat16()
        elif trainer.engine.zero_optimization_stage() and moments:
            found[name] = safe_get_full_fp32_param(weight).clone()
            found |= {f"{name} {kind}": safe_get_full_optimizer_state(weight, kind).clone() for kind in MOMENTS}
    steps = {float(each["step"]) for each in trainer.engine.optimizer.state.values()}
    return found | {"steps": steps, "rate": trainer.engine.get_lr(), "global steps": trainer.engine.global_steps}


@dataclass(frozen=True)
class Job:
    """A run of ``steps`` steps in ``folder``, from its beginning or, with ``resume``, from the checkpoint there.

    ``state`` is a file for the state at the run's end or, with ``resume``, the one to compare with, without moments if
    ``plain``: DeepSpeed gives none after it has loaded its own files. The result is a file of JSON beside ``folder``.
    """

    case: dict[str, Any]
    folder: str
    steps: int
    resume: bool = False
    state: str | None = None
    plain: bool = False

    def result(self) -> Path:
        """Path of the result."""
        return Path(f"{self.folder}.json")


def work(jobs: list[Job], data: Path) -> None:
    """Train every job, one after the other, as one rank of the process group."""
    torch.set_num_threads(1)
    engine_settings.cpu_has_bf16 = lambda: True  # slow without the instructions, but the same numbers
    distributed = start_distributed()
    files = PanelFiles(data / "panel.vcf.gz", data / "genetic.map", data / "samples.tsv")
    inputs = open_inputs(files, DataConfig(cache_dir=str(data.parent / "cache")))
    for job in jobs:
        try:
            result = train(job, inputs, distributed)
        except Exception as fault:
            logger.exception("%s", job.folder)
            result = {"fault": f"{type(fault).__name__}: {' '.join(str(fault).split())[:300]}"}
        if distributed.is_main:
            write_json(job.result(), result)
    distributed.close()


def train(job: Job, inputs: PanelInputs, distributed: DistributedContext) -> dict[str, Any]:
    """Train a job; returns its losses and learning rates, and what of its state differs from the one that was saved."""
    try:
        trainer = make_trainer(Case(**job.case), inputs, Path(job.folder), job.steps, distributed, job.resume)
    except UserError as fault:
        return {"refused": str(fault)}
    differing = None
    if job.resume:
        saved = torch.load(job.state or "", weights_only=True)
        now = state_of(trainer, moments=not job.plain)
        differing = [key for key in saved if key in now and not _equal(saved[key], now[key])]
    else:
        move_frozen(trainer)
    trainer.run()
    if not job.resume and job.state is not None:
        state = state_of(trainer)
        if distributed.is_main:
            torch.save(state, job.state)
    lines = [line for line in read_metrics(Path(job.folder) / "metrics.jsonl") if line["kind"] == "train"]
    losses, rates = ([line[key] for line in lines] for key in ("loss", "learning_rate"))
    return {"losses": losses, "rates": rates, "differing": differing}


def _equal(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if torch.is_tensor(one) else bool(one == other)


def run_jobs(jobs: list[Job], out: Path) -> None:
    """Run the jobs of every number of ranks in one start of as many processes."""
    for ranks in sorted({job.case["ranks"] for job in jobs}):
        listed = out / f"jobs-{ranks}.json"
        write_json(listed, [asdict(job) for job in jobs if job.case["ranks"] == ranks])
        group = {"WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "OMP_NUM_THREADS": 1}
        started = []
        for rank in range(ranks):
            place = {name: str(value) for name, value in {**group, "RANK": rank, "LOCAL_RANK": rank}.items()}
            with (out / f"ranks-{ranks}-{rank}.log").open("a") as log:
                command = [sys.executable, __file__, "--out", str(out), "--work", str(listed)]
                started.append(subprocess.Popen(command, env=os.environ | place, stdout=log, stderr=log))
        if any([process.wait() for process in started]):
            raise UserError(f"{out}/ranks-{ranks}-0.log: a rank has failed, and this says why")


def compare(out: Path, steps: int) -> dict[str, list[dict[str, Any]]]:
    """Train, and go on, for every pair of every table; returns the pairs by table."""
    cases = dict.fromkeys(case for rows, _ in GROUPS.values() for case in rows)
    names = {case: f"then-{number}" for number, case in enumerate(cases)}
    whole = {case: Job(asdict(case), str(out / f"whole-{name}"), 2 * steps) for case, name in names.items()}
    half = {case: Job(asdict(case), str(out / name), steps, state=f"{out / name}.pt") for case, name in names.items()}
    run_jobs([*whole.values(), *half.values()], out)
    results: dict[str, list[dict[str, Any]]] = {}
    resumed: list[tuple[dict[str, Any], Case, Job]] = []
    for title, (rows, columns) in GROUPS.items():
        results[title] = []
        for then, now in product(rows, columns):
            pair: dict[str, Any] = {"then": str(then), "now": str(now)}
            results[title].append(pair)
            folder = out / f"go-on-{len(resumed)}"
            shutil.copytree(half[then].folder, folder)
            plain = not needs_conversion(*(layout_of(case.settings(), case.ranks) for case in (then, now)))
            resumed.append((pair, then, Job(asdict(now), str(folder), 2 * steps, True, half[then].state, plain)))
    run_jobs([job for *_, job in resumed], out)
    for pair, then, job in resumed:
        expected, found = (json.loads(each.result().read_text(encoding="utf-8")) for each in (whole[then], job))
        pair |= {key: found[key] for key in ("fault", "refused") if key in found}
        if "losses" in found:
            later = zip(found["losses"][steps:], expected["losses"][steps:], strict=True)
            pair["difference"] = max(abs(one - other) / abs(other) for one, other in later)
            pair["differing"] = found["differing"] + ["rates"] * (found["rates"] != expected["rates"])
    return results


def cell(pair: dict[str, Any]) -> str:
    """What the table says of a pair."""
    if "refused" in pair:
        return "refused"
    if "fault" in pair:
        return "**fails**"
    return f"{pair['difference']:.0e}" + f" (**{len(pair['differing'])} differ**)" * bool(pair["differing"])


def report(results: dict[str, list[dict[str, Any]]], steps: int) -> str:
    """The tables, in Markdown."""
    lines = [
        f"# Resuming under another layout ({date.today().isoformat()})",
        "",
        f"Largest relative difference of the losses of steps {steps + 1} to {2 * steps} from those of the run that was "
        f"not interrupted and kept the layout of the row; the column goes on. {MICRO_BATCHES} micro-batches a step. "
        "Weights, moments, steps, learning rates and frozen weights are those that were saved, to the last bit, but "
        "where a cell says how many are not.",
    ]
    for title, pairs in results.items():
        columns = list(dict.fromkeys(pair["now"] for pair in pairs))
        lines += ["", f"## {title}", "", "| then | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
        for then in dict.fromkeys(pair["then"] for pair in pairs):
            lines.append(f"| {then} | " + " | ".join(cell(pair) for pair in pairs if pair["then"] == then) + " |")
        lines += ["", *(f"- {pair['fault']}" for pair in pairs if "fault" in pair)]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    """Run what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder for the tables, the runs and their panel")
    parser.add_argument("--steps", type=int, default=3, help="steps before and after the conversion (default 3)")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    data = options.out / "data"
    if options.work:
        work([Job(**each) for each in json.loads(options.work.read_text(encoding="utf-8"))], data)
        return
    make_folder(options.out)
    settings = SimulationSettings(
        length_bp=150_000, panel_samples=60, target_samples=9, typed_spacing_bp=2_000, seed=11
    )
    simulate_default(data, settings)
    results = compare(options.out, options.steps)
    write_json(options.out / "conversions.json", results)
    text = report(results, options.steps)
    write_text(options.out / "conversions.md", text)
    sys.stdout.write(text)


if __name__ == "__main__":
    run_command(main)
