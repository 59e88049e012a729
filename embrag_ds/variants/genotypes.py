"""Genotypes: the GT texts of a record decoded into alleles, missing calls, ploidy and phase."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

UNKNOWN, HAPLOID, DIPLOID = 0, 1, 2
"""Ploidy of a call; that of ``.`` is unknown."""


class Calls(NamedTuple):
    """Calls of N samples at a site, in which sample i owns the alleles 2i and 2i + 1.

    ``alleles`` uint8 [2N] are 1 where the allele is the site's ALT, and 0 for any other allele or none. A haploid call
    has its allele twice. The other three are None where no call needs them: ``missing`` bool [2N] marks missing
    alleles, ``ploidy`` uint8 [N] is of each call, and ``unphased`` bool [N] marks calls that need phasing. Those are
    written with ``/`` and either differ in their alleles or lack one.
    """

    alleles: np.ndarray
    missing: np.ndarray | None = None
    ploidy: np.ndarray | None = None
    unphased: np.ndarray | None = None


class GenotypeDecoder:
    """Decoder of the genotypes of samples. It remembers the texts that it has met, of which there are few."""

    def __init__(self) -> None:
        self._codes: dict[bytes, int] = {}
        self._first: list[int] = []
        self._second: list[int] = []
        self._unphased: list[bool] = []
        self._ploidy: list[int] = []
        self._tables: tuple[np.ndarray, ...] = ()

    def decode(self, texts: list[bytes], allele: int, alleles: int) -> Calls:
        """Decode GT texts, one a sample, at the site of the ALT number ``allele`` of a record with ``alleles`` ALTs.

        Raises :class:`BadGenotype` for a text that is no genotype of the record.
        """
        codes = self._codes
        try:
            numbers = np.fromiter(map(codes.__getitem__, texts), dtype=np.intp, count=len(texts))
        except KeyError:
            for sample, text in enumerate(texts):
                if text not in codes:
                    self._learn(text, sample)
            columns = (self._first, self._second, self._ploidy, self._unphased)
            self._tables = tuple(np.array(column) for column in columns)
            numbers = np.fromiter(map(codes.__getitem__, texts), dtype=np.intp, count=len(texts))
        first, second, ploidy, unphased = (table[numbers] for table in self._tables)
        pairs = np.stack([first, second], axis=1)
        if pairs.max() > alleles:
            raise BadGenotype(int((pairs > alleles).any(axis=1).argmax()), f"has an allele above {alleles}")
        missing = pairs < 0
        # The ALT of a record without any has the number 0, which no allele of a sample means.
        is_alt = (pairs == allele) & (pairs > 0)
        # A call with both alleles known needs phasing only if they differ at this site.
        unphased &= missing.any(axis=1) | (is_alt[:, 0] != is_alt[:, 1])
        return Calls(
            is_alt.reshape(-1).astype(np.uint8),
            missing.reshape(-1) if missing.any() else None,
            ploidy.astype(np.uint8) if (ploidy != DIPLOID).any() else None,
            unphased if unphased.any() else None,
        )

    def _learn(self, text: bytes, sample: int) -> None:
        first, second, ploidy, unphased = parse_genotype(text, sample)
        self._codes[text] = len(self._first)
        self._first.append(first)
        self._second.append(second)
        self._ploidy.append(ploidy)
        self._unphased.append(unphased)


class BadGenotype(ValueError):
    """Fault of a genotype: the number of its sample, and what is wrong with it."""

    def __init__(self, sample: int, problem: str) -> None:
        super().__init__(problem)
        self.sample = sample
        self.problem = problem


def parse_genotype(text: bytes, sample: int = 0) -> tuple[int, int, int, bool]:
    """Allele numbers (-1 where missing), ploidy, and whether phase is missing, of one GT text.

    ``sample`` is its number in errors. VCF 4.4 may begin a genotype with ``|`` or ``/``, the phase of its first allele.
    Raises :class:`BadGenotype`.
    """
    body = text[1:] if text[:1] in (b"|", b"/") else text
    parts = body.replace(b"/", b"|").split(b"|")
    if len(parts) > 2:
        raise BadGenotype(sample, f"has {len(parts)} alleles, and more than two are not supported")
    numbers = []
    for part in parts:
        if part == b".":
            numbers.append(-1)
        elif part.isdigit() and len(part) < 5:
            numbers.append(int(part))
        else:
            raise BadGenotype(sample, "is not a genotype")
    if len(numbers) == 1:
        return numbers[0], numbers[0], UNKNOWN if numbers[0] < 0 else HAPLOID, False
    first, second = numbers
    return first, second, DIPLOID, b"/" in body and (first != second)


def decode_biallelic(text: bytes, samples: int) -> Calls | None:
    """Decode tab-separated calls of three characters in diploid samples of a biallelic record; None for other text.

    The common case, and most of a file's bytes: one numpy operation for a record of phased calls without missing ones.
    """
    if len(text) != 4 * samples - 1:
        return None
    words = np.frombuffer(text + b"\t", dtype="<u4")
    # '0' and '1' differ in their lowest bit: no other bit may differ from "0|0<tab>".
    found = words ^ _PHASED
    if not np.bitwise_or.reduce(found) & _NO_ALLELE:
        # Each half of a word is now an allele. Strided access to its bytes would take most of the time.
        return Calls(found.view("<u2").astype(np.uint8))
    characters = words.view(np.uint8).reshape(samples, 4)
    pairs, separators = characters[:, 0:3:2], characters[:, 1]
    missing = pairs == ord(".")
    if not (
        (missing | ((pairs & 0xFE) == ord("0"))).all()
        and ((separators == ord("|")) | (separators == ord("/"))).all()
        and (characters[:, 3] == ord("\t")).all()
    ):
        return None
    unphased = (separators == ord("/")) & (pairs[:, 0] != pairs[:, 1])
    return Calls(
        np.where(missing, 0, pairs & 1).astype(np.uint8).reshape(-1),
        missing.reshape(-1) if missing.any() else None,
        None,
        unphased if unphased.any() else None,
    )


_PHASED = np.uint32(int.from_bytes(b"0|0\t", "little"))
_NO_ALLELE = 0xFFFEFFFE
