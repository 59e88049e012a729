"""The documents say what the code does: every key with its default, every path, every allowed import."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from docs import reference
from embrag_ds.config import EmbragConfig
from embrag_ds.config_files import shipped_configurations

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = (
    "README.md",
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
    "examples/1000genomes/README.md",
)
TIMELESS = tuple(document for document in DOCUMENTS if document != "docs/log.md")
"""Documents about the code as it is; the log also names what is no longer there."""
SECTIONS = tuple(field.name for field in dataclasses.fields(EmbragConfig))
CODE = re.compile(r"`([^`\n]+)`")


def read(root: Path, document: str) -> str:
    return (root / document).read_text(encoding="utf-8")


def defaults(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> default as JSON has it, over all sections."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            found |= defaults(value, f"{prefix}{field.name}.")
        else:
            found[prefix + field.name] = json.loads(json.dumps(value))
    return found


@pytest.mark.parametrize("page", reference.PAGES)
def test_the_pages_written_from_the_code_are_as_it_would_write_them(root: Path, page: str) -> None:
    written = read(root, f"docs/{page}")
    assert written == reference.PAGES[page](), f"python docs/reference.py writes {page} anew"


def test_every_setting_has_its_default_and_effect() -> None:
    found = {key: (default, effect) for key, default, _, effect in reference.settings(EmbragConfig())}
    assert {key: default for key, (default, _) in found.items()} == defaults(EmbragConfig())
    assert all((len(effect.split()) > 1 and effect[0].isupper()) or effect[0] == "`" for _, effect in found.values())


def test_every_setting_is_an_item_of_its_page(root: Path) -> None:
    """A table would squeeze the keys on a narrow page, and break them within words."""
    page = read(root, "docs/settings.md")
    items = re.findall(r"^- `([\w.]+)` \(default `(.+?)`(?:, ([^`]+))?\)\. (.+)$", page, flags=re.MULTILINE)
    expected = [
        (key, json.dumps(default), unit, effect) for key, default, unit, effect in reference.settings(EmbragConfig())
    ]
    assert items == expected and "|---" not in page


def test_every_shipped_configuration_is_named(root: Path) -> None:
    section = read(root, "docs/configuration.md").split("## Which file")[1].split("\n## ")[0]
    assert sorted(re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE)) == list(shipped_configurations())


@pytest.mark.parametrize("document", TIMELESS)
def test_every_key_that_a_document_names_exists(root: Path, document: str) -> None:
    known = set(defaults(EmbragConfig()))
    sections = {key.rpartition(".")[0] for key in known} | {key.split(".")[0] for key in known}
    dotted = re.compile(r"[`\s\"'](?:embrag\.)?((?:" + "|".join(SECTIONS) + r")\.[a-z_.]+)")
    named = {key.rstrip(".") for key in dotted.findall(read(root, document))}
    files = {key for key in named if key.endswith((".py", ".md", ".json", ".safetensors"))}
    assert named - files - known - sections == set()


@pytest.mark.parametrize("document", TIMELESS)
def test_every_path_that_a_document_names_exists(root: Path, document: str) -> None:
    rooms = "|".join(path.name for path in (root / "embrag_ds").iterdir() if path.is_dir())
    tops = r"embrag_ds|docs|ds_configs|examples|launch|profiling|tests"
    path = re.compile(rf"(?:{rooms}|{tops})/[\w./-]*")
    for code in CODE.findall(read(root, document)):
        for word in code.split():
            if path.fullmatch(word):
                places = [root / word, root / "embrag_ds" / word]
                assert any(place.exists() for place in places), f"{document}: {word}"


@pytest.mark.parametrize("document", ("docs/configuration.md", "docs/design.md", "docs/extending.md"))
def test_every_name_that_a_document_uses_is_in_the_code(root: Path, document: str) -> None:
    words = {*shipped_configurations(), *constants(root / "tests" / "test_layering.py")["SHARED"]}
    for source in (root / "embrag_ds").rglob("*.py"):
        words.update(re.findall(r"\w+", source.read_text(encoding="utf-8")))
    name = re.compile(r"[A-Za-z_]\w+(?:\.[A-Za-z_]\w*)*")
    files = re.compile(r".+\.(?:py|md|json|sh|log|safetensors)")
    named = {code for code in CODE.findall(read(root, document)) if name.fullmatch(code) and not files.fullmatch(code)}
    assert {code for code in named if not words.issuperset(code.split("."))} == set()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_leads_somewhere(root: Path, document: str) -> None:
    text = read(root, document)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("http"):
            continue
        name, _, anchor = target.partition("#")
        there = (root / document).parent / name if name else root / document
        assert there.exists(), f"{document}: {target}"
        assert not anchor or anchor in anchors(there), f"{document}: {target}"


def anchors(path: Path) -> set[str]:
    """Anchors that GitHub makes of a document's headings."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_messages_of_troubleshooting_are_those_of_the_code(root: Path) -> None:
    said = []
    for source in (root / "embrag_ds").rglob("*.py"):
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                said.append("".join(each.value if isinstance(each, ast.Constant) else " ... " for each in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                said.append(re.sub(r"%[.\d]*[a-z]", "...", node.value).replace("%%", "%"))
    rows = re.findall(r"^\| (`.+?) \|", read(root, "docs/troubleshooting.md"), flags=re.MULTILINE)
    assert len(rows) > 20
    for message in (each for row in rows if "(torch's own)" not in row for each in CODE.findall(row)):
        assert any(re.sub(" +", " ", message) in re.sub(" +", " ", text) for text in said), message


def test_the_design_lists_the_imports_that_the_rules_allow(root: Path) -> None:
    rules = constants(root / "tests" / "test_layering.py")
    text = read(root, "docs/design.md").split("## Rooms")[1].split("\n## ")[0]
    rooms = dict(re.findall(r"^\| `(\w+)` \| (.+?) \| .+ \|$", text, flags=re.MULTILINE))
    assert {room: tuple(CODE.findall(allowed)) for room, allowed in rooms.items()} == rules["ROOMS"]
    (shared,) = re.findall(r"shared modules of the top level: (.+?)\.", text, flags=re.DOTALL)
    assert tuple(CODE.findall(shared)) == rules["SHARED"]
    homes = dict(re.findall(r"^\| (\w+) \| (`.+?) \|$", text, flags=re.MULTILINE))
    assert {package: tuple(CODE.findall(places)) for package, places in homes.items()} == rules["HOMES"]
    assert tuple(package for package, places in homes.items() if "inside functions only" in places) == rules["LAZY"]
    assert f"at most {rules['MOST_MODULES']} modules" in text


def constants(source: Path) -> dict[str, Any]:
    """Names that a module assigns literals to."""
    found = {}
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            with suppress(ValueError):
                found[ast.unparse(target)] = ast.literal_eval(node.value)
    return found
