"""Hook of MkDocs: files of the repository that pages link to become files of the website.

Pages link to scripts and reports as they lie beside ``docs/``, so that links also work where the repository is read.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
FOLDER = "repository"
_OUTSIDE = re.compile(r"\]\(\.\./([^)#\s]+)(#[^)\s]*)?\)")
_SHOWN = {".png", ".json"}


def on_files(files: Files, config: Any) -> Files:
    """Add every file outside of ``docs/`` that a page links to; one that is missing ends the build."""
    linked: set[str] = set()
    for page in files.documentation_pages():
        linked |= {found[1] for found in _OUTSIDE.finditer(page.content_string)}
    for name in sorted(linked):
        files.append(File.generated(config, _address(name), abs_src_path=str(_file(name))))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Lead links out of ``docs/`` to the copies."""
    return _OUTSIDE.sub(lambda found: f"]({_address(found[1])})", markdown)


def _file(name: str) -> Path:
    path = ROOT / name
    if not path.is_file():
        raise FileNotFoundError(f"{name}: a page of docs/ links to it")
    return path


def _address(name: str) -> str:
    """Address of a copy: text is named .txt, so that browsers show it."""
    return f"{FOLDER}/{name}" if Path(name).suffix in _SHOWN else f"{FOLDER}/{name}.txt"
