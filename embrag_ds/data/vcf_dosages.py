"""Reading imputed dosages: this package's own files, Beagle's and minimac4's."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from embrag_ds.data.sites import SiteTable
from embrag_ds.data.vcf import BiallelicFile, VcfRow, site_table


@dataclass(frozen=True)
class Dosages:
    """Imputed dosages of N people at S sites.

    ``dosage`` float32 [S, N] is in ALT copies (0 to 2); ``gp`` float32 [S, N, 3] holds the genotype
    probabilities; ``haplotype_dosage`` float32 [S, 2N] the ALT probability of each haplotype (person i
    owns 2i and 2i + 1); ``dr2`` float32 [S] the file's own estimate of r2, NaN where it gives none;
    ``imputed`` bool [S] marks imputed sites. ``gp`` and ``haplotype_dosage`` are None unless every record
    has them, ``dr2`` and ``imputed`` unless the header defines their INFO key.
    """

    sites: SiteTable
    samples: tuple[str, ...]
    dosage: np.ndarray
    gp: np.ndarray | None
    haplotype_dosage: np.ndarray | None
    dr2: np.ndarray | None
    imputed: np.ndarray | None


def read_dosages(path: str | Path) -> Dosages:
    """Read what this package, Beagle (GT:DS:AP1:AP2:GP) or minimac4 (HDS, GT, DS, GP) wrote.

    The dosage is DS; where FORMAT has no DS, the sum of AP1 and AP2 or of HDS, else GP's, else the
    count of ALT alleles in GT, phased or not. ``dr2`` is INFO DR2 or R2, ``imputed`` the INFO flag IMP
    or IMPUTED. No index is needed. Raises :class:`UserError` on a damaged file, an unsorted or repeated
    site, and a missing or non-numeric value or no value to derive the dosage from.
    """
    parsers: dict[bytes, _DosageFields] = {}
    rows: list[VcfRow] = []
    parser_of_row: list[_DosageFields] = []
    codes: list[np.ndarray] = []
    with BiallelicFile(path) as vcf:
        for row in vcf.rows():
            fields = vcf.sample_fields(row)
            where = f"{vcf.contigs[row.contig_code]}:{row.pos}"
            if row.format not in parsers:
                if not _DOSAGE_KEYS & set(row.format.split(b":")):
                    raise vcf.fault(
                        where,
                        f"FORMAT {row.format.decode()} has no DS, HDS, AP1 and AP2, GP or GT",
                        "give a file with imputed dosages",
                    )
                parsers[row.format] = _DosageFields(row.format)
            parser = parsers[row.format]
            try:
                codes.append(np.array([parser[field] for field in fields], dtype=np.int32))
            except (ValueError, IndexError) as error:
                person = next(i for i, field in enumerate(fields) if field not in parser)
                raise vcf.fault(
                    where,
                    f"sample {vcf.samples[person]} has {row.format.decode()} {fields[person].decode()}, "
                    "where a value is missing or not a number",
                    "impute the file again or drop the record",
                ) from error
            parser_of_row.append(parser)
            # The genotype columns are large and their content is in `codes`.
            rows.append(row._replace(body=b""))
        sites, samples, info_keys = site_table(vcf, rows), vcf.samples, vcf.info_keys
    values = {id(parser): np.array(parser.parsed, dtype=np.float32) for parser in parsers.values()}
    dosage = np.empty((len(rows), len(samples)), dtype=np.float32)
    haplotypes = np.empty((len(rows), 2 * len(samples)), dtype=np.float32)
    gp = np.empty((len(rows), len(samples), 3), dtype=np.float32)
    for site, (parser, code) in enumerate(zip(parser_of_row, codes, strict=True)):
        person_values = values[id(parser)][code]
        dosage[site] = person_values[:, 0]
        haplotypes[site] = person_values[:, 1:3].reshape(-1)
        gp[site] = person_values[:, 3:]
    info = [_info_values(row.info) for row in rows]
    dr2 = [_number_or_nan(entry.get("DR2", entry.get("R2", "."))) for entry in info]
    imputed = ["IMP" in entry or "IMPUTED" in entry for entry in info]
    return Dosages(
        sites=sites,
        samples=samples,
        dosage=dosage,
        gp=gp if all(parser.has_gp for parser in parsers.values()) else None,
        haplotype_dosage=haplotypes if all(parser.has_haplotypes for parser in parsers.values()) else None,
        dr2=np.array(dr2, dtype=np.float32) if info_keys & {"DR2", "R2"} else None,
        imputed=np.array(imputed, dtype=bool) if info_keys & {"IMP", "IMPUTED"} else None,
    )


_DOSAGE_KEYS = {b"DS", b"HDS", b"AP1", b"GP", b"GT"}


class _DosageFields(dict[bytes, int]):
    """Row numbers in ``parsed`` of the sample columns met so far under one FORMAT.

    Few distinct columns make up an imputed file (most are confident), so each text is parsed once.
    A row of ``parsed`` is (dosage, haplotype 0, haplotype 1, GP 0, GP 1, GP 2), NaN where FORMAT does
    not say.
    """

    def __init__(self, format_text: bytes) -> None:
        super().__init__()
        self.parsed: list[tuple[float, ...]] = []
        self._column = {key: i for i, key in enumerate(format_text.split(b":"))}
        self.has_gp = b"GP" in self._column
        self.has_haplotypes = b"HDS" in self._column or b"AP1" in self._column

    def __missing__(self, text: bytes) -> int:
        parts = text.split(b":")
        nan = float("nan")
        haplotypes, gp = (nan, nan), (nan, nan, nan)
        if b"HDS" in self._column:
            first, second = parts[self._column[b"HDS"]].split(b",")
            haplotypes = (float(first), float(second))
        elif b"AP1" in self._column:
            haplotypes = (float(parts[self._column[b"AP1"]]), float(parts[self._column[b"AP2"]]))
        if self.has_gp:
            hom_ref, het, hom_alt = parts[self._column[b"GP"]].split(b",")
            gp = (float(hom_ref), float(het), float(hom_alt))
        if b"DS" in self._column:
            dosage = float(parts[self._column[b"DS"]])
        elif self.has_haplotypes:
            dosage = haplotypes[0] + haplotypes[1]
        elif self.has_gp:
            dosage = gp[1] + 2 * gp[2]
        else:
            left, right = re.split(rb"[|/]", parts[self._column[b"GT"]])
            dosage = float(int(left) + int(right))
        if math.isnan(dosage):
            raise ValueError(text)
        self.parsed.append((dosage, *haplotypes, *gp))
        self[text] = len(self.parsed) - 1
        return self[text]


def _info_values(info: bytes) -> dict[str, str]:
    entries = (entry.partition("=") for entry in info.decode().split(";"))
    return {key: value for key, _, value in entries}


def _number_or_nan(text: str) -> float:
    return float("nan") if text == "." else float(text)
