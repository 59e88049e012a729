"""Comparison of V17 and V18: time, memory and the largest batch, measured in one run.

    python profiling/compare.py [--deepspeed_config ds_configs/v18.json] --out FOLDER [--json FILE]

The variants of one configuration (some of them with --variants) share data, masks, width and batch:

- no retrieval;
- V17: the nearest haplotype by tokens goes through the transformer too and is fused after it;
- V18, fused before a single pass, with the encodings fixed, refresh and live;
- V18 lean: projections are recomputed in the backward pass, which gives part of the time saved over V17 for memory.

Each variant trains in a process of its own. They take turns, one block of steps at a time, and ratios are medians over
rounds of neighbouring blocks. Then the largest batch of V17 and V18 is found by bisection. Its limit is the GPU's
memory or, on a CPU, --budget-gb for all of the run but the libraries. FOLDER gets compare.md, compare.json and
compare.png.
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import torch
from compare_report import Measured, draw, markdown
from machine import on_gpu
from stepper import Block, Built, Recipe, Stepper, alternating

from embrag_ds.cli.command import run_command
from embrag_ds.config import RunConfig
from embrag_ds.data.inputs import PanelFiles
from embrag_ds.engine.deepspeed_settings import load_training_config
from embrag_ds.engine.distributed import adapt_to_machine
from embrag_ds.errors import UserError
from embrag_ds.files import make_folder, require_writable, write_json, write_text
from embrag_ds.runs.record import device_name, package_versions
from embrag_ds.training.throughput import matrix_rate, step_flops

logger = logging.getLogger("embrag_ds.profiling.compare")

ROOT = Path(__file__).resolve().parent.parent
GB = 1e9
BASELINE, FIXED, CHOSEN = "V17", "V18 fixed", "V18 refresh"
PROJECTIONS_AGAIN = "embrag.train.recompute_projections=true"
LEAN = ", lean"


def variants(steps: int) -> dict[str, tuple[str, ...]]:
    """Variants that can be compared: name -> overrides of the configuration, with a refresh due in every block."""
    embedding = "embrag.retrieval.mode=embedding"
    refresh = f'embrag.retrieval.refresh={{"every_steps": {steps}, "lag_steps": {min(4, steps - 1)}}}'
    chosen = (embedding, "embrag.retrieval.encoding=refresh", refresh)
    return {
        "no retrieval": ("embrag.retrieval.mode=none",),
        BASELINE: ("embrag.retrieval.mode=token",),
        FIXED: (embedding, "embrag.retrieval.encoding=fixed"),
        CHOSEN: chosen,
        CHOSEN + LEAN: (*chosen, PROJECTIONS_AGAIN),
        "V18 live": (embedding, "embrag.retrieval.encoding=live"),
    }


VARIANTS = list(variants(steps=2))
RECOMPUTED = ", recomputed"
TWO_NEIGHBOURS = ", 2 neighbours"
LARGEST: dict[str, dict[str, tuple[str, ...]]] = {
    BASELINE: {
        "": (),
        LEAN: (PROJECTIONS_AGAIN,),
        RECOMPUTED: ("activation_checkpointing={}",),
        TWO_NEIGHBOURS: ("embrag.retrieval.token_k=2",),
    },
    CHOSEN: {"": (), LEAN: (PROJECTIONS_AGAIN,), RECOMPUTED: ("activation_checkpointing={}",)},
}
"""Variants whose largest batch is sought, with further overrides. In V18 more neighbours change nothing."""


def parse_arguments() -> argparse.Namespace:
    fast = on_gpu()
    parser = argparse.ArgumentParser(description="V17 beside V18: time, memory and the largest batch.")
    parser.add_argument("--deepspeed_config", type=Path, default=ROOT / "ds_configs" / "v18.json", metavar="JSON")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of every variant; repeatable")
    parser.add_argument("--panel", type=Path, help="default: the embedded one")
    parser.add_argument("--map", type=Path)
    parser.add_argument("--samples", type=Path)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS, help="default: all")
    parser.add_argument("--micro-batch", type=int, default=16 if fast else 4, metavar="N", help="samples")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10 if fast else 2, help="in a block")
    parser.add_argument("--budget-gb", type=float, default=4.0, help="what the largest batch may take on a CPU")
    parser.add_argument("--most-samples", type=int, default=4096, help="end of the search for the largest batch")
    parser.add_argument(
        "--deadline", type=float, default=math.inf, metavar="SECONDS", help="after which no further batch is tried"
    )
    parser.add_argument(
        "--only", choices=("time", "largest"), help="time and memory, or the largest batch (default: both)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--json", type=Path, help="the JSON again, in this file")
    options = parser.parse_args()
    if options.rounds < 1 or options.steps < 2 or options.micro_batch < 1:
        parser.error("--rounds and --micro-batch must be at least 1, --steps at least 2")
    return options


@dataclass(frozen=True)
class Largest:
    """Largest batch found: ``samples`` fit. ``settled`` is whether one more is known not to, or not to be wanted."""

    samples: int
    settled: bool


def largest(
    cost: Callable[[int], int | None], budget: float, most: int, late: Callable[[], bool] = lambda: False
) -> Largest:
    """Greatest number of samples, up to ``most``, whose ``cost`` in bytes is known and within ``budget``, or 0.

    No further number is tried once ``late()``.

    The cost must grow with the samples. To try few batches, the first four guesses are where the line through the last
    two costs meets the budget. From the fifth on the bracket is halved, once it has an end. No guess exceeds four times
    a number known to fit: a machine that runs out of memory may kill other processes, too.
    """
    low, high, tried = 0, most + 1, 0
    known: list[tuple[int, int]] = []
    while high - low > 1 and not late():
        guess = _meets(known, budget) if tried < 4 or high > most else (low + high) // 2
        samples = min(max(guess, low + 1), high - 1, max(2, 4 * low))
        used = cost(samples)
        tried += 1
        if used is not None:
            known = sorted([*known, (samples, used)])
        if used is None or used > budget:
            high = samples
        else:
            low = samples
    return Largest(low, high - low == 1)


def _meets(known: list[tuple[int, int]], budget: float) -> int:
    """Samples at which the line through the last two costs meets the budget; without two costs, the next number."""
    if len(known) < 2:
        return len(known) + 1
    (one, small), (other, large) = known[-2:]
    slope = (large - small) / (other - one)
    return int(other + (budget - large) / slope) if slope > 0 else 2 * other


def largest_batch(recipe: Recipe, name: str, budget: float, most: int, late: Callable[[], bool]) -> Largest:
    """Greatest number of samples with which two steps stay within ``budget`` bytes and the GPU's memory.

    Every batch is tried in a process of its own, so that what one leaves behind does not count for the next.
    """

    def cost(samples: int) -> int | None:
        stepper = Stepper(recipe)
        stepper.build(samples)
        block = stepper.steps(2)
        stepper.close()
        used = "out of memory" if block is None else f"{block.peak_bytes / GB:.2f} GB"
        logger.info(f"  {name}: {samples} samples, {used}")
        return None if block is None else block.peak_bytes

    return largest(cost, budget, most, late)


def measure(name: str, stepper: Stepper, blocks: list[Block], built: Built) -> Measured:
    """Sum up a variant's blocks."""
    phases: dict[str, list[float]] = {}
    for span in (span for block in blocks for span in block.spans):
        phases.setdefault(span.name, []).append(1000 * (span.stop_s - span.start_s))
    steps, seconds = sum(block.steps for block in blocks), sum(block.seconds for block in blocks)
    return Measured(
        name=name,
        step_ms=1000 * statistics.median(block.seconds / block.steps for block in blocks),
        samples_per_second=built.samples * steps / seconds,
        activation_gb=statistics.median(block.activation_bytes for block in blocks) / GB,
        peak_gb=max(block.peak_bytes for block in blocks) / GB,
        build_s=built.seconds,
        encoding_s=built.encoding_s,
        phase_ms={phase: sum(taken) / steps for phase, taken in phases.items()},
        memory=stepper.watch(2),
    )


