"""Imputed files for tests of the writer, and what their text must be, computed the obvious way."""

from __future__ import annotations

import gzip
import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from fractions import Fraction
from itertools import groupby
from pathlib import Path

import numpy as np

from embrag_ds.variants.header import as_text
from embrag_ds.variants.output import EVERYTHING, ImputedVcfWriter, OutputOptions
from embrag_ds.variants.sites import SiteTable

LATIN_1 = b"Caf\xe9"
"""An ID that is not UTF-8."""


def varied_sites(contig: str = "1", shift: int = 3_000_000) -> SiteTable:
    """Ten sites of all kinds: split records, symbolic alleles, ``*``, indels, several at one position."""
    return SiteTable(
        contigs=(contig, "2"),
        contig_lengths=(100_000_000, 0),
        contig=np.array([0] * 9 + [1], dtype=np.int32),
        pos=np.array([100, 200, 200, 300, 300, 400, 500, 500, 500, 50]) + shift,
        ref=["A", "C", "C", "G", "G", "T", "A", "A", "A", "T"],
        alt=["T", "G", "CA", "<DEL>", "<DEL>", "*", "C", "G", "AT", "<INS>"],
        id=[as_text(LATIN_1), "two", "two", "d1", "d2", ".", "three", "three", "three", "insertion"],
        extent={3: f"END={shift + 350}", 4: f"END={shift + 380};SVLEN=-80", 9: f"END={shift + 50};SVLEN=120"},
        record=np.array([0, 1, 1, 2, 3, 4, 5, 5, 5, 6]),
    )


