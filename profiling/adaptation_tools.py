"""Beagle and minimac4 for the benchmark of adaptation: with their defaults, and tuned on samples held out of the panel.

Tuned are the rate of recombination and the probability of a mismatch, one after the other, in at most eleven runs.
"""

from __future__ import annotations

import logging
import math
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import pysam.bcftools as bcftools
from adaptation_panels import Prepared, hold_out, listed

from embrag_ds.data.programs import run_logged
from embrag_ds.errors import UserError
from embrag_ds.evaluation.external_tools import TOOLS
from embrag_ds.evaluation.score import evaluate
from embrag_ds.files import folder_written, make_folder
from embrag_ds.maps.genetic_map import GeneticMap
from embrag_ds.variants.records import VariantReader

logger = logging.getLogger("embrag_ds.profiling.adaptation")

TUNING_SAMPLES = 40
"""Panel samples held out to tune on, but at most a quarter of them."""
BEAGLE_NE = 100_000
"""Beagle's default effective population size, to which its rate of recombination is proportional."""
MOST_SCALED = 3
"""The rate of recombination is multiplied by at most 10 to this power, and by at least 0.1 to it."""
ERRORS = {"beagle": ((1e-3, 1e-2, 3e-2, 1e-1), (1e-4,)), "minimac4": ((1e-3, 1e-4, 1e-5), (3e-2, 1e-1))}
"""Probabilities of a mismatch in the order in which they are tried: away from the default, or else the other way.

Beagle's default is below all of them in a large panel, minimac4's is 0.01.
"""


@dataclass
class Cost:
    """Seconds by the clock, and of all processors, of finished child processes."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0


@contextmanager
def measured() -> Iterator[Cost]:
    """Yield a :class:`Cost` that is filled in when the block ends."""
    cost = Cost()
    began, used = time.monotonic(), _children()
    yield cost
    cost.seconds, cost.cpu_seconds = time.monotonic() - began, _children() - used


def _children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@dataclass(frozen=True)
class Setting:
    """Factor of the rate of recombination, and probability of a mismatch; None is the tool's default."""

    scale: float | None = None
    error: float | None = None

    def options(self, tool: str) -> list[str]:
        """Options that go to the tool; the factor of minimac4 goes into its map."""
        if tool == "beagle":
            rate = [] if self.scale is None else [f"ne={self.scale * BEAGLE_NE:.0f}"]
            return rate + ([] if self.error is None else [f"err={self.error:g}"])
        return [] if self.error is None else ["--match-error", f"{self.error:g}"]

    def described(self, tool: str) -> str:
        """The setting as it stands in the table."""
        scaled = [f"map x {self.scale:g}"] if tool == "minimac4" and self.scale is not None else []
        return " ".join([*scaled, *self.options(tool)]) or "default"


def tune(score: Callable[[Setting], float], tool: str) -> tuple[Setting, list[tuple[Setting, float]]]:
    """The best setting found, and every one tried with its score; NaN is a setting that the tool cannot run with.

    The rate is multiplied by 10 and by 0.1, and again while that is best. Half a step towards the better neighbour
    follows, and if that is worse, one towards the other. With the best rate, the mismatches are tried in the order of
    :data:`ERRORS` until one is worse.
    """
    tried: dict[Setting, float] = {}

    def is_better(setting: Setting) -> bool:
        """Whether the setting, which is tried, is better than all before it."""
        best = max(tried.values(), default=-math.inf)
        found = score(setting)
        tried[setting] = -math.inf if math.isnan(found) else found
        return tried[setting] > best

    by_scale = {1.0: Setting(), 0.1: Setting(0.1), 10.0: Setting(10.0)}
    for setting in by_scale.values():
        is_better(setting)

    def best_scale() -> float:
        return max(by_scale, key=lambda scale: tried[by_scale[scale]])

    while (edge := best_scale()) in (min(by_scale), max(by_scale)) and abs(math.log10(edge)) < MOST_SCALED:
        beyond = float(f"{edge * (10 if edge > 1 else 0.1):g}")
        by_scale[beyond] = Setting(beyond)
        is_better(by_scale[beyond])
    order, middle = sorted(by_scale), best_scale()
    neighbours = [scale for pair in pairwise(order) if middle in pair for scale in pair if scale != middle]
    for neighbour in sorted(neighbours, key=lambda scale: -tried[by_scale[scale]]):
        between = float(f"{3 * min(middle, neighbour):g}")
        by_scale[between] = Setting(between)
        if is_better(by_scale[between]):
            break
    rate = by_scale[best_scale()].scale
    for ladder in ERRORS[tool]:
        better = list(takewhile(lambda error: is_better(Setting(rate, error)), ladder))
        if better:
            break
    return max(tried, key=lambda each: tried[each]), list(tried.items())


