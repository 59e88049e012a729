"""VCF output: phased panels and imputed targets, bgzipped and indexed."""

from __future__ import annotations

from contextlib import ExitStack
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from embrag_ds.errors import UserError
from embrag_ds.files import require_writable
from embrag_ds.variants.records import published
from embrag_ds.variants.sites import SiteTable


def write_phased(path: str | Path, sites: SiteTable, samples: tuple[str, ...] | list[str], alleles: np.ndarray) -> None:
    """Write ``alleles`` uint8 [S, 2N] as a bgzipped phased VCF with its index.

    ``path`` must end in ``.vcf.gz``. The file appears only when complete. Raises :class:`UserError` if it cannot be
    written.
    """
    assert alleles.shape == (len(sites), 2 * len(samples)), alleles.shape
    _check_output(Path(path))
    genotype = np.array([list(f"{a}|{b}\t".encode()) for a in (0, 1) for b in (0, 1)], dtype=np.uint8)
    with published(Path(path), sites) as out:
        out.write(_header(sites, samples, ['##FORMAT=<ID=GT,Number=1,Type=String,Description="Genotype">']))
        for site, (contig, pos, ref, alt) in enumerate(sites.identities()):
            body = genotype[2 * alleles[site, 0::2] + alleles[site, 1::2]].tobytes()
            prefix = f"{contig}\t{pos}\t{sites.id[site]}\t{ref}\t{alt}\t.\tPASS\t.\tGT\t"
            out.write(prefix.encode() + body[:-1] + b"\n")


_IMPUTED_DEFINITIONS = [
    '##INFO=<ID=AF,Number=A,Type=Float,Description="Estimated ALT allele frequency: mean of HDS">',
    '##INFO=<ID=DR2,Number=1,Type=Float,Description="Estimated squared correlation of dosage and true allele:'
    ' variance of HDS over p(1-p)">',
    '##INFO=<ID=IMP,Number=0,Type=Flag,Description="Imputed site">',
    '##FORMAT=<ID=GT,Number=1,Type=String,Description="Genotype: ALT where HDS is above 0.5">',
    '##FORMAT=<ID=DS,Number=A,Type=Float,Description="ALT dosage: sum of HDS">',
    '##FORMAT=<ID=HDS,Number=2,Type=Float,Description="ALT probability of each haplotype">',
    '##FORMAT=<ID=GP,Number=G,Type=Float,Description="Genotype probabilities: products of HDS">',
]


