"""Values of a sample at a site in a file of dosages: dosage, haplotype dosages, genotype probabilities and ploidy.

Printed values are rounded, so they may miss a range or a sum by as much:

- A single value may lie up to 0.005 outside its range, half of the second decimal. Beagle prints two. It is clipped.
- The sum of G probabilities may miss 1 by G halves of the last decimal printed, which counts as the second at least and
  the third at most. For three probabilities that is 0.015 with two decimals, and 0.0015 with three or more.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import cache
from operator import itemgetter
from typing import NamedTuple

from embrag_ds.variants.genotypes import DIPLOID, HAPLOID, UNKNOWN, BadGenotype, parse_genotype
from embrag_ds.variants.header import as_text, shown

TOLERANCE = 0.005
"""Greatest distance of a printed value from its range."""
_SURE_SUM = 0.0015
_NAN = math.nan
_UNKNOWN_PAIR = (_NAN, _NAN)
_UNKNOWN_GP = (_NAN, _NAN, _NAN)
_OF_DOSAGE = (_NAN, _NAN, 0.0)
_ONE_HOT = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))


class Values(NamedTuple):
    """Values of a sample at a site, NaN where they are not known.

    ``dosage`` is the expected number of ALT copies, from 0 to the ploidy. ``first`` and ``second`` are the ALT
    probabilities of the two haplotypes, the same twice in a haploid sample. ``zero``, ``one`` and ``two`` are the
    probabilities of so many ALT copies. ``ploidy`` is HAPLOID or DIPLOID, UNKNOWN where the column does not tell it.
    """

    dosage: float
    first: float
    second: float
    zero: float
    one: float
    two: float
    ploidy: int


class BadValue(ValueError):
    """Fault of a sample's column: what the sample has, and a remedy where the usual one does not do."""

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(problem)
        self.problem = problem
        self.remedy = remedy


class _NoNumber(ValueError):
    """A value is no number, or there are too many or too few."""


class _Missing(_NoNumber):
    """A value is missing."""


