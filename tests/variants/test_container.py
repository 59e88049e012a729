"""What may hold a variant file, and what is wrong with one: found, named, or taken with a warning."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import logging
import lzma
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from pathlib import Path

import pysam
import pysam.bcftools
import pytest
from hypothesis import given
from hypothesis import strategies as st

import embrag_ds.variants.container.text as container_module
from embrag_ds.errors import UserError
from embrag_ds.variants.container.text import VariantText, regular_file
from embrag_ds.variants.header import as_bytes
from embrag_ds.variants.records import VariantReader, site_table
from embrag_ds.variants.sites import SiteTable
from tests.containers import BGZF_EOF_BYTES, CONTAINERS, DEFINITIONS, as_bcf, bgzipped, contained, vcf_text

RECORDS = [f"1 {pos} r{pos} A T . . . GT 0|1 1|{pos % 2}" for pos in (10, 20, 30, 40)]
TEXT = vcf_text(*RECORDS)
POSITIONS = [10, 20, 30, 40]


def positions(path: Path) -> list[int]:
    """Positions of all records, with every genotype decoded."""
    with VariantReader(path) as vcf:
        return [site.pos for site in vcf.sites() if len(vcf.calls(site).alleles)]


def message(path: Path) -> str:
    """The error of reading ``path``, which must be one line that names the file."""
    with pytest.raises(UserError) as caught:
        positions(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ") and "\n" not in text and ";" in text
    return text


def written(folder: Path, content: bytes, name: str = "in.vcf") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def many_records() -> bytes:
    """A VCF of several bgzip blocks."""
    return vcf_text(*(f"1 {pos} . A T . . . GT 0|{pos % 2} 1|1" for pos in range(1, 20_001)))


def block_ends(content: bytes) -> set[int]:
    """Places at which the blocks of a bgzipped file end."""
    ends, place = set(), 0
    while place < len(content):
        place += int.from_bytes(content[place + 16 : place + 18], "little") + 1
        ends.add(place)
    return ends


# --- containers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("container", CONTAINERS)
def test_every_container_without_an_index_and_whatever_its_name(tmp_path: Path, container: str) -> None:
    with contained(TEXT, container, tmp_path) as path, VariantReader(path) as vcf:
        assert [site.id for site in vcf.sites()] == ["r10", "r20", "r30", "r40"]
        assert [site.pos for site in vcf.sites()] == POSITIONS
        assert (vcf.samples, vcf.contigs, vcf.contig_lengths) == (("A", "B"), ("1", "2"), (1000, 0))
        assert vcf.info_keys == {"END", "SVLEN", "NOTE"}
        assert vcf.path == path


def test_bcf_of_other_compression(tmp_path: Path) -> None:
    raw = gzip.decompress(as_bcf(TEXT))
    assert positions(written(tmp_path, raw)) == POSITIONS
    text = message(written(tmp_path, gzip.compress(raw)))
    assert "BCF in gzip" in text and "gzip -dc FILE | bcftools view -Ob" in text


def test_bgzip_and_gzip_of_several_parts(tmp_path: Path) -> None:
    header, first = vcf_text(), b"".join(TEXT.splitlines(keepends=True)[-4:])
    for compress in (gzip.compress, bgzipped):
        path = written(tmp_path, compress(header) + compress(first[:50]) + compress(b"") + compress(first[50:]))
        assert positions(path) == POSITIONS


@pytest.mark.parametrize("container", CONTAINERS)
def test_standard_input_is_named_by_a_dash(tmp_path: Path, container: str) -> None:
    code = (
        "import sys; from pathlib import Path; from embrag_ds.variants.records import VariantReader\n"
        "with VariantReader(Path(sys.argv[1])) as vcf: print([site.pos for site in vcf.sites()], vcf.path)"
    )
    content = {"plain": TEXT, "gzip": gzip.compress(TEXT), "bgzip": bgzipped(TEXT), "bcf": as_bcf(TEXT)}.get(container)
    for name in ("-", "/dev/stdin"):
        command = [sys.executable, "-c", code, name]
        if content is None:  # a file as standard input, where the others come through a pipe
            with written(tmp_path, TEXT).open("rb") as file:
                found = subprocess.run(command, stdin=file, capture_output=True, text=True, check=True).stdout
        else:
            found = subprocess.run(command, input=content, capture_output=True, check=True).stdout.decode()
        assert found == f"{POSITIONS} {name}\n"


def test_the_copy_of_a_pipe_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    with contained(TEXT, "pipe", tmp_path) as path, VariantReader(path) as vcf:
        assert len(list((tmp_path / "temporary").iterdir())) == 1
        assert vcf.samples == ("A", "B")
    with contained(b"nonsense\n", "pipe", tmp_path) as path:
        assert "is not a VCF or BCF" in message(path)
    assert list((tmp_path / "temporary").iterdir()) == []


# --- what is not taken, by name ---------------------------------------------------------------------


def zipped(content: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("in.vcf", content)
    return out.getvalue()


@pytest.mark.parametrize(
    ("content", "name", "remedy"),
    [
        (b"\x28\xb5\x2f\xfd" + TEXT, "zstd", "zstd -d"),
        (lzma.compress(TEXT), "xz", "xz -d"),
        (bz2.compress(TEXT), "bzip2", "bzip2 -d"),
        (zipped(TEXT), "zip", "unzip"),
        (TEXT.decode().encode("utf-16"), "UTF-16 text", "iconv -f UTF-16"),
        (b"\xfe\xff" + TEXT.decode().encode("utf-16-be"), "UTF-16 text", "iconv -f UTF-16"),
        (b"CRAM\3", "CRAM, which holds reads", "bcftools call"),
        (bgzipped(b"BAM\1\0\0"), "BAM, which holds reads", "bcftools call"),
        (b"\x6c\x1b\x01\0\0", "PLINK's .bed", "plink2 --bfile PREFIX --export vcf bgz"),
        (b"\x6c\x1b\x10\0\0", "PLINK's .pgen", "plink2 --pfile PREFIX --export vcf bgz"),
        (b"20\trs1\t0\t1000\tA\tG\n20\trs2\t0.5\t2000\tT\tC\n", "PLINK's .bim", "plink2 --bfile PREFIX"),
        (b"F1 S1 0 0 1 -9\nF2 S2 0 0 2 -9\n", "PLINK's .fam", "plink2 --bfile PREFIX"),
        (b"\x1a\0\0\0\x14\0\0\0\1\0\0\0\2\0\0\0bgen\0", "BGEN", "plink2 --bgen FILE"),
        (bgzipped(b"TBI\1" + bytes(40)), "an index of a variant file", "give the file that it is of"),
        (bgzipped(b"CSI\1" + bytes(40)), "an index of a variant file", "give the file that it is of"),
        (b"##fileformat=M3VCF\n##version=2.0\n", "minimac3's M3VCF", "give the VCF"),
        (b"\x7a\x88\x74\xf4\0\0", "Beagle's bref3", "unbref3"),
        (b"20 . 1.0 1000\n20 . 1.5 2000\n", "a genetic map", "give it to --map"),
        (gzip.compress(b"pos chr cM\n1000 20 1.0\n", mtime=0), "a genetic map", "give it to --map"),
        (b"position COMBINED_rate(cM/Mb) Genetic_Map(cM)\n1 2 3\n", "a genetic map", "give it to --map"),
    ],
)
def test_other_formats_are_refused_by_name(tmp_path: Path, content: bytes, name: str, remedy: str) -> None:
    said = message(written(tmp_path, content))
    assert f"it is {name}, not a VCF or BCF; " in said and remedy in said


def test_an_index_names_its_file(tmp_path: Path) -> None:
    for suffix in (".tbi", ".csi"):
        path = tmp_path / f"panel.vcf.gz{suffix}"
        path.write_bytes(bgzipped(suffix[1:].upper().encode() + bytes([1]) + bytes(40)))
        assert message(path).endswith("; give the file that it is of, panel.vcf.gz")


@pytest.mark.parametrize(
    "content",
    [
        b"sample group role score x y\n",
        b"1 2\n3 4\n",
        b"a b c d\n",
        b"hello world\n" * 10,
        b"\0",
        b"sample\tpop\n",
        bgzipped(b"hello\n"),
        bgzipped(b""),
        b"BCF\4",
        gzip.compress(b"", mtime=0),
    ],
)
def test_not_a_vcf(tmp_path: Path, content: bytes) -> None:
    assert "is not a VCF or BCF" in message(written(tmp_path, content))


def test_empty_file(tmp_path: Path) -> None:
    assert "it is empty" in message(written(tmp_path, b""))


def test_folder(tmp_path: Path) -> None:
    assert "it is a folder" in message(tmp_path)


def test_missing_file(tmp_path: Path) -> None:
    assert "there is no such file" in message(tmp_path / "absent.vcf.gz")


def test_file_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, TEXT)

    def refuse(self: Path, *_: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    assert "Permission denied" in message(path)


def test_a_fault_of_another_file_is_not_blamed_on_the_input(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), regular_file(written(tmp_path, TEXT)):
        raise FileNotFoundError(2, "No such file", "another")


# --- ends -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("container", ["bgzip", "bcf"])
def test_no_end_of_file_block_is_a_warning(
    tmp_path: Path, container: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with contained(TEXT, container, tmp_path) as path:
        whole = path.read_bytes()
        assert positions(path) == POSITIONS and caplog.messages == []
        path.write_bytes(whole[:-BGZF_EOF_BYTES])
        assert positions(path) == POSITIONS
        assert caplog.messages == [f"{path}: it has no end-of-file block; if it was cut short, copy or write it again"]
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("container", ["gzip", "bgzip", "bcf"])
def test_truncated_at_every_byte_of_the_last_blocks(
    tmp_path: Path, container: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with contained(TEXT, container, tmp_path) as path:
        whole = path.read_bytes()
        taken = set()
        for length in range(1, len(whole)):
            path.write_bytes(whole[:length])
            caplog.clear()
            try:
                positions(path)
                taken.add(length)
                assert "it has no end-of-file block" in caplog.text
            except UserError as fault:
                assert str(fault).startswith(f"{path}: ") and "\n" not in str(fault)
    # Where a block ends, there is nothing but the warning to tell a cut file from one without its last block.
    assert taken == (set() if container == "gzip" else block_ends(whole) - {len(whole)})
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("container", CONTAINERS)
def test_truncated_in_the_middle(tmp_path: Path, container: str, capfd: pytest.CaptureFixture[str]) -> None:
    with contained(many_records(), container, tmp_path) as whole:
        content = whole.read_bytes()
    path = written(tmp_path, content[: len(content) // 2])
    if container in ("plain", "pipe"):
        assert "genotype columns for 2 samples" in message(path) or "is not a VCF record" in message(path)
    else:
        assert "after 1:" in message(path) and "the next record is damaged" in message(path)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("container", ["gzip", "bgzip", "bcf"])
def test_damaged_in_the_middle(tmp_path: Path, container: str, capfd: pytest.CaptureFixture[str]) -> None:
    with contained(many_records(), container, tmp_path) as whole:
        content = bytearray(whole.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 500] = bytes(500)
    text = message(written(tmp_path, bytes(content)))
    # gzip's checksum comes after the whole content, of which a damaged part may be read as something else.
    assert container == "gzip" or ("the next record is damaged" in text and "after 1:" in text)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("container", ["plain", "gzip"])
def test_a_last_line_without_end_is_a_warning(tmp_path: Path, container: str, caplog: pytest.LogCaptureFixture) -> None:
    with contained(TEXT[:-1], container, tmp_path) as path, VariantReader(path) as vcf:
        assert [site.pos for site in vcf.sites()] == POSITIONS == [site.pos for site in vcf.sites()]
    assert caplog.messages == [f"{path}: its last line does not end; if the file was cut short, copy it again"]


# --- lines ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("container", ["plain", "gzip", "bgzip", "pipe"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_empty_lines_anywhere(tmp_path: Path, container: str, end: bytes, caplog: pytest.LogCaptureFixture) -> None:
    lines = TEXT.split(b"\n")
    header = len(DEFINITIONS) + 1
    for place in range(len(lines)):
        for number in (1, 2):
            caplog.clear()
            text = end.join(lines[:place] + [b""] * number + lines[place:])
            with contained(text, container, tmp_path) as path, VariantReader(path) as vcf:
                assert [site.pos for site in vcf.sites()] == POSITIONS
                assert [site.pos for site in vcf.sites()] == POSITIONS
                assert vcf.records == len(RECORDS)
            expected = [f"{path}: {number} empty lines between the records are ignored"] if place >= header else []
            assert caplog.messages == expected


@pytest.mark.parametrize("container", ["plain", "gzip", "bgzip", "pipe"])
@pytest.mark.parametrize("definitions", [DEFINITIONS, DEFINITIONS[1:], ()])
def test_byte_order_mark_and_no_file_format(
    tmp_path: Path, container: str, definitions: tuple[bytes, ...], caplog: pytest.LogCaptureFixture
) -> None:
    text = b"\xef\xbb\xbf" + vcf_text(*RECORDS, definitions=definitions)
    with contained(text, container, tmp_path) as path:
        assert positions(path) == POSITIONS
    assert caplog.messages == []


@pytest.mark.parametrize(
    "text", [b"##fileformat=VCFv4.3\n", b"##fileformat=VCFv4.3\n1\t10\n", TEXT.replace(b"\n", b"\r")]
)
def test_header_without_column_names(tmp_path: Path, text: bytes) -> None:
    assert "#CHROM" in message(written(tmp_path, text))


@given(st.lists(st.binary(max_size=9).filter(lambda line: b"\n" not in line), max_size=9), st.integers(1, 7))
def test_lines_do_not_depend_on_blocks(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], size: int) -> None:
    path = written(tmp_path_factory.mktemp("lines"), b"\n".join([TEXT[:-1], *lines, b""]))
    text = VariantText(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(container_module, "_BLOCK_BYTES", size)
        assert list(text._text_lines()) == [*TEXT[:-1].split(b"\n"), *lines]
        patch.setattr(container_module, "_LONGEST_LINE", 8)
        with pytest.raises(ValueError, match="line"):
            list(text._text_lines())


# --- bytes that are not UTF-8 -----------------------------------------------------------------------


LATIN = [
    b"1\t10\tcaf\xe9\tA\tT\t.\t.\tNOTE=\xe9\xff\tGT\t0|1\t1|1",
    b"1\t20\tr20\tA\tT\t.\t.\t.\tGT\t0|1\t1|1",
    b"1\t30\t\xe9\xc3\xa9\tA\t<\xe9>\t.\t.\tNOTE=x\tGT\t0|1\t1|1",
]


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("first", range(3))
def test_bytes_that_are_not_utf8_stay(tmp_path: Path, container: str, first: int) -> None:
    records = LATIN[first:]
    with (
        contained(vcf_text(*records, samples=("A", "m\udce9")), container, tmp_path) as path,
        VariantReader(path) as vcf,
    ):
        sites = list(vcf.sites())
        assert [site.pos for site in vcf.sites()] == [10, 20, 30][first:]
        table = site_table(vcf, sites)
        assert as_bytes(vcf.samples[1]) == b"m\xe9"
    assert [site.info for site in sites] == [line.split(b"\t")[7] for line in records]
    table.save(tmp_path / "sites.npz")
    loaded = SiteTable.load(tmp_path / "sites.npz")
    assert [as_bytes(name) for name in loaded.id] == [line.split(b"\t")[2] for line in records]
    assert [as_bytes(alt) for alt in loaded.alt] == [line.split(b"\t")[4] for line in records]


def test_bytes_that_are_not_utf8_in_a_damaged_bcf(tmp_path: Path) -> None:
    raw = gzip.decompress(as_bcf(vcf_text(*LATIN)))
    assert "the next record is damaged" in message(written(tmp_path, raw[:-5]))


@pytest.mark.skipif(shutil.which("bcftools") is None, reason="no bcftools")
def test_the_remedy_for_a_bcf_in_gzip_works(tmp_path: Path) -> None:
    path = written(tmp_path, gzip.compress(gzip.decompress(as_bcf(TEXT))))
    converted = subprocess.run(f"gzip -dc {path} | bcftools view -Ob", shell=True, capture_output=True, check=True)
    assert positions(written(tmp_path, converted.stdout)) == POSITIONS


def test_messages_of_htslib_do_not_repeat_ours() -> None:
    assert pysam.get_verbosity() == 0
    assert logging.getLogger("embrag_ds.variants.container.text") is container_module.logger


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), FileNotFoundError(2, "No usable folder")])
def test_a_pipe_that_cannot_be_kept_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: OSError
) -> None:
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def fail(*_: object, **__: object) -> None:
        raise fault

    if fault.errno == 28:
        monkeypatch.setattr(shutil, "copyfileobj", fail)
    else:
        monkeypatch.setattr(tempfile, "NamedTemporaryFile", fail)

    def deliver() -> None:
        with contextlib.suppress(BrokenPipeError):  # if the reader gives up first
            (tmp_path / "pipe").write_bytes(b"x")

    writer = threading.Thread(target=deliver, daemon=True)
    writer.start()
    refused = pytest.raises(UserError, match=r"pipe: what the pipe delivers cannot be kept \(No .*set TMPDIR")
    with refused, regular_file(tmp_path / "pipe"):
        pytest.fail("there is nothing to read")
    writer.join(timeout=30)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


# In a process of its own, whose files may be no longer than 4 KB.
FULL = """
import resource, sys
from pathlib import Path
from embrag_ds.variants.container.bgzf import bgzf_written
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    with bgzf_written(Path(sys.argv[1]), 0) as out:
        out.write(b"x" * int(sys.argv[2]))
except OSError as fault:
    print("refused")
"""


@pytest.mark.parametrize("size", [5_000, 1_000_000])
def test_a_full_disk_is_said_once(root: Path, tmp_path: Path, size: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / "out.gz"), str(size)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(root)},
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "refused\n", "")
