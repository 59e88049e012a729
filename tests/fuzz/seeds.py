"""Valid inputs, small and made in code: the files that mutations start from."""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pysam
import pysam.bcftools

from tests.fuzz.mutate import bgzf

_HEADER = """\
##fileformat=VCFv4.3
##FILTER=<ID=PASS,Description="All filters passed">
##FILTER=<ID=q10,Description="quality">
##contig=<ID=1,length=100000>
##contig=<ID=2>
##contig=<ID=X,length=50000>
##INFO=<ID=END,Number=1,Type=Integer,Description="end">
##INFO=<ID=SVLEN,Number=A,Type=Integer,Description="length">
##INFO=<ID=DR2,Number=A,Type=Float,Description="r2">
##INFO=<ID=SVTYPE,Number=1,Type=String,Description="type">
##INFO=<ID=R2,Number=1,Type=Float,Description="r2">
##INFO=<ID=IMPUTED,Number=0,Type=Flag,Description="imputed">
##INFO=<ID=IMP,Number=0,Type=Flag,Description="imputed">
##FORMAT=<ID=GT,Number=1,Type=String,Description="genotype">
##FORMAT=<ID=DP,Number=1,Type=Integer,Description="depth">
##FORMAT=<ID=DS,Number=A,Type=Float,Description="dosage">
##FORMAT=<ID=HDS,Number=2,Type=Float,Description="of each haplotype">
##FORMAT=<ID=AP1,Number=A,Type=Float,Description="of the first haplotype">
##FORMAT=<ID=AP2,Number=A,Type=Float,Description="of the second haplotype">
##FORMAT=<ID=GP,Number=G,Type=Float,Description="probabilities">
"""
_COLUMNS = "#CHROM POS ID REF ALT QUAL FILTER INFO FORMAT"
_PHASED = """\
1 100 rs1 A G . PASS . GT 0|1 1|1 0|0
1 200 . C T 50 . . GT 0|0 1|0 0|1
1 300 del GA G . . . GT 1|0 0|0 0|1
1 900 . T C . . . GT 0|0 0|1 1|1
2 50 . A C . q10 . GT 0|1 0|0 1|0
2 51 ins G GTT . . . GT 1|1 0|0 0|0
X 10 . C A . . . GT 0|1 0|1 1|1
"""
_RICH = """\
1 100 rs1 A G . PASS . GT 0|1 ./. 0/1
1 150 . A G,T . . . GT:DP 1|2:5 0/2:7 .|1:.
1 150 . A AC . . . GT 0|0 1/1 .
1 200 . T . . . . GT 0|0 0/0 ./.
1 300 sv N <DEL> . . SVTYPE=DEL;END=400 GT 0|1 1|1 0|0
1 300 sv N <DEL> . . SVTYPE=DEL;END=500;SVLEN=-200 GT 0|1 0|0 1|0
1 350 . N <CN0>,<CN2> . . SVLEN=-9,9 GT 1|2 0|0 2|2
1 400 . C *,G . . . DP:GT 3:0|1 4:2|0 .:1|1
1 400 . c g . . . GT:DP 0|1 1|1:3 ./.
1 401 . G C,<NON_REF> . . . GT 0|1 2|1 0|0
1 402 . G G]2:40] . . . GT 0|1 0|0 0|0
1 500 . A T . . . GT 0|1 1|1 0|0
1 500 . A T . . . GT 0|0 0|0 0|0
X 10 . C A . . . GT 0|1 1 0
X 20 . C A . . . GT 0/1 0 .
X 30 . C A . . . GT 1|1 0|1 1
"""
_BEAGLE = """\
1 100 rs1 A G . PASS DR2=0.9 GT:DS:AP1:AP2:GP 0|1:0.9:0.1:0.8:0.18,0.74,0.08 1|1:2:1:1:0,0,1 0|0:0:0:0:1,0,0
1 200 . C T . PASS DR2=0.5;IMP GT:DS:AP1:AP2:GP 0|0:0.2:0.1:0.1:0.81,0.18,0.01 1|0:1:1:0:0,1,0 0|1:1:0:1:0,1,0
2 50 . A C . PASS DR2=0.1;IMP GT:DS:AP1:AP2:GP 0|0:0:0:0:1,0,0 0|0:0:0:0:1,0,0 1|0:0.6:0.6:0:0.4,0.6,0
"""
_MINIMAC = """\
1 100 rs1 A G . PASS R2=0.9 HDS:GT:DS:GP 0.1,0.8:0|1:0.9:0.18,0.74,0.08 1,1:1|1:2:0,0,1 0,0:0|0:0:1,0,0
1 200 . C T . PASS R2=0.5;IMPUTED HDS:GT:DS:GP 0.1,0.1:0|0:0.2:0.81,0.18,0.01 1,0:1|0:1:0,1,0 0,1:0|1:1:0,1,0
"""
_GT_ONLY = """\
1 100 rs1 A G . PASS . GT 0|1 1|1 0|0
1 200 . C T . PASS . GT 0/1 1|0 0|1
2 50 . A C . PASS . GT 0|0 0|0 1|0
"""
_TRUTH = """\
1 100 rs1 A G . . . GT 0|1 ./. 0/1
1 200 . C T . . . GT .|1 1/1 0
2 50 . A C . . . GT . 1 1|0
2 60 . A C . . . GT:DS 0|0:0.1 0|1:1 1|0:.
"""


