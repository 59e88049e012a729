"""Places at which a bgzipped VCF can be divided, so that several processes read it at once."""

from __future__ import annotations

import re
import struct
import zlib
from bisect import bisect_left
from contextlib import suppress
from pathlib import Path
from typing import Any

import pysam

DAMAGE = (OSError, EOFError, zlib.error, ValueError, NotImplementedError)
"""Exceptions of readers of compressed files. The last one is pysam's, for a BCF whose blocks htslib takes for plain
gzip."""
_BLOCK = re.compile(rb"\x1f\x8b\x08\x04.{6}\x06\x00BC\x02\x00", re.DOTALL)
_SIZE_AT = 16
_LONGEST_BLOCK = 1 << 16
_READ_BYTES = 1 << 16
_MOST_TEXT = 1 << 25
"""Bytes of text in which a seam is looked for: a damaged file may have no end of line."""
_PLACE_BYTES = 1 << 10


def find_seams(path: Path, pieces: int) -> list[int]:
    """Virtual offsets of records that divide a bgzipped VCF into up to ``pieces`` pieces of like size, increasing.

    Every one is the first record at its position, so that no two pieces of a valid file have a position in common. A
    file whose blocks or records are not found has fewer, or none. Virtual offsets are htslib's: a block's place in the
    file, and 16 bits for the place in its text.
    """
    size = path.stat().st_size
    found: list[int] = []
    with path.open("rb") as raw:
        for number in range(1, pieces):
            with suppress(*DAMAGE):  # whoever reads the records meets it again
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
        content = bytearray()
        begin = searched = 0
        before: list[bytes] | None = None
        is_whole = False  # a block most likely begins inside a line
        while len(content) < _MOST_TEXT and (more := text.read(_READ_BYTES)):
            content += more
            while (end := content.find(b"\n", searched)) >= 0:
                place = bytes(content[begin : min(end, begin + _PLACE_BYTES)]).split(b"\t", 2)[:2]
                if is_whole and place[0].startswith(b"#"):
                    return None
                if before is not None and place != before:
                    text.seek(block << 16)
                    text.read(begin)
                    return int(text.tell())
                before, is_whole = place if is_whole else None, True
                begin = searched = end + 1
            searched = len(content)
    return None


def length_until(text: Any, start: int, seam: int, block: bytes) -> int | None:
    """Bytes of ``block``, which begins at the virtual offset ``start``, up to another; None if it does not end there.

    ``text`` is the file, opened for this.
    """

    def after(length: int) -> int:
        text.seek(start)
        text.read(length)
        return int(text.tell())

    length = bisect_left(range(len(block)), seam, key=after)
    if after(length) != seam:
        return None
    text.seek(start)
    return length if text.read(length) == block[:length] else None
