"""Charts as inline SVG: lines and points over two axes.

Every chart has a title, named axes, a description for who cannot see it, and a table of what it shows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from embrag_ds.reports.text import MOST_ROWS, escaped, folded, number, table, thinned

Points = Sequence[tuple[float, float | None]]
COLOURS = ("c0", "c1", "c2", "c3", "c4", "c5")
"""Style classes of series without an order."""
RAMP = ("r0", "r1", "r2", "r3", "r4")
"""Style classes of series in order, such as bins."""
WIDTH, HEIGHT = 440, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 72, 12, 12, 40
_MOST_DRAWN = 600
_MOST_MARKERS = 80
_TICKS = 5


@dataclass(frozen=True)
class Series:
    """A named row of points (x, y), x ascending; the line is broken where y is None."""

    name: str
    points: Points
    style: str = "c0"
    dashed: bool = False


@dataclass(frozen=True)
class Axis:
    """An axis from ``low`` to ``high`` on the pixels ``start`` to ``stop``."""

    low: float
    high: float
    start: float
    stop: float

    def place(self, value: float) -> float:
        """Pixel of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)

    def ticks(self, most: int = _TICKS) -> list[float]:
        """Round values on the axis, about ``most`` of them."""
        step = _round_up((self.high - self.low) / most)
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [place * step for place in range(first, last + 1)]


