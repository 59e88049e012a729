"""Variant files in any container, and bcftools' reading of them, for tests."""

from __future__ import annotations

import gzip
import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pysam
import pysam.bcftools

CONTAINERS = ("plain", "gzip", "bgzip", "bcf", "pipe")
BGZF_EOF_BYTES = 28
DEFINITIONS = (
    b"##fileformat=VCFv4.3",
    b'##FILTER=<ID=PASS,Description="All filters passed">',
    b'##FILTER=<ID=low,Description="low">',
    b"##contig=<ID=1,length=1000>",
    b"##contig=<ID=2>",
    b'##INFO=<ID=END,Number=1,Type=Integer,Description="end">',
    b'##INFO=<ID=SVLEN,Number=A,Type=Integer,Description="length">',
    b'##INFO=<ID=NOTE,Number=1,Type=String,Description="note">',
    b'##FORMAT=<ID=GT,Number=1,Type=String,Description="genotype">',
    b'##FORMAT=<ID=DP,Number=1,Type=Integer,Description="depth">',
)


def vcf_text(
    *records: str | bytes,
    samples: Sequence[str] = ("A", "B"),
    definitions: Sequence[bytes] = DEFINITIONS,
    end: bytes = b"\n",
) -> bytes:
    """A VCF of records given with blanks for tabs (as bytes: as they are)."""
    columns = ["#CHROM", "POS", "ID", "REF", "ALT", "QUAL", "FILTER", "INFO", "FORMAT", *samples]
    lines = [*definitions, "\t".join(columns).encode(errors="surrogateescape")]
    lines += [each if isinstance(each, bytes) else each.replace(" ", "\t").encode() for each in records]
    return end.join([*lines, b""])


def bgzipped(text: bytes) -> bytes:
    """Text as bgzip compresses it."""
    with tempfile.NamedTemporaryFile(suffix=".gz") as file:
        with pysam.BGZFile(file.name, "wb") as out:
            out.write(text)
        return Path(file.name).read_bytes()


def as_bcf(text: bytes) -> bytes:
    """A VCF as BCF, by bcftools."""
    with tempfile.TemporaryDirectory() as folder:
        vcf, bcf = Path(folder) / "in.vcf", Path(folder) / "out.bcf"
        vcf.write_bytes(text)
        pysam.bcftools.view("--no-version", "-Ob", "-o", str(bcf), str(vcf), catch_stdout=False)
        return bcf.read_bytes()


@contextmanager
def contained(text: bytes, container: str, folder: Path) -> Iterator[Path]:
    """Yield the path of a VCF in one of :data:`CONTAINERS`; a pipe can be opened once."""
    path = folder / f"in.{container}"
    if container == "pipe":
        os.mkfifo(path)
        writer = threading.Thread(target=path.write_bytes, args=(text,))
        writer.start()
        yield path
        writer.join()
        path.unlink()
        return
    change = {"plain": bytes, "gzip": gzip.compress, "bgzip": bgzipped, "bcf": as_bcf}
    path.write_bytes(change[container](text))
    yield path


def split_by_bcftools(text: bytes) -> list[list[str]]:
    """Rows of ``bcftools norm -m -any``: CHROM, POS, ID, REF, ALT, END, SVLEN and the genotypes."""
    with tempfile.TemporaryDirectory() as folder:
        vcf, split = Path(folder) / "in.vcf", Path(folder) / "split.vcf"
        vcf.write_bytes(text)
        pysam.bcftools.norm("-m", "-any", "-Ov", "-o", str(split), str(vcf), catch_stdout=False)
        columns = "%CHROM\t%POS\t%ID\t%REF\t%ALT\t%INFO/END\t%INFO/SVLEN[\t%GT]\n"
        return [line.split("\t") for line in pysam.bcftools.query("-f", columns, str(split)).splitlines()]