def vcf(records: str, samples: tuple[str, ...] = ("S1", "S2", "S3"), header: str = _HEADER) -> bytes:
    """VCF text of records whose columns are separated by blanks."""
    return (header + f"{_COLUMNS} {' '.join(samples)}\n{records}".replace(" ", "\t")).encode()


def without_contigs(text: bytes) -> bytes:
    """VCF text without ##contig lines, as Beagle writes it."""
    return b"".join(line for line in text.splitlines(keepends=True) if not line.startswith(b"##contig"))


VARIANTS = (
    vcf(_PHASED),
    vcf(_RICH),
    vcf(_RICH),
    without_contigs(vcf(_PHASED)),
    vcf(_RICH, header="##fileformat=VCFv4.4\n"),
)
IMPUTED = (vcf(_BEAGLE), vcf(_MINIMAC), vcf(_GT_ONLY), without_contigs(vcf(_BEAGLE)))
TRUTHS = (vcf(_TRUTH), vcf(_GT_ONLY), vcf(_RICH))


@functools.cache
def bcfs() -> tuple[bytes, ...]:
    """Raw BCFs, without BGZF, of files with a whole header."""
    made = []
    with tempfile.TemporaryDirectory() as folder:
        for text in (vcf(_PHASED), vcf(_RICH), *IMPUTED[:2]):
            source, target = Path(folder, "in.vcf"), Path(folder, "out.bcf")
            source.write_bytes(text)
            pysam.bcftools.view("--no-version", "-Ob", "-o", str(target), str(source), catch_stdout=False)
            made.append(gzip.decompress(target.read_bytes()))
    return tuple(made)


# --- a small imputation: panel, targets, truth and an imputed file --------------------------------------------------

SITES = 40
PANEL_SAMPLES = tuple(f"P{number}" for number in range(12))
TARGET_SAMPLES = ("S1", "S2", "S3")


@functools.cache
def imputation() -> dict[str, bytes]:
    """Files panel, target, truth and imputed; every third site is typed."""
    rng = np.random.default_rng(1)
    haplotypes = 2 * (len(PANEL_SAMPLES) + len(TARGET_SAMPLES))
    alleles = (rng.random((SITES, haplotypes)) < rng.uniform(0.1, 0.9, (SITES, 1))).astype(int)

    def text(rows: range, columns: slice, samples: tuple[str, ...], dosage: bool = False) -> bytes:
        lines = []
        for row in rows:
            pairs = alleles[row, columns].reshape(-1, 2).tolist()
            calls = [f"{a}|{b}:{0.9 * (a + b):g}" if dosage else f"{a}|{b}" for a, b in pairs]
            lines.append(f"1 {100 * (row + 1)} s{row} A C . . . {'GT:DS' if dosage else 'GT'} {' '.join(calls)}\n")
        return vcf("".join(lines), samples)

    panel, others = slice(0, 2 * len(PANEL_SAMPLES)), slice(2 * len(PANEL_SAMPLES), None)
    return {
        "panel.vcf": text(range(SITES), panel, PANEL_SAMPLES),
        "target.vcf": text(range(0, SITES, 3), others, TARGET_SAMPLES),
        "truth.vcf": text(range(SITES), others, TARGET_SAMPLES),
        "imputed.vcf": text(range(SITES), others, TARGET_SAMPLES, dosage=True),
    }


# --- text tables ----------------------------------------------------------------------------------------------------

MAPS = (
    b"1 . 0.1 1000\n1 . 0.3 2000\n1 . 0.9 4000\n2 . 0 500\n2 . 1.5 90000\n",
    b"Chromosome\tPosition(bp)\tRate(cM/Mb)\tMap(cM)\nchr1\t100\t1.1\t0.0\nchr1\t2000\t1.2\t0.5\nchr1\t4000\t0\t0.9\n",
    b"chr position COMBINED_rate(cM/Mb) Genetic_Map(cM)\n1 100 1.1 0.0\n1 2000 1.2 0.5\n1 4000 0 0.9\n",
    b"pos\tchr\tcM\n100\t1\t0.0\n2000\t1\t0.5\n4000\t1\t0.9\n",
    b"1 100 1.10 0.0\n1 2000 1.20 0.5\n1 4000 0.0 0.9\n",
    b"#chr\tpos\tcM\n1\t100\t0.0\n1\t2000\t0.5\n",
)
SAMPLES = (
    b"".join(f"{name}\t{'EUR' if number % 2 else 'AFR'}\n".encode() for number, name in enumerate(PANEL_SAMPLES)),
    b"sample\tpop\tsex\n" + b"".join(f"{name}\tpop {name[-1]}\tmale\n".encode() for name in PANEL_SAMPLES),
    b"".join(f"{name} all\n".encode() for name in PANEL_SAMPLES),
)
WINDOWS = (b"1 1 1500\n1 1400 2900\n1 2800 9999\n", b"# cores\n1\t100\t2000\n\n1\t2001\t4000\n")
MANIFESTS = (b"1 100\n1 400\n1 700\n1 5000\n", b"##fileformat=VCFv4.2\n#CHROM\tPOS\tID\n1\t100\trs1\n1\t400\t.\n")
RELATIVES = (b"P0 P1\nP2 P3\nP1 P2\n", b"P0\tP11\n\n")


