"""The report page of an imputed file."""

from __future__ import annotations

from typing import Any

import numpy as np

from embrag_ds.evaluation.metrics import DISJOINT_BINS
from embrag_ds.reports.bars import Dot, Track, columns_chart, dots_chart, histogram, tracks_chart
from embrag_ds.reports.charts import RAMP
from embrag_ds.reports.imputed_facts import ImputedFacts
from embrag_ds.reports.left_out_part import ImputeReport
from embrag_ds.reports.page import Page
from embrag_ds.reports.samples_part import DEVIATIONS, LEAST_SAMPLES, Quality
from embrag_ds.reports.sites_part import DR2_BINS, LEVELS, Contig
from embrag_ds.reports.text import facts, paragraph, plain, share, table, thinned

MOST_SAMPLES = 5000
"""Samples that the page's numbers list at most."""
_MOST_DOTS = 2000
_MOST_LISTED = 200
_CERTAINTY_BINS = 20

_MOST_BARS, _FEWEST_BARS, _TYPED_IN_A_BAR = 256, 40, 4
_SOURCES = {
    "GP": "GP",
    "HDS": "haplotype dosages",
    "DS": "the distance of DS from a whole number",
    "none": "nothing, for FORMAT has GT alone",
}

Reasons = dict[tuple[str, str], int]


def imputed_numbers(found: ImputedFacts, report: ImputeReport | None, excluded: Reasons | None) -> dict[str, Any]:
    """The page's numbers, for JSON."""
    sites = found.sites
    return {
        "kind": "imputed",
        "sources": list(found.sources),
        "records": found.records,
        "left_out": found.left_out,
        "sites": sites.sites,
        "typed": sites.typed if found.has_marks else None,
        "frequencies_from": found.frequencies,
        "r2": sites.r2(),
        "contigs": [
            {
                "name": each.name,
                "length": each.length,
                "first": each.first,
                "last": each.last,
                "sites": each.sites,
                "typed": each.typed if found.has_marks else None,
                "longest_gap": each.longest_gap if found.has_marks else None,
            }
            for each in sites.contigs
        ],
        "tracks": [
            {
                "contig": each.name,
                "start": each.density.start,
                "width": each.density.width,
                "typed": each.density.counts(each.last),
            }
            for each in sites.contigs
            if found.has_marks and each.density is not None
        ],
        "gaps": [each._asdict() for each in sites.gaps] if found.has_marks else [],
        "number_of_samples": len(found.samples),
        "samples": [each._asdict() for each in thinned(found.samples, MOST_SAMPLES)],
        "outliers": [each._asdict() for each in found.outliers[:MOST_SAMPLES]],
        "certainty_from": found.sites_by_source,
        "imputation": None if report is None else {"left_out": _nested(report.left_out), "matched": report.matched},
        "excluded": None if excluded is None else _nested(excluded),
    }


def imputed_page(found: ImputedFacts, report: ImputeReport | None, excluded: Reasons | None) -> Page:
    """The page of an imputed file, with what its imputation reported and left out where that is known."""
    source = "; ".join(found.sources) or "the header has no ##source line"
    page = Page(f"Imputed {plain(found.path.name)}", f"{plain(found.path)}, written by: {source}")
    page.add("Summary", _summary(found))
    page.add("Estimated r2", _r2(found))
    page.add("Sites and typed sites", _contigs(found))
    page.add("Samples", _samples(found))
    page.add("Left out", _left_out(found, report, excluded))
    return page


def _summary(found: ImputedFacts) -> str:
    every = found.sites.r2()[-1]
    parts = [(level, share(every["at_least"][f"{level:g}"], every["with_r2"])) for level in LEVELS]
    pairs = [
        ("samples", len(found.samples) or "none: a file of sites only"),
        ("sites", found.sites.sites),
        ("typed sites", found.sites.typed if found.has_marks else "not marked in this file"),
        ("contigs", len(found.sites.contigs)),
        ("mean DR2 of imputed sites", every["mean"]),
        *((f"imputed sites at DR2 of {level:g} or more", part) for level, part in parts),
        ("mean certainty of a sample", _mean([each.certainty for each in found.samples])),
        ("outlying samples", len({each.name for each in found.outliers})),
    ]
    content = facts(pairs)
    for remark in found.remarks:
        content += paragraph(f"Warning: {remark}.", "bad")
    if not found.has_marks:
        content += paragraph(
            "The header defines no flag IMP or IMPUTED, so typed sites are not known: every site counts as imputed."
        )
    return content


