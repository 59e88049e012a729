"""Search backends: memory in parts, FAISS for GPUs on a stand-in with its rules, and all of them on a GPU."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from embrag_ds.errors import UserError
from embrag_ds.ops.bits import pack
from embrag_ds.retrieval import search
from embrag_ds.retrieval.dense import DenseStore
from embrag_ds.retrieval.search import FaissCpuSearch, FaissGpuSearch, Search, TorchSearch, barred, make_search
from embrag_ds.retrieval.store import _packed, first_distinct

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
Given = tuple[Tensor, Tensor, Tensor, int, Tensor, int]


def given(
    seed: int, sites: int = 50, count: int = 301, queries: int = 9, k: int = 20, whole: bool = False, excluded: int = 4
) -> Given:
    """Arguments of a search. With ``whole`` numbers as weights, sums are exact and many distances are equal."""
    maker = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 2, (queries, sites), generator=maker)
    weights = torch.rand(queries, sites, generator=maker) + 0.1
    weights = (weights.ceil() if whole else weights) * (torch.rand(queries, sites, generator=maker) < 0.7)
    reference = torch.randint(0, 2, (sites, count), generator=maker, dtype=torch.uint8)
    return tokens, weights, reference, count, torch.randint(0, count + 1, (queries, excluded), generator=maker), k


def check_nearest(found: tuple[Tensor, Tensor], asked: Given) -> None:
    """Assert that the distances are those of the ids, and those of the k nearest by a sum over sites."""
    tokens, weights, reference, count, excluded, k = asked
    explicit = (weights[:, :, None] * (tokens[:, :, None] != reference)).sum(1)
    distance, ids = found
    torch.testing.assert_close(distance, explicit.gather(1, ids), rtol=1e-4, atol=1e-3)
    allowed = explicit.masked_fill(barred(excluded, count), torch.inf).sort(dim=1).values[:, :k]
    torch.testing.assert_close(distance, allowed, rtol=1e-4, atol=1e-3)
    assert all(len(set(row)) == k for row in ids.tolist())


@pytest.fixture
def expanded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes in bytes of the signs that a search expands, in order."""
    sizes: list[int] = []
    signs = search._signs

    def counted(alleles: Tensor) -> Tensor:
        made = signs(alleles)
        sizes.append(made.nbytes)
        return made

    monkeypatch.setattr(search, "_signs", counted)
    return sizes


@pytest.mark.parametrize("sites_at_once", [1, 7, 49, 50])
def test_torch_searches_parts_of_the_sites_as_all_at_once(
    monkeypatch: pytest.MonkeyPatch, expanded: list[int], sites_at_once: int
) -> None:
    """Sums are exact, so that even the order of ties must be the same."""
    for seed in range(5):
        asked = given(seed, whole=True)
        whole = TorchSearch().nearest(*asked)
        expanded.clear()
        with monkeypatch.context() as small:
            small.setattr(search, "SIGN_BYTES", 4 * 301 * sites_at_once + 3)
            parts = TorchSearch().nearest(*asked)
        assert torch.equal(whole[0], parts[0]) and torch.equal(whole[1], parts[1])
        check_nearest(parts, asked)
    assert max(expanded) == 4 * 301 * sites_at_once and sum(expanded) == 4 * 301 * 50


@pytest.mark.parametrize("haplotypes_at_once", [1, 10, 100, 300, 301])
@pytest.mark.parametrize("whole", [True, False])
def test_faiss_searches_parts_of_the_haplotypes(
    monkeypatch: pytest.MonkeyPatch, expanded: list[int], haplotypes_at_once: int, whole: bool
) -> None:
    asked = given(haplotypes_at_once, whole=whole)
    at_once = FaissCpuSearch().nearest(*asked)
    monkeypatch.setattr(search, "SIGN_BYTES", 4 * 50 * haplotypes_at_once)
    expanded.clear()
    found = FaissCpuSearch().nearest(*asked)
    assert max(expanded) == 4 * 50 * haplotypes_at_once and sum(expanded) == 4 * 50 * 301
    check_nearest(found, asked)
    if whole:
        assert torch.equal(found[0], at_once[0])
    if haplotypes_at_once == 301:
        assert torch.equal(found[1], at_once[1])


def test_excluded_haplotypes_are_barred_and_padding_bars_none() -> None:
    for worst in (torch.inf, -torch.inf):
        values = torch.arange(12.0).view(2, 6)
        expected = values.clone()
        expected[0, 5] = expected[0, 1] = worst
        search._bar(values, torch.tensor([[6, 5, 1, 6], [6, 6, 6, 6]]), worst)
        assert torch.equal(values, expected)


