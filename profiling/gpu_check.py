"""What of the GPU path works on this machine, said in some ten seconds: the first part of ``gpu_suite.sh``.

    python profiling/gpu_check.py [--device cpu]

Each check compares what runs on the GPU with the same on the CPU, and prints one line. The exit status is 1 if one
failed. ``--device cpu`` rehearses the checks without a GPU: what is compared there is the CPU's with itself.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from embrag_ds.model.transformer import rotary_angles, rotated_heads
from embrag_ds.ops import rotation_cuda
from embrag_ds.ops.bits import pack
from embrag_ds.ops.dosage import DenseAlleles, FlankingSites, expected_allele
from embrag_ds.ops.li_stephens import Near, copying_backend, copying_posterior, match_lengths, posterior_torch
from embrag_ds.retrieval.search import make_search
from embrag_ds.runtime.device_sampler import DeviceSampler
from embrag_ds.runtime.streams import Staging
from embrag_ds.seeds import Purpose, generator

PACKAGES = ("torch", "triton", "deepspeed", "cupy-cuda13x", "cupy-cuda12x", "faiss-cuda", "faiss-gpu", "numpy", "numba")
CPU = torch.device("cpu")
HAPLOTYPES, QUERIES, FEW, TYPED, SITES = 2000, 12, 3, 301, 640

Check = Callable[[torch.device], str]


def random(*shape: int, seed: int = 1) -> Tensor:
    """Uniform random numbers in [0, 1), the same on every machine."""
    return torch.from_numpy(generator(Purpose.BENCHMARK_QUERIES, seed).random(shape, dtype=np.float32))


def agree(there: Tensor | None, here: Tensor | None, tolerance: float) -> str:
    """Text about the largest difference of a result from the CPU's; raises AssertionError above ``tolerance``."""
    assert there is not None and here is not None, "there is no result"
    worst = float((there.detach().float().cpu() - here.detach().float().cpu()).abs().max())
    assert worst <= tolerance, f"differs from the CPU's by {worst:.2g}"
    return f"within {worst:.1g} of the CPU's"


def tolerance_of(expected: Tensor | None) -> float:
    """Tolerance for sums over many sites, in proportion to the largest of them."""
    return 1e-4 * (1.0 if expected is None else 1 + float(expected.detach().abs().max()))


def versions(device: torch.device) -> str:
    """Packages, and the CUDA that torch was built for."""
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return f"{', '.join(found)}; torch's CUDA is {torch.version.cuda}"


def gpu(device: torch.device) -> str:
    """The GPU as torch sees it, and its UUID."""
    if device.type == "cpu":
        return "a CPU, to rehearse"
    properties = torch.cuda.get_device_properties(device)
    memory = properties.total_memory / 2**30
    return f"{properties.name}, {memory:.0f} GiB, sm_{properties.major}{properties.minor}, UUID {properties.uuid}"


def nvml(device: torch.device) -> str:
    """NVML finds the GPU by its UUID and gives readings."""
    with DeviceSampler(device, interval_s=0.02) as sampler:
        time.sleep(0.1)
    peaks = sampler.peaks()
    if device.type == "cuda":
        assert "device_bytes" in peaks, f"no memory in {sorted(peaks)}"
    return f"{sampler.source}; {', '.join(sorted(peaks))}"


def products(device: torch.device) -> str:
    """A product in bf16, and attention forward and backward."""
    x = random(64, 64).to(device, torch.bfloat16)
    said = agree(x @ x, (x.cpu() @ x.cpu()), 0.5)
    heads = random(2, 4, 930, 64).to(device, torch.bfloat16).requires_grad_()
    scaled_dot_product_attention(heads, heads, heads).sum().backward()
    assert heads.grad is not None and bool(heads.grad.isfinite().all()), "the gradient of attention is not finite"
    return said


def staging(device: torch.device) -> str:
    """Copies out of pinned memory."""
    slots = Staging(device, 2, 1 << 16)
    slots.begin()
    numbers = random(1000)
    there = slots.put(numbers.numpy())
    slots.end()
    return agree(there, numbers, 0.0)


def nearest_by(name: str) -> Check:
    """Check of a search backend beside one matrix product and ``topk`` on the CPU."""

    def check(device: torch.device) -> str:
        alleles = (random(TYPED, HAPLOTYPES) < 0.3).to(torch.uint8)
        tokens = (random(QUERIES, TYPED, seed=2) < 0.3).long()
        weights = random(QUERIES, TYPED, seed=3)
        excluded = torch.arange(2 * QUERIES).view(QUERIES, 2)
        search = make_search(name, device)
        found = []
        for each, there in ((search, device), (make_search("torch", CPU), CPU)):
            reference = (pack(alleles) if each.packed else alleles).to(there)
            query = tokens.to(there), weights.to(there)
            found.append(each.nearest(*query, reference, HAPLOTYPES, excluded.to(there), 64)[0])
        return agree(found[0], found[1], 0.01)

    return check


def lengths_by_torch(mismatch: Tensor, position: Tensor) -> Tensor:
    """Match lengths [B, T, K] of rows without padding, by their definition."""
    place = position[..., None].expand(mismatch.shape)
    left = torch.where(mismatch, place, position[:, :1, None]).cummax(1).values
    right = torch.where(mismatch, place, position[:, -1:, None]).flip(1).cummin(1).values.flip(1)
    return (right - left).clamp_min(0)


