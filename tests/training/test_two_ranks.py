"""Two ranks are one run."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embrag_ds.config import RunConfig
from embrag_ds.data.inputs import PanelFiles, PanelInputs, open_inputs
from embrag_ds.engine.distributed import DistributedContext
from embrag_ds.training.trainer import Trainer
from tests.ranks import LAUNCHER, free_port
from tests.training.runs import NO_DROPOUT, STRONG, losses, timeless

pytestmark = pytest.mark.long

Metrics = Callable[..., list[dict[str, Any]]]
MakeConfig = Callable[..., RunConfig]


TWO_RANKS = """
import json, sys
from pathlib import Path
from embrag_ds.config import load_config
from embrag_ds.engine.distributed import start_distributed
from embrag_ds.data.inputs import PanelFiles, open_inputs
from embrag_ds.training.trainer import Trainer

config, panel, out = (Path(each) for each in sys.argv[-3:])
distributed = start_distributed()

def train(name, steps, resume, *overrides):
    run = load_config(config, [f"embrag.train.max_steps={steps}", *overrides])
    trainer = Trainer(run, open_inputs(PanelFiles(panel), run.embrag.data, False), out / name, distributed, resume)
    collate, seen, generations = trainer.collate, [], []
    def record(samples, step):
        batch = collate(samples, step)
        seen.append([samples.window, *samples.samples.tolist()])
        generations.append([step, batch.retrieved.generation])
        return batch
    trainer.collate = record
    trainer.run()
    return seen, generations

zero3 = ["zero_optimization.stage=3", "zero_optimization.stage3_param_persistence_threshold=0"]
seen, generations = train("whole", 4, False)
train("cut", 2, False)
train("cut", 4, True)
train("three", 4, False, *zero3)
(out / f"seen{distributed.rank}.json").write_text(json.dumps([seen, generations]))
distributed.close()
"""


def test_two_ranks_are_one_run(
    make_config: MakeConfig,
    metrics_of: Metrics,
    inputs: PanelInputs,
    distributed: DistributedContext,
    tmp_path: Path,
    root: Path,
) -> None:
    """Two ranks launched by ``deepspeed`` equal one rank with two micro-batches a step, and can be resumed."""
    refresh = 'embrag.retrieval.refresh={"every_steps": 1, "lag_steps": 1}'
    encoding = ["embrag.retrieval.encoding=refresh", refresh]
    config = make_config(*encoding, NO_DROPOUT, STRONG, "embrag.train.eval_every=4")
    (tmp_path / "shared.json").write_text(json.dumps(config.as_dict()))
    (tmp_path / "two_ranks.py").write_text(TWO_RANKS)
    script = [tmp_path / "two_ranks.py", tmp_path / "shared.json", inputs.panel.path, tmp_path]
    launched = run_deepspeed(root, "--num_accelerators", "2", *script)
    assert launched.returncode == 0, launched.stdout + launched.stderr

    recorded = [json.loads((tmp_path / f"seen{rank}.json").read_text()) for rank in (0, 1)]
    seen = [each for each, _ in recorded]
    # Both ranks publish generation 1 at step 2 and generation 2 at step 3, without communication.
    assert [generations for _, generations in recorded] == [[[0, 0], [1, 0], [2, 1], [3, 2]]] * 2
    micro_batches = [tuple(each) for rank in seen for each in rank]
    assert len(set(micro_batches)) == len(micro_batches) == 8
    assert any(a[0] != b[0] for a, b in zip(*seen, strict=True))

    whole = timeless(metrics_of("whole"))
    assert [line["step"] for line in whole] == [1, 2, 3, 4]
    assert timeless(metrics_of("cut")) == whole
    np.testing.assert_allclose(losses(metrics_of("three")), losses(whole), rtol=1e-4)
    versions = json.loads((tmp_path / "whole" / "versions.json").read_text())
    assert (versions["ranks"], versions["global_batch_samples"]) == (2, 12)

    # The script gives neither map nor samples.
    plain = open_inputs(PanelFiles(inputs.panel.path), config.embrag.data, progress=False)
    deepspeeds = {**config.deepspeed, "gradient_accumulation_steps": 2}
    train = dataclasses.replace(config.embrag.train, max_steps=4)
    one = RunConfig(dataclasses.replace(config.embrag, train=train), deepspeeds)
    Trainer(one, plain, tmp_path / "single", distributed, resume=False).run()
    single = timeless(metrics_of("single"))
    scores = [metrics_of(name, "validation")[-1]["score"] for name in ("whole", "single")]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)
    for key in ("gradient_norm", "loss"):
        of_both = [[line[key] for line in lines] for lines in (whole, single)]
        np.testing.assert_allclose(*of_both, rtol=1e-3, err_msg=key)


def run_deepspeed(root: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Call ``deepspeed`` as a user would, on a port of its own."""
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    environment |= {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [str(Path(sys.executable).with_name("deepspeed")), f"--master_port={free_port()}", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        timeout=120,
    )
