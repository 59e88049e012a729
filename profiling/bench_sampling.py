"""Processor time per micro-batch in the training process: sampling or hand-over, and staging.

    python profiling/bench_sampling.py [--workers 0 2] [--panel VCF] [--json FILE]

Micro-batches are drawn in this process (0 workers: sampling) or handed over by worker processes, with a pause between
two that stands for a training step. The time is that of all threads of this process, workers not included. Staging is
the collator's work on arrays of the host: the typed sites of every sample, site features, and copies into a staging
slot. Search, copying model and the launch of the device's operations are left out. The slot is in plain memory, not in
pinned one, which takes the same processor time to write. Medians are reported.
"""

from __future__ import annotations

import argparse
import json
import pickle
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

from embrag_ds.cli.command import run_command
from embrag_ds.config import load_config
from embrag_ds.data.inputs import PanelFiles, open_inputs, windowed
from embrag_ds.data.sampler import QueryBatch, TrainingSampler, split_samples
from embrag_ds.data.windows import WindowedPanel
from embrag_ds.errors import UserError
from embrag_ds.files import require_writable, write_json
from embrag_ds.retrieval import collate as host_side
from embrag_ds.runs.record import device_name
from embrag_ds.runtime.workers import InOrder, start_server


class PlainSlot:
    """A staging slot in plain memory, which arrays are copied into as into a pinned one."""

    def __init__(self, slot_bytes: int):
        self.bytes_moved = 0
        self._slot = np.zeros(slot_bytes, dtype=np.uint8)
        self._used = 0

    def begin(self) -> None:
        self._used = 0

    def put(self, array: np.ndarray) -> None:
        self.bytes_moved += array.nbytes
        end = self._used + array.nbytes
        np.copyto(self._slot[self._used : end].view(array.dtype).reshape(array.shape), array)
        self._used = -(-end // 256) * 256


def stage(queries: QueryBatch, data: WindowedPanel, slot: PlainSlot) -> None:
    """What ``RetrievalCollator`` does on the host to stage a batch where the panel is on the device."""
    window = data.windows[queries.window]
    slot.begin()
    slot.put(queries.alleles)
    slot.put(queries.masked)
    typed, count = host_side._typed_sites(queries.masked)
    features = data.features(queries.window)
    slot.put(queries.samples)  # in place of the few haplotypes that they must not retrieve
    slot.put(window.start + np.arange(window.core.start, window.core.stop))
    slot.put(np.ascontiguousarray(features.counts[:, window.core]))
    slot.put(features.position)
    slot.put(features.frequency)
    slot.put(typed)
    slot.put(count)
    host_side._near(queries.masked, count, window.core)
    observed = np.flatnonzero(~queries.masked.all(0))
    slot.put(observed)
    slot.put(window.start + observed)
    host_side._common_cuts(queries.masked[:, window.core])


def drawing_ms(sampler: TrainingSampler, workers: int, count: int, pause_s: float) -> float:
    """Processor time of this process per micro-batch drawn by ``workers``, in ms."""
    warm = 8
    drawn = InOrder(sampler, 0, count + warm, workers)
    taken = []
    for number in range(count + warm):
        began = time.process_time()
        drawn.take(number)
        time.sleep(pause_s)  # the threads of the hand-over go on behind the call
        taken.append(time.process_time() - began)
    drawn.close()
    return 1000 * statistics.median(taken[warm:])


def staging(sampler: TrainingSampler, count: int) -> tuple[float, float]:
    """Processor time of staging a micro-batch, in ms, and what is staged, in MB."""
    slot = PlainSlot(64 << 20)
    taken, moved = [], []
    for number in range(count):
        queries = pickle.loads(pickle.dumps(sampler.queries(number)))  # new memory, as from a worker
        slot.bytes_moved = 0
        began = time.thread_time()
        stage(queries, sampler.data, slot)
        taken.append(time.thread_time() - began)
        moved.append(slot.bytes_moved)
    return 1000 * statistics.median(taken), statistics.median(moved) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deepspeed_config", default="v18", help="the shapes to measure (default: v18)")
    parser.add_argument("--panel", type=Path, metavar="VCF", help="default: the simulated panel")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--micro-batches", type=int, default=100)
    parser.add_argument("--pause-ms", type=float, default=15.0, help="in place of a training step")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.micro_batches < 1 or min(options.workers) < 0:
        raise UserError("--micro-batches must be at least 1, and --workers must not be negative")
    if options.json:
        require_writable(options.json)
    torch.set_num_threads(1)
    start_server()
    run = load_config(options.deepspeed_config)
    config, samples = run.embrag, run.deepspeed["train_micro_batch_size_per_gpu"]
    inputs = open_inputs(PanelFiles(options.panel), config.data)
    training, _ = split_samples(len(inputs.panel.samples), config.data.validation_samples, config.seed)
    data = windowed(inputs, config.data, training, config.masking.array_manifest)
    sampler = TrainingSampler(data, config.masking, config.seed, samples, augmentation=config.augmentation)
    drawing = {
        str(workers): drawing_ms(sampler, workers, options.micro_batches, options.pause_ms / 1000)
        for workers in options.workers
    }
    staging_ms, staged_mb = staging(sampler, options.micro_batches)
    result = {
        "device": device_name(torch.device("cpu")),
        "date": time.strftime("%Y-%m-%d"),
        "shape": {
            "samples": sampler.group_size,
            "panel_samples": len(inputs.panel.samples),
            "longest_window": max(map(len, data.windows)),
        },
        "drawing_ms": drawing,
        "staging_ms": staging_ms,
        "staged_mb": staged_mb,
        "total_ms": {workers: taken + staging_ms for workers, taken in drawing.items()},
    }
    sys.stdout.write(json.dumps(result, indent=2) + "\n")
    if options.json:
        write_json(options.json, result)


if __name__ == "__main__":
    run_command(main)
