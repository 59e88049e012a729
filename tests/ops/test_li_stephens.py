"""Values and gradients of the copying model, compiled and in torch, against an explicit hidden Markov model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embrag_ds.ops.li_stephens import (
    Near,
    copying_posterior,
    count_by_place,
    mismatches,
    posterior_torch,
    recombination_prior,
)
from embrag_ds.ops.li_stephens_numba import LEAST_RECOMBINATION, MOST_MISMATCH_NATS, MOST_PRIOR_NATS
from tests.oracles import slow_posterior


def some_of(seed: int, sites: int, rows: int) -> Near:
    """At least one of ``sites`` sites, chosen by ``seed``, other ones in each of the ``rows``."""
    count = 1 + seed // 7 % sites
    firsts = np.random.default_rng(seed).integers(0, sites - count + 1, rows)
    return Near(torch.from_numpy(firsts), count, int(firsts.min()), int(firsts.max()) + count)


BOTH = pytest.mark.parametrize("posterior_of", [copying_posterior, posterior_torch], ids=["compiled", "torch"])


def random_case(
    seed: int, queries: int, sites: int, states: int, harshness: float = 5.0, chains: int = 1, places: int = 1
):
    """Random mismatch [B, T, K], mismatch_nats and recombination [C, T] (one in ten is 0) and prior [B, G, K].

    ``chains`` is C / B, and ``places`` is G.
    """
    rng = np.random.default_rng(seed)
    mismatch = rng.random((queries, sites, states)) < 0.4
    mismatch_nats = harshness * rng.random((chains * queries, sites))
    recombination = rng.random((chains * queries, sites)) ** 3
    recombination[rng.random(recombination.shape) < 0.1] = 0.0
    prior = rng.dirichlet(np.ones(states), (queries, places)) * 0.9 + 0.1 / states
    return torch.from_numpy(mismatch), *(
        torch.from_numpy(each).float() for each in (mismatch_nats, recombination, prior)
    )


def random_places(seed: int, queries: int, sites: int, places: int) -> torch.Tensor:
    """Non-decreasing places int64 [B, T] below ``places``, other ones in each row; some are skipped."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, places, (queries, sites))).sort(1).values


@BOTH
@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 2**32),
    queries=st.integers(1, 3),
    sites=st.integers(1, 8),
    states=st.integers(1, 5),
    harshness=st.floats(0.1, 9),
    chains=st.integers(1, 3),
    places=st.integers(1, 9),
)
def test_the_posterior_equals_forward_backward_with_the_full_transition_matrix(
    posterior_of, seed: int, queries: int, sites: int, states: int, harshness: float, chains: int, places: int
) -> None:
    mismatch, mismatch_nats, recombination, prior = random_case(seed, queries, sites, states, harshness, chains, places)
    near, place = some_of(seed, sites, queries), random_places(seed, queries, sites, places)
    found = posterior_of(mismatch, mismatch_nats, recombination, prior, near, place)
    assert found.shape == (chains * queries, near.count, states) and found.dtype == torch.float32
    assert len(found) == chains * queries
    for chain in range(len(found)):
        query = chain % queries
        emission = np.exp(-mismatch_nats[chain].double().numpy()[:, None] * mismatch[query].numpy())
        numbers = (each.double().numpy() for each in (recombination[chain], prior[query, place[query]]))
        first = int(near.first[query])
        expected = slow_posterior(emission, *numbers)[first : first + near.count]
        assert np.allclose(found[chain].numpy(), expected, rtol=1e-3, atol=2e-5)


@BOTH
def test_the_recombination_before_the_first_site_is_ignored(posterior_of) -> None:
    mismatch, mismatch_nats, recombination, prior = random_case(1, 2, 6, 4)
    other = recombination.clone()
    other[:, 0] = 0.9
    assert torch.equal(
        posterior_of(mismatch, mismatch_nats, recombination, prior), posterior_of(mismatch, mismatch_nats, other, prior)
    )


@BOTH
@pytest.mark.parametrize("sites", [1, 7])
def test_every_site_may_have_a_place_of_its_own(posterior_of, sites: int) -> None:
    mismatch, mismatch_nats, recombination, prior = random_case(3, 2, sites, 4, places=sites)
    place = torch.arange(sites).repeat(2, 1)
    found = posterior_of(mismatch, mismatch_nats, recombination, prior, None, place)
    for row in range(2):
        emission = np.exp(-mismatch_nats[row].double().numpy()[:, None] * mismatch[row].numpy())
        expected = slow_posterior(emission, recombination[row].double().numpy(), prior[row].double().numpy())
        assert np.allclose(found[row].numpy(), expected, rtol=1e-3, atol=2e-5)


