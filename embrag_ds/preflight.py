"""Checks of a command's files before its work, which may take hours: each fault is one line at once."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from embrag_ds.errors import UserError
from embrag_ds.files import source_of

logger = logging.getLogger(__name__)

Paths = Mapping[str, Path | Sequence[Path] | None]
"""Files of a command: option -> what it names; None where it is not given."""
_INDEXES = (".tbi", ".csi")


def require_readable(inputs: Paths) -> None:
    """Raise :class:`UserError` unless every input is there, is no folder, and may be read: for before long work."""
    for option, path in _each(inputs):
        try:
            if os.path.isdir(path):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            if not stat.S_ISFIFO(os.stat(path).st_mode):  # opening a pipe waits for its other end
                path.open("rb").close()
        except (OSError, ValueError) as fault:
            reason = getattr(fault, "strerror", None) or fault
            raise UserError(f"{path}: cannot read it ({reason}); check what {option} names") from fault


def require_distinct(outputs: Paths, inputs: Paths) -> None:
    """Raise :class:`UserError` if a file to be written is one to be read, or another one to be written.

    Files are the same by whatever name: also through links of either kind, and where none is there yet. The index of
    a variant file (``.tbi`` or ``.csi``) counts as well. What is no regular file, such as ``/dev/stdout``, is not lost
    by writing, and passed over.
    """
    known: dict[tuple[Any, ...], str] = {}
    for option, path in _each(inputs):
        for name, each in _with_indexes(f"{option} {path}", path):
            if (identity := _identity(each)) is not None:
                known.setdefault(identity, f"{name}, which would be lost")
    for option, path in _each(outputs):
        own = [(name, each, _identity(each)) for name, each in _with_indexes(f"{option} {path}", path)]
        for _, each, identity in own:
            if identity in known:
                this = option if each == path else f"the index of {option} {path}"
                raise UserError(f"{each}: {this} is the same file as {known[identity]}; choose another name")
        known |= {identity: name for name, _, identity in own if identity is not None}


def require_folder(path: Path) -> None:
    """Raise :class:`UserError` unless ``path`` is a folder to write in, or can be made."""
    nearest = next(each for each in (path, *path.absolute().parents) if os.path.lexists(each) or each == each.parent)
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as fault:
        raise UserError(f"{path}: cannot write in this folder ({fault.strerror}); choose another") from fault


def require_space(path: Path, least: int, likely: int) -> None:
    """Compare the free space for ``path`` with the bytes that it needs ``least`` and those that it is ``likely`` to.

    Raises :class:`UserError` for less than ``least``, and warns of less than ``likely``.
    """
    if _special(path):
        return
    folder = Path(os.path.realpath(path)).parent
    free = shutil.disk_usage(folder).free
    if free < least:
        raise UserError(
            f"{path}: it needs at least {_size(least)}, and {folder} has {_size(free)} free; free some space there, or "
            "choose another folder"
        )
    if free < likely:
        logger.warning("%s: likely to need %s, and %s has %s free", path, _size(likely), folder, _size(free))


def _size(number: int) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e8 else f"{number / 1e6:.1f} MB"


def _each(paths: Paths) -> Iterator[tuple[str, Path]]:
    for option, named in paths.items():
        for path in () if named is None else (named,) if isinstance(named, Path) else named:
            yield option, source_of(path)


def _with_indexes(name: str, path: Path) -> list[tuple[str, Path]]:
    """The file and its possible indexes, each with words for it."""
    suffixes = () if _special(path) else _INDEXES
    return [(name, path), *((f"the index of {name}", Path(f"{path}{suffix}")) for suffix in suffixes)]


def _special(path: Path) -> bool:
    """Whether a device or a pipe is there."""
    return os.path.exists(path) and not os.path.isfile(path)


def _identity(path: Path) -> tuple[Any, ...] | None:
    """What two names of one file have in common: its place on the disk or, for none yet, that of its folder."""
    try:
        status = os.stat(path)
        return (status.st_dev, status.st_ino) if stat.S_ISREG(status.st_mode) else None
    except ValueError:  # a name with a NUL, which require_readable refuses
        return None
    except OSError:
        folder, name = os.path.split(os.path.realpath(path))
    try:
        status = os.stat(folder)
        return status.st_dev, status.st_ino, name
    except OSError:
        return folder, name
