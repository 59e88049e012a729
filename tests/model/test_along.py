"""Stretches copied whole, beside the network on the same sites with all haplotypes as neighbours."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numba
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from embrag_ds.copying import along, chosen, loops, recursions, stretch, workspace
from embrag_ds.copying.along import CopyAlong
from embrag_ds.copying.model import CopyingModel
from embrag_ds.data.panel import PanelSubset
from embrag_ds.data.ploidy import Ploidy
from embrag_ds.data.sampler import QueryBatch, exclusion_table
from embrag_ds.data.tokens import MASK
from embrag_ds.data.windows import WindowedPanel
from embrag_ds.errors import UserError
from embrag_ds.ops.dosage_shared import SharedAlleles
from tests.digests import digest_of


def disturbed(network: torch.nn.Module, seed: int) -> torch.nn.Module:
    """The network with other numbers of its copying models, as training would give it."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in network.pooling.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        network.background.fill_(-2.0)
    return network


def without_head(network: torch.nn.Module) -> None:
    """Give the network a confidence head that corrects nothing."""
    for parameter in network.confidence.layers[-1].parameters():
        torch.nn.init.zeros_(parameter)


def along_stretches(network: torch.nn.Module, *given: Any, **options: Any) -> CopyAlong:
    """What copies along stretches with the weights of a network."""
    weights = {name: value.numpy() for name, value in network.state_dict().items()}
    return CopyAlong(CopyingModel(weights, network.good_turing), *given, **options)


@settings(max_examples=30)
@example(seed=38704, rate=0.3, window=1, cm=0.0, lost=0.0, turing=False, head=False)
@given(
    seed=st.integers(0, 2**20),
    rate=st.sampled_from([0.3, 0.7, 0.9, 0.97]),
    window=st.integers(0, 2),
    cm=st.sampled_from([0.0, 0.002, 0.05, 0.3]),
    lost=st.sampled_from([0.0, 0.2]),
    turing=st.booleans(),
    head=st.booleans(),
)
def test_dosages_are_those_of_the_network_with_all_haplotypes_as_neighbours(
    build, seed: int, rate: float, window: int, cm: float, lost: float, turing: bool, head: bool
) -> None:
    world = build(seed, samples=12, cm_per_site=cm, populations=3)
    network = disturbed(build.imputer(seed, fusion="copying", good_turing=turing), seed)
    if not head:
        without_head(network)
    samples = [1, 4, 5, 9]
    masked = world.masked(window, 1, seed, rate)
    masked[:, seed % masked.shape[1]] = False  # at least one site is typed
    queries = world.batch_of(window, samples, masked.repeat(len(samples), axis=0))
    missing = np.random.default_rng(seed).random(queries.alleles.shape) < lost
    if lost:
        queries = replace(queries, missing=missing)
    batch = world.collator(network.embedding, k=10**6)(queries)
    assert batch.retrieved.ids.shape[1] == len(world.data.reference) - 2  # all but a sample's own
    with torch.no_grad():
        expected = network(batch, transformer=False).logits.sigmoid().numpy()
    copy = along_stretches(network, world.data, exclusion_table(world.samples, None))
    typed = ~masked[0]
    alleles = np.where(missing, MASK, queries.alleles)[:, typed].astype(np.uint8)
    found = copy.probability(copy.stretch(window, typed), np.ascontiguousarray(alleles), np.array(samples))
    # As on a GPU: all haplotypes without a search, and one table of alleles.
    whole = world.collator(network.embedding, whole=True)(queries)
    assert isinstance(whole.retrieved.alleles, SharedAlleles) and whole.retrieved.barred.sum() == 4 * len(samples)
    with torch.no_grad():
        as_on_gpu = network(whole, transformer=False).logits.sigmoid().numpy()
    assert found.std() > 0.05
    for way in (found, as_on_gpu):
        apart = np.abs(way - expected)
        # The head reads the mean match length of haplotypes that hardly have a probability, which is mostly rounding.
        assert apart.mean() < 1e-4 and np.quantile(apart, 0.95) < 1e-3 if head else apart.max() < 1e-5, apart.max()


