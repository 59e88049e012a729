"""Harmonisation: the sites of a file matched to the panel's. No later step drops sites.

A target's site is related to a panel site at its position in one of four ways: it has the same alleles, the same
alleles exchanged, or either of the two on the other strand. At a palindromic site (A/T or C/G) the strand cannot be
seen: exchanged alleles may as well be the other strand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from embrag_ds.errors import UserError
from embrag_ds.variants.contigs import listed, reconcile
from embrag_ds.variants.records import NO_ALT, Excluded
from embrag_ds.variants.sites import SiteTable

Strand = Literal["report", "flip", "drop"]
"""Rule for sites on the other strand and palindromic ones, see :func:`harmonise`."""
Counts = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""Function of site rows int64 [n]: their number of ALT alleles and of all called alleles, both float64 [n]."""

SAME = "the same alleles"
EXCHANGED = "REF and ALT exchanged"
OTHER_STRAND = "on the other strand"
OTHER_STRAND_EXCHANGED = "on the other strand, REF and ALT exchanged"
RELATIONS = (SAME, EXCHANGED, OTHER_STRAND, OTHER_STRAND_EXCHANGED)
_EXCHANGING = (EXCHANGED, OTHER_STRAND_EXCHANGED)
ABSENT = "not in the panel"
NO_CONTIG = "contig not in the panel"
OTHER_ALLELES = "other alleles in the panel"
SEVERAL_ALTS = "REF and ALT exchanged, of several ALTs"
PALINDROMIC = "palindromic, strand unclear"
SEVERAL = "several such symbolic alleles in the panel"
TWIN = "twin of a matched site"
_NOT_MATCHED = "not matched"

LEAST_ODDS = 1000.0
"""Likelihood ratio from which allele frequencies decide the strand of a palindromic site."""
MOST_MINOR = 0.4
"""Minor allele frequency in the panel (a fraction) above which they never do."""
_COMPLEMENT = str.maketrans("ACGT", "TGCA")


class Match(NamedTuple):
    """A target site matched to a panel site, by their rows; ``relation`` is one of :data:`RELATIONS`."""

    panel: int
    target: int
    relation: str


@dataclass(frozen=True)
class Harmonised:
    """Matched sites of a target and a panel.

    ``panel_index`` int64 [T] and ``target_index`` int64 [T] are rows of the two tables, increasing in the panel.
    A target's site without ALT may be matched to several. ``swapped`` bool [T] marks sites at which 0 and 1 must be
    exchanged in the target. ``matched`` and ``dropped`` count the target's sites by relation and by reason;
    ``palindromic`` counts those matched although palindromic.
    ``reason`` [S] has the reason of each dropped site of the target, and None for the others. ``related`` int64 are all
    panel rows that a site of the target, dropped or not, may be. ``contigs`` maps the target's names of contigs to the
    panel's where they differ.
    """

    panel_index: np.ndarray
    target_index: np.ndarray
    swapped: np.ndarray
    matched: dict[str, int]
    dropped: dict[str, int]
    palindromic: int
    reason: list[str | None]
    related: np.ndarray
    contigs: dict[str, str]

    def reconciled(self) -> str:
        """Text that names the contigs with other names in the panel, for the log; empty if there are none."""
        if not self.contigs:
            return ""
        are = "contig {} is" if len(self.contigs) == 1 else "contigs {} are"
        return f"its {are.format(listed(list(self.contigs)))} the panel's {listed(list(self.contigs.values()))}"

    def report(self) -> str:
        """Text with the numbers of matched and dropped sites, for the log."""
        parts = [f"{len(self.reason)} sites, {sum(self.matched.values())} matched"]
        parts += [f"{count} {relation}" for relation, count in self.matched.items() if relation != SAME]
        text = ", ".join(parts)
        if self.dropped:
            text += "; dropped: " + ", ".join(f"{count} {reason}" for reason, count in self.dropped.items())
        return text

    def numbers(self) -> dict[str, Any]:
        """Numbers of sites, for JSON."""
        return {
            "sites": len(self.reason),
            "matched": len(self.panel_index),
            "matched_by_relation": self.matched,
            "matched_palindromic": self.palindromic,
            "dropped": self.dropped,
            "contigs": self.contigs,
        }

    def excluded(self, sites: SiteTable) -> Iterator[Excluded]:
        """Iterate over the dropped sites of the target, whose table is ``sites``."""
        for row, reason in enumerate(self.reason):
            if reason is not None:
                yield Excluded.at(sites, row, reason)


