"""Count what a training step launches on a GPU, without one: operations, bytes, and waits of the host.

    python profiling/launches.py
    python profiling/launches.py --set embrag.train.compile=true
    python profiling/launches.py --deepspeed_config v18_large_batch --json counted.json

Some steps run on the CPU along the GPU's way (``as_on_gpu.py``), and every operation that torch dispatches in the last
one is seen. Views, metadata and allocations launch nothing. A kernel of ours, a copy and any other operation count 1.
A ``foreach`` or fused operation counts 1 for every chunk of tensors that torch's ``multi_tensor_apply`` hands to one
kernel, and a concatenation 1 for every 128 tensors. Attention counts 1 in each direction. Bytes are those of the
tensors that operations read and write, without any cache. A layer's share is the difference between a run with all
transformer layers and one with a layer less.

With ``embrag.train.compile`` the kernels of inductor count, as it makes them for the CPU, with a kernel for every fused
group of operations, and the operations that it leaves to torch. For a GPU it fuses somewhat differently, so this is an
estimate.

The host waits where an operation returns a value, or a size that depends on values. Such a wait is ours or DeepSpeed's
by the innermost line of either in the call stack.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import torch
from as_on_gpu import as_on_gpu
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import embrag_ds
from embrag_ds.cli.command import run_command
from embrag_ds.config import RunConfig
from embrag_ds.data.inputs import PanelFiles, PanelInputs, open_inputs
from embrag_ds.data.simulate import SimulationSettings, simulate_default
from embrag_ds.engine.deepspeed_settings import load_training_config
from embrag_ds.engine.distributed import DistributedContext, start_distributed
from embrag_ds.files import write_json
from embrag_ds.runtime.timeline import Timeline
from embrag_ds.training.trainer import Trainer

PHASES = {"collate": "batch building", "forward": "forward", "backward": "backward", "step": "optimiser step"}
"""Phases of a step, by the timeline's names; whatever lies outside of them is ``other``."""
OTHER = "other"
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique", "repeat_interleave.Tensor")
"""Operations that return a value, or the size of a result, to the host; so does indexing by a mask."""
ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")
METADATA = ("set_", "resize_", "detach_", "squeeze_", "unsqueeze_", "transpose_", "t_", "as_strided_", "record_stream")
OVERWRITES = ("copy_", "fill_", "zero_")
"""Operations that do not read what they write to."""
CHUNK, MOST_BLOCKS = 1 << 16, 320
MOST_TENSORS = (110, 64, 48, 36, 30)
"""Limits of one launch of torch's multi_tensor_apply: elements a block, blocks, and tensors by the number of lists."""
MOST_CONCATENATED = 128
_FOLDERS = {
    whose: os.path.dirname(str(module.__file__)) + os.sep
    for whose, module in (("ours", embrag_ds), ("DeepSpeed", deepspeed))
}


@dataclass
class Phase:
    """Sums over one phase: ``launches``, of which ``kernels`` are ours or inductor's, and bytes read and written."""

    launches: int = 0
    kernels: int = 0
    bytes: int = 0


@dataclass
class Counts:
    """What one step launched: sums by phase, launches by (phase, operation, place), and waits of the host by
    (whose, operation, file and line). ``unit`` is the size in bytes of a bf16 tensor [B, L, D].
    """

    phases: dict[str, Phase] = field(default_factory=lambda: {name: Phase() for name in (*PHASES.values(), OTHER)})
    operations: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    waits: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    unit: int = 1


