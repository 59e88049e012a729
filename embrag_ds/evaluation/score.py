"""Score imputed files against the truth: the same untyped sites and people for every tool."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from embrag_ds.data.panel import read_populations
from embrag_ds.data.sites import Harmonised, SiteTable, harmonise
from embrag_ds.data.vcf import PhasedData, PhasedVcf, read_phased
from embrag_ds.data.vcf_dosages import Dosages, read_dosages
from embrag_ds.errors import UserError
from embrag_ds.evaluation import metrics
from embrag_ds.evaluation.baselines import allele_frequency_dosage, nearest_haplotype_dosage
from embrag_ds.evaluation.report import Difference, Report, Scores

logger = logging.getLogger(__name__)

ALLELE_FREQUENCY = "allele frequency"
NEAREST_HAPLOTYPE = "nearest haplotype"
BLOCK_SITES = 2048
NO_ALLELES = np.empty(0, dtype=np.uint8)
PathLike = str | Path


def evaluate(
    truth_path: PathLike,
    imputed: Mapping[str, PathLike],
    panel_path: PathLike,
    target_path: PathLike,
    baselines: bool = False,
    samples_path: PathLike | None = None,
    bootstrap: int = 200,
    seed: int = 0,
) -> Report:
    """Compare imputed files, by name, with the truth.

    Scored are the panel's sites that are in the truth and in every imputed file and that the target
    was not typed at; people are those of the truth, matched by name. ``baselines`` adds two cheap
    methods, computed from the panel and the target. ``samples_path`` is a tab-separated table (first
    column sample, second population) and adds scores by population. Raises :class:`UserError`.
    """
    if not imputed and not baselines:
        raise UserError("nothing to score: give an imputed file, or ask for the baselines")
    for name in imputed:
        if name in (ALLELE_FREQUENCY, NEAREST_HAPLOTYPE):
            raise UserError(f"{imputed[name]}: the name {name!r} belongs to a baseline; choose another name")

    panel = _read_panel(panel_path, keep_alleles=baselines)
    truth = _align(_read(truth_path), panel.sites, truth_path, panel_path)
    people = truth.samples
    _refuse_overlap(people, panel.samples, truth_path, panel_path)
    populations = _population_members(samples_path, people) if samples_path is not None else {}
    logger.info("reading %s", target_path)
    target = read_phased(target_path)
    typed = harmonise(target.sites, panel.sites, str(target_path), str(panel_path))
    logger.info("%s: %s", target_path, typed.report())
    scored = np.zeros(len(panel.sites), dtype=bool)
    scored[truth.panel_index] = True
    scored[typed.panel_index] = False
    tools: dict[str, _Aligned] = {}
    for name, path in imputed.items():
        tools[name] = _align(_read(path), panel.sites, path, panel_path).people(people, path, truth_path)
        in_file = np.zeros(len(panel.sites), dtype=bool)
        in_file[tools[name].panel_index] = True
        scored &= in_file
    sites = np.flatnonzero(scored)
    if len(sites) == 0:
        files = ", ".join(str(path) for path in (truth_path, *imputed.values()))
        raise UserError(f"{files}: no untyped site of {panel_path} is in all of them; check that they cover one region")
    logger.info("scoring %d untyped sites of %d in the panel, %d people", len(sites), len(panel.sites), len(people))
    if baselines:
        columns = _columns(target.samples, people, target_path, truth_path)
        tools.update(_baselines(panel, target, typed, columns, people))
    return _score(
        files={"truth": str(truth_path), "panel": str(panel_path), "target": str(target_path)}
        | {f"imputed: {name}": str(path) for name, path in imputed.items()},
        truth=truth.rows(sites),
        tools={name: tool.rows(sites) for name, tool in tools.items()},
        panel_af=panel.af[sites],
        typed_sites=len(typed.panel_index),
        populations=populations,
        bootstrap=bootstrap,
        seed=seed,
    )


@dataclass(frozen=True)
class _Panel:
    """Sites, people and ALT frequencies [S] of a panel; alleles [S, H] only where they are needed."""

    sites: SiteTable
    samples: tuple[str, ...]
    af: np.ndarray
    alleles: np.ndarray | None


@dataclass(frozen=True)
class _Aligned:
    """Dosages [n, N] of REF and ALT as the panel has them, at the panel's rows ``panel_index`` [n].

    ``gp`` [n, N, 3] and ``dr2`` [n] where the file has them.
    """

    panel_index: np.ndarray
    samples: tuple[str, ...]
    dosage: np.ndarray
    gp: np.ndarray | None = None
    dr2: np.ndarray | None = None

    def rows(self, panel_rows: np.ndarray) -> _Aligned:
        """Only these rows of the panel, all of which are here."""
        rows = np.searchsorted(self.panel_index, panel_rows)
        return _Aligned(
            panel_index=panel_rows,
            samples=self.samples,
            dosage=self.dosage[rows],
            gp=None if self.gp is None else self.gp[rows],
            dr2=None if self.dr2 is None else self.dr2[rows],
        )

    def people(self, names: tuple[str, ...], path: PathLike, truth_path: PathLike) -> _Aligned:
        """The named people, in that order."""
        columns = _columns(self.samples, names, path, truth_path)
        return _Aligned(
            panel_index=self.panel_index,
            samples=names,
            dosage=self.dosage[:, columns],
            gp=None if self.gp is None else self.gp[:, columns],
            dr2=self.dr2,
        )


def _columns(samples: tuple[str, ...], names: tuple[str, ...], path: PathLike, truth_path: PathLike) -> np.ndarray:
    """Where each of ``names`` is in ``samples``."""
    column = {sample: number for number, sample in enumerate(samples)}
    missing = [name for name in names if name not in column]
    if missing:
        raise UserError(
            f"{path}: {len(missing)} of the {len(names)} samples of {truth_path} are missing "
            f"({_some(missing)}); impute them, or take them out of the truth (bcftools view -s)"
        )
    return np.array([column[name] for name in names], dtype=np.int64)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _refuse_overlap(
    people: tuple[str, ...], panel_people: tuple[str, ...], path: PathLike, panel_path: PathLike
) -> None:
    """A person who is in the panel is copied, not imputed; a score with them in it means nothing."""
    both = sorted(set(people) & set(panel_people))
    if both:
        raise UserError(
            f"{path}: {len(both)} samples are also in {panel_path} ({_some(both)}); "
            "take them out of the panel and impute again (bcftools view -s ^...)"
        )


def _read(path: PathLike) -> Dosages:
    logger.info("reading %s", path)
    return read_dosages(path)


def _read_panel(path: PathLike, keep_alleles: bool) -> _Panel:
    logger.info("reading %s", path)
    if keep_alleles:
        data = read_phased(path)
        return _Panel(data.sites, data.samples, data.alleles.mean(axis=1), data.alleles)
    # Frequencies alone need one record at a time: panels may be larger than the memory.
    records = []
    frequencies = []
    with PhasedVcf(path) as vcf:
        for record in vcf.records():
            records.append(record._replace(alleles=NO_ALLELES))
            frequencies.append(float(record.alleles.mean()))
    sites = SiteTable(
        contigs=vcf.contigs,
        contig_lengths=vcf.contig_lengths,
        contig=np.array([record.contig_code for record in records], dtype=np.int32),
        pos=np.array([record.pos for record in records], dtype=np.int64),
        ref=[record.ref for record in records],
        alt=[record.alt for record in records],
        id=[record.id for record in records],
    )
    return _Panel(sites, vcf.samples, np.array(frequencies), None)


def _align(data: Dosages, panel_sites: SiteTable, path: PathLike, panel_path: PathLike) -> _Aligned:
    """Put a file's sites in the panel's order and its dosages in the panel's REF and ALT."""
    matched = harmonise(data.sites, panel_sites, str(path), str(panel_path))
    logger.info("%s: %s", path, matched.report())
    impossible = ~((data.dosage >= 0) & (data.dosage <= 2))
    if impossible.any():
        row, person = np.argwhere(impossible)[0]
        where = f"{data.sites.contigs[data.sites.contig[row]]}:{data.sites.pos[row]}"
        raise UserError(
            f"{path}: {where}: sample {data.samples[person]} has dosage {data.dosage[row, person]:g}, "
            "which is not from 0 to 2; impute the file again or drop the record"
        )
    rows, swapped = matched.target_index, matched.swapped
    dosage = data.dosage[rows]
    dosage[swapped] = 2.0 - dosage[swapped]
    gp = None
    if data.gp is not None:
        gp = data.gp[rows]
        gp[swapped] = gp[swapped][..., ::-1]
    # A header may define DR2 though no record gives it.
    dr2 = None if data.dr2 is None or np.isnan(data.dr2).all() else data.dr2[rows]
    return _Aligned(matched.panel_index, data.samples, dosage, gp, dr2)


