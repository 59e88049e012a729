"""Mutators: functions (random generator, content) -> content, of bytes, lines, fields, VCF records and containers."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Rng = np.random.Generator
Mutator = Callable[[Rng, bytes], bytes]

NUMBERS = (
    b"", b"0", b"-1", b"1", b"2", b"-0", b"+5", b"007", b"1.5", b"1e3", b"1_000", b"0x10", b" 7", b"7 ",
    b"2147483647", b"2147483648", b"-2147483648", b"4294967296", b"9223372036854775807", b"9223372036854775808",
    b"99999999999999999999", b"1e-320", b"1e300", b"1e308", b"1e999", b"-1e308", b"nan", b"inf", b"-inf", b".",
    "\u0661".encode(), b"null", b"9" * 5000,
)  # fmt: skip
ODDITIES = (
    b"\0", b"\r", b"\n", b"\r\n", b"\n\n", b"\t", b" ", b"#", b"##", b",", b";", b":", b"=", b"<", b">", b"\xff",
    b"\xe9",
    b"\x1a", b"\x0b", b"\x0c", b"\x1c", b"\x85", b"\xc2\x85", "\u2028".encode(), b"\xef\xbb\xbf", b"\xed\xa0\x80",
    b"\"",
    b"'", b"\\", b"{", b"}", b"[", b"]", b"%s", b"../x", b"A" * 70_000,
)  # fmt: skip
GENOTYPES = (
    b"", b".", b"./.", b".|.", b".|1", b"1|.", b"./1", b"0", b"1", b"2", b"0/1", b"1/1", b"0|1", b"|0|1", b"/0|1",
    b"|1",
    b"/1", b"|.", b"0/1/2", b"0|1|1", b".|.|.", b"0|2", b"2|1", b"3|3", b"127|0", b"9999|0", b"10000|0", b"-1|0",
    b"0|x",
    b"0|", b"|", b"/", b"||", b"0||1", b"0\\1", b"0|1 ", b" 0|1", b"00|1", b"+1|0", b"0|1:", b"0|1:9:9:9:9:9", b"nan",
)  # fmt: skip
ALLELES = (
    b"", b".", b"*", b"A", b"a", b"N", b"ACGT", b"acGT", b"A,C", b"C,", b",C", b"A,A", b"C,.", b"*,C", b"<DEL>",
    b"<DEL>,C", b"<DEL>,<DEL>", b"<INS>", b"<CN0>,<CN2>", b"<DUP:TANDEM>", b"<*>", b"<NON_REF>", b"C,<NON_REF>",
    b"C,<*>", b"G]2:321681]", b"]13:123456]T", b"G.", b".G", b"<", b"<>", b"<DEL", b"DEL>", b"R", b"A C", b"1", b"-",
    b"X" * 2000, b",".join([b"C" * n for n in range(1, 300)]),
)  # fmt: skip
INFOS = (
    b"", b".", b"END=500", b"END=-1", b"END=0", b"END=.", b"END=x", b"END", b"END=1e3", b"END=99999999999999",
    b"SVLEN=-50",
    b"SVLEN=-50,7", b"SVLEN=.", b"SVTYPE=DEL;END=300;SVLEN=-9", b"END=300;END=400", b"IMP", b"IMP=1", b"DR2=0.5",
    b"DR2=high",
    b"DR2=", b"DR2=nan", b"DR2=1e999", b"DR2=0.5,0.5", b"R2=-1", b"AF=0.1;;", b";", b"=", b"=5", b"NEW=1", b"AC=1,2,3",
)  # fmt: skip
FORMATS = (
    b"", b".", b"GT", b"DP", b"DP:GT", b"GT:GT", b"GT:DS", b"DS:GT", b"GT:DP:", b":GT", b"gt", b"GT:DP:AD:PL",
    b"HDS", b"GP",
    b"GT:DS:HDS:GP", b"GT:HDS", b"GT:GP", b"AP1:AP2", b"GT;DP",
)  # fmt: skip
CONTIGS = (
    b"",
    b".",
    b"1",
    b"2",
    b"X",
    b"chr1",
    b"23",
    b"MT",
    b"<1>",
    b"1:5",
    b"=",
    b"*",
    b"contig with blank",
    b"HLA*01:01",
)
HEADER_LINES = (
    b"##contig=<ID=1>", b"##contig=<ID=1,length=5>", b"##contig=<ID=1,length=-5>", b"##contig=<ID=1,length=1e9>",
    b"##contig=<length=7,ID=7>", b"##contig=<ID=>", b"##contig=<>", b"##contig=",
    b"##contig=<ID=9,length=99999999999999999999>",
    b"##contig=<ID=\xe9>", b'##INFO=<ID=END,Number=1,Type=String,Description="end">', b"##INFO=<ID=DR2>",
    b'##FORMAT=<ID=GT,Number=2,Type=Integer,Description="GT">',
    b'##FORMAT=<ID=GT,Number=1,Type=String,Description="GT">',
    b'##FORMAT=<ID=DS,Number=1,Type=String,Description="DS">', b"##fileformat=VCFv4.4", b"##fileformat=VCFv3.3",
    b"##fileformat=", b"##", b"#", b"##x", b'##x=<a="b>', b"##contig=<ID=1,IDX=5>", b"##contig=<ID=2,IDX=-1>",
    b"#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\tFORMAT\tA\tB\tC", b"#CHROM\tPOS", b"",
)  # fmt: skip


def mutated(rng: Rng, content: bytes, mutators: Sequence[Mutator]) -> bytes:
    """Content after one mutation, or a few."""
    for _ in range(int(rng.geometric(0.75))):
        content = mutators[int(rng.integers(len(mutators)))](rng, content)
    return content


def one_of(rng: Rng, choices: Sequence[bytes]) -> bytes:
    """One of some texts."""
    return choices[int(rng.integers(len(choices)))]


# --- bytes ----------------------------------------------------------------------------------------------------------


def _at(rng: Rng, content: bytes, extra: int = 1) -> int:
    return int(rng.integers(len(content) + extra)) if content else 0


def flip_bit(rng: Rng, content: bytes) -> bytes:
    changed = bytearray(content)
    if changed:
        changed[_at(rng, content, 0)] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def set_bytes(rng: Rng, content: bytes) -> bytes:
    at = _at(rng, content)
    value = one_of(rng, [b"\0", b"\xff", b"\x7f", b"\x80", b"\1"]) * int(rng.integers(1, 5))
    return content[:at] + value + content[at + len(value) :]


def insert_random(rng: Rng, content: bytes) -> bytes:
    at = _at(rng, content)
    return content[:at] + rng.bytes(int(rng.integers(1, 20))) + content[at:]


def insert_odd(rng: Rng, content: bytes) -> bytes:
    at = _at(rng, content)
    return content[:at] + one_of(rng, ODDITIES) + content[at:]


def delete(rng: Rng, content: bytes) -> bytes:
    at = _at(rng, content)
    return content[:at] + content[at + int(rng.integers(1, 30)) :]


def truncate(rng: Rng, content: bytes) -> bytes:
    return content[: _at(rng, content)]


def behead(rng: Rng, content: bytes) -> bytes:
    return content[int(rng.integers(min(len(content), 40) + 1)) :]


def repeat(rng: Rng, content: bytes) -> bytes:
    start, stop = sorted((_at(rng, content), _at(rng, content)))
    return content[:stop] + content[start:stop] + content[stop:]


def splice(rng: Rng, content: bytes) -> bytes:
    """A stretch of the content written over another place."""
    start, at = _at(rng, content), _at(rng, content)
    piece = content[start : start + int(rng.integers(1, 60))]
    return content[:at] + piece + content[at + len(piece) :]


def append_self(rng: Rng, content: bytes) -> bytes:
    return content + content


BYTES: tuple[Mutator, ...] = (
    flip_bit, flip_bit, set_bytes, insert_random, insert_odd, delete, truncate, behead, repeat, splice, append_self,
)  # fmt: skip


# --- lines and fields -----------------------------------------------------------------------------------------------


def _lines(mutate: Callable[[Rng, list[bytes]], None]) -> Mutator:
    def on_lines(rng: Rng, content: bytes) -> bytes:
        lines = content.split(b"\n")
        mutate(rng, lines)
        return b"\n".join(lines)

    return on_lines


@_lines
def drop_line(rng: Rng, lines: list[bytes]) -> None:
    del lines[int(rng.integers(len(lines)))]


@_lines
def repeat_line(rng: Rng, lines: list[bytes]) -> None:
    lines.insert(int(rng.integers(len(lines) + 1)), lines[int(rng.integers(len(lines)))])


@_lines
def double_line(rng: Rng, lines: list[bytes]) -> None:
    at = int(rng.integers(len(lines)))
    lines.insert(at, lines[at])


@_lines
def swap_lines(rng: Rng, lines: list[bytes]) -> None:
    one, other = rng.integers(len(lines), size=2).tolist()
    lines[one], lines[other] = lines[other], lines[one]


@_lines
def insert_blank(rng: Rng, lines: list[bytes]) -> None:
    lines.insert(int(rng.integers(len(lines) + 1)), one_of(rng, [b"", b"", b"\r", b" ", b"\t", b"#", b"# comment"]))


@_lines
def cut_line(rng: Rng, lines: list[bytes]) -> None:
    at = int(rng.integers(len(lines)))
    lines[at] = lines[at][: _at(rng, lines[at])]


@_lines
def join_lines(rng: Rng, lines: list[bytes]) -> None:
    at = int(rng.integers(len(lines)))
    lines[at : at + 2] = [b"".join(lines[at : at + 2])]


def windows_ends(rng: Rng, content: bytes) -> bytes:
    return content.replace(b"\n", b"\r\n")


def old_mac_ends(rng: Rng, content: bytes) -> bytes:
    return content.replace(b"\n", b"\r")


def byte_order_mark(rng: Rng, content: bytes) -> bytes:
    return b"\xef\xbb\xbf" + content


def utf_16(rng: Rng, content: bytes) -> bytes:
    return content.decode("latin-1").encode(["utf-16", "utf-16-le", "utf-16-be"][int(rng.integers(3))])


def no_last_end(rng: Rng, content: bytes) -> bytes:
    return content.rstrip(b"\n")


def nothing(rng: Rng, content: bytes) -> bytes:
    return one_of(rng, [b"", b"\n", b"\0", b" ", b"\r\n"])


def in_fields(separator: bytes, replacements: Sequence[bytes] = NUMBERS) -> Mutator:
    """Mutator of one field of a line: dropped, repeated, swapped, or replaced."""

    def on_fields(rng: Rng, content: bytes) -> bytes:
        lines = content.split(b"\n")
        at = int(rng.integers(len(lines)))
        fields = lines[at].split(separator)
        one, other = rng.integers(len(fields), size=2).tolist()
        match int(rng.integers(6)):
            case 0:
                del fields[one]
            case 1:
                fields.insert(other, fields[one])
            case 2:
                fields[one], fields[other] = fields[other], fields[one]
            case 3:
                fields[one] += one_of(rng, [b" ", b"\r", b"x", b"\xe9", b"\0", b".", b"-"])
            case _:
                fields[one] = one_of(rng, replacements)
        lines[at] = separator.join(fields)
        return b"\n".join(lines)

    return on_fields


LINES: tuple[Mutator, ...] = (
    drop_line, repeat_line, double_line, swap_lines, insert_blank, cut_line, join_lines, windows_ends, old_mac_ends,
    byte_order_mark, utf_16, no_last_end, nothing,
)  # fmt: skip
TABLE: tuple[Mutator, ...] = (*LINES, *BYTES, *[in_fields(b"\t"), in_fields(b" ")] * 6)


# --- VCF text -------------------------------------------------------------------------------------------------------


def _record(column: int, choices: Sequence[bytes]) -> Mutator:
    """Mutator that replaces one column of a record."""

    def on_record(rng: Rng, content: bytes) -> bytes:
        lines = content.split(b"\n")
        records = [number for number, line in enumerate(lines) if line and not line.startswith(b"#")]
        if not records:
            return content
        at = records[int(rng.integers(len(records)))]
        fields = lines[at].split(b"\t")
        place = column if column < 9 else int(rng.integers(9, max(10, len(fields))))
        if place < len(fields):
            new = one_of(rng, choices)
            _, colon, rest = fields[place].partition(b":")
            # A genotype keeps the fields behind it, mostly.
            fields[place] = new + colon + rest if column == 9 and rng.random() < 0.8 else new
        lines[at] = b"\t".join(fields)
        return b"\n".join(lines)

    return on_record


@_lines
def header_line(rng: Rng, lines: list[bytes]) -> None:
    of_header = [number for number, line in enumerate(lines) if line.startswith(b"##")] or [0]
    at = of_header[int(rng.integers(len(of_header)))]
    line = one_of(rng, HEADER_LINES)
    if rng.random() < 0.5:
        lines[at] = line
    else:
        lines.insert(at, line)


@_lines
def no_header_lines(rng: Rng, lines: list[bytes]) -> None:
    """Without header lines of one kind, such as contigs."""
    kind = one_of(rng, [b"##contig", b"##FORMAT", b"##INFO", b"##FILTER", b"##fileformat", b"##", b"#"])
    lines[:] = [line for line in lines if not line.startswith(kind)]


@_lines
def sample_names(rng: Rng, lines: list[bytes]) -> None:
    for at, line in enumerate(lines):
        if line.startswith(b"#CHROM"):
            fields = line.split(b"\t")
            place = int(rng.integers(8, max(9, len(fields))))
            new = one_of(rng, [b"", b" ", b"S1", b"S2", b"\xe9", b"a b", b"FORMAT", b"x" * 3000, b"S1 "])
            fields[place : place + 1] = [] if rng.random() < 0.2 else [new]
            lines[at] = b"\t".join(fields)


VCF: tuple[Mutator, ...] = (
    *LINES,
    *BYTES,
    *[in_fields(b"\t")] * 4,
    *[_record(9, GENOTYPES)] * 12,
    *[_record(4, ALLELES)] * 8,
    *[_record(3, ALLELES)] * 3,
    *[_record(1, NUMBERS)] * 4,
    *[_record(7, INFOS)] * 4,
    *[_record(8, FORMATS)] * 4,
    *[_record(0, CONTIGS)] * 2,
    _record(2, (b"", b".", b"rs1;rs2", b"\xe9", b"a b", b"a\rb", b"\0", b"x" * 4000)),
    _record(5, NUMBERS),
    _record(6, (b"", b"q10", b"PASS;q10", b".", b"\xe9", b"0")),
    *[header_line] * 3,
    no_header_lines,
    no_header_lines,
    sample_names,
    sample_names,
)  # fmt: skip
DOSAGE_VALUES = (
    *NUMBERS, b"0.5", b"2", b"2.001", b"-0.1", b"1,1", b"0.2,0.2,0.2", b"-5,7,-1", b"nan,0,0", b"1,0", b"0,0,1",
    b".,.,.",
    b"0.3,.", b"-3,-0.01,-2",
)  # fmt: skip


def sample_value(rng: Rng, content: bytes) -> bytes:
    """One of the values, separated by colons, in a sample's column replaced."""
    lines = content.split(b"\n")
    records = [number for number, line in enumerate(lines) if line and not line.startswith(b"#")]
    if not records:
        return content
    at = records[int(rng.integers(len(records)))]
    fields = lines[at].split(b"\t")
    if len(fields) > 9:
        place = int(rng.integers(9, len(fields)))
        values = fields[place].split(b":")
        values[int(rng.integers(len(values)))] = one_of(rng, DOSAGE_VALUES)
        fields[place] = b":".join(values)
    lines[at] = b"\t".join(fields)
    return b"\n".join(lines)


