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
    count_true,
    mismatches,
    posterior_torch,
)
from tests.oracles import slow_posterior


def some_of(seed: int, sites: int, rows: int) -> Near:
    """At least one of ``sites`` sites, chosen by ``seed``, other ones in each of the ``rows``."""
    count = 1 + seed // 7 % sites
    firsts = np.random.default_rng(seed).integers(0, sites - count + 1, rows)
    return Near(torch.from_numpy(firsts), count, int(firsts.min()), int(firsts.max()) + count)


BOTH = pytest.mark.parametrize("posterior_of", [copying_posterior, posterior_torch], ids=["compiled", "torch"])


def random_case(seed: int, queries: int, sites: int, states: int, harshness: float = 5.0, chains: int = 1):
    """Random mismatch [B, T, K], mismatch_nats and recombination [C, T] (one in ten is 0) and prior [B, K].

    ``chains`` is C / B.
    """
    rng = np.random.default_rng(seed)
    mismatch = rng.random((queries, sites, states)) < 0.4
    mismatch_nats = harshness * rng.random((chains * queries, sites))
    recombination = rng.random((chains * queries, sites)) ** 3
    recombination[rng.random(recombination.shape) < 0.1] = 0.0
    prior = rng.dirichlet(np.ones(states), queries) * 0.9 + 0.1 / states
    return torch.from_numpy(mismatch), *(
        torch.from_numpy(each).float() for each in (mismatch_nats, recombination, prior)
    )


@BOTH
@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 2**32),
    queries=st.integers(1, 3),
    sites=st.integers(1, 8),
    states=st.integers(1, 5),
    harshness=st.floats(0.1, 9),
    chains=st.integers(1, 3),
)
def test_the_posterior_equals_forward_backward_with_the_full_transition_matrix(
    posterior_of, seed: int, queries: int, sites: int, states: int, harshness: float, chains: int
) -> None:
    mismatch, mismatch_nats, recombination, prior = random_case(seed, queries, sites, states, harshness, chains)
    near = some_of(seed, sites, queries)
    found = posterior_of(mismatch, mismatch_nats, recombination, prior, near)
    assert found.shape == (chains * queries, near.count, states) and found.dtype == torch.float32
    assert len(found) == chains * queries
    for chain in range(len(found)):
        query = chain % queries
        emission = np.exp(-mismatch_nats[chain].double().numpy()[:, None] * mismatch[query].numpy())
        numbers = (each.double().numpy() for each in (recombination[chain], prior[query]))
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


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**32),
    queries=st.integers(1, 3),
    sites=st.integers(1, 9),
    states=st.integers(1, 6),
    chains=st.integers(1, 3),
)
def test_compiled_gradients_equal_those_of_autograd_in_double_precision(
    seed: int, queries: int, sites: int, states: int, chains: int
) -> None:
    mismatch, mismatch_nats, recombination, prior = random_case(seed, queries, sites, states, chains=chains)
    near = some_of(seed, sites, queries)
    shape = (chains * queries, near.count, states)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    gradients = []
    for posterior_of, kind in ((copying_posterior, torch.float32), (posterior_torch, torch.float64)):
        inputs = [each.detach().to(kind).requires_grad_() for each in (mismatch_nats, recombination, prior)]
        (posterior_of(mismatch, *inputs, near) * weight.to(kind)).sum().backward()
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
    mismatch, *numbers = random_case(seed, 3, 50, 40, chains=2)
    near = some_of(seed, 50, 3)
    found, expected = copying_posterior(mismatch, *numbers, near), near.of(copying_posterior(mismatch, *numbers))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["mismatch", "prior", "posterior"])
def test_writing_to_what_the_backward_pass_needs_is_an_error(name: str) -> None:
    """Autograd raises an error in place of wrong gradients, as for torch's own operations."""
    mismatch, mismatch_nats, recombination, prior = random_case(1, 2, 6, 4)
    mismatch_nats, prior = mismatch_nats.requires_grad_(), prior.requires_grad_() * 1
    posterior = copying_posterior(mismatch, mismatch_nats, recombination, prior)
    {"mismatch": mismatch, "prior": prior, "posterior": posterior}[name].zero_()
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


@pytest.mark.parametrize("kind", [torch.bool, torch.uint8])
def test_counts_are_sums(kind: torch.dtype) -> None:
    rows = (torch.rand(3, 300, 7, generator=torch.Generator().manual_seed(1)) < 0.9).to(kind)
    assert torch.equal(count_true(rows), rows.sum(1).int())


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
    prior = torch.full((2, 5), 0.2)
    posterior = posterior_of(mismatch, mismatch_nats, recombination, prior)
    assert torch.allclose(posterior.sum(-1), torch.ones(2, 3000), atol=1e-4)
    double = posterior_torch(mismatch, mismatch_nats.double(), recombination.double(), prior.double())
    assert torch.allclose(posterior.double(), double, atol=1e-3)


@BOTH
def test_final_sites_without_a_mismatch_change_nothing(posterior_of) -> None:
    """The padding of a row consists of such sites."""
    mismatch, mismatch_nats, recombination, prior = random_case(1, 2, 6, 4)
    longer = [torch.cat([part, part[:, :3] * 0], dim=1) for part in (mismatch, mismatch_nats, recombination)]
    longer[2][:, 6] = 0.7
    found = posterior_of(longer[0].bool(), *longer[1:], prior)
    assert torch.allclose(found[:, :6], posterior_of(mismatch, mismatch_nats, recombination, prior), atol=1e-6)


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
        mismatch, torch.full((1, 60), 5.0), torch.full((1, 60), recombination), torch.full((1, 2), 0.5)
    )
    assert torch.isfinite(found).all()
    assert torch.allclose(found.sum(-1), torch.ones(1, 60), atol=1e-5)