class ValueParser:
    """Parser of sample columns under one FORMAT, for the ALT number ``allele`` of a record with ``alleles`` ALTs.

    The dosage of an imputed file is DS. Without DS in FORMAT it is the sum of HDS, or of AP1 and AP2; without these the
    mean of GP. Else it is the ALT count of GT. Values left out at the end of a column are those of its GT, as PLINK 2
    leaves out what GT tells. All other values must be there. Only a haploid sample may lack AP2 and GP, as Beagle
    writes it, and its GP then follows from the dosage.

    The dosage of a ``truth`` is the ALT count of GT, whatever else FORMAT has. Without GT in FORMAT it is that of an
    imputed file. It is NaN where a value, or one of two alleles, is missing. In a record without ALT, whose ``allele``
    is 0 of 0, only GT tells anything.

    The ploidy is that of GT; without GT it follows from the number of values. Several ALTs have their values in the
    order of the VCF specification; HDS has all of the first haplotype before those of the second.

    ``source`` is the key that the dosage comes from, None if FORMAT has none. ``has_gp`` and ``has_haplotypes`` are
    True if such values are read. ``left_out`` turns True when a column lacks values at its end.
    """

    def __init__(self, format_text: bytes, allele: int, alleles: int, truth: bool) -> None:
        place: dict[bytes, int] = {}
        for number, key in enumerate(format_text.split(b":")):
            place.setdefault(key, number)
        self._format = format_text
        self._keys = format_text.count(b":") + 1
        self._allele = allele
        self._alleles = alleles
        self._truth = truth
        self._gt, self._ds, self._hds, self._ap1, self._ap2, self._gp = (
            place.get(key, -1) for key in (b"GT", b"DS", b"HDS", b"AP1", b"AP2", b"GP")
        )
        has_haplotypes = self._hds >= 0 or min(self._ap1, self._ap2) >= 0
        having = {"DS": self._ds >= 0, "HDS": has_haplotypes, "GP": self._gp >= 0, "GT": self._gt >= 0}
        order = ["GT", *having] if truth else list(having)
        self.source = next((key for key in order if having[key]), None)
        self.has_gp = having["GP"] and (not truth or self.source == "GP")
        self.has_haplotypes = has_haplotypes and (not truth or self.source == "HDS")
        self.left_out = False
        read = [self._ds] if self.source == "DS" else []
        read += [self._gp] if self.has_gp else []
        read += ([self._hds] if self._hds >= 0 else [self._ap1, self._ap2]) if self.has_haplotypes else []
        self._first, self._last = min(read, default=0), max(read, default=0)
        self._genotypes: dict[bytes, tuple[float, tuple[float, float], int]] = {}
        self._plain, self._in_order = _plain_column(tuple(format_text.split(b":")))
        self._is_often_plain = alleles == 1 and self.source in ("DS", "HDS")
        self._plain_ploidy = DIPLOID if self._gt >= 0 or self.has_haplotypes or self.has_gp else UNKNOWN

    def parse(self, text: bytes) -> Values:
        """Values of a sample's column; raises :class:`BadValue`."""
        if self._is_often_plain and (found := self._plain(text)) is not None:
            dosage, first, second, zero, one, two = self._in_order((*map(float, found.groups()), _NAN))
            if dosage != dosage:
                dosage = first + second
            # Comparisons with NaN, which stands for values that FORMAT lacks, are false.
            if not (dosage > 2 or first > 1 or second > 1 or abs(zero + one + two - 1) > _SURE_SUM):
                return Values(dosage, first, second, zero, one, two, self._plain_ploidy)
        try:
            return self._parse(text.split(b":"))
        except _Missing as error:
            if self._truth:
                return Values(_NAN, *_UNKNOWN_PAIR, *_UNKNOWN_GP, UNKNOWN)
            raise self._no_number(text) from error
        except _NoNumber as error:
            raise self._no_number(text) from error

    def _no_number(self, text: bytes) -> BadValue:
        wrong = "not a number" if self._truth else "missing or not a number"
        return BadValue(f"{as_text(self._format)} {shown(text)}, where a value is {wrong}")

    def _parse(self, parts: list[bytes]) -> Values:
        if len(parts) > self._keys:
            raise BadValue(f"{shown(b':'.join(parts))!r}, more values than FORMAT {shown(self._format)} has keys")
        copies, alleles, ploidy = _NAN, _UNKNOWN_PAIR, UNKNOWN
        if self._gt >= 0:
            genotype = parts[self._gt] if self._gt < len(parts) else b"."
            copies, alleles, ploidy = self._genotypes.get(genotype) or self._genotype(genotype)
            if self.source == "GT":
                if copies != copies:
                    raise _Missing
                return Values(copies, *_UNKNOWN_PAIR, *_UNKNOWN_GP, ploidy)
        if self._alleles == 0:
            raise _Missing
        if self._last >= len(parts):
            if self._first >= len(parts):
                if copies != copies:
                    raise _Missing
                self.left_out = True
                pair, gp = (alleles if self.has_haplotypes else _UNKNOWN_PAIR), _ONE_HOT[int(copies)]
                return Values(copies, *pair, *(gp if self.has_gp else _UNKNOWN_GP), ploidy)
            parts = parts + [b"."] * (self._last + 1 - len(parts))
        pair, gp = _UNKNOWN_PAIR, _UNKNOWN_GP
        if self.has_haplotypes:
            pair, ploidy = self._haplotypes(parts, ploidy)
        if self.has_gp:
            gp, ploidy = self._probabilities(parts, ploidy)
        if self.source == "DS":
            dosage = self._one(parts[self._ds])
        elif self.source == "HDS":
            dosage = pair[0] if ploidy == HAPLOID else pair[0] + pair[1]
        else:
            dosage = gp[1] + 2 * gp[2]
        most = 1.0 if ploidy == HAPLOID else 2.0
        if not 0 <= dosage <= most:
            if not -TOLERANCE <= dosage <= most + TOLERANCE:
                whose = " of a haploid sample" if ploidy == HAPLOID else ""
                raise BadValue(f"dosage {dosage:g}{whose}, which is not from 0 to {most:g}")
            dosage = min(max(dosage, 0.0), most)
        if gp is _OF_DOSAGE:
            gp = (1 - dosage, dosage, 0.0)
        return Values(dosage, *pair, *gp, ploidy)

    def _genotype(self, text: bytes) -> tuple[float, tuple[float, float], int]:
        """Copies of the ALT, NaN if an allele is missing; the alleles, 1 where they are the ALT; and the ploidy."""
        try:
            first, second, ploidy, _ = parse_genotype(text)
        except BadGenotype as error:
            raise BadValue(f"the genotype {shown(text)!r}, which {error.problem}") from error
        if max(first, second) > self._alleles:
            raise BadValue(f"the genotype {shown(text)!r}, which has an allele above {self._alleles}")
        pair = float(first == self._allele > 0), float(second == self._allele > 0)
        copies = _NAN if min(first, second) < 0 else pair[0] if ploidy == HAPLOID else sum(pair)
        self._genotypes[text] = copies, pair, ploidy
        return self._genotypes[text]

    def _numbers(self, text: bytes) -> list[float]:
        values = text.split(b",")
        try:
            numbers = [float(value) for value in values]
        except ValueError as error:
            raise (_Missing if b"." in values else _NoNumber) from error
        # `float` takes 1_0 for 10.
        if not math.isfinite(sum(numbers)) or b"_" in text:
            raise _NoNumber
        return numbers

    def _one(self, text: bytes) -> float:
        """The ALT's number among those of all ALTs."""
        numbers = self._numbers(text)
        if len(numbers) != self._alleles:
            raise _NoNumber
        return numbers[self._allele - 1]

    def _haplotypes(self, parts: list[bytes], ploidy: int) -> tuple[tuple[float, float], int]:
        """ALT probabilities of both haplotypes, and the ploidy."""
        if self._hds < 0:
            return self._two_keys(parts, ploidy)
        text = parts[self._hds]
        if self.source == "DS" and text == b"." and ploidy != UNKNOWN and not self.has_gp:
            # PLINK 2 leaves HDS out where both haplotypes have half of DS.
            return _UNKNOWN_PAIR, ploidy
        numbers = self._numbers(text)
        found, rest = divmod(len(numbers), self._alleles)
        if rest or found not in (HAPLOID, DIPLOID) or ploidy not in (UNKNOWN, found):
            raise _NoNumber
        first = numbers[self._allele - 1]
        second = numbers[self._allele - 1 + self._alleles] if found == DIPLOID else first
        if not (0 <= first <= 1 and 0 <= second <= 1):
            first, second = _clipped(first, "HDS", text), _clipped(second, "HDS", text)
        return (first, second), found

    def _two_keys(self, parts: list[bytes], ploidy: int) -> tuple[tuple[float, float], int]:
        """The same from AP1 and AP2; a haploid sample has a dot for the latter."""
        one, two = parts[self._ap1], parts[self._ap2]
        first = _clipped(self._one(one), "AP1", one)
        if ploidy == HAPLOID:
            if two.strip(b".,"):
                raise _NoNumber
            return (first, first), HAPLOID
        return (first, _clipped(self._one(two), "AP2", two)), DIPLOID

    def _probabilities(self, parts: list[bytes], ploidy: int) -> tuple[tuple[float, float, float], int]:
        """Probabilities of 0, 1 and 2 copies of the ALT, ``_OF_DOSAGE`` if they follow from it; and the ploidy."""
        text = parts[self._gp]
        if ploidy == HAPLOID and self.source != "GP" and not text.strip(b".,"):
            return _OF_DOSAGE, ploidy
        numbers = self._numbers(text)
        found = _ploidy_of(self._alleles, len(numbers))
        if found == UNKNOWN or ploidy not in (UNKNOWN, found):
            raise _NoNumber
        if min(numbers) < 0 or abs(sum(numbers) - 1) > _SURE_SUM:
            self._check(text, numbers)
            numbers = [min(max(number, 0.0), 1.0) for number in numbers]
        if self._alleles == 1:
            return (numbers[0], numbers[1], numbers[2] if found == DIPLOID else 0.0), found
        by_copies = [0.0, 0.0, 0.0]
        for number, of_genotype in zip(numbers, _copies(self._allele, self._alleles, found), strict=True):
            by_copies[of_genotype] += number
        return (by_copies[0], by_copies[1], by_copies[2]), found

    def _check(self, text: bytes, numbers: list[float]) -> None:
        """Raise :class:`BadValue` for numbers that are no probabilities, or whose sum is not 1, within rounding."""
        others = [key for key, place in (("DS", self._ds), ("HDS", self._hds), ("GT", self._gt)) if place >= 0]
        remedy = "write it as probabilities from 0 to 1"
        if others:
            remedy += f", or take it out so that {others[0]} counts (bcftools annotate -x FORMAT/GP)"
        low, high, total = min(numbers), max(numbers), sum(numbers)
        if high <= 0 and low < 0:
            problem = "is log10-scaled, as GP was before VCF 4.3"
        elif low >= 0 and high > 1 + TOLERANCE and sum(number > 1 for number in numbers) == len(numbers) - 1:
            problem = "is phred-scaled"
        elif low < -TOLERANCE or high > 1 + TOLERANCE:
            problem = "is not from 0 to 1"
        elif abs(total - 1) > len(numbers) * 0.5 * 10.0 ** -_decimals(text) + 1e-6:
            problem = f"has the sum {total:g}, not 1"
        else:
            return
        raise BadValue(f"GP {shown(text)}, which {problem}", remedy)


