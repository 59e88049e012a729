"""What a report must say of an imputed file, computed from its text one value after another."""

from __future__ import annotations

import gzip
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pysam.bcftools

EDGES = [("<0.1 %", 0.001), ("0.1-0.5 %", 0.005), ("0.5-1 %", 0.01), ("1-5 %", 0.05), ("5-50 %", 0.6)]


def records_of(path: Path) -> tuple[list[str], list[list[str]]]:
    """Samples of a VCF or BCF, and its records as columns of text."""
    text = pysam.bcftools.view(str(path)) if path.suffix == ".bcf" else gzip.decompress(path.read_bytes()).decode()
    lines = [line.split("\t") for line in text.splitlines() if not line.startswith("##")]
    return lines[0][9:], lines[1:]


def info_of(record: list[str], allele: int) -> dict[str, str]:
    """INFO of an ALT, the first of which is number 0."""
    found = {}
    for entry in record[7].split(";"):
        key, _, value = entry.partition("=")
        values = value.split(",")
        found[key] = values[allele] if len(values) > 1 else value
    return found


class Call:
    """A sample's call at one ALT: certainty and whether it is heterozygous, None where there is no such thing."""

    def __init__(self, keys: list[str], column: str, allele: int, alleles: int) -> None:
        values = dict(zip(keys, column.split(":"), strict=False))
        self.missing = "." in column.replace(":", ",").replace("|", ",").replace("/", ",").split(",")
        self.haploid = False
        self.certainty: float | None = None
        self.heterozygous: bool | None = None
        if self.missing and "AP2" not in values:
            return
        self.missing = False
        gt = values["GT"].replace("/", "|").split("|") if "GT" in values else None
        gp = by_copies(values["GP"], allele, alleles) if "GP" in values else None
        pair = None
        if "HDS" in values:
            pair = [float(each) for each in values["HDS"].split(",")]
        elif "AP1" in values:
            pair = [float(values[key].split(",")[allele]) for key in ("AP1", "AP2") if values[key] != "."]
        for values_of, haploid in ((pair, 1), (gp, 2), (gt, 1)):
            if values_of:
                self.haploid = len(values_of) == haploid
        if gp is None and pair:
            p, q = pair[0], pair[-1]
            gp = [1 - p, p] if self.haploid else [(1 - p) * (1 - q), p + q - 2 * p * q, p * q]
        if gp is not None:
            self.certainty = max(gp)
        elif "DS" in values:
            ds = float(values["DS"].split(",")[allele])
            self.certainty = 1 - min(abs(ds - whole) for whole in range(3))
        if not self.haploid:
            if gt:
                self.heterozygous = (gt[0] == str(allele + 1)) != (gt[1] == str(allele + 1))
            elif gp:
                self.heterozygous = gp[1] > max(gp[0], gp[2])
            else:
                self.heterozygous = abs(float(values["DS"].split(",")[allele]) - 1) < 0.5


def by_copies(text: str, allele: int, alleles: int) -> list[float]:
    """Probabilities of 0, 1 and 2 copies of an ALT (0 and 1 of a haploid sample), from GP of all genotypes."""
    numbers = [float(each) for each in text.split(",")]
    if len(numbers) == alleles + 1:
        return [sum(p for a, p in enumerate(numbers) if (a == allele + 1) == bool(n)) for n in (0, 1)]
    pairs = [(a, b) for b in range(alleles + 1) for a in range(b + 1)]
    copies = [[a, b].count(allele + 1) for a, b in pairs]
    return [sum(p for p, n in zip(numbers, copies, strict=True) if n == each) for each in range(3)]


def expected(path: Path, marks: bool = True) -> dict[str, Any]:
    """The numbers of a report, but for the tracks; ``marks``: typed sites are known."""
    samples, records = records_of(path)
    contigs: dict[str, list[tuple[int, bool]]] = {}
    r2: dict[str, list[float | None]] = {name: [] for name, _ in EDGES}
    calls: dict[str, list[tuple[bool, Call]]] = {name: [] for name in samples}
    for record in records:
        alts = record[4].split(",")
        for allele in range(len(alts)):
            info = info_of(record, allele)
            imputed = not marks or (("IMP" in info or "IMPUTED" in info) and "TYPED" not in info)
            contigs.setdefault(record[0], []).append((int(record[1]), not imputed))
            for name, column in zip(samples, record[9:], strict=True):
                calls[name].append((imputed, Call(record[8].split(":"), column, allele, len(alts))))
            if imputed:
                af = float(info["AF"])
                maf = round(min(af, 1 - af), 12)
                name = next(name for name, edge in EDGES if maf < edge)
                value = info.get("DR2", info.get("R2"))
                r2[name].append(None if value is None else float(value))
    r2["all"] = [value for name, _ in EDGES for value in r2[name]]
    return {
        "records": len(records),
        "r2": [r2_row(name, values) for name, values in r2.items()],
        "contigs": [contig_row(name, sites) for name, sites in contigs.items()],
        "gaps": sorted((gap for name, sites in contigs.items() for gap in gaps_of(name, sites)), reverse=True)[:20],
        "samples": [sample_row(name, each) for name, each in calls.items()],
    }


def r2_row(name: str, values: list[float | None]) -> dict[str, Any]:
    known = [value for value in values if value is not None]
    bins = Counter(min(max(int(value * 20 + 1e-9), 0), 19) for value in known)
    return {
        "maf": name,
        "sites": len(values),
        "with_r2": len(known),
        "mean": math.fsum(known) / len(known) if known else None,
        "at_least": {"0.3": sum(value >= 0.3 for value in known), "0.8": sum(value >= 0.8 for value in known)},
        "histogram": [bins[place] for place in range(20)],
    }


def contig_row(name: str, sites: list[tuple[int, bool]]) -> dict[str, Any]:
    return {
        "name": name,
        "first": sites[0][0],
        "last": sites[-1][0],
        "sites": len(sites),
        "typed": sum(typed for _, typed in sites),
        "longest_gap": max((gap[0] for gap in gaps_of(name, sites)), default=0),
    }


def gaps_of(name: str, sites: list[tuple[int, bool]]) -> list[tuple[int, str, int, int, int]]:
    """Length, contig, from, to and imputed sites of every gap of a contig."""
    found, start, inside = [], sites[0][0], 0
    for pos, typed in sites:
        if typed:
            found.append((pos - start, name, start, pos, inside))
            start, inside = pos, 0
        else:
            inside += 1
    found.append((sites[-1][0] - start, name, start, sites[-1][0], inside))
    return [gap for gap in found if gap[0] > 0]


def sample_row(name: str, calls: list[tuple[bool, Call]]) -> dict[str, Any]:
    certain = [call.certainty for imputed, call in calls if imputed and call.certainty is not None]
    diploid = [call.heterozygous for _, call in calls if not call.missing and not call.haploid]
    return {
        "name": name,
        "certainty": math.fsum(certain) / len(certain) if certain else None,
        "heterozygosity": sum(map(bool, diploid)) / len(diploid) if diploid else None,
        "calls": sum(not call.missing for _, call in calls),
        "haploid": sum(call.haploid for _, call in calls),
        "missing": sum(call.missing for _, call in calls),
    }
