"""Site tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class SiteTable:
    """Table of biallelic sites in file order.

    ``contigs`` and ``contig_lengths`` come from the file's header; lengths are in base pairs, 0 where not given.
    ``contig`` int32 [S] indexes ``contigs`` and ``pos`` int64 [S] is 1-based. ``ref``, ``alt`` and ``id`` are lists of
    S strings. ``record`` int64 [S] numbers the file's records: the sites of a split multi-allelic record share its
    number. None where each site is a record of its own. ``extent`` maps the rows of symbolic alleles, such as
    ``<DEL>``, to what else identifies them. That is text of INFO: ``END=2100``, ``SVLEN=-50`` or both with a semicolon
    between.

    Text from a file is decoded with ``surrogateescape``, so that bytes that are not UTF-8 can be written again.
    """

    contigs: tuple[str, ...]
    contig_lengths: tuple[int, ...]
    contig: np.ndarray
    pos: np.ndarray
    ref: list[str]
    alt: list[str]
    id: list[str]
    extent: Mapping[int, str] = field(default_factory=dict)
    record: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.pos)

    def identities(self) -> Iterator[tuple[str, int, str, str]]:
        """Iterate over (contig, pos, ref, alt) of every site, which identifies a site across files."""
        for code, pos, ref, alt in zip(self.contig.tolist(), self.pos.tolist(), self.ref, self.alt, strict=True):
            yield self.contigs[code], pos, ref, alt

    def contig_runs(self) -> list[tuple[int, int]]:
        """Row ranges [start, stop) of consecutive sites on one contig, in file order."""
        if len(self) == 0:
            return []
        bounds = np.flatnonzero(np.diff(self.contig)) + 1
        edges = [0, *bounds.tolist(), len(self)]
        return list(pairwise(edges))

    def where(self, row: int) -> str:
        """Contig and position of a site, for messages."""
        return f"{self.contigs[self.contig[row]]}:{self.pos[row]}"

    def used_contigs(self) -> list[str]:
        """Names of the contigs that have sites, in file order."""
        return [self.contigs[self.contig[start]] for start, _ in self.contig_runs()]

    def take(self, rows: np.ndarray) -> SiteTable:
        """The table of the sites ``rows`` int64 [n], increasing."""
        return SiteTable(
            self.contigs,
            self.contig_lengths,
            self.contig[rows],
            self.pos[rows],
            [self.ref[row] for row in rows.tolist()],
            [self.alt[row] for row in rows.tolist()],
            [self.id[row] for row in rows.tolist()],
            {place: self.extent[row] for place, row in enumerate(rows.tolist()) if row in self.extent},
            None if self.record is None else self.record[rows],
        )

    def save(self, path: Path) -> None:
        """Write the table as the arrays of an ``.npz`` file; texts are lines of one array, without their end."""
        rows = sorted(self.extent)
        texts: dict[str, Sequence[str]] = {
            "contigs": self.contigs,
            "ref": self.ref,
            "alt": self.alt,
            "id": self.id,
            "extents": [self.extent[row] for row in rows],
        }
        arrays: dict[str, Any] = {
            "contig_lengths": np.array(self.contig_lengths, dtype=np.int64),
            "contig": self.contig,
            "pos": self.pos,
            "record": np.arange(len(self)) if self.record is None else self.record,
            "extent_rows": np.array(rows, dtype=np.int64),
            **{name: _joined(each) for name, each in texts.items()},
        }
        with path.open("wb") as out:
            np.savez(out, **arrays)

    @staticmethod
    def load(path: Path) -> SiteTable:
        """Read a table written by :meth:`save`."""
        with np.load(path) as stored:
            lengths, rows, pos = stored["contig_lengths"], stored["extent_rows"].tolist(), stored["pos"]
            return SiteTable(
                contigs=tuple(_split(stored["contigs"], len(lengths))),
                contig_lengths=tuple(lengths.tolist()),
                contig=stored["contig"].astype(np.int32),
                pos=pos.astype(np.int64),
                ref=_split(stored["ref"], len(pos)),
                alt=_split(stored["alt"], len(pos)),
                id=_split(stored["id"], len(pos)),
                extent=dict(zip(rows, _split(stored["extents"], len(rows)), strict=True)),
                record=stored["record"].astype(np.int64),
            )


def _joined(texts: Sequence[str]) -> np.ndarray:
    """Texts as lines, uint8 [bytes]."""
    return np.frombuffer("\n".join(texts).encode("utf-8", "surrogateescape"), dtype=np.uint8)


def _split(lines: np.ndarray, number: int) -> list[str]:
    """The texts, of that number, which :func:`_joined` made lines of; raises ValueError if a text was no line."""
    texts = lines.tobytes().decode("utf-8", "surrogateescape").split("\n") if number else []
    if len(texts) != number:
        raise ValueError(f"{len(texts)} texts of {number}")
    return texts