def test_tables_of_local_retrieval_and_of_packing_are_made_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    from embrag_ds.retrieval import store

    maker = torch.Generator().manual_seed(1)
    candidates = torch.cat([torch.randint(0, 40, (7, 30), generator=maker), torch.arange(40).expand(7, -1)], dim=1)
    alleles = torch.randint(0, 2, (23, 41), generator=maker, dtype=torch.uint8)
    whole = first_distinct(candidates, 12, 40)
    monkeypatch.setattr(store, "_TABLE_BYTES", 4 * 40 * 2)
    assert torch.equal(first_distinct(candidates, 12, 40), whole)
    assert torch.equal(_packed(alleles), pack(alleles))


# FAISS's own Python code runs in these tests; what it calls in C++ is replaced.


class Resources:
    """Stand-in of ``faiss.StandardGpuResources``: memory is reserved at the first use, and one thread may use it."""

    def __init__(self) -> None:
        self.temporary, self.pinned = 1536 << 20, 256 << 20
        self.stream: int | None = None
        self.thread: int | None = None

    def setTempMemory(self, size: int) -> None:
        self.temporary = size

    def setPinnedMemory(self, size: int) -> None:
        assert self.thread is None, "FAISS aborts: setPinnedMemory after the first use"
        self.pinned = size

    def getDefaultStream(self, device: int) -> int:
        self.thread = self.thread or threading.get_ident()
        return self.stream or 0

    def setDefaultStream(self, device: int, stream: int) -> None:
        self.stream = stream


CURRENT_STREAM = 4711


class FaissOnGpu:
    """Stand-in of what FAISS computes on a GPU, with its rules; ``searches`` are the parameters of all searches."""

    def __init__(self) -> None:
        self.device: int | None = None
        self.searches: list[Any] = []
        self.resources: list[Resources] = []

    def make_resources(self) -> Resources:
        self.resources.append(Resources())
        return self.resources[-1]

    @contextmanager
    def on_device(self, device: object) -> Iterator[None]:
        self.device = 0
        yield
        self.device = None

    def bf_knn(self, resources: Resources, given: Any) -> None:
        assert resources.thread == threading.get_ident(), "one resources object, two threads"
        assert resources.stream == CURRENT_STREAM
        assert self.device == 0 and given.device == -1
        assert 0 < given.k <= 2048 and given.vectorType == given.queryType == "fp32" and not given.use_cuvs
        tile = min(given.numVectors, 262144)
        scratch = given.numQueries * (2 * 4 * tile + 2 * (4 + 8) * given.k)
        assert scratch <= resources.temporary, "cudaMalloc and cudaFree in every search"
        queries = matrix(given.queries, given.numQueries, given.dims, given.queriesRowMajor)
        vectors = matrix(given.vectors, given.numVectors, given.dims, given.vectorsRowMajor)
        best = torch.topk(queries @ vectors.T, given.k, dim=1)
        at(given.outDistances, (given.numQueries, given.k), ctypes.c_float)[:] = best.values.numpy()
        at(given.outIndices, (given.numQueries, given.k), ctypes.c_int64)[:] = best.indices.numpy()
        self.searches.append(given)


def at(pointer: Any, shape: tuple[int, int], kind: Any) -> np.ndarray:
    """Memory behind a pointer of FAISS's."""
    size = shape[0] * shape[1]
    return np.ctypeslib.as_array(ctypes.cast(int(pointer), ctypes.POINTER(kind)), (size,)).reshape(shape)


def matrix(pointer: Any, rows: int, columns: int, row_major: bool) -> Tensor:
    shape = (rows, columns) if row_major else (columns, rows)
    found = torch.from_numpy(at(pointer, shape, ctypes.c_float).copy())
    return found if row_major else found.T


@pytest.fixture
def faiss_on_gpu(monkeypatch: pytest.MonkeyPatch) -> FaissOnGpu:
    import faiss
    import faiss.contrib.torch_utils

    stand_in = FaissOnGpu()
    module: Any = faiss
    for name, value in {
        "StandardGpuResources": stand_in.make_resources,
        "GpuDistanceParams": SimpleNamespace,
        "DistanceDataType_F32": "fp32",
        "IndicesDataType_I64": "int64",
        "bfKnn": stand_in.bf_knn,
        "cast_integer_to_cudastream_t": lambda stream: stream,
        "get_num_gpus": lambda: 1,
    }.items():
        monkeypatch.setattr(module, name, value, raising=False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=CURRENT_STREAM))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", stand_in.on_device)
    return stand_in


