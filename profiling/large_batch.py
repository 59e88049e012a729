"""The rule of ``ds_configs/v18_large_batch.json`` at reduced width: a small and a large batch at equal samples seen.

    DS_ACCELERATOR=cpu python profiling/large_batch.py --out FOLDER [--panel VCF --map MAP --samples TSV]

``ds_configs/v18.json``, made small by ``REDUCED``, trains with a global batch of 32 samples, and with one of 512 by the
rule: square-root learning rate, and everything that counts steps divided by 16. Both see the same micro-batches in the
same order, and are validated after the same numbers of samples. Controls train the large batch at the small one's
learning rate, and at 16 times it. FOLDER gets large_batch.md, large_batch.json, large_batch.png and the run folders.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from training_runs import ROOT, add_inputs, trained

from embrag_ds.cli.command import run_command
from embrag_ds.files import make_folder, write_json, write_text, written

logger = logging.getLogger("embrag_ds.profiling.large_batch")

CONFIG = ROOT / "ds_configs" / "v18.json"
REDUCED: dict[str, Any] = {
    # fp32, so that rounding does not mix with what the batch does.
    "bf16.enabled": False,
    "data_types": {},
    "optimizer.params.fused": None,
    "embrag.data.window_sites": 256,
    "embrag.data.overlap_sites": 32,
    "embrag.data.flank_sites": 512,
    "embrag.retrieval.k": 32,
    "embrag.retrieval.backend": "torch",
    "embrag.model.dims": 32,
    "embrag.model.layers": 1,
    "embrag.model.heads": 2,
    "embrag.train.patience": None,
    "embrag.train.keep_checkpoints": 1,
    "embrag.validation.windows": 8,
}
"""Settings that make v18.json small enough for a CPU."""
SHARES = {"warmup": 0.04, "curriculum": 0.1, "refresh": 0.05}
"""Shares of a run that v18_large_batch.json gives to the warm-up and the curriculum, and between two refreshes."""
RULES: dict[str, Callable[[float], float]] = {
    "square root": math.sqrt,
    "not scaled": lambda factor: 1.0,
    "linear": lambda factor: factor,
}
"""What multiplies the learning rate where the batch grows by a factor."""


@dataclass(frozen=True)
class Variant:
    """A way to train: samples a step, and the learning rate's rule."""

    batch: int
    rule: str
    learning_rate: float

    @property
    def name(self) -> str:
        """Text for tables, plots and folders."""
        return f"{self.batch}, {self.learning_rate:g} ({self.rule})"


@dataclass(frozen=True)
class Curve:
    """A run's curve: after ``samples`` [n] samples, the validation ``score`` [n], r2 below 1 % MAF under the sparse
    array mask (``rare_r2`` [n]), and the mean training ``loss`` [n] of the samples since the point before.
    ``prior_r2`` is the last r2 below 1 % MAF of retrieval alone, ``seconds`` the time of the whole process.
    """

    samples: list[int]
    score: list[float]
    rare_r2: list[float]
    loss: list[float]
    prior_r2: float
    seconds: float


def settings(variant: Variant, options: argparse.Namespace) -> dict[str, Any]:
    """Settings of a run: what counts steps is the same number of samples for every batch."""
    small, large = options.batches
    steps, many = options.steps * large // variant.batch, large // variant.batch
    counted = {name: math.ceil(share * options.steps) * many for name, share in SHARES.items()}
    return {
        "train_micro_batch_size_per_gpu": small,
        "gradient_accumulation_steps": variant.batch // small,
        "optimizer.params.lr": variant.learning_rate,
        "scheduler.params.total_num_steps": steps,
        "scheduler.params.warmup_num_steps": counted["warmup"],
        "embrag.masking.curriculum_steps": counted["curriculum"],
        # Published after one step of the large batch.
        "embrag.retrieval.refresh": {"every_steps": counted["refresh"], "lag_steps": many},
        "embrag.train.max_steps": steps,
        "embrag.train.log_every": many,
        "embrag.train.eval_every": options.steps // options.validations * many,
        "embrag.train.checkpoint_every": steps,
    }


def curve(lines: list[dict[str, Any]], batch: int, seconds: float) -> Curve:
    """Curve of a run from its metrics; ``batch`` is its samples a step."""
    losses: list[float] = []
    found = Curve([], [], [], [], 0.0, seconds)
    prior = math.nan
    for line in lines:
        if line["kind"] == "train":
            losses.append(line["loss"])  # all intervals are equally long
        elif line["kind"] == "validation":
            sparse = line["array-sparse-2"]
            found.samples.append(line["step"] * batch)
            found.score.append(line["score"])
            found.rare_r2.append(sparse["r2"]["all <1 %"])
            found.loss.append(sum(losses) / len(losses))
            prior, losses = sparse["prior_r2"]["all <1 %"], []
    return Curve(**{**asdict(found), "prior_r2": prior})


