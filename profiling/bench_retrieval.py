"""Benchmark of retrieval and the reference cache beside their literal form, as ratios in one run.

    python profiling/bench_retrieval.py --json FILE [--plot FILE.png]

The literal form embeds and stores every reference haplotype, [H, L, D], with a FAISS ``IndexFlatL2`` over its flattened
rows. Its collate loops over samples, with one search per haplotype. A refresh embeds every haplotype of every window
again. Ours has packed alleles, a codebook per window, and one search per batch. Timings that are compared alternate,
after a warm-up of both; medians are reported.

The search backend is the fastest here, as with ``"backend": "auto"``. The part on growing panels also times every
backend's search alone.
"""

from __future__ import annotations

import argparse
import json
import logging
import mmap
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from machine import on_gpu, synchronise
from torch import Tensor

from embrag_ds.cli.command import run_command
from embrag_ds.config import RunConfig
from embrag_ds.data.panel import Panel, PanelSubset, Populations
from embrag_ds.data.sampler import QueryBatch
from embrag_ds.data.tokens import MASK
from embrag_ds.data.windows import WindowedPanel, make_windows
from embrag_ds.engine.deepspeed_settings import load_training_config
from embrag_ds.files import require_writable, write_json, written
from embrag_ds.model.embedding import HaplotypeEmbedding
from embrag_ds.model.imputer import Imputer
from embrag_ds.model.losses import imputation_loss
from embrag_ds.retrieval.batch import Batch
from embrag_ds.retrieval.collate import site_tensors
from embrag_ds.retrieval.prefetch import Prefetcher
from embrag_ds.retrieval.reference import Reference
from embrag_ds.retrieval.schedule import Generation, RefreshConfig
from embrag_ds.retrieval.search import backends_on, make_search
from embrag_ds.retrieval.settings import RetrievalConfig
from embrag_ds.retrieval.store import FactoredStore
from embrag_ds.runs.record import device_name
from embrag_ds.seeds import Purpose, generator, torch_seed
from embrag_ds.variants.sites import SiteTable

logger = logging.getLogger("embrag_ds.profiling.bench_retrieval")

CPU = torch.device("cpu")
DEVICE = torch.device("cuda", 0) if on_gpu() else CPU
TYPED = 0.2
_BLOCK = 50


@dataclass(frozen=True)
class Bench:
    """Shapes of the benchmark, and how many rounds, windows and steps are measured."""

    reference: int
    sites: int
    dims: int
    samples: int
    rounds: int
    windows: int
    literal_windows: int
    steps: int


