"""The command ``embrag simulate``."""

from __future__ import annotations

import argparse
import logging
from dataclasses import fields
from pathlib import Path

from embrag_ds.data.simulate import POPULATIONS, SimulationSettings, simulate_default

logger = logging.getLogger(__name__)

DESCRIPTION = "Simulate a panel, targets with their truth, a map and a sample table."
USAGE = "--out DIR"
EXAMPLES = """\
  embrag simulate --out DIR
      a panel of 750 samples and 60 targets on 1 Mb
  embrag simulate --out DIR --demography american-admixture --switch-errors-per-mb 0.5 --missed-calls 0.01
      four populations, with errors of phasing and calling
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    default = SimulationSettings()
    output = parser.add_argument_group("output")
    output.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder, or one made by this")
    size = parser.add_argument_group("size")
    size.add_argument("--length-bp", type=int, metavar="BP", default=default.length_bp, help="region (%(default)s)")
    size.add_argument("--panel-samples", type=int, metavar="N", default=default.panel_samples, help="(%(default)s)")
    size.add_argument("--target-samples", type=int, metavar="N", default=default.target_samples, help="(%(default)s)")
    size.add_argument(
        "--typed-spacing-bp", type=int, metavar="BP", default=default.typed_spacing_bp, help="array (%(default)s)"
    )
    errors = parser.add_argument_group("errors and filters of the call set")
    errors.add_argument(
        "--switch-errors-per-mb", type=float, metavar="RATE", default=0.0, help="phasing errors a sample (0)"
    )
    errors.add_argument(
        "--missed-calls", type=float, metavar="SHARE", default=0.0, help="share of minor alleles not called (0)"
    )
    errors.add_argument(
        "--call-set-copies",
        type=int,
        default=default.call_set_copies,
        help="minor alleles in panel and targets that a site needs (%(default)s)",
    )
    history = parser.add_argument_group("ancestry")
    history.add_argument(
        "--cm-per-mb", type=float, metavar="RATE", default=default.cm_per_mb, help="recombination (%(default)s)"
    )
    history.add_argument("--demography", choices=POPULATIONS, default=default.demography, help="(%(default)s)")
    history.add_argument("--seed", type=int, metavar="N", default=default.seed, help="of the simulation (%(default)s)")


def run(options: argparse.Namespace) -> None:
    """Run the command with parsed options; raises :class:`UserError`."""
    arguments = {field.name: getattr(options, field.name) for field in fields(SimulationSettings)}
    data = simulate_default(options.out, SimulationSettings(**arguments))
    logger.info("panel %s, target %s, truth %s, map %s", data.panel, data.target, data.truth, data.genetic_map)
