"""Runs of inputs: each is made, given to its parser and to bcftools, judged and counted."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fuzz import oracle
from tests.fuzz.child import Child, Died, Hung
from tests.fuzz.inputs import KINDS, Kind, files_of

LONGEST_ERROR = 8000
"""Characters of an error. It may name several files, and a sample or a contig whose name is thousands long."""
ORACLE_SECONDS = 10.0
"""Time that bcftools may take."""
PEAK_BYTES = 256 << 20
"""Memory that an input may take, beside what the process had before it. No input is larger than 1 MB."""


@dataclass(frozen=True)
class Result:
    """What became of an input.

    ``outcome`` is ``read``, ``refused`` or a finding (:mod:`tests.fuzz`). ``compared`` says what bcftools did:
    ``same``, ``refused``, ``died``, or nothing. ``message`` is the error, or what is wrong. ``peak`` is in bytes.
    """

    kind: str
    number: int
    outcome: str
    message: str = ""
    compared: str = ""
    seconds: float = 0.0
    peak: int = 0

    @property
    def is_finding(self) -> bool:
        """Whether the input did not hold."""
        return self.outcome not in ("read", "refused")


class Fuzzer:
    """The two processes that read inputs, and the folder for these."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._parsers = Child("tests.fuzz.targets")
        self._bcftools = Child("tests.fuzz.oracle")

    def run(self, kind: Kind, number: int) -> Result:
        """Make an input, read it and judge."""
        folder = self._folder / f"{kind.name}-{number}"
        folder.mkdir()
        try:
            for name, content in files_of(kind, number).items():
                (folder / name).write_bytes(content)
            return self._judged(kind, number, folder)
        finally:
            shutil.rmtree(folder)

    def _judged(self, kind: Kind, number: int, folder: Path) -> Result:
        try:
            answer = self._parsers.ask([kind.reader, str(folder)], kind.seconds)
        except Died as death:
            return Result(kind.name, number, "crash", str(death))
        except Hung:
            return Result(kind.name, number, "hang", f"more than {kind.seconds:g} s", seconds=kind.seconds)
        outcome, message = answer["outcome"], answer.get("message", "")
        compared = ""
        if outcome == "refused" and not _is_good_error(message):
            outcome = "poor error"
        elif outcome in ("read", "refused") and answer["peak"] > PEAK_BYTES:
            outcome, message = "memory", f"{answer['peak'] >> 20} MB"
        elif outcome in ("read", "refused") and answer["left"]:
            outcome, message = "left files", ", ".join(answer["left"])
        elif kind.oracle is not None and outcome in ("read", "refused"):
            compared, difference = self._compared(kind, folder / kind.oracle, answer)
            if difference:
                outcome, message = "misread", difference
        return Result(kind.name, number, outcome, message, compared, answer["seconds"], answer["peak"])

    def _compared(self, kind: Kind, path: Path, answer: dict[str, Any]) -> tuple[str, str]:
        """What bcftools made of the file, and the difference from what we read, if any."""
        try:
            theirs = self._bcftools.ask(str(path), ORACLE_SECONDS)
        except Died:
            return "died", ""
        except Hung:
            return "hung", ""
        if "refused" in theirs:
            return "refused", ""
        if answer["outcome"] == "refused":
            return "read", ""
        found = answer["found"]
        # We take the carriage return off the end of a BCF's header line, too.
        if found["samples"] != [name.rstrip("\r") for name in theirs["samples"]]:
            return "read", f"samples {found['samples']}, of bcftools {theirs['samples']}"
        difference = _site_difference(found, theirs) if kind.reader == "variants" else _dosage_difference(found, theirs)
        return "same" if not difference else "read", difference

    def close(self) -> None:
        """End the processes."""
        self._parsers.close()
        self._bcftools.close()


def _is_good_error(message: str) -> bool:
    """Whether an error is one line of some length that names a file or an option."""
    names = "/" in message or message.startswith("--")
    return names and not set("\r\n") & set(message) and ": " in message and len(message) <= LONGEST_ERROR


def _site_difference(found: dict[str, Any], theirs: dict[str, Any]) -> str:
    """How the sites of the reader, with those that it left out, differ from those of bcftools; empty if they do not."""
    wanted = oracle.sites(theirs["records"])
    if found["records"] != len(theirs["records"]):
        return f"{found['records']} records, of bcftools {len(theirs['records'])}"
    if len(found["events"]) != len(wanted):
        return f"{len(found['events'])} sites, of bcftools {len(wanted)}"
    if theirs["split"] is not None and theirs["split"] != len(wanted):
        return f"{len(wanted)} sites, of bcftools norm {theirs['split']}"
    kept: set[tuple[Any, ...]] = set()
    for event, (contig, pos, name, ref, alt, calls) in zip(found["events"], wanted, strict=True):
        is_site, ours = event[0] == "site", tuple(event[1:6])
        same = ours[:3] == (contig, pos, name) and oracle.upper(ours[3]) == ref and oracle.upper(ours[4]) == alt
        if not same and not (alt in ("<*>", "<NON_REF>") and ours[4] == "."):
            return f"site {ours}, of bcftools {(contig, pos, name, ref, alt)}"
        if is_site and event[6] != calls:
            return f"calls {event[6]} at {contig}:{pos} {ref}>{alt}, of bcftools {calls}"
        key = (contig, pos, ref, alt, event[7] if is_site else "")
        if is_site and alt != "." and key in kept:
            return f"site {key} twice"
        if is_site:
            kept.add(key)
        elif event[6] == "duplicate" and (contig, pos, ref, alt) not in {each[:4] for each in kept}:
            return f"site {key} left out as a duplicate of none"
        elif event[6] == "no ALT" and alt not in (".", "<*>", "<NON_REF>"):
            return f"site {key} left out for want of an ALT"
    return ""


