"""Memory of a training step's activations, counted without computing them.

The network runs forward and backward on fake tensors, which have a shape and a type and no memory. Every allocation
of torch, and its end, is recorded. The numba loops and CUDA kernels of the copying model take no fake tensors; here
they are replaced by functions that allocate what they allocate.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from embrag_ds.config import EmbragConfig
from embrag_ds.model import recompute
from embrag_ds.model.imputer import Imputer
from embrag_ds.model.poolings import fusions, pooling_class
from embrag_ds.ops.dosage import Carriers, DenseAlleles, FlankingSites, Neighbours
from embrag_ds.ops.li_stephens import Near
from embrag_ds.retrieval.batch import Batch
from embrag_ds.training.network import freeze

LARGE = 32 << 20
"""Size in bytes from which glibc gives memory back as soon as it is freed (its largest M_MMAP_THRESHOLD)."""


@dataclass(frozen=True)
class Traced:
    """Peaks in bytes over a step.

    ``peak`` is of all that is in use. ``held`` is what glibc holds for it: the peak of large blocks, and twice that of
    those below :data:`LARGE`, because its heap does not shrink and keeps about as much free memory as is in use at
    its peak. ``kept`` is what the forward pass leaves for the backward pass.
    """

    peak: int
    held: int
    kept: int


class Allocations(TorchDispatchMode):
    """Context that follows the memory of the tensors made inside it, but for the tensors ``given``."""

    def __init__(self, given: list[Tensor]):
        super().__init__()
        self._known = {each.untyped_storage()._cdata for each in given}
        self._given = given  # a storage that is freed could give its address to another
        self.in_use = self._small = 0
        self._peak = self._most_small = self._most_large = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for each in tree_leaves(made):
            if isinstance(each, Tensor):
                self._follow(each.untyped_storage())
        return made

    def _follow(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        self._add(storage.nbytes(), 1)
        weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._add(size, -1)

    def _add(self, size: int, sign: int) -> None:
        self.in_use += sign * size
        if size < LARGE:
            self._small += sign * size
        self._peak = max(self._peak, self.in_use)
        self._most_small = max(self._most_small, self._small)
        self._most_large = max(self._most_large, self.in_use - self._small)

    def traced(self, kept: int) -> Traced:
        """The peaks so far."""
        return Traced(self._peak, 2 * self._most_small + self._most_large, kept)


def trace_step(config: EmbragConfig, deepspeed: dict[str, Any], batch: Batch, on_gpu: bool) -> Traced:
    """Memory of the activations of one micro-batch, forward and backward.

    ``batch`` was built on a CPU. ``on_gpu`` takes the forms in which a GPU holds neighbours and passes, and the
    precision of ``deepspeed``, DeepSpeed's settings.
    """
    halves = {"bf16": torch.bfloat16, "fp16": torch.float16}
    kind = next((each for name, each in halves.items() if deepspeed.get(name, {}).get("enabled")), torch.float32)
    autocast = bool(deepspeed.get("torch_autocast", {}).get("enabled"))
    with FakeTensorMode(), _stand_ins(on_gpu):
        model = _network(config, deepspeed)
        _cast(model, kind)
        given = _fake(batch, on_gpu)
        given = _with_codebook(given, config, kind)
        followed = Allocations([*model.parameters(), *tensors_of(given)])
        with followed:
            with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
                losses = model(given, loss=config.loss)
            kept = followed.in_use
            losses.total.backward()
        return followed.traced(kept)


def _network(config: EmbragConfig, deepspeed: dict[str, Any]) -> Imputer:
    """The network as the engine sets it up, with recomputation and frozen parts."""
    model = Imputer(config.model)
    model.transformer.recompute_projections = config.train.recompute_projections
    if "activation_checkpointing" in deepspeed:
        model.transformer.recompute = recompute.checkpoint_in_graph
        model.transformer.recomputed = deepspeed["activation_checkpointing"].get("number_checkpoints")
    freeze(model, config.train.frozen)
    return model


def _cast(model: nn.Module, kind: torch.dtype) -> None:
    """``model.to(kind)``, which torch does not do for fake tensors."""
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(weight.detach().to(kind), requires_grad=weight.requires_grad))


def _with_codebook(batch: Batch, config: EmbragConfig, kind: torch.dtype) -> Batch:
    """The batch with what the reference side adds to it: a codebook, or the embeddings of a dense store."""
    retrieved, settings = batch.retrieved, config.retrieval
    if retrieved is None or settings.mode != "embedding":
        return batch
    sites, dims = batch.core.tokens.shape[1], config.model.dims
    codebook = None if settings.encoding == "live" else torch.empty(sites, 2, dims, dtype=kind)
    embeddings = torch.empty(*retrieved.ids.shape, sites, dims, dtype=kind) if settings.store == "dense" else None
    return replace(batch, retrieved=replace(retrieved, codebook=codebook, embeddings=embeddings))


def _fake(part: Any, on_gpu: bool) -> Any:
    """A record of a batch with fake tensors in place of its tensors."""
    if isinstance(part, Tensor):
        return torch.empty_strided(part.shape, part.stride(), dtype=part.dtype)
    if isinstance(part, Carriers) and on_gpu:
        rows, sites = part.offset.shape
        return DenseAlleles(torch.empty(rows, part.k, sites - 1, dtype=torch.uint8))
    if is_dataclass(part) and not isinstance(part, type):
        return replace(part, **{each.name: _fake(getattr(part, each.name), on_gpu) for each in fields(part)})
    return part


def tensors_of(part: Any) -> Iterator[Tensor]:
    """All tensors in a record and in the records within it."""
    if isinstance(part, Tensor):
        yield part
    elif is_dataclass(part):
        for each in fields(part):
            yield from tensors_of(getattr(part, each.name))


class _Posterior(torch.autograd.Function):
    """Allocations of the copying model: posterior float32 [C, M, K] and, on a GPU, both passes [C, T, K]."""

    @staticmethod
    def forward(
        ctx: Any,
        mismatch: Tensor,
        nats: Tensor,
        recombination: Tensor,
        prior: Tensor,
        place: Tensor,
        near: Near,
        on_gpu: bool,
    ) -> Tensor:
        chains, neighbours = len(nats), mismatch.shape[2]
        posterior = torch.empty(chains, near.count, neighbours)
        ratio = torch.exp(-nats.detach())
        passes = []
        if on_gpu:
            sites = near.stop + mismatch.shape[1] - near.start
            passes = [torch.empty(chains, sites, neighbours), ratio]
        ctx.save_for_backward(mismatch, nats, recombination, prior, place, posterior, *passes)
        return posterior

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        _, nats, _, prior, *_ = ctx.saved_tensors
        of_ratio, of_recombination = torch.zeros(nats.shape), torch.zeros(nats.shape)
        of_prior = torch.zeros(len(nats), *prior.shape[1:])
        gradients[0].float().contiguous()
        of_nats = -of_ratio * torch.exp(-nats)
        return None, of_nats, of_recombination, of_prior.unflatten(0, (-1, len(prior))).sum(0), None, None, None


class _Dosage(torch.autograd.Function):
    """Allocations of a copied dosage [B, L], by loops or by a kernel."""

    @staticmethod
    def forward(ctx: Any, posterior: Tensor, flanking: FlankingSites) -> Tensor:
        sites = [each.detach().contiguous() for each in (flanking.left, flanking.right, flanking.share)]
        ctx.save_for_backward(*sites)
        ctx.shape = posterior.shape
        return torch.empty(flanking.share.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradients[0].float().contiguous()
        return torch.zeros(ctx.shape), None


@contextmanager
def _stand_ins(on_gpu: bool) -> Iterator[None]:
    """Replace what takes no fake tensors, inside ``with``."""

    def posterior(
        mismatch: Tensor,
        nats: Tensor,
        recombination: Tensor,
        prior: Tensor,
        near: Near,
        place: Tensor | None = None,
    ) -> Tensor:
        place = torch.zeros(mismatch.shape[:2], dtype=torch.int64) if place is None else place
        made: Tensor = _Posterior.apply(
            mismatch, nats.clamp_max(60), recombination.clamp_min(1e-8), prior, place, near, on_gpu
        )
        return made

    def lengths(mismatch: Tensor, position: Tensor, count: Tensor, near: Near) -> Tensor:
        position.float().contiguous()
        return torch.empty(len(mismatch), near.count, mismatch.shape[2])

    def dosage(neighbours: Neighbours, weights: Tensor, flanking: FlankingSites) -> Tensor:
        made: Tensor = _Dosage.apply(weights, flanking)
        return made

    def counts(rows: Tensor, place: Tensor, places: int) -> Tensor:
        return torch.zeros(rows.shape[0], places, rows.shape[2])

    stand_ins = {
        "copying_posterior": posterior,
        "match_lengths": lengths,
        "expected_allele": dosage,
        "count_by_place": counts,
    }
    with ExitStack() as stack:
        for module in {sys.modules[pooling_class(each).__module__] for each in fusions()}:
            for name in stand_ins.keys() & vars(module).keys():
                stack.enter_context(mock.patch.object(module, name, stand_ins[name]))
        yield


def parameter_count(config: EmbragConfig, trained: bool = False) -> int:
    """Number of the network's parameters, or of those that are ``trained``."""
    with torch.device("meta"):
        model: nn.Module = _network(config, {})
    return sum(each.numel() for each in model.parameters() if each.requires_grad or not trained)