DOSAGES: tuple[Mutator, ...] = (*VCF, *[sample_value] * 20)


# --- containers -----------------------------------------------------------------------------------------------------

BGZF_EOF = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")


def bgzf_block(data: bytes, extra: bytes = b"") -> bytes:
    """A BGZF block of at most 64 KiB of data."""
    deflate = zlib.compressobj(6, zlib.DEFLATED, -15)
    body = deflate.compress(data) + deflate.flush()
    size = 12 + 6 + len(extra) + len(body) + 8
    head = b"\x1f\x8b\x08\x04\0\0\0\0\0\xff" + struct.pack("<H", 6 + len(extra))
    return (
        head + b"BC\2\0" + struct.pack("<H", size - 1) + extra + body + struct.pack("<II", zlib.crc32(data), len(data))
    )


def bgzf(data: bytes, block: int = 0xFF00) -> bytes:
    """Bgzipped data."""
    return b"".join(bgzf_block(data[at : at + block]) for at in range(0, len(data), block)) + BGZF_EOF


def blocks_of(content: bytes) -> list[bytes]:
    """BGZF blocks as far as their lengths go; the rest is one more."""
    blocks, at = [], 0
    while content[at : at + 4] == b"\x1f\x8b\x08\x04" and len(content) >= at + 18:
        size = struct.unpack_from("<H", content, at + 16)[0] + 1
        blocks.append(content[at : at + size])
        at += size
    return [*blocks, content[at:]] if at < len(content) else blocks


