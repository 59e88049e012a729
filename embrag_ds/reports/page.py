"""A report page: one HTML file that loads nothing, with its numbers as JSON in it."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from embrag_ds import __version__
from embrag_ds.errors import UserError
from embrag_ds.files import write_text
from embrag_ds.reports.charts import COLOURS, RAMP
from embrag_ds.reports.text import escaped

GENERATOR = "embrag_ds report"
"""What the pages say that they are made by."""
NUMBERS = "numbers"
"""Id of the element that holds a page's numbers as JSON."""
_MARK = f'<meta name="generator" content="{GENERATOR}'
_MARKED_WITHIN = 400

_STYLE = """
:root {
  color-scheme: light dark;
  --page: #fbfbfa; --card: #ffffff; --ink: #1b1d21; --soft: #5a606b; --line: #dcdfe4; --grid: #eceef1; --bad: #b42318;
  --c0: #1f6fc4; --c1: #c2570c; --c2: #0f8468; --c3: #8a4fc7; --c4: #b0307a; --c5: #6b7280;
  --r0: #9cc3ee; --r1: #6aa4e2; --r2: #3c83cd; --r3: #1d5fa8; --r4: #0d3d75;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #16181c; --card: #1d2025; --ink: #eceef2; --soft: #a4abb7; --line: #363b44; --grid: #2a2e36; --bad: #ff8a7a;
    --c0: #6aa9f0; --c1: #f0924a; --c2: #46c2a0; --c3: #b98cf0; --c4: #ec7fb5; --c5: #9aa3b2;
    --r0: #2c5586; --r1: #3f78b8; --r2: #5f9de0; --r3: #94c0f2; --r4: #cfe3fb;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
}
main, header, footer { max-width: 1360px; margin: 0 auto; padding: 0 20px; }
header { padding-top: 24px; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 32px 0 10px; padding-top: 14px; border-top: 1px solid var(--line); }
p { margin: 6px 0 10px; max-width: 90ch; overflow-wrap: anywhere; }
.soft, footer { color: var(--soft); }
.bad { color: var(--bad); font-weight: 600; }
nav { margin-top: 10px; }
nav a { display: inline-block; margin-right: 14px; }
a { color: var(--c0); }
.facts {
  display: grid; gap: 8px; margin: 12px 0; grid-template-columns: repeat(auto-fill, minmax(min(100%, 165px), 1fr));
}
.facts div { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: 8px 12px; }
dt { color: var(--soft); font-size: .82rem; line-height: 1.3; }
dd { margin: 2px 0 0; font-weight: 600; overflow-wrap: anywhere; }
.charts {
  display: grid; gap: 16px; align-items: start; margin: 8px 0 14px;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 390px), 1fr));
}
figure {
  margin: 0; min-width: 0; padding: 10px 12px;
  background: var(--card); border: 1px solid var(--line); border-radius: 6px;
}
figure.wide { grid-column: 1 / -1; }
figcaption { font-weight: 600; margin-bottom: 4px; overflow-wrap: anywhere; }
figure p { color: var(--soft); font-size: .85rem; margin: 2px 0 6px; }
figure svg { display: block; width: 100%; height: auto; }
figure.wide .plot { overflow-x: auto; }
figure.wide .plot svg { min-width: 760px; max-width: 1040px; }
.key {
  display: flex; flex-wrap: wrap; gap: 2px 14px; list-style: none; margin: 2px 0 4px; padding: 0; font-size: .85rem;
}
.key li { overflow-wrap: anywhere; }
.key svg { display: inline-block; width: 22px; height: 10px; margin-right: 5px; vertical-align: middle; }
svg text { fill: var(--soft); font-size: 12px; }
svg text.name { fill: var(--ink); }
.axis { stroke: var(--soft); }
.grid { stroke: var(--grid); }
.mark { stroke: var(--soft); stroke-dasharray: 2 3; }
.series { fill: none; stroke-width: 2; stroke-linejoin: round; }
.dashed { stroke-dasharray: 5 4; }
%COLOURS%.f-bad { fill: var(--bad); }
.box {
  width: fit-content; max-width: 100%; max-height: 460px; overflow: auto; margin: 8px 0 14px;
  background: var(--card); border: 1px solid var(--line); border-radius: 6px;
}
figure .box { max-height: 320px; margin-bottom: 4px; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: 6px 10px; color: var(--soft); }
th, td {
  padding: 4px 12px; text-align: left; vertical-align: top; white-space: nowrap; border-top: 1px solid var(--grid);
}
td.long { white-space: normal; overflow-wrap: anywhere; min-width: 22ch; max-width: 80ch; }
.n { text-align: right; }
pre { margin: 0; padding: 8px 10px; font-size: .8rem; line-height: 1.45; }
details { margin: 4px 0; }
summary { cursor: pointer; color: var(--soft); font-size: .88rem; }
footer { padding: 24px 20px 32px; font-size: .85rem; }
"""


