"""Simulate a panel, targets, map and sample table: ``python launch/simulate.py --out DIR``."""

from __future__ import annotations

import argparse
from pathlib import Path

from embrag_ds.data.simulate import POPULATIONS, SimulationSettings, simulate_default
from embrag_ds.errors import UserError
from embrag_ds.launching import run_main


def parse_arguments() -> argparse.Namespace:
    default = SimulationSettings()
    parser = argparse.ArgumentParser(description="Simulate three human populations (out-of-Africa model).")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder, or one made by this")
    parser.add_argument("--length-bp", type=int, default=default.length_bp, help="region (%(default)s)")
    parser.add_argument("--panel-people", type=int, default=default.panel_people, help="(%(default)s)")
    parser.add_argument("--target-people", type=int, default=default.target_people, help="(%(default)s)")
    parser.add_argument("--typed-spacing-bp", type=int, default=default.typed_spacing_bp, help="array (%(default)s)")
    parser.add_argument("--switch-errors-per-mb", type=float, default=0.0, help="phasing errors a person (0)")
    parser.add_argument("--missed-calls", type=float, default=0.0, help="share of minor alleles not called (0)")
    parser.add_argument(
        "--call-set-copies",
        type=int,
        default=default.call_set_copies,
        help="minor alleles in panel and targets that a site needs (%(default)s)",
    )
    parser.add_argument("--cm-per-mb", type=float, default=default.cm_per_mb, help="recombination (%(default)s)")
    parser.add_argument("--demography", choices=POPULATIONS, default=default.demography, help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=default.seed)
    return parser.parse_args()


def main() -> None:
    arguments = vars(parse_arguments())
    out = arguments.pop("out")
    for name in ("length_bp", "panel_people", "target_people", "typed_spacing_bp"):
        if arguments[name] < 3:
            raise UserError(f"--{name.replace('_', '-')} must be at least 3")
    if arguments["switch_errors_per_mb"] < 0:
        raise UserError("--switch-errors-per-mb must not be negative")
    if not 0 <= arguments["missed_calls"] < 1:
        raise UserError("--missed-calls must lie in [0, 1)")
    if arguments["cm_per_mb"] <= 0:
        raise UserError("--cm-per-mb must be positive")
    data = simulate_default(out, SimulationSettings(**arguments))
    print(f"panel {data.panel}, target {data.target}, truth {data.truth}, map {data.genetic_map}")


if __name__ == "__main__":
    run_main(main)
