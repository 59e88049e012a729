"""Settings of an adaptation, and the number of its steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from embrag_ds.errors import UserError
from embrag_ds.model.settings import ModelConfig

Adapt = Literal["auto", "off"] | float
"""How long to adapt: ``auto`` for as many steps as usually pay, ``off`` for none, or minutes of two cores."""
AUTO_MINUTES = 1.0
"""Minutes of two cores that ``auto`` takes at most for its steps."""
_MOST_STEPS_AUTO = 300
"""Steps after which more of them added less than .001 of r2 (docs/log.md)."""
LEAST_STEPS = 20
"""Steps below which nothing is worth moving."""
_MOST_PASSES = 15
"""Passes over a panel's batches: with 150 a small panel was learnt by heart (docs/log.md)."""
_MOST_MINUTES = 60 * 24
# Seconds of a step on two cores of a server from 2022, measured: of every step, and of its work.
_OVERHEAD_S = 0.03
_PER_COPYING_CELL_S = 4.6e-9
_PER_CORE_CELL_S = 8e-6
_PER_PANEL_CELL_S = 1e-8
_PER_PRODUCT_S = 1 / 5e10
_GPU_TIMES_AS_FAST = 20
"""An assumption: no GPU has run this."""


@dataclass(frozen=True)
class StepSize:
    """Sizes that decide what an optimiser step takes.

    ``rows`` is the number of query haplotypes in a batch, ``haplotypes`` that of the reference set, and ``neighbours``
    that of retrieved haplotypes for each query. ``typed`` and ``core`` are the mean numbers of typed sites in a window,
    and of sites in its core.
    """

    rows: int
    haplotypes: int
    typed: float
    neighbours: int
    core: float

    def seconds(self, model: ModelConfig | None, device: str) -> float:
        """Expected seconds on two cores or, with the ``device`` cuda, on a GPU.

        ``model`` describes the network; None stands for a step without the transformer.
        """
        copying = self.rows * self.typed * self.neighbours * _PER_COPYING_CELL_S
        cells = self.rows * self.core
        products = 0.0
        if model is not None:
            products = 6 * model.block_weights * cells * _PER_PRODUCT_S
        panel = self.core * self.haplotypes * _PER_PANEL_CELL_S
        seconds = _OVERHEAD_S + copying + panel + cells * _PER_CORE_CELL_S + products
        return seconds / _GPU_TIMES_AS_FAST if device == "cuda" else seconds


def steps_within(adapt: Adapt, seconds: float, batches: int) -> int:
    """Number of steps that ``adapt`` asks for, where each takes so many seconds; 0 for too few to be of use.

    A panel has so many different ``batches``, each of which is learnt from a limited number of times.
    It depends on sizes alone, so that a run repeats exactly.
    """
    if adapt == "off":
        return 0
    minutes = AUTO_MINUTES if adapt == "auto" else float(adapt)
    steps = int(60 * minutes / seconds)
    if adapt == "auto":
        steps = min(steps, _MOST_STEPS_AUTO)
    steps = min(steps, _MOST_PASSES * batches)
    return steps if steps >= LEAST_STEPS else 0


def least_minutes(seconds: float) -> int:
    """Whole minutes that are enough for an adaptation whose steps take so many seconds."""
    return math.ceil(LEAST_STEPS * seconds / 60)


def parse_adapt(given: str | float) -> Adapt:
    """Read ``auto``, ``off`` or a number of minutes; raises :class:`UserError` for anything else."""
    if given == "auto":
        return "auto"
    if given == "off":
        return "off"
    try:
        minutes = float(given)
    except ValueError:
        minutes = float("nan")
    if not 0 < minutes <= _MOST_MINUTES:
        raise UserError(
            f"--adapt {given}: give auto, off, or minutes of two cores, more than 0 and at most a day's 1440"
        )
    return minutes