def run_tool(tool: str, files: Prepared, setting: Setting, folder: Path) -> tuple[Path, Cost]:
    """Impute with a tool in ``folder``, and return its output and cost; raises :class:`UserError` if it fails."""
    contigs = _contigs(files.panel)
    genetic_map = _map(tool, files, setting, contigs, folder)

    def run(command: Sequence[str | Path], log: Path) -> None:
        more = [] if "--compress-reference" in command else setting.options(tool)
        run_logged([*command, *more], log)

    def impute(panel: Path, target: Path, into: Path) -> Path:
        return TOOLS[tool](panel, target, genetic_map, into, os.cpu_count() or 1, run)

    with measured() as cost:
        if tool == "beagle" or len(contigs) == 1:
            return impute(files.panel, files.target, folder), cost
        # minimac4 takes one contig at a time.
        parts = []
        for contig in contigs:
            part = folder / contig
            make_folder(part)
            for path in (files.panel, files.target):
                out = str(part / f"only-{path.name}")
                bcftools.view("-r", contig, "-Oz", "-o", out, str(path), catch_stdout=False)
                bcftools.index("-t", "-f", out)
            parts.append(impute(part / "only-panel.vcf.gz", part / "only-target.vcf.gz", part))
    joined = folder / f"{tool}.vcf.gz"
    bcftools.concat("-Oz", "-o", str(joined), *map(str, parts), catch_stdout=False)
    return joined, cost


def _contigs(panel: Path) -> dict[str, int]:
    """Contigs with sites, and the last position of each."""
    lines = str(bcftools.query("-f", "%CHROM\\t%POS\\n", str(panel))).splitlines()
    return {contig: int(pos) for contig, pos in (line.split("\t") for line in lines)}


def _map(tool: str, files: Prepared, setting: Setting, contigs: dict[str, int], folder: Path) -> Path | None:
    """Write the map that the tool is given, in PLINK's format; None if it is given none."""
    scale = setting.scale if tool == "minimac4" else None
    if files.genetic_map is not None:
        points = GeneticMap.read(files.genetic_map).points
    elif files.cm_per_mb is not None or scale is not None:
        rate = (files.cm_per_mb or 1.0) * 1e-6
        points = {name: (np.array([1.0, last]), np.array([0.0, rate * last])) for name, last in contigs.items()}
    else:
        return None
    scaled = {name: (bp, cm * (scale or 1.0)) for name, (bp, cm) in points.items()}
    path = folder / "genetic.map"
    GeneticMap(str(files.genetic_map), scaled).write_plink(path, list(contigs))
    return path


def compare_with(tool: str, files: Prepared, folder: Path, cache: Path) -> dict[str, Any]:
    """Tune a tool, and impute the targets with its defaults and tuned, in folders beneath ``folder``.

    Returns the settings tried with their scores, the one chosen, and the cost and output of both runs. Raises
    :class:`UserError` if the tool cannot run with its defaults.
    """
    make_folder(folder)
    split = folder / "tuning"
    with VariantReader(files.panel) as vcf:
        samples = len(vcf.samples)
    if not split.is_dir():
        with folder_written(split) as building:
            hold_out(files.panel, building, listed(files.target), targets=min(TUNING_SAMPLES, samples // 4))
    held_out = replace(Prepared.of(split, files.cm_per_mb), genetic_map=files.genetic_map)

    scratch = folder / f"{tool}-tuning"

    def score(setting: Setting) -> float:
        make_folder(scratch)
        try:
            out, cost = run_tool(tool, held_out, setting, scratch)
        except UserError as fault:
            if setting == Setting():
                raise
            logger.warning(f"{tool}, {setting.described(tool)}: {fault}")
            return math.nan
        report = evaluate(held_out.truth, {tool: out}, held_out.panel, held_out.target, bootstrap=0, cache_dir=cache)
        r2 = report.tools[tool].aggregate_r2
        found = r2["all"] if math.isnan(r2["all <1 %"]) else r2["all <1 %"]
        logger.info(f"{folder.parent.name}: {tool}, {setting.described(tool)}: {found:.4f} in {cost.seconds:.0f} s")
        return found

    best, tried = tune(score, tool)
    shutil.rmtree(scratch)
    result: dict[str, Any] = {
        "setting": best.described(tool),
        "tuning": [{"setting": each.described(tool), "score": None if math.isinf(r2) else r2} for each, r2 in tried],
    }
    for name, setting in {"default": Setting(), "tuned": best}.items():
        into = folder / f"{tool}-{name}"
        make_folder(into)
        out, cost = run_tool(tool, files, setting, into)
        result[name] = {**asdict(cost), "output": str(out.relative_to(folder))}
    return result
