"""Golden losses: what short runs of the shipped configurations give, step by step, on one kind of device.

``tests/golden/*.json`` holds them, and ``tests/golden/test_golden.py`` compares. A change that leaves the arithmetic
alone must not move them. One that means to moves them, and renews them:

    python -m tests.golden                         # all runs, on the GPU where there is one
    DS_ACCELERATOR=cpu python -m tests.golden v18  # one run, on the CPU
    python -m tests.golden --compare               # prints the differences and writes nothing

A file without losses (``null``) is an empty slot. The first command fills those of a GPU.

The runs have the shape of ``v18.json``, ``v18_cpu.json`` and ``quickstart.json`` at a reduced width, in fp32 with one
thread. The panel is made here, so that no other package's random numbers decide it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from embrag_ds.config import RunConfig
from embrag_ds.data.inputs import PanelFiles, PanelInputs, open_inputs
from embrag_ds.engine.deepspeed_settings import load_training_config
from embrag_ds.engine.distributed import DistributedContext
from embrag_ds.files import write_json
from embrag_ds.runs.record import METRICS, read_metrics
from embrag_ds.training.trainer import Trainer

FOLDER = Path(__file__).parent
STEPS = 15
SAMPLES, SITES = 60, 320
_FOUNDERS = 40
_SWITCH, _MUTATION = 0.03, 0.01
"""Probability at a site that a haplotype goes on as another founder, and that it differs from its founder."""
_SMALL = {
    "train_micro_batch_size_per_gpu": 6,
    "scheduler.params.warmup_num_steps": 3,
    "embrag.data.window_sites": 96,
    "embrag.data.overlap_sites": 16,
    "embrag.data.flank_sites": 48,
    "embrag.data.validation_samples": 6,
    "embrag.masking.curriculum_steps": 10,
    "embrag.masking.array_spacing_bp": [400, 1200],
    "embrag.retrieval.refresh.every_steps": 6,
    "embrag.retrieval.backend": "torch",
    "embrag.train.max_steps": STEPS,
    "embrag.train.log_every": 1,
    "embrag.train.eval_every": STEPS + 1,
    "embrag.train.checkpoint_every": STEPS,
    "embrag.train.workers": 0,
}
"""What every run has in place of its configuration's values."""
RUNS: dict[str, dict[str, Any]] = {
    "v18": {
        "bf16": None,
        "data_types": None,
        "embrag.retrieval.k": 32,
        "embrag.model.dims": 32,
        "embrag.model.layers": 2,
        "embrag.model.heads": 4,
    },
    "v18_cpu": {"embrag.retrieval.k": 48},
    "quickstart": {"embrag.retrieval.k": 24, "embrag.model.dims": 32},
}
"""Runs by the configuration that they take their settings from, with what they change in it."""
TOLERANCE = {"cpu": 2e-6, "cuda": 2e-5}
"""Largest relative difference of a step by the kind of device.

The CPU's is ten times what rounding moves: 2.4e-7 over one and two threads, torch's, MKL's and numba's instruction sets
from SSE to AVX-512. The GPU's has not been measured yet.
"""


@dataclass(frozen=True)
class Golden:
    """The losses of a run's steps, and where they come from; None where nobody has filled the slot."""

    losses: list[float] | None
    made_on: dict[str, Any] | None = None


def path_of(name: str, device: str) -> Path:
    """File of a run's losses on a kind of device."""
    return FOLDER / f"{name}-{device}.json"


def read(name: str, device: str) -> Golden:
    """The golden losses of a run."""
    return Golden(**json.loads(path_of(name, device).read_text(encoding="utf-8")))


def write(name: str, device: str, golden: Golden) -> None:
    """Keep the losses of a run."""
    write_json(path_of(name, device), vars(golden))


def configuration(name: str, cache_dir: Path, *overrides: str) -> RunConfig:
    """Settings of a run, with ``dotted.key=value`` in their place where given."""
    changed = {**_SMALL, **RUNS[name], "embrag.data.cache_dir": str(cache_dir)}
    return load_training_config(name, [*(f"{key}={json.dumps(value)}" for key, value in changed.items()), *overrides])


def haplotypes() -> np.ndarray:
    """Alleles uint8 [2 SAMPLES, SITES] of haplotypes that copy a few founders, of which most variants are rare."""
    rng = np.random.default_rng(18)
    share = rng.random(SITES) ** 3 * 0.5
    founders = rng.random((_FOUNDERS, SITES)) < share
    founders[0, ~founders.any(axis=0)] = True
    rows = 2 * SAMPLES
    new = rng.random((rows, SITES)) < _SWITCH
    new[:, 0] = True
    drawn = (rng.random((rows, SITES)) * _FOUNDERS).astype(np.int64)
    since = np.maximum.accumulate(np.where(new, np.arange(SITES), 0), axis=1)
    founder = np.take_along_axis(drawn, since, axis=1)
    alleles = founders[founder, np.arange(SITES)] ^ (rng.random((rows, SITES)) < _MUTATION)
    return alleles.astype(np.uint8)


def panel_inputs(folder: Path) -> PanelInputs:
    """The panel, written and opened in ``folder``."""
    alleles = haplotypes()
    names = "\t".join(f"s{number}" for number in range(SAMPLES))
    header = (
        '##fileformat=VCFv4.2\n##contig=<ID=1>\n##FORMAT=<ID=GT,Number=1,Type=String,Description="Genotype">\n'
        f"#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\tFORMAT\t{names}\n"
    )
    lines = []
    for site in range(SITES):
        calls = "\t".join(f"{one}|{other}" for one, other in alleles[:, site].reshape(-1, 2))
        lines.append(f"1\t{1000 + 400 * site}\t.\tA\tG\t.\t.\t.\tGT\t{calls}\n")
    path = folder / "panel.vcf"
    path.write_text(header + "".join(lines), encoding="utf-8")
    settings = configuration("quickstart", folder / "cache").embrag.data
    return open_inputs(PanelFiles(path, cm_per_mb=1.0), settings, progress=False)


def losses_of(
    name: str, inputs: PanelInputs, distributed: DistributedContext, folder: Path, *overrides: str
) -> list[float]:
    """Losses of a run's steps, computed now with torch's number of threads; the run folder is made in ``folder``."""
    on_gpu = distributed.device.type == "cuda"
    exact = f"embrag.train.deterministic={json.dumps(on_gpu)}"  # a CPU is so anyway
    settings = configuration(name, folder / "cache", exact, *overrides)
    try:
        Trainer(settings, inputs, folder / name, distributed, resume=False).run()
    finally:
        torch.use_deterministic_algorithms(False)
    return [line["loss"] for line in read_metrics(folder / name / METRICS) if line["kind"] == "train"]


def fingerprint() -> str:
    """Checksum of the panel."""
    return hashlib.sha256(haplotypes().tobytes()).hexdigest()[:16]


def largest_difference(losses: list[float], golden: list[float]) -> float:
    """Largest relative difference of a step."""
    return max(abs(one - other) / abs(other) for one, other in zip(losses, golden, strict=True))
