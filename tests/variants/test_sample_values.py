"""Values of samples: random columns against a slow oracle and bcftools, and damaged ones."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import numpy as np
import pysam.bcftools
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from embrag_ds.errors import UserError
from embrag_ds.variants.dosages import spool_dosages
from embrag_ds.variants.genotypes import DIPLOID, HAPLOID, UNKNOWN
from embrag_ds.variants.sample_values import BadValue, ValueParser, Values

SAMPLES = 3
_HEAD = [
    "##fileformat=VCFv4.3",
    "##contig=<ID=1,length=100000>",
    '##FORMAT=<ID=GT,Number=1,Type=String,Description="g">',
    '##FORMAT=<ID=DS,Number=A,Type=Float,Description="s">',
    '##FORMAT=<ID=DP,Number=1,Type=Integer,Description="d">',
    "\t".join(["#CHROM", "POS", "ID", "REF", "ALT", "QUAL", "FILTER", "INFO", "FORMAT", *"ABC"]),
]


def write(folder: str, lines: list[str]) -> Path:
    path = Path(folder) / "in.vcf"
    path.write_text("\n".join([*_HEAD, *lines, ""]), encoding="utf-8")
    return path


class Column:
    """Random values of a sample: numbers, in thousandths, and their text by key."""

    def __init__(self, rng: np.random.Generator, alts: int) -> None:
        self.ploidy = int(rng.integers(1, 3))
        # Of every haplotype: the probability of each allele. Of the sample: that of each pair of alleles, one <= two.
        self.haplotypes = [self._shares(rng, alts + 1) for _ in range(self.ploidy)]
        self.pairs = [(one, two) for two in range(alts + 1) for one in range(two + 1)]
        self.gp = self._shares(rng, len(self.pairs) if self.ploidy == 2 else alts + 1)
        self.ds = [sum(each[alt] for each in self.haplotypes) for alt in range(1, alts + 1)]
        self.alleles = rng.integers(-1 if rng.random() < 0.3 else 0, alts + 1, self.ploidy).tolist()
        separator = rng.choice(["|", "/"])
        prefix = separator if rng.random() < 0.2 else ""
        flat = [each[alt] for each in self.haplotypes for alt in range(1, alts + 1)]
        self.texts = {
            "GT": prefix + separator.join("." if each < 0 else str(each) for each in self.alleles),
            "DS": self._text(rng, self.ds),
            "HDS": self._text(rng, flat),
            "AP1": self._text(rng, flat[:alts]),
            "AP2": self._text(rng, flat[alts:]) if self.ploidy == 2 else str(rng.choice([".", ",".join("." * alts)])),
            "GP": self._text(rng, self.gp),
            "DP": "7",
        }

    @staticmethod
    def _shares(rng: np.random.Generator, count: int) -> list[int]:
        edges = np.sort(rng.integers(0, 1001, count - 1))
        return np.diff([0, *edges.tolist(), 1000]).tolist()

    @staticmethod
    def _text(rng: np.random.Generator, thousandths: list[int]) -> str:
        form = str(rng.choice(["{:.3f}", "{:g}", "{:.6f}", "{:.3e}"]))
        return ",".join(form.format(each / 1000) for each in thousandths)

    def expected(self, keys: list[str], alt: int) -> Values:
        """What an imputed file with these keys has for an ALT."""
        nan = math.nan
        hds = [each[alt] / 1000 for each in self.haplotypes]
        has_haplotypes = "HDS" in keys or {"AP1", "AP2"} <= set(keys)
        pair = (hds[0], hds[-1]) if has_haplotypes else (nan, nan)
        gp = [nan] * 3
        if "GP" in keys:
            genotypes = self.pairs if self.ploidy == 2 else [(each,) for each in range(len(self.gp))]
            copies = [genotype.count(alt) for genotype in genotypes]
            gp = [sum(p for p, n in zip(self.gp, copies, strict=True) if n == m) / 1000 for m in range(3)]
        if "DS" in keys:
            dosage = self.ds[alt - 1] / 1000
        elif has_haplotypes:
            dosage = sum(hds)
        elif "GP" in keys:
            dosage = gp[1] + 2 * gp[2]
        else:
            dosage = float(self.alleles.count(alt))
        told = {"HDS", "GP"} & set(keys) or has_haplotypes or ("GT" in keys and self.alleles != [-1])
        return Values(dosage, *pair, gp[0], gp[1], gp[2], self.ploidy if told else UNKNOWN)


@given(st.integers(0, 2**32))
@settings(max_examples=300, deadline=None)
def test_random_imputed_columns(seed: int) -> None:
    rng = np.random.default_rng(seed)
    alts = int(rng.integers(1, 4))
    keys = [key for key in ("GT", "DS", "HDS", "AP1", "AP2", "GP", "DP") if rng.random() < 0.5]
    rng.shuffle(keys)
    column = Column(rng, alts)
    usable = set(keys) & {"GT", "DS", "HDS", "GP"} or {"AP1", "AP2"} <= set(keys)
    if not usable:
        assert ValueParser(":".join(keys).encode(), 1, alts, truth=False).source is None
        return
    has_ap = {"AP1", "AP2"} <= set(keys) and "HDS" not in keys
    # Nothing but GT tells that AP2 is missing because the sample is haploid.
    lacks_ap2 = has_ap and column.ploidy == 1 and ("GT" not in keys or -1 in column.alleles)
    lacks_gt = -1 in column.alleles and not set(keys) & {"DS", "HDS", "GP"} and not has_ap
    text = ":".join(column.texts[key] for key in keys).encode()
    for alt in range(1, alts + 1):
        parser = ValueParser(":".join(keys).encode(), alt, alts, truth=False)
        if lacks_ap2 or lacks_gt:
            with pytest.raises(BadValue, match="missing"):
                parser.parse(text)
        else:
            np.testing.assert_allclose(parser.parse(text), column.expected(keys, alt), atol=1e-9, err_msg=str(text))


@given(st.integers(0, 2**32))
@settings(max_examples=20, deadline=None)
def test_random_truths_are_those_of_bcftools(seed: int) -> None:
    """Count ALT copies of every kind of call; bcftools splits the records."""
    rng = np.random.default_rng(seed)
    lines, expected = [], []
    for number in range(int(rng.integers(1, 12))):
        alts = int(rng.integers(1, 4))
        calls = []
        for _ in range(SAMPLES):
            alleles = rng.integers(-1 if rng.random() < 0.3 else 0, alts + 1, int(rng.integers(1, 3))).tolist()
            calls.append((alleles, str(rng.choice(["|", "/"])).join("." if a < 0 else str(a) for a in alleles)))
        keys = ["GT", "GT:DP", "GT:DS"][int(rng.integers(3))]
        tail = {"GT": "", "GT:DP": ":3", "GT:DS": ":" + ",".join(["0.5"] * alts)}[keys]
        columns = "\t".join(text + (tail if rng.random() < 0.7 else "") for _, text in calls)
        lines.append(f"1\t{10 + number}\t.\tA\t{','.join('CGT'[:alts])}\t.\t.\t.\t{keys}\t{columns}")
        for alt in range(1, alts + 1):
            expected.append([math.nan if -1 in alleles else alleles.count(alt) for alleles, _ in calls])
    with tempfile.TemporaryDirectory() as folder:
        path = write(folder, lines)
        with spool_dosages(path, Path(folder), truth=True) as found:
            dosage = found.dosage(np.arange(len(found.sites)))
            ploidy = found.ploidy(np.arange(len(found.sites)))
            sites = [f"{pos}{alt}" for _, pos, _, alt in found.sites.identities()]
        np.testing.assert_array_equal(dosage, expected)
        split = Path(folder) / "split.vcf"
        pysam.bcftools.norm("-m", "-any", "-o", str(split), str(path), catch_stdout=False)
        rows = pysam.bcftools.query("-f", "%POS%ALT[ %GT]\n", str(split)).splitlines()
    theirs = [row.split() for row in rows]
    assert sites == [row[0] for row in theirs]
    for row, (_, *genotypes) in enumerate(theirs):
        for sample, genotype in enumerate(genotypes):
            alleles = genotype.replace("/", "|").split("|")
            assert np.isnan(dosage[row, sample]) if "." in alleles else dosage[row, sample] == alleles.count("1")
            if "." not in alleles:
                assert ploidy[row, sample] == (HAPLOID if len(alleles) == 1 else DIPLOID)


_ALPHABET = b"0123456789.,:|/eE+-_naif \x00\xff\t"
_COLUMNS = [
    (b"GT:DS:HDS:GP", b"0|1:0.964:0.003,0.961:0.038,0.959,0.003"),
    (b"GT:DS:AP1:AP2:GP", b"0:0.12:0.12:.:."),
    (b"GT:GP:DS:HDS", b"1:0.2,0.8:0.8:0.8"),
    (b"GT:DS:HDS:GP", b"1|2:0.9,0.8:0.7,0.1,0.2,0.7:0.02,0.2,0.14,0.05,0.52,0.07"),
    (b"DS", b"1.25"),
    (b"GP", b"0.25,0.5,0.25"),
    (b"GT", b"./."),
]


@st.composite
def damaged(draw: st.DrawFn, text: bytes) -> bytes:
    """A text with up to four bytes replaced, inserted or removed."""
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, len(text)))
        byte = bytes([draw(st.sampled_from(_ALPHABET))])
        text = text[:place] + draw(st.sampled_from([byte, b""])) + text[place + draw(st.integers(0, 1)) :]
    return text


@given(st.data(), st.sampled_from(_COLUMNS), st.integers(0, 3), st.booleans())
@settings(max_examples=800, deadline=None)
def test_a_damaged_column_is_read_or_refused(
    data: st.DataObject, column: tuple[bytes, bytes], alts: int, truth: bool
) -> None:
    keys, text = data.draw(damaged(column[0])), data.draw(damaged(column[1]))
    parser = ValueParser(keys, data.draw(st.integers(1, alts)) if alts else 0, alts, truth)
    if parser.source is None:
        return
    try:
        found = parser.parse(text)
    except BadValue as fault:
        assert "\n" not in fault.problem.replace("\udcff", "")
        return
    assert truth or not math.isnan(found.dosage)
    assert math.isnan(found.dosage) or 0 <= found.dosage <= (1 if found.ploidy == HAPLOID else 2), found
    assert all(math.isnan(each) or 0 <= each <= 1 for each in found[1:6]), found
    assert math.isnan(found.zero) or abs(found.zero + found.one + found.two - 1) < 0.06, found


@given(st.data(), st.sampled_from(_COLUMNS), st.booleans())
@settings(max_examples=100, deadline=None)
@example(None, (b"GT:D\xff", b"\xff"), False)
def test_a_damaged_line_is_read_or_refused(
    data: st.DataObject | None, column: tuple[bytes, bytes], truth: bool
) -> None:
    keys, text = column
    line = b"1\t10\t.\tA\tC,T\t.\t.\tDR2=0.5,0.5;IMP\t%s\t%s\t%s\t%s" % (keys, text, text, text)
    if data is not None:
        line = data.draw(damaged(line))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "in.vcf"
        path.write_bytes("\n".join([*_HEAD, ""]).encode() + line + b"\n")
        try:
            with spool_dosages(path, Path(folder), truth) as found:
                found.dosage(np.arange(len(found.sites)))
        except UserError as fault:
            assert str(fault).startswith(f"{path}: ") and "None" not in str(fault)