def _blocks(mutate: Callable[[Rng, list[bytes]], None]) -> Mutator:
    def on_blocks(rng: Rng, content: bytes) -> bytes:
        blocks = blocks_of(content)
        if blocks:
            mutate(rng, blocks)
        return b"".join(blocks)

    return on_blocks


@_blocks
def drop_block(rng: Rng, blocks: list[bytes]) -> None:
    del blocks[int(rng.integers(len(blocks)))]


@_blocks
def repeat_block(rng: Rng, blocks: list[bytes]) -> None:
    blocks.insert(int(rng.integers(len(blocks) + 1)), blocks[int(rng.integers(len(blocks)))])


@_blocks
def swap_blocks(rng: Rng, blocks: list[bytes]) -> None:
    one, other = rng.integers(len(blocks), size=2).tolist()
    blocks[one], blocks[other] = blocks[other], blocks[one]


@_blocks
def no_end(rng: Rng, blocks: list[bytes]) -> None:
    if blocks[-1] == BGZF_EOF:
        del blocks[-1]


@_blocks
def empty_block(rng: Rng, blocks: list[bytes]) -> None:
    blocks.insert(int(rng.integers(len(blocks) + 1)), BGZF_EOF)


@_blocks
def wrong_tail(rng: Rng, blocks: list[bytes]) -> None:
    """A wrong checksum, or a wrong or huge claim of size, in a block's tail."""
    at = int(rng.integers(len(blocks)))
    place = -8 if rng.random() < 0.5 else -4
    value = one_of(rng, [b"\0\0\0\0", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\1\0", rng.bytes(4)])
    block = bytearray(blocks[at])
    block[len(block) + place : len(block) + place + 4] = value
    blocks[at] = bytes(block)


@_blocks
def wrong_head(rng: Rng, blocks: list[bytes]) -> None:
    """Another byte in the 18 bytes of a block's head: magic, flags, XLEN, BC, BSIZE."""
    at = int(rng.integers(len(blocks)))
    block = bytearray(blocks[at])
    block[int(rng.integers(min(18, len(block))))] = int(rng.integers(256))
    blocks[at] = bytes(block)


@_blocks
def gzip_member(rng: Rng, blocks: list[bytes]) -> None:
    """A plain gzip member, garbage or zeros behind a block."""
    deflate = zlib.compressobj(6, zlib.DEFLATED, 31)
    member = deflate.compress(b"1\t900\t.\tA\tC\t.\t.\t.\tGT\t0|1\t0|1\t0|1\t0|1\n") + deflate.flush()
    blocks.insert(int(rng.integers(len(blocks) + 1)), one_of(rng, [member, b"garbage", bytes(64), b"\x1f\x8b"]))


BGZF: tuple[Mutator, ...] = (
    *BYTES, *[wrong_tail, wrong_head] * 3, drop_block, repeat_block, swap_blocks, no_end, empty_block, gzip_member,
)  # fmt: skip


# --- BCF ------------------------------------------------------------------------------------------------------------


def _bcf(mutate: Callable[[Rng, list[bytearray]], None]) -> Mutator:
    """Mutator of a raw BCF's pieces: magic, header text, and each record."""

    def on_pieces(rng: Rng, content: bytes) -> bytes:
        if len(content) < 9:
            return content
        length = struct.unpack_from("<I", content, 5)[0]
        pieces = [bytearray(content[:9]), bytearray(content[9 : 9 + length])]
        at = 9 + length
        while at + 8 <= len(content):
            shared, each = struct.unpack_from("<II", content, at)
            pieces.append(bytearray(content[at : at + 8 + shared + each]))
            at += 8 + shared + each
        mutate(rng, pieces)
        return b"".join(pieces)

    return on_pieces


def _some_record(rng: Rng, pieces: list[bytearray]) -> bytearray:
    return pieces[int(rng.integers(2, len(pieces)))] if len(pieces) > 2 else bytearray(40)


@_bcf
def bcf_number(rng: Rng, pieces: list[bytearray]) -> None:
    """A fixed field of a record: lengths, contig, POS, rlen, QUAL, n_info, n_allele, n_sample, n_fmt."""
    record = _some_record(rng, pieces)
    at = int(rng.integers(8)) * 4
    value = int(rng.choice([0, 1, 2, 255, 65535, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**32 - 2]))
    if len(record) >= at + 4:
        struct.pack_into("<I", record, at, value)


@_bcf
def bcf_typed(rng: Rng, pieces: list[bytearray]) -> None:
    """A byte of a record's typed values: their types, lengths and contents."""
    record = _some_record(rng, pieces)
    if len(record) > 33:
        record[int(rng.integers(32, len(record)))] = int(
            rng.choice([0, 1, 7, 0x11, 0x12, 0x13, 0x15, 0x17, 0xF1, 0xF7, 0x80, 0xFF])
        )


@_bcf
def bcf_records(rng: Rng, pieces: list[bytearray]) -> None:
    """A record dropped, repeated or moved."""
    if len(pieces) > 3:
        one, other = rng.integers(2, len(pieces), size=2).tolist()
        match int(rng.integers(3)):
            case 0:
                del pieces[one]
            case 1:
                pieces.insert(other, pieces[one])
            case 2:
                pieces[one], pieces[other] = pieces[other], pieces[one]


@_bcf
def bcf_header(rng: Rng, pieces: list[bytearray]) -> None:
    """The header text mutated as VCF is, with its length corrected mostly."""
    text = mutated(rng, bytes(pieces[1]).rstrip(b"\0"), (*LINES, *BYTES, header_line, no_header_lines, sample_names))
    pieces[1] = bytearray(text + b"\0")
    length = len(pieces[1]) if rng.random() < 0.8 else int(rng.choice([0, 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1]))
    struct.pack_into("<I", pieces[0], 5, length)


@_bcf
def bcf_magic(rng: Rng, pieces: list[bytearray]) -> None:
    pieces[0][int(rng.integers(9))] = int(rng.integers(256))


BCF: tuple[Mutator, ...] = (
    *[bcf_number] * 6, *[bcf_typed] * 8, *[bcf_records] * 3, *[bcf_header] * 4, bcf_magic, flip_bit, delete, truncate,
    insert_random, splice,
)  # fmt: skip


# --- JSON -----------------------------------------------------------------------------------------------------------

VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 7, 64, 100_000, 2**31, 2**63, 2**64, -(2**63), 10**400, 0.5, -0.5, 1e308,
    float("inf"), float("nan"), "", "x",
    "nan", "\ud800", "\0", "../x", [], [0], [1, 2], ["a"], [[]], {}, {"": 0}, {"a": {"b": {}}},
)  # fmt: skip


def json_mutated(rng: Rng, tree: Any) -> Any:
    """A JSON tree with a node replaced, removed, renamed or moved."""
    places: list[tuple[Any, Any]] = []

    def visit(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            visit(node[key])

    tree = json.loads(json.dumps(tree))
    visit(tree)
    if not places or rng.random() < 0.03:
        return VALUES[int(rng.integers(len(VALUES)))]
    parent, key = places[int(rng.integers(len(places)))]
    value = VALUES[int(rng.integers(len(VALUES)))]
    match int(rng.integers(6)):
        case 0:
            del parent[key]
        case 1 if isinstance(parent, dict):
            parent[[str(key) + "x", str(key).upper(), "", "extends", "\ud800"][int(rng.integers(5))]] = parent.pop(key)
        case 2:
            other, name = places[int(rng.integers(len(places)))]
            if other is not parent:
                parent[key] = json.loads(json.dumps(other[name])) if name in other or isinstance(other, list) else value
        case _:
            parent[key] = value
    return tree


def json_text(rng: Rng, content: bytes) -> bytes:
    """Mutator of a node of JSON text."""
    try:
        tree = json.loads(content)
    except ValueError:
        return flip_bit(rng, content)
    return json.dumps(json_mutated(rng, tree), indent=1).encode()


JSON: tuple[Mutator, ...] = (*[json_text] * 20, *LINES, *BYTES)


OVERRIDES: tuple[Mutator, ...] = (*BYTES, *LINES, *[in_fields(b"="), in_fields(b"."), in_fields(b",")] * 6)


def safetensors(rng: Rng, content: bytes) -> bytes:
    """Mutator of a safetensors file's header, its length corrected, or of the JSON text in its metadata."""
    if len(content) < 8:
        return content
    length = struct.unpack_from("<Q", content)[0]
    head, data = content[8 : 8 + length], content[8 + length :]
    if rng.random() < 0.1:
        return struct.pack("<Q", int(rng.choice([0, 1, 2**31, 2**63, 2**63 + 7], replace=True))) + head + data
    try:
        tree = json.loads(head)
        if rng.random() < 0.6:
            name = next(iter(tree["__metadata__"]))
            inner = mutated(rng, tree["__metadata__"][name].encode(), [json_text] * 9 + [flip_bit])
            tree["__metadata__"][name] = inner.decode("utf-8", "replace")
        else:
            tree = json_mutated(rng, tree)
    except (ValueError, LookupError, TypeError, AttributeError, StopIteration):
        return flip_bit(rng, content)
    head = json.dumps(tree).encode()
    return struct.pack("<Q", len(head)) + head + data


SAFETENSORS: tuple[Mutator, ...] = (*[safetensors] * 20, *BYTES)
