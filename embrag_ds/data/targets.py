"""Target samples at the panel's sites, with their alleles packed on disk."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from embrag_ds.data.panel import Panel
from embrag_ds.data.phasing import Phased, command_for, phase_with_beagle, require_beagle
from embrag_ds.data.ploidy import Ploidy
from embrag_ds.data.tokens import REF
from embrag_ds.errors import UserError
from embrag_ds.ops.bits import pack_host, unpack_host
from embrag_ds.variants.harmonise import Harmonised, Strand, harmonise

logger = logging.getLogger(__name__)

Phase = Literal["none", "beagle"]
"""What phases unphased targets: nothing, so that they are refused, or Beagle."""
_SITES_AT_ONCE = 2048
_FEW_MATCHED = 0.5


@dataclass(frozen=True)
class Targets:
    """Target samples matched to the panel's sites.

    ``typed`` bool [S] marks the T panel sites at which the targets are typed, and ``sites`` int64 [T] are their rows.
    ``packed`` holds alleles as :class:`Panel` does, usually memory-mapped, those of site t in the row ``rows[t]``;
    where ``swapped`` [T], 0 and 1 are exchanged in it. ``missing`` has the missing alleles of the same rows, or None.
    ``ploidy`` is that at the panel's sites, None if all are diploid. ``match`` maps the target file's sites to the
    panel's. ``phased`` says what phased them, if they were not.
    """

    samples: tuple[str, ...]
    typed: np.ndarray
    sites: np.ndarray
    packed: np.ndarray
    rows: np.ndarray
    swapped: np.ndarray
    missing: np.ndarray | None
    ploidy: Ploidy | None
    match: Harmonised
    phased: Phased | None = None

    def alleles(self, span: slice, samples: slice) -> np.ndarray:
        """Alleles of some samples at the panel's sites ``span``, uint8 [2N, L]; REF where they are not known."""
        first, last = np.searchsorted(self.sites, [span.start, span.stop])
        typed = self.typed_alleles(slice(first, last), samples)
        found = np.full((typed.shape[1], span.stop - span.start), REF, dtype=np.uint8)
        found[:, self.sites[first:last] - span.start] = typed.T
        return found

    def missing_alleles(self, span: slice, samples: slice) -> np.ndarray | None:
        """Alleles that some samples lack at typed sites among ``span``, bool [2N, L]; None if they lack none."""
        if self.missing is None:
            return None
        first, last = np.searchsorted(self.sites, [span.start, span.stop])
        lacking = unpack_host(self.missing[self.rows[first:last]], 2 * samples.start, 2 * samples.stop).view(bool)
        if not lacking.any():
            return None
        found = np.zeros((lacking.shape[1], span.stop - span.start), dtype=bool)
        found[:, self.sites[first:last] - span.start] = lacking.T
        return found

    def haploid(self, span: slice) -> np.ndarray | None:
        """Haploid samples at the panel's sites ``span``, bool [N, L]; None if there are none."""
        if self.ploidy is None:
            return None
        found = self.ploidy.at(np.arange(span.start, span.stop)).T
        return found if found.any() else None

    def typed_alleles(self, sites: slice, samples: slice) -> np.ndarray:
        """Alleles of some samples at some of the typed sites (numbers 0 to T - 1), uint8 [T, 2N]; any if missing."""
        bits = unpack_host(self.packed[self.rows[sites]], 2 * samples.start, 2 * samples.stop)
        return bits ^ self.swapped[sites, None]


