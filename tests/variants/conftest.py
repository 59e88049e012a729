"""Fixtures of the readers' tests: small files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pysam
import pysam.bcftools
import pytest

from embrag_ds.variants.sites import SiteTable

HEADER = (
    "##fileformat=VCFv4.3",
    '##FILTER=<ID=PASS,Description="All filters passed">',
    "##contig=<ID=1,length=1000>",
    "##contig=<ID=2>",
    '##INFO=<ID=DR2,Number=A,Type=Float,Description="r2">',
    '##INFO=<ID=R2,Number=1,Type=Float,Description="r2">',
    '##INFO=<ID=IMP,Number=0,Type=Flag,Description="imputed">',
    '##INFO=<ID=IMPUTED,Number=0,Type=Flag,Description="imputed">',
    '##INFO=<ID=TYPED,Number=0,Type=Flag,Description="typed">',
    '##FORMAT=<ID=GT,Number=1,Type=String,Description="genotype">',
    '##FORMAT=<ID=DP,Number=1,Type=Integer,Description="depth">',
    '##FORMAT=<ID=DS,Number=A,Type=Float,Description="dosage">',
    '##FORMAT=<ID=AP1,Number=A,Type=Float,Description="first">',
    '##FORMAT=<ID=AP2,Number=A,Type=Float,Description="second">',
    '##FORMAT=<ID=HDS,Number=2,Type=Float,Description="both">',
    '##FORMAT=<ID=GP,Number=G,Type=Float,Description="probabilities">',
)

VcfMaker = Callable[..., Path]


@pytest.fixture(params=["vcf.gz", "bcf"])
def container(request: pytest.FixtureRequest) -> str:
    """File ending of the two containers that the readers accept."""
    return str(request.param)


@pytest.fixture
def make_vcf(tmp_path: Path) -> VcfMaker:
    """Function that writes records (space-separated text) to an indexed file of two samples, A and B."""

    def make(
        *records: str,
        samples: Sequence[str] = ("A", "B"),
        container: str = "vcf.gz",
        info: bool = True,
        index: bool = True,
        name: str = "in",
    ) -> Path:
        columns = ["#CHROM", "POS", "ID", "REF", "ALT", "QUAL", "FILTER", "INFO"]
        columns += ["FORMAT", *samples] if samples else []
        lines = [
            *(line for line in HEADER if info or "##INFO" not in line),
            "\t".join(columns),
            *(record.replace(" ", "\t") for record in records),
            "",
        ]
        path = tmp_path / f"{name}.vcf.gz"
        with pysam.BGZFile(str(path), "wb") as out:
            out.write("\n".join(lines).encode())
        if container == "bcf":
            text, path = path, tmp_path / f"{name}.bcf"
            pysam.bcftools.view("-Ob", "-o", str(path), str(text), catch_stdout=False)
            text.unlink()
        if index:
            # An unsorted file cannot be indexed; a stale index is what its reader would find.
            Path(f"{path}.csi").touch()
        return path

    return make


@pytest.fixture
def small_sites() -> SiteTable:
    """Five sites on two contigs, among them two at one position and a symbolic ALT."""
    return SiteTable(
        contigs=("1", "2", "unused"),
        contig_lengths=(1000, 0, 50),
        contig=np.array([0, 0, 0, 1, 1], dtype=np.int32),
        pos=np.array([10, 20, 20, 5, 7], dtype=np.int64),
        ref=["A", "C", "C", "G", "T"],
        alt=["T", "G", "CA", "<DEL>", "A"],
        id=["rs1", ".", ".", "deletion", "."],
    )