def _population_members(path: PathLike, people: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Which people [N] bool are of each population, in alphabetical order of the populations."""
    populations = read_populations(Path(path), people)
    return {name: populations.of == code for code, name in enumerate(populations.names)}


def _baselines(
    panel: _Panel, target: PhasedData, typed: Harmonised, columns: np.ndarray, people: tuple[str, ...]
) -> dict[str, _Aligned]:
    """Both cheap methods at every site of the panel, for the ``people`` in these columns of the target."""
    assert panel.alleles is not None
    logger.info("computing the baselines")
    every = np.arange(len(panel.sites))
    haplotypes = np.stack([2 * columns, 2 * columns + 1], axis=1).reshape(-1)
    alleles = target.alleles[typed.target_index][:, haplotypes] ^ typed.swapped[:, None]
    nearest = np.empty((len(panel.sites), len(people)), dtype=np.float32)
    for start, stop in panel.sites.contig_runs():
        here = (typed.panel_index >= start) & (typed.panel_index < stop)
        nearest[start:stop] = nearest_haplotype_dosage(
            panel.alleles[start:stop], alleles[here], typed.panel_index[here] - start
        )
    return {
        ALLELE_FREQUENCY: _Aligned(every, people, allele_frequency_dosage(panel.af, len(people))),
        NEAREST_HAPLOTYPE: _Aligned(every, people, nearest),
    }


def _score(
    files: dict[str, str],
    truth: _Aligned,
    tools: dict[str, _Aligned],
    panel_af: np.ndarray,
    typed_sites: int,
    populations: dict[str, np.ndarray],
    bootstrap: int,
    seed: int,
) -> Report:
    """Every measure of every tool; all of them hold the same sites and people."""
    people = len(truth.samples)
    weights = metrics.bootstrap_weights(people, bootstrap, seed)
    scores: dict[str, Scores] = {}
    accumulators: dict[str, metrics.AggregateR2] = {}
    constant = np.zeros(len(panel_af), dtype=bool)
    # One measure for all: probabilities and best guesses do not compare.
    from_probabilities = all(tool.gp is not None for tool in tools.values())
    for name, tool in tools.items():
        logger.info("scoring %s", name)
        scores[name], accumulators[name], true_r2 = _score_tool(
            tool, truth.dosage, panel_af, weights, populations, from_probabilities
        )
        constant = np.isnan(true_r2)
    resampled = {name: each.resample(weights) for name, each in accumulators.items()}
    names = list(tools)
    differences = [
        Difference(
            a,
            b,
            {key: scores[a].aggregate_r2[key] - scores[b].aggregate_r2[key] for key in metrics.BIN_NAMES},
            metrics.interval(resampled[a] - resampled[b]),
        )
        for number, a in enumerate(names)
        for b in names[number + 1 :]
    ]
    members = metrics.bin_members(panel_af)
    return Report(
        files=files,
        people=people,
        sites=dict(zip(metrics.BIN_NAMES, members.sum(axis=1).tolist(), strict=True)),
        sites_without_truth_variance=dict(
            zip(metrics.BIN_NAMES, (members & constant).sum(axis=1).tolist(), strict=True)
        ),
        iqs_from="genotype probabilities" if from_probabilities else "best guesses",
        typed_sites=typed_sites,
        bootstrap=bootstrap,
        seed=seed,
        populations={name: int(member.sum()) for name, member in populations.items()},
        tools=scores,
        differences=differences,
    )


def _score_tool(
    tool: _Aligned,
    truth: np.ndarray,
    panel_af: np.ndarray,
    weights: np.ndarray,
    populations: dict[str, np.ndarray],
    iqs_from_probabilities: bool,
) -> tuple[Scores, metrics.AggregateR2, np.ndarray]:
    """One tool's scores, the accumulator to pair with other tools, and its true per-site r2 [n]."""
    aggregate = metrics.AggregateR2(truth.shape[1])
    concordance = metrics.Concordance()
    calibration, rare_calls = metrics.Calibration(), metrics.Calibration()
    rare = metrics.minor_allele_frequency(panel_af) < metrics.RARE_MAF
    true_r2 = np.empty(len(panel_af))
    quality = np.empty(len(panel_af))
    for start in range(0, len(panel_af), BLOCK_SITES):
        rows = slice(start, start + BLOCK_SITES)
        gp = None if tool.gp is None else tool.gp[rows]
        called = metrics.best_guess(tool.dosage[rows], gp)
        aggregate.add(truth[rows], tool.dosage[rows], panel_af[rows])
        concordance.add(truth[rows], called, panel_af[rows])
        true_r2[rows] = metrics.site_r2(truth[rows], tool.dosage[rows])
        quality[rows] = metrics.iqs(
            truth[rows], gp if gp is not None and iqs_from_probabilities else metrics.one_hot(called)
        )
        if gp is not None:
            calibration.add(truth[rows], gp)
            carried = metrics.polarise(called, panel_af[rows]) > 0
            rare_calls.add(truth[rows], gp, carried & rare[rows, None])
    overall, non_reference = concordance.result()
    scores = Scores(
        aggregate_r2=aggregate.result(),
        aggregate_r2_interval=metrics.interval(aggregate.resample(weights)),
        site_r2=metrics.by_bin(true_r2, panel_af),
        concordance=overall,
        non_reference_concordance=non_reference,
        iqs=metrics.by_bin(quality, panel_af),
        calibration_error=None if tool.gp is None else calibration.result(),
        rare_calibration_error=None if tool.gp is None else rare_calls.result(),
        calibration_curve=calibration.curve(),
        rare_calibration_curve=rare_calls.curve(),
        dr2_correlation=None if tool.dr2 is None else metrics.estimate_correlation(tool.dr2, true_r2, panel_af),
        populations={name: aggregate.result(member) for name, member in populations.items()},
    )
    return scores, aggregate, true_r2
