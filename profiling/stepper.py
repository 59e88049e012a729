"""Training run in a process of its own, whose steps are taken and measured one by one from outside.

``compare.py`` uses a :class:`Stepper` for every variant. So memory is that of the variant alone, and the variants can
take turns within one run.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import torch
from machine import on_gpu, synchronise
from torch.profiler import ProfilerActivity, profile

from embrag_ds.data.inputs import PanelFiles, open_inputs
from embrag_ds.engine.deepspeed_settings import load_training_config
from embrag_ds.engine.distributed import DistributedContext, start_distributed
from embrag_ds.runtime.device_sampler import DeviceSampler
from embrag_ds.runtime.processor import peak_resident_bytes
from embrag_ds.runtime.timeline import Span, Timeline
from embrag_ds.training.trainer import Trainer

_SAMPLE_EVERY_S = 0.02
# Large blocks are mapped and returned to the system at once, so that resident memory is what tensors hold.
_PRELOADED = ["__main__", "torch._dynamo", "deepspeed.runtime.zero.stage_1_and_2"]
"""Modules that the first step would import in every process."""
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 20)}
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Recipe:
    """A run: a configuration with overrides, on a panel."""

    config: Path
    overrides: tuple[str, ...]
    files: PanelFiles


@dataclass(frozen=True)
class Built:
    """A run that is ready: ``seconds`` to build it, of which ``encoding_s`` encoded the panel (None: nothing is
    encoded).
    """

    seconds: float
    encoding_s: float | None
    samples: int
    sites: int


@dataclass(frozen=True)
class Block:
    """Measurements of some consecutive steps, which do not wait for a GPU in between.

    ``seconds`` are those of all steps. ``activation_bytes`` is the peak above what was held before (activations and
    gradients), ``peak_bytes`` that of the whole run. ``spans`` are the steps' phases.
    """

    steps: int
    seconds: float
    activation_bytes: int
    peak_bytes: int
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class MemoryCurve:
    """Memory of a run over time: bytes above what the process held before it, at some seconds."""

    seconds: tuple[float, ...]
    held_bytes: tuple[int, ...]


@dataclass(frozen=True)
class Kernel:
    """All launches of a kernel, or copies of a kind, in some steps: their number, and their time in ms together."""

    name: str
    launches: int
    ms: float


class Stepper:
    """Handle of a process that trains by ``recipe``: call :meth:`build`, then :meth:`steps`.

    Raises ``RuntimeError`` if the process fails or dies.
    """

    def __init__(self, recipe: Recipe):
        before = {name: os.environ.get(name) for name in _ALLOCATOR}
        os.environ.update(_ALLOCATOR)
        # A server forks processes that have imported everything already. CUDA bears no fork after its first use, which
        # an import may be.
        context = get_context("spawn" if on_gpu() else "forkserver")
        context.set_forkserver_preload(_PRELOADED)
        self._pipe, theirs = context.Pipe()
        # A daemon may have no children, and on a GPU workers make the batches.
        self._process = context.Process(target=_serve, args=(theirs, recipe))  # type: ignore[attr-defined]
        self._process.start()
        # Before multiprocessing waits for it, which after a fault here would be for ever.
        atexit.register(self._process.kill)
        theirs.close()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value

    def build(self, samples: int) -> Built:
        """Build the run, once, with micro-batches of ``samples`` samples."""
        return self._request("build", samples)

    def steps(self, count: int) -> Block | None:
        """Take ``count`` steps; None if the GPU's memory does not suffice."""
        return self._request("steps", count)

    def watch(self, count: int) -> MemoryCurve:
        """Memory over time during ``count`` steps, sampled."""
        return self._request("watch", count)

    def kernels(self, count: int) -> list[Kernel]:
        """Kernels that ran on the GPU in ``count`` steps, those that took longest first."""
        return self._request("kernels", count)

    def close(self) -> None:
        """End the process."""
        if self._process.is_alive():
            self._pipe.send(("close",))
        self._process.join()

    def _request(self, *request: Any) -> Any:
        try:
            self._pipe.send(request)
            good, answer = self._pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            raise RuntimeError(f"the training process died (exit status {self._process.exitcode})") from None
        if not good:
            raise RuntimeError(f"the training process failed:\n{answer}")
        return answer


def _serve(pipe: Connection, recipe: Recipe) -> None:
    """Child process: answer requests until told to close. What training prints goes to stderr."""
    for name in _LAUNCHER:
        os.environ.pop(name, None)  # every process forms a process group of its own
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        run = _Run(recipe, Path(folder))
        while (request := _next(pipe))[0] != "close":
            try:
                pipe.send((True, getattr(run, request[0])(*request[1:])))
            except Exception:
                pipe.send((False, traceback.format_exc()))
        run.close()


