"""Sentences of the documents are short. Code, tables, headings and addresses of links are no sentences."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("docs", "ds_configs", "embrag_ds", "examples", "launch", "profiling", "tests")
WRITTEN = "profiling/results/"
"""Folder of what scripts write: records of measurements, which stay as they are."""


def documents() -> list[str]:
    """Every Markdown file of the repository that people write, by its path."""
    found = [*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md"))]
    names = sorted({path.relative_to(ROOT).as_posix() for path in found})
    return [name for name in names if not name.startswith(WRITTEN)]


DOCUMENTS = documents()
MOST_WORDS = 25
ITEM = re.compile(r"(?:[-*+]|\d+\.)\s+")
ABBREVIATIONS = ("e.g.", "i.e.", "et al.", "Fig.", "No.", "vs.", "cf.", "approx.", "Am.", "J.", "Hum.", "Genet.")
END = re.compile(r"[.!?][\"')\]*]*(?=\s|$)")


def blocks(text: str) -> Iterator[str]:
    """Paragraphs and items of lists, each in one line."""
    block: list[str] = []
    fenced = in_list = False
    blank = True
    for line in [*text.splitlines(), ""]:
        bare = line.strip()
        if bare.startswith("```"):
            fenced = not fenced
        item = ITEM.match(bare)
        # Deeper than a list's own lines, or without a list: four spaces after an empty line are code.
        indented = line.startswith("    ") and blank and not block and not in_list
        prose = bool(bare) and not fenced and not indented and not bare.startswith(("```", "|", "#", ":::"))
        if block and (not prose or item):
            yield " ".join(block)
            block = []
        if prose:
            block.append(bare[item.end() :] if item else bare)
            in_list = in_list or item is not None
        if bare and not line.startswith(" "):
            in_list = item is not None or (in_list and not blank)
        blank = not bare or (blank and indented)


def plain(block: str) -> str:
    """A block without markup: a code span is one word, and of a link its text is left."""
    block = re.sub(r"`[^`]*`", "code", block)
    block = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", block)
    block = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", block)
    return re.sub(r"\*+", "", block)


def sentences(text: str) -> Iterator[str]:
    for block in blocks(text):
        words = plain(block)
        begin = 0
        for end in END.finditer(words):
            before = words[: end.start() + 1]
            if before.endswith("...") or re.search(rf"(?:^|\W)(?:{'|'.join(map(re.escape, ABBREVIATIONS))})$", before):
                continue
            yield words[begin : end.end()].strip()
            begin = end.end()
        if words[begin:].strip():
            yield words[begin:].strip()


def length(sentence: str) -> int:
    """Words with a letter or a digit: a dash is none."""
    return sum(bool(re.search(r"\w", word)) for word in sentence.split())


def long_sentences(text: str) -> list[tuple[int, str]]:
    return [(length(sentence), sentence) for sentence in sentences(text) if length(sentence) > MOST_WORDS]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_sentences_are_short(document: str) -> None:
    found = long_sentences((ROOT / document).read_text(encoding="utf-8"))
    assert not found, "\n".join(f"{document}: {words} words: {sentence}" for words, sentence in found)


def test_all_documents_are_read() -> None:
    names = {"README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/design.md", "examples/1000genomes/README.md"}
    assert names <= set(DOCUMENTS)
    tracked = {path for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}
    unread = [path for path in tracked if path.name not in (*FOLDERS, "runs", "build", "site", "dist")]
    assert not [name for path in unread for name in path.rglob("*.md")]


def words(count: int) -> str:
    return " ".join(["word"] * count)


@pytest.mark.parametrize(
    "text",
    [
        f"{words(26)}.",
        f"A short one. {words(26)}. Another.",
        f"{words(13)}\n{words(13)}",
        f"- {words(13)}\n  {words(13)}.",
        f"- an item\n\n    {words(26)} in the item's second paragraph",
        f"1. {words(26)}",
        f"*{words(25)} [of a link](https://example.org/a.b).*",
        f"{words(24)} `a code span` `and another`.",
        f"{words(24)}, e.g. one",
        f"{words(23)} by Lin et al. 2010.",
        f"{words(23)} in Fig. 2.",
        f"{words(23)} reads .605 .7.",
        f"{words(23)} is 4.1.2 here.",
        f"{words(13)} (`a ... b` ... {words(13)}).",
        f"```\n{words(30)}\n```\n{words(26)}",
    ],
)
def test_a_long_sentence_is_found(text: str) -> None:
    assert len(long_sentences(text)) == 1


@pytest.mark.parametrize(
    "text",
    [
        f"{words(25)}.",
        f"{words(25)}. {words(25)}! {words(25)}? {words(25)}",
        f'He said "{words(20)}." torch then {words(20)}.',
        f"({words(20)}.) {words(20)}.",
        f"{words(20)} is .605. {words(20)}.",
        f"{words(20)} is .605.\n.7 is {words(20)}.",
        f"{words(20)} is 1.5. 2.5 is {words(20)}.",
        f"- {words(20)}\n- {words(20)}\n  1. {words(20)}",
        f"{words(20)}:\n\n{words(20)}",
        f"# {words(30)}",
        f"| {words(30)} |\n|---|\n| {words(30)} |",
        f"- {words(20)}:\n\n  | {words(30)} |\n  |---|\n  | {words(30)} |",
        f"```console\n$ {words(30)}\n```",
        f"- {words(5)}\n\n    ```\n    {words(30)}\n    ```",
        f"A paragraph.\n\n    {words(30)}\n    {words(30)}\n",
        f"`{words(30)}`",
        f"`{words(15)}\n{words(15)}`",
        f"[a link](https://example.org/{'-'.join(words(30).split())})",
        f"![{words(30)}](picture.png)",
        f"{words(20)} - - - - - - {words(5)}",
    ],
)
def test_what_is_short_or_no_sentence_is_not_found(text: str) -> None:
    assert long_sentences(text) == []
