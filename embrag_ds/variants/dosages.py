"""Reader of imputed dosages and of truths: this package's own files, Beagle's and minimac4's.

A file is read once, as a stream, and its values are kept on disk while they are used (:class:`DosageFile`).
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from embrag_ds.errors import UserError
from embrag_ds.variants.header import as_text
from embrag_ds.variants.records import Duplicates, Excluded, Site, VariantReader, site_table
from embrag_ds.variants.sample_values import TOLERANCE, BadValue, ValueParser, Values
from embrag_ds.variants.sites import SiteTable
from embrag_ds.variants.spool import Spool

logger = logging.getLogger(__name__)

_OWN_R2 = re.compile(rb"(?:^|;)(DR2|R2)=([^;]*)")
_OWN_AF = re.compile(rb"(?:^|;)(AF)=([^;]*)")

_DOSAGE, _HAPLOTYPES, _GP, _PLOIDY = slice(0, 1), slice(1, 3), slice(3, 6), slice(6, 7)
_COLUMNS = len(Values._fields)


@dataclass(frozen=True)
class DosageFile:
    """Imputed or true dosages of N samples at S sites, kept on disk and read in blocks of site rows int64 [n].

    ``skipped`` counts what was left out of the file, by reason. ``ploidies`` has the ploidy of every call. With
    ``is_called`` all dosages are counts of called genotypes. ``has_gp`` bool [S] marks sites with genotype
    probabilities; ``has_haplotypes`` is True if every record has haplotype dosages.

    ``dr2`` float32 [S] is the file's own estimate of r2, NaN where a record has none. ``imputed`` bool [S] marks
    imputed sites. Both are None unless the header defines their INFO key. The methods return all samples, or those
    numbered int64 [N].
    """

    path: Path
    sites: SiteTable
    samples: tuple[str, ...]
    skipped: dict[str, int]
    ploidies: frozenset[int]
    is_called: bool
    has_gp: np.ndarray
    has_haplotypes: bool
    dr2: np.ndarray | None
    imputed: np.ndarray | None
    _spool: Spool

    def dosage(self, rows: np.ndarray, samples: np.ndarray | None = None) -> np.ndarray:
        """ALT dosage, from 0 to 2, or to 1 in a haploid sample: float32 [n, N]."""
        return self._spool.read(rows, _DOSAGE, samples)[..., 0]

    def gp(self, rows: np.ndarray, samples: np.ndarray | None = None) -> np.ndarray:
        """Probabilities of 0, 1 and 2 ALT copies, float32 [n, N, 3]."""
        return self._spool.read(rows, _GP, samples)

    def haplotype_dosage(self, rows: np.ndarray, samples: np.ndarray | None = None) -> np.ndarray:
        """ALT probability of each haplotype, float32 [n, 2N]; sample i owns 2i and 2i + 1, the same if haploid."""
        found = self._spool.read(rows, _HAPLOTYPES, samples)
        return found.reshape(len(rows), 2 * found.shape[1])

    def ploidy(self, rows: np.ndarray, samples: np.ndarray | None = None) -> np.ndarray:
        """Ploidy of each call, HAPLOID, DIPLOID or UNKNOWN: float32 [n, N]."""
        return self._spool.read(rows, _PLOIDY, samples)[..., 0]


@contextmanager
def spool_dosages(
    path: str | Path,
    folder: Path,
    truth: bool = False,
    duplicates: Duplicates = "first",
    on_excluded: Callable[[Excluded], None] | None = None,
) -> Iterator[DosageFile]:
    """Open a file written by this package (GT:DS:HDS:GP), Beagle (GT:DS:AP1:AP2:GP) or minimac4 (HDS, GT, DS, GP).

    :class:`embrag_ds.variants.sample_values.ValueParser` says which value counts, in an imputed file and in a
    ``truth``. FORMAT may differ from record to record. A truth's records without ALT are sites with the ALT ``.``.
    ``dr2`` is INFO DR2 or R2, ``imputed`` the INFO flag IMP or IMPUTED without TYPED. No index is needed. Scratch files
    lie in ``folder`` until the block ends. ``duplicates`` and ``on_excluded`` are those of
    :class:`embrag_ds.variants.records.VariantReader`.

    Raises :class:`UserError` for a damaged file, an unsorted one, and a FORMAT without any of these keys. It also
    raises one for a value of an imputed file that is missing, and for any that is no number or impossible.

    Memory: a page of the :class:`embrag_ds.variants.spool.Spool`, the texts of distinct columns, and the site table.
    """
    with (
        VariantReader(path, duplicates=duplicates, without_alt=truth, on_excluded=on_excluded) as vcf,
        Spool(folder, len(vcf.samples), _COLUMNS) as spool,
    ):
        yield _spooled(vcf, spool, truth)


def _spooled(vcf: VariantReader, spool: Spool, truth: bool) -> DosageFile:
    codes_of: dict[tuple[bytes, int, int], _Codes] = {}
    ploidies: set[int] = set()
    sources: set[str] = set()
    has_gp: list[bool] = []
    has_haplotypes = True
    left_out = False
    rows: list[Site] = []
    dr2: list[float] = []
    imputed: list[bool] = []
    for row in vcf.sites():
        fields = vcf.columns(row)
        if spool.new_page_if_full():
            codes_of.clear()
        key = (row.format, row.allele, row.alleles)
        codes = codes_of.get(key)
        if codes is None:
            codes = codes_of[key] = _Codes(ValueParser(*key, truth), spool, ploidies)
        parser = codes.parser
        if parser.source is None:
            raise vcf.fault(
                vcf.where(row),
                f"FORMAT {as_text(row.format)} has no DS, HDS, AP1 and AP2, GP or GT",
                "give a file with genotypes (GT)" if truth else "give a file with imputed dosages",
            )
        sources.add(parser.source)
        has_gp.append(parser.has_gp)
        has_haplotypes = has_haplotypes and parser.has_haplotypes
        try:
            numbers = np.fromiter(map(codes.__getitem__, fields), dtype=spool.code_type, count=len(fields))
        except BadValue as error:
            sample = next(i for i, field in enumerate(fields) if field not in codes)
            raise _column_fault(vcf, row, sample, error, truth) from error
        if parser.left_out and not left_out:
            left_out = True
            logger.info("%s: %s: values are left out at the end of a column; GT counts there", vcf.path, vcf.where(row))
        spool.append(numbers)
        # That of a truth is left over from an imputation.
        dr2.append(math.nan if truth else own_r2(vcf, row))
        imputed.append(is_imputed(row.info))
        rows.append(row.bare())
    spool.finish()
    odd = sum(not (-TOLERANCE <= value <= 1 + TOLERANCE) for value in dr2 if value == value)
    if odd:
        logger.warning("%s: the r2 in INFO of %d records is not from 0 to 1; it is taken as it is", vcf.path, odd)
    return DosageFile(
        path=vcf.path,
        sites=site_table(vcf, rows),
        samples=vcf.samples,
        skipped=vcf.skipped,
        ploidies=frozenset(ploidies),
        is_called=sources <= {"GT"},
        has_gp=np.array(has_gp, dtype=bool),
        has_haplotypes=has_haplotypes,
        dr2=None if np.isnan(dr2).all() else np.array(dr2, dtype=np.float32),
        imputed=np.array(imputed, dtype=bool) if vcf.info_keys & {"IMP", "IMPUTED"} else None,
        _spool=spool,
    )


class _Codes(dict[bytes, int]):
    """Codes, in a page of the spool, of the sample columns met so far that a parser reads.

    An imputed file has few distinct columns (most are confident), so each text is parsed only once.
    """

    def __init__(self, parser: ValueParser, spool: Spool, ploidies: set[int]) -> None:
        super().__init__()
        self.parser = parser
        self._spool = spool
        self._ploidies = ploidies

    def __missing__(self, text: bytes) -> int:
        values = self.parser.parse(text)
        self._ploidies.add(values.ploidy)
        self[text] = self._spool.add(values)
        return self[text]


def _column_fault(vcf: VariantReader, row: Site, sample: int, error: BadValue, truth: bool) -> UserError:
    where = vcf.where(row)
    do = "correct it" if truth else "impute the file again"
    remedy = error.remedy or f"{do} or drop the record (bcftools view -t ^{where})"
    return vcf.fault(where, f"sample {vcf.samples[sample]} has {error.problem}", remedy)


def own_r2(vcf: VariantReader, row: Site) -> float:
    """The file's estimate of r2 at a site, INFO DR2 or R2; NaN if there is none.

    There may be one for each ALT. Minimac's may exceed 1, so that any number is taken.
    """
    return _info_number(vcf, row, _OWN_R2, (b"DR2", b"R2"), "an r2")


def own_af(vcf: VariantReader, row: Site) -> float:
    """The file's ALT frequency at a site, INFO AF; NaN if there is none. There may be one for each ALT."""
    return _info_number(vcf, row, _OWN_AF, (b"AF",), "an AF")


def _info_number(
    vcf: VariantReader, row: Site, pattern: re.Pattern[bytes], keys: tuple[bytes, ...], what: str
) -> float:
    """An ALT's number in INFO, by the first of the ``keys`` that is there, each in its first place."""
    found: dict[bytes, bytes] = dict(reversed(pattern.findall(row.info)))
    text = next((found[key] for key in keys if key in found), b".")
    each = text.split(b",")
    value = each[row.allele - 1] if len(each) == row.alleles else text
    try:
        number = math.nan if value == b"." else float(value)
    except ValueError:
        number = math.inf
    if math.isinf(number) or b"_" in value:
        raise vcf.fault(
            vcf.where(row),
            f"its INFO has {what} that is no number ({as_text(text)})",
            f"correct it, or remove it (bcftools annotate -x {','.join(f'INFO/{key.decode()}' for key in keys)})",
        )
    return number


def is_imputed(info: bytes) -> bool:
    """Whether INFO marks an imputed site; minimac4 marks typed sites as both."""
    flags = info.split(b";")
    return (b"IMP" in flags or b"IMPUTED" in flags) and b"TYPED" not in flags
