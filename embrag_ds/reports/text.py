"""Text of a report page: escaping, numbers and tables."""

from __future__ import annotations

import html
import math
import time
from collections.abc import Iterable, Sequence
from typing import Any

from embrag_ds.progress import spoken

MOST_ROWS = 200
"""Rows of a table at most; a longer one is thinned or cut off, and says so."""
NOTHING = "\N{EN DASH}"
"""What stands for a number that is not known."""
_LONG = 60


def plain(text: object) -> str:
    """Text of a file or a log as a page can hold it: what is no printable character becomes an escape such as ``\\n``.

    Bytes that are no UTF-8 (surrogates) do as well, because a page is UTF-8.
    """
    return "".join(each if each.isprintable() else _escape_of(each) for each in str(text))


def _escape_of(character: str) -> str:
    if "\udc80" <= character <= "\udcff":
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def escaped(text: object) -> str:
    """The same as HTML, for text and for attribute values in quotes."""
    return html.escape(plain(text), quote=True)


def finite(value: Any) -> float | None:
    """A number of a JSON file that a page can show, None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        return None
    return value


def number(value: float | None) -> str:
    """A number for people: four digits that count, thousands apart, and a dash for none."""
    if value is None or not math.isfinite(value):
        return NOTHING
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    if 1000 <= abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def share(part: float, whole: float) -> str:
    """A part of a whole in percent, and a dash where there is no whole."""
    return f"{100 * part / whole:.1f} %" if whole else NOTHING


def date(seconds: Any) -> str:
    """A time in seconds since 1970 as date and time, UTC; a dash for anything else."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(float(seconds)))
    except (TypeError, ValueError, OverflowError, OSError):
        return NOTHING


def duration(seconds: Any) -> str:
    """A duration in words (:func:`embrag_ds.progress.spoken`); a dash for anything but a number."""
    if not isinstance(seconds, int | float) or not 0 <= seconds < 1e12:
        return NOTHING
    return spoken(seconds)


def thinned(rows: Sequence[Any], most: int = MOST_ROWS) -> list[Any]:
    """At most so many of the rows, evenly apart, with the first and the last one."""
    if len(rows) <= most:
        return list(rows)
    return [rows[round(place * (len(rows) - 1) / (most - 1))] for place in range(most)]


def paragraph(text: str, kind: str = "") -> str:
    """A paragraph of plain text; ``kind`` is a class of the style sheet."""
    return f"<p{_class(kind)}>{escaped(text)}</p>\n"


def table(header: Sequence[str], rows: Iterable[Sequence[object]], caption: str, texts: int = 1) -> str:
    """A table that scrolls in its own box. The first ``texts`` columns are text, the others numbers.

    Cells that are numbers are written by :func:`number`, all others as text.
    """
    lines = [f'<div class="box" role="region" tabindex="0" aria-label="{escaped(caption)}"><table>']
    lines.append(f"<caption>{escaped(caption)}</caption>")
    heads = "".join(
        f'<th scope="col"{_class(_kind(place, texts))}>{escaped(each)}</th>' for place, each in enumerate(header)
    )
    lines.append(f"<thead><tr>{heads}</tr></thead><tbody>")
    for row in rows:
        cells = "".join(f"<td{_class(_kind(place, texts, each))}>{_cell(each)}</td>" for place, each in enumerate(row))
        lines.append(f"<tr>{cells}</tr>")
    lines.append("</tbody></table></div>\n")
    return "\n".join(lines)


def facts(pairs: Iterable[tuple[str, object]]) -> str:
    """A list of names and values."""
    rows = "".join(f"<div><dt>{escaped(name)}</dt><dd>{_cell(value)}</dd></div>\n" for name, value in pairs)
    return f'<dl class="facts">\n{rows}</dl>\n'


def folded(summary: str, content: str, is_open: bool = False) -> str:
    """Content (HTML) that a click unfolds."""
    return f"<details{' open' if is_open else ''}><summary>{escaped(summary)}</summary>\n{content}</details>\n"


def lines(texts: Iterable[str], caption: str) -> str:
    """Lines of a log under a caption, in a box that scrolls."""
    content = "\n".join(escaped(each) for each in texts)
    box = f'<div class="box" role="region" tabindex="0" aria-label="{escaped(caption)}"><pre>{content}</pre></div>\n'
    return paragraph(caption, "soft") + box


def _kind(place: int, texts: int, cell: object = "") -> str:
    if place >= texts:
        return "n"
    return "long" if isinstance(cell, str) and len(cell) > _LONG else ""


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""


def _cell(value: object) -> str:
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return escaped(number(value))
    return escaped(value)
