"""Exact nearest-neighbour search of reference haplotypes; the backends give the same result up to ties.

The distance of a query from a reference haplotype is a weighted Hamming distance over the sites observed in the query::

    d(q, r) = sum over observed l of w_l [q_l != r_l],   w_l = ||e_l(ALT) - e_l(REF)||^2

It equals the squared Euclidean distance of their flattened embeddings. With alleles coded as -1 and +1 it is an inner
product, ``d = (sum_l w_l - <w q, r>) / 2``, in which the reference side does not depend on the weights.

A backend decides which of equally near haplotypes it returns, and in which order. So do the last bits of a sum, which
each adds up in an order of its own. A run that is to repeat exactly keeps its backend.

Memory: the alleles of T sites and H haplotypes as float32 signs would take 4 T H bytes, 11 GB for 400,000 haplotypes.
No backend holds more than :data:`SIGN_BYTES` of them at once.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from embrag_ds.errors import UserError
from embrag_ds.ops import cuda
from embrag_ds.ops.hamming_cuda import mismatch_distances

SIGN_BYTES = 256 << 20
"""Largest size in bytes of the part of the reference that is expanded to float32 signs at once."""
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
    """Alleles 0 and 1 as -1 and +1, float32, contiguous."""
    return alleles.to(torch.float32, memory_format=torch.contiguous_format).mul_(2).sub_(1)


def _parts(length: int, row_bytes: int, most: int | None = None) -> Iterator[slice]:
    """Cut ``length`` rows of ``row_bytes`` bytes into parts of at most :data:`SIGN_BYTES` and ``most`` rows.

    A part has at least one row.
    """
    size = SIGN_BYTES // row_bytes
    size = max(1, size if most is None else min(size, most))
    return (slice(start, min(start + size, length)) for start in range(0, length, size))


def _distance(similarity: Tensor, weights: Tensor) -> Tensor:
    """Distances [B, k] from inner products [B, k] and weights [B, T]."""
    return (weights.sum(1, keepdim=True) - similarity) / 2


def barred(excluded: Tensor, count: int) -> Tensor:
    """Mask bool [B, H] of the haplotypes ``excluded`` int64 [B, E], which is padded with ``count`` = H."""
    table = torch.zeros(len(excluded), count + 1, dtype=torch.bool, device=excluded.device)
    return table.scatter_(1, excluded, True)[:, :count]


def _bar(values: Tensor, excluded: Tensor, worst: float) -> None:
    """Set the entries of ``values`` float32 [B, H] at the ids ``excluded`` int64 [B, E] to ``worst``, in place.

    ``worst`` is infinity or minus infinity; ids of H are padding. It takes [B, E] of memory, not [B, H].
    """
    count = values.shape[1]
    # A padded id becomes H - 1, whose value it must leave: the reduction ignores the opposite infinity.
    entries = torch.where(excluded < count, worst, -worst)
    values.scatter_reduce_(1, excluded.clamp_max(count - 1), entries, "amax" if worst > 0 else "amin")


class TorchSearch:
    """Search by matrix products and one ``topk``, on the device of the tensors.

    The products of parts of the sites are added up. Memory peaks at :data:`SIGN_BYTES` and 4 B H bytes.
    """

    name = "torch"
    packed = False

    def nearest(
        self, tokens: Tensor, weights: Tensor, reference: Tensor, count: int, excluded: Tensor, k: int
    ) -> tuple[Tensor, Tensor]:
        signed = _signed(tokens, weights)
        first, *others = _parts(len(reference), 4 * count)
        similarity = signed[:, first] @ _signs(reference[first])
        for sites in others:
            similarity.addmm_(signed[:, sites], _signs(reference[sites]))
        _bar(similarity, excluded, -torch.inf)
        best = torch.topk(similarity, k, dim=1)
        return _distance(best.values, weights), best.indices


class FaissCpuSearch:
    """FAISS brute-force search on the CPU, over parts of the haplotypes.

    FAISS cannot exclude rows per query, so the search fetches E more and drops the excluded ones. Memory peaks at 5/4
    of :data:`SIGN_BYTES`.
    """

    name = "faiss-cpu"
    packed = False

    def nearest(
        self, tokens: Tensor, weights: Tensor, reference: Tensor, count: int, excluded: Tensor, k: int
    ) -> tuple[Tensor, Tensor]:
        import faiss

        signed = _signed(tokens, weights).numpy(force=True)

        def search(haplotypes: slice, fetched: int) -> tuple[Tensor, Tensor]:
            rows = _signs(reference[:, haplotypes].T.contiguous()).numpy(force=True)
            found = faiss.knn(signed, rows, fetched, metric=faiss.METRIC_INNER_PRODUCT)
            return torch.from_numpy(found[0]), torch.from_numpy(found[1])

        parts = _parts(count, 4 * len(reference))
        similarity, ids = _best_of_parts(search, parts, excluded.cpu(), k)
        return _distance(similarity.to(weights.device), weights), ids.to(weights.device)


class FaissGpuSearch:
    """FAISS brute-force search on the GPU, on the current stream and without copies to the host.

    It finds at most 2048 neighbours including the excluded ones; :meth:`nearest` raises UserError for more. FAISS's
    resources are not thread-safe, so every collator has an instance of its own. Memory peaks at :data:`SIGN_BYTES` and
    64 MiB of FAISS's, on the device.
    """

    name = "faiss-gpu"
    packed = False

    def __init__(self) -> None:
        import faiss
        import faiss.contrib.torch_utils

        self._resources = faiss.StandardGpuResources()
        self._resources.setTempMemory(_FAISS_GPU_SCRATCH)
        # Of its own accord FAISS pins 256 MiB for copies to the host, of which there are none here. FAISS aborts the
        # process if this comes after the first search.
        self._resources.setPinnedMemory(0)

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
        signed = _signed(tokens, weights)

        def search(haplotypes: slice, fetched: int) -> tuple[Tensor, Tensor]:
            # FAISS reads the transpose of a contiguous matrix as column-major, so nothing is copied.
            rows = _signs(reference[:, haplotypes]).T
            found: tuple[Tensor, Tensor] = faiss.knn_gpu(
                self._resources, signed, rows, fetched, metric=faiss.METRIC_INNER_PRODUCT
            )
            return found

        with torch.cuda.device(weights.device):
            parts = _parts(count, 4 * len(reference), _fitting_scratch(len(tokens), fetched))
            similarity, ids = _best_of_parts(search, parts, excluded, k)
        return _distance(similarity, weights), ids


class CupySearch:
    """Search by the CUDA kernel over bit-packed alleles (:mod:`embrag_ds.ops.hamming_cuda`) and one ``topk``.

    Nothing is expanded: memory peaks at 4 B H bytes.
    """

    name = "cupy"
    packed = True

    def nearest(
        self, tokens: Tensor, weights: Tensor, reference: Tensor, count: int, excluded: Tensor, k: int
    ) -> tuple[Tensor, Tensor]:
        distance = mismatch_distances(tokens, weights, reference, count)
        _bar(distance, excluded, torch.inf)
        best = torch.topk(distance, k, dim=1, largest=False)
        return best.values, best.indices


def _fitting_scratch(queries: int, fetched: int) -> int:
    """Largest number of haplotypes that FAISS searches within its scratch memory.

    It takes two buffers of distances (float32) and two of the ``fetched`` distances and ids (float32, int64) of every
    query. Where they do not fit, FAISS allocates them in every search, and all streams of the device wait.
    """
    return (_FAISS_GPU_SCRATCH - 2 * 12 * queries * fetched - (1 << 16)) // (2 * 4 * queries)


def _best_of_parts(
    search: Callable[[slice, int], tuple[Tensor, Tensor]], parts: Iterator[slice], excluded: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """Similarities and ids [B, k], best first, of the haplotypes that are not ``excluded`` int64 [B, E].

    ``search`` takes one of the ``parts`` of the haplotypes, and a number to fetch. It gives similarities and ids within
    the part, both [B, number], best first.
    """
    most = k + excluded.shape[1]
    found = [(part.start, *search(part, min(most, part.stop - part.start))) for part in parts]
    similarity = torch.cat([values for _, values, _ in found], dim=1)
    ids = torch.cat([start + ids for start, _, ids in found], dim=1)
    dropped = (ids[:, :, None] == excluded[:, None, :]).any(-1)
    # Stable, so that a single part keeps FAISS's order of ties.
    best = torch.sort(similarity.masked_fill_(dropped, -torch.inf), dim=1, descending=True, stable=True)
    return best.values[:, :k], ids.gather(1, best.indices[:, :k])


_BACKENDS: dict[str, Callable[[], Search]] = {
    "torch": TorchSearch,
    "faiss-cpu": FaissCpuSearch,
    "faiss-gpu": FaissGpuSearch,
    "cupy": CupySearch,
}


def backends_on(device: torch.device) -> list[str]:
    """Names of the search backends that can run on ``device`` with what is installed, ``torch`` first."""
    names = ("torch", "cupy", "faiss-gpu") if device.type == "cuda" else ("torch", "faiss-cpu")
    return [name for name in names if _missing(name, device) is None]


def make_search(name: str, device: torch.device) -> Search:
    """Create the search backend ``name`` for use by one thread.

    ``auto`` is ``torch`` where nothing has timed the backends (:mod:`embrag_ds.retrieval.fastest`). Raises UserError if
    the backend needs a package or a CUDA ``device`` that is not there.
    """
    if name == "auto":
        name = "torch"
    missing = _missing(name, device)
    if missing is not None:
        raise UserError(f"embrag.retrieval.backend={name}: {missing}")
    return _BACKENDS[name]()


def present_backend(name: str, device: torch.device) -> str:
    """The backend ``name``, or ``torch`` where it needs what is not there."""
    return name if name in ("auto", *backends_on(device)) else "torch"


def _missing(name: str, device: torch.device) -> str | None:
    """What the backend ``name`` lacks on ``device`` and how to go on, or None."""
    if name == "faiss-cpu" and importlib.util.find_spec("faiss") is None:
        return "FAISS is not installed; install the 'cpu' extra or choose torch"
    if name in ("faiss-gpu", "cupy") and device.type != "cuda":
        return "there is no CUDA device here; choose torch, faiss-cpu or auto"
    if name == "faiss-gpu" and not _faiss_has_gpu():
        return "no FAISS built for GPUs is installed; install the extra 'gpu' or 'gpu-cu12', or choose torch"
    if name == "cupy" and not cuda.available():
        return "CuPy is not installed; install the extra 'gpu' or 'gpu-cu12', or choose torch"
    return None


def _faiss_has_gpu() -> bool:
    if importlib.util.find_spec("faiss") is None:
        return False
    import faiss

    module: Any = faiss
    return hasattr(module, "StandardGpuResources") and module.get_num_gpus() > 0