_NUMBER = rb"([0-9]+(?:\.[0-9]+)?(?:e-[0-9]+)?)"
_PLAIN = {
    b"GT": (rb"[01][|/][01]", 0),
    b"DS": (_NUMBER, 1),
    b"HDS": (_NUMBER + b"," + _NUMBER, 2),
    b"AP1": (_NUMBER, 1),
    b"AP2": (_NUMBER, 1),
    b"GP": (b",".join([_NUMBER] * 3), 3),
}


@cache
def _plain_column(
    keys: tuple[bytes, ...],
) -> tuple[Callable[[bytes], re.Match[bytes] | None], Callable[[tuple[float, ...]], tuple[float, ...]]]:
    """Matcher of a diploid, biallelic column without missing values, and what puts its numbers in order.

    Almost all columns match, and one match is faster than the pieces one by one. The second function takes the numbers
    and NaN, and returns those of :class:`Values`, NaN for numbers that the keys lack.
    """
    patterns: list[bytes] = []
    start: dict[bytes, int] = {}
    count = 0
    for key in keys:
        pattern, groups = _PLAIN.get(key, (rb"[^:]*", 0))
        patterns.append(pattern)
        start.setdefault(key, count)
        count += groups
    two = [start[key] for key in (b"AP1", b"AP2") if key in start]
    haplotypes = [start[b"HDS"], start[b"HDS"] + 1] if b"HDS" in start else two if len(two) == 2 else [count, count]
    gp = [start[b"GP"] + each if b"GP" in start else count for each in range(3)]
    places = [start.get(b"DS", count), *haplotypes, *gp]
    return re.compile(b":".join(patterns), re.DOTALL).fullmatch, itemgetter(*places)