class ImputedVcfWriter:
    """Writer of an imputed VCF of N samples at ``sites``, block by block in site order.

    ``FORMAT`` is ``GT:DS:HDS:GP`` to three decimals. HDS is rounded, and GT, DS and GP follow from the rounded HDS. So
    a sample's columns agree exactly, and GP sums to 1. ``INFO`` has ``AF``, ``DR2``, and the flag ``IMP`` at imputed
    sites. DR2 is minimac's Rsq (Das et al. 2016, Nat. Genet. 48:1284): the variance of HDS over p(1-p). It is at most
    1, and 0 where p is 0 or 1; typed sites have 1.

    Use it as a context manager; ``path`` must end in ``.vcf.gz``. File and index appear when the block ends without an
    exception, and nothing is left otherwise. Raises :class:`UserError` if the file cannot be written.
    """

    def __init__(self, path: str | Path, sites: SiteTable, samples: tuple[str, ...] | list[str], source: str) -> None:
        self._sites = sites
        self._samples = len(samples)
        self._header = _header(sites, samples, [f"##source={source}", *_IMPUTED_DEFINITIONS])
        self._path = Path(path)
        _check_output(self._path)
        self._next = 0
        self._stack = ExitStack()
        self._sample_text = _imputed_sample_text()

    def __enter__(self) -> ImputedVcfWriter:
        self._out = self._stack.enter_context(published(self._path, self._sites))
        self._stack.push(self._check_complete)
        self._out.write(self._header)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._stack.__exit__(exc_type, exc, tb)

    def _check_complete(self, exc_type: Any, exc: Any, tb: Any) -> None:
        assert exc_type or self._next == len(self._sites), f"{self._next} of {len(self._sites)} sites written"

    def write(self, first: int, haplotype_dosage: np.ndarray, typed: np.ndarray, alleles_typed: np.ndarray) -> None:
        """Write the sites ``first`` to ``first + n``, which must follow those written before.

        ``haplotype_dosage`` float32 [2N, n] are ALT probabilities in [0, 1]. ``typed`` bool [n] marks typed sites;
        there ``alleles_typed`` uint8 [2N, n] are written unchanged and the dosage is ignored.
        """
        assert first == self._next, f"sites {first}.. follow {self._next}"
        assert haplotype_dosage.shape == alleles_typed.shape == (2 * self._samples, len(typed))
        step = max(1, 2**23 // (_SAMPLE_WIDTH * self._samples))
        for start in range(0, len(typed), step):
            block = slice(start, start + step)
            self._write_block(haplotype_dosage[:, block], typed[block], alleles_typed[:, block])

    def _write_block(self, dosage: np.ndarray, typed: np.ndarray, alleles: np.ndarray) -> None:
        hds = np.where(typed, alleles, dosage).T.astype(np.float64, order="C")
        thousandths = np.rint(hds * 1000).astype(np.int64)
        assert thousandths.min() >= 0 and thousandths.max() <= 1000, "haplotype dosages outside [0, 1]"
        texts = self._sample_text[thousandths[:, 0::2] * 1001 + thousandths[:, 1::2]]
        af = hds.mean(axis=1)
        spread = af * (1 - af)
        dr2 = np.divide(hds.var(axis=1), spread, out=np.zeros_like(af), where=spread > 0)
        dr2 = np.where(typed, 1.0, np.minimum(dr2, 1.0))
        parts: list[bytes] = []
        sites = self._sites
        for i in range(len(typed)):
            site = self._next + i
            parts.append(
                f"{sites.contigs[sites.contig[site]]}\t{sites.pos[site]}\t{sites.id[site]}\t{sites.ref[site]}\t"
                f"{sites.alt[site]}\t.\tPASS\tAF={af[i]:.6g};DR2={dr2[i]:.4g}{'' if typed[i] else ';IMP'}"
                "\tGT:DS:HDS:GP\t".encode()
            )
            parts.append(texts[i].tobytes()[:-1])
            parts.append(b"\n")
        self._out.write(b"".join(parts))
        self._next += len(typed)


_SAMPLE_WIDTH = len("0|0:0.000:0.000,0.000:1.000,0.000,0.000\t")


@cache
def _imputed_sample_text() -> np.ndarray:
    """Text of a sample whose HDS are a/1000 and b/1000, 40 bytes in row 1001 a + b: uint64 [1001 * 1001, 5].

    A sample's columns depend on these two numbers only, so a block of records is one gather.
    """
    a, b = (part.ravel() for part in np.meshgrid(np.arange(1001), np.arange(1001), indexing="ij"))
    gp_millionths = np.stack([(1000 - a) * (1000 - b), a * (1000 - b) + (1000 - a) * b, a * b], axis=1)
    gp = (gp_millionths + 500) // 1000
    # The largest probability absorbs the rounding errors, so that the written values sum to 1.
    gp[np.arange(len(gp)), gp.argmax(axis=1)] += 1000 - gp.sum(axis=1)
    digits = np.array([list(f"{i / 1000:.3f}".encode()) for i in range(2001)], dtype=np.uint8)
    text = np.empty((len(a), _SAMPLE_WIDTH), dtype=np.uint8)
    text[:] = np.frombuffer(b"0|0:0.000:0.000,0.000:1.000,0.000,0.000\t", dtype=np.uint8)
    text[:, 0] += a > 500
    text[:, 2] += b > 500
    for start, value in ((4, a + b), (10, a), (16, b), (22, gp[:, 0]), (28, gp[:, 1]), (34, gp[:, 2])):
        text[:, start : start + 5] = digits[value]
    return text.view(np.uint64)


def _header(sites: SiteTable, samples: tuple[str, ...] | list[str], definitions: list[str]) -> bytes:
    lines = ["##fileformat=VCFv4.3", '##FILTER=<ID=PASS,Description="All filters passed">']
    for name, length in zip(sites.contigs, sites.contig_lengths, strict=True):
        lines.append(f"##contig=<ID={name},length={length}>" if length else f"##contig=<ID={name}>")
    columns = ["#CHROM", "POS", "ID", "REF", "ALT", "QUAL", "FILTER", "INFO", "FORMAT", *samples]
    return "\n".join([*lines, *definitions, "\t".join(columns), ""]).encode()


def _check_output(path: Path) -> None:
    if not path.name.endswith(".vcf.gz"):
        raise UserError(f"{path}: the output is a bgzipped VCF; give it a name ending in .vcf.gz")
    require_writable(path)
