"""Places at which a bgzipped VCF can be divided, so that several processes read it at once."""

from __future__ import annotations

import re
import struct
from bisect import bisect_left
from pathlib import Path
from typing import Any

import pysam

_BLOCK = re.compile(rb"\x1f\x8b\x08\x04.{6}\x06\x00BC\x02\x00", re.DOTALL)
_SIZE_AT = 16
_LONGEST_BLOCK = 1 << 16
_MOST_RECORDS = 1000
"""Records at one position, beyond which no seam is looked for."""


def find_seams(path: Path, pieces: int) -> list[int]:
    """Virtual offsets of records that divide a bgzipped VCF into up to ``pieces`` pieces of like size, increasing.

    Every one is the first record at its position, so that no two pieces have a position in common. A file whose blocks
    or records are not found has fewer, or none. Virtual offsets are htslib's: a block's place in the file, and 16 bits
    for the place in its text.
    """
    size = path.stat().st_size
    found: list[int] = []
    with path.open("rb") as raw:
        for number in range(1, pieces):
            block = _block_from(raw, size * number // pieces)
            seam = None if block is None else _seam_from(path, block)
            if seam is not None and (not found or seam > found[-1]):
                found.append(seam)
    return found


def _block_from(raw: Any, place: int) -> int | None:
    """Place of the first block from ``place`` on that another block follows; None if there is none."""
    raw.seek(place)
    content = raw.read(2 * _LONGEST_BLOCK)
    for match in _BLOCK.finditer(content):
        size = content[match.start() + _SIZE_AT : match.start() + _SIZE_AT + 2]
        if len(size) == 2:
            raw.seek(place + match.start() + struct.unpack("<H", size)[0] + 1)
            if _BLOCK.match(raw.read(_SIZE_AT)):
                return int(place + match.start())
    return None


def _seam_from(path: Path, block: int) -> int | None:
    """Virtual offset of the first record of a position, from a block on; None if there is none nearby."""
    with pysam.BGZFile(str(path), "rb", None) as text:
        text.seek(block << 16)
        text.readline()  # most likely the end of a line
        before = None
        for _ in range(_MOST_RECORDS):
            here = text.tell()
            line = text.readline()
            if not line or line.startswith(b"#"):
                return None
            place = line.split(b"\t", 2)[:2]
            if before is not None and place != before:
                return int(here)
            before = place
    return None


def text_until(text: Any, start: int, seam: int, most: int) -> bytes | None:
    """The text from one virtual offset to another, at most ``most`` bytes; None if no such text ends there.

    ``text`` is left at ``seam``, or at ``start``.
    """

    def after(length: int) -> int:
        text.seek(start)
        text.read(length)
        return int(text.tell())

    length = bisect_left(range(most + 1), seam, key=after)
    is_there = after(length) == seam
    text.seek(start)
    return text.read(length) if is_there else None
