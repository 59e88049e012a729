"""Tables of the benchmark of adaptation, in Markdown."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from adaptation_panels import SPLIT

from embrag_ds.evaluation.metrics import BIN_NAMES

AUTO, OFF = "adapted", "as shipped"
"""Names of our two runs in a report."""
TUNED = {"beagle": "beagle, tuned", "minimac4": "minimac4, tuned"}
"""Program -> name of its tuned run in a report."""
Carriers = dict[str, dict[str, Any]]
"""Bin -> number, said and right of its called carriers."""
MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Gap:
    """Aggregate r2 of the adapted model minus that of ``other``, at ``sites`` of a bin, with a 95 % interval."""

    panel: str
    bin: str
    sites: int
    other: str
    difference: float
    interval: tuple[float, float]

    def __str__(self) -> str:
        low, high = self.interval
        return f"{signed(self.difference)} ({signed(low)} to {signed(high)})"


def gap(result: dict[str, Any], bin_name: str, other: str) -> Gap | None:
    """The paired difference from another run of the same panel, None where it is not defined."""
    report = result["report"]
    for each in report["differences"]:
        if (each["a"], each["b"]) == (AUTO, other) and each["difference"][bin_name] is not None:
            low, high = each["interval"][bin_name]
            sites = report["sites"][bin_name]
            return Gap(result["name"], bin_name, sites, other, each["difference"][bin_name], (low, high))
    return None


def gain(result: dict[str, Any], bin_name: str) -> Gap | None:
    """The difference from the model as shipped."""
    return gap(result, bin_name, OFF)


def lead(result: dict[str, Any], bin_name: str) -> Gap | None:
    """The difference from the better of the tuned tools."""
    found = [each for each in (gap(result, bin_name, name) for name in TUNED.values()) if each]
    return min(found, key=lambda each: each.difference, default=None)


def worst(results: list[dict[str, Any]]) -> dict[str, Gap]:
    """The smallest gain and the smallest lead, in any bin of any panel."""
    found = {}
    for name, of in (("gain", gain), ("lead", lead)):
        gaps = [each for result in results for key in BIN_NAMES if (each := of(result, key))]
        if gaps:
            found[name] = min(gaps, key=lambda each: each.difference)
    return found


def signed(value: float) -> str:
    """A difference with its sign and four decimals, and without the zero before the point."""
    sign = "+" if round(value, 4) >= 0 else MINUS
    return sign + f"{abs(value):.4f}".removeprefix("0")


def table(results: list[dict[str, Any]]) -> str:
    """All tables: panels with times, gain, lead, r2 of every run, and the worst cases."""
    parts = [
        "**Panels.** Seconds by the clock, and in brackets those of all processors.",
        _table(
            [
                *("panel", "samples", "targets", "sites", "typed", "map", "imputing", "adaptation"),
                *(f"{name}{what}" for name in TUNED for what in (", tuned", "")),
            ],
            [_panel_row(each) for each in results],
        ),
        "**Gain**: aggregate r2 of the adapted model minus that of the model as shipped, with 95 % intervals.",
        _table(["panel", *BIN_NAMES], [_gaps(each, gain) for each in results]),
        "**Lead**: the same minus that of the better tool, tuned, in each bin.",
        _table(["panel", *BIN_NAMES], [_gaps(each, lead) for each in results]),
        "**Aggregate r2**",
        r2_table(results),
        "**Called carriers** of the adapted model: number, mean probability said, share right.",
        carriers_table(results),
    ]
    for name, each in worst(results).items():
        parts.append(f"Smallest {name}: {each}, {each.panel}, {each.bin}, {each.sites} sites, from {each.other}.")
    return "\n\n".join(parts) + "\n"


def r2_table(results: list[dict[str, Any]]) -> str:
    """Aggregate r2 of every run, and the scored sites."""
    return _table(["panel", "", *BIN_NAMES], [row for each in results for row in _r2_rows(each)])


def carriers_table(results: list[dict[str, Any]]) -> str:
    """Called carriers of every panel, and together those of panels that are splits of the same samples."""
    found = {each["name"]: each["report"]["tools"][AUTO]["called_carriers"] for each in results}
    given = {name: carriers for name, carriers in found.items() if carriers is not None}
    splits: dict[str, list[Carriers]] = defaultdict(list)
    for name, carriers in given.items():
        if SPLIT in name:
            splits[name.partition(SPLIT)[0]].append(carriers)
    together = {f"{name}, all splits": _together(each) for name, each in splits.items()}
    return _table(["panel", *BIN_NAMES], [_carriers_row(*each) for each in {**given, **together}.items()])


def _together(found: list[Carriers]) -> Carriers:
    """Called carriers of several runs, by bin."""
    sums: Carriers = {}
    for name in BIN_NAMES:
        bins = [each[name] for each in found if each[name]["number"]]
        number = sum(each["number"] for each in bins)
        means = {key: sum(each[key] * each["number"] for each in bins) / max(1, number) for key in ("said", "right")}
        sums[name] = {"number": number, **means}
    return sums


def _carriers_row(panel: str, carriers: Carriers) -> list[str]:
    bins = [carriers[name] for name in BIN_NAMES]
    shown = [f"{each['number']}: {each['said']:.3f}, {each['right']:.3f}" if each["number"] else "" for each in bins]
    return [panel, *shown]


def _panel_row(result: dict[str, Any]) -> list[str]:
    shape, tools = result["shape"], result["tools"]
    cells = [result["name"], *(str(shape[key]) for key in ("samples", "targets", "sites", "typed", "map"))]
    cells += [_cost(result["ours"]["off"]), _cost(result["adaptation"])]
    for name in TUNED:
        cells += [tools[name]["setting"], _cost(tools[name]["tuned"])] if name in tools else ["", ""]
    return cells


def _cost(cost: dict[str, Any]) -> str:
    return f"{cost['seconds']:.0f} ({cost['cpu_seconds']:.0f})"


def _gaps(result: dict[str, Any], of: Any) -> list[str]:
    gaps = [of(result, name) for name in BIN_NAMES]
    return [result["name"], *("" if each is None else str(each) for each in gaps)]


def _r2_rows(result: dict[str, Any]) -> Iterator[list[str]]:
    report = result["report"]
    yield [result["name"], "sites", *(str(report["sites"][name]) for name in BIN_NAMES)]
    for tool, scores in report["tools"].items():
        values = (scores["aggregate_r2"][name] for name in BIN_NAMES)
        yield ["", tool, *("" if each is None else f"{each:.4f}".removeprefix("0") for each in values)]


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