def _r2(found: ImputedFacts) -> str:
    rows = found.sites.r2()
    if not rows[-1]["sites"]:
        return paragraph("The file has no imputed site.")
    if not rows[-1]["with_r2"]:
        return paragraph("No record has INFO DR2 or R2, so nothing is known of how well sites were imputed.")
    bins = [row for row in rows if row["maf"] != "all"]
    where = ", ".join(f"{what} ({count:,} sites)" for what, count in found.frequencies.items() if count)
    note = paragraph(
        "DR2 is the file's own estimate of r2, of imputed sites; it is no comparison with a truth. The minor-allele "
        f"frequency (MAF) is that of the imputed samples, from {where}."
    )
    charts = [
        columns_chart(
            "Share of sites by DR2",
            ("minor-allele frequency", "share of imputed sites"),
            [row["maf"] for row in bins],
            {
                f"DR2 of {level:g} or more": [_part(row["at_least"][f"{level:g}"], row["with_r2"]) for row in bins]
                for level in LEVELS
            },
        ),
        *(
            histogram(
                f"DR2 at MAF {row['maf']}",
                ("DR2", "imputed sites"),
                [place / DR2_BINS for place in range(DR2_BINS + 1)],
                row["histogram"],
                RAMP[DISJOINT_BINS.index(row["maf"])] if row["maf"] in DISJOINT_BINS else "c5",
            )
            for row in bins
            if row["with_r2"]
        ),
    ]
    head = ["MAF", "imputed sites", "with DR2", "mean DR2", *(f"DR2 of {level:g} or more" for level in LEVELS)]
    cells = []
    for row in rows:
        reach = (share(row["at_least"][f"{level:g}"], row["with_r2"]) for level in LEVELS)
        cells.append([row["maf"], row["sites"], row["with_r2"], row["mean"], *reach])
    content = note + table(head, cells, "Estimated r2 by minor-allele frequency")
    return content + f'<div class="charts">{"".join(charts)}</div>\n'


def _contigs(found: ImputedFacts) -> str:
    contigs = found.sites.contigs
    if not contigs:
        return paragraph("The file has no record.")
    content = _contig_table(found)
    if not found.has_marks:
        return content + paragraph("The file does not mark typed sites, so where they lie is not known.")
    if not found.sites.typed:
        return content + paragraph("The file has no typed site.")
    gaps = found.sites.gaps
    caption = f"The {len(gaps)} longest gaps between typed sites"
    data = table(
        ["contig", "from, bp", "to, bp", "length, bp", "imputed sites in it"],
        [[gap.contig, gap.first, gap.last, gap.length, gap.imputed] for gap in gaps],
        caption,
    )
    tracks = []
    for each in contigs:
        if each.density is not None:
            own = [(gap.first, gap.last) for gap in gaps if gap.contig == each.name]
            tracks.append(Track(each.name, each.density.start, each.last, *_drawn(each), own))
    note = (
        f"Bars below an axis are the {len(gaps)} longest gaps of the file. A gap reaches from one typed site to the "
        "next, or to the contig's first or last site."
    )
    if len(tracks) < len(contigs):
        note += f" The {len(tracks)} contigs with the most sites are drawn."
    chart = tracks_chart("Typed sites along the chromosomes", "typed sites", tracks, data, note)
    return content + f'<div class="charts">{chart}</div>\n'


def _contig_table(found: ImputedFacts) -> str:
    contigs = found.sites.contigs
    listed = _listed(contigs)
    head = ["contig", "sites", "first site, bp", "last site, bp"]
    rows: list[list[object]] = [[each.name, each.sites, each.first, each.last] for each in listed]
    if found.has_marks:
        head += ["typed sites", "typed share", "longest gap, bp"]
        for row, each in zip(rows, listed, strict=True):
            row += [each.typed, share(each.typed, each.sites), each.longest_gap]
    content = table(head, rows, "Sites by contig")
    if len(listed) < len(contigs):
        sites = sum(each.sites for each in contigs) - sum(each.sites for each in listed)
        content += paragraph(f"{len(contigs) - len(listed):,} more contigs have {sites:,} sites in all.")
    return content


def _drawn(contig: Contig) -> tuple[int, list[int]]:
    """Width and counts of a contig's bins for a drawing: wider ones than the tally's, with some sites in each."""
    assert contig.density is not None
    width, counts = contig.density.width, contig.density.counts(contig.last)
    while len(counts) > _MOST_BARS or (len(counts) > _FEWEST_BARS and contig.typed < _TYPED_IN_A_BAR * len(counts)):
        width, counts = 2 * width, [sum(counts[place : place + 2]) for place in range(0, len(counts), 2)]
    return width, counts


def _samples(found: ImputedFacts) -> str:
    if not found.samples:
        return paragraph("The file has no sample columns (--sites-only), so nothing is known of the samples.")
    if not found.sites.sites:
        return paragraph("The file has no record.")
    sources = ", ".join(f"{_SOURCES[name]} ({count:,} sites)" for name, count in found.sites_by_source.items())
    content = paragraph(
        "Certainty is the mean probability of the likeliest genotype over imputed sites, from "
        f"{sources or 'no imputed site'}. Heterozygosity is the share of heterozygotes among diploid calls, at all "
        "sites."
    )
    content += _outliers(found)
    listed = _listed_samples(found)
    caption = f"{len(listed):,} samples"
    if len(listed) < len(found.samples):
        caption = f"{len(listed):,} of {len(found.samples):,} samples: outliers, and the least certain ones"
    head = ["sample", "mean certainty", "heterozygosity", "calls", "haploid calls", "missing values"]
    content += f'<div class="charts">{"".join(_sample_charts(found))}</div>\n'
    return content + table(head, listed, caption)


