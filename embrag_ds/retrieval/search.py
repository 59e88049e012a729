"""Exact nearest-neighbour search of reference haplotypes; the backends give the same result up to ties.

The distance of a query from a reference haplotype is a weighted Hamming distance over the sites observed in the query::

    d(q, r) = sum over observed l of w_l [q_l != r_l],   w_l = ||e_l(ALT) - e_l(REF)||^2

It equals the squared Euclidean distance of their flattened embeddings. With alleles coded as -1 and +1 it is an inner
product, ``d = (sum_l w_l - <w q, r>) / 2``, in which the reference side does not depend on the weights.
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
    """Interface of a search backend; ``packed`` is whether it reads bit-packed reference alleles."""

    name: str
    packed: bool

    def nearest(
        self, tokens: Tensor, weights: Tensor, reference: Tensor, count: int, excluded: Tensor, k: int
    ) -> tuple[Tensor, Tensor]:
        """Distances float32 [B, k], increasing, and ids int64 [B, k] of the ``k`` nearest reference haplotypes.

        ``tokens`` int64 [B, T] are the queries. ``weights`` float32 [B, T] is what a mismatch adds to a distance, 0 at
        masked sites. ``reference`` holds alleles uint8 [T, H], or packed ones [T, ceil(H / 8)]; ``count`` is H.
        ``excluded`` int64 [B, E] are haplotypes that each query must not retrieve, padded with H.
        """
        ...


def _signed(tokens: Tensor, weights: Tensor) -> Tensor:
    """Queries as weighted signs, ``w q`` of the inner product, float32 [B, T]."""
    return weights * (2 * tokens - 1)


def _signs(alleles: Tensor) -> Tensor:
    """Alleles 0 and 1 as -1 and +1, float32."""
    return alleles.float().mul_(2).sub_(1)


def _distance(similarity: Tensor, weights: Tensor) -> Tensor:
    """Distances [B, k] from inner products [B, k] and weights [B, T]."""
    return (weights.sum(1, keepdim=True) - similarity) / 2


def barred(excluded: Tensor, count: int) -> Tensor:
    """Mask bool [B, H] of the haplotypes ``excluded`` int64 [B, E], which is padded with ``count`` = H."""
    table = torch.zeros(len(excluded), count + 1, dtype=torch.bool, device=excluded.device)
    return table.scatter_(1, excluded, True)[:, :count]


class TorchSearch:
    """Search by one matrix product and one ``topk``, on the device of the tensors."""

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
    """FAISS brute-force search on the CPU.

    FAISS cannot exclude rows per query, so the search fetches E more and drops the excluded ones.
    """

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
        kept, found = _drop_excluded(torch.from_numpy(similarity), torch.from_numpy(ids), excluded.cpu(), k)
        return _distance(kept.to(weights.device), weights), found.to(weights.device)


class FaissGpuSearch:
    """FAISS brute-force search on the GPU, on the current stream and without copies to the host.

    It finds at most 2048 neighbours including the excluded ones; :meth:`nearest` raises UserError for more. FAISS's
    resources are not thread-safe, so every collator has an instance of its own.
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
            # FAISS reads the transpose of a contiguous matrix as column-major, so nothing is copied.
            similarity, ids = faiss.knn_gpu(
                self._resources, _signed(tokens, weights), rows.T, fetched, metric=faiss.METRIC_INNER_PRODUCT
            )
        kept, ids = _drop_excluded(similarity, ids, excluded, k)
        return _distance(kept, weights), ids


class CupySearch:
    """Search by the CUDA kernel over bit-packed alleles (:mod:`embrag_ds.ops.hamming_cuda`) and one ``topk``."""

    name = "cupy"
    packed = True

    def nearest(
        self, tokens: Tensor, weights: Tensor, reference: Tensor, count: int, excluded: Tensor, k: int
    ) -> tuple[Tensor, Tensor]:
        distance = mismatch_distances(tokens, weights, reference, count)
        distance.masked_fill_(barred(excluded, count), torch.inf)
        best = torch.topk(distance, k, dim=1, largest=False)
        return best.values, best.indices


def _drop_excluded(similarity: Tensor, ids: Tensor, excluded: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """First ``k`` candidates of each row that are not excluded, in order: ``similarity`` and ``ids`` [B, k]."""
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
    """Create the search backend ``name`` for use by one thread; ``auto`` is ``torch``.

    Raises UserError if the backend needs a package or a CUDA ``device`` that is not there.
    """
    if name == "auto":
        name = "torch"
    if name == "faiss-cpu" and importlib.util.find_spec("faiss") is None:
        raise UserError(f"{_setting(name)} FAISS is not installed; install the 'cpu' extra or choose torch")
    if name in ("faiss-gpu", "cupy") and device.type != "cuda":
        raise UserError(f"{_setting(name)} there is no CUDA device here; choose torch, faiss-cpu or auto")
    if name == "faiss-gpu" and not _faiss_has_gpu():
        raise UserError(
            f"{_setting(name)} no FAISS built for GPUs is installed; install the 'gpu' extra or choose torch"
        )
    if name == "cupy" and not cuda.available():
        raise UserError(f"{_setting(name)} CuPy is not installed; install the 'gpu' extra or choose torch")
    return _BACKENDS[name]()


def _setting(name: str) -> str:
    """First words of an error about the setting of the backend."""
    return f"embrag.retrieval.backend={name}:"


def _faiss_has_gpu() -> bool:
    if importlib.util.find_spec("faiss") is None:
        return False
    import faiss

    module: Any = faiss
    return hasattr(module, "StandardGpuResources") and module.get_num_gpus() > 0