class Page:
    """A page under construction: sections in order, each with an anchor."""

    def __init__(self, title: str, subtitle: str) -> None:
        self._title, self._subtitle = title, subtitle
        self._sections: list[tuple[str, str]] = []

    def add(self, heading: str, *content: str) -> None:
        """Add a section with its content, as HTML."""
        self._sections.append((heading, "".join(content)))

    def html(self, numbers: dict[str, Any]) -> str:
        """The whole page; its ``numbers`` go in as JSON, NaN and infinity as null."""
        links = "".join(f'<a href="#s{place}">{escaped(name)}</a>\n' for place, (name, _) in enumerate(self._sections))
        sections = "".join(
            f'<section id="s{place}">\n<h2>{escaped(name)}</h2>\n{content}</section>\n'
            for place, (name, content) in enumerate(self._sections)
        )
        # "<" alone could end the element or begin a comment.
        data = json.dumps(_finite(numbers), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'{_MARK} {__version__}">\n'
            # Nothing may be loaded, whatever a name in the data says.
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escaped(self._title)}</title>\n<style>{_style()}</style>\n</head>\n<body>\n"
            f'<header>\n<h1>{escaped(self._title)}</h1>\n<p class="soft">{escaped(self._subtitle)}</p>\n'
            f'<nav aria-label="Sections">\n{links}</nav>\n</header>\n<main>\n{sections}</main>\n'
            f"<footer>Written by embrag_ds {__version__}. The page loads nothing; its numbers are JSON in the element "
            f"with the id “{NUMBERS}”.</footer>\n"
            f'<script type="application/json" id="{NUMBERS}">{data}</script>\n</body>\n</html>\n'
        )


def require_replaceable(path: Path) -> bool:
    """Whether ``path`` is there and is such a page, which a new one may replace.

    Raises :class:`UserError` for any other file there. Devices and pipes count as not there.
    """
    if not os.path.isfile(path):
        return False
    try:
        with path.open("rb") as file:
            start = file.read(_MARKED_WITHIN)
    except OSError as fault:
        raise UserError(f"{path}: it is there and cannot be read ({fault.strerror}); choose another --out") from fault
    if start and _MARK.encode() not in start:
        raise UserError(f"{path}: it is there and is no report of embrag; remove it, or choose another --out")
    return True


def write_page(path: Path, page: Page, numbers: dict[str, Any]) -> None:
    """Write a page as :func:`embrag_ds.files.write_text` does."""
    write_text(path, page.html(numbers))


def _style() -> str:
    """The style sheet, with a class for lines and one for areas of each colour."""
    colours = "".join(
        f".s-{name} {{ stroke: var(--{name}); }}\n.f-{name} {{ fill: var(--{name}); }}\n" for name in (*COLOURS, *RAMP)
    )
    return _STYLE.replace("%COLOURS%", colours)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
