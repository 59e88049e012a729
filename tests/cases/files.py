"""Small panel, target, truth and imputed file, edits of their text, and the commands run on them as a user would."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pysam
import pysam.bcftools

from embrag_ds.cli.main import main

ROLES = ("panel", "target", "truth", "imputed")
COLUMNS = "#CHROM POS ID REF ALT QUAL FILTER INFO FORMAT"
CONTIG = "##contig=<ID=7,length=90000>"
GT = '##FORMAT=<ID=GT,Number=1,Type=String,Description="Genotype">'
_IMPUTED = (
    '##FORMAT=<ID=DS,Number=A,Type=Float,Description="Dosage">',
    '##FORMAT=<ID=GP,Number=G,Type=Float,Description="Probabilities">',
    '##INFO=<ID=DR2,Number=A,Type=Float,Description="r2">',
    '##INFO=<ID=IMP,Number=0,Type=Flag,Description="Imputed">',
)
PLACE = {"panel": 300, "target": 300, "truth": 400, "imputed": 400}
"""Position of the record of each file that tests edit: typed, or scored."""


def vcf(samples: str, records: list[str], definitions: tuple[str, ...] = ()) -> str:
    """Text of a VCF of records with blanks in place of tabs."""
    lines = ["##fileformat=VCFv4.2", CONTIG, GT, *definitions]
    return "\n".join([*lines, *(each.replace(" ", "\t") for each in (f"{COLUMNS} {samples}", *records)), ""])


_SITES = ["100 a A G", "200 b C T", "300 c G A", "400 d T C", "500 e A C", "600 f G T", "700 g C A", "800 h T G"]


def _records(calls: list[str], places: range | tuple[int, ...], info: str = ".", form: str = "GT") -> list[str]:
    return [f"7 {_SITES[place]} . . {info} {form} {call}" for place, call in zip(places, calls, strict=True)]


FILES = {
    "panel": vcf(
        "P1 P2 P3 P4 P5",
        _records(
            [
                "0|0 0|1 1|0 0|0 0|1",
                "0|0 0|1 1|0 0|1 0|0",
                "1|0 0|1 1|0 0|0 0|1",
                "0|0 0|1 1|1 0|0 0|0",
                "0|1 0|1 1|0 0|0 1|0",
                "0|0 1|1 1|0 0|1 0|0",
                "1|0 0|0 0|0 1|0 0|1",
                "0|1 1|0 0|0 0|0 1|0",
            ],
            range(8),
        ),
    ),
    "target": vcf("T1 T2", _records(["0|1 0|0", "0|1 1|0", "1|1 0|0", "0|0 0|1"], (0, 2, 5, 7))),
    "truth": vcf(
        "T1 T2", _records(["0|1 0|0", "0|1 1|0", "0|1 1|0", "0|1 0|0", "0|1 0|1", "1|1 0|0", "0|0 1|0"], range(7))
    ),
    "imputed": vcf(
        "T1 T2",
        _records(
            [
                "0|1:1:0,1,0 0|0:0:1,0,0",
                "0|1:1.1:0.1,0.7,0.2 0|0:0.4:0.6,0.4,0",
                "0|1:1:0,1,0 1|0:1:0,1,0",
                "0|1:0.9:0.2,0.7,0.1 0|0:0.1:0.9,0.1,0",
                "0|1:0.8:0.2,0.8,0 0|0:0.3:0.7,0.3,0",
                "1|1:2:0,0,1 0|0:0:1,0,0",
                "0|0:0.2:0.8,0.2,0 1|0:0.7:0.3,0.7,0",
            ],
            range(7),
            "DR2=0.5;IMP",
            "GT:DS:GP",
        ),
        _IMPUTED,
    ),
}
"""Text of each file: eight sites, of which four are typed and three are scored."""

Content = str | bytes | Path
Edit = Callable[[str], str]


def encoded(content: str) -> bytes:
    """The bytes of a text, in which ``\\udce9`` stands for a byte that is not UTF-8."""
    return content.encode("utf-8", "surrogateescape")


def at(place: int | None, edit: Callable[[str], str]) -> Edit:
    """Edit of the line of the record at a position."""

    def edited(text: str) -> str:
        lines = text.split("\n")
        return "\n".join(edit(line) if line.startswith(f"7\t{place}\t") else line for line in lines)

    return edited


def column(number: int, value: str) -> Callable[[str], str]:
    """Edit of one column of a record, by its number from 0."""

    def edited(line: str) -> str:
        fields = line.split("\t")
        fields[number] = value
        return "\t".join(fields)

    return edited


def genotype(value: str) -> Callable[[str], str]:
    """Edit of the first sample's GT."""

    def edited(line: str) -> str:
        fields = line.split("\t")
        fields[9] = ":".join([value, *fields[9].split(":")[1:]])
        return "\t".join(fields)

    return edited


def renamed(contig: str) -> Edit:
    """Edit that renames the contig."""
    return lambda text: text.replace("\n7\t", f"\n{contig}\t").replace("ID=7,", f"ID={contig},")


def second_contig(name: str) -> Edit:
    """Edit that repeats all records on another contig."""

    def edited(text: str) -> str:
        more = [f"{name}{line[1:]}" for line in text.split("\n") if line.startswith("7\t")]
        return text + "\n".join([*more, ""])

    return edited