def _sample_charts(found: ImputedFacts) -> list[str]:
    charts = []
    certainties = [each.certainty for each in found.samples if each.certainty is not None]
    if certainties:
        counts, edges = np.histogram(certainties, bins=_CERTAINTY_BINS, range=_range(certainties))
        axes = ("mean certainty", "samples")
        charts.append(histogram("Samples by certainty", axes, edges.tolist(), counts.tolist()))
    named = {each.name for each in found.outliers}
    whole = [each for each in found.samples if each.certainty is not None and each.heterozygosity is not None]
    drawn = thinned([each for each in whole if each.name not in named], _MOST_DOTS)
    drawn += [each for each in whole if each.name in named][:_MOST_LISTED]
    if drawn:
        dots = [
            Dot(each.certainty or 0.0, each.heterozygosity or 0.0, plain(each.name), each.name in named)
            for each in drawn
        ]
        note = "The table below has the numbers of outliers and the least certain ones; JSON has all."
        if len(drawn) < len(whole):
            note = f"{len(drawn):,} of {len(whole):,} samples are drawn."
        charts.append(dots_chart("Heterozygosity and certainty", ("mean certainty", "heterozygosity"), dots, note))
    return charts


def _outliers(found: ImputedFacts) -> str:
    if len(found.samples) < LEAST_SAMPLES:
        return paragraph(f"Outliers are named from {LEAST_SAMPLES} samples on.")
    rule = f"more than {DEVIATIONS:g} robust standard deviations from the median"
    if not found.outliers:
        return paragraph(f"No sample is an outlier ({rule}).")
    shown = found.outliers[:_MOST_LISTED]
    more = "" if len(shown) == len(found.outliers) else f", the first {len(shown)} of {len(found.outliers):,}"
    return table(["sample", "why"], shown, f"Outliers: {rule}{more}", texts=2)


def _listed_samples(found: ImputedFacts) -> list[Quality]:
    if len(found.samples) <= _MOST_LISTED:
        return found.samples
    named = {each.name for each in found.outliers[: _MOST_LISTED // 2]}
    outlying = [each for each in found.samples if each.name in named]
    others = [each for each in found.samples if each.name not in named]
    others.sort(key=lambda each: 2.0 if each.certainty is None else each.certainty)
    return outlying + others[: _MOST_LISTED - len(outlying)]


def _listed(contigs: list[Contig]) -> list[Contig]:
    """The contigs with the most sites, in the file's order."""
    if len(contigs) <= _MOST_LISTED:
        return contigs
    kept = {each.name for each in sorted(contigs, key=lambda each: -each.sites)[:_MOST_LISTED]}
    return [each for each in contigs if each.name in kept]


def _left_out(found: ImputedFacts, report: ImputeReport | None, excluded: Reasons | None) -> str:
    content = ""
    if found.left_out:
        caption = "Left out of this file when it was read for the report"
        content += table(["reason", "records or ALTs"], found.left_out.items(), caption)
    if report is None:
        content += paragraph(
            "What the imputation matched is not known: --impute-report names the JSON of its --report."
        )
    else:
        content += _reported(report)
    if excluded is None:
        return content + paragraph("No list of the sites left out was given: --excluded names that of the imputation.")
    return content + _by_reason(excluded, "Sites left out by the imputation, from its list")


def _reported(report: ImputeReport) -> str:
    content = _by_reason(report.left_out, "Sites left out by the imputation, from its report")
    caption = f"Sites of the targets that were matched; {report.typed_sites:,} typed sites"
    content += table(["relation to the panel's site", "sites"], report.matched.items(), caption)
    rates = sorted(report.call_rates.items(), key=lambda item: item[1])
    low = [rate for rate in rates if rate[1] < 1]
    if low:
        caption = f"Samples with missing calls: {len(low):,}, the lowest call rates first"
        content += table(["sample", "call rate"], low[:_MOST_LISTED], caption)
    elif rates:
        content += paragraph("No sample of the targets misses a call at the panel's sites.")
    return content + "".join(paragraph(_adaptation(each)) for each in report.adaptations)


def _adaptation(section: dict[str, Any]) -> str:
    if "left_alone" in section:
        return f"The model was not adapted to the panel: {section['left_alone']}."
    if "kept" not in section:
        return f"The model was not adapted to the panel (--adapt {section.get('adapt')})."
    kept = "and the adapted model imputed" if section["kept"] else "but was not better then, and imputed as it was"
    scale = section.get("map_scale")
    return f"The model adapted to the panel in {section.get('steps')} steps, {kept}. Map scale: {scale}."


def _by_reason(counts: Reasons, what: str) -> str:
    if not counts:
        return paragraph(f"{what}: none.")
    rows = [[*key, count] for key, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
    return table(["file", "reason", "sites"], rows, f"{what}: {sum(counts.values()):,}", texts=2)


def _nested(counts: Reasons) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for (what, reason), count in counts.items():
        found.setdefault(what, {})[reason] = count
    return found


def _part(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _range(values: list[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high - low > 1e-6 else (low - 0.005, low + 0.005)
