"""Exact nearest-neighbour search, one function per backend, all with the same answer up to ties.

The distance between a query and a reference haplotype is a weighted Hamming distance over the sites
the query shows::

    d(q, r) = sum over observed l of w_l [q_l != r_l],   w_l = ||e_l(ALT) - e_l(REF)||^2

which is the squared Euclidean distance of their flattened embeddings. With alleles as -1/+1 it is an
inner product: ``d = (sum_l w_l - <w q, r>) / 2``, where the reference side never changes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from embrag_ds.errors import UserError

Search = Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""(queries [B, T] float32, references [H, T] float32, excluded [B, H] bool, k)
-> (inner products [B, k] in decreasing order, ids [B, k] int64)."""


def search_torch(queries: Tensor, references: Tensor, excluded: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """One matrix product and one ``topk``, on whatever device the tensors are."""
    similarity = queries @ references.T
    similarity.masked_fill_(excluded, -torch.inf)
    best = torch.topk(similarity, k, dim=1)
    return best.values, best.indices


def search_faiss_cpu(queries: Tensor, references: Tensor, excluded: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """FAISS brute force. It cannot exclude rows per query, so it fetches as many more and drops them."""
    import faiss

    surplus = int(excluded.sum(1).max())
    similarity, ids = faiss.knn(
        queries.numpy(force=True),
        references.numpy(force=True),
        min(k + surplus, len(references)),
        metric=faiss.METRIC_INNER_PRODUCT,
    )
    dropped = np.take_along_axis(excluded.numpy(force=True), ids, axis=1)
    kept = np.argsort(dropped, axis=1, kind="stable")[:, :k]
    return (
        torch.from_numpy(np.take_along_axis(similarity, kept, axis=1)).to(queries.device),
        torch.from_numpy(np.take_along_axis(ids, kept, axis=1)).to(queries.device),
    )


_BACKENDS: dict[str, Search] = {"torch": search_torch, "faiss-cpu": search_faiss_cpu}


def resolve_backend(name: str) -> tuple[str, Search]:
    """The backend of that name and what it is called; ``auto`` is ``torch``, which is everywhere."""
    if name == "auto":
        name = "torch"
    if name == "faiss-cpu":
        try:
            import faiss  # noqa: F401
        except ImportError as fault:
            raise UserError(
                "embrag.retrieval.backend=faiss-cpu: FAISS is not installed; install the 'cpu' extra or choose torch"
            ) from fault
    return name, _BACKENDS[name]