@dataclass(frozen=True)
class Imputed:
    """Arguments of :meth:`ImputedVcfWriter.write` for all sites."""

    dosage: np.ndarray
    typed: np.ndarray
    alleles: np.ndarray
    missing: np.ndarray | None = None
    haploid: np.ndarray | None = None

    @property
    def samples(self) -> list[str]:
        return [f"s{number}" for number in range(len(self.dosage) // 2)]

    def taken(self, samples: slice) -> Imputed:
        """Some of the samples."""
        rows = slice(2 * (samples.start or 0), None if samples.stop is None else 2 * samples.stop)
        return Imputed(
            self.dosage[rows],
            self.typed,
            self.alleles[rows],
            None if self.missing is None else self.missing[rows],
            None if self.haploid is None else self.haploid[samples],
        )


def random_imputed(samples: int = 6, sites: int = 10, haploid: str = "none", missing: bool = False) -> Imputed:
    """Mostly confident dosages; haploid samples at ``none``, ``some`` or ``all`` sites."""
    rng = np.random.default_rng(samples)
    shape = (2 * samples, sites)
    dosage = np.abs(rng.integers(2, size=shape) - rng.random(shape) ** 3).astype(np.float32)
    alleles = rng.integers(2, size=shape).astype(np.uint8)
    ploidy = None
    if haploid != "none":
        ploidy = np.zeros((samples, sites), dtype=bool)
        ploidy[::2, slice(None) if haploid == "all" else slice(1, sites - 1)] = True
        dosage[1::2][ploidy] = dosage[0::2][ploidy]
        alleles[1::2][ploidy] = alleles[0::2][ploidy]
    lacking = rng.random(shape) < 0.2 if missing else None
    if lacking is not None and ploidy is not None:
        lacking[1::2][ploidy] = lacking[0::2][ploidy]
    return Imputed(dosage, np.arange(sites) % 3 == 0, alleles, lacking, ploidy)


def write(
    path: Path,
    sites: SiteTable,
    imputed: Imputed,
    options: OutputOptions = EVERYTHING,
    first: int = 0,
    stop: int | None = None,
    step: int = 3,
    samples: Sequence[str] | None = None,
) -> Path:
    """Write the sites ``first`` to ``stop`` in blocks of ``step``."""
    names = list(imputed.samples if samples is None else samples)
    with ImputedVcfWriter(path, sites, names, "test", options, first, stop) as out:
        end = len(sites) if stop is None else stop
        for start in range(first, end, step):
            span = slice(start, min(end, start + step))
            out.write(
                start,
                imputed.dosage[:, span],
                imputed.typed[span],
                imputed.alleles[:, span],
                None if imputed.missing is None else imputed.missing[:, span],
                None if imputed.haploid is None else imputed.haploid[:, span],
            )
    return path


def lines_of(path: Path) -> list[bytes]:
    """Lines of a bgzipped file."""
    return gzip.decompress(path.read_bytes()).splitlines()


def records_of(path: Path) -> list[list[str]]:
    """Columns of the records of a bgzipped file."""
    return [as_text(line).split("\t") for line in lines_of(path) if not line.startswith(b"#")]


def info_of(record: Sequence[str]) -> dict[str, str]:
    """INFO of a record."""
    return dict(entry.partition("=")[::2] for entry in record[7].split(";"))


@dataclass(frozen=True)
class Expected:
    """A record as it must be: its first five columns, what INFO says, and the columns from FORMAT on."""

    fixed: list[str]
    number: int
    imputed: bool
    sums: list[tuple[float, float]]
    dr2: list[float]
    end: str | None
    svlen: str | None
    columns: list[str]


def expected_records(sites: SiteTable, imputed: Imputed, options: OutputOptions) -> list[Expected]:
    """Records that the writer must make, one value after another."""
    rows = [_Row(sites, imputed, site) for site in range(len(sites))]
    rows = [row for row in rows if row.typed or not (options.typed_only or row.dr2 < options.min_r2)]
    if not options.join_multiallelic:
        return [_expected([row], options) for row in rows]
    return [_expected(list(group), options) for _, group in groupby(rows, key=lambda row: row.record)]


class _Row:
    def __init__(self, sites: SiteTable, imputed: Imputed, site: int) -> None:
        assert sites.record is not None
        self.record = sites.record[site]
        self.alt = sites.alt[site]
        self.fixed = [sites.contigs[sites.contig[site]], str(sites.pos[site]), sites.id[site], sites.ref[site]]
        self.extent = dict(each.split("=") for each in sites.extent.get(site, "").split(";") if each)
        self.typed = bool(imputed.typed[site])
        self.samples: list[list[float]] = []
        whole = self.typed
        for sample in range(len(imputed.dosage) // 2):
            values = []
            for row in (2 * sample, 2 * sample + 1):
                lacks = imputed.missing is not None and bool(imputed.missing[row, site])
                whole = whole and not lacks
                known = self.typed and not lacks
                values.append(float(imputed.alleles[row, site] if known else imputed.dosage[row, site]))
            one = imputed.haploid is not None and bool(imputed.haploid[sample, site])
            self.samples.append(values[:1] if one else values)
        every = [value for values in self.samples for value in values]
        self.number = len(every)
        self.sums = (math.fsum(every), math.fsum(value**2 for value in every))
        p = self.sums[0] / self.number
        variance = math.fsum((value - p) ** 2 for value in every) / self.number
        self.dr2 = 1.0 if whole else variance / (p * (1 - p)) if 0 < p < 1 else 0.0


def _expected(rows: list[_Row], options: OutputOptions) -> Expected:
    columns = []
    if not options.sites_only:
        columns = [":".join(options.fields)]
        for parts in zip(*(row.samples for row in rows), strict=True):
            haplotypes = [[round(part[h] * 1000) for part in parts] for h in range(len(parts[0]))]
            columns.append(":".join(_field(name, haplotypes) for name in options.fields))
    lengths = [row.extent.get("SVLEN", ".") for row in rows]
    return Expected(
        fixed=[*rows[0].fixed, ",".join(row.alt for row in rows)],
        number=rows[0].number,
        imputed=not all(row.typed for row in rows),
        sums=[row.sums for row in rows],
        dr2=[row.dr2 for row in rows],
        end=rows[0].extent.get("END"),
        svlen=",".join(lengths) if set(lengths) != {"."} else None,
        columns=columns,
    )


def _field(name: str, haplotypes: list[list[int]]) -> str:
    """Text of a FORMAT field from the thousandths of each ALT on each haplotype."""
    if name == "GT":
        of_alleles = [[1000 - sum(each), *each] for each in haplotypes]
        return "|".join(str(each.index(max(each))) for each in of_alleles)
    if name == "DS":
        return _text([sum(values) for values in zip(*haplotypes, strict=True)])
    if name == "HDS":
        return _text([value for each in haplotypes for value in each])
    if name == "AP1":
        return _text(haplotypes[0])
    if name == "AP2":
        return _text(haplotypes[1]) if len(haplotypes) == 2 else "."
    return _text(_genotype_probabilities(haplotypes))


def _genotype_probabilities(haplotypes: list[list[int]]) -> list[int]:
    alleles = []
    for each in haplotypes:
        scale = max(Fraction(1), Fraction(sum(each), 1000))
        alts = [Fraction(value, 1000) / scale for value in each]
        alleles.append([1 - sum(alts), *alts])
    if len(alleles) == 1:
        exact = list(alleles[0])
    else:
        first, second = alleles
        pairs = [(i, j) for j in range(len(first)) for i in range(j + 1)]
        exact = [first[i] * second[j] + (first[j] * second[i] if i != j else 0) for i, j in pairs]
    if len(haplotypes[0]) == 1:
        rounded = [int((Decimal(int(1000000 * value)) / 1000).quantize(Decimal(1), ROUND_HALF_UP)) for value in exact]
        rounded[rounded.index(max(rounded))] += 1000 - sum(rounded)
        return rounded
    floors = [int(1000 * value) for value in exact]
    order = sorted(range(len(exact)), key=lambda k: floors[k] - 1000 * exact[k])
    for place in order[: 1000 - sum(floors)]:
        floors[place] += 1
    return floors


def _text(thousandths: list[int]) -> str:
    return ",".join(f"{value / 1000:.3f}".rstrip("0").rstrip(".") for value in thousandths)
