"""Checkpoints as folders: their manifest, and which of them is whole. What is in them is DeepSpeed's and torch's."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embrag_ds.errors import UserError
from embrag_ds.files import unused, write_json
from embrag_ds.seals import damage

logger = logging.getLogger(__name__)

MANIFEST, LATEST = "manifest.json", "latest"
"""Names of a checkpoint's manifest, and of the file that names the newest checkpoint, for DeepSpeed's own tools."""
TEMPORARY = ".tmp-"
"""Beginning of the names of folders that are being written."""
FORMAT = 1
"""Version of the manifest."""
_DAMAGED = ".damaged"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is whole: its folder, its step, and the facts of its manifest."""

    folder: Path
    step: int
    facts: dict[str, Any]


def write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """Write the manifest of a checkpoint whose files are all there; ``facts["files"]`` is their seal."""
    write_json(folder / MANIFEST, {"format": FORMAT, "sha256": _digest(facts), "facts": facts})


def newest_first(directory: Path) -> list[Path]:
    """Folders of checkpoints that were finished, the newest first; they may have been damaged since."""
    found = [(_step(path), path) for path in directory.glob("step*")]
    return [path for step, path in sorted(found, reverse=True) if step >= 0 and (path / MANIFEST).exists()]


def newest_step(directory: Path) -> int:
    """Step of the newest checkpoint that was finished; 0 for none."""
    found = newest_first(directory)
    return _step(found[0]) if found else 0


def size_of(folder: Path) -> int:
    """Bytes of a checkpoint's files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def newest_whole(directory: Path) -> Checkpoint:
    """The newest checkpoint of ``directory`` that is whole; what is wrong with newer ones is logged as a warning.

    All of a checkpoint's files are read and compared with its manifest. Raises :class:`UserError` if none is whole.
    """
    wrong: list[str] = []
    steps = sorted((_step(path), path) for path in directory.glob("step*") if _step(path) >= 0)
    for step, folder in reversed(steps):
        facts, fault = _read(folder)
        if fault is None:
            for each in wrong:
                logger.warning("%s", each)
            if wrong:
                logger.warning("%s: going on from the newest checkpoint that is whole, %s", directory, folder.name)
            return Checkpoint(folder, step, facts)
        wrong.append(f"{folder}: this checkpoint is not whole ({fault})")
    if not wrong:
        raise UserError(f"{directory}: no checkpoint to resume from; start without --resume")
    raise UserError(f"{'; '.join(wrong)}; no checkpoint is whole: start a new run folder")


def set_aside(directory: Path, step: int) -> None:
    """Rename the checkpoints beyond ``step``, which are damaged, so that none is taken for a good one again."""
    for path in directory.glob("step*"):
        if _step(path) > step:
            path.rename(unused(path.with_name(f"{path.name}{_DAMAGED}")))


def _read(folder: Path) -> tuple[dict[str, Any], str | None]:
    """Facts of a checkpoint's manifest, and what is wrong with the checkpoint."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            return {}, f"{MANIFEST} is of another version of embrag_ds"
        facts = manifest["facts"]
        if manifest["sha256"] != _digest(facts):
            return {}, f"{MANIFEST} has changed"
        return facts, damage(folder, facts["files"], besides=(MANIFEST,))
    except FileNotFoundError:
        return {}, f"it has no {MANIFEST}, so it was never finished"
    except OSError as fault:
        return {}, str(fault.strerror)
    except (ValueError, LookupError, TypeError, AttributeError):
        return {}, f"{MANIFEST} cannot be read"


def _digest(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _step(path: Path) -> int:
    """Step in a checkpoint's name; -1 for another name."""
    digits = path.name.removeprefix("step")
    return int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 19 else -1
