"""Time and memory of a few training steps: the report of ``launch/train.py --profile``, without keeping the run.

    python profiling/memory.py --deepspeed_config ds_configs/v18_cpu.json --steps 20 --out DIR
    python profiling/memory.py --deepspeed_config ds_configs/quickstart.json --steps 400 --out DIR --overhead

With ``--overhead``, blocks of steps run with and without profiling in turns. ``overhead.json`` has their wall-clock and
processor seconds. It also has the median ratio of profiled blocks to the mean of their two neighbours, with a 95 %
bootstrap interval. On a machine with other work, the processor time is the more reliable one.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from embrag_ds.cli.command import run_command
from embrag_ds.data.inputs import PanelFiles, open_inputs
from embrag_ds.engine.deepspeed_settings import load_training_config
from embrag_ds.engine.distributed import DistributedContext, start_distributed
from embrag_ds.errors import UserError
from embrag_ds.files import make_folder, write_json
from embrag_ds.runs.record import device_name
from embrag_ds.runtime.device_sampler import DeviceSampler
from embrag_ds.runtime.timeline import NO_TIMELINE, Timeline
from embrag_ds.seeds import Purpose, generator
from embrag_ds.training.profile import PROFILES, Profile
from embrag_ds.training.trainer import Trainer

logger = logging.getLogger("embrag_ds.profiling.memory")

RESAMPLES = 2000


@dataclass(frozen=True)
class Block:
    """Time of a block of micro-batches: wall-clock seconds, and processor seconds of all threads."""

    wall_s: float
    cpu_s: float


@dataclass(frozen=True)
class Ratio:
    """Median ratio of profiled blocks to their neighbours, and its 95 % bootstrap interval."""

    median: float
    interval: tuple[float, float]
    blocks: int


class Alternating(Timeline):
    """Timeline with a device sampler, on and off in turns of ``block`` micro-batches.

    ``blocks`` are the finished blocks, of which the first is off. A warm-up block before them is left out.
    """

    def __init__(self, device: torch.device, block: int):
        super().__init__(device)
        self._block = block
        self._done = -block
        self._sampler: DeviceSampler | None = None
        self._block_began = (0.0, 0.0)
        self.blocks: list[Block] = []

    def phase(self, name: str) -> AbstractContextManager[None]:
        inner = NO_TIMELINE.phase(name) if self._sampler is None else super().phase(name)
        return self._counted(inner) if name == "step" else inner

    @contextmanager
    def _counted(self, inner: AbstractContextManager[None]) -> Iterator[None]:
        with inner:
            yield
        self._done += 1
        if self._done % self._block == 0:
            self._turn()

    def _turn(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        if self._done > 0:
            wall, cpu = self._block_began
            self.blocks.append(Block(time.perf_counter() - wall, time.process_time() - cpu))
        if self._sampler is not None:
            self._sampler.stop()
            self._sampler = None
        elif self._done > 0:
            self._sampler = DeviceSampler(self._device)
            self._sampler.start()
        self._block_began = (time.perf_counter(), time.process_time())

    def close(self) -> None:
        """End the current block."""
        if self._sampler is not None:
            self._sampler.stop()


def paired_ratio(seconds: list[float]) -> Ratio:
    """Ratios of profiled blocks to the mean of their neighbours; the blocks alternate and the first is off."""
    measured = range(1, len(seconds) - 1, 2)
    ratios = np.array([2 * seconds[each] / (seconds[each - 1] + seconds[each + 1]) for each in measured])
    drawn = generator(Purpose.BOOTSTRAP, 1).choice(ratios, (RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return Ratio(float(np.median(ratios)), (float(low), float(high)), len(ratios))


def measure_overhead(
    trainer: Trainer, timeline: Alternating, block: int, distributed: DistributedContext, out: Path
) -> None:
    """Run the training, and write the cost of profiling to ``overhead.json`` in ``out``."""
    try:
        trainer.run()
    finally:
        timeline.close()
    ratios = {
        "wall": paired_ratio([each.wall_s for each in timeline.blocks]),
        "cpu": paired_ratio([each.cpu_s for each in timeline.blocks]),
    }
    result = {
        "device": device_name(distributed.device),
        "date": time.strftime("%Y-%m-%d"),
        "ratio": {name: asdict(ratio) for name, ratio in ratios.items()},
        "block_micro_batches": block,
        "blocks": [asdict(each) for each in timeline.blocks],
    }
    write_json(out / "overhead.json", result)
    for name, ratio in ratios.items():
        logger.info(
            f"with profiling, {name} time is {ratio.median:.4f} of that without ({ratio.interval[0]:.4f} to "
            f"{ratio.interval[1]:.4f}; {ratio.blocks} blocks of {block} micro-batches beside their neighbours)"
        )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", type=Path, required=True, metavar="JSON")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--panel", type=Path)
    parser.add_argument("--map", type=Path)
    parser.add_argument("--samples", type=Path)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--profile", choices=PROFILES, default="nvml", help="snapshot: allocations, too (CUDA)")
    what.add_argument("--overhead", action="store_true", help="measure what profiling costs, instead")
    parser.add_argument("--block", type=int, default=5, metavar="N", help="--overhead: micro-batches in a block")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # given by the launcher
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    steps = options.steps
    # No validation and no checkpoint but the last one, which goes with the temporary run folder.
    quiet = [f"embrag.train.{name}={steps + 1}" for name in ("eval_every", "checkpoint_every")]
    config = load_training_config(options.deepspeed_config, [*options.set, f"embrag.train.max_steps={steps}", *quiet])
    if options.overhead and steps < 4 * options.block:
        raise UserError(f"--overhead: {steps} steps are too few for blocks of {options.block}; give 4 blocks or more")
    distributed = start_distributed()
    profile = Profile(options.profile, options.out, distributed)
    files = PanelFiles(options.panel, options.map, options.samples)
    inputs = open_inputs(files, config.embrag.data)
    make_folder(options.out)
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(distributed.agree(folder)) / "run"
        if options.overhead:
            alternating = Alternating(distributed.device, options.block)
            trainer = Trainer(config, inputs, run_dir, distributed, resume=False, timeline=alternating)
            measure_overhead(trainer, alternating, options.block, distributed, options.out)
        else:
            with profile as timeline:
                Trainer(config, inputs, run_dir, distributed, resume=False, timeline=timeline).run()
        distributed.barrier()
    distributed.close()


if __name__ == "__main__":
    run_command(main)
