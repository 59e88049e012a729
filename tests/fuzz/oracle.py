"""What bcftools reads in a variant file, in a process of its own: bcftools may end its process.

Records are those of ``bcftools query``, which are then split into biallelic sites here. Their number must be that of
``bcftools norm -m -any``, if that takes the file.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import pysam
import pysam.bcftools

from tests.fuzz.child import serve
from tests.fuzz.mutate import BGZF_EOF

_NO_TAG = "no such tag"
_NO_END, _UNKNOWN = "no BGZF EOF marker", "unknown file type"
_FORMAT = r"%CHROM\t%POS\t%ID\t%REF\t%ALT\t%INFO"


def _run(command: Any, *arguments: str) -> bytes:
    """Output of a command of bcftools; raises ``pysam.SamtoolsError``."""
    with tempfile.NamedTemporaryFile() as out:
        command("-o", out.name, *arguments, catch_stdout=False)
        return Path(out.name).read_bytes()


def read(path: str) -> dict[str, Any]:
    """Samples and records of a file: contig, POS, ID, REF, ALT, INFO, GT texts and DS texts; or why not."""
    try:
        header = _run(pysam.bcftools.view, "-h", path).rstrip(b"\n").rpartition(b"\n")[2]
        samples = header.decode(errors="surrogateescape").split("\t")[9:]
        try:
            text = _run(pysam.bcftools.query, "-f", _FORMAT + r"[\t%GT]\n", path)
        except pysam.SamtoolsError as error:
            if _NO_TAG not in str(error):
                raise
            text = _run(pysam.bcftools.query, "-f", _FORMAT + r"\n", path)
    except pysam.SamtoolsError as error:
        return {"refused": str(error)[-300:]}
    return {**_parsed(text), "samples": samples, "split": _split_count(path), "dosages": _dosages(path)}


def repaired(path: str) -> dict[str, Any]:
    """What :func:`read` gives; for files that bcftools refuses but we take on purpose, that of a repaired copy.

    These are files without an end-of-file block, with a byte-order mark, or without a first line ``##fileformat``.
    """
    found = read(path)
    if _NO_END not in found.get("refused", "") and _UNKNOWN not in found.get("refused", ""):
        return found
    content = Path(path).read_bytes()
    if _NO_END in found["refused"]:
        content += BGZF_EOF
    else:
        content = content.removeprefix(b"\xef\xbb\xbf")
        if not content.startswith((b"##fileformat", b"\x1f\x8b")):
            content = b"##fileformat=VCFv4.2\n" + content
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, Path(path).name)
        copy.write_bytes(content)
        return read(str(copy))


def _parsed(text: bytes) -> dict[str, Any]:
    records = []
    for line in text.decode(errors="surrogateescape").split("\n")[:-1]:
        fields = line.split("\t")
        records.append([*fields[:2], fields[2] or ".", *fields[3:6], fields[6:]])
    return {"records": records}


def _split_count(path: str) -> int | None:
    """Number of records after splitting, or None where ``bcftools norm`` refuses."""
    try:
        text = _run(pysam.bcftools.norm, "-m", "-any", path)
    except pysam.SamtoolsError:
        return None
    return sum(1 for line in text.split(b"\n") if line and not line.startswith(b"#"))


def _dosages(path: str) -> list[list[str]] | None:
    """DS texts of every record, or None without DS in the header."""
    try:
        text = _run(pysam.bcftools.query, "-f", r"%POS[\t%DS]\n", path)
    except pysam.SamtoolsError:
        return None
    return [line.split("\t")[1:] for line in text.decode(errors="replace").split("\n")[:-1]]


# --- the same for the fuzzer ----------------------------------------------------------------------------------------


def call_of(text: str) -> tuple[list[int], bool]:
    """Allele numbers, -1 where missing, and whether a GT text separates differing alleles by ``/``."""
    body = text[1:] if text[:1] in ("|", "/") else text
    numbers = [-1 if each in (".", "") else int(each) for each in re.split(r"[|/]", body)]
    return numbers, "/" in body and len(set(numbers)) > 1


def site_calls(texts: list[str], allele: int) -> list[str]:
    """Calls at the site of one ALT of a record, as :func:`tests.fuzz.targets.call_texts` writes them."""
    found = []
    for text in texts:
        numbers, unphased = call_of(text)
        shown = ["." if number < 0 else "1" if number == allele else "0" for number in numbers]
        unphased &= len(set(shown)) > 1
        found.append(("/" if unphased else "|").join(shown))
    return found


def sites(records: list[list[Any]]) -> list[tuple[str, int, str, str, str, list[str] | None]]:
    """Sites of all records: contig, POS, ID, REF, ALT, and calls; one with the ALT ``.`` for a record without ALT."""
    found = []
    for contig, pos, name, ref, alts, _, texts in records:
        for number, alt in enumerate(alts.split(","), start=1):
            calls = site_calls(texts, number if alt != "." else 0) if texts else None
            if alt == "." and calls is not None:
                # Without an ALT nothing is ALT.
                calls = [call.replace("1", "0") for call in calls]
            found.append((contig, int(pos), name, upper(ref), upper(alt), calls))
    return found


def upper(allele: str) -> str:
    """Bases in capitals; other alleles as they are."""
    return allele.upper() if re.fullmatch("[A-Za-z]+", allele) else allele


if __name__ == "__main__":
    pysam.set_verbosity(0)
    serve(repaired)