def _round_up(value: float) -> float:
    """The next of 1, 2, 2.5, 5 or 10 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(each * power for each in (1, 2, 2.5, 5, 10) if each * power >= value * (1 - 1e-9))


def spread(values: Iterable[float], from_zero: bool = False) -> tuple[float, float]:
    """Limits of an axis for finite values: wider than they are, and never empty."""
    found = [value for value in values if math.isfinite(value)]
    low, high = (min(found), max(found)) if found else (0.0, 1.0)
    if from_zero:
        low = min(low, 0.0)
    if high - low < 1e-9 * max(abs(high), abs(low)) or high == low:
        high = high + (abs(high) * 0.1 or 1.0)
        low = low if from_zero else low - (abs(low) * 0.1 or 1.0)
        return low, high
    room = 0.05 * (high - low)
    return (low if from_zero and low == 0 else low - room), high + room


def lines_chart(
    title: str,
    axes: tuple[str, str],
    series: Sequence[Series],
    *,
    marks: Sequence[tuple[float, str]] = (),
    from_zero: bool = False,
    note: str = "",
) -> str:
    """A chart of lines over the axes named (x, y), with units; ``marks`` are dashed lines at some x, with their names.

    Series without any number are left out. A chart without series says so.
    """
    shown = [each for each in series if any(y is not None for _, y in each.points)]
    if not shown:
        return figure(title, "", "There is no number to draw.", "")
    xs = [x for each in shown for x, y in each.points if y is not None]
    low, high = min(xs), max(xs)
    x_axis = Axis(*((low, high) if high > low else spread(xs)), _LEFT, WIDTH - _RIGHT)
    y_axis = Axis(
        *spread((y for each in shown for _, y in each.points if y is not None), from_zero), HEIGHT - _BOTTOM, _TOP
    )
    parts = [frame(x_axis, y_axis, axes)]
    for x, name in marks:
        if x_axis.low <= x <= x_axis.high:
            parts.append(line("mark", x_axis.place(x), _TOP, x_axis.place(x), HEIGHT - _BOTTOM, name))
    for each in shown:
        parts += _line(each, x_axis, y_axis)
    described = f"{axes[1]} over {axes[0]}: " + "; ".join(_described(each) for each in shown)
    rows, note = _rows(shown), note
    if marks:
        note = f"{note} Dashed vertical lines: {', '.join(dict.fromkeys(name for _, name in marks))}.".strip()
    header = [axes[0], *(each.name for each in shown)]
    caption = title if len(rows) <= MOST_ROWS else f"{title} ({MOST_ROWS} of {len(rows):,} rows, evenly apart)"
    data = table(header, thinned(rows), caption, texts=0)
    return figure(title, svg(parts, described), note, data, key(shown) if len(shown) > 1 else "")


def figure(title: str, drawing: str, note: str, data: str, legend: str = "", wide: bool = False) -> str:
    """A figure: title, note, legend, drawing and, folded, the table of its numbers."""
    kind = ' class="wide"' if wide else ""
    below = folded("Numbers of this chart", data) if data else ""
    words = f"<p>{escaped(note)}</p>" if note else ""
    plot = f'<div class="plot">{drawing}</div>' if drawing else ""
    return f"<figure{kind}><figcaption>{escaped(title)}</figcaption>\n{words}{legend}{plot}\n{below}</figure>\n"


def svg(parts: Sequence[str], described: str, width: float = WIDTH, height: float = HEIGHT) -> str:
    """A drawing with a description in words."""
    body = "\n".join(parts)
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escaped(described)}">\n{body}\n</svg>'


def key(series: Sequence[Series]) -> str:
    """The legend of some series."""
    items = "".join(
        f'<li><svg viewBox="0 0 22 10" aria-hidden="true"><line class="series s-{each.style}'
        f'{" dashed" if each.dashed else ""}" x1="0" x2="22" y1="5" y2="5"></line></svg>{escaped(each.name)}</li>'
        for each in series
    )
    return f'<ul class="key">{items}</ul>'


def frame(x_axis: Axis, y_axis: Axis, axes: tuple[str, str], x_ticks: bool = True) -> str:
    """Grid, axes, ticks and names of the axes."""
    parts = []
    left, right, bottom = x_axis.start, x_axis.stop, y_axis.start
    for value in y_axis.ticks():
        place = y_axis.place(value)
        parts.append(line("grid", left, place, right, place))
        parts.append(text(left - 5, place + 4, tick(value), "end"))
    for value in x_axis.ticks() if x_ticks else ():
        place = x_axis.place(value)
        parts.append(line("axis", place, bottom, place, bottom + 4))
        parts.append(text(min(place, right - 6), bottom + 18, tick(value), "middle"))
    parts.append(line("axis", left, bottom, right, bottom))
    parts.append(text((left + right) / 2, bottom + 34, axes[0], "middle", "name"))
    turned = f'transform="translate(11 {(bottom + y_axis.stop) / 2:.1f}) rotate(-90)"'
    parts.append(f'<text class="name" text-anchor="middle" {turned}>{escaped(axes[1])}</text>')
    return "\n".join(parts)


def line(kind: str, x1: float, y1: float, x2: float, y2: float, title: str = "") -> str:
    """A straight line, with words for who points at it."""
    inside = f"<title>{escaped(title)}</title>" if title else ""
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}">{inside}</line>'


def text(x: float, y: float, content: str, anchor: str = "start", kind: str = "") -> str:
    """Text at a place of a drawing."""
    style = f' class="{kind}"' if kind else ""
    return f'<text{style} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escaped(content)}</text>'


def tick(value: float) -> str:
    """A number beside an axis, short: thousands and millions by letters, small ones with a power of ten."""
    size = abs(value)
    if size < 1e-12:
        return "0"
    for least, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= least:
            return f"{value / (1e3 if letter == 'k' else least):.4g}{letter}"
    if size >= 1e-3:
        return f"{value:.4g}"
    digits, _, power = f"{value:.2e}".partition("e")
    return f"{float(digits):g}e{int(power)}"


def _line(series: Series, x_axis: Axis, y_axis: Axis) -> list[str]:
    points = _drawn(series.points)
    path, pen_down = [], False
    alone = []
    for place, (x, y) in enumerate(points):
        if y is None:
            pen_down = False
            continue
        path.append(f"{'L' if pen_down else 'M'}{x_axis.place(x):.1f} {y_axis.place(y):.1f}")
        follows = place + 1 < len(points) and points[place + 1][1] is not None
        if not pen_down and not follows:
            alone.append((x, y))
        pen_down = True
    dashed = " dashed" if series.dashed else ""
    parts = [f'<path class="series s-{series.style}{dashed}" d="{"".join(path)}"></path>']
    marked = [(x, y) for x, y in points if y is not None] if len(points) <= _MOST_MARKERS else alone
    parts += [
        f'<circle class="f-{series.style}" cx="{x_axis.place(x):.1f}" cy="{y_axis.place(y):.1f}" r="2.6">'
        f"<title>{escaped(series.name)}: {escaped(number(y))} at {escaped(number(x))}</title></circle>"
        for x, y in marked
    ]
    return parts


def _drawn(points: Points) -> list[tuple[float, float | None]]:
    """The points, or of very many the lowest and the highest of each stretch, so that no peak is lost."""
    if len(points) <= _MOST_DRAWN:
        return list(points)
    kept: list[tuple[float, float | None]] = []
    stretches = _MOST_DRAWN // 2
    for stretch in range(stretches):
        part = points[len(points) * stretch // stretches : len(points) * (stretch + 1) // stretches]
        finite = [(y, place) for place, (_, y) in enumerate(part) if y is not None]
        places = {min(finite)[1], max(finite)[1]} if finite else {0}
        kept += [part[place] for place in sorted(places)]
    return kept


def _described(series: Series) -> str:
    values = [y for _, y in series.points if y is not None]
    return (
        f"{series.name} from {number(values[0])} to {number(values[-1])}, lowest {number(min(values))}, "
        f"highest {number(max(values))}"
    )


def _rows(series: Sequence[Series]) -> list[list[float | None]]:
    """A row for each x of any series."""
    columns = [dict(each.points) for each in series]
    every = sorted({x for column in columns for x in column})
    return [[x, *(column.get(x) for column in columns)] for x in every]
