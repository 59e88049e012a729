"""Report pages as a browser takes them: balanced tags, nothing to load, and the numbers in them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

VOID = {"meta", "br", "hr", "img", "input", "link"}
LOADING = ("src", "srcset", "data", "action", "poster", "background", "formaction", "xlink:href")


@dataclass
class Table:
    """A table's caption, header and rows, as text."""

    caption: str = ""
    header: list[str] = field(default_factory=list)
    rows: list[list[str]] = field(default_factory=list)


class Parsed(HTMLParser):
    """A page taken apart; raises AssertionError for tags that do not match and for anything that would be loaded."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.tables: list[Table] = []
        self.figures: list[str] = []
        self.described: list[str] = []
        self.headings: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self._json = ""
        assert text.startswith("<!DOCTYPE html>\n")
        self.feed(text)
        self.close()
        assert not self.open, self.open
        self.numbers: dict[str, Any] = json.loads(self._json)
        assert len(set(self.ids)) == len(self.ids)
        assert {link.removeprefix("#") for link in self.links} <= set(self.ids)

    @property
    def text(self) -> str:
        """All words that are shown, with single blanks."""
        return " ".join(" ".join(self.words).split())

    def table(self, caption: str) -> Table:
        """The one table whose caption begins so."""
        (found,) = [table for table in self.tables if table.caption.startswith(caption)]
        return found

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        assert len(given) == len(attributes), (tag, attributes)
        assert not [name for name in given if name in LOADING or name.startswith("on")], (tag, attributes)
        assert tag not in ("link", "iframe", "object", "embed", "img", "base", "form")
        if tag == "script":
            assert given["type"] == "application/json"
        if tag == "a":
            assert (given["href"] or "").startswith("#")
            self.links.append(given["href"] or "")
        if "id" in given:
            self.ids.append(given["id"] or "")
        self.tags.append(tag)
        if tag == "svg" and given.get("role") == "img":
            assert given["aria-label"], "a chart without a description"
            self.described.append(given["aria-label"] or "")
        if tag == "table":
            self.tables.append(Table())
        if tag == "tr":
            self.tables[-1].rows.append([])
        if tag == "td":
            self.tables[-1].rows[-1].append("")
        if tag not in VOID:
            self.open.append((tag, given.get("id") or ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1][0] == tag, (tag, self.open, self.getpos())
        self.open.pop()

    def handle_data(self, data: str) -> None:
        place = [tag for tag, _ in self.open]
        if place and place[-1] == "script":
            self._json += data
        elif place and place[-1] == "style":
            assert not re.search(r"url\(|@import|//", data)
        elif place:
            self.words.append(data)
            if place[-1] == "caption":
                self.tables[-1].caption += data
            if place[-1] == "th":
                self.tables[-1].header.append(data)
            if place[-1] == "td":
                self.tables[-1].rows[-1][-1] += data
            if place[-1] == "figcaption":
                self.figures.append(data)
            if place[-1] == "h2":
                self.headings.append(data)


def parsed(page: Path | str) -> Parsed:
    """A page, by its file or its text, which is UTF-8 and names nothing of any network."""
    text = page if isinstance(page, str) else page.read_text(encoding="utf-8")
    assert "://" not in text
    found = Parsed(text)
    for table in found.tables:
        table.rows = [row for row in table.rows if row]
    return found
