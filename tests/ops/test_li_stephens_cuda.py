"""CUDA kernels of the copying model against the numba loops, on a GPU and compiled for the host."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from embrag_ds.errors import UserError
from embrag_ds.ops.li_stephens import Near, copying_backend, copying_posterior, match_lengths, posterior_torch
from embrag_ds.ops.li_stephens_cuda import CudaPosterior, block_shape, cuda_match_lengths
from embrag_ds.ops.li_stephens_numba import LEAST_RECOMBINATION, MOST_MISMATCH_NATS, MOST_PRIOR_NATS

CPU = torch.device("cpu")


def random_case(seed: int, queries: int, sites: int, states: int, chains: int = 2, places: int = 1) -> list[np.ndarray]:
    """Random mismatch [B, T, K], mismatch_ratio, recombination [C, T], prior [B, G, K] and place [B, T].

    ``chains`` is C / B, and ``places`` is G. Places do not decrease along a row.
    """
    rng = np.random.default_rng(seed)
    mismatch = rng.random((queries, sites, states)) < 0.3
    shape = (chains * queries, sites)
    mismatch_ratio, recombination = np.exp(-5 * rng.random(shape)), rng.random(shape) ** 3 + 1e-6
    prior = rng.dirichlet(np.ones(states), (queries, places)) * 0.9 + 0.1 / states
    place = np.sort(rng.integers(0, places, (queries, sites)), axis=1)
    return [mismatch, *(each.astype(np.float32) for each in (mismatch_ratio, recombination, prior)), place]


CASES = pytest.mark.parametrize(
    ("queries", "sites", "states", "first", "last"),
    [
        (2, 1, 1, 0, 1),
        (1, 7, 3, 0, 7),
        (3, 12, 9, 4, 8),
        (2, 9, 30, 0, 3),
        (2, 9, 17, 8, 9),
        (1, 2, 32, 1, 2),
        (1, 2, 33, 0, 1),
        (1, 30, 64, 7, 23),
        (2, 17, 70, 16, 17),
        (1, 26, 128, 0, 26),
        (1, 19, 129, 5, 9),
        (1, 11, 300, 0, 11),
        (1, 9, 500, 2, 5),
        (1, 13, 700, 3, 12),
        (1, 5, 2000, 1, 4),
    ],
)
"""Few sites and more than are read ahead; one neighbour a lane to sixteen, and blocks of one warp to four."""


PLACES = pytest.mark.parametrize("places", [1, 3, 50])
"""One prior, one for some sites, and one for nearly every site, with many that are skipped."""


def near_of(rows: int, sites: int, first: int, last: int) -> Near:
    """Sites from ``first`` to ``last`` (exclusive) in the first row, and as many others in each other row."""
    count = last - first
    firsts = [first, *((first + 3 * row) % (sites - count + 1) for row in range(1, rows))]
    return Near(torch.tensor(firsts), count, min(firsts), max(firsts) + count)


def run_on(
    device: str, given: list[Tensor], near: Near, by_kernel: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Posterior of random_case's tensors ``given`` and, for random gradients, those of its floats, on the CPU."""
    mismatch, *numbers, place = (each.to(device) for each in given)
    mismatch_ratio, recombination, prior = leaves = [each.detach().clone().requires_grad_() for each in numbers]
    near = replace(near, first=near.first.to(device))
    if by_kernel:
        where = near.first, near.count, near.start, near.stop
        posterior = CudaPosterior.apply(mismatch, mismatch_ratio, recombination, prior, place, *where)
    else:
        posterior = copying_posterior(mismatch, -torch.log(mismatch_ratio), recombination, prior, near, place)
    weight = torch.randn(posterior.shape, generator=torch.Generator().manual_seed(1)).to(device)
    (posterior * weight).sum().backward()
    found = [each.grad for each in leaves]
    assert all(each is not None for each in found)
    return tuple(each.detach().cpu() for each in (posterior, *found))  # type: ignore[return-value]


def assert_equal(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=1e-3, atol=1e-6)
    for kernel, loops in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(kernel, loops, rtol=1e-3, atol=1e-4 * (1 + float(loops.abs().max())))


@pytest.mark.parametrize("chains", [1, 2])
@PLACES
@CASES
@pytest.mark.usefixtures("kernels_on_host")
def test_values_and_gradients_are_those_of_the_compiled_loops(
    queries: int, sites: int, states: int, first: int, last: int, places: int, chains: int
) -> None:
    given = [*map(torch.from_numpy, random_case(sites, queries, sites, states, chains, places))]
    near = near_of(queries, sites, first, last)
    assert_equal(run_on("cpu", given, near, True), run_on("cpu", given, near))


