"""Exact nearest-neighbour search, one class per backend, all with the same answer up to ties.

The distance between a query and a reference haplotype is a weighted Hamming distance over the sites
the query shows::

    d(q, r) = sum over observed l of w_l [q_l != r_l],   w_l = ||e_l(ALT) - e_l(REF)||^2

which is the squared Euclidean distance of their flattened embeddings. With alleles as -1/+1 it is an
inner product: ``d = (sum_l w_l - <w q, r>) / 2``, where the reference side never changes.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from embrag_ds.errors import UserError
from embrag_ds.ops import cuda
from embrag_ds.ops.hamming_cuda import mismatch_distances

_FAISS_GPU_MOST = 2048  # faiss::gpu::getMaxKSelection()
_FAISS_GPU_SCRATCH = 64 << 20


class Search(Protocol):
    """A backend. ``packed`` says which form of the reference alleles it reads."""

    name: str
    packed: bool

    def nearest(
        self, tokens: Tensor, weights: Tensor, reference: Tensor, count: int, excluded: Tensor, k: int
    ) -> tuple[Tensor, Tensor]:
        """The ``k`` nearest reference haplotypes of each query: distances float32 [B, k], increasing, and ids
        int64 [B, k].

        ``tokens`` int64 [B, T]; ``weights`` float32 [B, T], 0 where the query hides the site; ``reference``
        alleles uint8 [T, H] with H = ``count``, or packed [T, ceil(H / 8)]; ``excluded`` int64 [B, E] names
        haplotypes that must not be found, filled up with H.
        """
        ...


def _signed(tokens: Tensor, weights: Tensor) -> Tensor:
    return weights * (2 * tokens - 1)


def _signs(alleles: Tensor) -> Tensor:
    """Alleles as -1 and +1, float32."""
    return alleles.float().mul_(2).sub_(1)


def _distance(similarity: Tensor, weights: Tensor) -> Tensor:
    return (weights.sum(1, keepdim=True) - similarity) / 2


def barred(excluded: Tensor, count: int) -> Tensor:
    """``excluded`` as a table, bool [B, H]."""
    table = torch.zeros(len(excluded), count + 1, dtype=torch.bool, device=excluded.device)
    return table.scatter_(1, excluded, True)[:, :count]


class TorchSearch:
    """One matrix product and one ``topk``, on whatever device the tensors are."""

    name = "torch"
    packed = False

    def nearest(
        self, tokens: Tensor, weights: Tensor, reference: Tensor, count: int, excluded: Tensor, k: int
    ) -> tuple[Tensor, Tensor]:
        similarity = _signed(tokens, weights) @ _signs(reference)
        similarity.masked_fill_(barred(excluded, count), -torch.inf)
        best = torch.topk(similarity, k, dim=1)
        return _distance(best.values, weights), best.indices


class FaissCpuSearch:
    """FAISS brute force on the CPU. It cannot exclude rows per query, so it fetches more and drops them."""

    name = "faiss-cpu"
    packed = False

    def nearest(
        self, tokens: Tensor, weights: Tensor, reference: Tensor, count: int, excluded: Tensor, k: int
    ) -> tuple[Tensor, Tensor]:
        import faiss

        rows = _signs(reference).T.contiguous()
        fetched = min(k + excluded.shape[1], count)
        similarity, ids = faiss.knn(
            _signed(tokens, weights).numpy(force=True),
            rows.numpy(force=True),
            fetched,
            metric=faiss.METRIC_INNER_PRODUCT,
        )
        kept, found = _without(torch.from_numpy(similarity), torch.from_numpy(ids), excluded.cpu(), k)
        return _distance(kept.to(weights.device), weights), found.to(weights.device)


class FaissGpuSearch:
    """FAISS brute force on the GPU: torch tensors in and out, on the current stream, without a host round trip.

    FAISS's resources are not thread-safe, so every collator has an instance of its own.
    """

    name = "faiss-gpu"
    packed = False

    def __init__(self) -> None:
        import faiss
        import faiss.contrib.torch_utils

        self._resources = faiss.StandardGpuResources()
        self._resources.setTempMemory(_FAISS_GPU_SCRATCH)

    def nearest(
        self, tokens: Tensor, weights: Tensor, reference: Tensor, count: int, excluded: Tensor, k: int
    ) -> tuple[Tensor, Tensor]:
        import faiss

        fetched = min(k + excluded.shape[1], count)
        if fetched > _FAISS_GPU_MOST:
            raise UserError(
                f"embrag.retrieval.backend=faiss-gpu: finds at most {_FAISS_GPU_MOST} neighbours, {fetched} are "
                "asked for; lower embrag.retrieval.k or choose backend torch"
            )
        rows = _signs(reference)
        with torch.cuda.device(weights.device):
            # The transpose of a contiguous matrix: FAISS reads it as column-major, nothing is copied.
            similarity, ids = faiss.knn_gpu(
                self._resources, _signed(tokens, weights), rows.T, fetched, metric=faiss.METRIC_INNER_PRODUCT
            )
        kept, ids = _without(similarity, ids, excluded, k)
        return _distance(kept, weights), ids


class CupySearch:
    """Our kernel over bit-packed alleles (:mod:`embrag_ds.ops.hamming_cuda`), then ``topk``."""

    name = "cupy"
    packed = True

    def nearest(
        self, tokens: Tensor, weights: Tensor, reference: Tensor, count: int, excluded: Tensor, k: int
    ) -> tuple[Tensor, Tensor]:
        distance = mismatch_distances(tokens, weights, reference, count)
        distance.masked_fill_(barred(excluded, count), torch.inf)
        best = torch.topk(distance, k, dim=1, largest=False)
        return best.values, best.indices


def _without(similarity: Tensor, ids: Tensor, excluded: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The first ``k`` columns of each row that are not excluded, in order."""
    dropped = (ids[:, :, None] == excluded[:, None, :]).any(-1)
    kept = torch.argsort(dropped.to(torch.uint8), dim=1, stable=True)[:, :k]
    return similarity.gather(1, kept), ids.gather(1, kept)


_BACKENDS: dict[str, Callable[[], Search]] = {
    "torch": TorchSearch,
    "faiss-cpu": FaissCpuSearch,
    "faiss-gpu": FaissGpuSearch,
    "cupy": CupySearch,
}


def make_search(name: str, device: torch.device) -> Search:
    """A backend for one thread's use; ``auto`` is the fastest of those present."""
    if name == "auto":
        name = "torch"
    if name == "faiss-cpu" and importlib.util.find_spec("faiss") is None:
        raise UserError(f"{_asked(name)} FAISS is not installed; install the 'cpu' extra or choose torch")
    if name in ("faiss-gpu", "cupy") and device.type != "cuda":
        raise UserError(f"{_asked(name)} there is no CUDA device here; choose torch, faiss-cpu or auto")
    if name == "faiss-gpu" and not _faiss_has_gpu():
        raise UserError(f"{_asked(name)} no FAISS built for GPUs is installed; install the 'gpu' extra or choose torch")
    if name == "cupy" and not cuda.available():
        raise UserError(f"{_asked(name)} CuPy is not installed; install the 'gpu' extra or choose torch")
    return _BACKENDS[name]()


def _asked(name: str) -> str:
    return f"embrag.retrieval.backend={name}:"


def _faiss_has_gpu() -> bool:
    if importlib.util.find_spec("faiss") is None:
        return False
    import faiss

    module: Any = faiss
    return hasattr(module, "StandardGpuResources") and module.get_num_gpus() > 0