def ratio(one: list[Block] | None, other: list[Block] | None) -> float | None:
    """Median over rounds of the time of ``one`` over that of ``other``; None if one was not measured."""
    if one is None or other is None:
        return None
    return statistics.median(a.seconds / b.seconds for a, b in zip(one, other, strict=True))


@dataclass(frozen=True)
class Timed:
    """Measurements of every variant, by name, over windows of at most ``sites`` sites."""

    measured: dict[str, Measured]
    blocks: dict[str, list[Block]]
    sites: int


def time_variants(recipes: dict[str, Recipe], options: argparse.Namespace) -> Timed:
    """Build every variant, measure them in turns, and sum up."""
    steppers = {name: Stepper(recipe) for name, recipe in recipes.items()}
    built = {}
    for name, stepper in steppers.items():
        built[name] = stepper.build(options.micro_batch)
        logger.info(f"{name}: built in {built[name].seconds:.1f} s")
        stepper.steps(2)  # warm-up
    began = time.monotonic()
    blocks = alternating(steppers, options.rounds, options.steps)
    logger.info(f"{options.rounds} rounds of {options.steps} steps each: {time.monotonic() - began:.0f} s")
    measured = {name: measure(name, steppers[name], blocks[name], built[name]) for name in steppers}
    for stepper in steppers.values():
        stepper.close()
    return Timed(measured, blocks, max(each.sites for each in built.values()))


