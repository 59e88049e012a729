"""Text files named by the user."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

from embrag_ds.errors import UserError


def read_lines(path: Path, what: str) -> list[str]:
    """Lines of a plain or gzipped UTF-8 text file; ``what`` describes it in errors.

    Raises :class:`UserError` if the file cannot be read or decoded.
    """
    try:
        content = path.read_bytes()
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
        return content.decode("utf-8").splitlines()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as fault:
        reason = getattr(fault, "strerror", None) or "not plain or gzipped text"
        raise UserError(f"{path}: cannot read the {what} ({reason}); check the path or write it again") from fault