def allele_counts(panel: Panel, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number of ALT alleles and of all called alleles at site rows int64 [n] of a panel or targets, float64 [n].

    A haploid sample counts twice.
    """
    alt = np.bitwise_count(panel.packed[rows]).sum(1, dtype=np.float64)
    called = np.full(len(rows), 2.0 * len(panel.samples))
    if panel.missing is not None:
        called -= np.bitwise_count(panel.missing[rows]).sum(1)
    return alt, called


def match_targets(target: Panel, panel: Panel, strand: Strand, allow_overlap: bool) -> Harmonised:
    """Match the targets' sites to the panel's; no later step drops sites.

    Raises :class:`UserError` if no site matches, or if a target sample is in the panel and ``allow_overlap`` is False.
    """
    shared = sorted(set(target.samples) & set(panel.samples))
    if shared and not allow_overlap:
        raise UserError(
            f"{target.path}: {len(shared)} samples are also in the panel {panel.path}, the first is {shared[0]}; "
            "remove them from one of the two, or add --allow-overlap (they then never retrieve themselves)"
        )
    match = harmonise(
        target.sites,
        panel.sites,
        str(target.path),
        str(panel.path),
        strand,
        lambda rows: allele_counts(target, rows),
        lambda rows: allele_counts(panel, rows),
    )
    if len(match.panel_index) == len(panel.sites) and len(target.sites) > 2 * len(panel.sites):
        raise UserError(
            f"{target.path}: it has all {len(panel.sites)} sites of the panel {panel.path} among its "
            f"{len(target.sites)}, so that none is left to impute; exchange --panel and --target"
        )
    logger.info("target %s: %d samples; %s", target.path, len(target.samples), match.report())
    if reconciled := match.reconciled():
        logger.info("target %s: %s", target.path, reconciled)
    total = len(match.reason)
    if len(match.panel_index) < _FEW_MATCHED * total:
        logger.warning(
            "target %s: only %d of its %d sites are used; check that it has the panel's genome build and strand",
            target.path,
            len(match.panel_index),
            total,
        )
    return match


def open_targets(target: Panel, match: Harmonised, panel: Panel, remedy: str = "add --phase beagle") -> Targets:
    """Targets at the panel's sites, which :func:`match_targets` matched.

    Raises :class:`UserError`, with this remedy beside another one, if calls need phasing. A call of one allele and
    none, without phase, counts as missing.
    """
    first, number = None, 0
    for start, unphased in _calls_to_phase(target, match):
        if first is None and unphased.any():
            first = np.argwhere(unphased)[0] + (start, 0)
        number += int(unphased.sum())
    if first is not None:
        site, sample = match.target_index[first[0]], target.samples[first[1]]
        raise UserError(
            f"{target.path}: {target.sites.where(site)}: the genotype of sample {sample} is not phased, nor are "
            f"{number - 1} others; {remedy}, or phase the file first "
            f"(`{command_for(target.path, panel.path)}`, which leaves out sites with exchanged alleles)"
        )
    return _at_panel_sites(target, match, panel, target.packed, match.target_index, match.swapped, _missing(target))


def phase_targets(
    target: Panel, match: Harmonised, panel: Panel, position_cm: np.ndarray, folder: Path, log: Path, threads: int
) -> Targets:
    """Like :func:`open_targets`, with the phase that Beagle finds for samples with calls that need it.

    Samples whose calls are all phased keep their phase. Calls that are missing stay so, and are imputed later; so are
    those of one allele and none of the samples that Beagle phases. ``position_cm`` float64 [S] are the panel's sites.
    Beagle works in ``folder`` and writes to ``log``. Raises :class:`UserError` if it is not installed or fails.
    """
    samples = len(target.samples)
    chosen = np.zeros(samples, dtype=bool)
    for _, unphased in _calls_to_phase(target, match):
        chosen |= unphased.any(axis=0)
    if not chosen.any():
        logger.info("target %s: all calls are phased; Beagle is not run", target.path)
        return open_targets(target, match, panel)
    require_beagle(target.path, panel.path)
    lacking = _missing(target, chosen)

    def genotypes(span: slice) -> tuple[np.ndarray, np.ndarray | None]:
        rows = match.target_index[span]
        alleles = unpack_host(target.packed[rows], 0, 2 * samples) ^ match.swapped[span, None]
        return alleles, None if lacking is None else unpack_host(lacking[rows], 0, 2 * samples).view(bool)

    number = len(match.panel_index)
    logger.info(
        "target %s: Beagle phases %d of %d samples at %d sites (log: %s)",
        target.path,
        chosen.sum(),
        samples,
        number,
        log,
    )
    alleles, phased = phase_with_beagle(
        genotypes, target.samples, panel, match.panel_index, position_cm[match.panel_index], folder, log, threads
    )
    rows = np.arange(number)
    kept = np.repeat(~chosen, 2)
    for start in range(0, number, _SITES_AT_ONCE):
        span = slice(start, start + _SITES_AT_ONCE)
        alleles[span, kept] = genotypes(span)[0][:, kept]
    missing = None if lacking is None else lacking[match.target_index]
    found = _at_panel_sites(target, match, panel, pack_host(alleles), rows, np.zeros(number, dtype=bool), missing)
    return replace(found, phased=phased)


def _calls_to_phase(target: Panel, match: Harmonised) -> Iterator[tuple[int, np.ndarray]]:
    """Iterate over blocks of matched sites: the first one's number, and the calls bool [n, N] that need phasing.

    Those are the calls whose two alleles are known, but not their phase.
    """
    if target.unphased is None:
        return
    samples = len(target.samples)
    for start in range(0, len(match.target_index), _SITES_AT_ONCE):
        rows = match.target_index[start : start + _SITES_AT_ONCE]
        unphased = unpack_host(target.unphased[rows], 0, samples).view(bool)
        if target.missing is not None:
            lacking = unpack_host(target.missing[rows], 0, 2 * samples).view(bool)
            unphased = unphased & ~(lacking[:, 0::2] | lacking[:, 1::2])
        yield start, unphased


def _missing(target: Panel, chosen: np.ndarray | None = None) -> np.ndarray | None:
    """Missing alleles as bits uint8 [S, ceil(2N / 8)].

    A call that lacks one of two alleles lacks both if it has no phase, or if its sample is ``chosen``, bool [N].
    """
    if target.missing is None or (target.unphased is None and chosen is None):
        return target.missing
    samples = len(target.samples)
    whole = np.array(target.missing)
    for start in range(0, len(whole), _SITES_AT_ONCE):
        span = slice(start, start + _SITES_AT_ONCE)
        lacking = unpack_host(whole[span], 0, 2 * samples).view(bool)
        half = lacking[:, 0::2] | lacking[:, 1::2]
        without_phase = np.zeros_like(half) if chosen is None else np.broadcast_to(chosen, half.shape)
        if target.unphased is not None:
            without_phase = without_phase | unpack_host(target.unphased[span], 0, samples).view(bool)
        whole[span] = pack_host(lacking | np.repeat(half & without_phase, 2, axis=1))
    return whole


def _at_panel_sites(
    target: Panel,
    match: Harmonised,
    panel: Panel,
    packed: np.ndarray,
    rows: np.ndarray,
    swapped: np.ndarray,
    missing: np.ndarray | None,
) -> Targets:
    sites = match.panel_index
    if missing is not None:
        # A site at which nobody has an allele is not typed.
        number = np.zeros(len(rows), dtype=np.int64)
        for start in range(0, len(rows), _SITES_AT_ONCE):
            span = slice(start, start + _SITES_AT_ONCE)
            number[span] = np.bitwise_count(missing[rows[span]]).sum(1, dtype=np.int64)
        some = number < 2 * len(target.samples)
        sites, rows, swapped = sites[some], rows[some], swapped[some]
    if not len(sites):
        raise UserError(f"{target.path}: every call at the sites of {panel.path} is missing; check the file")
    typed = np.zeros(len(panel.sites), dtype=bool)
    typed[sites] = True
    return Targets(
        target.samples,
        typed,
        sites,
        packed,
        rows,
        swapped,
        missing,
        _ploidy_at_panel_sites(target, match, panel),
        match,
    )


def _ploidy_at_panel_sites(target: Panel, match: Harmonised, panel: Panel) -> Ploidy | None:
    """Ploidy of the targets at every site of the panel, None if all are diploid.

    Between two typed sites with other ploidies, it changes where the panel's does, or else half way. Where no site is
    typed from one change of the panel's ploidies to the next, and the panel has no haploid sample, as in a
    pseudoautosomal region, the targets have none either.
    """
    if target.ploidy is None:
        return None
    haploid = target.ploidy.at(match.target_index)
    changed = np.flatnonzero((haploid[1:] != haploid[:-1]).any(axis=1)) + 1
    starts = [0]
    for place in changed.tolist():
        before, after = int(match.panel_index[place - 1]), int(match.panel_index[place])
        inner = () if panel.ploidy is None else panel.ploidy.start
        steps = [int(start) for start in inner if before < start <= after]
        contig = panel.sites.contig[before + 1 : after + 1] != panel.sites.contig[before]
        if contig.any():
            steps = [before + 1 + int(contig.argmax())]
        middle = (panel.sites.pos[before] + panel.sites.pos[after]) / 2
        half = before + 1 + int(np.searchsorted(panel.sites.pos[before + 1 : after], middle))
        starts.append(steps[0] if steps else half)
    found = Ploidy(np.array(starts, dtype=np.int64), haploid[[0, *changed.tolist()]])
    if panel.ploidy is not None:
        ends = np.append(panel.ploidy.start[1:], len(panel.sites))
        typed = np.searchsorted(match.panel_index, ends) > np.searchsorted(match.panel_index, panel.ploidy.start)
        kept = Ploidy(panel.ploidy.start, (typed | panel.ploidy.haploid.any(axis=1))[:, None])
        both = np.union1d(found.start, panel.ploidy.start)
        found = Ploidy(both, found.at(both) & kept.at(both))
    return found if found.haploid.any() else None