def _cell(values: list[float], digits: int) -> str:
    """Mean and range, as in ``.801 (.799 to .804)``."""
    mean = f"{sum(values) / len(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _later(values: list[float]) -> float:
    """Mean of the second half."""
    half = values[len(values) // 2 :]
    return sum(half) / len(half)


def table(found: dict[str, dict[int, Curve]]) -> str:
    """Markdown tables: score, loss and r2 below 1 % MAF against samples seen, the mean over seeds and their range."""
    names = [f"{name}, {len(runs)} seed{'s' * (len(runs) > 1)}" for name, runs in found.items()]
    points = next(iter(next(iter(found.values())).values())).samples
    parts: list[str] = []
    for title, field, digits in (
        ("Validation score", "score", 4),
        ("Mean training loss since the line before", "loss", 5),
        ("r2 below 1 % MAF, sparse array mask", "rare_r2", 4),
    ):
        parts += [f"{title}:", "", f"| samples seen | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
        for place, samples in enumerate(points):
            cells = [_cell([getattr(each, field)[place] for each in runs.values()], digits) for runs in found.values()]
            parts.append(f"| {samples:,} | {' | '.join(cells)} |")
        parts.append("")
    first = next(iter(found))
    parts += [f"Beside {first}, same seed and same samples, in the second half of the run:", ""]
    parts += ["| | score, difference of the means | training loss, ratio |", "|---|---|---|"]
    for name, runs in list(found.items())[1:]:
        pairs = [(each, found[first][seed]) for seed, each in runs.items()]
        scores = (_later(each.score) - _later(base.score) for each, base in pairs)
        ratios = (_later(each.loss) / _later(base.loss) for each, base in pairs)
        shown = (", ".join(map("{:+.4f}".format, scores)), ", ".join(map("{:.3f}".format, ratios)))
        parts.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(parts) + "\n"


def draw(found: dict[str, dict[int, Curve]], path: Path) -> None:
    """Plot score and loss against samples seen: the mean over seeds, and their range as a band."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for axes, field, label in zip(panels, ("score", "loss"), ("validation score", "training loss"), strict=True):
        for name, runs in found.items():
            samples = next(iter(runs.values())).samples
            columns = list(zip(*(getattr(each, field) for each in runs.values()), strict=True))
            (line,) = axes.plot(samples, [sum(each) / len(each) for each in columns], "o-", markersize=3, label=name)
            low, high = ([pick(each) for each in columns] for pick in (min, max))
            axes.fill_between(samples, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
        axes.set(xlabel="samples seen", ylabel=label)
    panels[0].legend(title="batch, learning rate", fontsize=7, title_fontsize=7)
    with written(path) as temporary:
        figure.savefig(temporary, dpi=100)
    plt.close(figure)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A small and a large batch at equal samples seen.")
    parser.add_argument("--batches", type=int, nargs=2, default=[32, 512], metavar=("SMALL", "LARGE"))
    parser.add_argument("--steps", type=int, default=36, metavar="N", help="of the large batch")
    parser.add_argument("--validations", type=int, default=6, metavar="N")
    parser.add_argument("--learning-rate", type=float, default=0.002, help="of the small batch")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--controls", nargs="*", choices=("not scaled", "linear"), default=["not scaled", "linear"])
    parser.add_argument("--control-seeds", type=int, nargs="+", default=[1])
    add_inputs(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    options = parser.parse_args()
    options.set = [*(f"{key}={json.dumps(value)}" for key, value in REDUCED.items()), *options.set]
    small, large = options.batches
    if small < 1 or large % small or large == small:
        parser.error("--batches: LARGE must be a multiple of SMALL")
    if options.validations < 1 or options.steps % options.validations:
        parser.error("--steps must be a multiple of --validations")
    return options


def planned(options: argparse.Namespace) -> list[tuple[Variant, int]]:
    """Runs, with their seeds, in the order in which they are trained."""
    small, large = options.batches
    rate = options.learning_rate

    def of_large(rule: str) -> Variant:
        return Variant(large, rule, float(f"{rate * RULES[rule](large / small):.4g}"))

    pair = (Variant(small, "base", rate), of_large("square root"))
    runs = [(variant, seed) for seed in options.seeds for variant in pair]
    return runs + [(of_large(rule), seed) for rule in options.controls for seed in options.control_seeds]


def main() -> None:
    options = parse_arguments()
    make_folder(options.out)
    found: dict[str, dict[int, Curve]] = {}
    for number, (variant, seed) in enumerate(planned(options), start=1):
        logger.info(f"run {number} of {len(planned(options))}: {variant.name}, seed {seed}")
        began = time.monotonic()
        folder = options.out / f"{variant.batch}-{variant.rule.replace(' ', '-')}-seed{seed}"
        lines = trained(CONFIG, folder, {**settings(variant, options), "embrag.seed": seed}, options)
        found.setdefault(variant.name, {})[seed] = curve(lines, variant.batch, time.monotonic() - began)
        result = {
            "date": date.today().isoformat(),
            "command": " ".join(sys.argv),
            "set": options.set,
            "shares": SHARES,
            "runs": {name: {seed: asdict(each) for seed, each in runs.items()} for name, runs in found.items()},
        }
        write_json(options.out / "large_batch.json", result)
        write_text(options.out / "large_batch.md", table(found))
    draw(found, options.out / "large_batch.png")
    sys.stdout.write(table(found))


if __name__ == "__main__":
    run_command(main)
