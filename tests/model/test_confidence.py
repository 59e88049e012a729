"""Evidence of a dosage against explicit loops, and the confidence head's symmetry in REF and ALT."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embrag_ds.model import confidence
from embrag_ds.model.confidence import LEAST_PROBABILITY, ConfidenceHead, confidence_features
from embrag_ds.model.pooling import Evidence
from embrag_ds.ops.dosage import dense_alleles
from embrag_ds.ops.li_stephens import Near, match_lengths


@given(seed=st.integers(0, 2**32), sites=st.integers(1, 9), rate=st.sampled_from([0.0, 0.2, 0.6, 1.0]))
def test_match_lengths_are_those_of_a_walk_to_either_side(seed: int, sites: int, rate: float) -> None:
    maker = torch.Generator().manual_seed(seed)
    count = torch.randint(1, sites + 1, (3,), generator=maker)
    position = torch.rand(3, sites, generator=maker).sort(1).values
    mismatch = (torch.rand(3, sites, 4, generator=maker) < rate) & (torch.arange(sites) < count[:, None])[..., None]
    count_near = 1 + seed % sites
    firsts = torch.randint(0, sites - count_near + 1, (3,), generator=maker)
    near = Near(firsts, count_near, int(firsts.min()), int(firsts.max()) + count_near)
    found = match_lengths(mismatch, position, count, near)
    for row in range(3):
        typed = int(count[row])
        first = int(firsts[row])
        for site in range(first, min(typed, first + count_near)):
            for neighbour in range(4):
                left = right = site
                while left > 0 and not mismatch[row, left, neighbour]:
                    left -= 1
                while right < typed - 1 and not mismatch[row, right, neighbour]:
                    right += 1
                expected = float(position[row, right] - position[row, left])
                assert float(found[row, site - first, neighbour]) == pytest.approx(expected, abs=1e-6)


@pytest.mark.gpu
def test_match_lengths_on_the_gpu_are_those_of_the_cpu() -> None:
    maker = torch.Generator().manual_seed(1)
    position = torch.rand(5, 40, generator=maker).sort(1).values
    mismatch = torch.rand(5, 40, 30, generator=maker) < 0.2
    count = torch.full((5,), 40)
    there = match_lengths(mismatch.cuda(), position.cuda(), count.cuda())
    torch.testing.assert_close(there.cpu(), match_lengths(mismatch, position, count))


def test_the_evidence_is_what_its_docstring_states(build) -> None:
    world = build(5, samples=12, cm_per_site=0.1)
    network = build.imputer(fusion="copying")
    # With the dense store the copying probabilities are part of the result.
    collate = world.collator(network.embedding, k=8, mode="dense")
    batch = collate(world.batch_of(1, [0, 1], world.masked(1, 2, 1, 0.8)))
    found = batch.retrieved
    even = torch.ones(len(batch.window.sites.position))
    network.pooling.slow.data[0] = -100.0
    fast = network.pooling(batch, found, even)
    network.pooling.slow.data[0] = 100.0  # the slow copying model alone, whose evidence is given
    pooled = network.pooling(batch, found, even)
    apart = torch.logit(pooled.dosage, eps=1e-4) - torch.logit(fast.dosage, eps=1e-4)
    torch.testing.assert_close(pooled.evidence.disagreement, apart, rtol=1e-3, atol=1e-3)
    assert float(apart.detach().abs().max()) > 0.1
    position, evidence = batch.window.sites.position, pooled.evidence
    checked = none = 0
    lengths = match_lengths(found.mismatch, position[batch.window.typed], batch.window.typed_count)
    for row in range(4):
        typed = batch.window.typed[row, : int(batch.window.typed_count[row])]
        for place, site in enumerate(range(batch.window.core.start, batch.window.core.stop)):
            left = typed[typed < site].max() if (typed < site).any() else typed.min()
            right = typed[typed >= site].min() if (typed >= site).any() else typed.max()
            carriers = dense_alleles(found.alleles)[row, :, place].float()
            assert float(evidence.gap[row, place]) == pytest.approx(
                abs(float(position[right] - position[left])), abs=1e-5
            )
            nearest = min(abs(float(position[each] - position[site])) for each in (left, right))
            assert float(evidence.nearest[row, place]) == pytest.approx(nearest, abs=1e-5)
            assert -1e-5 <= float(evidence.uncertainty[row, place]) <= math.log(8) + 1e-5
            if site in typed.tolist():
                here = typed.tolist().index(site)
                weights, reach = pooled.weights[row, :, place].detach(), lengths[row, here]
                spread = -math.log(sum(float(each) ** 2 for each in weights))
                assert float(evidence.uncertainty[row, place]) == pytest.approx(spread, abs=1e-4)
                for value, number, of in (
                    (evidence.alt_length, evidence.alt_number, carriers),
                    (evidence.ref_length, evidence.ref_number, 1 - carriers),
                ):
                    if float((weights * of).sum()) > 1e-3:
                        mean = (weights * of * reach).sum() / (weights * of).sum()
                        assert float(value[row, place]) == pytest.approx(float(mean), rel=1e-2, abs=1e-4)
                        several = sum(float(each) ** 0.5 for each in weights * of) ** 2 / float((weights * of).sum())
                        assert float(number[row, place]) == pytest.approx(several, rel=1e-2)
                        assert 0.99 <= float(number[row, place]) <= 1.01 * float(of.sum())
                        checked += 1
                    elif float((weights * of).sum()) < 9e-5:
                        assert float(value[row, place]) == float(number[row, place]) == 0
                        none += 1
    assert checked > 10 and none > 10
    # Between two typed sites, the uncertainty is interpolated by genetic distance, as the probabilities are.
    typed, core = batch.window.typed[0, : int(batch.window.typed_count[0])].tolist(), batch.window.core
    left, right = next((a, b) for a, b in pairwise(typed) if core.start <= a < b - 1 and b < core.stop)
    between = np.interp(
        position[left + 1], position[[left, right]], evidence.uncertainty[0, [left - core.start, right - core.start]]
    )
    assert float(evidence.uncertainty[0, left + 1 - core.start]) == pytest.approx(float(between), abs=1e-4)


@pytest.mark.parametrize("rate", [0.5, 0.9])
def test_the_density_and_the_lengths_follow_their_definitions_in_every_row(build, rate: float) -> None:
    """Lengths at a site between two typed ones are means by interpolated weights."""
    world = build(7, samples=12, cm_per_site=0.1)
    network = build.imputer(fusion="copying")
    masked = np.concatenate([world.masked(1, 1, 1, rate), world.masked(1, 1, 2, rate / 2)])
    batch = world.collator(network.embedding, k=8)(world.batch_of(1, [0, 1], masked))
    with torch.no_grad():
        evidence = network.pooling(batch, batch.retrieved, torch.ones(masked.shape[1])).evidence
    position = batch.window.sites.position
    for row in range(4):
        per_cm = int((~masked[row // 2]).sum()) / float(position[-1] - position[0])
        assert evidence.density[row].tolist() == pytest.approx([per_cm / 100] * evidence.density.shape[1], rel=1e-4)
        typed = position[batch.window.typed[row, : int(batch.window.typed_count[row])]]
        longest = float(typed[-1] - typed[0])
        for of in (evidence.alt_length[row], evidence.ref_length[row]):
            assert float(of.min()) >= 0 and float(of.max()) <= longest * 1.001 + 1e-4


def test_evidence_is_made_of_sums_and_has_no_length_without_weight() -> None:
    """A weight that is the difference of others is mostly rounding error below 1e-4."""
    dosage = torch.tensor([[0.0, 0.5e-4, 2e-4, 0.25, 1 - 2e-4, 1 - 0.5e-4, 1.0]])
    long, short = 3.0, 0.5  # of the haplotypes with ALT and with REF, in cM
    of_alt, of_all = long * dosage, long * dosage + short * (1 - dosage)
    # As many haplotypes with ALT and with REF, equally probable.
    many, few = 9, 4
    root_alt = (many * dosage).sqrt()
    roots = root_alt + (few * (1 - dosage)).sqrt()
    rest = {name: torch.rand(1, 7) for name in ("uncertainty", "nearest", "gap", "density")}
    found = Evidence.of(dosage, dosage.flip(1), of_alt, of_all, root_alt, roots, **rest)
    assert found.alt_length[0].tolist() == pytest.approx([0, 0] + [long] * 5, rel=1e-3)
    assert found.ref_length[0].tolist() == pytest.approx([short] * 5 + [0, 0], rel=1e-2)
    assert found.alt_number[0].tolist() == pytest.approx([0, 0] + [many] * 5, rel=1e-3)
    assert found.ref_number[0].tolist() == pytest.approx([few] * 5 + [0, 0], rel=1e-2)
    assert all(getattr(found, name) is value for name, value in rest.items())
    bounded = [min(max(float(each), 1e-4), 1 - 1e-4) for each in dosage[0]]
    odds = [math.log(each / (1 - each)) for each in bounded]
    apart = [one - other for one, other in zip(odds, reversed(odds), strict=True)]
    assert found.disagreement[0].tolist() == pytest.approx(apart, rel=1e-2, abs=1e-4)
    # Rounding may make a sum that should be 0 negative; a length is not.
    below = Evidence.of(dosage, dosage, of_alt - 1e-3, of_all - 1e-2, root_alt, roots, **rest)
    assert (below.alt_length >= 0).all() and (below.ref_length >= 0).all()


def random_evidence(seed: int, shape: tuple[int, int]) -> Evidence:
    maker = torch.Generator().manual_seed(seed)
    return Evidence(*(torch.rand(shape, generator=maker) for _ in range(9)))


def trained_head() -> ConfidenceHead:
    torch.manual_seed(3)
    head = ConfidenceHead()
    torch.nn.init.normal_(head.layers[-1].weight)
    return head


def test_the_correction_starts_at_zero() -> None:
    torch.manual_seed(1)
    assert (ConfidenceHead()(torch.randn(2, 5), random_evidence(1, (2, 5)), torch.rand(2, 5)) == 0).all()


def test_exchanging_alleles_reverses_the_correction() -> None:
    prior, frequency, evidence = torch.randn(4, 30), torch.rand(4, 30), random_evidence(2, (4, 30))
    turned = Evidence(
        alt_length=evidence.ref_length,
        ref_length=evidence.alt_length,
        alt_number=evidence.ref_number,
        ref_number=evidence.alt_number,
        uncertainty=evidence.uncertainty,
        nearest=evidence.nearest,
        gap=evidence.gap,
        density=evidence.density,
        disagreement=-evidence.disagreement,
    )
    head = trained_head()
    one, other = head(prior, evidence, frequency), head(-prior, turned, 1 - frequency)
    torch.testing.assert_close(one, -other, rtol=1e-4, atol=1e-5)
    assert one.std() > 0.1


@pytest.mark.parametrize("grown", [False, True])
def test_nothing_is_corrected_where_the_minor_allele_is_hardly_probable(grown: bool) -> None:
    chance = torch.tensor([1e-5, 0.5e-3, 0.99e-3, 1.01e-3, 0.3, 0.5, 0.9, 0.9991, 0.99999])
    head, evidence = trained_head(), random_evidence(4, (2, 9))
    prior = torch.stack([torch.logit(chance), -torch.logit(chance)])
    frequency = torch.tensor([[0.1], [0.9]]).expand(2, 9)  # the minor allele is ALT in the first row, else REF
    with torch.set_grad_enabled(grown):
        correction = head(prior, evidence, frequency)
    likely = (chance >= LEAST_PROBABILITY).expand(2, 9)
    assert LEAST_PROBABILITY == 1e-3 and likely[0].tolist() == [False] * 3 + [True] * 6
    assert (correction[~likely] == 0).all() and (correction[likely] != 0).all()
    # A frequency of a half exactly is that of ALT as the minor allele.
    half = head(prior, evidence, torch.full((2, 9), 0.5))
    assert (half[0] != 0).tolist() == likely[0].tolist() and torch.equal(half[1] != 0, 1 - chance >= LEAST_PROBABILITY)


def test_the_features_are_those_of_the_minor_allele() -> None:
    evidence, frequency = random_evidence(8, (2, 6)), torch.tensor([[0.2, 1e-7, 0.5, 0.7, 0.99, 1.0]]).repeat(2, 1)
    odds, sign = torch.randn(2, 6), torch.tensor([[1.0, 1.0, 1.0, -1.0, -1.0, -1.0]]).repeat(2, 1)
    found = confidence_features(odds, sign, evidence, frequency)
    assert found.shape == (2, 6, 12)
    for row in range(2):
        for site in range(6):
            here = {name: float(value[row, site]) for name, value in vars(evidence).items()}
            is_ref, odd = site >= 3, float(odds[row, site])
            own, others = ("ref", "alt") if is_ref else ("alt", "ref")
            rarity = max(min(float(frequency[row, site]), 1 - float(frequency[row, site])), 1e-5)
            expected = [
                odd / 4,
                (odd / 4) ** 2 / 4,
                math.log(rarity) / 4,
                *(math.log(here[f"{name}_length"] + 1e-3) / 3 for name in (own, others)),
                here["uncertainty"] / 7,
                *(math.log(here[name] + 1e-3) / 3 for name in ("nearest", "gap")),
                math.log(here["density"]) / 2,
                (-1 if is_ref else 1) * here["disagreement"] / 4,
                *(math.log(here[f"{name}_number"] + 1) / 3 for name in (own, others)),
            ]
            assert found[row, site].tolist() == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_the_correction_in_pieces_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    prior, frequency, evidence = torch.randn(4, 30), torch.rand(4, 30), random_evidence(6, (4, 30))
    head = trained_head()
    whole = head(prior, evidence, frequency)
    monkeypatch.setattr(confidence, "_SITES_AT_ONCE", 7)
    with torch.no_grad():
        torch.testing.assert_close(head(prior, evidence, frequency), whole.detach())


def test_the_correction_is_finite_at_the_edges() -> None:
    nothing = Evidence(*(torch.zeros(2, 3) for _ in range(7)), torch.full((2, 3), 0.01), torch.zeros(2, 3))
    for frequency in (0.0, 1.0, 0.5):
        prior = torch.tensor([[-11.6, 0.0, 11.6]]).repeat(2, 1)
        correction = trained_head()(prior, nothing, torch.full((2, 3), frequency))
        assert torch.isfinite(correction).all()