def random_panel(haplotypes: int, windows: int, sites: int, seed: int = 1) -> WindowedPanel:
    """Panel of random alleles, in ``windows`` windows of ``sites`` sites without flanks."""
    total, samples = sites * windows, haplotypes // 2
    rng = generator(Purpose.BENCHMARK_PANEL, seed)
    blocks = [rng.integers(0, 256, (sites, (haplotypes + 7) // 8), dtype=np.uint8) for _ in range(windows)]
    table = SiteTable(
        ("1",),
        (0,),
        np.zeros(total, dtype=np.int32),
        np.arange(1, total + 1, dtype=np.int64) * 1000,
        ["A"] * total,
        ["C"] * total,
        ["."] * total,
    )
    panel = Panel(Path("random"), table, tuple(f"s{i}" for i in range(samples)), np.concatenate(blocks), {})
    one_population = Populations(("all",), np.zeros(samples, dtype=np.int64))
    reference = PanelSubset(panel, one_population, np.arange(samples))
    return WindowedPanel(reference, make_windows(table, sites, 0, 0), np.arange(total) / 1000.0)


def some_queries(data: WindowedPanel, window: int, samples: int, seed: int) -> QueryBatch:
    """Queries of random panel samples, all typed at the same fifth of the sites."""
    rng = generator(Purpose.BENCHMARK_QUERIES, seed)
    chosen = rng.permutation(len(data.reference.panel.samples))[:samples]
    masked = np.repeat(rng.random((1, len(data.windows[window]))) >= TYPED, samples, axis=0)
    return QueryBatch(window, chosen, data.samples_alleles(window, chosen), masked)


def make_reference(data: WindowedPanel, dims: int, queries: QueryBatch | None = None, **settings: Any) -> Reference:
    """Retrieval over ``data`` with a new embedding layer, its generation 0 encoded, and the fastest search for
    ``queries``.
    """
    embedding = HaplotypeEmbedding(dims).to(DEVICE).requires_grad_(False)
    exclusions = np.arange(len(data.reference.panel.samples))[:, None]
    reference = Reference(RetrievalConfig(**settings), data, embedding, DEVICE, exclusions)
    reference.begin_refresh(0)
    if queries is not None:
        choose_backend(reference, queries)
    return reference


def choose_backend(reference: Reference, queries: QueryBatch) -> None:
    """Settle the backend ``auto``, as training does at its start."""
    first = reference.first_search(queries)
    if first is not None and reference.backend == "auto":
        reference.backend = first.fastest()


def alternating(*functions: Callable[[], object], rounds: int) -> list[float]:
    """Median seconds of each function; they are called in turns, ``rounds`` times after a warm-up."""
    times: list[list[float]] = [[] for _ in functions]
    for round_ in range(rounds + 1):
        for function, kept in zip(functions, times, strict=True):
            synchronise(DEVICE)
            began = time.perf_counter()
            function()
            synchronise(DEVICE)
            if round_:
                kept.append(time.perf_counter() - began)
    return [statistics.median(each) for each in times]


class LiteralCollate:
    """The literal collate over one window. It runs on the CPU, where its FAISS index and its store are."""

    def __init__(self, data: WindowedPanel, dims: int):
        self._embedding = HaplotypeEmbedding(dims).requires_grad_(False)
        self._sites = site_tensors(data, 0, CPU)
        self.stored = self._embedding(torch.from_numpy(data.reference_alleles(0)).long(), self._sites)
        self.index = faiss.IndexFlatL2(self.stored[0].numel())
        self.index.add(self.stored.flatten(1).numpy())

    def __call__(self, queries: QueryBatch) -> Tensor:
        fetched = []
        for sample in range(len(queries.samples)):
            for haplotype in (2 * sample, 2 * sample + 1):
                tokens = torch.from_numpy(queries.alleles[haplotype]).long()
                tokens = tokens.masked_fill(torch.from_numpy(queries.masked[sample]), MASK)
                query = self._embedding(tokens[None], self._sites)
                _, ids = self.index.search(query.flatten(1).numpy(), 1)
                fetched.append(self.stored[ids[0, 0]])
        return torch.stack(fetched)


def bench_collate(bench: Bench) -> dict[str, Any]:
    """Time of the collate of one batch with K = 1, and memory of one generation."""
    data = random_panel(bench.reference, 1, bench.sites)
    queries = some_queries(data, 0, bench.samples, 2)
    literal = LiteralCollate(data, bench.dims)
    progress("the literal collate is built")
    reference = make_reference(data, bench.dims, queries, encoding="fixed", k=1)
    collate = reference.collator(bench.samples)
    slow, fast = alternating(lambda: literal(queries), lambda: collate(queries, 0), rounds=bench.rounds)

    packed = data.reference.panel.packed.nbytes
    numbers = bench.sites * 2 * bench.dims  # of a codebook
    full, half = (numbers * size + bench.sites * 4 + packed for size in (4, 2))
    stored = literal.stored.nbytes
    index = literal.index.ntotal * literal.index.d * 4
    assert reference.cache is not None
    # Pinned buffers, one of codes and one of weights, are whole pages.
    assert 0 <= reference.cache.host_bytes + packed - full < 2 * mmap.PAGESIZE
    return {
        "collate_speedup": slow / fast,
        "search_backend": collate.backend,
        "literal_collate_ms": 1000 * slow,
        "our_collate_ms": 1000 * fast,
        # In bf16, the precision of v18.json; FAISS keeps a copy of the vectors, always in fp32.
        "reference_memory_ratio": (stored / 2 + index) / half,
        "reference_memory_ratio_fp32": (stored + index) / full,
        "literal_bytes": {"store_fp32": stored, "store_bf16": stored // 2, "index": index},
        "our_bytes": {"fp32": full, "bf16": half},
    }


def bench_refresh(bench: Bench) -> dict[str, Any]:
    """Time of a refresh per window: ours over all windows, the literal one over ``literal_windows``."""
    data = random_panel(bench.reference, bench.windows, bench.sites)
    embedding = HaplotypeEmbedding(bench.dims).to(DEVICE).requires_grad_(False)
    kept = torch.empty(bench.reference, bench.sites, bench.dims)
    began = time.perf_counter()
    for window in range(bench.literal_windows):
        alleles = torch.from_numpy(data.reference_alleles(window)).to(DEVICE, torch.long)
        sites = site_tensors(data, window, DEVICE)
        for start in range(0, bench.reference, _BLOCK):
            kept[start : start + _BLOCK] = embedding(alleles[start : start + _BLOCK], sites)
        progress(f"encoding every haplotype, window {window + 1}/{bench.literal_windows}")
    literal = (time.perf_counter() - began) / bench.literal_windows
    reference = make_reference(data, bench.dims, encoding="fixed", k=1)
    state = [{"generation": asdict(Generation(0, 0, 0)), "weights": embedding.state_dict()}]
    (taken,) = alternating(lambda: reference.load_state_dict(state), rounds=bench.rounds)
    ours = taken / len(data)
    return {
        "refresh_speedup": literal / ours,
        "literal_refresh_ms_per_window": 1000 * literal,
        "our_refresh_ms_per_window": 1000 * ours,
        "refreshed_windows": {"literal": bench.literal_windows, "ours": len(data)},
    }


def bench_scaling(haplotypes: list[int], bench: Bench) -> list[dict[str, Any]]:
    """Time of the collate as the panel grows, with K = 128: over the whole window, and in chunks.

    Beside it the time of the search alone over the whole window, with every backend.
    """
    rows = []
    for count in haplotypes:
        data = random_panel(count, 1, bench.sites)
        queries = some_queries(data, 0, bench.samples, 2)
        collators = {}
        for name, local in (("whole window", {}), ("local", {"per_chunk": 8})):
            reference = make_reference(data, bench.dims, queries, encoding="fixed", k=128, **local)
            collators[name] = reference.collator(bench.samples)
        functions: dict[str, Callable[[], object]] = {
            name: partial(collate, queries, 0) for name, collate in collators.items()
        }
        first = make_reference(data, bench.dims, encoding="fixed", k=128).first_search(queries)
        assert first is not None
        for name in backends_on(DEVICE):
            store = FactoredStore(make_search(name, DEVICE))
            functions[f"search {name}"] = partial(store.search, first.query, first.code, first.k)
        taken = alternating(*functions.values(), rounds=bench.rounds)
        rows.append({"haplotypes": count, **{f"{n}_ms": 1000 * t for n, t in zip(functions, taken, strict=True)}})
        progress(f"{count} haplotypes: " + ", ".join(f"{value:.1f} ms" for value in list(rows[-1].values())[1:]))
    return rows


class TrainingLoop:
    """Training steps of the configured model over a random panel, with prefetched batches and due refreshes."""

    def __init__(self, config: RunConfig, bench: Bench, lag: int):
        embrag = config.embrag
        torch.manual_seed(torch_seed(Purpose.INITIAL_WEIGHTS, 1))
        self.samples = config.deepspeed["train_micro_batch_size_per_gpu"]
        self.data = random_panel(bench.reference, bench.windows, embrag.data.window_sites)
        bf16 = DEVICE.type == "cuda" and config.deepspeed.get("bf16", {}).get("enabled", False)
        self.model = Imputer(embrag.model).to(DEVICE, torch.bfloat16 if bf16 else torch.float32)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        self.loss_settings = embrag.loss
        # Every step of the first half of a block lies between a snapshot and its publication.
        refresh = RefreshConfig(at_steps=tuple(range(2 * lag, 10_000, 2 * lag)), lag_steps=lag)
        settings = RetrievalConfig(
            encoding="refresh",
            refresh=refresh,
            k=embrag.retrieval.k,
            per_chunk=embrag.retrieval.per_chunk,
            backend=embrag.retrieval.backend,
        )
        exclusions = np.arange(bench.reference // 2)[:, None]
        self.reference = Reference(settings, self.data, self.model.embedding, DEVICE, exclusions)
        self.reference.begin_refresh(0)
        choose_backend(self.reference, some_queries(self.data, 0, self.samples, 0))
        collate = self.reference.collator(self.samples, slots=4)

        def build(number: int) -> Batch:
            return collate(some_queries(self.data, number % len(self.data), self.samples, number), number)

        self.batches = Prefetcher(build, 0, 10_000, settings.prefetch)
        self.step_number = 0

    def step(self) -> None:
        """Take one training step."""
        self.reference.begin_refresh(self.step_number)
        batch = self.batches.next()
        prediction = self.model(batch)
        imputation_loss(
            prediction.logits, batch.core.alleles, batch.core.scored, batch.core.sites.frequency, self.loss_settings
        ).total.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step_number += 1

    def block(self, steps: int) -> float:
        """Seconds of ``steps`` training steps."""
        synchronise(DEVICE)
        began = time.perf_counter()
        for _ in range(steps):
            self.step()
        synchronise(DEVICE)
        return time.perf_counter() - began

    def close(self) -> None:
        """End the threads."""
        self.reference.close()
        self.batches.close()


def bench_training(config: RunConfig, bench: Bench) -> dict[str, Any]:
    """Training throughput with and without a refresh under way, in alternating blocks of ``lag`` steps."""
    lag = bench.steps
    loop = TrainingLoop(config, bench, lag)
    loop.block(2 * lag)  # warm-up; the first snapshot is due right after it
    during, without, encoding = [], [], []
    waited_before, began = loop.batches.waited_seconds, time.perf_counter()
    for round_ in range(2 * bench.rounds):
        during.append(loop.block(lag))
        without.append(loop.block(lag))
        assert loop.reference.cache is not None
        encoding.append(loop.reference.cache.refresh_seconds)
        progress(
            f"training, round {round_ + 1}/{2 * bench.rounds}: {during[-1]:.2f} s during, {without[-1]:.2f} s without"
        )
    elapsed = time.perf_counter() - began
    waited = loop.batches.waited_seconds - waited_before
    loop.close()
    return {
        # Neighbouring blocks are compared, so that a drift of the machine cancels.
        "throughput_during_refresh": statistics.median(b / a for a, b in zip(during, without, strict=True)),
        "block_s": {"during": during, "without": without},
        "retrieval_wait_fraction": waited / elapsed,
        "step_ms": 1000 * statistics.median(without) / lag,
        "steps_per_refresh": lag,
        "refresh_encoding_s": statistics.median(encoding),
        "samples": loop.samples,
        "model": f"dims {config.embrag.model.dims}, {config.embrag.model.layers} layers, k {config.embrag.retrieval.k}",
    }


def progress(text: str) -> None:
    """Log a line about progress."""
    logger.info(text)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot the time of the collate against the panel's size, both axes logarithmic."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 3.5), layout="constrained")
    for name in [key for key in rows[0] if key != "haplotypes"]:
        axes.loglog([row["haplotypes"] for row in rows], [row[name] for row in rows], "o-", label=name[:-3])
    axes.set(xlabel="reference haplotypes", ylabel="ms per batch", title=device_name(DEVICE))
    axes.legend()
    with written(path) as temporary:
        figure.savefig(temporary, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "v18.json" if DEVICE.type == "cuda" else "v18_cpu.json"
    configs = Path(__file__).resolve().parents[1] / "ds_configs"
    parser.add_argument("--deepspeed_config", type=Path, default=configs / default, help="the step to measure")
    parser.add_argument("--haplotypes", type=int, nargs="+", default=[1000, 10_000, 100_000], help="panel sizes")
    parser.add_argument("--reference", type=int, default=1000, help="reference haplotypes of the other parts")
    parser.add_argument("--sites", type=int, default=1030, help="in a window")
    parser.add_argument("--dims", type=int, default=192)
    parser.add_argument("--micro-batch", dest="samples", type=int, default=32, metavar="N", help="samples")
    parser.add_argument("--windows", type=int, default=150, help="windows of a refresh")
    parser.add_argument("--literal-windows", type=int, default=10, help="of these, encoded haplotype by haplotype")
    parser.add_argument("--steps", type=int, default=10, help="steps of a refresh (its lag)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, metavar="PNG")
    options = parser.parse_args()
    for result_file in filter(None, (options.json, options.plot)):
        require_writable(result_file)
    shapes = {name: getattr(options, name) for name in Bench.__dataclass_fields__}
    bench = Bench(**shapes)
    result = {
        "device": device_name(DEVICE),
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "shape": asdict(bench),
        **bench_collate(bench),
        **bench_refresh(bench),
        **bench_training(load_training_config(options.deepspeed_config), bench),
        "scaling": bench_scaling(options.haplotypes, bench),
    }
    sys.stdout.write(json.dumps(result, indent=2) + "\n")
    if options.json:
        write_json(options.json, result)
    if options.plot:
        draw(result["scaling"], options.plot)


if __name__ == "__main__":
    run_command(main)
