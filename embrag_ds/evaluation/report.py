"""Evaluation report: scores of every tool, as tables and as JSON."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from embrag_ds.evaluation import metrics
from embrag_ds.evaluation.carriers import FEWEST_CARRIERS, CarrierCalibration, Gap

GENOTYPES, HAPLOTYPES = "GP", "haplotype probabilities"
"""Probabilities that the IQS is computed from."""


@dataclass(frozen=True)
class Scores:
    """Scores of one tool.

    A dict of numbers has one for each of ``metrics.MAF_BINS``, by name; one that ends in ``by_count`` has one for each
    of ``metrics.COUNT_BINS``. Every interval is a 95 % bootstrap interval over samples. ``calibration_error`` is over
    all genotypes, ``rare_calibration_error`` over called carriers of an allele below 1 % MAF. ``called_carriers`` has
    the calibration of called carriers (:class:`~embrag_ds.evaluation.carriers.CalledCarriers`), and
    ``largest_carrier_gap`` the bin where it is worst (:func:`~embrag_ds.evaluation.carriers.largest_gap`). These are
    None for a tool without genotype probabilities. A curve is (mean probability, fraction called correctly, genotypes)
    per bin of the probability. ``iqs_from`` names the probabilities that ``iqs`` is computed from, ``GENOTYPES`` or
    ``HAPLOTYPES``; both are None for a tool without either. ``dr2_correlation`` compares the tool's DR2 with the true
    per-site r2; None without DR2. ``populations`` has the aggregate r2 of each population.
    """

    aggregate_r2: dict[str, float]
    aggregate_r2_interval: dict[str, tuple[float, float]]
    aggregate_r2_by_count: dict[str, float]
    aggregate_r2_by_count_interval: dict[str, tuple[float, float]]
    site_r2: dict[str, float]
    concordance: dict[str, float]
    non_reference_concordance: dict[str, float]
    iqs: dict[str, float] | None
    iqs_from: str | None
    calibration_error: float | None
    rare_calibration_error: float | None
    calibration_curve: list[tuple[float, float, int]]
    rare_calibration_curve: list[tuple[float, float, int]]
    called_carriers: dict[str, CarrierCalibration] | None
    called_carriers_by_count: dict[str, CarrierCalibration] | None
    largest_carrier_gap: Gap | None
    dr2_correlation: dict[str, float] | None
    populations: dict[str, dict[str, float]]


@dataclass(frozen=True)
class Difference:
    """Aggregate r2 of tool ``a`` minus that of ``b``, with a 95 % interval paired over the same resamples.

    By bin of the minor-allele frequency, and by bin of the minor-allele count.
    """

    a: str
    b: str
    difference: dict[str, float]
    interval: dict[str, tuple[float, float]]
    difference_by_count: dict[str, float]
    interval_by_count: dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Section:
    """One table of a report, with cells of text, and a line below it unless ``remark`` is empty."""

    title: str
    header: list[str]
    rows: list[list[str]]
    remark: str = ""


@dataclass(frozen=True)
class Report:
    """Result of :func:`embrag_ds.evaluation.score.evaluate`.

    ``sites`` counts the scored sites by bin, ``sites_by_count`` by bin of the minor-allele count. The latter leaves out
    ``sites_monomorphic_in_panel``. ``sites_without_truth_variance`` counts those without a per-site r2.
    ``missing_truth_genotypes`` counts genotypes at scored sites that the truth lacks; they are not scored.
    ``populations`` has the number of samples of each. ``harmonisation`` has the numbers of every file's sites and of
    those matched to the panel's and dropped. ``tools_not_run`` names the tools that were to be run and could not, each
    with the reason.
    """

    files: dict[str, str]
    samples: int
    sites: dict[str, int]
    sites_by_count: dict[str, int]
    sites_monomorphic_in_panel: int
    sites_without_truth_variance: dict[str, int]
    missing_truth_genotypes: int
    typed_sites: int
    bootstrap: int
    seed: int
    populations: dict[str, int]
    tools: dict[str, Scores]
    differences: list[Difference]
    harmonisation: dict[str, dict[str, Any]] = field(default_factory=dict)
    tools_not_run: dict[str, str] = field(default_factory=dict)

    def sections(self) -> list[Section]:
        """The report's tables, those of :meth:`summary` first."""
        header = ["", *metrics.BIN_NAMES]
        sections = [*self._first_sections(), self._by_count()]
        if self.bootstrap:
            resampled = f"over {self.bootstrap} bootstrap draws of the samples"
            intervals = [[tool, *_interval_row(s.aggregate_r2_interval)] for tool, s in self.tools.items()]
            sections.append(Section(f"95 % interval {resampled}", header, intervals))
        if self.bootstrap and self.differences:
            rows = [[f"{each.a} - {each.b}", *_interval_row(each.interval)] for each in self.differences]
            sections.append(Section(f"95 % interval of the paired difference {resampled}", header, rows))
        if any(scores.called_carriers is not None for scores in self.tools.values()):
            sections.append(self._called_carriers())
        sections.append(self._other_measures())
        for population, samples in self.populations.items():
            rows = [[tool, *_row(scores.populations[population])] for tool, scores in self.tools.items()]
            sections.append(Section(f"Aggregate dosage r2, {population}, {samples} samples", header, rows))
        return sections

    def _first_sections(self) -> list[Section]:
        counts = ["sites", *(str(self.sites[name]) for name in metrics.BIN_NAMES)]
        r2 = Section(
            f"Aggregate dosage r2 by panel minor-allele frequency, {self.samples} samples{self._missing()}",
            ["", *metrics.BIN_NAMES],
            [counts, *([tool, *_row(scores.aggregate_r2)] for tool, scores in self.tools.items())],
        )
        return [r2, self._calls()]

    def _calls(self) -> Section:
        rows = []
        for tool, scores in self.tools.items():
            measures = (scores.concordance, scores.non_reference_concordance, scores.iqs or {})
            errors = (scores.calibration_error, scores.rare_calibration_error)
            rows.append([tool, *(_number(measure.get("all")) for measure in measures), *map(_number, errors)])
        return Section(
            f"Calls at all {self.sites['all']} sites; ECE is the calibration error of their probabilities, 0 at best",
            ["", "concordance", "non-ref concordance", "IQS", "ECE", "ECE of rare carriers"],
            rows,
            self._iqs_from(),
        )

    def _iqs_from(self) -> str:
        """Which tools have their IQS from what."""
        tools: dict[str | None, list[str]] = {}
        for tool, scores in self.tools.items():
            tools.setdefault(scores.iqs_from, []).append(tool)
        said = [f"from {kind}: {', '.join(tools[kind])}" for kind in (GENOTYPES, HAPLOTYPES) if kind in tools]
        if None in tools:
            said.append(f"none without GP and HDS: {', '.join(tools[None])}")
        return f"IQS {'; '.join(said)}"

    def _by_count(self) -> Section:
        names = metrics.COUNT_NAMES
        left_out = self.sites_monomorphic_in_panel
        return Section(
            "Aggregate dosage r2 by the number of haplotypes in the panel with the minor allele"
            + (f" (without {left_out} sites where there is none)" if left_out else ""),
            ["", *names],
            [
                ["sites", *(str(self.sites_by_count[name]) for name in names)],
                *([tool, *_row(scores.aggregate_r2_by_count, names)] for tool, scores in self.tools.items()),
            ],
        )

    def _called_carriers(self) -> Section:
        names = (*metrics.DISJOINT_BINS, *metrics.COUNT_NAMES)
        rows = []
        for tool, scores in self.tools.items():
            if scores.called_carriers is None or scores.called_carriers_by_count is None:
                continue
            found = {**scores.called_carriers, **scores.called_carriers_by_count}
            rows.append([f"{tool}: called", *(str(found[name].number) for name in names)])
            rows.append([f"{tool}: said", *(_number(found[name].said) for name in names)])
            rows.append([f"{tool}: right", *(_number(found[name].right) for name in names)])
            if self.bootstrap:
                for place, limit in enumerate(("from", "to")):
                    limits = (_number(found[name].interval[place]) for name in names)
                    rows.append([f"{tool}: said - right, {limit}", *limits])
        return Section(
            "Called carriers of the minor allele, by its frequency and by its count in the panel: mean probability "
            "said of the called genotype, share that is right" + (", 95 % interval" if self.bootstrap else ""),
            ["", *names],
            rows,
        )

    def _missing(self) -> str:
        if not self.missing_truth_genotypes:
            return ""
        genotypes = self.samples * self.sites["all"]
        return f"; {self.missing_truth_genotypes} of {genotypes} truth genotypes are missing and not scored"

    def _other_measures(self) -> Section:
        header = ["", "mean site r2", "largest |said - right|", "DR2 correlation", "DR2 correlation, <1 %"]
        rows = []
        for tool, scores in self.tools.items():
            estimated = scores.dr2_correlation or {}
            correlations = (_number(estimated.get(each)) for each in ("all", "all <1 %"))
            rows.append([tool, _number(scores.site_r2["all"]), _gap(scores.largest_carrier_gap), *correlations])
        left_out = self.sites_without_truth_variance["all"]
        return Section(
            f"Other measures, all sites (site r2 without {left_out} where the truth is constant; |said - right| of the "
            f"bins with {FEWEST_CARRIERS} called carriers)",
            header,
            rows,
        )

    def summary(self) -> str:
        """The first tables as plain text, and where the others are."""
        tables = map(_text_table, self._first_sections())
        return "\n\n".join([*tables, *self._not_run(), self._where_the_rest_is()]) + "\n"

    def table(self) -> str:
        """All tables as plain text with aligned columns."""
        return "\n\n".join([*map(_text_table, self.sections()), *self._not_run()]) + "\n"

    def markdown(self) -> str:
        """All tables in Markdown."""
        return "\n\n".join([*map(_markdown_table, self.sections()), *self._not_run()]) + "\n"

    def _where_the_rest_is(self) -> str:
        """What :meth:`table` has beyond :meth:`summary`."""
        carriers = any(scores.called_carriers is not None for scores in self.tools.values())
        others = {
            "by allele count": True,
            "95 % intervals": self.bootstrap > 0,
            "called carriers": carriers,
            "DR2": True,
            "populations": bool(self.populations),
        }
        tables = ", ".join(each for each, is_there in others.items() if is_there)
        return f"More tables ({tables}): --details. Every number: --json FILE."

    def _not_run(self) -> list[str]:
        reasons = [f"{name} ({why})" for name, why in self.tools_not_run.items()]
        return [f"Not run: {', '.join(reasons)}"] if reasons else []

    def to_json(self) -> dict[str, Any]:
        """The whole report as types that ``json`` writes; undefined numbers are None."""
        result = _plain(vars(self))
        assert isinstance(result, dict)
        return result


