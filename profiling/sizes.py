"""Time and memory of imputation against the sizes of its input, beside Beagle and minimac4, with a fitted model.

    python profiling/sizes.py --out FOLDER [--cases NAME ...] [--rounds N]

Each case is simulated (growth, 1 cM/Mb) into FOLDER/data, unless it is there, and every tool imputes it as
``profiling/bench_impute.py`` has it, without the transformer and without adaptation. FOLDER gets sizes.md and
sizes.json. The model of our time and memory is linear in what the work consists of, fitted by least squares with
coefficients that are not negative.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_impute import Cost, measure

from embrag_ds.cli.command import run_command
from embrag_ds.data.simulate import SimulationSettings, simulate_default
from embrag_ds.files import make_folder, write_json, write_text
from embrag_ds.runs.record import device_name
from embrag_ds.variants.records import VariantReader

logger = logging.getLogger("embrag_ds.profiling.sizes")


@dataclass(frozen=True)
class Case:
    """Samples of the panel and targets, length in Mb, and spacing of the array in bp."""

    panel: int
    targets: int
    mb: float = 1.0
    spacing: int = 4000


CASES = {
    "base": Case(4000, 100),
    "panel 1,000": Case(1000, 100),
    "panel 20,000": Case(20000, 100),
    "panel 50,000": Case(50000, 100),
    "targets 10": Case(4000, 10),
    "targets 250": Case(4000, 250),
    "targets 2,000": Case(4000, 2000),
    "dense": Case(4000, 100, spacing=1200),
    "4 Mb": Case(4000, 100, mb=4.0),
}
"""Each differs from the first in one size."""


@dataclass(frozen=True)
class Measured:
    """Sizes of a case (H haplotypes, S sites, T typed sites, N targets), and each tool's cost."""

    haplotypes: int
    sites: int
    typed: int
    targets: int
    costs: dict[str, Cost]


TERMS: dict[str, Callable[[Measured], float]] = {
    "start": lambda each: 1.0,
    "H S / 1e9": lambda each: each.haplotypes * each.sites / 1e9,
    "N T H / 1e9": lambda each: each.targets * each.typed * each.haplotypes / 1e9,
    "N S / 1e6": lambda each: each.targets * each.sites / 1e6,
}
"""What our time consists of: start, reading and packing the panel, states of the copying model, and output."""
MEMORY_TERMS: dict[str, Callable[[Measured], float]] = {
    "start": lambda each: 1.0,
    "H S / 1e9": TERMS["H S / 1e9"],
    "N S / 1e6": TERMS["N S / 1e6"],
}
VCF, PACKED = "embrag_ds cpu", "embrag_ds cpu, panel packed"


def measured(case: Case, folder: Path, options: argparse.Namespace) -> Measured:
    """Simulate a case where it is not there, and measure every tool on it."""
    settings = SimulationSettings(
        length_bp=int(case.mb * 1e6),
        panel_samples=case.panel,
        target_samples=case.targets,
        typed_spacing_bp=case.spacing,
        demography="growth",
    )
    made = simulate_default(folder, settings)
    given = argparse.Namespace(
        panel=made.panel,
        target=made.target,
        map=made.genetic_map,
        run_dir=None,
        no_transformer=True,
        rounds=options.rounds,
        threads=options.threads,
    )
    with tempfile.TemporaryDirectory() as scratch:
        costs = measure(given, Path(scratch))
    counts = []
    for path in (made.panel, made.target):
        with VariantReader(path) as vcf:
            counts.append(sum(1 for _ in vcf.sites()))
    return Measured(2 * case.panel, counts[0], counts[1], case.targets, costs)


def fitted(found: list[Measured], values: list[float], terms: dict[str, Callable[[Measured], float]]) -> dict[str, Any]:
    """Coefficients of a model of ``values``, and the largest relative deviation from it.

    Every case counts by its relative error, so that large ones do not decide alone. Terms whose coefficient would be
    negative are left out.
    """
    design = np.array([[term(each) for term in terms.values()] for each in found])
    wanted = np.array(values)
    coefficients = np.full(len(terms), -1.0)
    kept = np.ones(len(terms), dtype=bool)
    while (coefficients < 0).any():
        coefficients = np.zeros(len(terms))
        weighed = design[:, kept] / wanted[:, None]
        coefficients[kept] = np.linalg.lstsq(weighed, np.ones(len(wanted)), rcond=None)[0]
        kept &= coefficients >= 0
    apart = float(np.abs(design @ coefficients / wanted - 1).max())
    return {"coefficients": dict(zip(terms, coefficients.tolist(), strict=True)), "largest_deviation": apart}


def seconds(each: Measured, name: str) -> float:
    """Median seconds of a tool."""
    return float(np.median(each.costs[name].seconds))


def table(found: dict[str, Measured]) -> str:
    """Markdown table of times and memory."""
    names = list(next(iter(found.values())).costs)
    names = [name for name in names if not name.endswith("first run")]
    lines = [f"| case | H | S | T | N | {' | '.join(names)} |", "|---" * (5 + len(names)) + "|"]
    for case, each in found.items():
        cells = [f"{seconds(each, name):.1f} s, {each.costs[name].peak_gb:.2f} GB" for name in names]
        sizes = (f"{size:,}" for size in (each.haplotypes, each.sites, each.typed, each.targets))
        lines.append(f"| {case} | {' | '.join([*sizes, *cells])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of imputation against sizes.")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    make_folder(options.out)
    found: dict[str, Measured] = {}
    for name in options.cases:
        logger.info("case %s", name)
        folder = options.out / "data" / name.replace(" ", "-").replace(",", "")
        found[name] = measured(CASES[name], folder, options)
        models = {
            kind: fitted(list(found.values()), [value(each) for each in found.values()], terms)
            for kind, value, terms in (
                ("seconds from the VCF", lambda each: seconds(each, VCF), TERMS),
                ("seconds from the packed panel", lambda each: seconds(each, PACKED), TERMS),
                ("peak GB", lambda each: each.costs[VCF].peak_gb, MEMORY_TERMS),
            )
        }
        result = {
            "date": date.today().isoformat(),
            "device": device_name(torch.device("cpu")),
            "threads": options.threads,
            "cases": {case: asdict(each) for case, each in found.items()},
            "models": models,
        }
        write_json(options.out / "sizes.json", result)  # after every case: a run may be cut off
        text = table(found)
        for kind, model in models.items():
            sums = " + ".join(f"{value:.3g} x ({term})" for term, value in model["coefficients"].items())
            text += f"\n{kind} = {sums}; largest deviation {model['largest_deviation']:.0%}\n"
        write_text(options.out / "sizes.md", text)
    sys.stdout.write((options.out / "sizes.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    run_command(main)