@pytest.mark.parametrize("strength", [1.0, 8.0])
def test_haplotypes_whose_prior_is_the_least_are_copied_as_by_the_network(build, strength: float) -> None:
    world = build(3, samples=12)
    network = build.imputer(3, fusion="copying")
    without_head(network)
    network.pooling.closeness.data.mul_(strength)
    typed = ~world.masked(0, 1, 3, 0.5)[0]
    found, expected = beside_the_network(network, world, world.data.samples_alleles(0, np.arange(4)), typed)
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("turing", [False, True])
def test_haploid_samples_count_once_in_frequencies_and_are_copied_as_by_the_network(build, turing: bool) -> None:
    """Some are haploid all along, and some from a site on, as males are beyond a pseudoautosomal region."""
    world = build(6, samples=13, populations=3)
    panel, sites = world.data.reference.panel, len(world.data.reference.panel.sites)
    haploid = np.zeros((2, 13), dtype=bool)
    haploid[:, [2, 3]], haploid[1, [4, 9, 12]] = True, True
    ploidy = Ploidy(np.array([0, sites // 2]), haploid)
    alleles = panel.alleles_at(np.arange(sites))
    alleles[:, 1::2] = np.where(ploidy.at(np.arange(sites)), alleles[:, 0::2], alleles[:, 1::2])
    packed = np.packbits(alleles, axis=1, bitorder="little")
    of, everyone = world.data.reference.populations, np.arange(13)
    of_males = PanelSubset(replace(panel, packed=packed, ploidy=ploidy), of, everyone)
    as_if_diploid = PanelSubset(replace(panel, packed=packed), of, everyone)
    network = disturbed(build.imputer(6, fusion="copying", good_turing=turing), 6)
    network.background.data.fill_(0.0)  # expected frequencies make half of the prior
    without_head(network)
    samples = [0, 2, 4, 12]
    found = []
    for reference in (of_males, as_if_diploid):
        data = WindowedPanel(reference, world.data.windows, world.data.position_cm)
        here = replace(world, data=data)
        for window in range(len(data.windows)):
            masked = here.masked(window, 1, window, 0.8)
            queries = here.batch_of(window, samples, masked.repeat(len(samples), axis=0))
            batch = here.collator(network.embedding, k=10**6)(queries)
            with torch.no_grad():
                expected = network(batch, transformer=False).logits.sigmoid().numpy()
            copy = along_stretches(network, data, exclusion_table(world.samples, None))
            typed = np.ascontiguousarray(queries.alleles[:, ~masked[0]])
            copied = copy.probability(copy.stretch(window, ~masked[0]), typed.astype(np.uint8), np.array(samples))
            np.testing.assert_allclose(copied, expected, atol=2e-5)
            np.testing.assert_array_equal(copied[2], copied[3])  # both haplotypes of a haploid target
            found.append(copied)
    half = len(found) // 2
    assert max(np.abs(one - other).max() for one, other in zip(found[:half], found[half:], strict=True)) > 1e-3


def beside_the_network(network, world, alleles: np.ndarray, typed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """ALT probabilities of panel samples 0, 1, ... in window 0 with these ``alleles``, by stretch and by network."""
    samples = np.arange(len(alleles) // 2)
    queries = QueryBatch(0, samples, alleles, np.repeat(~typed[None], len(samples), axis=0))
    batch = world.collator(network.embedding, k=10**6)(queries)
    with torch.no_grad():
        expected = network(batch, transformer=False).logits.sigmoid().numpy()
    whole = world.collator(network.embedding, whole=True)(queries)
    with torch.no_grad():
        np.testing.assert_allclose(network(whole, transformer=False).logits.sigmoid().numpy(), expected, atol=1e-4)
    copy = along_stretches(network, world.data, exclusion_table(world.samples, None))
    return copy.probability(copy.stretch(0, typed), np.ascontiguousarray(alleles[:, typed]), samples), expected


def with_alleles(world, alleles: np.ndarray):
    """The world with other ``alleles`` uint8 [S, H] of its panel, all of whose samples are reference samples."""
    given, windows = world.data.reference, world.data.windows
    panel = replace(given.panel, packed=np.packbits(alleles, axis=1, bitorder="little"))
    reference = PanelSubset(panel, given.populations, np.arange(len(panel.samples)))
    return replace(world, data=WindowedPanel(reference, windows, world.data.position_cm))


@pytest.mark.parametrize("cm", [0.0, 1e-4, 0.009])
def test_a_long_stretch_of_targets_in_the_panel_stays_finite(build, cm: float) -> None:
    """Their own haplotypes match them everywhere and have no prior, so nothing else bounds their backward states."""
    world = build(8, sites=2500, samples=8, window_sites=2500, overlap=0, flank=0, cm_per_site=cm)
    network = disturbed(build.imputer(8, fusion="copying"), 8)
    without_head(network)
    typed = ~world.masked(0, 1, 8, 0.4)[0]
    found, expected = beside_the_network(network, world, world.data.samples_alleles(0, np.arange(3)), typed)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("nats", [5.0, 40.0, 60.0])
def test_typed_alleles_that_no_haplotype_has_change_nothing_elsewhere(build, nats: float) -> None:
    """At such a site all states fall alike, to exp(-30) at most, and twice in a row."""
    world = build(9, samples=12)
    network = build.imputer(9, fusion="copying")
    without_head(network)
    network.pooling.penalty.data[:2] = float(np.log(nats)) / 10
    panel = world.data.reference.panel
    alleles = panel.alleles_at(np.arange(len(panel.sites)))
    alleles[::3] = 0
    world = with_alleles(world, alleles)
    typed = ~world.masked(0, 1, 9, 0.3)[0]
    queries = world.data.samples_alleles(0, np.arange(4))
    window = world.data.windows[0]
    alone = (np.arange(window.start, window.stop) % 3 == 0) & typed
    queries[:, alone] = 1
    assert alone.sum() > 3
    found, expected = beside_the_network(network, world, queries, typed)
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("nats", [5.0, 25.0, 60.0])
def test_alleles_of_the_target_alone_at_many_typed_sites_in_a_row(build, nats: float) -> None:
    """Only haplotypes that it must not copy have them, and nothing bounds what these come to."""
    world = build(9, samples=12)
    network = build.imputer(9, fusion="copying")
    without_head(network)
    network.pooling.penalty.data[:2] = float(np.log(nats)) / 10
    panel, window = world.data.reference.panel, world.data.windows[0]
    alleles = panel.alleles_at(np.arange(len(panel.sites)))
    row = slice(window.start + 8, window.start + 40)
    alleles[row], alleles[row, :2] = 0, 1
    world = with_alleles(world, alleles)
    typed = ~world.masked(0, 1, 9, 0.1)[0]
    found, expected = beside_the_network(network, world, world.data.samples_alleles(0, np.arange(3)), typed)
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize(("samples", "cm", "rate"), [(150, 0.02, 0.3), (90, 0.05, 0.6), (90, 0.001, 0.9)])
def test_what_is_left_out_of_a_piece_is_negligible_there(build, samples: int, cm: float, rate: float) -> None:
    """Over many pieces, in each of which some of the haplotypes are computed, and with hundreds of them kept."""
    world = build(11, sites=500, samples=samples, window_sites=500, overlap=0, flank=0, cm_per_site=cm)
    network = disturbed(build.imputer(11, fusion="copying"), 11)
    without_head(network)
    typed = ~world.masked(0, 1, 11, rate)[0]
    # Mosaics of two others, so that some haplotypes match over long, and mismatches.
    alleles = world.data.samples_alleles(0, np.array([20, 30]))
    targets = np.concatenate([alleles[:2, :200], alleles[2:, 200:]], axis=1)
    targets[:, 7::60] ^= 1
    found, expected = beside_the_network(network, world, targets, typed)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(found - expected).mean() < 1e-6


@pytest.mark.parametrize("most_saved", [1, 24 * 8 * 3, 24 * 8 * 20])
def test_forward_states_that_were_not_saved_are_computed_again(build, most_saved: int) -> None:
    world = build(12, sites=300, samples=12, window_sites=300, overlap=0, flank=0)
    network = disturbed(build.imputer(12, fusion="copying"), 12)
    typed = ~world.masked(0, 1, 12, 0.2)[0]
    alleles = np.ascontiguousarray(world.data.samples_alleles(0, np.arange(3))[:, typed])
    found = []
    for limit in ({}, {"most_saved": most_saved}):
        copy = along_stretches(network, world.data, exclusion_table(world.samples, None), **limit)
        found.append(copy.probability(copy.stretch(0, typed), alleles, np.arange(3)))
    assert np.array_equal(*found)


def test_more_typed_sites_than_the_loop_can_number_are_refused(build, monkeypatch: pytest.MonkeyPatch) -> None:
    world = build(13, samples=8)
    copy = along_stretches(build.imputer(13, fusion="copying"), world.data, exclusion_table(world.samples, None))
    typed = ~world.masked(1, 1, 13)[0]
    monkeypatch.setattr(along, "MOST_TYPED", int(typed.sum()))
    copy.stretch(1, typed)
    monkeypatch.setattr(along, "MOST_TYPED", int(typed.sum()) - 1)
    with pytest.raises(UserError, match=r"window 1 has \d+ typed sites with its flanks, and at most \d+ can be copied"):
        copy.stretch(1, typed)


def test_targets_outside_the_panel_copy_all_haplotypes(build) -> None:
    """Beside the same samples with a twin of theirs that nobody may copy: the panel is the same then."""
    world = build(3, samples=10, outside=2)
    network = disturbed(build.imputer(3, fusion="copying"), 3)
    copy = along_stretches(network, world.data, exclusion_table(world.samples, None))
    masked = world.masked(1, 1, 3)
    stretch = copy.stretch(1, ~masked[0])
    alleles = np.ascontiguousarray(world.data.samples_alleles(1, np.array([0, 1]))[:, ~masked[0]])
    named, nameless = (copy.probability(stretch, alleles, np.array(who)).copy() for who in ([0, 1], [-1, -1]))
    assert np.array_equal(named, nameless)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_and_blocks_of_samples_do_not_change_a_byte(build, threads: int) -> None:
    world = build(5, samples=14, sites=300, window_sites=300, overlap=0, flank=0)
    network = disturbed(build.imputer(5, fusion="copying"), 5)
    typed = ~world.masked(0, 1, 5, 0.9)[0]
    samples = np.arange(7)
    alleles = np.ascontiguousarray(world.data.samples_alleles(0, samples)[:, typed])

    def copied(number: int) -> np.ndarray:
        copy = along_stretches(network, world.data, exclusion_table(world.samples, None))
        stretch = copy.stretch(0, typed)
        parts = [slice(start, min(start + number, 7)) for start in range(0, 7, number)]
        return np.concatenate(
            [copy.probability(stretch, alleles[2 * each.start : 2 * each.stop], samples[each]) for each in parts]
        )

    alone = copied(7)
    assert np.array_equal(copied(3), alone)
    torch.set_num_threads(threads)
    try:
        assert np.array_equal(copied(7), alone) and np.array_equal(copied(2), alone)
    finally:
        torch.set_num_threads(1)


def test_the_heads_inputs_are_noted_where_they_are_wanted(build) -> None:
    """From them the head gives the probabilities that the loop does, which stay the same, as do those of a network."""
    world = build(7, samples=14, sites=120, window_sites=120, overlap=0, flank=0)
    network = disturbed(build.imputer(7, fusion="copying"), 7)
    typed = ~world.masked(0, 1, 7, 0.7)[0]
    alleles = np.ascontiguousarray(world.data.samples_alleles(0, np.arange(5))[:, typed])
    samples = np.array([0, 1, -1, 3, 4])
    copy = along_stretches(network, world.data, exclusion_table(world.samples, None))
    part = copy.stretch(0, typed)
    expected = copy.probability(part, alleles, samples)
    out = np.empty_like(expected)
    for noted in (np.arange(120) % 3 == 0, np.ones(120, dtype=bool), np.zeros(120, dtype=bool)):
        rows, copied = copy.head_rows(part, alleles, samples, noted, out)
        np.testing.assert_array_equal(out, expected)
        again = copy.copied(part, alleles, samples, out)
        assert all(np.array_equal(one, other) for one, other in zip(copied, again, strict=True))
        with torch.no_grad():
            odds = network.confidence.minor_odds(torch.from_numpy(rows.features)).numpy()
        minor = 1 / (1 + np.exp(-odds))
        found = np.where(rows.to_ref, 1 - minor, minor)
        np.testing.assert_allclose(found, expected[rows.haplotypes, rows.sites], atol=1e-5)
        places = set(zip(rows.haplotypes.tolist(), rows.sites.tolist(), strict=True))
        assert len(places) == len(rows.sites) and set(rows.sites.tolist()) <= set(np.flatnonzero(noted).tolist())
        # Every site of this panel has a likely minor allele in one haplotype at least.
        assert set(rows.sites.tolist()) == set(np.flatnonzero(noted).tolist())


class Packed(NamedTuple):
    """The part of a panel that mismatches depend on."""

    packed: np.ndarray
    turned: np.ndarray
    position: np.ndarray


@numba.njit
def mismatches(panel, query, pieces, asked, last):
    """Mismatches found before and behind each of ``pieces``; Python itself cannot call a part of the loop."""
    haplotypes, lane = panel.packed.shape[1], 2
    found, states = workspace.new_chosen(haplotypes), workspace.new_states(len(query), haplotypes, 1, 1)
    recursions.note_masks(query, states.own[lane], states.known[lane])
    chosen.start_haplotypes(panel, found)
    before, after = np.zeros(asked.shape, dtype=np.int64), np.zeros(asked.shape, dtype=np.int64)
    for n in range(len(pieces)):
        count = 0
        for k in range(haplotypes):
            if asked[n, k]:
                found.who[count] = k
                count += 1
        start = 8 * pieces[n]
        chosen.find_mismatches(panel, states, found, count, start, min(start + 8, last + 1), lane)
        before[n], after[n] = found.before[lane], found.after[lane]
    return before, after


@pytest.mark.long
@given(
    st.integers(0, 2**32 - 1), st.integers(1, 200), st.sampled_from([0.01, 0.2, 0.7]), st.sampled_from([0.1, 0.6, 1])
)
@settings(max_examples=60, deadline=None)
def test_mismatches_beside_a_piece_are_the_nearest(seed: int, typed: int, rate: float, share: float) -> None:
    """However haplotypes come to be chosen in some pieces and not in others, and with missing alleles."""
    rng = np.random.default_rng(seed)
    haplotypes, last = 7, int(rng.integers(typed))
    query = rng.choice(3, typed, p=[0.45, 0.45, 0.1]).astype(np.uint8)
    differs = rng.random((typed, haplotypes)) < rate
    alleles = np.where(differs, 1 - query[:, None] % 2, query[:, None] % 2).astype(np.uint8)
    packed = np.packbits(alleles, axis=0, bitorder="little")
    panel = Packed(packed, stretch.turned_words(packed), np.arange(typed, dtype=np.float32))
    pieces = np.arange(last // 8, -1, -1)
    asked = rng.random((len(pieces), haplotypes)) < share
    before, after = mismatches(panel, query, pieces, asked, last)
    for n, k in zip(*np.nonzero(asked), strict=True):
        sites = [t for t in range(typed) if differs[t, k] and query[t] < 2]
        start = 8 * pieces[n]
        assert before[n, k] == max((t for t in sites if t < start), default=0)
        assert after[n, k] == min((t for t in sites if t >= min(start + 8, last + 1)), default=typed - 1)


def test_the_loop_changes_with_its_parts() -> None:
    """Or numba would go on with what it has kept of it, whose parts are older."""
    parts = "chosen", "head", "instructions", "kept", "priors", "records", "recursions", "workspace"
    assert digest_of("copying", *parts) == loops.PARTS
