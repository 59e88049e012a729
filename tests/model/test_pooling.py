"""Pooling against an explicit hidden Markov model and explicit sums."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

import embrag_ds.model.pooling as pooling_module
import embrag_ds.model.poolings.copying as copying_module
from embrag_ds.data.windows import MOST_PLACES, PLACE_CM
from embrag_ds.model import poolings
from embrag_ds.model.embedding import gather_embeddings
from embrag_ds.model.pooling import mixed_embedding, pooled_embedding
from embrag_ds.model.poolings.copying import NEGLIGIBLE, CopyingPooling, without_negligible
from embrag_ds.model.poolings.rare_variant import DistancePooling
from embrag_ds.ops.dosage import dense_alleles
from embrag_ds.ops.li_stephens_numba import MOST_MISMATCH_NATS, MOST_PRIOR_NATS
from tests.oracles import slow_posterior

POOLINGS = pytest.mark.parametrize("kind", [poolings.pooling_class(each) for each in poolings.fusions()])


def disturb(module: torch.nn.Module) -> None:
    """Change all parameters a little, as training would."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))


def slow_alone(pooling: torch.nn.Module) -> torch.nn.Module:
    """Remove the weight of the fast copying model, if ``pooling`` has one."""
    if isinstance(pooling, CopyingPooling):
        pooling.slow.data[0] = 100.0
    return pooling


def without_small(posterior: np.ndarray) -> np.ndarray:
    """Posteriors [T, K] without what lies below a part of the mean probability, which is the sum of squares."""
    kept = np.zeros_like(posterior)
    for site, row in enumerate(posterior):
        mean = sum(float(each) * float(each) for each in row)
        for neighbour, each in enumerate(row):
            if each > NEGLIGIBLE * mean:
                kept[site, neighbour] = each
        kept[site] /= kept[site].sum()
    return kept


