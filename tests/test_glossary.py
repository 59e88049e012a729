"""The glossary: its letters are those of the code's legend, its terms are in order, and what it points to exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

TABLE_ROW = re.compile(r"^\|(.+)\|$", re.MULTILINE)
WHERE = re.compile(r"^`(?P<path>[\w/]+\.py)`: (?P<names>`[\w.]+`(?:, `[\w.]+`)*)$")


def rows(root: Path, heading: str) -> list[list[str]]:
    """Cells of the table under a heading, without its header and ruler."""
    text = (root / "docs" / "glossary.md").read_text(encoding="utf-8")
    section = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    return [[cell.strip() for cell in row.split(" | ")] for row in TABLE_ROW.findall(section)][2:]


def plain(text: str) -> str:
    """Words alone: no markup, no line breaks."""
    return " ".join(re.sub(r":\w+:|`|\*", "", text).split())


def legend(root: Path) -> dict[str, str]:
    """Letter -> meaning, from the docstring of data/tokens.py."""
    source = (root / "embrag_ds" / "data" / "tokens.py").read_text(encoding="utf-8")
    docstring = ast.get_docstring(ast.parse(source)) or ""
    found: dict[str, str] = {}
    for line in docstring.split("====\n")[2].splitlines():
        letter, meaning = line[:14].strip(), line[14:].strip()
        if letter.startswith("="):
            break
        if letter:
            found[plain(letter)] = meaning
        else:
            found[list(found)[-1]] += f" {meaning}"
    return found


def test_every_letter_of_the_legend_is_in_the_glossary_and_means_the_same(root: Path) -> None:
    explained = {letter: plain(meaning) for letter, meaning, _ in rows(root, "Letters of array shapes")}
    assert len(legend(root)) > 10
    for letter, meaning in legend(root).items():
        assert explained.get(letter, "").startswith(plain(meaning)), letter


def test_letters_are_in_order_and_there_once(root: Path) -> None:
    letters = [row[0] for row in rows(root, "Letters of array shapes")]
    assert letters == sorted(set(letters), key=lambda letter: (letter.lower(), letter))


def test_an_example_of_a_letter_has_it_in_its_shape(root: Path) -> None:
    for letter, _, example in rows(root, "Letters of array shapes"):
        (shape,) = re.findall(r"\[([^]]+)\]", example)
        assert letter in shape.split(", "), letter


def test_terms_are_in_order_and_there_once(root: Path) -> None:
    keys = [re.sub(r"[^a-z0-9]", "", row[0].lower()) for row in rows(root, "Terms")]
    assert len(keys) > 100 and keys == sorted(keys)
    assert len(set(keys)) == len(keys)


def test_sentences_are_short(root: Path) -> None:
    for term, meaning, _ in rows(root, "Terms"):
        sentences = re.split(r"(?<=[.!?])\s+", meaning.replace("et al.", "et al"))
        assert len(sentences) <= 2, term
        assert max(len(sentence.split()) for sentence in sentences) < 25, term


def test_every_term_says_where_it_is_in_the_code(root: Path) -> None:
    for term, _, where in rows(root, "Terms"):
        for place in where.split("; "):
            found = WHERE.match(place)
            assert found, f"{term}: {place}"
            source = root / "embrag_ds" / found["path"]
            assert source.is_file(), f"{term}: {source}"
            for name in re.findall(r"`([\w.]+)`", found["names"]):
                assert name in names_of(source), f"{term}: {name} is not in {found['path']}"


def names_of(source: Path) -> set[str]:
    """Names that a module defines, those of its classes with the class in front."""
    return _defined(ast.parse(source.read_text(encoding="utf-8")), "")


def _defined(node: ast.Module | ast.ClassDef, prefix: str) -> set[str]:
    found: set[str] = set()
    for each in node.body:
        if isinstance(each, ast.FunctionDef | ast.ClassDef):
            found.add(prefix + each.name)
        if isinstance(each, ast.ClassDef):
            found |= _defined(each, f"{prefix}{each.name}.")
        if isinstance(each, ast.FunctionDef) and each.name == "__init__":
            targets = [item for item in ast.walk(each) if isinstance(item, ast.Attribute)]
            found |= {prefix + item.attr for item in targets if isinstance(item.ctx, ast.Store)}
        if isinstance(each, ast.Assign | ast.AnnAssign):
            assigned = each.targets if isinstance(each, ast.Assign) else [each.target]
            found |= {prefix + target.id for target in assigned if isinstance(target, ast.Name)}
    return found


@pytest.mark.parametrize("name", ["Panel.packed", "PanelSubset.samples", "open_panel", "RARE"])
def test_names_are_found_wherever_they_are_defined(root: Path, name: str) -> None:
    assert name in names_of(root / "embrag_ds" / "data" / "panel.py")