def _number(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.4f}"


def _gap(largest: Gap | None) -> str:
    return "-" if largest is None else f"{_number(largest.gap)} ({largest.bin})"


def _row(values: dict[str, float], names: tuple[str, ...] = metrics.BIN_NAMES) -> list[str]:
    return [_number(values[name]) for name in names]


def _interval_row(limits: dict[str, tuple[float, float]]) -> list[str]:
    return [" to ".join(_number(limit) for limit in limits[name]) for name in metrics.BIN_NAMES]


def _text_table(section: Section) -> str:
    lines = [section.header, *section.rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(section.header))]
    text = [section.title]
    for line in lines:
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        text.append("  ".join(cells).rstrip())
    return "\n".join([*text, *filter(None, [section.remark])])


def _markdown_table(section: Section) -> str:
    ruler = ["---", *("---:" for _ in section.header[1:])]
    rows = [[cell.replace("|", r"\|") for cell in row] for row in (section.header, ruler, *section.rows)]
    lines = ["| " + " | ".join(cells) + " |" for cells in rows]
    remark = ["", section.remark] if section.remark else []
    return "\n".join([f"**{section.title}**", "", *lines, *remark])


def _plain(value: object) -> object:
    """A value as JSON types: dataclasses as dicts, tuples as lists, NaN as None."""
    if isinstance(value, Scores | Difference | CarrierCalibration | Gap):
        return _plain(vars(value))
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float) and math.isnan(value):
        return None
    return value
