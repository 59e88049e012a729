"""Tallies over the samples of an imputed file: certainty, heterozygosity and missing values."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from embrag_ds.variants.genotypes import DIPLOID, HAPLOID, parse_genotype
from embrag_ds.variants.records import Site, VariantReader
from embrag_ds.variants.sample_values import BadValue, ValueParser, Values

LEAST_SAMPLES = 10
"""Samples from which on outliers are named."""
DEVIATIONS = 5.0
"""Robust standard deviations from the median from which on a sample is an outlier."""
_LEAST_SPREAD = 1e-3
_LEAST_TEXTS = 1 << 17
_MOST_FORMATS = 256
_CERTAINTY, _CERTAIN_CALLS, _HETEROZYGOTE, _DIPLOID_CALLS, _HAPLOID_CALLS, _MISSING, _DOSAGE, _HAPLOTYPES = range(8)
_COLUMNS = 8


class Quality(NamedTuple):
    """A sample: mean certainty over imputed sites, share of heterozygotes, and counts of its calls.

    Numbers that the file does not tell are None. ``haploid`` calls are among the ``calls``, ``missing`` ones not.
    """

    name: str
    certainty: float | None
    heterozygosity: float | None
    calls: int
    haploid: int
    missing: int


class Outlier(NamedTuple):
    """A sample that is far from the others, and why."""

    name: str
    reason: str


class SampleTallies:
    """Tallies of N samples over sites in any order.

    The certainty of a genotype is the largest of its genotype probabilities: GP, or else the product of the
    haplotypes' (HDS, or AP1 and AP2). With DS alone it is 1 minus the distance to the nearest whole number. GT alone
    has none. A genotype is GT, or where the file has none the likeliest one.

    Memory: the distinct columns met of late, at most some 100,000 or two a sample.
    """

    def __init__(self, vcf: VariantReader) -> None:
        self._vcf = vcf
        samples = len(vcf.samples)
        self._room = max(_LEAST_TEXTS, 2 * samples)
        self._table = np.zeros((self._room, _COLUMNS))
        self._used = 0
        self._parsers: dict[tuple[bytes, int, int], _Codes] = {}
        self._sums = {imputed: np.zeros((samples, _COLUMNS)) for imputed in (False, True)}
        self.sites_by_source: dict[str, int] = {}
        """Imputed sites by what their certainty comes from: GP, HDS, DS, or none."""

    def add(self, site: Site, imputed: bool) -> float:
        """Add a site's columns; returns the samples' ALT frequency by their dosages, NaN where there is none.

        Raises :class:`UserError` for a value that is impossible. One that is missing is counted.
        """
        columns = self._vcf.columns(site)
        key = (site.format, site.allele, site.alleles)
        if self._used + len(columns) > self._room or len(self._parsers) > _MOST_FORMATS:
            self._parsers.clear()
            self._used = 0
        codes = self._parsers.get(key)
        if codes is None:
            codes = self._parsers[key] = _Codes(self, *key)
        if imputed:
            self.sites_by_source[codes.source] = self.sites_by_source.get(codes.source, 0) + 1
        if codes.parser.source is None:
            self._sums[imputed][:, _MISSING] += 1
            return float("nan")
        try:
            rows = np.fromiter(map(codes.__getitem__, columns), dtype=np.int64, count=len(columns))
        except BadValue as error:
            sample = next(place for place, text in enumerate(columns) if text not in codes)
            where = self._vcf.where(site)
            raise self._vcf.fault(
                where,
                f"sample {self._vcf.samples[sample]} has {error.problem}",
                error.remedy or f"correct it or drop the record (bcftools view -t ^{where})",
            ) from error
        found = self._table.take(rows, axis=0)
        self._sums[imputed] += found
        dosage, haplotypes = found[:, _DOSAGE:].sum(axis=0).tolist()
        return dosage / haplotypes if haplotypes else float("nan")

    def keep(self, row: Sequence[float]) -> int:
        """Keep the numbers of a text, and return their row."""
        self._table[self._used] = row
        self._used += 1
        return self._used - 1

    def qualities(self) -> list[Quality]:
        """The samples in the file's order."""
        both = self._sums[False] + self._sums[True]
        found = []
        for name, imputed, every in zip(self._vcf.samples, self._sums[True].tolist(), both.tolist(), strict=True):
            found.append(
                Quality(
                    name,
                    imputed[_CERTAINTY] / imputed[_CERTAIN_CALLS] if imputed[_CERTAIN_CALLS] else None,
                    every[_HETEROZYGOTE] / every[_DIPLOID_CALLS] if every[_DIPLOID_CALLS] else None,
                    int(every[_DIPLOID_CALLS] + every[_HAPLOID_CALLS]),
                    int(every[_HAPLOID_CALLS]),
                    int(every[_MISSING]),
                )
            )
        return found


