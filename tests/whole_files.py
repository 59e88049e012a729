"""Whole files in memory, for tests: what the readers give in pieces."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from embrag_ds.variants.dosages import spool_dosages
from embrag_ds.variants.records import VariantReader, site_table
from embrag_ds.variants.sites import SiteTable


@dataclass(frozen=True)
class PhasedData:
    """A whole phased file: ``alleles`` uint8 [S, 2N], where sample i owns columns 2i and 2i + 1.

    ``skipped`` counts the records that are not biallelic by reason.
    """

    sites: SiteTable
    samples: tuple[str, ...]
    alleles: np.ndarray
    skipped: dict[str, int]


def read_phased(path: str | Path) -> PhasedData:
    """Read a whole phased file."""
    with VariantReader(path) as vcf:
        rows = list(vcf.sites())
        alleles = np.empty((len(rows), 2 * len(vcf.samples)), dtype=np.uint8)
        for number, site in enumerate(rows):
            calls = vcf.calls(site)
            assert calls[1:] == (None, None, None)
            alleles[number] = calls.alleles
        return PhasedData(site_table(vcf, rows), vcf.samples, alleles, vcf.skipped)


@dataclass(frozen=True)
class Dosages:
    """A whole :class:`DosageFile` in memory, as arrays of sites by samples; values that some record lacks are None."""

    sites: SiteTable
    samples: tuple[str, ...]
    dosage: np.ndarray
    gp: np.ndarray | None
    haplotype_dosage: np.ndarray | None
    dr2: np.ndarray | None
    imputed: np.ndarray | None


def read_dosages(path: str | Path) -> Dosages:
    """Read a whole file of dosages, with the values and errors of :func:`spool_dosages`."""
    with tempfile.TemporaryDirectory() as folder, spool_dosages(path, Path(folder)) as file:
        every = np.arange(len(file.sites))
        return Dosages(
            sites=file.sites,
            samples=file.samples,
            dosage=file.dosage(every),
            gp=file.gp(every) if file.has_gp.all() else None,
            haplotype_dosage=file.haplotype_dosage(every) if file.has_haplotypes else None,
            dr2=file.dr2,
            imputed=file.imputed,
        )
