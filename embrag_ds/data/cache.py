"""The cache folder: where it lies, its entries, each a folder that one process builds, and scratch space.

An entry holds a file :data:`SEAL`, written last, with the size of every other file and the SHA-256 of those that are no
packed alleles. An entry without it, or that differs from it, is damaged: it is not used but built again.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from embrag_ds.errors import UserError
from embrag_ds.files import folder_written, remove_leftovers
from embrag_ds.seals import damage, files_below, sealed_file

logger = logging.getLogger(__name__)

SEAL = "seal.json"
"""Name of the file that describes the others of an entry."""
_REMEDY = "name another folder with --cache-dir, or with XDG_CACHE_HOME"
_UNHASHED = ".bits"
"""Suffix of files too large to be read whole whenever they are opened."""


def default_cache_dir() -> Path:
    """Default cache folder: ``$XDG_CACHE_HOME/embrag_ds``, or ``~/.cache/embrag_ds``.

    A variable without an absolute path is ignored, as the XDG Base Directory Specification has it. Raises
    :class:`UserError` where the user has no home folder either.
    """
    named = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(named):
        return Path(named) / "embrag_ds"
    if named:
        _warn_of_relative(named)
    try:
        return Path.home() / ".cache" / "embrag_ds"
    except RuntimeError as fault:
        raise UserError(f"there is no home folder for the cache ({fault}); {_REMEDY}") from fault


@cache
def _warn_of_relative(named: str) -> None:
    logger.warning("XDG_CACHE_HOME is ignored: %s is no absolute path", named)


def require_cache(folder: Path) -> None:
    """Make the cache folder unless it is there; raises :class:`UserError` unless files can be made in it."""
    with _named(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"\0")
            probe.flush()


@contextmanager
def scratch_folder(cache: Path, prefix: str) -> Iterator[Path]:
    """A temporary folder in the cache, where there is usually room; raises as :func:`require_cache` does."""
    require_cache(cache)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=cache, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@contextmanager
def building(directory: Path) -> Iterator[Path | None]:
    """Yield a temporary folder that becomes the entry ``directory`` on success, or None if there is an intact one.

    A lock makes concurrent ranks and runs wait for the one that builds. A failure leaves nothing behind. What a killed
    process left is removed by the next build, and a damaged entry is replaced with a warning.
    """
    with locked(directory):
        if directory.exists():
            fault = _damage(directory)
            if fault is None:
                yield None
                return
            logger.warning("%s: damaged (%s); it is made again", directory, fault)
        remove_leftovers(directory)
        with folder_written(directory) as temporary:
            yield temporary
            _seal(temporary)


def remove_entry(directory: Path) -> None:
    """Remove an entry, if it is there, that no other process can use."""
    shutil.rmtree(directory, ignore_errors=True)
    with suppress(OSError):
        _lock_file(directory).unlink()


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold an exclusive lock on ``directory`` among the processes of this machine, by a lock file beside it."""
    require_cache(directory.parent)
    with _named(directory.parent):
        lock = os.open(_lock_file(directory), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        with _named(directory.parent):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _lock_file(directory: Path) -> Path:
    return directory.parent / f".{directory.name}.lock"


@contextmanager
def _named(folder: Path) -> Iterator[None]:
    """Turn the system's faults in ``with`` into a :class:`UserError` that says how to name another cache folder."""
    try:
        yield
    except (OSError, ValueError) as fault:
        reason = getattr(fault, "strerror", None) or fault
        raise UserError(f"{folder}: cannot write to the cache folder ({reason}); {_REMEDY}") from fault


def _seal(entry: Path) -> None:
    described = {name: sealed_file(entry / name, not name.endswith(_UNHASHED)) for name in files_below(entry)}
    (entry / SEAL).write_text(json.dumps(described), encoding="utf-8")


def _damage(entry: Path) -> str | None:
    """What is wrong with an entry of the cache, or None."""
    try:
        sealed = json.loads((entry / SEAL).read_text(encoding="utf-8"))
        return damage(entry, sealed, besides=(SEAL,))
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as fault:
        return str(getattr(fault, "strerror", None) or f"{SEAL} cannot be read")