@pytest.mark.usefixtures("kernels_on_host")
def test_every_site_may_have_a_place_of_its_own_and_a_skipped_one_has_no_gradient() -> None:
    given = [*map(torch.from_numpy, random_case(1, 3, 25, 70, 2, 40))]
    there_and_back = (torch.arange(25) - 12).abs()
    given[-1] = torch.stack([torch.arange(25), torch.arange(15, 40), there_and_back])
    near = near_of(3, 25, 6, 16)
    found = run_on("cpu", given, near, True)
    assert_equal(found, run_on("cpu", given, near))
    visited = [row.any(1).nonzero()[:, 0].tolist() for row in found[3]]
    assert visited == [[*range(25)], [*range(15, 40)], [*range(13)]]


@pytest.mark.parametrize("places", [1, 60])
@pytest.mark.parametrize("states", [3, 70, 600])
@pytest.mark.usefixtures("kernels_on_host")
def test_states_stay_in_range_where_all_mismatch_and_the_map_is_flat(states: int, places: int) -> None:
    """Bounds of copying_posterior: the least emission factor, recombination and prior."""
    mismatch = torch.rand(1, 60, states, generator=torch.Generator().manual_seed(1)) < 0.5
    mismatch[:, 10:13] = True  # all
    mismatch[:, 20:30, : states // 2] = True  # one part, then the other
    mismatch[:, 20:30, states // 2 :] = False
    mismatch[:, 30:40] = ~mismatch[:, 20:30]
    mismatch_ratio, recombination = torch.full((2, 60), 1.0), torch.full((2, 60), LEAST_RECOMBINATION)
    mismatch_ratio *= float(np.exp(-MOST_MISMATCH_NATS))
    recombination[1] = 0.01
    prior = torch.softmax(
        -MOST_PRIOR_NATS * torch.rand(1, places, states, generator=torch.Generator().manual_seed(2)), dim=2
    )
    place = torch.arange(60)[None] * places // 60
    given = [mismatch, mismatch_ratio, recombination, prior, place]
    found = run_on("cpu", given, Near.same(0, 60, 1, CPU), True)
    assert all(bool(torch.isfinite(each).all()) for each in found)
    double = (-mismatch_ratio.double().log(), recombination.double(), prior.double())
    expected = posterior_torch(mismatch, *double, None, place)
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.usefixtures("kernels_on_host")
def test_sums_stay_right_over_many_sites() -> None:
    given = [*map(torch.from_numpy, random_case(1, 1, 900, 20, 1, 30))]
    near = Near.same(300, 200, 1, CPU)
    assert_equal(run_on("cpu", given, near, True), run_on("cpu", given, near))


@pytest.mark.usefixtures("kernels_on_host")
def test_more_neighbours_than_a_block_has_places_for_are_refused() -> None:
    with pytest.raises(UserError, match=r"k=20000: .* at most 16384"):
        block_shape(20_000)


@CASES
@pytest.mark.usefixtures("kernels_on_host")
def test_match_lengths_are_those_of_the_compiled_loops(
    queries: int, sites: int, states: int, first: int, last: int
) -> None:
    mismatch = torch.from_numpy(random_case(sites, queries, sites, states)[0])
    position = torch.rand(queries, sites, generator=torch.Generator().manual_seed(1)).cumsum(1)
    bounds = position[:, [0, -1]]
    near = near_of(queries, sites, first, last)
    found = cuda_match_lengths(mismatch, position, bounds, near.first, near.count)
    expected = match_lengths(mismatch, position, torch.full((queries,), sites), near)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("neighbours", [1, 31, 128, 256, 257, 700, 1536, 2000, 4096, 4097, 9000])
def test_a_block_has_a_place_for_every_neighbour(neighbours: int) -> None:
    threads, per = block_shape(neighbours)
    assert threads % 32 == 0 and threads <= 1024 and per in (1, 2, 4, 8, 12, 16) and neighbours <= threads * per
    assert (threads == 32) == (neighbours <= 512)


@pytest.mark.gpu
@PLACES
@CASES
def test_on_the_gpu_they_are_those_of_the_cpu(
    queries: int, sites: int, states: int, first: int, last: int, places: int
) -> None:
    assert copying_backend(torch.device("cuda", 0)) == "cuda kernel"
    given = [*map(torch.from_numpy, random_case(sites, queries, sites, states, 2, places))]
    near = near_of(queries, sites, first, last)
    assert_equal(*(run_on(device, given, near) for device in ("cuda", "cpu")))


@pytest.mark.gpu
def test_a_panels_worth_on_the_gpu_equals_torch() -> None:
    mismatch, mismatch_ratio, recombination, prior, place = map(
        torch.from_numpy, random_case(1, 8, 600, 2000, places=20)
    )
    *on_gpu, place = [each.cuda() for each in (mismatch, -torch.log(mismatch_ratio), recombination, prior, place)]
    found, expected = (each(*on_gpu, None, place) for each in (copying_posterior, posterior_torch))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
