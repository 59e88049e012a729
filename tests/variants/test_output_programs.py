"""Programs that read imputed files: bcftools, PLINK 2 and Beagle take them without a warning."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pysam
import pysam.bcftools
import pytest

from embrag_ds.variants.output import OutputOptions
from embrag_ds.variants.phased_output import write_phased
from embrag_ds.variants.records import VariantReader, site_table
from tests.variants.imputed_files import random_imputed, records_of, varied_sites, write

JOINED = OutputOptions(join_multiallelic=True)
KINDS = {
    "default": ("vcf.gz", OutputOptions(), "none"),
    "BCF": ("bcf", OutputOptions(), "none"),
    "haploid in places": ("vcf.gz", OutputOptions(), "some"),
    "haploid in places, BCF": ("bcf", OutputOptions(), "some"),
    "haploid": ("vcf.gz", OutputOptions(), "all"),
    "joined": ("vcf.gz", JOINED, "none"),
    "joined, haploid, BCF": ("bcf", JOINED, "some"),
    "few fields": ("vcf.gz", OutputOptions(formats=("GT", "DS")), "none"),
    "dosage only": ("bcf", OutputOptions(formats=("DS",)), "some"),
    "accurate": ("vcf.gz", OutputOptions(min_r2=0.3), "none"),
    "typed": ("vcf.gz", OutputOptions(typed_only=True), "none"),
    "sites": ("vcf.gz", OutputOptions(sites_only=True), "none"),
}
"""Ending, options and haploid samples of the outputs that are tried; all have symbolic alleles and an ID in Latin-1."""
COMPLAINT = re.compile(r"warning|error|exception|\[[WE]::", re.IGNORECASE)


def output(folder: Path, kind: str) -> Path:
    """An output of a kind, on chromosome X outside the pseudo-autosomal regions if samples are haploid throughout."""
    ending, options, haploid = KINDS[kind]
    contig = "X" if haploid == "all" else "1"
    return write(folder / f"out.{ending}", varied_sites(contig), random_imputed(haploid=haploid), options)


def ran(*command: str | Path) -> str:
    """Both streams of a program that ends well; skipped where it is absent."""
    program = shutil.which(str(command[0]))
    if program is None:
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run(
        [program, *map(str, command[1:])],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
        timeout=120,
        env={**os.environ, "LC_ALL": "C.UTF-8"},
    )
    text = done.stdout.decode(errors="replace")
    assert done.returncode == 0, text
    return text


def complaints(text: str) -> list[str]:
    """Lines of a program's output that complain."""
    return [line for line in text.splitlines() if COMPLAINT.search(line)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_bundled_bcftools(tmp_path, kind, capfd):
    path = output(tmp_path, kind)
    before = pysam.set_verbosity(3)
    said = []
    try:
        for command, arguments in (
            ("view", ["-Ob"]),
            ("norm", ["-m", "-any", "-Oz"]),
            ("norm", ["-m", "+any", "-Oz"]),
            ("sort", ["-Oz"]),
        ):
            run = getattr(pysam.bcftools, command)
            run(*arguments, "-o", str(tmp_path / "again"), str(path), catch_stdout=False)
            said.append(run.get_messages())
        pysam.bcftools.stats(str(path))
        said.append(pysam.bcftools.stats.get_messages())
    finally:
        pysam.set_verbosity(before)
    assert complaints("\n".join(said)) == [] == complaints(capfd.readouterr().err)


@pytest.mark.parametrize("kind", KINDS)
def test_bcftools(tmp_path, kind):
    path = output(tmp_path, kind)
    said = ran("bcftools", "view", "-Ob", "-o", tmp_path / "again.bcf", path)
    said += ran("bcftools", "norm", "-m", "-any", "-Ob", "-o", tmp_path / "again.bcf", path)
    said += ran("bcftools", "index", "-f", tmp_path / "again.bcf")
    said += ran("bcftools", "stats", path)
    assert complaints("\n".join(line for line in said.splitlines() if not line.startswith("#"))) == []


@pytest.mark.parametrize("dosage", ["DS", "HDS"])
@pytest.mark.parametrize(
    "kind", ["default", "BCF", "haploid in places", "haploid in places, BCF", "haploid", "accurate", "typed"]
)
def test_plink_reads_dosages(tmp_path, kind, dosage):
    path = output(tmp_path, kind)
    made = tmp_path / "made"
    sexes = tmp_path / "sexes.txt"
    sexes.write_text("#IID\tSEX\n" + "".join(f"s{number}\t{1 + number % 2}\n" for number in range(6)))
    given = ["--bcf" if path.suffix == ".bcf" else "--vcf", path, f"dosage={dosage}", "--update-sex", sexes]
    said = ran("plink2", *given, "--make-pgen", "--out", made)
    said += ran("plink2", "--pfile", made, "--export", "A", "--out", made)
    assert complaints(said) == []


@pytest.mark.parametrize("kind", ["default", "haploid in places"])
def test_plink_gets_the_same_dosages(tmp_path, kind):
    """PLINK 2 doubles the dosage of a haploid genotype, which it thus expects in [0, 1]."""
    path = output(tmp_path, kind)
    ran("plink2", "--vcf", path, "dosage=DS", "--export", "Av", "--out", tmp_path / "made")
    rows = [line.split("\t") for line in (tmp_path / "made.traw").read_text("latin-1").splitlines()[1:]]
    for row, record in zip(rows, records_of(path), strict=True):
        counts_alt = row[4] == record[4]
        for text, column in zip(row[6:], record[9:], strict=True):
            gt, ds = column.split(":")[:2]
            copies = float(ds) * (1 if "|" in gt else 2)
            assert float(text) == pytest.approx(copies if counts_alt else 2 - copies, abs=1e-3)


@pytest.mark.parametrize("kind", ["joined", "few fields", "sites"])
def test_plink_reads_genotypes_and_sites(tmp_path, kind):
    """Of records of several ALTs PLINK 2 imports the genotypes only, whoever wrote them."""
    make = "--make-just-pvar" if kind == "sites" else "--make-pgen"
    assert complaints(ran("plink2", "--vcf", output(tmp_path, kind), make, "--out", tmp_path / "made")) == []


@pytest.mark.parametrize("kind", ["default", "haploid", "joined", "few fields", "accurate"])
def test_beagle_takes_it_as_targets_and_as_reference(tmp_path, kind):
    path = output(tmp_path, kind)
    contig = records_of(path)[0][0]
    said = ran("beagle", f"gt={path}", f"ref={path}", f"chrom={contig}", f"out={tmp_path / 'made'}")
    assert complaints(said) == []
    assert len(records_of(tmp_path / "made.vcf.gz")) == len([row for row in records_of(path) if row[0] == contig])


@pytest.mark.parametrize("haploid", ["none", "all"])
def test_minimac_takes_it_as_a_panel(tmp_path, haploid):
    """Of a phased panel; sites that Minimac4 cannot know, such as symbolic ones, are in it, too."""
    sites, imputed = varied_sites(), random_imputed(haploid=haploid)
    panel = write(tmp_path / "panel.vcf.gz", sites, imputed, OutputOptions(formats=("GT",)))
    said = ran("minimac4", "--compress-reference", panel, "-o", tmp_path / "panel.msav")
    assert complaints(said) == []


@pytest.mark.real
@pytest.mark.parametrize("options", [OutputOptions(), JOINED])
def test_every_allele_of_a_real_panel_comes_out(tmp_path, real_data, options):
    """The panel has records of several ALTs, copy numbers, deletions with END, and several records at a position."""
    (panel,) = (real_data.parent / "kgp_chr22_start").glob("*.phased.vcf.gz")
    with VariantReader(panel) as reader:
        sites = site_table(reader, [row._replace(body=b"") for row in reader.sites()])
    assert len(sites) > reader.records and sites.extent
    path = write(tmp_path / "out.vcf.gz", sites, random_imputed(2, len(sites)), options, step=1000)
    again = tmp_path / "again.vcf"
    pysam.bcftools.norm("-m", "-any", "-Ov", "-o", str(again), str(path), catch_stdout=False)
    assert complaints(pysam.bcftools.norm.get_messages()) == []

    def alleles(file: Path) -> list[tuple[object, ...]]:
        with VariantReader(file) as reader:
            return [(row.pos, row.id, row.ref, row.alt, row.extent) for row in reader.sites()]

    assert sorted(alleles(again)) == sorted(alleles(panel))
    records = len(records_of(path))
    assert records == (reader.records if options.join_multiallelic else len(sites))


def test_a_phased_file_of_all_kinds_of_sites(tmp_path):
    sites = varied_sites()
    path = tmp_path / "phased.bcf"
    write_phased(path, sites, ["a", "b"], np.ones((10, 4), dtype=np.uint8))
    assert complaints(ran("bcftools", "stats", path)) == []