# --- configurations, models, checkpoints ----------------------------------------------------------------------------

TINY = {
    "seed": 5,
    "data": {"window_sites": 16, "overlap_sites": 4, "flank_sites": 8, "validation_samples": 2, "windows_file": None},
    "masking": {
        "policies": {"array": 0.7, "random": 0.3},
        "curriculum_steps": 10,
        "array_spacing_bp": [1000, 3000],
        "random_rate": [0.3, 0.8],
    },
    "augmentation": {"typing_error": 0.01},
    "retrieval": {"mode": "embedding", "encoding": "fixed", "k": 8, "backend": "torch"},
    "model": {"dims": 8, "layers": 1, "heads": 2, "dropout": 0.1, "fusion": "copying"},
    "loss": {"rarity": 0.5},
    "train": {"max_steps": 6, "workers": 0, "patience": None, "frozen": ["embedding"], "compile": False},
    "validation": {"windows": 2, "samples": 6},
}


OVERRIDES = (
    b"embrag.model.dims=16\nembrag.train.patience=null",
    b"embrag.retrieval.refresh.every_steps=5",
    b'optimizer.params.betas=[0.9, 0.95]\nembrag.masking.policies={"random": 1.0}\nscheduler=null',
)


def configurations() -> tuple[bytes, ...]:
    """Configurations: a whole one, and one that extends a shipped one, with comments."""
    whole = {
        "train_micro_batch_size_per_gpu": 6,
        "gradient_accumulation_steps": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.003, "betas": [0.9, 0.95]}},
        "scheduler": {"type": "WarmupCosineLR", "params": {"total_num_steps": 40, "warmup_num_steps": 3}},
        "embrag": TINY,
    }
    short = {"extends": "v18", "embrag": {"retrieval": {"refresh": {"every_steps": 5}}, "train": {"patience": 3}}}
    return json.dumps(whole, indent=1).encode(), json.dumps(short, indent=1).encode()


@functools.cache
def model() -> bytes:
    """An exported model with a snapshot."""
    import torch

    from embrag_ds.config import parse_embrag
    from embrag_ds.export import ExportedModel, write_export
    from embrag_ds.model.imputer import Imputer

    config = parse_embrag(TINY, "seed")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Imputer(config.model)
    snapshot = {name: value.clone() for name, value in network.embedding.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        write_export(path, ExportedModel.of(config, network.state_dict(), snapshot))
        return path.read_bytes()


@functools.cache
def checkpoint() -> dict[str, bytes]:
    """The text of a checkpoint: the facts of its manifest, and the name of the newest one."""
    facts = {
        "step": 4,
        "files": {"weights": {"bytes": 1, "sha256": hashlib.sha256(b"w").hexdigest()}},
        "state": {
            "step": 4,
            "best_score": 0.5,
            "validations_since_best": 0,
            "validated": 2,
            "skipped_in_a_row": 0,
            "left_out": [3],
        },
        "layout": {
            "ranks": 1,
            "micro_batch": 6,
            "accumulation": 1,
            "stage": 0,
            "precision": "fp32",
            "optimizer": "adamw",
            "nvme": False,
        },
        "identity": {"samples": "a", "sites": "b"},
        "backend": "torch",
        "config": run_config(),
    }
    return {"facts.json": json.dumps(facts, indent=2).encode(), "latest": b"step4"}


def run_config() -> dict[str, Any]:
    """A run's configuration as ``config.json`` has it."""
    from dataclasses import asdict

    from embrag_ds.config import parse_embrag

    theirs = {"train_micro_batch_size_per_gpu": 6, "optimizer": {"type": "AdamW", "params": {"lr": 0.1}}}
    return {**theirs, "embrag": asdict(parse_embrag(TINY, "seed"))}


def gzipped(content: bytes) -> bytes:
    """Plain gzip, the same bytes at any time."""
    return gzip.compress(content, mtime=0)


def small_blocks(content: bytes) -> bytes:
    """Bgzipped content in blocks of some hundred bytes."""
    return bgzf(content, 700)
