"""Reader of imputed dosages: this package's own files, Beagle's and minimac4's.

A file is read once, as a stream, and its values are kept on disk while they are used (:class:`DosageFile`).
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from embrag_ds.errors import UserError
from embrag_ds.variants.records import BiallelicFile, VcfRow, site_table
from embrag_ds.variants.sites import SiteTable
from embrag_ds.variants.spool import Spool

_DOSAGE, _HAPLOTYPES, _GP = slice(0, 1), slice(1, 3), slice(3, 6)
_COLUMNS = 6


@dataclass(frozen=True)
class DosageFile:
    """Imputed dosages of N samples at S sites, kept on disk and read in blocks of site rows int64 [n].

    ``dr2`` float32 [S] is the file's own estimate of r2, NaN where a record has none. ``imputed`` bool [S] marks
    imputed sites. Both are None unless the header defines their INFO key. ``has_gp`` and ``has_haplotypes`` are True if
    every record has such values. The methods return all samples, or those numbered int64 [N].
    """

    path: Path
    sites: SiteTable
    samples: tuple[str, ...]
    has_gp: bool
    has_haplotypes: bool
    dr2: np.ndarray | None
    imputed: np.ndarray | None
    _spool: Spool

    def dosage(self, rows: np.ndarray, samples: np.ndarray | None = None) -> np.ndarray:
        """ALT dosage (0 to 2), float32 [n, N]."""
        return self._spool.read(rows, _DOSAGE, samples)[..., 0]

    def gp(self, rows: np.ndarray, samples: np.ndarray | None = None) -> np.ndarray:
        """Genotype probabilities of 0, 1 and 2 ALT copies, float32 [n, N, 3]."""
        return self._spool.read(rows, _GP, samples)

    def haplotype_dosage(self, rows: np.ndarray, samples: np.ndarray | None = None) -> np.ndarray:
        """ALT probability of each haplotype, float32 [n, 2N]; sample i owns 2i and 2i + 1."""
        return self._spool.read(rows, _HAPLOTYPES, samples).reshape(len(rows), -1)


@contextmanager
def spool_dosages(path: str | Path, folder: Path, allow_missing: bool = False) -> Iterator[DosageFile]:
    """Open a file written by this package (GT:DS:HDS:GP), Beagle (GT:DS:AP1:AP2:GP) or minimac4 (HDS, GT, DS, GP).

    The dosage is DS. Without DS it is the sum of HDS, or of AP1 and AP2; without these the mean of GP. Else it is the
    ALT count of GT, phased or not. ``dr2`` is INFO DR2 or R2, ``imputed`` the INFO flag IMP or IMPUTED. No index is
    needed. Scratch files lie in ``folder`` until the block ends.

    With ``allow_missing``, for a truth, missing values (``.``, also as an allele of GT) are NaN. Raises
    :class:`UserError` for a damaged file, an unsorted or repeated site, and a FORMAT without any of these keys. It also
    raises one for a value that is missing or no number, and for a dosage outside [0, 2].

    Memory: a page of the :class:`embrag_ds.variants.spool.Spool`, the texts of distinct columns, and the site table.
    """
    with BiallelicFile(path) as vcf, Spool(folder, len(vcf.samples), _COLUMNS) as spool:
        yield _spooled(vcf, spool, allow_missing)


def _spooled(vcf: BiallelicFile, spool: Spool, allow_missing: bool) -> DosageFile:
    formats: dict[bytes, _DosageFields] = {}
    has_gp, has_haplotypes = True, True
    rows: list[VcfRow] = []
    dr2: list[float] = []
    imputed: list[bool] = []
    for row in vcf.rows():
        fields = vcf.sample_fields(row)
        where = f"{vcf.contigs[row.contig_code]}:{row.pos}"
        if spool.new_page_if_full():
            formats.clear()
        if row.format not in formats:
            formats[row.format] = _DosageFields(row.format, spool, allow_missing)
        parser = formats[row.format]
        if parser.source is None:
            raise vcf.fault(
                where,
                f"FORMAT {row.format.decode()} has no DS, HDS, AP1 and AP2, GP or GT",
                "give a file with imputed dosages",
            )
        has_gp, has_haplotypes = has_gp and parser.has_gp, has_haplotypes and parser.has_haplotypes
        try:
            codes = np.fromiter(map(parser.__getitem__, fields), dtype=spool.code_type, count=len(fields))
        except ValueError as error:
            sample = next(i for i, field in enumerate(fields) if field not in parser)
            raise _field_fault(vcf, row, sample, fields[sample], error, allow_missing) from error
        spool.append(codes)
        info = _info_values(row.info)
        try:
            dr2.append(_number_or_nan(info.get("DR2", info.get("R2", "."))))
        except ValueError as error:
            raise vcf.fault(where, f"its INFO has an r2 that is no number ({error})", "correct the record") from error
        imputed.append("IMP" in info or "IMPUTED" in info)
        # The columns are large, and their content is in the spool.
        rows.append(row._replace(info=b"", format=b"", body=b""))
    spool.finish()
    return DosageFile(
        path=vcf.path,
        sites=site_table(vcf, rows),
        samples=vcf.samples,
        has_gp=has_gp,
        has_haplotypes=has_haplotypes,
        dr2=np.array(dr2, dtype=np.float32) if vcf.info_keys & {"DR2", "R2"} else None,
        imputed=np.array(imputed, dtype=bool) if vcf.info_keys & {"IMP", "IMPUTED"} else None,
        _spool=spool,
    )


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
    """Read a whole file into memory, with the values and errors of :func:`spool_dosages`; for small files."""
    with tempfile.TemporaryDirectory() as folder, spool_dosages(path, Path(folder)) as file:
        every = np.arange(len(file.sites))
        return Dosages(
            sites=file.sites,
            samples=file.samples,
            dosage=file.dosage(every),
            gp=file.gp(every) if file.has_gp else None,
            haplotype_dosage=file.haplotype_dosage(every) if file.has_haplotypes else None,
            dr2=file.dr2,
            imputed=file.imputed,
        )


class _ImpossibleDosage(ValueError):
    pass


class _DosageFields(dict[bytes, int]):
    """Codes, in a page of the spool, of the sample columns met so far under one FORMAT.

    An imputed file has few distinct columns (most are confident), so each text is parsed only once. An entry is
    (dosage, haplotype 0, haplotype 1, GP 0, GP 1, GP 2), NaN where FORMAT lacks the value.
    """

    def __init__(self, format_text: bytes, spool: Spool, allow_missing: bool) -> None:
        super().__init__()
        self._spool = spool
        self._allow_missing = allow_missing
        self._place = {key: i for i, key in enumerate(format_text.split(b":"))}
        self.has_gp = b"GP" in self._place
        self.has_haplotypes = b"HDS" in self._place or {b"AP1", b"AP2"} <= set(self._place)
        having = {
            b"DS": b"DS" in self._place,
            b"HDS": self.has_haplotypes,
            b"GP": self.has_gp,
            b"GT": b"GT" in self._place,
        }
        self.source = next((key for key, there in having.items() if there), None)

    def __missing__(self, text: bytes) -> int:
        parts = text.split(b":")
        haplotypes: tuple[float, ...] = (math.nan,) * 2
        gp: tuple[float, ...] = (math.nan,) * 3
        if b"HDS" in self._place:
            haplotypes = self._numbers(parts, b"HDS", 2)
        elif self.has_haplotypes:
            haplotypes = self._numbers(parts, b"AP1", 1) + self._numbers(parts, b"AP2", 1)
        if self.has_gp:
            gp = self._numbers(parts, b"GP", 3)
        if self.source == b"DS":
            (dosage,) = self._numbers(parts, b"DS", 1)
        elif self.source == b"HDS":
            dosage = haplotypes[0] + haplotypes[1]
        elif self.source == b"GP":
            dosage = gp[1] + 2 * gp[2]
        else:
            dosage = self._genotype(parts)
        if not (math.isnan(dosage) or 0 <= np.float32(dosage) <= 2):
            raise _ImpossibleDosage(f"{dosage:g}")
        self[text] = self._spool.add((dosage, *haplotypes, *gp))
        return self[text]

    def _numbers(self, parts: list[bytes], key: bytes, count: int) -> tuple[float, ...]:
        values = self._value(parts, key).split(b",")
        if self._allow_missing and b"." in values:
            return (math.nan,) * count
        numbers = tuple(map(float, values))
        if len(numbers) != count or not math.isfinite(sum(numbers)):
            raise ValueError(key)
        return numbers

    def _genotype(self, parts: list[bytes]) -> float:
        alleles = re.split(rb"[|/]", self._value(parts, b"GT"))
        if self._allow_missing and b"." in alleles:
            return math.nan
        left, right = alleles
        return float(int(left) + int(right))

    def _value(self, parts: list[bytes], key: bytes) -> bytes:
        """Text of one key; VCF omits trailing keys that are missing."""
        place = self._place[key]
        return parts[place] if place < len(parts) else b"."


def _field_fault(
    vcf: BiallelicFile, row: VcfRow, sample: int, text: bytes, error: Exception, allow_missing: bool
) -> UserError:
    where = f"{vcf.contigs[row.contig_code]}:{row.pos}"
    remedy = "correct it or drop the record" if allow_missing else "impute the file again or drop the record"
    if isinstance(error, _ImpossibleDosage):
        what = f"dosage {error}, which is not from 0 to 2"
    else:
        wrong = "not a number" if allow_missing else "missing or not a number"
        what = f"{row.format.decode()} {text.decode()}, where a value is {wrong}"
    return vcf.fault(where, f"sample {vcf.samples[sample]} has {what}", remedy)


def _info_values(info: bytes) -> dict[str, str]:
    entries = (entry.partition("=") for entry in info.decode().split(";"))
    return {key: value for key, _, value in entries}


def _number_or_nan(text: str) -> float:
    return float("nan") if text == "." else float(text)