@BOTH
def test_a_recombination_draws_from_the_prior_of_the_site_after_it(posterior_of) -> None:
    """Without a mismatch, and with a certain recombination before each site, posteriors are the priors themselves."""
    mismatch, mismatch_nats, recombination, prior = random_case(4, 3, 12, 5, places=6)
    place = random_places(5, 3, 12, 6)
    found = posterior_of(torch.zeros_like(mismatch), mismatch_nats, torch.ones_like(recombination), prior, None, place)
    assert len({tuple(row) for row in place.tolist()}) == 3
    torch.testing.assert_close(found, torch.stack([prior[row, place[row]] for row in range(3)]))


@BOTH
def test_places_with_equal_priors_are_as_one(posterior_of) -> None:
    mismatch, mismatch_nats, recombination, prior = random_case(6, 3, 30, 9, chains=2)
    near, place = some_of(6, 30, 3), random_places(6, 3, 30, 25)
    prior = prior.requires_grad_()
    one = posterior_of(mismatch, mismatch_nats, recombination, prior, near)
    assert torch.equal(posterior_of(mismatch, mismatch_nats, recombination, prior, near, torch.zeros_like(place)), one)
    same = prior.detach().repeat(1, 25, 1).requires_grad_()
    assert torch.equal(posterior_of(mismatch, mismatch_nats, recombination, same, near, place), one)
    weight = torch.randn(one.shape, generator=torch.Generator().manual_seed(1))
    (one * weight).sum().backward()
    (posterior_of(mismatch, mismatch_nats, recombination, same, near, place) * weight).sum().backward()
    torch.testing.assert_close(same.grad.sum(1, keepdim=True), prior.grad, rtol=1e-4, atol=1e-5)
    for row in range(3):
        used = torch.isin(torch.arange(25), place[row])
        assert not used.all() and same.grad[row, used].any(1).all() and not same.grad[row, ~used].any()


def test_gradients_are_those_of_finite_differences() -> None:
    mismatch, *numbers = random_case(7, 2, 6, 3, harshness=2.0, chains=2, places=5)
    place = torch.tensor([[0, 0, 2, 2, 3, 3], [1, 1, 1, 1, 1, 4]])
    numbers = [each.double() for each in numbers]
    numbers[1] = numbers[1].clamp(0.05, 0.95)  # away from the bounds, where the gradient jumps
    near = some_of(7, 6, 2)

    def of(*numbers: torch.Tensor) -> torch.Tensor:
        return posterior_torch(mismatch, *numbers, near, place)

    assert torch.autograd.gradcheck(of, [each.requires_grad_() for each in numbers])
    weight = torch.randn(4, near.count, 3, generator=torch.Generator().manual_seed(1))
    exact = torch.autograd.grad(of(*numbers), numbers, weight.double())
    single = [each.detach().float().requires_grad_() for each in numbers]
    found = torch.autograd.grad(copying_posterior(mismatch, *single, near, place), single, weight)
    for compiled, expected in zip(found, exact, strict=True):
        torch.testing.assert_close(compiled, expected.float(), rtol=1e-3, atol=1e-4)


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**32),
    queries=st.integers(1, 3),
    sites=st.integers(1, 9),
    states=st.integers(1, 6),
    chains=st.integers(1, 3),
    places=st.integers(1, 9),
)
def test_compiled_gradients_equal_those_of_autograd_in_double_precision(
    seed: int, queries: int, sites: int, states: int, chains: int, places: int
) -> None:
    mismatch, mismatch_nats, recombination, prior = random_case(
        seed, queries, sites, states, chains=chains, places=places
    )
    near, place = some_of(seed, sites, queries), random_places(seed, queries, sites, places)
    shape = (chains * queries, near.count, states)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    gradients = []
    for posterior_of, kind in ((copying_posterior, torch.float32), (posterior_torch, torch.float64)):
        inputs = [each.detach().to(kind).requires_grad_() for each in (mismatch_nats, recombination, prior)]
        (posterior_of(mismatch, *inputs, near, place) * weight.to(kind)).sum().backward()
        gradients.append([(torch.zeros_like(each) if each.grad is None else each.grad).float() for each in inputs])
    for compiled, exact in zip(*gradients, strict=True):
        scale = float(exact.abs().max()) + 1e-3
        assert torch.allclose(compiled, exact, rtol=1e-3, atol=1e-4 * scale + 2e-6), (compiled, exact)


