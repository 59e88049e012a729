"""Text of a page: escaping, numbers and tables."""

from __future__ import annotations

import math
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embrag_ds.reports.page import Page
from embrag_ds.reports.text import (
    NOTHING,
    date,
    duration,
    escaped,
    finite,
    lines,
    number,
    paragraph,
    plain,
    share,
    table,
    thinned,
)
from tests.reports.pages import parsed

NASTY = st.text(st.sampled_from("<>&\"'=/ax\n\t\0\x1b\u2028é\udc80\udcff]-!"), max_size=12)


class _Shown(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, list[tuple[str, str | None]]]] = []
        self.data = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, attrs))

    def handle_data(self, data: str) -> None:
        self.data += data


@given(NASTY)
def test_text_of_a_file_is_shown_and_makes_no_tag(text: str) -> None:
    shown = _Shown(f'<p title="{escaped(text)}">{escaped(text)}</p>')
    assert shown.tags == [("p", [("title", plain(text))])] and shown.data == plain(text)
    assert escaped(text).encode("utf-8") == escaped(text).encode("utf-8", "replace") and plain(text).isprintable()


@given(st.lists(NASTY, min_size=1, max_size=4))
def test_a_page_with_any_text_is_whole(texts: list[str]) -> None:
    page = Page(texts[0], texts[-1])
    rows = [[each, 1] for each in texts]
    page.add(texts[0], paragraph(texts[-1]), table([*texts[:1], "n"], rows, texts[0]), lines(texts, texts[0]))
    found = parsed(page.html({"names": texts, texts[0]: math.nan, "</script>": "<!--<script>"}))
    assert found.numbers["names"] == texts or texts[0] == "names"
    assert found.numbers[texts[0]] is None or texts[0] in ("names", "</script>")
    assert found.numbers["</script>"] == "<!--<script>"
    assert [row[0] for row in found.tables[0].rows] == [plain(each) for each in texts]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"),
        (1234567, "1,234,567"),
        (1e6, "1,000,000"),
        (0.123456, "0.1235"),
        (1234.5, "1,234"),
        (-3.0, "-3"),
        (1e-7, "1e-07"),
        (2.5e300, "2.5e+300"),
        (None, NOTHING),
        (math.nan, NOTHING),
        (math.inf, NOTHING),
    ],
)
def test_numbers_for_people(value: float | None, shown: str) -> None:
    assert number(value) == shown


def test_shares_dates_and_durations() -> None:
    assert share(1, 8) == "12.5 %" and share(0, 0) == NOTHING
    assert date(0) == "1970-01-01 00:00:00 UTC" and date("soon") == date(1e300) == date(math.nan) == NOTHING
    assert [duration(each) for each in (4.6, 65, 3725)] == ["5 s", "1 min 5 s", "1 h 2 min"]
    assert {duration(each) for each in (-1, None, "x", math.nan)} == {NOTHING}


@given(st.integers(0, 500), st.integers(2, 60))
def test_thinned_rows_keep_order_and_ends(rows: int, most: int) -> None:
    found = thinned(range(rows), most)
    assert found == sorted(set(found)) and len(found) == min(rows, most)
    assert not rows or (found[0], found[-1]) == (0, rows - 1)


def test_cells_that_are_numbers_are_written_as_numbers_and_names_as_they_are() -> None:
    page = Page("t", "s")
    page.add("h", table(["name", "n"], [["1e3", 1000], ["x" * 70, True], ["0012", None]], "c"))
    assert parsed(page.html({})).tables[0].rows == [["1e3", "1,000"], ["x" * 70, "True"], ["0012", NOTHING]]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 10**400, True, "1", None, [1.0]])
def test_what_no_page_can_show_is_no_number(value: object) -> None:
    assert finite(value) is None
    assert [finite(each) for each in (0, -2.5, 1e200)] == [0, -2.5, 1e200]
