"""CUDA kernels of the copying model against the numba loops, on a GPU and compiled for the host.

On the host, the threads of a block are threads of the processor.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from embrag_ds.ops import li_stephens_cuda, li_stephens_numba
from embrag_ds.ops.li_stephens import copying_backend, copying_posterior, posterior_torch
from embrag_ds.ops.li_stephens_cuda import SOURCE, CudaPosterior, block_shape, cuda_match_lengths

# A block's threads are threads of the host and its barrier a std::barrier. A warp has two threads, and blocks run one
# after another.
HOST = r"""
#include <barrier>
#include <functional>
#include <memory>
#include <thread>
#include <vector>
#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(threads)
#define WARP 2
#define PER %d
struct Place { int x; };
static Place blockIdx, blockDim;
static thread_local Place threadIdx;
static std::barrier<>* meeting;
static std::vector<std::unique_ptr<std::barrier<>>> warps;
static float lanes[1024];
static void __syncthreads() { meeting->arrive_and_wait(); }
static float __shfl_xor_sync(unsigned, float value, int distance) {
    lanes[threadIdx.x] = value;
    warps[threadIdx.x / WARP]->arrive_and_wait();
    const float other = lanes[threadIdx.x ^ distance];
    warps[threadIdx.x / WARP]->arrive_and_wait();
    return other;
}
%s
static void run(int blocks, int threads, std::function<void()> kernel) {
    blockDim.x = threads;
    std::barrier<> barrier(threads);
    meeting = &barrier;
    warps.clear();
    for (int i = 0; i < threads; i += WARP) warps.push_back(std::make_unique<std::barrier<>>(WARP));
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
        std::vector<std::thread> block;
        for (int i = 0; i < threads; ++i) block.emplace_back([i, &kernel] { threadIdx.x = i; kernel(); });
        for (auto& each : block) each.join();
    }
}
typedef const float* In;
typedef float* Out;
extern "C" void forward_backward(int blocks, int threads, const unsigned char* m, In l, In s, In p, Out a, Out b, Out o,
                                 int B, int T, int K, int first, int last) {
    run(blocks, threads, [=] { copying_forward_backward(m, l, s, p, a, b, o, B, T, K, first, last); });
}
extern "C" void adjoint(int blocks, int threads, const unsigned char* m, In l, In s, In p, In a, In b, In o, In g,
                        Out w, Out ls, Out ss, Out ps, int B, int T, int K, int first, int last) {
    run(blocks, threads, [=] {
        copying_adjoint(m, l, s, p, a, b, o, g, w, ls, ss, ps, B, T, K, first, last);
    });
}
extern "C" void lengths(int blocks, int threads, const unsigned char* m, In p, In e, Out o,
                        int tiles, int T, int K, int first, int last) {
    run(blocks, threads, [=] { match_lengths(m, p, e, o, tiles, T, K, first, last); });
}
"""
THREADS, PER = 6, 5


@pytest.fixture(scope="module")
def kernels(host_library: Callable[[str], ctypes.CDLL]) -> Callable[..., None]:
    """Function that runs a kernel by name on numpy arrays and sizes."""
    loaded = host_library(HOST % (PER, SOURCE))

    def run(name: str, arrays: list[np.ndarray], *sizes: int, blocks: int | None = None) -> None:
        pointers = [each.ctypes.data_as(ctypes.c_void_p) for each in arrays]
        getattr(loaded, name)(blocks or len(arrays[1]), THREADS, *pointers, *sizes)

    return run


def random_case(seed: int, queries: int, sites: int, states: int, chains: int = 2) -> list[np.ndarray]:
    """Random mismatch [B, T, K], mismatch_ratio and recombination [C, T] and prior [B, K]; ``chains`` is C / B."""
    rng = np.random.default_rng(seed)
    mismatch = rng.random((queries, sites, states)) < 0.3
    shape = (chains * queries, sites)
    mismatch_ratio, recombination = np.exp(-5 * rng.random(shape)), rng.random(shape) ** 3 + 1e-6
    prior = rng.dirichlet(np.ones(states), queries) * 0.9 + 0.1 / states
    return [mismatch, *(each.astype(np.float32) for each in (mismatch_ratio, recombination, prior))]


CASES = pytest.mark.parametrize(
    ("queries", "sites", "states", "first", "last"),
    [(2, 1, 1, 0, 1), (1, 7, 3, 0, 7), (3, 12, 9, 4, 8), (2, 9, 30, 0, 3), (2, 9, 17, 8, 9)],
)


@CASES
def test_values_and_gradients_are_those_of_the_compiled_loops(
    kernels: Callable[..., None], queries: int, sites: int, states: int, first: int, last: int
) -> None:
    given = random_case(sites, queries, sites, states)
    chains = len(given[1])
    part = (chains, last - first, states)
    posterior = np.full(part, np.nan, np.float32)
    li_stephens_numba.forward_backward(*given, first, last, posterior)
    as_bytes = [given[0].view(np.uint8), *given[1:]]
    lengths = (last, sites - first, last - first)
    passes = [np.full((chains, length, states), np.nan, np.float32) for length in lengths]
    kernels("forward_backward", [*as_bytes, *passes], queries, sites, states, first, last)
    np.testing.assert_allclose(passes[2], posterior, rtol=1e-4, atol=1e-6)

    gradient = np.random.default_rng(1).normal(size=part).astype(np.float32)
    sizes = ((chains, sites), (chains, sites), (chains, states))
    found_gradients = [[np.zeros(size, np.float32) for size in sizes] for _ in range(2)]
    li_stephens_numba.adjoint(*given, first, last, posterior, gradient, *found_gradients[0])
    moments = np.full((*part[:2], 2), np.nan, np.float32)
    kernels(
        "adjoint", [*as_bytes, *passes, gradient, moments, *found_gradients[1]], queries, sites, states, first, last
    )
    for loops, kernel in zip(*found_gradients, strict=True):
        np.testing.assert_allclose(kernel, loops, rtol=1e-3, atol=1e-4 * (1 + np.abs(loops).max()))


@pytest.mark.parametrize("chains", [1, 2])
@CASES
def test_what_launches_them_hands_over_what_they_take(
    kernels: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    queries: int,
    sites: int,
    states: int,
    first: int,
    last: int,
    chains: int,
) -> None:
    """The autograd function runs with the host's kernels in place of a GPU's."""

    def launch(name: str, blocks: tuple[int], threads: tuple[int], tensors: list[Tensor], sizes: Sequence[int]) -> None:
        assert (blocks, threads) == ((len(tensors[1]),), (THREADS,))
        assert [each.dtype for each in tensors] == [torch.uint8] + [torch.float32] * (len(tensors) - 1)
        assert all(each.is_contiguous() for each in tensors)
        kernels(name.removeprefix("copying_"), [each.numpy() for each in tensors], *sizes)

    monkeypatch.setattr(li_stephens_cuda, "block_shape", lambda neighbours: (THREADS, PER))
    monkeypatch.setattr(li_stephens_cuda, "_kernel", lambda name, options: name)
    monkeypatch.setattr(li_stephens_cuda, "launch", launch)
    mismatch, *numbers = map(torch.from_numpy, random_case(sites, queries, sites, states, chains))
    weight = torch.randn(chains * queries, last - first, states, generator=torch.Generator().manual_seed(1))
    found = []
    for by_kernel in (False, True):
        mismatch_ratio, recombination, prior = inputs = [each.clone().requires_grad_() for each in numbers]
        if by_kernel:
            posterior = CudaPosterior.apply(mismatch, mismatch_ratio, recombination, prior, first, last)
        else:
            posterior = copying_posterior(
                mismatch, -torch.log(mismatch_ratio), recombination, prior, slice(first, last)
            )
        (posterior * weight).sum().backward()
        found.append([posterior.detach(), *(each.grad for each in inputs)])
    for loops, kernel in zip(*found, strict=True):
        torch.testing.assert_close(kernel, loops, rtol=1e-3, atol=1e-4 * (1 + float(loops.abs().max())))


@CASES
def test_match_lengths_are_those_of_the_compiled_loops(
    kernels: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    queries: int,
    sites: int,
    states: int,
    first: int,
    last: int,
) -> None:
    def launch(name: str, blocks: tuple[int], threads: tuple[int], tensors: list[Tensor], sizes: Sequence[int]) -> None:
        assert (name, threads) == ("match_lengths", (THREADS,)) and all(each.is_contiguous() for each in tensors)
        assert blocks == (queries * -(-states // THREADS),)
        kernels("lengths", [each.numpy() for each in tensors], *sizes, blocks=blocks[0])

    monkeypatch.setattr("embrag_ds.ops.cuda.TILE_THREADS", THREADS)
    monkeypatch.setattr("embrag_ds.ops.cuda.launch", launch)
    monkeypatch.setattr(li_stephens_cuda, "_kernel", lambda name, options: name)
    mismatch = torch.from_numpy(random_case(sites, queries, sites, states)[0])
    position = torch.rand(queries, sites, generator=torch.Generator().manual_seed(1)).cumsum(1)
    bounds = position[:, [0, -1]]
    found = cuda_match_lengths(mismatch, position, bounds, first, last)
    expected = np.empty((queries, last - first, states), np.float32)
    li_stephens_numba.match_lengths(mismatch.numpy(), position.numpy(), bounds.numpy(), first, last, expected)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("neighbours", [1, 31, 128, 256, 257, 700, 1536, 2000, 4096, 4097, 9000])
def test_a_block_has_a_place_for_every_neighbour(neighbours: int) -> None:
    threads, per = block_shape(neighbours)
    assert threads % 32 == 0 and threads <= 1024 and neighbours <= threads * per < neighbours + 32 * per


@pytest.mark.gpu
@CASES
def test_on_the_gpu_they_are_those_of_the_cpu(queries: int, sites: int, states: int, first: int, last: int) -> None:
    assert copying_backend(torch.device("cuda", 0)) == "cuda kernel"
    mismatch, mismatch_ratio, recombination, prior = map(torch.from_numpy, random_case(sites, queries, sites, states))
    weight = torch.randn(len(recombination), last - first, states, generator=torch.Generator().manual_seed(1))
    found = []
    for device in ("cpu", "cuda"):
        inputs = [each.to(device).requires_grad_() for each in (-torch.log(mismatch_ratio), recombination, prior)]
        posterior = copying_posterior(mismatch.to(device), *inputs, slice(first, last))
        (posterior * weight.to(device)).sum().backward()
        found.append([posterior.detach().cpu(), *(each.grad.cpu() for each in inputs)])
    for host, there in zip(*found, strict=True):
        torch.testing.assert_close(there, host, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
def test_a_panels_worth_on_the_gpu_equals_torch() -> None:
    mismatch, mismatch_ratio, recombination, prior = map(torch.from_numpy, random_case(1, 8, 600, 2000))
    on_gpu = [each.cuda() for each in (mismatch, -torch.log(mismatch_ratio), recombination, prior)]
    torch.testing.assert_close(copying_posterior(*on_gpu), posterior_torch(*on_gpu), rtol=1e-3, atol=1e-5)
