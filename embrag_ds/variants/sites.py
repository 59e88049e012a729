"""Site tables and their harmonisation. Only here are sites of two files matched, or dropped."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

from embrag_ds.errors import UserError


@dataclass(frozen=True)
class SiteTable:
    """Table of biallelic sites in file order.

    ``contigs`` and ``contig_lengths`` come from the file's header; lengths are in base pairs, 0 where not given.
    ``contig`` int32 [S] indexes ``contigs`` and ``pos`` int64 [S] is 1-based. ``ref``, ``alt`` and ``id`` are lists of
    S strings.
    """

    contigs: tuple[str, ...]
    contig_lengths: tuple[int, ...]
    contig: np.ndarray
    pos: np.ndarray
    ref: list[str]
    alt: list[str]
    id: list[str]

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

    def save(self, path: Path) -> None:
        """Write the table as text: a header line per contig, then one line per site."""
        with path.open("w", encoding="utf-8") as out:
            for name, length in zip(self.contigs, self.contig_lengths, strict=True):
                out.write(f"#{name}\t{length}\n")
            for code, pos, ref, alt, name in zip(
                self.contig.tolist(), self.pos.tolist(), self.ref, self.alt, self.id, strict=True
            ):
                out.write(f"{code}\t{pos}\t{ref}\t{alt}\t{name}\n")

    @staticmethod
    def load(path: Path) -> SiteTable:
        """Read a table written by :meth:`save`."""
        contigs: list[tuple[str, int]] = []
        rows: list[list[str]] = []
        with path.open(encoding="utf-8") as lines:
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
        )


@dataclass(frozen=True)
class Harmonised:
    """Matched sites of a target and a panel.

    ``panel_index`` int64 [T] and ``target_index`` int64 [T] are rows of the two tables, increasing in the panel.
    ``swapped`` bool [T] marks sites whose REF and ALT are exchanged, so that 0 and 1 must be exchanged in the target.
    ``dropped`` counts the target's dropped sites by reason.
    """

    panel_index: np.ndarray
    target_index: np.ndarray
    swapped: np.ndarray
    dropped: dict[str, int] = field(default_factory=dict)

    def report(self) -> str:
        """Text with the numbers of matched and dropped sites, for the log."""
        matched = len(self.panel_index)
        parts = [f"{matched} sites matched", f"{int(self.swapped.sum())} of them with REF/ALT exchanged"]
        parts += [f"{count} dropped ({reason})" for reason, count in self.dropped.items() if count]
        return ", ".join(parts)


def harmonise(target: SiteTable, panel: SiteTable, target_name: str, panel_name: str) -> Harmonised:
    """Match the target's sites to the panel's by (contig, pos, ref, alt).

    A site with REF and ALT exchanged is matched and marked, unless the target also has its exact twin. All other sites
    are dropped and counted. Strand flips are never inferred. Raises :class:`UserError` if no site matches;
    ``target_name`` and ``panel_name`` stand for the files in it.
    """
    where = {key: row for row, key in enumerate(panel.identities())}
    positions = {(contig, pos) for contig, pos, _, _ in where}
    exact = set(target.identities()) & where.keys()
    matches: list[tuple[int, int, bool]] = []
    dropped = {"not in the panel": 0, "other alleles in the panel": 0, "exchanged twin of a matched site": 0}
    for row, (contig, pos, ref, alt) in enumerate(target.identities()):
        found = where.get((contig, pos, ref, alt))
        if found is not None:
            matches.append((found, row, False))
            continue
        found = where.get((contig, pos, alt, ref))
        if found is not None and (contig, pos, alt, ref) in exact:
            dropped["exchanged twin of a matched site"] += 1
        elif found is not None:
            matches.append((found, row, True))
        elif (contig, pos) in positions:
            dropped["other alleles in the panel"] += 1
        else:
            dropped["not in the panel"] += 1
    if not matches:
        raise UserError(_nothing_in_common(target, panel, target_name, panel_name))
    matches.sort()
    return Harmonised(
        panel_index=np.array([panel_row for panel_row, _, _ in matches], dtype=np.int64),
        target_index=np.array([target_row for _, target_row, _ in matches], dtype=np.int64),
        swapped=np.array([swapped for _, _, swapped in matches], dtype=bool),
        dropped=dropped,
    )


def _nothing_in_common(target: SiteTable, panel: SiteTable, target_name: str, panel_name: str) -> str:
    def used(sites: SiteTable) -> list[str]:
        return sorted({sites.contigs[code] for code in np.unique(sites.contig).tolist()})

    if not set(used(target)) & set(used(panel)):
        remedy = (
            f"its contigs are {', '.join(used(target)) or 'none'} and the panel's {', '.join(used(panel))}; "
            "rename them (bcftools annotate --rename-chrs) or choose the matching panel"
        )
    else:
        remedy = "check that both use the same genome build and the same region"
    return f"{target_name}: no site in common with {panel_name} on (contig, pos, ref, alt): {remedy}"