class Counting(TorchDispatchMode):
    """Dispatch mode that counts the operations of the current thread by ``phase``, inside :meth:`counted` only."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()
        self.phase = OTHER
        self._paused = 1

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """True, so that compiled code runs as such; what it calls of torch is dispatched, and counted, all the same."""
        return True

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = str(function).removeprefix("aten.")
        if not self._paused and name.split(".")[0] not in ALLOCATIONS:
            self._count(function, name, args, kwargs or {}, result)
        return result

    @contextmanager
    def counted(self) -> Iterator[Counts]:
        """Context that is counted; yields what will hold the counts."""
        self.counts = Counts()
        self._paused -= 1
        try:
            with self:
                yield self.counts
        finally:
            self._paused += 1

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Context within it in which nothing is counted."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    def launched(self, kernel: str, tensors: list[Tensor]) -> None:
        """Count a kernel that is no operation of torch's."""
        if not self._paused:
            self._add(kernel, 1, sum(map(_bytes, tensors)), kernel=True)

    def _count(self, function: Any, name: str, args: Any, kwargs: Any, result: Any) -> None:
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        by_truth = name.startswith("index") and any(each.dtype == torch.bool for each in given[1:])
        if name.startswith(WAITS) or by_truth:
            whose, place = _innermost()
            self.counts.waits[whose, name, place] += 1
        made = [each for each in tree_leaves(result) if isinstance(each, Tensor)]
        written = _written(function, args, kwargs)
        storages = {each.untyped_storage()._cdata for each in given}
        fresh = [each for each in made if each.untyped_storage()._cdata not in storages]
        if name.split(".")[0] in METADATA or not (written or fresh or name.startswith("_local_scalar")):
            return
        reads = [each for each in given if not (name.startswith(OVERWRITES) and each is written[0])]
        launches = _chunks(args) if name.startswith(("_foreach", "_fused")) else 1
        if name.startswith(("cat", "stack")):
            launches = -(-len(args[0]) // MOST_CONCATENATED)
        self._add(name, launches, sum(map(_bytes, [*reads, *written, *fresh])), kernel=False)

    def _add(self, name: str, launches: int, moved: int, kernel: bool) -> None:
        phase = self.counts.phases[self.phase]
        phase.launches += launches
        phase.kernels += launches if kernel else 0
        phase.bytes += moved
        self.counts.operations[self.phase, name, _innermost()[1]] += launches


def _bytes(tensor: Tensor) -> int:
    """Bytes of a tensor's elements, without the repetitions of an expanded one."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(size if stride else 1 for size, stride in sizes) * tensor.itemsize


def _written(function: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Tensors among the arguments that ``function`` writes to."""
    named = dict(zip((each.name for each in function._schema.arguments), args, strict=False)) | kwargs
    marked = [each.name for each in function._schema.arguments if each.alias_info and each.alias_info.is_write]
    return [each for name in marked for each in tree_leaves(named.get(name)) if isinstance(each, Tensor)]


def _chunks(args: Any) -> int:
    """Launches of ``multi_tensor_apply`` for lists of tensors, by its limits on tensors and blocks."""
    lists = [each for each in args if isinstance(each, list | tuple) and each and isinstance(each[0], Tensor)]
    most = MOST_TENSORS[min(len(lists), len(MOST_TENSORS)) - 1]
    launches = tensors = blocks = 0
    for tensor in lists[0]:
        tensors += 1
        for _ in range(-(-tensor.numel() // CHUNK)):
            blocks += 1
            if blocks == MOST_BLOCKS:
                launches, blocks, tensors = launches + 1, 0, 1
        if tensors == most and blocks:
            launches, blocks, tensors = launches + 1, 0, 0
    return launches + (1 if blocks else 0)


def _innermost() -> tuple[str, str]:
    """Whose the innermost line of ours or DeepSpeed's in the call stack is, and its file and line.

    In the backward pass, the operation of a node of autograd's belongs to the line that made the node.
    """
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        for whose, folder in _FOLDERS.items():
            if file.startswith(folder):
                node: Any = torch._C._current_autograd_node() if whose == "DeepSpeed" else None
                made = [] if node is None else node.metadata.get("traceback_", [])
                lines = [each for text in made for each in text.splitlines() if f"{_FOLDERS['ours']}" in each]
                if lines:
                    file, line = lines[-1].split('"')[1], lines[-1].split("line ")[1].split(",")[0]
                    return "ours", f"{_short(file)}:{line}"
                return whose, f"{_short(file)}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "other", "elsewhere"


def _short(file: str) -> str:
    """Path from the package's folder on."""
    for folder in _FOLDERS.values():
        if file.startswith(folder):
            return Path(file).relative_to(Path(folder).parent).as_posix()
    return file


class PhaseNames(Timeline):
    """Timeline that measures nothing and tells ``counting`` which phase the step is in."""

    def __init__(self, counting: Counting):
        super().__init__(torch.device("cpu"))
        self._counting = counting

    def phase(self, name: str) -> AbstractContextManager[None]:
        return self._named(PHASES[name]) if name in PHASES else nullcontext()

    @contextmanager
    def _named(self, phase: str) -> Iterator[None]:
        before, self._counting.phase = self._counting.phase, phase
        yield
        self._counting.phase = before


def count(
    config: RunConfig,
    inputs: PanelInputs,
    folder: Path,
    distributed: DistributedContext,
    counting: Counting,
    warm: int = 2,
) -> Counts:
    """Counts of one step of a run, after ``warm`` others, in which optimisers and compilers make what they keep.

    ``counting`` must be the same for all runs of a process, because compiled code is shared.
    """
    with as_on_gpu(counting.launched, counting.uncounted), _inductor_counted(counting):
        trainer = Trainer(config, inputs, folder, distributed, resume=False, timeline=PhaseNames(counting))
        batches = trainer.batches()
        interval = trainer.new_interval(batches)
        traced = torch.autograd.set_detect_anomaly(not config.embrag.train.compile, check_nan=False)
        try:
            for _ in range(warm):
                trainer.step(batches, interval)
            with traced, counting.counted() as counts:
                trainer.step(batches, interval)
            if trainer.engine.skipped_steps:
                raise RuntimeError("a step was skipped: its gradients were not finite")
        finally:
            batches.close()
            trainer.reference.close()
    sites = max(window.core_stop - window.core_start for window in trainer.sampler.data.windows)
    haplotypes = 2 * config.deepspeed["train_micro_batch_size_per_gpu"]
    counts.unit = 2 * haplotypes * sites * config.embrag.model.dims
    return counts


@contextmanager
def _inductor_counted(counting: Counting) -> Iterator[None]:
    """Count the kernels that inductor makes for the CPU, one for every fused group, whenever one runs."""
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.codegen.cpp import CppScheduling

    made = AsyncCompile.cpp_pybinding

    def counted(compiler: Any, types: Any, source: str) -> Any:
        kernel = made(compiler, types, source)

        def run(*given: Any) -> Any:
            ready = kernel.result() if hasattr(kernel, "result") else kernel
            counting.launched("kernel of inductor", [each for each in given if isinstance(each, Tensor)])
            return ready(*given)

        return run

    with (
        mock.patch.object(AsyncCompile, "cpp_pybinding", counted),
        mock.patch.object(CppScheduling, "MAX_FUSED_KERNEL_ARGS_NUM", 0),
    ):
        yield


def total(phases: dict[str, Phase]) -> Phase:
    """Sums over all phases."""
    return Phase(*(sum(getattr(each, name) for each in phases.values()) for name in ("launches", "kernels", "bytes")))


def a_layer(whole: Counts, less: Counts) -> dict[str, Phase]:
    """What one transformer layer launches, by phase: ``whole`` has one more than ``less``."""
    parts = {name: (asdict(part), asdict(less.phases[name])) for name, part in whole.phases.items()}
    return {name: Phase(**{key: more[key] - fewer[key] for key in more}) for name, (more, fewer) in parts.items()}


def report(whole: Counts, less: Counts, most: int) -> str:
    """Markdown: launches by phase, waits of the host, and the ``most`` operations that launch most."""
    lines = [
        "| phase | launches | of these ours or inductor's | MB | launches a layer | MB a layer | units a layer |",
        "|---|---|---|---|---|---|---|",
    ]
    layer = a_layer(whole, less)
    rows = {
        **{name: (whole.phases[name], layer[name]) for name in layer},
        "whole step": (total(whole.phases), total(layer)),
    }
    for name, (part, one) in rows.items():
        lines.append(
            f"| {name} | {part.launches:,} | {part.kernels:,} | {part.bytes / 1e6:,.1f} | {one.launches} | "
            f"{one.bytes / 1e6:,.1f} | {one.bytes / whole.unit:.1f} |"
        )
    lines += ["", f"A unit is a bf16 tensor of the network's width, {whole.unit / 1e6:.2f} MB.", ""]
    lines += ["| waits of the host | operation | place | times |", "|---|---|---|---|"]
    lines += [f"| {whose} | {name} | {place} | {times} |" for (whose, name, place), times in whole.waits.most_common()]
    lines += ["", "| phase | operation | place | launches |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(key)} | {times:,} |" for key, times in whole.operations.most_common(most)]
    return "\n".join(lines)


def as_json(whole: Counts, less: Counts) -> dict[str, Any]:
    """The report as a JSON tree."""
    return {
        "phases": {name: asdict(part) for name, part in whole.phases.items()},
        "whole_step": asdict(total(whole.phases)),
        "layer": {name: asdict(part) for name, part in a_layer(whole, less).items()},
        "unit_bytes": whole.unit,
        "waits": [
            dict(zip(("whose", "operation", "place"), key, strict=True), times=n) for key, n in whole.waits.items()
        ],
        "operations": [
            dict(zip(("phase", "operation", "place"), key, strict=True), launches=n)
            for key, n in whole.operations.most_common()
        ],
        "torch": torch.__version__,
    }


def parse_arguments() -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--deepspeed_config", default="v18", metavar="JSON", help="a file or a shipped name")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="repeatable")
    parser.add_argument("--samples", type=int, default=4, help="samples of a micro-batch; launches do not depend on it")
    parser.add_argument("--most", type=int, default=25, metavar="N", help="operations in the last table")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was counted")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    never = [f"embrag.train.{key}=1000000000" for key in ("max_steps", "log_every", "eval_every", "checkpoint_every")]
    overrides = [
        *options.set,
        *never,
        f"train_micro_batch_size_per_gpu={options.samples}",
        "embrag.retrieval.prefetch=0",
        "embrag.data.validation_samples=2",
        "embrag.validation.samples=2",
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = SimulationSettings(length_bp=150_000, panel_samples=60, target_samples=3, typed_spacing_bp=2_000)
        made = simulate_default(folder / "data", settings)
        overrides.append(f"embrag.data.cache_dir={folder / 'cache'}")
        config = load_training_config(options.deepspeed_config, overrides)
        distributed = start_distributed()
        inputs = open_inputs(PanelFiles(made.panel, made.genetic_map), config.embrag.data, progress=False)
        layers, counting = config.embrag.model.layers, Counting()
        fewer = load_training_config(options.deepspeed_config, [*overrides, f"embrag.model.layers={layers - 1}"])
        whole = count(config, inputs, folder / "whole", distributed, counting)
        less = count(fewer, inputs, folder / "less", distributed, counting)
        distributed.close()
    if options.json is not None:
        write_json(options.json, as_json(whole, less))
    print(report(whole, less, options.most))


if __name__ == "__main__":
    run_command(main)