def largest_batches(
    recipes: dict[str, Recipe], options: argparse.Namespace, device: torch.device, late: Callable[[], bool]
) -> dict[str, Largest]:
    """Largest micro-batch of every variant in :data:`LARGEST`, those without further overrides first."""
    budget = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else options.budget_gb * GB
    found = {}
    sought = [(variant, *way) for variant in LARGEST if variant in recipes for way in LARGEST[variant].items()]
    for variant, suffix, more in sorted(sought, key=lambda each: each[1] != ""):
        name = variant + suffix
        if late():
            logger.warning(f"{name}: not tried, the deadline has passed")
            continue
        recipe = replace(recipes[variant], overrides=(*recipes[variant].overrides, *more))
        found[name] = largest_batch(recipe, name, budget, options.most_samples, late)
        bound = "at most" if found[name].settled else "the deadline has passed: at least"
        logger.info(f"{name}: {bound} {found[name].samples} samples")
    return found


def main() -> None:
    options = parse_arguments()
    config = load_training_config(options.deepspeed_config, options.set)
    if "activation_checkpointing" in config.deepspeed or config.embrag.train.recompute_projections:
        raise UserError(
            "compare.py measures with and without activation_checkpointing and embrag.train.recompute_projections "
            "itself: leave them out"
        )
    ends = time.monotonic() + options.deadline
    make_folder(options.out)
    if options.json:
        require_writable(options.json)
    device = torch.device("cuda" if on_gpu() else "cpu")
    files = PanelFiles(options.panel, options.map, options.samples)
    recipes = {
        name: Recipe(options.deepspeed_config, (*options.set, *overrides), files)
        for name, overrides in variants(options.steps).items()
        if name in options.variants
    }
    settings, _ = adapt_to_machine(config.deepspeed)
    dtype = torch.bfloat16 if settings.get("bf16", {}).get("enabled") else torch.float32
    ceiling = matrix_rate(device, dtype, 8192 if device.type == "cuda" else 2048)
    logger.info(f"matrix products of {dtype}: {ceiling / 1e12:.3g} TFLOP/s")
    timed = None if options.only == "largest" else time_variants(recipes, options)
    sought = (
        {} if options.only == "time" else largest_batches(recipes, options, device, lambda: time.monotonic() > ends)
    )
    batches = {name: each.samples for name, each in sought.items()}
    result = {
        **compared_times(timed, config, options.micro_batch, ceiling),
        "largest_batch_ratio": over(batches.get(CHOSEN), batches.get(BASELINE)),
        "largest_batch_ratio_lean": over(batches.get(CHOSEN + LEAN), batches.get(BASELINE + LEAN)),
        "largest_batch_ratio_v18_lean": over(batches.get(CHOSEN + LEAN), batches.get(BASELINE)),
        "largest_batch_ratio_recomputed": over(batches.get(CHOSEN + RECOMPUTED), batches.get(BASELINE + RECOMPUTED)),
        "largest_batch_ratio_v18_recomputed": over(batches.get(CHOSEN + RECOMPUTED), batches.get(BASELINE)),
        "largest_batch_ratio_2_neighbours": over(batches.get(CHOSEN), batches.get(BASELINE + TWO_NEIGHBOURS)),
        "device": device_name(device),
        "date": date.today().isoformat(),
        "versions": package_versions(),
        "shapes": shapes(config, options),
        "precision": str(dtype).removeprefix("torch."),
        "matrix_tflops": ceiling / 1e12,
        "largest_batch": batches,
        "largest_batch_unsettled": [name for name, each in sought.items() if not each.settled],
        "budget_gb": None if device.type == "cuda" else options.budget_gb,
        "variants": {name: each.as_dict() for name, each in timed.measured.items()} if timed else {},
    }
    for path in [options.out / "compare.json", *([options.json] if options.json else [])]:
        write_json(path, result)
    measured = list(timed.measured.values()) if timed else []
    table = markdown(result, measured)
    write_text(options.out / "compare.md", table)
    if measured:
        draw(measured, result, options.out / "compare.png")
    sys.stdout.write(f"{table}\n")


