"""Site tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

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
        """Write the table as text: a header line per contig, then one line per site."""
        numbers = np.arange(len(self)) if self.record is None else self.record
        columns = (self.contig.tolist(), self.pos.tolist(), self.ref, self.alt, self.id, numbers.tolist())
        with path.open("w", encoding="utf-8", errors="surrogateescape", newline="\n") as out:
            for name, length in zip(self.contigs, self.contig_lengths, strict=True):
                out.write(f"#{name}\t{length}\n")
            for row, (code, pos, ref, alt, name, number) in enumerate(zip(*columns, strict=True)):
                out.write(f"{code}\t{pos}\t{ref}\t{alt}\t{name}\t{number}\t{self.extent.get(row, '')}\n")

    @staticmethod
    def load(path: Path) -> SiteTable:
        """Read a table written by :meth:`save`."""
        contigs: list[tuple[str, int]] = []
        rows: list[list[str]] = []
        with path.open(encoding="utf-8", errors="surrogateescape", newline="\n") as lines:
            for line in lines:
                fields = line.rstrip("\n").split("\t")
                if line.startswith("#"):
                    contigs.append((fields[0][1:], int(fields[1])))
                else:
                    rows.append(fields)
        return SiteTable(
            contigs=tuple(name for name, _ in contigs),
            contig_lengths=tuple(length for _, length in contigs),
            contig=np.array([int(row[0]) for row in rows], dtype=np.int32),
            pos=np.array([int(row[1]) for row in rows], dtype=np.int64),
            ref=[row[2] for row in rows],
            alt=[row[3] for row in rows],
            id=[row[4] for row in rows],
            extent={number: row[6] for number, row in enumerate(rows) if row[6]},
            record=np.array([int(row[5]) for row in rows], dtype=np.int64),
        )
