"""Headers: samples, contigs and INFO keys, and what is wrong with them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from embrag_ds.errors import UserError
from embrag_ds.variants.header import Header, as_bytes, as_text
from embrag_ds.variants.records import VariantReader
from tests.containers import DEFINITIONS, as_bcf, vcf_text

COLUMNS = "#CHROM POS ID REF ALT QUAL FILTER INFO FORMAT A B"
RECORD = "1 10 . A T . . . GT 0|1 1|1"


def parsed(*lines: str) -> Header:
    return Header.parse(Path("in.vcf"), [line.replace(" ", "\t").encode() for line in lines])


def message(*lines: str) -> str:
    with pytest.raises(UserError) as caught:
        parsed(*lines)
    text = str(caught.value)
    assert text.startswith("in.vcf: ") and "\n" not in text and ";" in text
    return text


def test_contigs_lengths_and_keys() -> None:
    header = parsed(
        "##contig=<ID=1,length=1000,IDX=0>",
        "##contig=<length=20,assembly=b37,ID=HLA-A*01:01>",
        '##contig=<ID=3,taxID=5,note="a,ID=9">',
        "##contig=<ID=1,length=7>",
        "##contig=<ID=4,length=>",
        f"##contig=<ID=5,length={'9' * 5000}>",
        '##INFO=<ID=AF,Number=A,Description="not,ID=X">',
        "##INFO=<Number=1,ID=R2>",
        "##FORMAT=<ID=GT>",
        COLUMNS,
    )
    assert header.samples == ("A", "B")
    assert header.contigs == ("1", "HLA-A*01:01", "3", "4", "5")
    assert header.contig_lengths[:4] == (1000, 20, 0, 0)
    assert header.info_keys == {"AF", "R2"}


def test_a_header_of_column_names_only() -> None:
    assert parsed(COLUMNS) == Header(("A", "B"), (), (), frozenset())


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ("#CHROM POS ID REF ALT QUAL FILTER INFO", "no samples"),
        ("#CHROM POS ID REF ALT QUAL FILTER INFO FORMAT", "no samples"),
        ("#CHROM POS ID REF", "its column names are '#CHROM POS ID REF', not"),
        ("#CHROM POS ID ALT REF QUAL FILTER INFO FORMAT A", "its column names are"),
        ("#CHROMOSOME POS ID REF ALT QUAL FILTER INFO FORMAT A", "its column names are"),
        ("#CHROM POS ID REF ALT QUAL FILTER INFO A B", "its column names are"),
        (COLUMNS + " A", "sample A appears twice"),
        (COLUMNS + " ", "sample 3 has no name"),
        ("#CHROM POS ID REF ALT QUAL FILTER INFO FORMAT A  B", "sample 2 has no name"),
        ("#CHROM POS ID REF ALT QUAL FILTER INFO FORMAT A \u00a0 B", "sample 2 has no name"),
    ],
)
def test_other_columns(columns: str, problem: str) -> None:
    assert problem in message(*(each.decode() for each in DEFINITIONS), columns)


def test_blanks_between_the_column_names() -> None:
    with pytest.raises(UserError, match="with tabs between"):
        Header.parse(Path("in.vcf"), [COLUMNS.encode()])


def test_a_name_of_blanks_only(tmp_path: Path) -> None:
    path = tmp_path / "in.vcf"
    path.write_bytes(vcf_text(RECORD, samples=("A", " ")))
    with pytest.raises(UserError, match="sample 2 has no name"):
        VariantReader(path)


@pytest.mark.parametrize("content", [b"", b"caf\xe9", b"caf\xc3\xa9", bytes(range(256))])
def test_text_gives_its_bytes_back(content: bytes) -> None:
    assert as_bytes(as_text(content)) == content


def test_contigs_of_a_bcf_are_those_of_its_header(tmp_path: Path) -> None:
    path = tmp_path / "in.bcf"
    path.write_bytes(as_bcf(vcf_text(RECORD)))
    with VariantReader(path) as vcf:
        assert (vcf.contigs, vcf.contig_lengths) == (("1", "2"), (1000, 0))


@pytest.mark.skipif(shutil.which("bcftools") is None, reason="no bcftools")
@pytest.mark.parametrize("samples", [("A", "A"), ("A", ""), (" ", "B")])
def test_the_remedy_for_sample_names_works(tmp_path: Path, samples: tuple[str, str]) -> None:
    path = tmp_path / "in.vcf"
    path.write_bytes(vcf_text(RECORD, samples=samples))
    with pytest.raises(UserError, match="bcftools reheader -s"):
        VariantReader(path)
    (tmp_path / "names").write_text("C\nD\n")
    command = ["bcftools", "reheader", "-s", tmp_path / "names", "-o", tmp_path / "out.vcf", path]
    subprocess.run(command, check=True)
    with VariantReader(tmp_path / "out.vcf") as vcf:
        assert vcf.samples == ("C", "D")
