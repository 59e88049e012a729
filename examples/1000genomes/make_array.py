"""Draw the sites of an array from a panel: a common SNP in every stretch of it.

    python examples/1000genomes/make_array.py --panel PANEL.vcf.gz --spacing-bp 4000 --seed 1 --out ARRAY.tsv.gz

The lists ``sparse.tsv.gz`` and ``dense.tsv.gz`` were drawn by this rule, with stretches of 4,000 and 1,200 bp. Their
seed is not known, so that a new draw has other sites.
"""

from __future__ import annotations

import argparse
import gzip
import logging
from pathlib import Path

import numpy as np

from embrag_ds.cli.command import run_command
from embrag_ds.errors import UserError
from embrag_ds.files import written
from embrag_ds.seeds import Purpose, generator
from embrag_ds.variants.records import VariantReader, site_table
from embrag_ds.variants.sites import SiteTable

LEAST_MAF = 0.05
"""Least minor-allele frequency (a fraction) in the panel."""
_COMPLEMENT = {"A": "T", "C": "G", "G": "C", "T": "A"}

logger = logging.getLogger("embrag_ds.examples.make_array")


def make_array(sites: SiteTable, maf: np.ndarray, spacing_bp: int, rng: np.random.Generator) -> np.ndarray:
    """Rows int64 [T], in order, of an array's sites: one in every stretch of ``spacing_bp`` that has a candidate.

    Candidates are SNPs of at least :data:`LEAST_MAF`, ``maf`` float [S], that are not palindromic (A/T, C/G). Stretches
    begin at the first site of each contig.
    """
    alleles = zip(sites.ref, sites.alt, strict=True)
    # Neither palindromic nor an indel: both alleles are single bases, and not each other's complement.
    single = np.array([ref in _COMPLEMENT and alt in _COMPLEMENT and _COMPLEMENT[ref] != alt for ref, alt in alleles])
    stretch = np.concatenate(
        [(sites.pos[start:stop] - sites.pos[start]) // spacing_bp for start, stop in sites.contig_runs()]
    )
    candidates = rng.permutation(np.flatnonzero(single & (maf >= LEAST_MAF)))
    keys = np.stack([sites.contig, stretch], axis=1)[candidates]
    _, first = np.unique(keys, axis=0, return_index=True)
    rows: np.ndarray = np.sort(candidates[first])
    return rows


def read_panel(path: Path) -> tuple[SiteTable, np.ndarray]:
    """Sites of a phased panel, and their minor-allele frequencies float [S]."""
    with VariantReader(path) as vcf:
        kept = []
        maf = []
        for site in vcf.sites():
            frequency = float(vcf.calls(site).alleles.mean())
            maf.append(min(frequency, 1 - frequency))
            kept.append(site.bare())
        return site_table(vcf, kept), np.array(maf)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--panel", type=Path, required=True)
    parser.add_argument("--spacing-bp", type=int, required=True, help="length of a stretch in base pairs")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="gzipped list with lines: contig pos ref alt")
    options = parser.parse_args()
    if options.spacing_bp < 1:
        raise UserError("--spacing-bp must be at least 1")
    sites, maf = read_panel(options.panel)
    rows = make_array(sites, maf, options.spacing_bp, generator(Purpose.ARRAY_SITES, options.seed))
    if not len(rows):
        raise UserError(
            f"{options.panel}: no SNP of it has a minor-allele frequency of {LEAST_MAF}; give another panel"
        )
    lines = ("\t".join(map(str, each)) + "\n" for each in sites.take(rows).identities())
    with written(options.out) as temporary:
        temporary.write_bytes(gzip.compress("".join(lines).encode(), mtime=0))
    logger.info("%s: %s sites", options.out, f"{len(rows):,}")


if __name__ == "__main__":
    run_command(main)
