"""Edits of records, genotypes and headers, each tried on panel, target, truth and imputed file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from tests.cases.files import (
    CONTIG,
    FILES,
    PLACE,
    ROLES,
    Cases,
    Edit,
    assert_base,
    assert_refused,
    at,
    column,
    genotype,
    renamed,
)


@dataclass(frozen=True)
class Row:
    """An edit of a text, or else of the record at the role's place, and what is right on all roles.

    ``warnings`` are those of a result as without the edit. ``error`` has parts of the one line; None stands for no
    error.
    """

    name: str
    edit: Edit | None = None
    record: Callable[[str], str] | None = None
    warnings: tuple[str, ...] = ()
    error: tuple[str, ...] | None = None
    roles: tuple[str, ...] = ROLES
    options: tuple[str, ...] = ()

    def of(self, role: str) -> Edit:
        """The edit of a role's text."""
        if self.edit is not None:
            return self.edit
        assert self.record is not None
        return at(PLACE[role], self.record)


def _replaced(old: str, new: str) -> Edit:
    return lambda text: text.replace(old, new)


def _each_sample(edit: Callable[[str], str], form: str) -> Callable[[str], str]:
    def edited(line: str) -> str:
        fields = line.split("\t")
        return "\t".join([*fields[:8], form, *map(edit, fields[9:])])

    return edited


def _first_names(name: str) -> Edit:
    return lambda text: text.replace("\tP1\t", f"\t{name}\t").replace("\tT1\t", f"\t{name}\t")


