"""Header of a variant file: its samples, contigs and INFO keys."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from embrag_ds.errors import UserError
from embrag_ds.variants.sites import SiteTable

FIXED_COLUMNS = 9
"""Columns of a record before those of the samples."""
_MOST_SHOWN = 60
_NAMES = ["#CHROM", "POS", "ID", "REF", "ALT", "QUAL", "FILTER", "INFO", "FORMAT"]


def as_text(content: bytes) -> str:
    """Text of a file's bytes; those that are not UTF-8 stay, and :func:`as_bytes` gives them back."""
    return content.decode("utf-8", errors="surrogateescape")


def shown(text: bytes | str) -> str:
    """Text of a file for an error, cut off if it is long."""
    whole = as_text(text) if isinstance(text, bytes) else text
    return whole if len(whole) <= _MOST_SHOWN else f"{whole[:_MOST_SHOWN]}..."


def as_bytes(text: str) -> bytes:
    """Bytes of a text made by :func:`as_text`."""
    return text.encode("utf-8", errors="surrogateescape")


@dataclass(frozen=True)
class Header:
    """Samples [N], declared contigs with their lengths (base pairs, 0 where not given), INFO keys, and what the lines
    ``##source`` say.
    """

    samples: tuple[str, ...]
    contigs: tuple[str, ...]
    contig_lengths: tuple[int, ...]
    info_keys: frozenset[str]
    sources: tuple[str, ...] = ()

    @staticmethod
    def parse(path: Path, lines: Sequence[bytes], needs_samples: bool = True) -> Header:
        """Parse header lines, the column names last.

        Raises :class:`UserError`, in the name of ``path``, for other columns, for repeated or empty samples, and for
        none where the file ``needs_samples``.
        """
        text = [as_text(line) for line in lines]
        columns = text[-1].split("\t")
        if columns[: len(_NAMES)] != _NAMES[: len(columns)] or len(columns) < FIXED_COLUMNS - 1:
            raise UserError(
                f"{path}: its column names are {' '.join(columns[:FIXED_COLUMNS])!r}, not {' '.join(_NAMES)!r} with "
                "tabs between; correct the header (bcftools reheader -h)"
            )
        samples = tuple(columns[FIXED_COLUMNS:])
        if not samples and needs_samples:
            raise UserError(f"{path}: it has no samples; give a file with genotype columns")
        seen: set[str] = set()
        for number, name in enumerate(samples, start=1):
            if not name.strip():
                raise UserError(f"{path}: sample {number} has no name; name it (bcftools reheader -s)")
            if name in seen:
                raise UserError(f"{path}: sample {name} appears twice; rename one (bcftools reheader -s)")
            seen.add(name)
        contigs: dict[str, int] = {}
        for line in text:
            if found := re.match(r"##contig=<(?:.*?,)??ID=([^,>]+)", line):
                length = re.search(r"[<,]length=([0-9]{1,18})", line)
                contigs.setdefault(found.group(1), int(length.group(1)) if length else 0)
        keys = (re.match(r"##INFO=<(?:.*?,)??ID=([^,>]+)", line) for line in text)
        return Header(
            samples,
            tuple(contigs),
            tuple(contigs.values()),
            frozenset(found.group(1) for found in keys if found),
            tuple(line.removeprefix("##source=") for line in text if line.startswith("##source=")),
        )


@dataclass(frozen=True)
class Contents:
    """What a header says of its file's sites: contigs with their lengths (base pairs, 0 where not given), and keys of
    ``SiteTable.extent``.
    """

    contigs: dict[str, int]
    extents: frozenset[str]

    @staticmethod
    def of(sites: SiteTable) -> Contents:
        """Contents of a file with these sites and all of their table's contigs."""
        keys = {entry.partition("=")[0] for extent in sites.extent.values() for entry in extent.split(";")}
        return Contents(dict(zip(sites.contigs, sites.contig_lengths, strict=True)), frozenset(keys))


def header_text(contents: Contents, definitions: Sequence[str], samples: Sequence[str] | None) -> bytes:
    """Header of an output with these contents and definitions.

    ``samples`` is None for a file without sample columns. It has no date and no path, so that the same run gives the
    same bytes.
    """
    lines = ["##fileformat=VCFv4.3", '##FILTER=<ID=PASS,Description="All filters passed">']
    for name, length in contents.contigs.items():
        lines.append(f"##contig=<ID={name},length={length}>" if length else f"##contig=<ID={name}>")
    extents = [_EXTENTS[key] for key in sorted(contents.extents)]
    columns = _NAMES[:-1] if samples is None else [*_NAMES, *samples]
    return as_bytes("\n".join([*lines, *extents, *definitions, "\t".join(columns), ""]))


def imputed_header(contents: Contents, samples: Sequence[str], source: str, fields: Sequence[str]) -> bytes:
    """Header of an imputed file with these FORMAT ``fields``, without samples if none; ``source`` names the program."""
    formats = [f"##FORMAT=<ID={name},{_IMPUTED[name]}>" for name in fields]
    return header_text(contents, [f"##source={source}", *_IMPUTED_INFO, *formats], samples if fields else None)


_EXTENTS = {
    "END": '##INFO=<ID=END,Number=1,Type=Integer,Description="End of the variant">',
    "SVLEN": '##INFO=<ID=SVLEN,Number=A,Type=Integer,Description="Difference in length between REF and ALT">',
}
_IMPUTED_INFO = [
    '##INFO=<ID=AF,Number=A,Type=Float,Description="Estimated ALT allele frequency: mean of HDS">',
    '##INFO=<ID=DR2,Number=A,Type=Float,Description="Estimated squared correlation of dosage and true allele:'
    ' variance of HDS over p(1-p)">',
    '##INFO=<ID=IMP,Number=0,Type=Flag,Description="Imputed site">',
    '##INFO=<ID=AN,Number=1,Type=Integer,Description="Number of haplotypes">',
    '##INFO=<ID=S_X,Number=A,Type=Float,Description="Sum of HDS over the haplotypes">',
    '##INFO=<ID=S_XX,Number=A,Type=Float,Description="Sum of squared HDS. DR2 of merged batches of samples, from sums'
    ' of AN, S_X and S_XX over the batches: (S_XX/AN - p^2)/(p(1-p)), where p is S_X/AN">',
]
_IMPUTED = {
    "GT": "Number=1,Type=String,Description="
    '"Genotype: ALT where its HDS is above 0.5, the likeliest if several are; one allele if haploid"',
    "DS": 'Number=A,Type=Float,Description="ALT dosage: sum of HDS; at most 1 if haploid"',
    "HDS": 'Number=.,Type=Float,Description="ALT probability of each haplotype"',
    "AP1": 'Number=A,Type=Float,Description="ALT probability of the first haplotype"',
    "AP2": 'Number=A,Type=Float,Description="ALT probability of the second haplotype; missing if haploid"',
    "GP": 'Number=G,Type=Float,Description="Genotype probabilities: products of HDS"',
}