def harmonise(
    target: SiteTable,
    panel: SiteTable,
    target_name: str,
    panel_name: str,
    strand: Strand = "report",
    target_counts: Counts | None = None,
    panel_counts: Counts | None = None,
) -> Harmonised:
    """Match the target's sites to the panel's, each panel site to one of the target at most.

    With ``report``, sites on the other strand are dropped, and so are palindromic ones with exchanged alleles. With
    ``drop`` all palindromic ones are. With ``flip`` sites on the other strand are matched, and allele frequencies
    decide at every palindromic site: its ALT count in the target must be :data:`LEAST_ODDS` times as likely under the
    panel's frequency p as under 1 - p, or the reverse. Where the minor allele is too common, or the targets are too
    few, it is dropped. Indels are never exchanged: an insertion and a deletion of the same bases are two variants. Nor
    are sites of a record with several ALTs, whose 0 is REF or another ALT.

    A target's record without ALT is matched to SNVs, by its REF. Contigs are reconciled
    (:func:`embrag_ds.variants.contigs.reconcile`). The two names stand for the files in errors. ``flip`` needs both
    functions of counts. Raises :class:`UserError` if no site matches.
    """
    may_flip = strand != "flip" and target_counts is not None
    names = reconcile(target.used_contigs(), panel.used_contigs())
    candidates = _panel_rows_at(target, panel, names)
    matches: list[Match] = []
    unclear: list[list[Match]] = []
    reason: list[str | None] = [_NOT_MATCHED] * len(target)
    related: set[int] = set()
    for row, (code, pos) in enumerate(zip(target.contig.tolist(), target.pos.tolist(), strict=True)):
        contig = names.get(target.contigs[code])
        rows = candidates.get((contig, pos), [])
        groups = [group for each in rows if (group := _relations(target, row, panel, each))]
        related.update(group[0].panel for group in groups)
        if not groups:
            reason[row] = NO_CONTIG if contig is None else OTHER_ALLELES if rows else ABSENT
            continue
        best = min(RELATIONS.index(group[0].relation) for group in groups)
        chosen = [group for group in groups if group[0].relation == RELATIONS[best]]
        if len(chosen) > 1 and target.alt[row] != NO_ALT:
            chosen = [group for group in chosen if _extent(target, row) == _extent(panel, group[0].panel)]
        if not chosen:
            reason[row] = SEVERAL
        for group in chosen:
            if len(group) > 1 and strand == "flip":
                unclear.append(group)
            elif len(group) > 1 and (strand == "drop" or best != RELATIONS.index(SAME)):
                reason[row] = PALINDROMIC
            elif RELATIONS[best] in (SAME, EXCHANGED) or strand == "flip":
                matches.append(group[0])
            else:
                reason[row] = RELATIONS[best]
    for group in unclear:
        reason[group[0].target] = PALINDROMIC
    if unclear:
        assert target_counts is not None and panel_counts is not None
        matches += _by_frequency(unclear, target_counts, panel_counts)
    split = _of_several_alts(target)
    kept: dict[int, Match] = {}
    # A record with ALT says more than one without, and the file's order decides between equals.
    for each in sorted(matches, key=lambda each: _preference(target, each)):
        if each.relation in _EXCHANGING and split[each.target]:
            reason[each.target] = SEVERAL_ALTS
        elif kept.setdefault(each.panel, each) is not each:
            reason[each.target] = TWIN
    for each in kept.values():
        reason[each.target] = None
    if not kept:
        raise UserError(_nothing_in_common(target, panel, target_name, panel_name, _count(reason), may_flip))
    final = list(kept.values())
    return Harmonised(
        panel_index=np.array([each.panel for each in final], dtype=np.int64),
        target_index=np.array([each.target for each in final], dtype=np.int64),
        swapped=np.array([each.relation in _EXCHANGING for each in final], dtype=bool),
        matched=_count(list({each.target: each.relation for each in final}.values())),
        dropped=_count(reason),
        palindromic=len({each.target for each in final if _is_palindromic(panel, each.panel)}),
        reason=reason,
        related=np.array(sorted(related), dtype=np.int64),
        contigs={name: to for name, to in names.items() if name != to},
    )


def _of_several_alts(sites: SiteTable) -> np.ndarray:
    """Which sites are one of several that a record was split into, bool [S]."""
    if sites.record is None:
        return np.zeros(len(sites), dtype=bool)
    _, place, count = np.unique(sites.record, return_inverse=True, return_counts=True)
    several: np.ndarray = count[place] > 1
    return several