class _Codes(dict[bytes, int]):
    """Rows of the table of the sample columns met so far under one FORMAT; each text is parsed only once."""

    def __init__(self, tallies: SampleTallies, format_text: bytes, allele: int, alleles: int) -> None:
        super().__init__()
        self._tallies = tallies
        self._allele = allele
        keys = format_text.split(b":")
        self._gt = keys.index(b"GT") if b"GT" in keys else -1
        self.parser = ValueParser(format_text, allele, alleles, truth=False)
        has_certainty = self.parser.has_gp or self.parser.has_haplotypes or self.parser.source == "DS"
        self.source = "none"
        if has_certainty:
            self.source = "GP" if self.parser.has_gp else "HDS" if self.parser.has_haplotypes else "DS"

    def __missing__(self, text: bytes) -> int:
        self[text] = self._tallies.keep(self._row(text))
        return self[text]

    def _row(self, text: bytes) -> list[float]:
        row = [0.0] * _COLUMNS
        try:
            values = self.parser.parse(text)
        except BadValue:
            if not _lacks_a_value(text):
                raise
            row[_MISSING] = 1
            return row
        haploid = values.ploidy == HAPLOID
        row[_HAPLOID_CALLS if haploid else _DIPLOID_CALLS] = 1
        row[_DOSAGE], row[_HAPLOTYPES] = values.dosage, 1 if haploid else 2
        certainty = self._certainty(values)
        if certainty is not None:
            row[_CERTAINTY], row[_CERTAIN_CALLS] = certainty, 1
        if not haploid:
            row[_HETEROZYGOTE] = self._is_heterozygote(text, values)
        return row

    def _certainty(self, values: Values) -> float | None:
        if values.zero == values.zero:
            return max(values.zero, values.one, values.two)
        if values.first == values.first:
            if values.ploidy == HAPLOID:
                return max(values.first, 1 - values.first)
            return max(_products(values))
        if self.parser.source == "DS":
            return 1 - abs(values.dosage - round(values.dosage))
        return None

    def _is_heterozygote(self, text: bytes, values: Values) -> bool:
        parts = text.split(b":")
        if 0 <= self._gt < len(parts):
            first, second, ploidy, _ = parse_genotype(parts[self._gt])
            if ploidy == DIPLOID and min(first, second) >= 0:
                return (first == self._allele) != (second == self._allele)
        if values.zero == values.zero:
            return values.one > max(values.zero, values.two)
        if values.first == values.first:
            zero, one, two = _products(values)
            return one > max(zero, two)
        return round(values.dosage) == 1


def _products(values: Values) -> tuple[float, float, float]:
    """Probabilities of 0, 1 and 2 copies from those of both haplotypes."""
    zero, two = (1 - values.first) * (1 - values.second), values.first * values.second
    return zero, 1 - zero - two, two


def _lacks_a_value(text: bytes) -> bool:
    """Whether any value of a column, or an allele, is missing."""
    return any(value in (b".", b"") for value in re.split(rb"[:,|/]", text))


def outliers(qualities: Sequence[Quality]) -> list[Outlier]:
    """Samples whose certainty is far below the others', or whose heterozygosity is far from theirs.

    Far is :data:`DEVIATIONS` robust standard deviations (1.4826 times the median distance from the median, and .001 at
    least) from the median. Of fewer than :data:`LEAST_SAMPLES` samples, none is named.
    """
    found = []
    for what, both_sides in (("certainty", False), ("heterozygosity", True)):
        values = {each.name: getattr(each, what) for each in qualities if getattr(each, what) is not None}
        if len(values) < LEAST_SAMPLES:
            continue
        numbers = np.array(list(values.values()))
        median = float(np.median(numbers))
        spread = max(1.4826 * float(np.median(np.abs(numbers - median))), _LEAST_SPREAD)
        for name, value in values.items():
            distance = (value - median) / spread
            if distance < -DEVIATIONS or (both_sides and distance > DEVIATIONS):
                side = "low" if distance < 0 else "high"
                found.append(Outlier(name, f"{what} {value:.4f} is {side} (median {median:.4f})"))
    return found
