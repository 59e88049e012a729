"""Phased panels and targets as VCF."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from embrag_ds.variants.header import Contents, as_bytes, header_text
from embrag_ds.variants.published import check_output, last_positions, published
from embrag_ds.variants.sites import SiteTable


def write_phased(path: str | Path, sites: SiteTable, samples: tuple[str, ...] | list[str], alleles: np.ndarray) -> None:
    """Write ``alleles`` uint8 [S, 2N] as a phased VCF or BCF with its index.

    ``path`` must end in ``.vcf.gz`` or ``.bcf``. The file appears only when complete. Raises :class:`UserError` if it
    cannot be written.
    """
    assert alleles.shape == (len(sites), 2 * len(samples)), alleles.shape
    check_output(Path(path))
    genotype = np.array([list(f"{a}|{b}\t".encode()) for a in (0, 1) for b in (0, 1)], dtype=np.uint8)
    ends = last_positions(sites)
    with published(Path(path), max(ends, default=0)) as out:
        genotypes = '##FORMAT=<ID=GT,Number=1,Type=String,Description="Genotype">'
        out.write(header_text(Contents.of(sites), [genotypes], samples))
        for site, (contig, pos, ref, alt) in enumerate(sites.identities()):
            body = genotype[2 * alleles[site, 0::2] + alleles[site, 1::2]].tobytes()
            prefix = f"{contig}\t{pos}\t{sites.id[site]}\t{ref}\t{alt}\t.\tPASS\t{sites.extent.get(site, '.')}\tGT\t"
            out.write_record(contig, pos - 1, ends[site], as_bytes(prefix) + body[:-1] + b"\n")