def _clipped(number: float, key: str, text: bytes) -> float:
    """A probability that rounding may have moved out of [0, 1]; raises :class:`BadValue` if it is further away."""
    if not -TOLERANCE <= number <= 1 + TOLERANCE:
        raise BadValue(f"{key} {shown(text)}, which is not from 0 to 1")
    return min(max(number, 0.0), 1.0)


def _decimals(text: bytes) -> int:
    """Decimals that the most exact of some numbers has, as 2 or 3."""
    if b"e" in text.lower():
        return 3
    return min(max([2, *(len(digits.rstrip(b"0")) for digits in re.findall(rb"\.(\d*)", text))]), 3)


@cache
def _ploidy_of(alleles: int, genotypes: int) -> int:
    """Ploidy of a sample with that many genotypes of ``alleles`` ALTs and REF; UNKNOWN if there is none."""
    if genotypes == alleles + 1:
        return HAPLOID
    return DIPLOID if genotypes == (alleles + 1) * (alleles + 2) // 2 else UNKNOWN


@cache
def _copies(allele: int, alleles: int, ploidy: int) -> tuple[int, ...]:
    """Copies of the ALT number ``allele`` in every genotype, in the order of the VCF specification."""
    if ploidy == HAPLOID:
        return tuple(int(each == allele) for each in range(alleles + 1))
    return tuple((one == allele) + (two == allele) for two in range(alleles + 1) for one in range(two + 1))