@pytest.mark.parametrize("sites", [1, 50])
@pytest.mark.parametrize("haplotypes_at_once", [1, 100, 1000])
def test_faiss_on_a_gpu_takes_what_it_is_given_and_copies_nothing(
    faiss_on_gpu: FaissOnGpu, monkeypatch: pytest.MonkeyPatch, haplotypes_at_once: int, sites: int
) -> None:
    monkeypatch.setattr(search, "SIGN_BYTES", 4 * sites * haplotypes_at_once)
    asked = given(3, sites=sites)
    check_nearest(make_search("faiss-gpu", CUDA).nearest(*asked), asked)
    assert len(faiss_on_gpu.searches) == -(-301 // haplotypes_at_once)
    if sites > 1 and haplotypes_at_once > 1:
        assert not faiss_on_gpu.searches[0].vectorsRowMajor


def test_faiss_on_a_gpu_pins_no_host_memory_and_little_of_the_device(faiss_on_gpu: FaissOnGpu) -> None:
    first, second = (FaissGpuSearch() for _ in range(2))
    assert faiss_on_gpu.resources[0] is not faiss_on_gpu.resources[1]
    assert [(each.pinned, each.temporary) for each in faiss_on_gpu.resources] == [(0, 64 << 20)] * 2
    first.nearest(*given(1))
    thread = threading.Thread(target=second.nearest, args=given(1))
    thread.start()
    thread.join()
    assert len(faiss_on_gpu.searches) == 2


def test_faiss_on_a_gpu_never_runs_out_of_its_scratch_memory(
    faiss_on_gpu: FaissOnGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts are no larger than the scratch memory allows, and not much smaller."""
    monkeypatch.setattr(search, "_FAISS_GPU_SCRATCH", 1 << 20)
    asked = given(1, count=3001, queries=64)
    check_nearest(FaissGpuSearch().nearest(*asked), asked)
    assert len(faiss_on_gpu.searches) == 2


def test_faiss_on_a_gpu_finds_at_most_2048(faiss_on_gpu: FaissOnGpu) -> None:
    asked = given(1, count=3000, k=2044)
    check_nearest(FaissGpuSearch().nearest(*asked), asked)
    with pytest.raises(UserError, match="finds at most 2048 neighbours, 2049 are asked for"):
        FaissGpuSearch().nearest(*given(1, count=3000, k=2045))


def test_faiss_still_takes_numpy_after_it_has_learnt_torch(build, faiss_on_gpu: FaissOnGpu) -> None:
    """Importing ``faiss.contrib.torch_utils``, as the GPU's backend does, replaces functions of FAISS for all."""
    asked = given(2)
    check_nearest(FaissCpuSearch().nearest(*asked), asked)
    world = build(build.random_alleles(1, 10, 4))
    embedding = world.embedding()
    store: DenseStore = world.dense_store(embedding)
    tokens = torch.from_numpy(world.batch_of(0, [0], np.zeros((1, 10), dtype=bool)).alleles).long()
    query = world.query(0, tokens, np.arange(10), torch.zeros(2, 8, dtype=torch.bool))
    assert store.search(query, world.cache(embedding).code(0, 0), 1)[:, 0].tolist() == [0, 1]


def on_gpu(found: Search, asked: Given) -> tuple[Tensor, Tensor]:
    tokens, weights, reference, count, excluded, k = asked
    given_form = pack(reference) if found.packed else reference
    moved = (each.to(CUDA) for each in (tokens, weights, given_form))
    distance, ids = found.nearest(*moved, count, excluded.to(CUDA), k)
    return distance.cpu(), ids.cpu()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["torch", "faiss-gpu", "cupy"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sites_at_once", [None, 64])
def test_backends_on_the_gpu_find_what_torch_finds_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, name: str, seed: int, sites_at_once: int | None
) -> None:
    asked = given(seed, sites=500, count=3001, queries=64, k=100)
    expected = make_search("torch", CPU).nearest(*asked)
    if sites_at_once:
        monkeypatch.setattr(search, "SIGN_BYTES", 4 * 3001 * sites_at_once)
    found = on_gpu(make_search(name, CUDA), asked)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-2)
    check_nearest(found, asked)
