"""The site table, and its harmonisation: the one place where sites are matched or dropped."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

from embrag_ds.errors import UserError


@dataclass(frozen=True)
class SiteTable:
    """Biallelic sites in file order.

    ``contigs`` and ``contig_lengths`` (base pairs, 0 where the header does not say) come from the
    file's header; ``contig`` [S] int32 indexes into them; ``pos`` [S] int64 is 1-based; ``ref``,
    ``alt`` and ``id`` are lists of S strings.
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
        """(contig, pos, ref, alt) of every site: what identifies a site across files."""
        for code, pos, ref, alt in zip(self.contig.tolist(), self.pos.tolist(), self.ref, self.alt, strict=True):
            yield self.contigs[code], pos, ref, alt

    def contig_runs(self) -> list[tuple[int, int]]:
        """[start, stop) of each contig's run of sites, in file order."""
        if len(self) == 0:
            return []
        bounds = np.flatnonzero(np.diff(self.contig)) + 1
        edges = [0, *bounds.tolist(), len(self)]
        return list(pairwise(edges))

    def save(self, path: Path) -> None:
        """Write as a text table: header lines for the contigs, then one line per site."""
        with path.open("w", encoding="utf-8") as out:
            for name, length in zip(self.contigs, self.contig_lengths, strict=True):
                out.write(f"#{name}\t{length}\n")
            for code, pos, ref, alt, name in zip(
                self.contig.tolist(), self.pos.tolist(), self.ref, self.alt, self.id, strict=True
            ):
                out.write(f"{code}\t{pos}\t{ref}\t{alt}\t{name}\n")

    @staticmethod
    def load(path: Path) -> SiteTable:
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
    """Which panel site each usable target site is.

    ``panel_index`` [T] and ``target_index`` [T] are row numbers in the two tables, increasing in
    the panel; ``swapped`` [T] marks sites whose REF and ALT are exchanged between the files (the
    target's alleles must be flipped 0 <-> 1). ``dropped`` counts target sites by reason.
    """

    panel_index: np.ndarray
    target_index: np.ndarray
    swapped: np.ndarray
    dropped: dict[str, int] = field(default_factory=dict)

    def report(self) -> str:
        matched = len(self.panel_index)
        parts = [f"{matched} sites matched", f"{int(self.swapped.sum())} of them with REF/ALT exchanged"]
        parts += [f"{count} dropped ({reason})" for reason, count in self.dropped.items() if count]
        return ", ".join(parts)


def harmonise(target: SiteTable, panel: SiteTable, target_name: str, panel_name: str) -> Harmonised:
    """Match the target's sites to the panel's on (contig, pos, ref, alt).

    A site whose REF and ALT are exchanged is matched and marked; other alleles at a known position
    and positions the panel lacks are dropped and counted. Strands are never guessed. Raises
    :class:`UserError` when nothing matches.
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
