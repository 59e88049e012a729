"""What a training step launches on a GPU, counted without one: the rules of counting, and the bars of the real step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import launches
import pytest
import torch

from embrag_ds.data.inputs import PanelInputs
from embrag_ds.engine.deepspeed_settings import load_training_config
from embrag_ds.engine.distributed import DistributedContext
from embrag_ds.errors import require

# Operations without a deterministic way on a GPU (torch.use_deterministic_algorithms).
NOT_DETERMINISTIC = (
    *("avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "fractional_max_pool", "max_unpool", "upsample"),
    *("reflection_pad", "nll_loss", "_ctc_loss", "_embedding_bag", "put_", "put.", "histc", "bincount", "median"),
    *("kthvalue", "grid_sampler", "cumsum"),
)  # and scatter_reduce for products: of minima and maxima, which the search takes, the order does not matter


def counted(run: Any) -> Any:
    with launches.Counting().counted() as counts:
        run()
    return counts.phases[launches.OTHER]


def test_views_and_allocations_launch_nothing() -> None:
    x = torch.ones(4, 6)
    found = counted(lambda: [torch.empty(3), x.T.unsqueeze(0)[:, 1:], x.view(-1).expand(2, 24), x.detach()])
    assert (found.launches, found.bytes) == (0, 0)


def test_an_operation_counts_once_with_what_it_reads_and_writes() -> None:
    x, y = torch.ones(100), torch.ones(100)
    size = 400
    for run, moved in (
        (lambda: x + y, 3 * size),
        (lambda: x.add_(y), 3 * size),
        (lambda: x.copy_(y), 2 * size),
        (lambda: x.zero_(), size),
        (lambda: x[:1].expand(50) * 2, 4 + 200),
    ):
        found = counted(run)
        assert (found.launches, found.bytes) == (1, moved)


@pytest.mark.parametrize(
    ("sizes", "lists", "expected"),
    [
        ([10] * 110, 1, 1),
        ([10] * 111, 1, 2),
        ([10] * 64, 2, 1),
        ([10] * 65, 2, 2),
        ([320 << 16], 1, 1),
        ([(320 << 16) + 1], 1, 2),
        ([200 << 16] * 4, 1, 3),
    ],
)
def test_lists_count_as_torch_hands_them_out(sizes: list[int], lists: int, expected: int) -> None:
    tensors = [torch.empty(size, device="meta") for size in sizes]
    assert launches._chunks([tensors] * lists) == expected


def test_a_wait_is_named_with_its_line() -> None:
    with launches.Counting().counted() as counts:
        require(torch.tensor(True), "", "")  # type: ignore[arg-type]
        torch.ones(3)[torch.tensor([True, False, True])]
    whose = {(owner, operation): place for owner, operation, place in counts.waits}
    assert whose["ours", "_local_scalar_dense.default"].startswith("embrag_ds/errors.py:")
    assert ("other", "index.Tensor") in whose


@pytest.mark.long
def test_the_step_of_v18_keeps_its_bars(
    inputs: PanelInputs, distributed: DistributedContext, cache_dir: Path, tmp_path: Path
) -> None:
    """The bars hold for any width and number of samples, because launches do not depend on them."""
    small = {"model.dims": 16, "data.validation_samples": 2, "validation.samples": 2, "retrieval.prefetch": 0}
    overrides = [f"embrag.{key}={value}" for key, value in small.items()]
    overrides += ["train_micro_batch_size_per_gpu=2", f"embrag.data.cache_dir={cache_dir}"]
    config = load_training_config("v18", overrides)
    assert config.embrag.model.layers == 12
    counts = launches.count(config, inputs, tmp_path / "run", distributed, launches.Counting())
    assert 0 < counts.phases["optimiser step"].launches <= 300
    assert launches.total(counts.phases).launches <= 2000
    assert not [wait for wait in counts.waits if wait[0] != "DeepSpeed"]
    assert not [name for _, name, _ in counts.operations if name.startswith(NOT_DETERMINISTIC)]
    # Copying and dosage run as kernels, in both directions.
    assert counts.phases["forward"].kernels >= 3 and counts.phases["backward"].kernels >= 2
