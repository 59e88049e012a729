"""Scoring loop: every measure of every tool, accumulated over blocks of sites."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from embrag_ds.evaluation import metrics
from embrag_ds.evaluation.report import Difference, Report, Scores
from embrag_ds.progress import Progress

logger = logging.getLogger(__name__)

BLOCK_SITES = 2048
BLOCK_GENOTYPES = 1 << 19
"""Most genotypes in a block. A block has as many sites as that allows, but at most ``BLOCK_SITES``."""


@dataclass(frozen=True)
class Tool:
    """Imputed values of one tool, for the truth's samples.

    ``dosage`` and, where the tool has genotype probabilities, ``gp`` are functions of panel rows int64 [n]. They return
    float32 [n, N] and [n, N, 3], on the diploid scale (:mod:`embrag_ds.evaluation.alignment`). ``dr2`` float32 [S] is
    the tool's own estimate of r2 at all scored sites, or None.
    """

    dosage: Callable[[np.ndarray], np.ndarray]
    gp: Callable[[np.ndarray], np.ndarray] | None = None
    dr2: np.ndarray | None = None


@dataclass(frozen=True)
class Scored:
    """Sites, samples and truth that all tools are scored against.

    ``sites`` int64 [S] are rows of the panel and ``panel_af`` [S] is their ALT frequency. ``truth`` returns the true
    dosage at panel rows int64 [n] on the diploid scale, float32 [n, N], NaN where a genotype is missing.
    ``populations`` has the members of each population, bool [N]. ``haploid`` returns the haploid genotypes at panel
    rows, bool [n, N], or None if there are none. The truth is a count of ALT copies if ``is_called``; else it is
    rounded to one where genotypes are compared.
    """

    sites: np.ndarray
    panel_af: np.ndarray
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
    # The same input for all tools: IQS of probabilities and of best guesses do not compare.
    from_probabilities = all(tool.gp is not None for tool in tools.values())
    sums = {name: _Sums(scored, tool, from_probabilities) for name, tool in tools.items()}
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
    members = metrics.bin_members(scored.panel_af)
    return Report(
        files=files,
        samples=scored.samples,
        sites=dict(zip(metrics.BIN_NAMES, members.sum(axis=1).tolist(), strict=True)),
        sites_without_truth_variance=dict(
            zip(metrics.BIN_NAMES, (members & constant).sum(axis=1).tolist(), strict=True)
        ),
        missing_truth_genotypes=missing,
        iqs_from="genotype probabilities" if from_probabilities else "best guesses",
        typed_sites=typed_sites,
        bootstrap=bootstrap,
        seed=seed,
        populations={name: int(member.sum()) for name, member in scored.populations.items()},
        tools=scores,
        differences=_differences(scores, {name: each.aggregate.resample(weights) for name, each in sums.items()}),
    )


def _differences(scores: dict[str, Scores], resampled: dict[str, np.ndarray]) -> list[Difference]:
    """Differences of every pair of tools; ``resampled`` is the aggregate r2 [R, G] of each."""
    names = list(scores)
    return [
        Difference(
            a,
            b,
            {key: scores[a].aggregate_r2[key] - scores[b].aggregate_r2[key] for key in metrics.BIN_NAMES},
            metrics.interval(resampled[a] - resampled[b]),
        )
        for number, a in enumerate(names)
        for b in names[number + 1 :]
    ]


class _Sums:
    """Sums of one tool's measures so far; ``true_r2`` float64 [S] is its r2 at every site."""

    def __init__(self, scored: Scored, tool: Tool, iqs_from_probabilities: bool) -> None:
        self._scored = scored
        self._tool = tool
        self._iqs_from_probabilities = iqs_from_probabilities
        self.aggregate = metrics.AggregateR2(scored.samples)
        self._concordance = metrics.Concordance()
        self._calibration, self._rare_calls = metrics.Calibration(), metrics.Calibration()
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
        self.aggregate.add(truth, dosage, panel_af, haploid)
        self.true_r2[block] = metrics.site_r2(truth, dosage, haploid)
        if not self._scored.is_called:
            truth = np.rint(truth)
        self._concordance.add(truth, called, panel_af)
        self._quality[block] = metrics.iqs(
            truth, gp if gp is not None and self._iqs_from_probabilities else metrics.one_hot(called)
        )
        if gp is not None:
            self._calibration.add(truth, gp)
            carried = metrics.polarise(called, panel_af) > 0
            self._rare_calls.add(truth, gp, carried & self._rare[block, None])

    def result(self, weights: np.ndarray) -> Scores:
        """The tool's scores; ``weights`` [R, N] are those of the resamples."""
        overall, non_reference = self._concordance.result()
        panel_af, dr2 = self._scored.panel_af, self._tool.dr2
        has_gp = self._tool.gp is not None
        return Scores(
            aggregate_r2=self.aggregate.result(),
            aggregate_r2_interval=metrics.interval(self.aggregate.resample(weights)),
            site_r2=metrics.by_bin(self.true_r2, panel_af),
            concordance=overall,
            non_reference_concordance=non_reference,
            iqs=metrics.by_bin(self._quality, panel_af),
            calibration_error=self._calibration.result() if has_gp else None,
            rare_calibration_error=self._rare_calls.result() if has_gp else None,
            calibration_curve=self._calibration.curve(),
            rare_calibration_curve=self._rare_calls.curve(),
            dr2_correlation=None if dr2 is None else metrics.estimate_correlation(dr2, self.true_r2, panel_af),
            populations={name: self.aggregate.result(member) for name, member in self._scored.populations.items()},
        )