_EMPTY = ("1 empty lines between the records are ignored",)
_TWO = ("panel", "target")
_HERE = object()
ROWS = [
    Row("an empty line", record=lambda line: f"\n{line}", warnings=_EMPTY),
    Row(
        "an empty line with CR",
        edit=lambda text: text.replace("7\t300", "\n7\t300").replace("\n", "\r\n"),
        warnings=_EMPTY,
    ),
    Row("empty lines at the end", edit=lambda text: text + "\n\n", warnings=("2 empty lines",)),
    Row("a line of one blank", record=lambda line: f" \n{line}", error=("record ' '",)),
    Row("CRLF", edit=_replaced("\n", "\r\n")),
    Row("a byte-order mark", edit=lambda text: f"\ufeff{text}"),
    Row("no end of the last line", edit=lambda text: text.rstrip("\n"), warnings=("its last line does not end",)),
    Row("no contig lines", edit=_replaced(f"{CONTIG}\n", "")),
    Row("no file format", edit=_replaced("##fileformat=VCFv4.2\n", "")),
    Row("no definitions at all", edit=lambda text: text[text.index("#CHROM") :]),
    Row("a contig without ID", edit=_replaced(CONTIG, "##contig=<length=5>")),
    Row("a contig's length is no number", edit=_replaced("length=90000", "length=long")),
    Row("a contig declared twice", edit=_replaced(CONTIG, f"{CONTIG}\n##contig=<ID=7,length=5>")),
    Row("an empty line in the header", edit=_replaced(CONTIG, f"\n{CONTIG}")),
    Row("a header that is nonsense", edit=_replaced(CONTIG, f"{CONTIG}\n##\n##=\n###\n##INFO=<\n#remark")),
    Row("Latin-1 in the header", edit=_replaced(CONTIG, f"{CONTIG}\n##centre=\udce9")),
    Row("Latin-1 in ID", record=column(2, "\udce9")),
    Row("Latin-1 in INFO", record=column(7, "X=\udce9")),
    Row("INFO of 100 kB", record=column(7, "X=" + "y" * 100_000)),
    Row("a FILTER", record=column(6, "LowQual")),
    Row("lower case", record=lambda line: line.replace("\tG\tA\t", "\tg\ta\t").replace("\tT\tC\t", "\tt\tc\t")),
    Row("chr", edit=renamed("chr7")),
    Row("CHR07", edit=renamed("CHR07")),
    Row("a record twice", record=lambda line: f"{line}\n{line}"),
    Row(
        "a record twice, refused",
        record=lambda line: f"{line}\n{line}",
        options=("--duplicates", "error"),
        error=("appears twice", "--duplicates first", _HERE),
    ),
    Row("trailing FORMAT left out", record=lambda line: line.replace("\tGT", "\tGT:AD:DP", 1), roles=ROLES[:3]),
    Row("GT last", record=_each_sample(lambda call: f"9:{call}", "DP:GT"), roles=ROLES[:3]),
    Row("VCF 4.4's phase", record=_each_sample(lambda call: f"|{call}", "GT"), roles=ROLES[:3]),
    Row("QUAL is text", record=column(5, "high")),
    Row("a carriage return in ID", record=column(2, "c\rc"), error=("control character", _HERE)),
    Row("a NUL in ID", record=column(2, "c\0c"), error=("control character", _HERE)),
    Row("POS beyond any", record=column(1, "99999999999999999999"), error=("7:99999999999999999999", "no position")),
    Row("POS is negative", record=column(1, "-5"), error=("record '7 -5 ",)),
    Row("POS is no number", record=column(1, "3e2"), error=("record '7 3e2 ",)),
    Row("not sorted", record=column(1, "50"), error=("7:50", "bcftools sort")),
    Row(
        "a contig in two parts",
        edit=_replaced("\n7\t300", "\n8\t300"),
        error=("appears a second time", "bcftools sort"),
    ),
    Row("REF is ALT", record=column(4, "G"), error=("REF and ALT are both G", _HERE), roles=_TWO),
    Row("REF is ALT", record=column(4, "T"), error=("REF and ALT are both T", _HERE), roles=ROLES[2:]),
    Row("empty ALT", record=column(4, ""), error=("ALT is ''", _HERE)),
    Row("ALT ends in a comma", record=column(4, "A,"), error=("ALT is 'A,'", _HERE), roles=ROLES[:3]),
    Row("empty REF", record=column(3, ""), error=("REF is ''", _HERE)),
    Row("REF is a number", record=column(3, "1"), error=("REF is '1'", _HERE)),
    Row("a name with a comma", edit=renamed("7,8"), error=("7,8:100", "--rename-chrs")),
    Row("a name with a blank", edit=renamed("7 8"), error=("7 8:100", "--rename-chrs")),
    Row("no name of a contig", edit=renamed(""), error=("record ' 100",)),
    Row("an empty sample name", edit=_first_names(""), error=("sample 1 has no name", "bcftools reheader -s")),
    Row("a blank sample name", edit=_first_names(" "), error=("sample 1 has no name", "bcftools reheader -s")),
    Row(
        "a sample twice",
        edit=lambda text: text.replace("P1\t", "P2\t").replace("T1\t", "T2\t"),
        error=("2 appears twice",),
    ),
    Row("a column too many", record=lambda line: f"{line}\t0|0", error=("genotype columns for", _HERE)),
    Row("a column too few", record=lambda line: line.rpartition("\t")[0], error=("genotype columns for", _HERE)),
    Row("blanks for tabs", record=lambda line: line.replace("\t", " "), error=("record '7 ",)),
    Row("a record cut short", record=lambda line: line[:12], error=("record '7 ",)),
    Row("no samples", edit=lambda text: text.replace("\tFORMAT", "\nX"), error=("it has no samples",)),
    Row("blanks in the column names", edit=_replaced("#CHROM\tPOS", "#CHROM POS"), error=("column names",)),
    Row("no column names", edit=_replaced("#CHROM", "##CHROM"), error=("#CHROM",)),
    Row("two files in one", edit=lambda text: text + text, error=("header line among the records",)),
    Row("only a header", edit=lambda text: text[: text.index("\n7\t") + 1], error=("it has no ",)),
    Row("no file of variants", edit=lambda text: "<!DOCTYPE html>\n", error=("not a VCF or BCF",)),
    Row("nothing", edit=lambda text: "", error=("it is empty",)),
    Row("an allele too many", record=genotype("0|2"), error=("'0|2'", "allele above 1", "bcftools view -t ^7:", _HERE)),
    Row("three alleles", record=genotype("0|1|1"), error=("'0|1|1'", "bcftools view -t ^7:", _HERE)),
    Row("a genotype that is none", record=genotype("x"), error=("'x'", "bcftools view -t ^7:", _HERE)),
    Row("an empty genotype", record=genotype(""), error=("''", _HERE)),
    Row("no GT", edit=_replaced("\tGT\t", "\tXX\t"), error=("FORMAT XX has no", "7:100"), roles=ROLES[:3]),
]


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_edit_of_a_file(cases: Cases, row: Row, role: str, request: pytest.FixtureRequest) -> None:
    if role not in row.roles:
        pytest.skip("makes no sense here")
    found = cases.of(role, row.of(role)(FILES[role]), *row.options)
    if row.error is None:
        assert_base(found, cases.base(role), *row.warnings)
    else:
        parts = [f" {PLACE[role]} " if part is _HERE else str(part) for part in row.error if part is not _HERE]
        line = assert_refused(found, role, *parts)
        if _HERE in row.error:
            assert f"7:{PLACE[role]}: " in line or f"7 {PLACE[role]} " in line
