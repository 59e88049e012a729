"""Floating-point operations of the network, the rate that the machine reaches, and the roofline of a training step.

    python profiling/arithmetic.py [--deepspeed_config ds_configs/v18.json] [--gpu H100 H200 A100 L4]

prints for each GPU how long the parts of a step take at least. A part takes the longer of two times: that of its
operations at the GPU's rate of matrix products, and that of its bytes at the rate of its memory (Williams et al. 2009,
Commun. ACM 52:65). Bytes are those of an ideal program in bf16. It reads and writes the operands of every product once,
and fuses all else between two products into one pass. Retrieval and copying model are left out: the time of their
recursions is that of their latency.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from embrag_ds.cli.command import run_command
from embrag_ds.engine.deepspeed_settings import load_training_config
from embrag_ds.model.imputer import Imputer
from embrag_ds.model.numbers import FREQUENCY_FEATURES
from embrag_ds.model.settings import ModelConfig
from embrag_ds.training.throughput import BACKWARD, products_of_step

ROOT = Path(__file__).resolve().parent.parent
TERA = 1e12
_VALUE = 2
"""Bytes of a number in bf16."""


@dataclass(frozen=True)
class Gpu:
    """Rates of a GPU a second: ``operations`` of matrix products in bf16, and ``bytes_moved`` by its memory."""

    operations: float
    bytes_moved: float
    source: str


GPUS = {
    "H100": Gpu(798e12, 3.0e12, "measured: a product of two 8192 x 8192 matrices, a copy"),
    "H200": Gpu(788e12, 4.3e12, "measured: a product of two 8192 x 8192 matrices, a copy"),
    "A100": Gpu(312e12, 2.04e12, "data sheet, 80 GB SXM"),
    "L4": Gpu(121e12, 0.30e12, "data sheet"),
}
"""GPUs by name. Data sheets promise more than a program measures, so the times from them are too short."""


@dataclass(frozen=True)
class Part:
    """Part of a training step: its floating-point operations, and the bytes that it must move."""

    name: str
    operations: float
    bytes_moved: float

    def seconds(self, gpu: Gpu) -> float:
        """Least time on ``gpu``, in seconds."""
        return max(self.operations / gpu.operations, self.bytes_moved / gpu.bytes_moved)

    def bound(self, gpu: Gpu) -> str:
        """What limits the part on ``gpu``: ``products`` or ``memory``."""
        by_products = self.operations / gpu.operations >= self.bytes_moved / gpu.bytes_moved
        return "products" if by_products else "memory"


def parts_of_step(model: ModelConfig, haplotypes: int, sites: int, references: int = 0) -> list[Part]:
    """Parts of a training step; arguments as :func:`embrag_ds.training.throughput.products_of_step` takes them."""
    dims, wide = model.dims, model.ffn_multiple
    places = haplotypes * sites
    passed = model.layers * places * (1 + references)
    passes = 1 + BACKWARD
    operations = products_of_step(model, haplotypes, sites, references)

    def product(name: str, rows: int, inputs: int, outputs: int) -> Part:
        # Of input, output and weights, each of the three products reads two and writes the third.
        moved = rows * (inputs + outputs) + model.layers * inputs * outputs
        return Part(name, operations[name], passes * _VALUE * moved)

    def between(name: str, forward: int, backward: int) -> Part:
        """One pass over activations: values of size D that are read or written in either direction."""
        return Part(name, 0.0, _VALUE * dims * passed * (forward + backward))

    features = 2 * FREQUENCY_FEATURES
    parameters = sum(each.numel() for each in Imputer(model).parameters())
    return [
        product("queries, keys, values", passed, dims, 3 * dims),
        # Forward: queries, keys, values, output. Backward: those, the output's gradient, and three gradients.
        Part("attention", operations["attention"], _VALUE * dims * passed * (4 + 8)),
        product("output of attention", passed, dims, dims),
        product("feed-forward, in", passed, dims, wide * dims),
        product("feed-forward, out", passed, wide * dims, dims),
        # Twice a block, sum and norm: two inputs, sum and normed sum. Backward: two gradients, the sum, one result.
        between("residual sums and norms", 2 * 4, 2 * 4),
        # Queries and keys, read and written in both directions.
        between("rotation", 4, 4),
        between("GELU", 2 * wide, 3 * wide),
        Part(
            "fusion and head",
            operations["fusion and head"],
            passes * _VALUE * places * (2 * 5 * dims + features),
        ),
        # AdamW: gradient, master weight and two moments read, three of them and the bf16 weight written.
        Part("optimiser", 0.0, parameters * (4 * (4 + 3) + _VALUE)),
    ]


def report(model: ModelConfig, haplotypes: int, sites: int, references: int, names: list[str]) -> Iterator[str]:
    """Lines of a Markdown table for each GPU of ``names``."""
    parts = parts_of_step(model, haplotypes, sites, references)
    operations = sum(part.operations for part in parts)
    yield (
        f"A step of {haplotypes} haplotypes x {sites} sites: {operations / TERA:.2f} TFLOP, "
        f"{sum(part.bytes_moved for part in parts) / 1e9:.1f} GB."
    )
    for name in names:
        gpu = GPUS[name]
        least, by_products = sum(part.seconds(gpu) for part in parts), operations / gpu.operations
        yield ""
        yield f"## {name}: {gpu.operations / TERA:.0f} TFLOP/s, {gpu.bytes_moved / TERA:.2f} TB/s ({gpu.source})"
        yield ""
        yield "| part | TFLOP | GB | FLOP a byte | least ms | bound by |"
        yield "|---|---|---|---|---|---|"
        for part in parts:
            yield (
                f"| {part.name} | {part.operations / TERA:.3f} | {part.bytes_moved / 1e9:.2f} | "
                f"{part.operations / part.bytes_moved:.0f} | {1000 * part.seconds(gpu):.2f} | {part.bound(gpu)} |"
            )
        yield ""
        yield (
            f"A part is bound by products from {gpu.operations / gpu.bytes_moved:.0f} FLOP a byte on. Least time of "
            f"the step: {1000 * least:.1f} ms, of which products alone are {1000 * by_products:.1f} ms. So at most "
            f"{100 * by_products / least:.0f} % of the rate of products can be reached; 40 % are "
            f"{1000 * by_products / 0.4:.1f} ms."
        )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Roofline of a training step on a GPU.")
    parser.add_argument("--deepspeed_config", type=Path, default=ROOT / "ds_configs" / "v18.json", metavar="JSON")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="repeatable")
    parser.add_argument("--gpu", nargs="+", choices=list(GPUS), default=list(GPUS), help="default: all")
    parser.add_argument("--sites", type=int, default=930, help="of a core (default: those of the default panel)")
    options = parser.parse_args()
    if options.sites < 1:
        parser.error("--sites must be at least 1")
    return options


def main() -> None:
    options = parse_arguments()
    config = load_training_config(options.deepspeed_config, options.set)
    retrieval = config.embrag.retrieval
    haplotypes = 2 * config.deepspeed["train_micro_batch_size_per_gpu"]
    references = retrieval.token_k if retrieval.mode == "token" else 0
    for line in report(config.embrag.model, haplotypes, options.sites, references, options.gpu):
        sys.stdout.write(f"{line}\n")


if __name__ == "__main__":
    run_command(main)
