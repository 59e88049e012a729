"""Scoring loop: every measure of every tool, accumulated over blocks of sites."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from embrag_ds.evaluation import metrics
from embrag_ds.evaluation.carriers import CalledCarriers, largest_gap
from embrag_ds.evaluation.report import GENOTYPES, HAPLOTYPES, Difference, Report, Scores
from embrag_ds.progress import Progress

logger = logging.getLogger(__name__)

BLOCK_SITES = 2048
BLOCK_GENOTYPES = 1 << 19
"""Most genotypes in a block. A block has as many sites as that allows, but at most ``BLOCK_SITES``."""
Value = TypeVar("Value")


@dataclass(frozen=True)
class Tool:
    """Imputed values of one tool, for the truth's samples.

    ``dosage`` and, where the tool has genotype probabilities, ``gp`` are functions of panel rows int64 [n]. They return
    float32 [n, N] and [n, N, 3], on the diploid scale (:mod:`embrag_ds.evaluation.alignment`). ``of_haplotypes``, where
    the tool has probabilities of haplotypes, takes panel rows and their ``dosage`` and returns the genotype
    probabilities [n, N, 3] that follow. ``dr2`` float32 [S] is the tool's own estimate of r2 at all scored sites, or
    None.
    """

    dosage: Callable[[np.ndarray], np.ndarray]
    gp: Callable[[np.ndarray], np.ndarray] | None = None
    dr2: np.ndarray | None = None
    of_haplotypes: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None


@dataclass(frozen=True)
class Scored:
    """Sites, samples and truth that all tools are scored against.

    ``sites`` int64 [S] are rows of the panel. ``panel_af`` [S] is their ALT frequency, and ``minor_count`` int64 [S] is
    the number of haplotypes in the panel with the minor allele. ``truth`` returns the true dosage at panel rows
    int64 [n] on the diploid scale, float32 [n, N], NaN where a genotype is missing.
    ``populations`` has the members of each population, bool [N]. ``haploid`` returns the haploid genotypes at panel
    rows, bool [n, N], or None if there are none. The truth is a count of ALT copies if ``is_called``; else it is
    rounded to one where genotypes are compared.
    """

    sites: np.ndarray
    panel_af: np.ndarray
    minor_count: np.ndarray
    samples: int
    truth: Callable[[np.ndarray], np.ndarray]
    populations: Mapping[str, np.ndarray]
    haploid: Callable[[np.ndarray], np.ndarray | None] = lambda rows: None
    is_called: bool = True


def score(
    scored: Scored, tools: Mapping[str, Tool], files: dict[str, str], typed_sites: int, bootstrap: int, seed: int
) -> Report:
    """Compute every measure of every tool; the truth and the tools are read once, in the same blocks of sites.

    ``files`` and ``typed_sites`` only go into the report. Memory: see :mod:`embrag_ds.evaluation.score`.
    """
    members = metrics.every_member(scored.panel_af, scored.minor_count)
    sums = {name: _Sums(scored, members, tool) for name, tool in tools.items()}
    missing, haploids = 0, 0
    at_once = max(1, min(BLOCK_SITES, BLOCK_GENOTYPES // scored.samples))
    with Progress("scoring", len(scored.sites), "sites") as progress:
        for start in range(0, len(scored.sites), at_once):
            block = slice(start, min(start + at_once, len(scored.sites)))
            truth = scored.truth(scored.sites[block])
            missing += int(np.isnan(truth).sum())
            haploid = scored.haploid(scored.sites[block])
            haploids += 0 if haploid is None else int(haploid.sum())
            for each in sums.values():
                each.add(block, truth, haploid)
            progress.advance(block.stop - block.start)
    genotypes = scored.samples * len(scored.sites)
    if missing:
        logger.info("%d of %d truth genotypes are missing and not scored", missing, genotypes)
    if haploids:
        logger.info("%d of %d truth genotypes are haploid", haploids, genotypes)
    weights = metrics.bootstrap_weights(scored.samples, bootstrap, seed)
    scores = {name: each.result(weights) for name, each in sums.items()}
    constant = np.isnan(next(iter(sums.values())).true_r2)
    if constant.all():
        logger.warning("%s: none of the %d scored sites varies in it; r2 is undefined", files["truth"], len(constant))
    sites, by_count = _parted(_by_name(members.sum(axis=1)))
    return Report(
        files=files,
        samples=scored.samples,
        sites=sites,
        sites_by_count=by_count,
        sites_monomorphic_in_panel=int((scored.minor_count == 0).sum()),
        sites_without_truth_variance=_parted(_by_name((members & constant).sum(axis=1)))[0],
        missing_truth_genotypes=missing,
        typed_sites=typed_sites,
        bootstrap=bootstrap,
        seed=seed,
        populations={name: int(member.sum()) for name, member in scored.populations.items()},
        tools=scores,
        differences=_differences(
            {name: each.aggregate.result() for name, each in sums.items()},
            {name: each.aggregate.resample(weights) for name, each in sums.items()},
        ),
    )


def _parted(values: Mapping[str, Value]) -> tuple[dict[str, Value], dict[str, Value]]:
    """Values by the name of every bin, in two: those of the frequency, and those of the count."""
    return {name: values[name] for name in metrics.BIN_NAMES}, {name: values[name] for name in metrics.COUNT_NAMES}


def _by_name(values: np.ndarray) -> dict[str, int]:
    """Numbers [G] by the name of every bin."""
    return dict(zip(metrics.EVERY_NAME, values.tolist(), strict=True))


def _differences(r2: dict[str, dict[str, float]], resampled: dict[str, np.ndarray]) -> list[Difference]:
    """Differences of every pair of tools; ``r2`` by bin and ``resampled`` [R, G] are the aggregate r2 of each."""
    names = list(r2)
    found = []
    for number, a in enumerate(names):
        for b in names[number + 1 :]:
            difference, by_count = _parted({name: r2[a][name] - r2[b][name] for name in metrics.EVERY_NAME})
            limits = _parted(metrics.interval(resampled[a] - resampled[b], metrics.EVERY_NAME))
            found.append(Difference(a, b, difference, limits[0], by_count, limits[1]))
    return found


class _Sums:
    """Sums of one tool's measures so far; ``true_r2`` float64 [S] is its r2 at every site.

    ``members`` bool [G, S] are the scored sites of every bin.
    """

    def __init__(self, scored: Scored, members: np.ndarray, tool: Tool) -> None:
        self._scored = scored
        self._members = members
        self._tool = tool
        self.aggregate = metrics.AggregateR2(scored.samples, metrics.EVERY_NAME)
        self._concordance = metrics.Concordance()
        self._calibration, self._rare_calls = metrics.Calibration(), metrics.Calibration()
        self._carriers = CalledCarriers(scored.samples)
        self._rare = metrics.minor_allele_frequency(scored.panel_af) < metrics.RARE_MAF
        self.true_r2 = np.empty(len(scored.sites))
        self._quality = np.empty(len(scored.sites))

    def add(self, block: slice, truth: np.ndarray, haploid: np.ndarray | None) -> None:
        """Add a block of the scored sites, with its truth [n, N] and haploid genotypes bool [n, N]."""
        rows, panel_af = self._scored.sites[block], self._scored.panel_af[block]
        dosage = self._tool.dosage(rows)
        gp = None if self._tool.gp is None else self._tool.gp(rows)
        if gp is not None and haploid is not None:
            gp = metrics.without_heterozygotes(gp, haploid)
        called = metrics.best_guess(dosage, gp, haploid)
        members = self._members[:, block]
        self.aggregate.add(truth, dosage, panel_af, haploid, members)
        self.true_r2[block] = metrics.site_r2(truth, dosage, haploid)
        if not self._scored.is_called:
            truth = np.rint(truth)
        self._concordance.add(truth, called, panel_af)
        probabilities = gp
        if gp is None and self._tool.of_haplotypes is not None:
            probabilities = self._tool.of_haplotypes(rows, dosage)
            if haploid is not None:
                probabilities = metrics.without_heterozygotes(probabilities, haploid)
        if probabilities is not None:
            self._quality[block] = metrics.iqs(truth, probabilities)
        if gp is not None:
            self._calibration.add(truth, gp)
            carried = metrics.polarise(called, panel_af) > 0
            self._rare_calls.add(truth, gp, carried & self._rare[block, None])
            self._carriers.add(truth, gp, called, carried, members)

    def result(self, weights: np.ndarray) -> Scores:
        """The tool's scores; ``weights`` [R, N] are those of the resamples."""
        overall, non_reference = self._concordance.result()
        panel_af, dr2 = self._scored.panel_af, self._tool.dr2
        has_gp = self._tool.gp is not None
        iqs_from = GENOTYPES if has_gp else HAPLOTYPES if self._tool.of_haplotypes is not None else None
        r2, r2_by_count = _parted(self.aggregate.result())
        limits = _parted(metrics.interval(self.aggregate.resample(weights), metrics.EVERY_NAME))
        calibrated = self._carriers.result(weights)
        carriers, carriers_by_count = _parted(calibrated)
        return Scores(
            aggregate_r2=r2,
            aggregate_r2_interval=limits[0],
            aggregate_r2_by_count=r2_by_count,
            aggregate_r2_by_count_interval=limits[1],
            site_r2=metrics.by_bin(self.true_r2, panel_af),
            concordance=overall,
            non_reference_concordance=non_reference,
            iqs=None if iqs_from is None else metrics.by_bin(self._quality, panel_af),
            iqs_from=iqs_from,
            calibration_error=self._calibration.result() if has_gp else None,
            rare_calibration_error=self._rare_calls.result() if has_gp else None,
            calibration_curve=self._calibration.curve(),
            rare_calibration_curve=self._rare_calls.curve(),
            called_carriers=carriers if has_gp else None,
            called_carriers_by_count=carriers_by_count if has_gp else None,
            largest_carrier_gap=largest_gap(calibrated) if has_gp else None,
            dr2_correlation=None if dr2 is None else metrics.estimate_correlation(dr2, self.true_r2, panel_af),
            populations={
                name: _parted(self.aggregate.result(member))[0] for name, member in self._scored.populations.items()
            },
        )