def _dosage_difference(found: dict[str, Any], theirs: dict[str, Any]) -> str:
    """How dosages differ from DS, where every record has it, or else from the sum of GT."""
    wanted = [(record, row) for row, record in enumerate(theirs["records"])]
    if any("," in record[4] or record[4] in (".", "<*>", "<NON_REF>") for record, _ in wanted):
        return ""  # what is made of several ALTs, or none, is compared by the readers of genotypes
    keys = [(record[0], int(record[1]), oracle.upper(record[3]), oracle.upper(record[4])) for record, _ in wanted]
    if len(set(keys)) < len(keys):
        return ""
    if [tuple(site) for site in found["sites"]] != keys:
        return f"{len(found['sites'])} sites {found['sites'][:3]}, of bcftools {len(keys)} {keys[:3]}"
    for record, row in wanted:
        texts = theirs["dosages"][row] if theirs["dosages"] else []
        for sample, ours in enumerate(found["dosage"][row]):
            text = texts[sample] if texts else "."
            number = _number(text)
            if number is None or ours is None or abs(ours - number) < 1e-3:
                continue
            alleles, _ = oracle.call_of(record[6][sample]) if record[6] else ([], False)
            if ours not in (sum(alleles), 2 * sum(alleles) if len(alleles) == 1 else None) or -1 in alleles:
                return f"dosage {ours} at {record[0]}:{record[1]}, of bcftools {text} {record[6]}"
    return ""


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


@contextmanager
def fuzzer() -> Iterator[Fuzzer]:
    """A fuzzer whose files lie in memory where the system has such a folder."""
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(
        prefix="embrag-fuzz-", dir=shared if os.access(shared, os.W_OK) else None
    ) as folder:
        made = Fuzzer(Path(folder))
        try:
            yield made
        finally:
            made.close()


def numbers(inputs: int, names: Iterable[str]) -> dict[str, int]:
    """Number of inputs of each kind, by their shares, at least ``inputs`` in all."""
    kinds = [KINDS[name] for name in names]
    whole = sum(kind.share for kind in kinds)
    return {kind.name: -(-inputs * kind.share // whole) for kind in kinds}


# --- tables ---------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """Counts of the inputs of one kind."""

    kind: str
    results: list[Result] = field(default_factory=list)

    def row(self) -> list[str]:
        """Row of the table."""
        outcomes = Counter(each.outcome for each in self.results)
        compared = Counter(each.compared for each in self.results if each.outcome == "read")
        same = f"{compared['same']:,}" if KINDS[self.kind].oracle else ""
        alone = f"{compared['refused'] + compared['died']:,}" if KINDS[self.kind].oracle else ""
        findings = sum(each.is_finding for each in self.results)
        slowest, peak = max(each.seconds for each in self.results), max(each.peak for each in self.results)
        return [
            self.kind, f"{len(self.results):,}", f"{outcomes['read']:,}", same, alone, f"{outcomes['refused']:,}",
            str(findings), f"{slowest:.2f}", f"{peak / 1e6:.0f}",
        ]  # fmt: skip


_HEAD = [
    "parser", "inputs", "read", "as bcftools does", "bcftools refuses", "refused", "findings", "slowest (s)",
    "peak (MB)",
]  # fmt: skip


def table(tallies: list[Tally]) -> str:
    """Markdown table of all kinds, with their sum."""
    rows = [tally.row() for tally in tallies]
    total = ["all"]
    for column in range(1, 7):
        total.append(f"{sum(int(row[column].replace(',', '') or 0) for row in rows):,}")
    total += [max(row[7] for row in rows), str(max(int(row[8]) for row in rows))]
    lines = [_HEAD, ["---", *["---:"] * (len(_HEAD) - 1)], *rows, total]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def refusals(tallies: list[Tally], most: int = 40) -> str:
    """Markdown table of the most frequent errors by their wording, for files that bcftools reads and for others."""
    counts: Counter[tuple[str, str]] = Counter()
    for tally in tallies:
        for each in tally.results:
            if each.outcome == "refused":
                theirs = {"read": "read", "refused": "refused", "died": "refused"}.get(each.compared, "")
                counts[_wording(each.message), theirs] += 1
    lines = [f"| {count:,} | {theirs} | {text} |\n" for (text, theirs), count in counts.most_common(most)]
    return "| inputs | bcftools | error |\n|---:|---|---|\n" + "".join(lines)


def _wording(message: str) -> str:
    """An error without its names and numbers."""
    message = message[:1000]
    message = re.sub(r"\S*/(?:embrag-fuzz-\w+|tmp\w*)/[^:;, ]*", "FILE", message)
    message = re.sub(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", "'...'", message)
    message = re.sub(r"FILE: (?:record '...'|after [^ ]*|[^ :]*:\d+): ", "FILE: RECORD: ", message)
    message = re.sub(r"-?\d[\d,.e+]*", "N", message)
    return re.sub(r"[^\x20-\x7e]+", "?", message).replace("|", "\\|")[:170]


def summary(results: list[Result], most: int = 3) -> str:
    """Findings grouped by parser, outcome and wording, each with the numbers of some inputs."""
    groups: dict[tuple[str, str, str], list[int]] = {}
    for each in results:
        if each.is_finding:
            groups.setdefault((each.kind, each.outcome, _wording(each.message)), []).append(each.number)
    lines = []
    for (kind, outcome, text), found in sorted(groups.items(), key=lambda item: -len(item[1])):
        lines.append(f"{len(found)} x {kind}: {outcome}: {text} (number {', '.join(map(str, found[:most]))})\n")
    return "".join(lines)