def copying(neighbours: int) -> Check:
    """Check of the copying model with K ``neighbours``: posteriors, gradients and match lengths."""

    def check(device: torch.device) -> str:
        mismatch = random(FEW, TYPED, neighbours) < 0.2
        numbers = [4 * random(2 * FEW, TYPED, seed=2), 0.1 * random(2 * FEW, TYPED, seed=3) + 1e-4]
        prior = torch.softmax(random(FEW, 4, neighbours, seed=4), 2)
        place = (4 * random(FEW, TYPED, seed=7)).long().sort(1).values
        first, number = 100, 60
        weight = random(2 * FEW, number, neighbours, seed=5)
        position = random(FEW, TYPED, seed=6).cumsum(1)
        count = torch.full((FEW,), TYPED)
        found: list[list[Tensor | None]] = []
        for there in (device, CPU):
            nats, jump, start = (each.to(there).detach().clone().requires_grad_() for each in (*numbers, prior))
            near = Near.same(first, number, FEW, there)
            # On the CPU torch's operations, because its compiled loops would first be compiled.
            model = posterior_torch if there.type == "cpu" else copying_posterior
            posterior = model(mismatch.to(there), nats, jump, start, near, place.to(there))
            (posterior * weight.to(there)).sum().backward()
            if there.type == "cpu":
                lengths = lengths_by_torch(mismatch, position)[:, first : first + number]
            else:
                lengths = match_lengths(mismatch.to(there), position.to(there), count.to(there), near)
            found.append([posterior, lengths, nats.grad, jump.grad, start.grad])
        said = [agree(one, other, tolerance_of(other)) for one, other in zip(*found, strict=True)]
        if device.type == "cuda":
            assert copying_backend(device) == "cuda kernel", f"the back end is {copying_backend(device)}"
        return said[0]

    return check


def rotation(device: torch.device) -> str:
    """Rotated queries and keys, and the gradient of their projection."""
    width, sites, heads = 64, 930, 4
    angles = rotary_angles(torch.linspace(-1, 2, sites), width)
    weight = random(2, sites, heads, width)
    found: list[list[Tensor | None]] = []
    for there in (device, CPU):
        leaf = random(2 * sites, 3 * heads * width, seed=2).to(there, torch.bfloat16).requires_grad_()
        query, key, value = rotated_heads(leaf * 1, angles.to(there), heads)
        ((query + 2 * key + value) * weight.to(there)).sum().backward()
        found.append([query, key, leaf.grad])
    if device.type == "cuda":
        assert rotation_cuda.serves(leaf.to(device)), "the kernels are not used"
    said = [agree(one, other, 0.05) for one, other in zip(*found, strict=True)]
    return said[0]


def dosage(device: torch.device) -> str:
    """Copied dosage and its gradient."""
    alleles = (random(QUERIES, 64, SITES) < 0.3).to(torch.uint8)
    posterior = torch.softmax(random(QUERIES, 40, 64, seed=2), -1)
    left = (random(QUERIES, SITES, seed=3) * 39).long().sort(1).values
    flanking = left, left + 1, random(QUERIES, SITES, seed=4)
    found: list[list[Tensor | None]] = []
    for there in (device, CPU):
        leaf = posterior.to(there).detach().clone().requires_grad_()
        given = FlankingSites(*(each.to(there) for each in flanking))
        result = expected_allele(DenseAlleles(alleles.to(there)), leaf, given)
        result.square().sum().backward()
        found.append([result, leaf.grad])
    said = [agree(one, other, 1e-3) for one, other in zip(*found, strict=True)]
    return said[0]


CHECKS: dict[str, Check] = {
    "versions": versions,
    "GPU": gpu,
    "NVML": nvml,
    "products, attention": products,
    "staging": staging,
    "search torch": nearest_by("torch"),
    "search faiss-gpu": nearest_by("faiss-gpu"),
    "search cupy": nearest_by("cupy"),
    **{f"copying, K {neighbours}": copying(neighbours) for neighbours in (64, 128, 300, 1536)},
    "rotation": rotation,
    "dosage": dosage,
}
ONLY_ON_A_GPU = ("search faiss-gpu", "search cupy")


def main() -> int:
    parser = argparse.ArgumentParser(description="What of the GPU path works here.")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    device = torch.device(parser.parse_args().device)
    torch.set_num_threads(1)  # what runs on the CPU is small
    broken = 0
    if device.type == "cuda":
        if not torch.cuda.is_available():
            sys.stdout.write(f"BROKEN  CUDA: torch {torch.__version__} sees no device\n")
            return 1
        device = torch.device("cuda", torch.cuda.current_device())
    for name, check in CHECKS.items():
        if device.type == "cpu" and name in ONLY_ON_A_GPU:
            sys.stdout.write(f"not rehearsed  {name}\n")
            continue
        began = time.perf_counter()
        try:
            said, word = check(device), "ok"
        except Exception as fault:  # one that is broken must not hide the others
            said, word = f"{type(fault).__name__}: {' '.join(str(fault).split())[:300]}", "BROKEN"
            broken += 1
        sys.stdout.write(f"{word}  {name}: {said} ({time.perf_counter() - began:.1f} s)\n")
        sys.stdout.flush()
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
