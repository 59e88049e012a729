"""The retrieval benchmark runs and writes its numbers; their sizes are not tested here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from embrag_ds.config_files import read_tree

PROMISED = (
    "collate_speedup",
    "reference_memory_ratio",
    "refresh_speedup",
    "throughput_during_refresh",
    "retrieval_wait_fraction",
)


@pytest.mark.long
def test_it_writes_the_promised_numbers_and_the_plot(root: Path, tmp_path: Path) -> None:
    sizes = "--reference 60 --sites 40 --dims 8 --micro-batch 4 --windows 3 --literal-windows 2 --steps 2 --rounds 1"
    small = tmp_path / "small.json"
    settings = read_tree(root / "ds_configs" / "quickstart.json")[0]
    settings["train_micro_batch_size_per_gpu"] = 2
    settings["embrag"]["data"] |= {"window_sites": 40, "overlap_sites": 0, "flank_sites": 0}
    settings["embrag"]["retrieval"]["k"] = 8
    settings["embrag"]["model"] |= {"dims": 8, "heads": 2, "layers": 1}
    small.write_text(json.dumps(settings))
    out = ["--json", tmp_path / "out.json", "--plot", tmp_path / "out.png", "--deepspeed_config", small]
    command = [
        sys.executable,
        root / "profiling" / "bench_retrieval.py",
        *sizes.split(),
        "--haplotypes",
        "50",
        "60",
        *out,
    ]
    subprocess.run(list(map(str, command)), check=True, capture_output=True, cwd=root)
    written = json.loads((tmp_path / "out.json").read_text())
    assert all(isinstance(written[name], float) for name in PROMISED)
    assert "CPU" in written["device"] or "NVIDIA" in written["device"]
    assert [row["haplotypes"] for row in written["scaling"]] == [50, 60]
    names = {*written["scaling"][0]} - {"haplotypes"}
    assert names >= {f"{name}_ms" for name in ("whole window", "local", "search torch", "search faiss-cpu")}
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