def _next(pipe: Connection) -> tuple[Any, ...]:
    """Next request; ``close`` if the parent has died."""
    try:
        request: tuple[Any, ...] = pipe.recv()
    except EOFError:
        return ("close",)
    return request


class _Run:
    """The trainer in the child process, and the requests that it answers."""

    def __init__(self, recipe: Recipe, folder: Path):
        self._recipe = recipe
        self._folder = folder
        self._distributed: DistributedContext = start_distributed()
        self._inputs = open_inputs(recipe.files, load_training_config(recipe.config, recipe.overrides).embrag.data)
        self._before = _held(self._distributed.device)
        self._trainer: Trainer | None = None
        self._batches: Any = None

    def close(self) -> None:
        """End the run's threads."""
        if self._trainer is not None:
            self._trainer.reference.close()
            self._batches.close()

    def build(self, samples: int) -> Built:
        never = 1_000_000_000
        overrides = [
            *self._recipe.overrides,
            f"train_micro_batch_size_per_gpu={samples}",
            "embrag.validation.samples=2",
            "embrag.validation.windows=1",
            *(f"embrag.train.{key}={never}" for key in ("max_steps", "log_every", "eval_every", "checkpoint_every")),
        ]
        config = load_training_config(self._recipe.config, overrides)
        began = time.perf_counter()
        run_dir = self._folder / "run"
        timeline = Timeline(self._distributed.device)
        trainer = Trainer(config, self._inputs, run_dir, self._distributed, resume=False, timeline=timeline)
        cache = trainer.reference.cache
        if cache is not None:
            cache.code(0, 0)  # wait until it is encoded
        synchronise(self._distributed.device)
        seconds = time.perf_counter() - began
        self._trainer = trainer
        self._batches = trainer.batches()
        self._interval = trainer.new_interval(self._batches)
        return Built(
            seconds=seconds,
            encoding_s=None if cache is None else cache.refresh_seconds,
            samples=samples,
            sites=max(window.core_stop - window.core_start for window in trainer.sampler.data.windows),
        )

    def steps(self, count: int) -> Block | None:
        assert self._trainer is not None
        device = self._distributed.device
        _give_back(device)
        before = _held(device)
        _reset_peak(device)
        began = time.perf_counter()
        try:
            for _ in range(count):
                self._trainer.step(self._batches, self._interval)
            synchronise(device)
        except torch.cuda.OutOfMemoryError:
            return None
        seconds = time.perf_counter() - began
        peak = _peak(device)
        since = began - self._trainer.timeline.began
        spans = [span for span in self._trainer.timeline.spans() if span.start_s >= since]
        return Block(count, seconds, peak - before, peak - self._before, tuple(spans))

    def watch(self, count: int) -> MemoryCurve:
        assert self._trainer is not None
        with DeviceSampler(self._distributed.device, _SAMPLE_EVERY_S) as sampler:
            for _ in range(count):
                self._trainer.step(self._batches, self._interval)
            synchronise(self._distributed.device)
        on_gpu = self._distributed.device.type == "cuda"
        held = [each.allocated_bytes if on_gpu else each.host_bytes for each in sampler.readings]
        return MemoryCurve(
            seconds=tuple(each.seconds for each in sampler.readings),
            held_bytes=tuple((bytes_ or 0) - self._before for bytes_ in held),
        )

    def kernels(self, count: int) -> list[Kernel]:
        assert self._trainer is not None
        device = self._distributed.device
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for _ in range(count):
                self._trainer.step(self._batches, self._interval)
            synchronise(device)
        found = [
            Kernel(each.key, each.count, each.self_device_time_total / 1000)
            for each in profiler.key_averages()
            if each.self_device_time_total
        ]
        return sorted(found, key=lambda each: -each.ms)


def _give_back(device: torch.device) -> None:
    """Return freed memory to the system, so that only memory in use counts."""
    synchronise(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def _held(device: torch.device) -> int:
    """Bytes held now: in tensors on the GPU, or resident in the process."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # proc(5): the peak starts again from now


def _peak(device: torch.device) -> int:
    """Most bytes held since :func:`_reset_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = peak_resident_bytes()
    assert peak is not None
    return peak


def alternating(steppers: Mapping[str, Stepper], rounds: int, steps: int) -> dict[str, list[Block]]:
    """Blocks of ``steps`` of every stepper, in turns, so that a drift of the machine affects all alike."""
    blocks: dict[str, list[Block]] = {name: [] for name in steppers}
    for _ in range(rounds):
        for name, stepper in steppers.items():
            block = stepper.steps(steps)
            if block is None:
                raise RuntimeError("out of memory: choose fewer --samples")
            blocks[name].append(block)
    return blocks
