"""Damaged and odd variant files that the fuzzer (tests/fuzz) found: each was a traceback or a wrong result once."""

from __future__ import annotations

import gzip
import struct
import time
import tracemalloc
from pathlib import Path

import pysam
import pytest

from embrag_ds.errors import UserError
from embrag_ds.variants.container import text as container
from embrag_ds.variants.container.text import VariantText
from embrag_ds.variants.records import VariantReader

COLUMNS = "#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\tFORMAT\tA\tB\n"


def written(folder: Path, *records: str, name: str = "in.vcf") -> Path:
    """A VCF with records whose columns are separated by blanks."""
    path = folder / name
    path.write_text("##fileformat=VCFv4.3\n" + COLUMNS + "".join(f"{each}\n".replace(" ", "\t") for each in records))
    return path


def sites(path: Path, **rules) -> list[tuple]:
    with VariantReader(path, **rules) as vcf:
        return [(site.pos, site.id, site.ref, site.alt, vcf.calls(site).alleles.tolist()) for site in vcf.sites()]


def message(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        sites(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ") and "\n" not in text and ";" in text
    return text


@pytest.mark.parametrize("keys", ["GT", "GT:DP", "DP:GT"])
def test_nothing_is_alt_in_a_record_without_alt(tmp_path, keys):
    calls = "5:0|0 5:0/0" if keys == "DP:GT" else "0|0 0/0"
    path = written(tmp_path, f"1 10 . A . . . . {keys} {calls}")
    assert sites(path, without_alt=True) == [(10, ".", "A", ".", [0, 0, 0, 0])]


def test_an_empty_id_is_a_missing_one(tmp_path):
    assert sites(written(tmp_path, "1 10  A C . . . GT 0|1 0|0"))[0][1] == "."


def test_a_position_of_thousands_of_digits(tmp_path):
    assert "no position exceeds" in message(written(tmp_path, f"1 {'9' * 5000} . A C . . . GT 0|1 0|0"))


def raw_bcf(folder: Path) -> bytes:
    """A BCF without its BGZF."""
    path = folder / "made.bcf"
    text = written(folder, "1 10 . A C . . . GT 0|1 0|0", "1 20 . A C . . . GT 1|1 0|1", name="made.vcf")
    content = text.read_text().replace(
        "#CHROM", '##contig=<ID=1>\n##FORMAT=<ID=GT,Number=1,Type=String,Description="">\n#CHROM'
    )
    text.write_text(content)
    pysam.bcftools.view("--no-version", "-Ob", "-o", str(path), str(text), catch_stdout=False)
    return gzip.decompress(path.read_bytes())


def test_a_plain_bcf(tmp_path):
    path = tmp_path / "in.bcf"
    path.write_bytes(raw_bcf(tmp_path))
    assert [each[0] for each in sites(path)] == [10, 20]


def bgzipped(path: Path, content: bytes) -> Path:
    with pysam.BGZFile(str(path), "wb") as out:
        out.write(content)
    return path


def test_a_bcf_header_that_claims_gigabytes(tmp_path):
    content = raw_bcf(tmp_path)
    path = bgzipped(tmp_path / "in.bcf", content[:5] + struct.pack("<I", 2**32 - 1) + content[9:])
    tracemalloc.start()
    assert "its header cannot be read (it ends early)" in message(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 24


def test_a_bcf_header_ends_as_htslib_ends_it(tmp_path):
    content = raw_bcf(tmp_path)
    (length,) = struct.unpack_from("<I", content, 5)
    header = content[9 : 9 + length].rstrip(b"\0")
    for more in (b"\0##x\n#CHROM\tPOS\n", COLUMNS.replace("A\tB", "C").encode()):
        longer = header + more + b"\0"
        path = bgzipped(
            tmp_path / "in.bcf", content[:5] + struct.pack("<I", len(longer)) + longer + content[9 + length :]
        )
        assert VariantText(path).header[-1].endswith(b"\tA\tB")


def test_a_bgzf_subfield_of_another_length_is_plain_gzip(tmp_path):
    path = tmp_path / "in.bcf"
    content = bytearray(bgzipped(path, raw_bcf(tmp_path)).read_bytes())
    content[14] = 0x35
    path.write_bytes(content)
    assert "a BCF in gzip, which needs bgzip" in message(path)


@pytest.mark.parametrize("size", [1, 7, 97])
def test_lines_across_blocks(tmp_path, monkeypatch, size):
    records = [f"1 {pos} . A C . . . GT 0|1 {'1|1' if pos % 2 else '0|0'}" for pos in range(10, 30)]
    path = written(tmp_path, *records)
    whole = sites(path)
    monkeypatch.setattr(container, "_BLOCK_BYTES", size)
    assert sites(path) == whole and len(whole) == 20


def test_a_line_without_end_takes_time_in_proportion(tmp_path, monkeypatch):
    path = tmp_path / "in.vcf.gz"
    path.write_bytes(gzip.compress(b"##fileformat=VCFv4.3\n##" + bytes(1 << 25), 1))
    monkeypatch.setattr(container, "_BLOCK_BYTES", 1 << 12)
    monkeypatch.setattr(container, "_LONGEST_LINE", 1 << 24)
    begin = time.process_time()
    assert "its header cannot be read (a line of over 16 MiB)" in message(path)
    # To join the line anew at each of the 4,096 blocks would copy 32 GB.
    assert time.process_time() - begin < 3


def test_a_record_of_millions_of_columns_is_not_split(tmp_path):
    path = written(tmp_path, "1 10 . A C . . . GT 0|1" + " " * (1 << 21))
    tracemalloc.start()
    assert "2097153 genotype columns for 2 samples" in message(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 21


@pytest.mark.parametrize(
    "record",
    [
        f"1 10 . {'A' * 5000}1 C . . . GT 0|1 0|0",
        f"1 10 . A {'C' * 5000}1 . . . GT 0|1 0|0",
        f"1 10 . A C . . . GT 0|1 {'0' * 5000}",
        f"1 10 . A <DEL> . . END={'1' * 5000} GT 0|1 0|0",
        f"1 10 . {'A' * 5000} {'A' * 5000} . . . GT 0|1 0|0",
    ],
    ids=["REF", "ALT", "genotype", "END", "both"],
)
def test_long_texts_are_cut_off_in_errors(tmp_path, record):
    assert len(message(written(tmp_path, record))) < 400
