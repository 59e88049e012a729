"""Header of a variant file: its samples, contigs and INFO keys; and what a file is that is no variant file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from embrag_ds.dependence import INDEPENDENT, Dependence
from embrag_ds.errors import UserError
from embrag_ds.variants.sites import SiteTable

FIXED_COLUMNS = 9
"""Columns of a record before those of the samples."""
_MOST_SHOWN = 60
_NAMES = ["#CHROM", "POS", "ID", "REF", "ALT", "QUAL", "FILTER", "INFO", "FORMAT"]
_INDEX = "an index of a variant file"
_PLINK = "convert it (plink2 --bfile PREFIX --export vcf bgz), and give that VCF"
_FOREIGN = {
    b"\x28\xb5\x2f\xfd": ("zstd", "decompress it (zstd -d)"),
    b"\xfd7zXZ": ("xz", "decompress it (xz -d)"),
    b"BZh": ("bzip2", "decompress it (bzip2 -d)"),
    b"PK\x03\x04": ("zip", "decompress it (unzip)"),
    b"\xff\xfe": ("UTF-16 text", "convert it (iconv -f UTF-16 -t UTF-8)"),
    b"\xfe\xff": ("UTF-16 text", "convert it (iconv -f UTF-16 -t UTF-8)"),
    b"CRAM": ("CRAM, which holds reads", "call variants first (bcftools mpileup, bcftools call)"),
    b"BAM\1": ("BAM, which holds reads", "call variants first (bcftools mpileup, bcftools call)"),
    b"\x89HDF": ("HDF5", "give the VCF or BCF that it was made from"),
    b"SAV": ("SAV", "convert it (sav export)"),
    b"##fileformat=M3VCF": ("minimac3's M3VCF", "give the VCF or BCF that it was made from"),
    b"\x7a\x88\x74\xf4": ("Beagle's bref3", "convert it (java -jar unbref3.jar), and give that VCF"),
    b"\x6c\x1b\x01": ("PLINK's .bed", _PLINK),
    b"\x6c\x1b\x00": ("PLINK's .bed", _PLINK),
    b"\x6c\x1b": ("PLINK's .pgen", "convert it (plink2 --pfile PREFIX --export vcf bgz), and give that VCF"),
}
"""Files that are no VCF or BCF by their first bytes: what they are, and a remedy. The first that fits counts."""
_INDEXES = (b"TBI\1", b"CSI\1")
_BGEN = slice(16, 20)
_MAP_NAMES = {"cm", "map", "genetic_map", "gposition"}
A_MAP = "a genetic map"
_REMEDY_OF_A_MAP = "give it to --map, and a VCF or BCF here"


def foreign(start: bytes, name: Path) -> tuple[str, str] | None:
    """What a file with these first bytes is, and a remedy, where it is a known kind but no VCF or BCF; else None.

    Compressed files are known by their decompressed bytes, too. Of a text, ``start`` should hold whole lines.
    """
    if start.startswith(_INDEXES):
        indexed = name.name.removesuffix(".tbi").removesuffix(".csi")
        return _INDEX, f"give the file that it is of{'' if indexed == name.name else f', {indexed}'}"
    if start[_BGEN] == b"bgen":
        return "BGEN", "convert it (plink2 --bgen FILE ref-first --sample FILE --export vcf bgz), and give that VCF"
    known = next((found for magic, found in _FOREIGN.items() if start.startswith(magic)), None)
    return known or _foreign_text(start)


def _foreign_text(start: bytes) -> tuple[str, str] | None:
    """The same for a text without the ``##`` lines of a VCF, by its first line with fields."""
    lines = (line.split() for line in as_text(start).splitlines())
    first = next((fields for fields in lines if fields and not fields[0].startswith("##")), [])
    if start.startswith(b"##") or first[:2] == _NAMES[:2]:
        return None
    names = {field.lower().strip('"#').partition("(")[0] for field in first}
    if names & _MAP_NAMES and not any(map(_is_number, first)):
        return A_MAP, _REMEDY_OF_A_MAP
    if len(first) == 6 and all(map(_is_number, first[2:4])) and not any(map(_is_number, first[4:])):
        return "PLINK's .bim", _PLINK
    if len(first) == 6 and all(map(_is_number, first[4:])) and first[4] in ("0", "1", "2"):
        return "PLINK's .fam", _PLINK
    if 3 <= len(first) <= 5 and sum(map(_is_number, first)) >= len(first) - 2 and _is_number(first[-1]):
        return A_MAP, _REMEDY_OF_A_MAP
    return None


def _is_number(text: str) -> bool:
    return re.fullmatch(r"-?[0-9]+(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?", text) is not None


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


def imputed_header(
    contents: Contents, samples: Sequence[str], source: str, fields: Sequence[str], dependence: Dependence = INDEPENDENT
) -> bytes:
    """Header of an imputed file with these FORMAT ``fields``, without samples if none; ``source`` names the program.

    A file of joined sites has AP1 and AP2 in place of HDS.
    GP is described by the ``dependence`` of a sample's two haplotypes.
    """
    described = _IMPUTED if dependence == INDEPENDENT else {**_IMPUTED, "GP": _dependent_gp(dependence)}
    definitions = [*_IMPUTED_INFO, *(f"##FORMAT=<ID={name},{described[name]}>" for name in fields)]
    if "AP1" in fields:
        definitions = [each.replace("HDS", "AP1 and AP2") for each in definitions]
    return header_text(contents, [f"##source={source}", *definitions], samples if fields else None)


def _dependent_gp(dependence: Dependence) -> str:
    return (
        'Number=G,Type=Float,Description="Genotype probabilities: of HDS a and b, both homozygotes have less than their'
        f" products by {dependence.opposite:g} min(ab, (1-a)(1-b)) - {dependence.alike:g} min(a(1-b), b(1-a)), and the"
        ' heterozygote twice that more; products of HDS where several ALTs are joined"'
    )


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
    '"Genotype: the likeliest allele of each haplotype by HDS, REF if two are alike; one allele if haploid"',
    "DS": 'Number=A,Type=Float,Description="ALT dosage: sum of HDS; at most 1 if haploid"',
    "HDS": 'Number=.,Type=Float,Description="ALT probability of each haplotype"',
    "AP1": 'Number=A,Type=Float,Description="ALT probability of the first haplotype"',
    "AP2": 'Number=A,Type=Float,Description="ALT probability of the second haplotype; missing if haploid"',
    "GP": 'Number=G,Type=Float,Description="Genotype probabilities: products of HDS"',
}
