"""Checks of the target samples: their call rates, and how near their nearest haplotypes in the panel are."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from embrag_ds.data.panel import Panel
from embrag_ds.data.targets import Targets
from embrag_ds.ops.bits import unpack_host
from embrag_ds.ops.dosage_numba import count_different

logger = logging.getLogger(__name__)

LEAST_CALL_RATE = 0.9
"""Share of typed sites with a call below which a sample is reported."""
TIMES_AS_FAR = 2.0
"""Ratio to the greatest distance among panel samples above which a target's distance is reported."""
LEAST_DISTANCE = 0.02
"""Share of differing alleles below which a distance is never reported."""
_CHUNK_SITES = 64
_MOST_CHUNKS = 16
_MOST_HAPLOTYPES = 1 << 14
_PANEL_SAMPLES = 32
_FEWEST = 20
_SITES_AT_ONCE = 4096
_MOST_SITES = 256


def check_samples(targets: Targets, panel: Panel) -> list[dict[str, Any]]:
    """Log a line about every target sample that looks wrong, and return name, call rate and distance of all.

    The distance is the share of alleles in which a haplotype differs from its nearest one in the panel, over short
    chunks of typed sites; that of a sample is the share of both. It is compared with panel samples' distances from
    all others. It is None where the panel or the typed sites are fewer than 20, or the sample has no calls there.
    """
    rates = call_rates(targets)
    distances, usual = _distances(targets, panel)
    found = []
    for number, name in enumerate(targets.samples):
        known = distances is not None and not np.isnan(distances[number])
        distance = float(distances[number]) if distances is not None and known else None
        found.append({"sample": name, "call_rate": float(rates[number]), "distance": distance})
        if rates[number] < LEAST_CALL_RATE:
            logger.info("sample %s: calls at only %.1f %% of the typed sites", name, 100 * rates[number])
        if distance is not None and distance > max(LEAST_DISTANCE, TIMES_AS_FAR * usual):
            logger.info(
                "sample %s: its haplotypes differ from the panel's nearest in %.1f %% of alleles (panel samples: at "
                "most %.1f %%); wrong build, strand or population, or bad calls?",
                name,
                100 * distance,
                100 * usual,
            )
    return found


def call_rates(targets: Targets) -> np.ndarray:
    """Share of each target sample's alleles at typed sites that are known, float64 [N]."""
    samples = len(targets.samples)
    if targets.missing is None:
        return np.ones(samples)
    lacking = np.zeros(samples, dtype=np.int64)
    for start in range(0, len(targets.rows), _SITES_AT_ONCE):
        bits = unpack_host(targets.missing[targets.rows[start : start + _SITES_AT_ONCE]], 0, 2 * samples)
        lacking += bits.sum(0, dtype=np.int64).reshape(samples, 2).sum(1)
    return 1 - lacking / (2 * len(targets.rows))


def inbreeding(targets: Targets, panel: Panel) -> tuple[float, float]:
    """Inbreeding coefficients of targets and panel at typed sites (Wright 1922, Am. Nat. 56:330); NaN if there is none.

    That is 1 minus the heterozygous genotypes over those expected at the panel's allele frequencies. Missing and
    haploid genotypes do not count.
    """
    samples = len(targets.samples)
    chosen = slice(0, None, max(1, len(targets.sites) // _MOST_SITES))
    sites = targets.sites[chosen]
    alleles = panel.alleles_at(sites)
    frequency = alleles.mean(axis=1)
    lacking = np.zeros((len(sites), 2 * samples), dtype=np.uint8)
    if targets.missing is not None:
        lacking = unpack_host(targets.missing[targets.rows[chosen]], 0, 2 * samples)
    found = []
    for values, ploidy, missing in (
        (targets.typed_alleles(chosen, slice(0, samples)), targets.ploidy, lacking),
        (alleles, panel.ploidy, np.zeros_like(alleles)),
    ):
        counted = (missing[:, 0::2] | missing[:, 1::2]) == 0
        if ploidy is not None:
            counted &= ~ploidy.at(sites)
        heterozygous = ((values[:, 0::2] != values[:, 1::2]) & counted).sum()
        expected = (2 * frequency * (1 - frequency) * counted.sum(axis=1)).sum()
        found.append(float(1 - heterozygous / expected) if expected else float("nan"))
    return found[0], found[1]


def _distances(targets: Targets, panel: Panel) -> tuple[np.ndarray | None, float]:
    """Distance of each target sample, float64 [N] or None, and the greatest one of some panel samples.

    It is NaN for samples without calls at the compared sites.
    """
    sites, samples = targets.sites, len(targets.samples)
    if len(panel.samples) < _FEWEST or len(sites) < _FEWEST:
        return None, 0.0
    number = min(_MOST_CHUNKS, -(-len(sites) // _CHUNK_SITES))
    chunks = np.unique(np.linspace(0, max(0, len(sites) - _CHUNK_SITES), number).astype(np.int64))
    stride = -(-2 * len(panel.samples) // _MOST_HAPLOTYPES)
    kept = np.arange(0, 2 * len(panel.samples), stride)
    compared = np.unique(np.linspace(0, len(panel.samples) - 1, _PANEL_SAMPLES).astype(np.int64))
    theirs = (2 * compared[:, None] + np.arange(2)).reshape(-1)
    own = kept[None] // 2 == theirs[:, None] // 2
    sums, seen, usual = np.zeros(2 * samples), np.zeros(2 * samples), np.zeros(len(theirs))
    for chunk in chunks.tolist():
        rows = slice(chunk, chunk + _CHUNK_SITES)
        panel_alleles = panel.alleles_at(sites[rows])
        others = _words(panel_alleles[:, kept])
        known = np.ones((len(panel_alleles), 2 * samples), dtype=np.uint8)
        if targets.missing is not None:
            known -= unpack_host(targets.missing[targets.rows[rows]], 0, 2 * samples)
        least = np.empty(2 * samples, dtype=np.int64)
        count_different(_words(targets.typed_alleles(rows, slice(0, samples))), _words(known), others, least)
        sums += least
        seen += known.sum(0)
        apart = np.bitwise_count(_words(panel_alleles[:, theirs])[:, None] ^ others)
        usual += np.where(own, _CHUNK_SITES, apart).min(1)
    both = sums.reshape(samples, 2).sum(1), seen.reshape(samples, 2).sum(1)
    distance = np.where(both[1] > 0, both[0] / np.maximum(both[1], 1), np.nan)
    total = sum(len(sites[chunk : chunk + _CHUNK_SITES]) for chunk in chunks.tolist())
    return distance, float((usual / total).reshape(-1, 2).mean(1).max())


def _words(alleles: np.ndarray) -> np.ndarray:
    """Alleles uint8 [up to 64, H] of each haplotype as the bits of a number, uint64 [H]."""
    bits = np.zeros((8, alleles.shape[1]), dtype=np.uint8)
    packed = np.packbits(alleles, axis=0)
    bits[: len(packed)] = packed
    return np.ascontiguousarray(bits.T).view(np.uint64)[:, 0]