def _count(values: Sequence[str | None]) -> dict[str, int]:
    """Number of each value but None, the most frequent first."""
    counts: dict[str, int] = {}
    for value in values:
        if value is not None:
            counts[value] = counts.get(value, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def _panel_rows_at(
    target: SiteTable, panel: SiteTable, names: dict[str, str]
) -> dict[tuple[str | None, int], list[int]]:
    """Panel rows at the target's positions, by contig of the panel and position."""
    code_of = {name: code for code, name in enumerate(panel.contigs)}
    found: dict[tuple[str | None, int], list[int]] = {}
    for contig in set(names.values()):
        # Several contigs of the target may be parts of one, as PLINK's XY is of X.
        codes = [code for code, name in enumerate(target.contigs) if names.get(name) == contig]
        rows = np.flatnonzero(panel.contig == code_of[contig])
        rows = rows[np.isin(panel.pos[rows], target.pos[np.isin(target.contig, codes)])]
        for row, pos in zip(rows.tolist(), panel.pos[rows].tolist(), strict=True):
            found.setdefault((contig, pos), []).append(row)
    return found


def _relations(target: SiteTable, row: int, panel: SiteTable, panel_row: int) -> list[Match]:
    """Ways in which a target site may be a panel site at its position, in the order of :data:`RELATIONS`.

    There are two where the panel's site is palindromic. Of a target site without ALT, only REF is compared.
    """
    ref, alt = target.ref[row], target.alt[row]
    panel_ref, panel_alt = panel.ref[panel_row], panel.alt[panel_row]
    bases = len(panel_ref) == len(panel_alt) and panel_alt.isalpha()
    found = []
    if alt == NO_ALT:
        if bases and len(panel_ref) == 1:
            other = _other_strand(ref)
            pairs = ((ref, panel_ref), (ref, panel_alt), (other, panel_ref), (other, panel_alt))
            found = [relation for relation, (one, two) in zip(RELATIONS, pairs, strict=True) if one == two]
    elif bases:
        theirs, other_strand = (panel_ref, panel_alt), (_other_strand(ref), _other_strand(alt))
        ways = ((ref, alt), (alt, ref), other_strand, other_strand[::-1])
        found = [relation for relation, way in zip(RELATIONS, ways, strict=True) if way == theirs]
    elif (ref, alt) == (panel_ref, panel_alt) and _same_extent(_extent(target, row), _extent(panel, panel_row)):
        found = [SAME]
    return [Match(panel_row, row, relation) for relation in found]


def _extent(sites: SiteTable, row: int) -> str:
    return sites.extent.get(row, "")


def _preference(target: SiteTable, match: Match) -> tuple[int, bool, int, int]:
    """Sorting key of matches, by which the first one for a panel site is kept."""
    without_alt = target.alt[match.target] == NO_ALT
    return match.panel, without_alt, RELATIONS.index(match.relation), match.target


def _same_extent(one: str, other: str) -> bool:
    """Whether two extents agree on the keys that both have."""
    ours, theirs = (dict(part.partition("=")[::2] for part in each.split(";")) for each in (one, other))
    return all(theirs.get(key, value) == value for key, value in ours.items())


def _other_strand(allele: str) -> str:
    return allele.translate(_COMPLEMENT)[::-1]


def _is_palindromic(sites: SiteTable, row: int) -> bool:
    return sites.ref[row] == _other_strand(sites.alt[row])


def _by_frequency(unclear: list[list[Match]], target_counts: Counts, panel_counts: Counts) -> list[Match]:
    """The palindromic matches that allele frequencies decide; each has its two relations to one panel site."""
    alt, called = target_counts(np.array([both[0].target for both in unclear], dtype=np.int64))
    panel_alt, panel_called = panel_counts(np.array([both[0].panel for both in unclear], dtype=np.int64))
    # Half an allele on either side keeps a frequency of 0 from deciding by itself.
    frequency = (panel_alt + 0.5) / (panel_called + 1)
    # Log of the likelihood of ``alt`` ALT among ``called`` alleles under the panel's frequency, over that under 1 - it.
    odds = (2 * alt - called) * np.log(frequency / (1 - frequency))
    clear = (np.minimum(frequency, 1 - frequency) <= MOST_MINOR) & (np.abs(odds) >= np.log(LEAST_ODDS))
    found = []
    for number, both in enumerate(unclear):
        if clear[number]:
            kinds = (SAME, OTHER_STRAND) if odds[number] > 0 else (EXCHANGED, OTHER_STRAND_EXCHANGED)
            found += [each for each in both if each.relation in kinds]
    return found


def _nothing_in_common(
    target: SiteTable, panel: SiteTable, target_name: str, panel_name: str, dropped: dict[str, int], may_flip: bool
) -> str:
    if not dropped:
        remedy = "it has no sites; check the file"
    elif set(dropped) == {NO_CONTIG}:
        remedy = (
            f"its contigs are {listed(target.used_contigs())} and the panel's {listed(panel.used_contigs())}; "
            "rename them (bcftools annotate --rename-chrs) or choose the matching panel"
        )
    else:
        counts = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
        remedy = f"{counts}; check that both use the same genome build and the same region"
        if may_flip and set(dropped) & {*RELATIONS, PALINDROMIC}:
            remedy += ", or try --strand flip"
    return f"{target_name}: no site in common with {panel_name}: {remedy}"
