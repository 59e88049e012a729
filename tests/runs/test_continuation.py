"""What a resumed run may change."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from embrag_ds.config import load_config
from embrag_ds.errors import UserError
from embrag_ds.runs.continuation import backend_of, changed_settings

FOLDER = Path("run")


def tree(*overrides: str) -> dict[str, Any]:
    return load_config("v18", overrides).as_dict()


@pytest.mark.parametrize(
    "change",
    [
        "embrag.train.max_steps=9",
        "embrag.train.log_every=9",
        "embrag.train.checkpoint_every=30min",
        "embrag.train.workers=3",
        "embrag.data.cache_dir=elsewhere",
        "embrag.data.windows_file=moved.txt",
        "embrag.masking.array_manifest=moved.txt",
        "embrag.retrieval.relatives=moved.txt",
        "embrag.retrieval.prefetch=0",
        "embrag.retrieval.refresh.asynchronous=false",
        "optimizer.params.lr=0.1",
        "optimizer.params.fused=false",
        "scheduler.params.total_num_steps=9",
        "zero_optimization.stage=2",
        "gradient_accumulation_steps=2",
        "gradient_clipping=2",
        "activation_checkpointing.number_checkpoints=2",
    ],
)
def test_what_may_change_is_listed(change: str) -> None:
    key = change.partition("=")[0]
    assert list(changed_settings(FOLDER, tree(), tree(change), own_schedule=True)) == [key]


@pytest.mark.parametrize(
    "change",
    [
        "embrag.seed=2",
        "embrag.data.window_sites=512",
        "embrag.data.map_scale=2",
        "embrag.masking.scope=window",
        "embrag.augmentation.typing_error=0.1",
        "embrag.retrieval.k=64",
        "embrag.retrieval.refresh.every_epochs=2",
        "embrag.model.layers=2",
        "embrag.loss.kind=focal",
        "embrag.validation.windows=2",
        'embrag.train.frozen=["embedding"]',
        "train_micro_batch_size_per_gpu=8",
        "optimizer.type=Lion",
        "optimizer.params.betas=[0.5, 0.9]",
        "optimizer.params.weight_decay=null",
        "scheduler.type=WarmupLR",
    ],
)
def test_what_decides_the_results_is_refused_by_name(change: str) -> None:
    key = change.partition("=")[0]
    with pytest.raises(
        UserError, match=rf"run: {key} differs from the checkpoint's \(.* for .*\), so the run would not"
    ):
        changed_settings(FOLDER, tree(), tree(change), own_schedule=True)


def test_nothing_has_changed() -> None:
    assert changed_settings(FOLDER, copy.deepcopy(tree()), tree(), own_schedule=False) == {}


def test_torchs_schedulers_keep_their_settings() -> None:
    with pytest.raises(UserError, match=r"scheduler\.params\.total_num_steps differs"):
        changed_settings(FOLDER, tree(), tree("scheduler.params.total_num_steps=9"), own_schedule=False)


def test_the_backend_stays() -> None:
    assert backend_of(FOLDER, "torch", "auto") == backend_of(FOLDER, "torch", "torch") == "torch"
    with pytest.raises(UserError, match=r'cupy for torch.*set it to that or to "auto"'):
        backend_of(FOLDER, "torch", "cupy")