def slow_prior(pooling: CopyingPooling, queries, batch, panel: np.ndarray, row: int) -> np.ndarray:
    """Probability [T, K] of each neighbour after a recombination before each typed site of one query haplotype.

    Its logarithm is the sum over two terms of minus the strength per percent, times the percentage of typed sites that
    differ; those at a distance of d, from place to place, have the weight exp(-d / scale). It is bounded.
    """
    ids, truth, masked = batch.retrieved.ids[row].tolist(), queries.alleles[row], queries.masked[row // 2]
    position = batch.window.sites.position.numpy()
    typed = [site for site in range(len(truth)) if not masked[site]]
    length = max(PLACE_CM, float(position[-1] - position[0]) / MOST_PLACES)
    place = [min(int((position[site] - position[0]) / length), MOST_PLACES - 1) for site in typed]
    strengths = (10 * pooling.closeness.detach().double()).tolist()
    scales = (10 * pooling.reach.detach().double()).exp().tolist()
    logarithm = np.zeros((len(typed), len(ids)))
    for t in range(len(typed)):
        for strength, scale in zip(strengths, scales, strict=True):
            near = [math.exp(-abs(place[t] - other) * length / scale) for other in place]
            for k, haplotype in enumerate(ids):
                differing = sum(w for w, s in zip(near, typed, strict=True) if panel[haplotype, s] != truth[s])
                logarithm[t, k] -= strength * 100 * differing / sum(near)
    prior = np.exp(np.maximum(logarithm - logarithm.max(1, keepdims=True), -MOST_PRIOR_NATS))
    return prior / prior.sum(1, keepdims=True)


def slow_weights(
    chances: np.ndarray, nats: float, weight: np.ndarray, queries, batch, panel: np.ndarray, row: int, prior
):
    """Weights [K, L] of one query haplotype, by the explicit model at its typed sites and np.interp between them.

    ``chances`` [T] are the probabilities of a recombination before each, as float32 has them: where they are nearly 1,
    rounding decides what is left. ``nats`` is the loss of log-probability at a mismatch of weight 1.
    ``panel`` [H, L] holds the reference alleles of the whole window. ``weight`` [L] is divided by its mean over the
    typed sites.
    """
    ids, truth, masked = batch.retrieved.ids[row].tolist(), queries.alleles[row], queries.masked[row // 2]
    typed = [site for site in range(len(truth)) if not masked[site]]
    position = batch.window.sites.position.double().numpy()
    core = position[batch.window.core]
    if not typed:
        return np.full((len(ids), len(core)), 1 / len(ids))
    mean = sum(weight[s] for s in typed) / len(typed)
    of_site = {s: min(nats * weight[s] / mean, MOST_MISMATCH_NATS) for s in typed}
    emission = np.array([[np.exp(-of_site[s] * (panel[i, s] != truth[s])) for i in ids] for s in typed])
    posterior = slow_posterior(emission, np.append(0.0, chances[1:]), prior)
    mean = np.square(posterior).sum(1, keepdims=True)
    assume((np.abs(posterior / (NEGLIGIBLE * mean) - 1) > 0.01).all())  # else rounding decides what is negligible
    posterior = without_small(posterior)
    return np.array([np.interp(core, position[typed], posterior[:, place]) for place in range(len(ids))])


@settings(max_examples=25)
@example(seed=265, rates=[0.0, 0.0], window=0, k=3, cm=1.0)
@given(
    seed=st.integers(0, 2**20),
    rates=st.lists(st.sampled_from([0.0, 0.4, 0.9, 0.97, 1.1]), min_size=1, max_size=3),
    window=st.integers(0, 2),
    k=st.integers(1, 7),
    cm=st.sampled_from([0.001, 0.05, 1.0]),
)
def test_copying_weights_equal_the_slow_model_interpolated_in_centimorgans(
    build, seed: int, rates: list[float], window: int, k: int, cm: float
) -> None:
    """A sample's recombination rate and mismatch are derived from the arguments of the copying model."""
    world = build(seed, outside=3, cm_per_site=cm)
    samples = list(range(len(rates)))
    masked = np.concatenate([world.masked(window, 1, seed + i, rate) for i, rate in enumerate(rates)])
    queries = world.batch_of(window, samples, masked)
    batch = world.collator(build.imputer(seed).embedding, k=k, mode="dense")(queries)
    torch.manual_seed(seed)
    pooling = CopyingPooling()
    disturb(pooling)
    weight = 0.2 + torch.rand(len(world.data.windows[window]), generator=torch.Generator().manual_seed(seed))
    passed = []
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        original = copying_module.copying_posterior
        patch.setattr(copying_module, "copying_posterior", lambda *given: (passed.append(given), original(*given))[1])
        found = pooling(batch, batch.retrieved, weight).weights.numpy()
        share = pooling.share_of_slow(batch.core.frequency).numpy()
    panel = world.data.reference_alleles(window)
    ((_, all_nats, all_recombinations, _, near, place),) = passed
    assert near is batch.window.near and place is batch.window.place
    rows = 2 * len(samples)
    for row in range(rows):
        typed = batch.window.typed[row, : int(batch.window.typed_count[row])]
        by_chain = []
        for mismatch_nats, recombination in zip(all_nats.split(rows), all_recombinations.split(rows), strict=True):
            nats = 0.0
            if len(typed):
                per_weight = mismatch_nats[row, : len(typed)] * (weight[typed].mean() / weight[typed])
                nats = float(per_weight.mean())
                assert torch.allclose(per_weight, torch.full_like(per_weight, nats), rtol=1e-4) and nats > 0
            if len(typed) > 1:
                gaps = torch.diff(batch.window.sites.position[typed].double())
                chances = recombination[row, 1 : len(typed)].double()
                clearest = int((chances - 0.5).abs().argmin())
                rate = float(-torch.log1p(-chances[clearest]) / gaps[clearest])
                assert torch.allclose(chances, 1 - torch.exp(-rate * gaps), rtol=1e-2, atol=1e-5)
                assert rate > 0
            prior_of_row = slow_prior(pooling, queries, batch, panel, row)
            chances = recombination[row, : len(typed)].double().numpy()
            given = chances, nats, weight.double().numpy(), queries, batch, panel, row, prior_of_row
            by_chain.append(slow_weights(*given))
        slow = share[row] * by_chain[0] + (1 - share[row]) * by_chain[1]
        assert np.allclose(found[row], slow, atol=5e-4), np.abs(found[row] - slow).max()


@given(
    seed=st.integers(0, 2**20),
    rates=st.lists(st.sampled_from([0.0, 0.5, 0.9, 0.98, 1.1]), min_size=1, max_size=4),
    window=st.integers(0, 2),
)
def test_every_row_has_the_fewest_sites_that_flank_its_core(build, seed: int, rates: list[float], window: int) -> None:
    """Samples with many typed sites before the core do not lengthen the posteriors of others."""
    world = build(seed % 10, outside=4)
    masked = np.concatenate([world.masked(window, 1, seed + i, rate) for i, rate in enumerate(rates)])
    batch = world.collator(build.imputer(1).embedding, k=3)(world.batch_of(window, range(len(rates)), masked))
    near, flanking = batch.window.near, pooling_module.flanking_sites(batch)
    assert int(near.first.min()) == near.start and int(near.first.max()) + near.count == near.stop
    assert near.start >= 0 and near.stop <= batch.window.typed.shape[1]
    assert int(flanking.left.min()) >= 0 and int(flanking.right.max()) < near.count
    core = batch.window.core
    for row in range(2 * len(rates)):
        typed = batch.window.typed[row, : int(batch.window.typed_count[row])]
        within = int(((typed >= core.start) & (typed < core.stop)).sum())
        needed = within + bool((typed < core.start).any()) + bool((typed >= core.stop).any())
        assert needed <= near.count
    most = int(((batch.window.typed >= core.start) & (batch.window.typed < core.stop)).sum(1).max())
    assert near.count <= most + 2


def test_a_rare_site_prefers_the_slow_model() -> None:
    with torch.no_grad():
        share = CopyingPooling().share_of_slow(torch.tensor([[1e-4, 1e-3, 0.1, 0.9, 0.9999]]))[0]
    assert float(share[1]) == pytest.approx(0.5) and float(share[0]) == pytest.approx(1 / (1 + math.exp(-2)))
    assert torch.allclose(share, torch.stack([share[4], share[1], share[3], share[2], share[0]]), atol=1e-4)


@pytest.mark.parametrize(("cm", "places"), [(0.001, 1), (0.15, 29), (1.5, MOST_PLACES)])
@pytest.mark.parametrize("disturbed", [False, True])
def test_a_recombination_prefers_neighbours_that_resemble_the_query_around_its_place(
    build, cm: float, places: int, disturbed: bool
) -> None:
    world = build(3, outside=3, cm_per_site=cm)
    masked = np.concatenate([world.masked(1, 1, 1, rate) for rate in (0.3, 0.8, 1.1)])
    queries = world.batch_of(1, [0, 1, 2], masked)
    batch = world.collator(build.imputer().embedding, k=5)(queries)
    torch.manual_seed(2)
    pooling = CopyingPooling()
    if disturbed:
        disturb(pooling)
    with torch.no_grad():
        prior = pooling._recombination_prior(batch, batch.retrieved, pooling_module.present_columns(batch))
    assert prior.shape == (6, places, 5) and batch.window.places == places
    assert torch.allclose(prior.sum(-1), torch.ones(6, places), atol=1e-5)
    assert torch.allclose(prior[4:], torch.full_like(prior[4:], 0.2), atol=1e-6), "nothing is typed"
    panel = world.data.reference_alleles(1)
    for row in range(4):
        place = batch.window.place[row, : int(batch.window.typed_count[row])]
        expected = slow_prior(pooling, queries, batch, panel, row)
        assert np.allclose(prior[row, place].double().numpy(), expected, rtol=2e-3, atol=1e-6)
    if cm > 0.001:
        assert (prior[:4].amax(1) - prior[:4].amin(1)).max() > 0.05, "places differ"


@pytest.mark.parametrize("k", [1, 2, 50])
def test_negligible_probabilities_are_left_out(k: int) -> None:
    maker = torch.Generator().manual_seed(k)
    posterior = torch.softmax(4 * torch.randn(3, 20, k, generator=maker), dim=-1)
    found = without_negligible(posterior)
    for row in range(3):
        expected = without_small(posterior[row].double().numpy())
        assert np.allclose(found[row].numpy(), expected, rtol=1e-5, atol=1e-7)
        assert np.array_equal(found[row].numpy() > 0, expected > 0)
    assert (found.amax(-1) >= posterior.amax(-1) - 1e-6).all()
    assert (found > 0).any(-1).all() and (found == 0).any() == (k > 1)


def test_gradients_of_what_is_kept_are_those_of_a_normalised_sum() -> None:
    """The threshold itself has none."""
    posterior = torch.softmax(4 * torch.randn(20, 30, generator=torch.Generator().manual_seed(1)), dim=-1).double()
    direction = torch.randn(20, 30, generator=torch.Generator().manual_seed(2)).double()
    leaf = posterior.clone().requires_grad_()
    (without_negligible(leaf) * direction).sum().backward()
    for site in range(20):
        kept = posterior[site] > NEGLIGIBLE * posterior[site].square().sum()
        total = posterior[site][kept].sum()
        mean = (posterior[site][kept] * direction[site][kept]).sum() / total
        expected = torch.where(kept, (direction[site] - mean) / total, 0.0)
        torch.testing.assert_close(leaf.grad[site], expected)


def test_only_the_ratios_of_site_weights_at_typed_sites_count(build) -> None:
    """Their mean over each query's typed sites is made 1, whatever the weights elsewhere."""
    world = build(4, outside=2)
    masked = np.concatenate([world.masked(1, 1, 1, rate) for rate in (0.4, 0.8)])
    batch = world.collator(build.imputer().embedding)(world.batch_of(1, [0, 1], masked))
    weight = 0.2 + torch.rand(len(world.data.windows[1]), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        one, other, even = (
            CopyingPooling()(batch, batch.retrieved, each)
            for each in (weight, 7 * weight, torch.full_like(weight, 3.0))
        )
        unlike = torch.where(torch.from_numpy(masked).all(0), 100.0, weight)
        assert (unlike == 100).any()
        beyond = CopyingPooling()(batch, batch.retrieved, unlike)
    torch.testing.assert_close(one.dosage, other.dosage)
    torch.testing.assert_close(one.dosage, beyond.dosage)
    assert (one.dosage - even.dosage).abs().max() > 1e-3


def test_beyond_the_typed_sites_the_weights_are_those_of_the_nearest_typed_site(build) -> None:
    world = build(outside=1, window_sites=40, overlap=0, flank=0, sites=40)
    masked = np.ones((1, 40), dtype=bool)
    masked[0, [12, 20, 29]] = False
    batch = world.collator(build.imputer().embedding, mode="dense")(world.batch_of(0, [0], masked))
    with torch.no_grad():
        weights = slow_alone(CopyingPooling())(batch, batch.retrieved, torch.ones(40)).weights
    assert torch.equal(weights[..., :12], weights[..., 12:13].expand(-1, -1, 12))
    assert torch.equal(weights[..., 30:], weights[..., 29:30].expand(-1, -1, 10))
    # Between two typed sites, weights are interpolated by genetic distance.
    position = batch.window.sites.position
    share = (position[16] - position[12]) / (position[20] - position[12])
    between = (1 - share) * weights[..., 12] + share * weights[..., 20]
    assert torch.allclose(weights[..., 16], between, atol=1e-6)


@POOLINGS
@pytest.mark.parametrize("mode", ["factored", "dense"])
@pytest.mark.parametrize("seed", range(3))
def test_padding_does_not_change_the_result_of_a_sample(build, kind, mode: str, seed: int) -> None:
    world = build(seed, outside=3)
    masked = np.concatenate([world.masked(1, 1, seed + i, rate) for i, rate in enumerate((0.95, 0.1, 0.6))])
    collate = world.collator(build.imputer().embedding, mode=mode)
    weight = torch.rand(len(world.data.windows[1])) + 0.5
    with torch.no_grad():
        together = collate(world.batch_of(1, [0, 1, 2], masked))
        pooled = kind()(together, together.retrieved, weight)
        for sample in range(3):
            alone = collate(world.batch_of(1, [sample], masked[sample : sample + 1]))
            assert alone.window.typed.shape[1] < together.window.typed.shape[1] or sample == 1
            own = kind()(alone, alone.retrieved, weight)
            for name in ("dosage", "ancestry", "weights"):
                if mode == "dense" or name != "weights":
                    mine = getattr(pooled, name)[2 * sample : 2 * sample + 2]
                    assert torch.allclose(getattr(own, name), mine, atol=1e-6), name


@POOLINGS
def test_a_query_with_nothing_observed_weighs_all_neighbours_alike(build, kind) -> None:
    world = build(outside=2)
    masked = world.masked(1, 2, 1, 0.5)
    masked[0] = True
    batch = world.collator(build.imputer().embedding, k=5, mode="dense")(world.batch_of(1, [0, 1], masked))
    with torch.no_grad():
        pooled = kind()(batch, batch.retrieved, torch.ones(len(world.data.windows[1])))
    weights = pooled.weights
    assert torch.allclose(pooled.dosage[:2], dense_alleles(batch.retrieved.alleles)[:2].float().mean(1), atol=1e-6)
    assert torch.allclose(weights[:2], torch.full_like(weights[:2], 0.2), atol=1e-6)
    assert not torch.allclose(weights[2:], torch.full_like(weights[2:], 0.2), atol=1e-2)


def test_distance_weights_are_a_softmax_of_explicit_distances(build) -> None:
    world = build(outside=2)
    queries = world.batch_of(1, [0, 1], world.masked(1, 2, 1))
    batch = world.collator(build.imputer().embedding, k=5, mode="dense")(queries)
    pooling = DistancePooling()
    weight = torch.rand(len(world.data.windows[1])) * 0.3
    with torch.no_grad():
        pooling.log_strength.fill_(0.4)
        found = pooling(batch, batch.retrieved, weight).weights
    panel = world.data.reference_alleles(1)
    for row in range(4):
        factors = []
        for haplotype in batch.retrieved.ids[row].tolist():
            distance = 0.0
            for site in range(panel.shape[1]):
                if not queries.masked[row // 2, site] and panel[haplotype, site] != queries.alleles[row, site]:
                    distance += float(weight[site])
            factors.append(np.exp(-np.exp(0.4) * distance))
        for place, factor in enumerate(factors):
            assert found[row, place].tolist() == pytest.approx([factor / sum(factors)] * found.shape[2], rel=1e-4)


@POOLINGS
def test_dosage_and_ancestry_are_the_alleles_and_populations_of_the_weights(build, kind) -> None:
    world = build(populations=3, outside=2)
    queries = world.batch_of(1, [0, 1], world.masked(1, 2, 1))
    batch = world.collator(build.imputer().embedding, k=5, mode="dense")(queries)
    found = batch.retrieved
    with torch.no_grad():
        pooled = slow_alone(kind())(batch, found, torch.ones(len(world.data.windows[1])))
    alleles = dense_alleles(found.alleles)
    sites = alleles.shape[2]
    assert pooled.weights.shape == (4, 5, sites)
    assert torch.allclose(pooled.weights.sum(1), torch.ones(4, sites), atol=1e-5)
    for row in range(4):
        for site in range(sites):
            dosage, ancestry = 0.0, [0.0, 0.0, 0.0]
            for place in range(5):
                share = float(pooled.weights[row, place, site])
                dosage += share * int(alleles[row, place, site])
                ancestry[int(found.population[row, place])] += share
            assert float(pooled.dosage[row, site]) == pytest.approx(dosage, abs=1e-5)
            assert pooled.ancestry[row, :, site].tolist() == pytest.approx(ancestry, abs=1e-5)


@POOLINGS
def test_the_pooled_embedding_from_the_codebook_is_the_sum_over_neighbours(build, kind) -> None:
    world = build(outside=1)
    queries = world.batch_of(1, [0], world.masked(1, 1, 1))
    batches = {
        mode: world.collator(build.imputer().embedding, k=5, mode=mode)(queries) for mode in ("factored", "dense")
    }
    pooled = {
        mode: kind()(batch, batch.retrieved, torch.ones(len(world.data.windows[1]))) for mode, batch in batches.items()
    }
    assert pooled["factored"].weights is None
    found = batches["dense"].retrieved
    rows = gather_embeddings(found.codebook, dense_alleles(found.alleles).long())
    explicit = sum(pooled["dense"].weights[:, place, :, None] * rows[:, place] for place in range(5))
    for mode, batch in batches.items():
        assert (batch.retrieved.embeddings is not None) == (mode == "dense")
        of = pooled[mode]
        reference = pooled_embedding(of.dosage, found.codebook, of.weights, batch.retrieved.embeddings)
        assert torch.allclose(reference, explicit, atol=1e-5)


def test_the_pooled_embedding_lies_between_the_two_alleles_by_dosage() -> None:
    codebook = torch.randn(4, 4, 3)
    found = mixed_embedding(codebook, torch.tensor([[0.0, 1.0, 0.25, 0.5]]))
    assert torch.allclose(found[0, 0], codebook[0, 0]) and torch.allclose(found[0, 1], codebook[1, 1])
    assert torch.allclose(found[0, 2], 0.75 * codebook[2, 0] + 0.25 * codebook[2, 1])


def test_copying_stays_finite_where_no_neighbour_matches_a_site_of_large_weight(build) -> None:
    world = build(outside=1, sites=40, window_sites=40, overlap=0, flank=0)
    batch = world.collator(build.imputer().embedding, k=3)(world.batch_of(0, [0], np.zeros((1, 40), dtype=bool)))
    mismatch = batch.retrieved.mismatch.clone()
    mismatch[:, 17] = True
    batch = replace(batch, retrieved=replace(batch.retrieved, mismatch=mismatch))
    weight = torch.ones(40)
    weight[17] = 25.0
    with torch.no_grad():
        pooled = CopyingPooling()(batch, batch.retrieved, weight)
    assert torch.isfinite(pooled.dosage).all()
    assert torch.allclose(pooled.ancestry.sum(1), torch.ones(2, 40), atol=1e-5)
