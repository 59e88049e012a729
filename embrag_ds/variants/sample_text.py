"""Text of imputed samples: GT, DS, HDS and GP to three decimals, for haploid and diploid samples.

HDS in thousandths are integers a and b, and all columns follow from them. A table holds the text of the pairs met so
far, and compiled loops put a block of records together (:mod:`embrag_ds.ops.sample_texts`). Records of several ALTs are
rare and have their text made sample by sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import pairwise

import numpy as np

from embrag_ds.dependence import INDEPENDENT, Dependence

FORMATS = ("GT", "DS", "HDS", "GP")
"""FORMAT fields that can be written, in their order in a record."""
_MULTIPLE = 16
"""Of the bytes of a table's row, which the loops copy as vectors."""
_FIRST_ROWS = 1 << 14


class SampleTexts:
    """Texts of samples by their HDS, of the ``fields`` of :data:`FORMATS`, or AP1 and AP2 in place of HDS.

    The texts are made as they are first asked for: of a million pairs of HDS a file has some ten thousand. GP of
    diploid samples follows by the ``dependence`` of their haplotypes. Without ``fields`` there is no text.
    """

    def __init__(self, fields: tuple[str, ...], dependence: Dependence = INDEPENDENT) -> None:
        # Imported by those that write: the import takes as long as many a command.
        from embrag_ds.ops import sample_texts

        self._loops = sample_texts
        self._fields = fields
        self._dependence = dependence
        pairs = sample_texts.DIPLOID + sample_texts.VALUES
        width = self._made(np.zeros(1, dtype=np.int64)).shape[1] if fields else 0
        # Texts lie in the order in which they are first needed: common ones together, and no memory between.
        self._table = np.empty((_FIRST_ROWS, -(-width // _MULTIPLE) * _MULTIPLE), dtype=np.uint8)
        self._length = np.empty(_FIRST_ROWS, dtype=np.uint8)
        self._known = 0
        self._row_of = np.full(pairs, -1, dtype=np.int32)
        self._new = np.empty(pairs, dtype=np.int32)
        self._text = np.empty(0, dtype=np.uint8)

    def read(self, hds: np.ndarray, haploid: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows of the table int32 [n, N], and the sums of HDS and of its square over each site, float64 [n].

        ``hds`` is float32 [2N, n], in [0, 1]. The two values of a sample that is ``haploid``, bool [n, N], are the same
        and count once.
        """
        sites, samples = hds.shape[1], len(hds) // 2
        rows, sums = np.empty((sites, samples), dtype=np.int32), np.empty((2, sites))
        count = np.zeros(1, dtype=np.int64)
        if haploid is None:
            haploid = np.zeros((0, 0), dtype=bool)
        else:
            assert (hds[0::2] == hds[1::2])[haploid.T].all(), "two values of a haploid sample"
        # Contiguous, because numba compiles a loop anew for any other kind of array.
        given = np.ascontiguousarray(hds), np.ascontiguousarray(haploid)
        self._loops.note_rows(1, *given, self._row_of, self._known, self._new, count, rows, *sums)
        number = int(count[0])
        assert number >= 0, "haplotype dosages outside [0, 1]"
        if self._fields and number:
            self._add(self._new[:number].astype(np.int64))
        self._known += number
        return rows, sums[0], sums[1]

    def _add(self, pairs: np.ndarray) -> None:
        """Make the texts of some pairs, in the table's rows behind those that are known."""
        needed = self._known + len(pairs)
        if needed > len(self._table):
            most = max(needed, 2 * len(self._table))
            self._table, self._length = _longer(self._table, most), _longer(self._length, most)
        rows = slice(self._known, needed)
        texts = self._made(pairs)
        kept = texts != 0
        to_the_left = np.argsort(~kept, axis=1, kind="stable")
        self._table[rows, : texts.shape[1]] = np.take_along_axis(texts, to_the_left, axis=1)
        self._length[rows] = kept.sum(axis=1)

    def joined(self, rows: np.ndarray) -> list[memoryview]:
        """Text of each site's samples, from their ``rows`` int32 [n, N], with a newline behind.

        The next call overwrites them.
        """
        needed = (rows.size + 1) * self._table.shape[1]
        if len(self._text) < needed:  # new memory costs more than what is done in it
            self._text = np.empty(needed, dtype=np.uint8)
        ends = np.empty(len(rows), dtype=np.int64)
        self._loops.join_texts(1, rows, self._table, self._length, self._text, ends)
        return [self._text.data[start:stop] for start, stop in pairwise([0, *ends.tolist()])]

    def _made(self, pairs: np.ndarray) -> np.ndarray:
        """Texts of some pairs with a tab behind each, uint8 [pairs, width], with NUL where nothing is."""
        a, b = np.divmod(pairs, self._loops.VALUES)
        diploid = pairs < self._loops.DIPLOID
        columns = []
        for field in self._fields:
            both = _diploid(field, a[diploid], b[diploid], self._dependence)
            text = np.empty((len(pairs), both.shape[1]), dtype=np.uint8)
            text[diploid] = both
            text[~diploid] = _haploid(field, b[~diploid])
            columns += [text, np.full((len(pairs), 1), ord(":"), dtype=np.uint8)]
        columns[-1][:] = ord("\t")
        return np.concatenate(columns, axis=1)


def _longer(values: np.ndarray, rows: int) -> np.ndarray:
    """An array of more rows that begins with these."""
    return np.concatenate([values, np.empty((rows - len(values), *values.shape[1:]), dtype=values.dtype)])


def _diploid(field: str, a: np.ndarray, b: np.ndarray, dependence: Dependence = INDEPENDENT) -> np.ndarray:
    """Text of one field, uint8 [rows, width]."""
    if field == "GT":
        text = np.empty((len(a), 3), dtype=np.uint8)
        text[:] = np.frombuffer(b"0|0", dtype=np.uint8)
        text[:, 0] += a > 500
        text[:, 2] += b > 500
        return text
    if field == "GP":
        return _listed(_gp(a, b, dependence))
    return _listed({"DS": [a + b], "HDS": [a, b], "AP1": [a], "AP2": [b]}[field])


def _haploid(field: str, a: np.ndarray) -> np.ndarray:
    """Text of one field, as wide as that of a diploid sample."""
    text = np.zeros_like(_diploid(field, a, a))
    if field == "GT":
        text[:, 0] = ord("0") + (a > 500)
    elif field == "AP2":
        text[:, 0] = ord(".")
    else:
        values = _listed([1000 - a, a] if field == "GP" else [a])
        text[:, : values.shape[1]] = values
    return text


def _gp(a: np.ndarray, b: np.ndarray, dependence: Dependence) -> list[np.ndarray]:
    """Probabilities of 0, 1 and 2 ALT copies, in thousandths."""
    less = np.rint(dependence.less(a, b, 1000)).astype(np.int64)
    one = a * (1000 - b) + (1000 - a) * b + 2 * less
    millionths = np.stack([(1000 - a) * (1000 - b) - less, one, a * b - less], axis=1)
    gp = (millionths + 500) // 1000
    # The largest probability absorbs the rounding errors, so that the written values sum to 1.
    gp[np.arange(len(gp)), gp.argmax(axis=1)] += 1000 - gp.sum(axis=1)
    return list(gp.T)


def _listed(values: Sequence[np.ndarray]) -> np.ndarray:
    """Text of values in thousandths, with commas between."""
    digits = _digits()
    comma = np.full((len(values[0]), 1), ord(","), dtype=np.uint8)
    parts = [part for value in values for part in (comma, digits[value])]
    return np.concatenate(parts[1:], axis=1)


@cache
def _digits() -> np.ndarray:
    """Text of the thousandths from 0 to 2000, uint8 [2001, 5], with NUL behind those that are shorter."""
    texts = [_decimals([number]).encode().ljust(5, b"\0") for number in range(2001)]
    return np.array([list(text) for text in texts], dtype=np.uint8)


@lru_cache(maxsize=1 << 16)
def joined_text(fields: tuple[str, ...], first: tuple[int, ...], second: tuple[int, ...] | None) -> str:
    """Text of one sample at a record of K ALTs, from the thousandths of each on its haplotypes.

    ``second`` is None for a haploid sample. The allele of a haplotype is its likeliest one, REF included, and of equal
    ones REF or the first ALT. Probabilities of ALTs that sum to more than 1 are scaled down for GP.
    """
    haplotypes = [first] if second is None else [first, second]
    sums = [sum(each) for each in zip(*haplotypes, strict=True)]
    texts = {
        "GT": "|".join(str(_best(each)) for each in haplotypes),
        "DS": _decimals(sums),
        "AP1": _decimals(first),
        "AP2": "." if second is None else _decimals(second),
    }
    return ":".join(_decimals(_joined_gp(haplotypes)) if field == "GP" else texts[field] for field in fields)


def _best(thousandths: tuple[int, ...]) -> int:
    best = max(thousandths)
    return thousandths.index(best) + 1 if best > 1000 - sum(thousandths) else 0


def _joined_gp(haplotypes: list[tuple[int, ...]]) -> list[int]:
    """Genotype probabilities in thousandths, in VCF's order; they sum to 1000."""
    alleles, wholes = [], []
    for each in haplotypes:
        total = max(1000, sum(each))
        alleles.append([total - sum(each), *each])
        wholes.append(total)
    if len(haplotypes) == 1:
        return _shared_out(alleles[0], wholes[0])
    first, second = alleles
    products = []
    for j in range(len(first)):
        products += [first[i] * second[j] + first[j] * second[i] for i in range(j)]
        products.append(first[j] * second[j])
    return _shared_out(products, wholes[0] * wholes[1])


def _shared_out(parts: list[int], whole: int) -> list[int]:
    """Thousandths that each part is of the whole, by largest remainders: they sum to 1000."""
    shares = [1000 * part // whole for part in parts]
    remainders = [1000 * part % whole for part in parts]
    for place in sorted(range(len(parts)), key=lambda i: (-remainders[i], i))[: 1000 - sum(shares)]:
        shares[place] += 1
    return shares


def _decimals(thousandths: Sequence[int]) -> str:
    """Text of values without zeros behind, as other programs write them."""
    return ",".join(f"{value / 1000:g}" for value in thousandths)


class Statistics:
    """Per site: ``number`` of haplotypes, ``af`` and ``dr2``, and the texts of ``sum`` and ``square_sum``.

    ``af`` and ``dr2`` are computed from the sums as they are printed, so that anybody gets the same numbers from them.
    """

    def __init__(self, number: np.ndarray, sums: np.ndarray, squares: np.ndarray, known: np.ndarray) -> None:
        """Sums of HDS and of its square over ``number`` haplotypes, float64 [n] and int64 [n].

        ``known`` bool [n] marks sites that nothing imputed.
        """
        self.number: list[int] = number.tolist()
        self.sum = [f"{value:.12g}" for value in sums.tolist()]
        self.square_sum = [f"{value:.12g}" for value in squares.tolist()]
        af = np.array(self.sum, dtype=np.float64) / number
        spread = af * (1 - af)
        variance = np.array(self.square_sum, dtype=np.float64) / number - af**2
        # Less than the rounding of the sums could leave: no variance. To twelve digits each is off by 5e-12 at most.
        has_variance = (spread > 0) & (variance > 1.6e-11 * af)
        dr2 = np.divide(variance, spread, out=np.zeros_like(af), where=has_variance)
        self.dr2 = np.where(known, 1.0, np.minimum(dr2, 1.0))
        self.af: list[float] = af.tolist()