@pytest.mark.parametrize("seed", range(5))
def test_it_is_the_same_whether_or_not_gradients_are_kept(seed: int) -> None:
    mismatch, mismatch_nats, recombination, prior = random_case(seed, 3, 9, 6, chains=2)
    near = some_of(seed, 9, 3)
    kept = copying_posterior(mismatch, mismatch_nats.clone().requires_grad_(), recombination, prior, near)
    assert kept.requires_grad
    assert torch.allclose(
        copying_posterior(mismatch, mismatch_nats, recombination, prior, near), kept.detach(), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("seed", range(5))
def test_the_sites_asked_for_do_not_change_what_is_found_there(seed: int) -> None:
    mismatch, *numbers = random_case(seed, 3, 50, 40, chains=2, places=5)
    near, place = some_of(seed, 50, 3), random_places(seed, 3, 50, 5)
    found = copying_posterior(mismatch, *numbers, near, place)
    expected = near.of(copying_posterior(mismatch, *numbers, None, place))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["mismatch", "prior", "place", "posterior"])
def test_writing_to_what_the_backward_pass_needs_is_an_error(name: str) -> None:
    """Autograd raises an error in place of wrong gradients, as for torch's own operations."""
    mismatch, mismatch_nats, recombination, prior = random_case(1, 2, 6, 4)
    mismatch_nats, prior = mismatch_nats.requires_grad_(), prior.requires_grad_() * 1
    place = torch.zeros(2, 6, dtype=torch.int64)
    posterior = copying_posterior(mismatch, mismatch_nats, recombination, prior, None, place)
    {"mismatch": mismatch, "prior": prior, "place": place, "posterior": posterior}[name].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        posterior.square().sum().backward()


def test_mismatches_equal_a_plain_loop() -> None:
    rng = np.random.default_rng(1)
    alleles = torch.from_numpy(rng.integers(0, 2, (7, 12), dtype=np.uint8))
    place, tokens = (torch.from_numpy(rng.integers(0, high, (3, 5))) for high in (7, 2))
    ids, count = torch.from_numpy(rng.integers(0, 12, (3, 4))), torch.tensor([5, 0, 2])
    found = mismatches(alleles, place, ids, tokens, count)
    for b, t, k in np.ndindex(3, 5, 4):
        expected = t < int(count[b]) and int(alleles[place[b, t], ids[b, k]]) != int(tokens[b, t])
        assert bool(found[b, t, k]) == expected


@pytest.mark.parametrize("places", [1, 4, 400])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_counts_by_place_are_those_of_a_plain_loop(places: int, device: str) -> None:
    """Padding has the last place of a row and counts there where it is true, and nowhere where it is false."""
    rng = np.random.default_rng(places)
    rows, place = torch.from_numpy(rng.random((3, 300, 7)) < 0.9), random_places(places, 3, 300, places)
    rows[1, 200:] = False
    place[1, 200:] = place[1].max()
    expected = np.zeros((3, places, 7), dtype=np.float32)
    for b, t, k in np.ndindex(*rows.shape):
        expected[b, place[b, t], k] += bool(rows[b, t, k])
    found = count_by_place(rows.to(device), place.to(device), places).cpu()
    assert found.dtype == torch.float32 and np.array_equal(found.numpy(), expected)
    assert found[1].sum() == rows[1, :200].sum() and (places < 400 or (expected == 0).all(axis=(0, 2)).any())
    # A row without any sites, and rows that are not contiguous, as those of padding are.
    assert (count_by_place(rows[:, :0].to(device), place[:, :0].to(device), places) == 0).all()
    turned = rows.to(device).transpose(1, 2).contiguous().transpose(1, 2)
    assert np.array_equal(count_by_place(turned, place.to(device), places).cpu().numpy(), expected)


@pytest.mark.gpu
def test_mismatches_on_the_gpu_are_those_of_the_cpu() -> None:
    rng = np.random.default_rng(1)
    alleles = torch.from_numpy(rng.integers(0, 2, (70, 120), dtype=np.uint8))
    place, tokens = (torch.from_numpy(rng.integers(0, high, (3, 50))) for high in (70, 2))
    given = alleles, place, torch.from_numpy(rng.integers(0, 120, (3, 40))), tokens, torch.tensor([50, 0, 20])
    assert torch.equal(mismatches(*(each.cuda() for each in given)).cpu(), mismatches(*given))


