"""Seals: size and SHA-256 of a folder's files, so that missing, cut and changed ones are seen before they are used."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

_BLOCK = 1 << 20

Seal = dict[str, dict[str, int | str]]
"""File of a folder, by its path in it, and what it must be: ``bytes`` and, unless it is too large, ``sha256``."""


def sealed_file(path: Path, hashed: bool = True) -> dict[str, int | str]:
    """Entry of a seal for one file."""
    found: dict[str, int | str] = {"bytes": path.stat().st_size}
    if hashed:
        digest = hashlib.sha256()
        with path.open("rb") as stream:
            while block := stream.read(_BLOCK):
                digest.update(block)
        found["sha256"] = digest.hexdigest()
    return found


def files_below(folder: Path) -> list[str]:
    """Paths of all files of a folder and of those in it, relative to it and sorted."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


def damage(folder: Path, seal: Mapping[str, Mapping[str, int | str]], besides: Iterable[str] = ()) -> str | None:
    """What is wrong with a sealed folder, in words, or None; ``besides`` are files that the seal does not list.

    Raises OSError for a file that cannot be read.
    """
    present = set(files_below(folder)) - set(besides)
    if missing := sorted(seal.keys() - present):
        return f"{missing[0]} is missing"
    if foreign := sorted(present - seal.keys()):
        return f"{foreign[0]} does not belong there"
    for name, must_be in sorted(seal.items()):
        size = (folder / name).stat().st_size
        if size != must_be["bytes"]:
            return f"{name} has {size:,} of {must_be['bytes']:,} bytes"
    for name, must_be in sorted(seal.items()):
        if sealed_file(folder / name, "sha256" in must_be) != dict(must_be):
            return f"{name} has changed"
    return None