def bgzipped(content: bytes, path: Path) -> Path:
    """Write a bgzipped file."""
    with pysam.BGZFile(str(path), "wb", None) as out:
        out.write(content)
    return path


def converted(content: bytes, path: Path, kind: str = "-Ob") -> Path:
    """Write a BCF (``-Ob``, or ``-Ou`` without compression) with bcftools."""
    text = path.with_suffix(".source.vcf")
    text.write_bytes(content)
    pysam.bcftools.view(kind, "-o", str(path), str(text), catch_stdout=False)
    text.unlink()
    return path


@dataclass(frozen=True)
class Outcome:
    """What a command did: exit status, lines on stderr, its result, and the files that are new in its folder.

    ``result`` is what must not change: the output's records without contig and ID, or the scores. ``records`` are the
    output's, and ``header`` its definitions. ``paths`` are the files read, by role.
    """

    status: int
    lines: list[str]
    result: Any
    made: set[str]
    paths: dict[str, Path]
    records: list[list[str]] = field(default_factory=list)
    header: list[str] = field(default_factory=list)

    def said(self, level: str) -> list[str]:
        """Lines of a level: ``error`` or ``warning``."""
        return [line.removeprefix(f"{level}: ") for line in self.lines if line.startswith(f"{level}: ")]

    @property
    def warnings(self) -> list[str]:
        """Warnings, but for that of few typed sites, which all of these files give."""
        return [line for line in self.said("warning") if "fewer than 10 typed sites" not in line]

    @property
    def log(self) -> str:
        """Everything on stderr."""
        return "\n".join(self.lines)


class Cases:
    """Commands run in this process on files in new folders below ``folder``, with one cache."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cache = folder / "cache"
        self._number = 0
        self._base: dict[str, Outcome] = {}

    def new_folder(self) -> Path:
        """A new folder."""
        self._number += 1
        path = self.folder / str(self._number)
        path.mkdir()
        return path

    def base(self, role: str) -> Outcome:
        """What the command that reads a role does without an edit."""
        command = "impute" if role in ("panel", "target") else "evaluate"
        if command not in self._base:
            self._base[command] = self.run(command)
        return self._base[command]

    def of(self, role: str, content: Content, *options: object, **others: Content) -> Outcome:
        """Run the command that reads a role on this content of it."""
        return self.run("impute" if role in ("panel", "target") else "evaluate", {role: content, **others}, *options)

    def run(self, command: str, content: Mapping[str, Content] | None = None, *options: object) -> Outcome:
        """Run ``impute`` or ``evaluate`` with these files in place of those of :data:`FILES`."""
        folder, paths = self.new_folder(), {}
        for role, text in {**FILES, **(content or {})}.items():
            paths[role] = text if isinstance(text, Path) else folder / f"{role}.vcf"
            if not isinstance(text, Path):
                paths[role].write_bytes(encoded(text) if isinstance(text, str) else text)
        before = {each.name for each in folder.iterdir()}
        common = ["--panel", paths["panel"], "--target", paths["target"], "--cache-dir", self.cache]
        out, scores = folder / "out.vcf.gz", folder / "scores.json"
        if command == "impute":
            arguments = ["--out", out, "--adapt", "off", "--transformer", "off", "--device", "cpu"]
        else:
            arguments = ["--truth", paths["truth"], "--imputed", f"x={paths['imputed']}", "--json", scores]
            arguments += ["--bootstrap", "2"]
        status, lines, _ = embrag(command, *common, *arguments, *options)
        made = {each.name for each in folder.iterdir()} - before
        found = Outcome(status, lines, None, made, paths)
        if status == 0 and command == "impute":
            text = gzip.decompress(out.read_bytes()).decode("utf-8", "surrogateescape").split("\n")[:-1]
            records = [line.split("\t") for line in text if not line.startswith("#")]
            result = [[each[1], *each[3:]] for each in records]
            return Outcome(status, lines, result, made, paths, records, [line for line in text if line[:1] == "#"])
        if status == 0:
            result = json.loads(scores.read_text()) if scores.exists() else {}
            result = {key: value for key, value in result.items() if key not in ("files", "harmonisation")}
            return Outcome(status, lines, result, made, paths)
        return found


def embrag(*arguments: object) -> tuple[int, list[str], str]:
    """Run ``embrag`` in this process: exit status, lines on stderr, and stdout; any exception but its own is raised."""
    said, shown, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(shown):
        try:
            main(arguments=[str(each) for each in arguments])
        except SystemExit as end:
            status = int(end.code or 0)
    return status, said.getvalue().splitlines(), shown.getvalue()


def assert_base(found: Outcome, base: Outcome, *warnings: str) -> None:
    """The outcome is that without the edit, with exactly these warnings (a part of each)."""
    assert found.status == 0, found.log
    assert found.result == base.result
    assert len(found.warnings) == len(warnings), found.warnings
    for part, line in zip(warnings, found.warnings, strict=True):
        assert part in line


def assert_refused(found: Outcome, role: str, *parts: str) -> str:
    """The outcome is exit status 2, one line that names the file and has these parts, and nothing written."""
    assert found.status == 2, found.log
    (line,) = found.said("error")
    assert found.lines[-1] == f"error: {line}" and line.isprintable()
    assert line.startswith(f"{found.paths[role]}: "), line
    for part in parts:
        assert part in line, line
    assert "None" not in line and "; " in line
    assert found.made == set()
    return line