def compared_times(timed: Timed | None, config: RunConfig, samples: int, ceiling: float) -> dict[str, float | None]:
    """Ratios of time and memory, and V18's model FLOPs utilisation; None for what was not measured."""
    of, blocks, sites = (timed.measured, timed.blocks, timed.sites) if timed else ({}, {}, None)
    memory = {name: each.activation_gb for name, each in of.items()}
    utilisation = None
    if sites and CHOSEN in of:
        operations = step_flops(config.embrag.model, 2 * samples, sites, references=0)
        utilisation = operations / (of[CHOSEN].step_ms / 1000) / ceiling
    return {
        "v18_over_v17_step_time": ratio(blocks.get(CHOSEN), blocks.get(BASELINE)),
        "v18_over_v17_peak_memory": over(memory.get(CHOSEN), memory.get(BASELINE)),
        "lean_v18_over_v17_step_time": ratio(blocks.get(CHOSEN + LEAN), blocks.get(BASELINE)),
        "lean_v18_over_v17_peak_memory": over(memory.get(CHOSEN + LEAN), memory.get(BASELINE)),
        "mfu": utilisation,
        "refresh_over_fixed_step_time": ratio(blocks.get(CHOSEN), blocks.get(FIXED)),
        "sites": sites,
    }


def over(one: float | None, other: float | None) -> float | None:
    """Ratio of two numbers; None if one is missing."""
    return one / other if one is not None and other else None


def shapes(config: RunConfig, options: argparse.Namespace) -> dict[str, int]:
    """Shapes and settings of the comparison."""
    model = config.embrag.model
    return {
        "samples": options.micro_batch,
        "window_sites": config.embrag.data.window_sites,
        "dims": model.dims,
        "layers": model.layers,
        "heads": model.heads,
        "k": config.embrag.retrieval.k,
        "token_k": config.embrag.retrieval.token_k,
        "steps": options.steps,
        "rounds": options.rounds,
    }


if __name__ == "__main__":
    run_command(main)
