"""Rules by which a variant file is read, and where it lies packed in the cache."""

from __future__ import annotations

import hashlib
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from embrag_ds.errors import UserError
from embrag_ds.files import source_of
from embrag_ds.variants.records import Duplicates

FORMAT = 5
"""Version of the folder's layout."""
PanelMissing = Literal["error", "major", "drop"]
"""Rule for a panel's site with missing or unphased calls, see :class:`Reading`."""
Missing = PanelMissing | Literal["keep"]
"""Rule for such a site of any file."""


@dataclass(frozen=True)
class Reading:
    """Rules by which a file is read.

    A panel must have every allele and its phase. ``missing`` says what happens where it has not: ``error`` refuses the
    file, ``drop`` leaves the site out, and ``major`` takes the site's major allele for missing alleles and for both
    alleles of an unphased heterozygote. ``keep``, for targets, keeps missing and unphased calls as such.
    ``without_alt`` keeps records without ALT (:class:`embrag_ds.variants.records.VariantReader`).
    """

    duplicates: Duplicates = "first"
    missing: Missing = "error"
    without_alt: bool = False


PANEL = Reading()
"""Rules for panels, unless the user asks for others."""
TARGET = Reading(missing="keep", without_alt=True)
"""Rules for targets."""


def packed_folder(path: Path, cache_dir: Path, reading: Reading) -> Path | None:
    """A file's folder in the cache, there or not; None for a pipe. Raises :class:`UserError` if it cannot be read."""
    identity = _identity(path, reading)
    return None if identity is None else cache_dir / f"panel-{identity}"


def _identity(path: Path, reading: Reading) -> str | None:
    """Cache key of a file: a digest of its size, times of change, first and last MiB, and rules; None for a pipe."""
    path = source_of(path)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
            return None
        with path.open("rb") as stream:
            head = stream.read(1 << 20)
            stream.seek(max(0, status.st_size - (1 << 20)))
            tail = stream.read()
    except OSError as fault:
        raise UserError(f"{path}: it cannot be read ({fault.strerror}); check the path and its permissions") from fault
    times = f"{status.st_mtime_ns} {status.st_ctime_ns}"
    digest = hashlib.sha256(f"{FORMAT} {reading} {status.st_size} {times} ".encode())
    digest.update(head)
    digest.update(tail)
    return digest.hexdigest()[:20]
