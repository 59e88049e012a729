"""An imputed file read for its report, as a stream: memory does not grow with the number of records."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from embrag_ds.progress import Progress
from embrag_ds.reports.samples_part import Outlier, Quality, SampleTallies, outliers
from embrag_ds.reports.sites_part import SiteTallies
from embrag_ds.variants.dosages import is_imputed, own_af, own_r2
from embrag_ds.variants.records import Site, VariantReader

_MARKS = {"IMP", "IMPUTED"}
_AT_ONCE = 8192


@dataclass(frozen=True)
class ImputedFacts:
    """An imputed file: this package's, Beagle's or minimac4's.

    ``sources`` are the lines ``##source`` of its header. With ``has_marks`` its header defines the flag IMP or IMPUTED,
    so that typed sites are known; without, all sites count as imputed. ``frequencies`` counts the sites by where their
    ALT frequency is from. ``sites_by_source`` counts imputed sites by what their certainty is from. ``left_out`` counts
    by reason. ``samples`` is empty for a file without sample columns.
    """

    path: Path
    sources: tuple[str, ...]
    records: int
    left_out: dict[str, int]
    remarks: list[str]
    has_marks: bool
    sites: SiteTallies
    frequencies: dict[str, int]
    samples: list[Quality]
    outliers: list[Outlier]
    sites_by_source: dict[str, int]


def read_imputed(path: Path) -> ImputedFacts:
    """Read an imputed file. Raises :class:`UserError` for a damaged file, and for values that cannot be."""
    with VariantReader(path, needs_samples=False) as vcf:
        return _read(vcf, path)


def _read(vcf: VariantReader, path: Path) -> ImputedFacts:
    has_marks = bool(vcf.info_keys & _MARKS)
    sites = SiteTallies()
    samples = SampleTallies(vcf) if vcf.samples else None
    frequencies = {"INFO AF": 0, "the dosages": 0, "nowhere": 0}
    positions: list[int] = []
    typed: list[bool] = []
    af: list[float] = []
    dr2: list[float] = []
    code = -1

    def flush() -> None:
        if positions:
            sites.add(vcf.contigs[code], vcf.contig_lengths[code], positions, typed, af, dr2)
            for each in (positions, typed, af, dr2):
                each.clear()

    for site in _with_progress(vcf.sites(), path):
        if site.contig_code != code or len(positions) == _AT_ONCE:
            flush()
            code = site.contig_code
        imputed = not has_marks or is_imputed(site.info)
        frequency, source = own_af(vcf, site), "INFO AF"
        by_dosage = math.nan if samples is None else samples.add(site, imputed)
        if math.isnan(frequency):
            frequency, source = by_dosage, "nowhere" if math.isnan(by_dosage) else "the dosages"
        frequencies[source] += 1
        positions.append(site.pos)
        typed.append(not imputed)
        af.append(frequency)
        dr2.append(own_r2(vcf, site))
    flush()
    sites.finish()
    qualities = [] if samples is None else samples.qualities()
    return ImputedFacts(
        path,
        vcf.sources,
        vcf.records,
        dict(vcf.skipped),
        vcf.remarks,
        has_marks,
        sites,
        frequencies,
        qualities,
        outliers(qualities),
        {} if samples is None else samples.sites_by_source,
    )


def _with_progress(sites: Iterator[Site], path: Path) -> Iterator[Site]:
    """The sites, with progress if they take more than two seconds."""
    with Progress(f"reading {path.name}", None, "sites") as progress:
        for site in sites:
            yield site
            progress.advance()