@BOTH
def test_the_posterior_stays_finite_and_normalised_over_many_sites(posterior_of) -> None:
    mismatch = torch.rand(2, 3000, 5, generator=torch.Generator().manual_seed(1)) < 0.5
    mismatch_nats, recombination = torch.full((2, 3000), 6.0), torch.full((2, 3000), 1e-3)
    prior = torch.full((2, 1, 5), 0.2)
    posterior = posterior_of(mismatch, mismatch_nats, recombination, prior)
    assert torch.allclose(posterior.sum(-1), torch.ones(2, 3000), atol=1e-4)
    double = posterior_torch(mismatch, mismatch_nats.double(), recombination.double(), prior.double())
    assert torch.allclose(posterior.double(), double, atol=1e-3)


@BOTH
def test_final_sites_without_a_mismatch_change_nothing(posterior_of) -> None:
    """The padding of a row consists of such sites."""
    mismatch, mismatch_nats, recombination, prior = random_case(1, 2, 6, 4, places=3)
    place = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2]] * 2)
    longer = [torch.cat([part, part[:, :3] * 0], dim=1) for part in (mismatch, mismatch_nats, recombination)]
    longer[2][:, 6] = 0.7
    found = posterior_of(longer[0].bool(), *longer[1:], prior, None, place)
    expected = posterior_of(mismatch, mismatch_nats, recombination, prior, None, place[:, :6])
    assert torch.allclose(found[:, :6], expected, atol=1e-6)


@BOTH
def test_the_posterior_is_finite_where_every_neighbour_mismatches_at_120_nats(posterior_of) -> None:
    """An emission factor that all states share cancels, however small it is."""
    mismatch, mismatch_nats, recombination, prior = random_case(1, 1, 6, 4)
    expected = posterior_of(mismatch, mismatch_nats, recombination, prior)
    mismatch = torch.cat([mismatch[:, :3], torch.ones(1, 1, 4, dtype=torch.bool), mismatch[:, 3:]], dim=1)
    mismatch_nats = torch.cat([mismatch_nats[:, :3], torch.full((1, 1), 120.0), mismatch_nats[:, 3:]], dim=1)
    recombination = torch.cat([recombination[:, :3], torch.zeros(1, 1), recombination[:, 3:]], dim=1)
    found = posterior_of(mismatch, mismatch_nats, recombination, prior)
    assert torch.allclose(found[:, [0, 1, 2, 4, 5, 6]], expected, atol=1e-5)


@BOTH
@pytest.mark.parametrize("recombination", [0.0, 1e-9])
def test_the_posterior_is_finite_where_the_map_is_flat_and_the_evidence_contradicts_itself(
    posterior_of, recombination: float
) -> None:
    """Genetic maps are flat over centromeres; here each neighbour mismatches in one of two stretches."""
    mismatch = torch.zeros(1, 60, 2, dtype=torch.bool)
    mismatch[:, :30, 0] = True
    mismatch[:, 30:, 1] = True
    found = posterior_of(
        mismatch, torch.full((1, 60), 5.0), torch.full((1, 60), recombination), torch.full((1, 1, 2), 0.5)
    )
    assert torch.isfinite(found).all()
    assert torch.allclose(found.sum(-1), torch.ones(1, 60), atol=1e-5)


def test_no_state_lies_below_the_smallest_float32() -> None:
    least = np.exp(-MOST_MISMATCH_NATS) * LEAST_RECOMBINATION * np.exp(-MOST_PRIOR_NATS)
    assert least / 2_000_000 > np.finfo(np.float32).tiny  # with so many neighbours


def test_a_prior_is_bounded_beside_the_nearest_neighbour_that_may_be_copied() -> None:
    distance = torch.tensor([[[50.0, 51.0, 53.0, 50.0 + MOST_PRIOR_NATS, 500.0]]], requires_grad=True)
    prior = recombination_prior(distance)
    assert float(prior[..., 4].detach() / prior[..., 0].detach()) == pytest.approx(np.exp(-MOST_PRIOR_NATS))
    torch.testing.assert_close(prior[..., :4], torch.softmax(-distance[..., :4], -1))
    prior[0, 0, 0].backward()
    assert distance.grad is not None and distance.grad[0, 0, 4] == 0 and distance.grad[0, 0, 1] != 0
    far = distance.detach() + torch.tensor([-50.0, 0, 0, 0, 0])
    others = recombination_prior(far, torch.tensor([[True, False, False, False, False]]))
    assert others[0, 0, 0] == 0
    torch.testing.assert_close(others[..., 1:], recombination_prior(far[..., 1:]))
