"""Charts as inline SVG: bars, histograms, points with names, and tracks along chromosomes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from embrag_ds.reports.charts import (
    COLOURS,
    HEIGHT,
    WIDTH,
    Axis,
    Series,
    figure,
    frame,
    key,
    line,
    spread,
    svg,
    text,
    tick,
)
from embrag_ds.reports.text import escaped, number, table

_LEFT, _RIGHT, _TOP, _BOTTOM = 72, 12, 16, 40
_ROW, _LABELS = 22, 150
_UNITS = (("Mb", 1e6), ("kb", 1e3), ("bp", 1.0))
_TRACK, _TRACK_WIDTH, _TRACK_LEFT, _TRACK_RIGHT = 34, 900, 110, 150


def columns_chart(
    title: str, axes: tuple[str, str], names: Sequence[str], series: Mapping[str, Sequence[float | None]]
) -> str:
    """Columns side by side for each name, one for each series; the y axis begins at zero."""
    values = [value for each in series.values() for value in each if value is not None]
    if not values:
        return figure(title, "", "There is no number to draw.", "")
    most = max(values)
    x_axis = Axis(0, len(names), _LEFT, WIDTH - _RIGHT)
    y_axis = Axis(0, 1.0 if 0.5 < most <= 1 else (most or 1.0) * 1.05, HEIGHT - _BOTTOM, _TOP)
    parts = [frame(x_axis, y_axis, axes, x_ticks=False)]
    width = 0.8 / len(series)
    for place, name in enumerate(names):
        parts.append(text(x_axis.place(place + 0.5), HEIGHT - _BOTTOM + 16, name, "middle"))
        for row, (label, each) in enumerate(series.items()):
            value = each[place]
            if value is None:
                continue
            left, right = (x_axis.place(place + 0.1 + width * (row + side)) for side in (0, 1))
            said = f"{name}, {label}: {number(value)}"
            parts.append(_rect(COLOURS[row], (left, right), (y_axis.place(value), y_axis.start), said))
    described = f"{axes[1]} by {axes[0]}: " + "; ".join(
        f"{name}: " + ", ".join(f"{label} {number(each[place])}" for label, each in series.items())
        for place, name in enumerate(names)
    )
    rows = [[name, *(each[place] for each in series.values())] for place, name in enumerate(names)]
    legend = key([Series(label, [], COLOURS[row]) for row, label in enumerate(series)]) if len(series) > 1 else ""
    return figure(title, svg(parts, described), "", table([axes[0], *series], rows, title), legend)


def histogram(
    title: str, axes: tuple[str, str], edges: Sequence[float], counts: Sequence[int], style: str = "c0"
) -> str:
    """A histogram of ``counts`` [n] between ``edges`` [n + 1], which are evenly apart."""
    if not any(counts):
        return figure(title, "", "There is no number to draw.", "")
    x_axis = Axis(edges[0], edges[-1], _LEFT, WIDTH - _RIGHT)
    y_axis = Axis(0, max(counts) * 1.05, HEIGHT - _BOTTOM, _TOP)
    parts = [frame(x_axis, y_axis, axes)]
    rows = []
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        name = f"{number(low)} to {number(high)}"
        rows.append([name, count])
        if count:
            sides = (x_axis.place(low), x_axis.place(high))
            parts.append(_rect(style, sides, (y_axis.place(count), y_axis.start), f"{name}: {count:,}"))
    peak = max(range(len(counts)), key=counts.__getitem__)
    described = f"{axes[1]} by {axes[0]}: {sum(counts):,} in all, most ({counts[peak]:,}) at {rows[peak][0]}"
    return figure(title, svg(parts, described), "", table([axes[0], axes[1]], rows, title))


def rows_chart(title: str, label: str, rows: Sequence[tuple[str, float]], note: str = "") -> str:
    """Horizontal bars, one a row, with their values; ``label`` names the axis, with its unit."""
    if not rows:
        return figure(title, "", "There is no number to draw.", "")
    height = _ROW * len(rows) + 48
    x_axis = Axis(0, (max(value for _, value in rows) or 1.0) * 1.15, _LABELS, WIDTH - _RIGHT)
    bottom = height - 40
    parts = []
    for value in x_axis.ticks(4):
        place = x_axis.place(value)
        parts.append(line("grid", place, 4, place, bottom))
        parts.append(text(place, bottom + 15, tick(value), "middle"))
    for row, (name, value) in enumerate(rows):
        top, right = 6 + _ROW * row, x_axis.place(value)
        parts.append(text(_LABELS - 6, top + 13, _short(name, 26), "end", "name"))
        parts.append(_rect("c0", (_LABELS, right), (top + 2, top + _ROW - 5), f"{name}: {number(value)}"))
        parts.append(text(right + 4, top + 13, number(value)))
    parts.append(line("axis", _LABELS, 4, _LABELS, bottom))
    parts.append(text((_LABELS + WIDTH - _RIGHT) / 2, height - 6, label, "middle", "name"))
    described = f"{label}: " + ", ".join(f"{name} {number(value)}" for name, value in rows)
    return figure(title, svg(parts, described, height=height), note, table(["", label], rows, title))


@dataclass(frozen=True)
class Dot:
    """A point with its name; one that is ``named`` stands out, and its name is written beside it."""

    x: float
    y: float
    name: str
    named: bool = False


def dots_chart(title: str, axes: tuple[str, str], dots: Sequence[Dot], note: str) -> str:
    """A chart of points; the ``note`` says where their numbers are."""
    if not dots:
        return figure(title, "", "There is no number to draw.", "")
    x_axis = Axis(*spread(dot.x for dot in dots), _LEFT, WIDTH - _RIGHT)
    y_axis = Axis(*spread(dot.y for dot in dots), HEIGHT - _BOTTOM, _TOP)
    parts = [frame(x_axis, y_axis, axes)]
    for dot in sorted(dots, key=lambda each: each.named):
        x, y = x_axis.place(dot.x), y_axis.place(dot.y)
        said = f"{dot.name}: {axes[0]} {number(dot.x)}, {axes[1]} {number(dot.y)}"
        style, radius = ("bad", 3.5) if dot.named else ("c0", 2.4)
        parts.append(
            f'<circle class="f-{style}" cx="{x:.1f}" cy="{y:.1f}" r="{radius}"><title>{escaped(said)}</title></circle>'
        )
        if dot.named:
            side = x > (x_axis.start + x_axis.stop) / 2
            anchor = "end" if side else "start"
            parts.append(text(x - 6 if side else x + 6, y + 4, _short(dot.name, 20), anchor, "name"))
    named = [dot.name for dot in dots if dot.named]
    described = f"{axes[1]} against {axes[0]} of {len(dots):,} samples; outliers: {', '.join(named) or 'none'}"
    return figure(title, svg(parts, described), note, "")


@dataclass(frozen=True)
class Track:
    """Counts along a chromosome, in bins of ``width`` base pairs from the position ``start`` on, to ``stop``.

    ``gaps`` are (from, to) in base pairs.
    """

    name: str
    start: int
    stop: int
    width: int
    counts: Sequence[int]
    gaps: Sequence[tuple[int, int]] = field(default=())


def tracks_chart(title: str, what: str, tracks: Sequence[Track], data: str, note: str = "") -> str:
    """One row a chromosome, on one scale: ``what`` per base pair as heights, and gaps as bars below them."""
    longest = max(track.stop - track.start for track in tracks) or 1
    unit, size = next((each for each in _UNITS if longest >= each[1]), _UNITS[-1])
    x_axis = Axis(0, longest / size, _TRACK_LEFT, _TRACK_WIDTH - _TRACK_RIGHT)
    most = max(max(track.counts) / track.width for track in tracks) or 1.0
    bottom = _TRACK * len(tracks) + 8
    parts = []
    for row, track in enumerate(tracks):
        base = _TRACK * (row + 1) - 8
        end = x_axis.place((track.stop - track.start) / size)
        outline = [f"M{_TRACK_LEFT} {base}"]
        for bar, count in enumerate(track.counts):
            height = (_TRACK - 12) * count / track.width / most
            # The last bin may reach beyond the last site.
            left, right = (min(x_axis.place(track.width * each / size), end) for each in (bar, bar + 1))
            outline.append(f"L{left:.1f} {base - height:.1f}H{right:.1f}")
        parts.append(text(_TRACK_LEFT - 8, base - 4, _short(track.name, 15), "end", "name"))
        parts.append(f'<path class="f-c0" d="{"".join(outline)}L{end:.1f} {base}Z"></path>')
        parts.append(line("axis", _TRACK_LEFT, base, end, base))
        for first, last in track.gaps:
            sides = (x_axis.place((first - track.start) / size), x_axis.place((last - track.start) / size))
            said = f"gap {track.name}:{first:,}-{last:,}, {last - first:,} bp"
            parts.append(_rect("bad", sides, (base + 2, base + 5), said))
        parts.append(text(_TRACK_WIDTH - _TRACK_RIGHT + 8, base - 4, _extent(track.start, track.stop)))
    for value in x_axis.ticks(8):
        place = x_axis.place(value)
        parts.append(line("axis", place, bottom, place, bottom + 4))
        parts.append(text(place, bottom + 16, tick(value), "middle"))
    middle = (x_axis.start + x_axis.stop) / 2
    parts.append(text(middle, bottom + 32, f"distance from the first site, {unit}", "middle", "name"))
    described = f"{what} along {len(tracks)} chromosomes: " + "; ".join(
        f"{track.name}: {sum(track.counts):,}, longest gap {max((b - a for a, b in track.gaps), default=0):,} bp"
        for track in tracks
    )
    per, length = ("kb", 1e3) if most * 1e3 >= 0.1 else ("Mb", 1e6)
    note = f"Heights are {what} per length, of which the highest is {number(length * most)} per {per}. {note}"
    return figure(title, svg(parts, described, _TRACK_WIDTH, bottom + 40), note, data, wide=True)


def _extent(start: int, stop: int) -> str:
    if stop < 1e5:
        return f"{start:,} to {stop:,} bp"
    return f"{start / 1e6:.2f} to {stop / 1e6:.2f} Mb"


def _short(name: str, most: int) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _rect(style: str, x: tuple[float, float], y: tuple[float, float], title: str) -> str:
    """A bar between two x and two y, with words for who points at it; a hair's breadth is left beside wide ones."""
    left, right = x if x[1] - x[0] < 4 else (x[0] + 0.5, x[1] - 0.5)
    return (
        f'<rect class="f-{style}" x="{left:.1f}" y="{y[0]:.1f}" width="{max(right - left, 0.5):.1f}" '
        f'height="{y[1] - y[0]:.1f}"><title>{escaped(title)}</title></rect>'
    )
