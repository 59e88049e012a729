"""Masks: pure functions of their arguments, with the sites that each policy promises."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embrag_ds.data.masking import (
    VALIDATION_MASKS,
    MaskingConfig,
    MaskSites,
    Policy,
    ValidationMask,
    array_typed,
    curriculum_rate,
    masked_by,
    training_masks,
    validation_mask,
)
from embrag_ds.errors import UserError


def mask_sites(seed: int, count: int, length_bp: int = 100_000) -> MaskSites:
    """Sites at distinct increasing positions, two fifths of them below 5 % and a fifth below 1 %."""
    rng = np.random.default_rng(seed)
    pos = np.sort(rng.choice(length_bp, size=count, replace=False)) + 1
    maf = rng.choice([0.001, 0.02, 0.05, 0.2, 0.5], size=count)
    return MaskSites(pos, maf)


def mask(config: MaskingConfig | None = None, **changed: object) -> np.ndarray:
    arguments: dict = {"sites": mask_sites(1, 200), "seed": 3, "epoch": 2, "step": 50, "window": 5}
    arguments |= {"samples": np.array([4, 9, 1])} | changed
    return training_masks(config or MaskingConfig(), **arguments)


config_strategy = st.builds(
    MaskingConfig,
    policies=st.sampled_from(
        [
            {"array": 1.0},
            {"random": 1.0},
            {"frequency_guided": 1.0},
            {"array": 0.5, "random": 0.3, "frequency_guided": 1},
        ]
    ),
    scope=st.sampled_from(["sample", "window"]),
)


@settings(deadline=None)
@given(config=config_strategy, seed=st.integers(0, 9), epoch=st.integers(0, 9), window=st.integers(0, 9))
def test_the_same_arguments_give_the_same_mask(config: MaskingConfig, seed: int, epoch: int, window: int) -> None:
    first = mask(config, seed=seed, epoch=epoch, window=window)
    mask(config, seed=seed + 1)
    np.random.seed(0)
    second = mask(config, seed=seed, epoch=epoch, window=window)
    assert first.shape == (3, 200) and first.dtype == bool
    assert np.array_equal(first, second)


@settings(deadline=None)
@given(samples=st.lists(st.integers(-1, 50), min_size=1, max_size=6, unique=True), data=st.data())
def test_a_samples_mask_does_not_depend_on_its_batch(samples: list[int], data: st.DataObject) -> None:
    config = MaskingConfig(scope="sample")
    order = data.draw(st.permutations(samples))
    together = mask(config, samples=np.array(order))
    for row, sample in zip(together, order, strict=True):
        assert np.array_equal(row, mask(config, samples=np.array([sample]))[0])


@pytest.mark.parametrize("policy", ["array", "random", "frequency_guided"])
@pytest.mark.parametrize("scope", ["sample", "window"])
@pytest.mark.parametrize("changed", [{"seed": 4}, {"epoch": 3}, {"window": 6}])
def test_masks_differ_with_seed_epoch_and_window(policy: str, scope: str, changed: dict[str, int]) -> None:
    config = MaskingConfig(policies={policy: 1.0}, scope=scope)  # type: ignore[arg-type]
    base, other = mask(config), mask(config, **changed)
    assert all(not np.array_equal(one, two) for one, two in zip(base, other, strict=True))


@pytest.mark.parametrize("policy", ["array", "random", "frequency_guided"])
def test_scope_decides_whether_samples_share_a_mask(policy: str) -> None:
    shared = mask(MaskingConfig(policies={policy: 1.0}, scope="window"))
    own = mask(MaskingConfig(policies={policy: 1.0}, scope="sample"))
    assert (shared == shared[0]).all()
    assert all(not np.array_equal(own[one], own[two]) for one, two in ((0, 1), (0, 2), (1, 2)))


def test_scope_window_does_not_depend_on_the_samples_of_the_batch() -> None:
    config = MaskingConfig(scope="window")
    assert np.array_equal(mask(config, samples=np.array([7]))[0], mask(config)[0])


def test_policies_are_drawn_by_their_weights() -> None:
    # "array" is recognised by its many masked sites, "random" by its rate of 10 %.
    config = MaskingConfig(policies={"array": 3.0, "random": 1.0}, random_rate=(0.1, 0.1))
    masked = mask(config, samples=np.arange(800)).mean(1)
    assert (masked > 0.5).mean() == pytest.approx(0.75, abs=0.06)


def test_a_policy_of_weight_zero_is_never_drawn() -> None:
    config = MaskingConfig(policies={"array": 0.0, "frequency_guided": 0.0, "random": 1.0}, random_rate=(0.1, 0.1))
    assert mask(config, samples=np.arange(300)).mean(1).max() < 0.25


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32),
    count=st.integers(1, 300),
    spacing=st.floats(50, 50_000),
    min_maf=st.sampled_from([0.0, 0.02, 0.05, 0.3, 0.6]),
)
def test_an_array_types_exactly_one_common_site_in_every_cell_that_has_one(
    seed: int, count: int, spacing: float, min_maf: float
) -> None:
    sites = mask_sites(seed, count)
    typed = array_typed(sites, spacing, min_maf, np.random.default_rng(seed))
    origin = np.random.default_rng(seed).random() * spacing
    assert (sites.maf[typed] >= min_maf).all()
    typed_in: dict[int, int] = {}
    for pos, maf, is_typed in zip(sites.pos.tolist(), sites.maf.tolist(), typed.tolist(), strict=True):
        if maf >= min_maf:
            cell = int((pos + origin) // spacing)
            typed_in[cell] = typed_in.get(cell, 0) + is_typed
    assert all(number == 1 for number in typed_in.values())


def test_an_array_chooses_among_a_cells_sites_at_random() -> None:
    sites = MaskSites(np.arange(1, 5), np.full(4, 0.3))
    draws = [array_typed(sites, 1e9, 0.05, np.random.default_rng(seed)) for seed in range(400)]
    # One cell nearly always: every site should be chosen about 100 times.
    assert (np.sum(draws, axis=0) > 60).all()


def test_the_array_policy_keeps_its_spacing_within_the_configured_range() -> None:
    sites = MaskSites(np.arange(1, 4001) * 25, np.full(4000, 0.3))  # 100 kb, every site common
    config = MaskingConfig(array_spacing_bp=(500.0, 5000.0))
    rngs = [np.random.default_rng(seed) for seed in range(150)]
    counts = (~masked_by("array", config, sites, 0.5, rngs)).sum(1)
    assert 20 <= counts.min() <= 25 and 150 <= counts.max() <= 201
    # Log-uniform: half the draws lie below the geometric mean of the range, 1581 bp or 63 typed sites.
    assert np.median(counts) == pytest.approx(63, rel=0.25)


@pytest.mark.parametrize("seed", range(3))
def test_a_manifest_types_exactly_its_sites(seed: int) -> None:
    sites = mask_sites(seed, 100)
    manifest = np.random.default_rng(seed).random(100) < 0.2
    config = MaskingConfig(policies={"array": 1.0})
    masked = mask(config, sites=replace(sites, manifest=manifest), seed=seed)
    assert (masked == ~manifest).all()


@pytest.mark.parametrize("rate", [0.3, 0.8])
def test_the_random_policy_masks_the_given_share_independently_of_frequency(rate: float) -> None:
    sites = mask_sites(1, 20_000)
    masked = masked_by("random", MaskingConfig(), sites, rate, [np.random.default_rng(1)])[0]
    for maf in np.unique(sites.maf):
        assert masked[sites.maf == maf].mean() == pytest.approx(rate, abs=0.03)


def test_the_curriculum_rises_linearly_and_then_stays() -> None:
    config = MaskingConfig(random_rate=(0.3, 0.7), curriculum_steps=100)
    rates = [curriculum_rate(config, step) for step in (0, 25, 50, 100, 101, 10**6)]
    assert rates == pytest.approx([0.3, 0.4, 0.5, 0.7, 0.7, 0.7])


def test_the_curriculum_reaches_the_random_masks() -> None:
    config = MaskingConfig(policies={"random": 1.0}, random_rate=(0.2, 0.8), curriculum_steps=100)
    sites = mask_sites(1, 5000)
    for step, rate in ((0, 0.2), (50, 0.5), (500, 0.8)):
        assert mask(config, sites=sites, step=step).mean() == pytest.approx(rate, abs=0.02)


def test_the_frequency_guided_policy_masks_rare_and_other_sites_at_their_own_rates() -> None:
    config = MaskingConfig(rare_maf=0.02, rare_rate=0.9)
    sites = mask_sites(1, 20_000)
    masked = masked_by("frequency_guided", config, sites, 0.4, [np.random.default_rng(2)])[0]
    for maf in np.unique(sites.maf):
        # The threshold itself is not rare.
        expected = 0.9 if maf < 0.02 else 0.4
        assert masked[sites.maf == maf].mean() == pytest.approx(expected, abs=0.03)


# Changing a recipe breaks comparability with earlier runs: give the mask a new name and add its digest here.
FROZEN = {
    "array-sparse-2": "5ee3e78c25454266",
    "array-dense-2": "647402fdbe8c3aeb",
    "random-50-2": "fe9fc3147ffb7513",
    "random-80-2": "dcef75a2d44ef78d",
}


def plain_sites(first: int = 0, manifest: np.ndarray | None = None) -> MaskSites:
    """Sites that are made without random numbers."""
    place = np.arange(20_000, dtype=np.int64)
    return MaskSites(place * 97 + place**2 % 89 + first, (place * 7919 % 10_007) / 20_014, manifest)


def digest(validation: ValidationMask) -> str:
    """Digest of the masks of three windows."""
    hashed = hashlib.sha256()
    for window in (0, 1, 7):
        hashed.update(np.packbits(validation_mask(validation, plain_sites(window), window)).tobytes())
    return hashed.hexdigest()[:16]


# A resumed run goes on with the masks of the run before it.
FROZEN_TRAINING = {
    "sample": (MaskingConfig(), plain_sites(), "a9f0a7cd08be5a5b"),
    "window": (MaskingConfig(scope="window"), plain_sites(), "e2b7f48e4af1afbf"),
    "manifest": (MaskingConfig(), plain_sites(manifest=np.arange(20_000) % 7 == 0), "a14b7a79e40fde1d"),
}


@pytest.mark.parametrize("name", FROZEN_TRAINING)
def test_training_masks_are_what_they_have_always_been(name: str) -> None:
    config, sites, expected = FROZEN_TRAINING[name]
    hashed = hashlib.sha256()
    for step, window in ((0, 0), (400, 1), (5000, 7)):
        masked = mask(config, sites=sites, step=step, window=window, samples=np.arange(40) * 5 % 43)
        hashed.update(np.packbits(masked).tobytes())
    assert hashed.hexdigest()[:16] == expected


@pytest.mark.parametrize("validation", VALIDATION_MASKS, ids=lambda each: each.name)
def test_frozen_validation_masks_are_what_their_name_has_always_meant(validation: ValidationMask) -> None:
    assert digest(validation) == FROZEN[validation.name]


def test_no_frozen_validation_mask_has_vanished() -> None:
    assert [each.name for each in VALIDATION_MASKS] == list(FROZEN)


@pytest.mark.parametrize("validation", VALIDATION_MASKS, ids=lambda each: each.name)
def test_validation_masks_differ_between_windows(validation: ValidationMask) -> None:
    sites = mask_sites(1, 500)
    assert not np.array_equal(validation_mask(validation, sites, 0), validation_mask(validation, sites, 1))


def test_validation_masks_have_the_rates_and_densities_of_their_names() -> None:
    sites = MaskSites(np.arange(1, 20_001) * 20, np.full(20_000, 0.3))  # 400 kb
    masked = {each.name: validation_mask(each, sites, 0) for each in VALIDATION_MASKS}
    assert masked["random-50-2"].mean() == pytest.approx(0.5, abs=0.02)
    assert masked["random-80-2"].mean() == pytest.approx(0.8, abs=0.02)
    assert (~masked["array-sparse-2"]).sum() == pytest.approx(100, abs=1)
    assert (~masked["array-dense-2"]).sum() == pytest.approx(333, abs=2)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"policies": {"arrray": 1.0}}, "masking.policies"),
        ({"policies": {"array": -1.0, "random": 2.0}}, "masking.policies"),
        ({"policies": {"array": 0.0}}, "masking.policies"),
        ({"policies": {}}, "masking.policies"),
        ({"random_rate": (0.5, 0.4)}, "masking.random_rate"),
        ({"random_rate": (0.5, 1.1)}, "masking.random_rate"),
        ({"array_spacing_bp": (0.0, 10.0)}, "masking.array_spacing_bp"),
        ({"rare_rate": 1.5}, "masking.rare_rate"),
        ({"curriculum_steps": 0}, "masking.curriculum_steps"),
    ],
)
def test_bad_settings_are_user_errors_naming_the_key(settings: dict, key: str) -> None:
    with pytest.raises(UserError, match=key):
        MaskingConfig(**settings)


@pytest.mark.parametrize("policy", ["array", "random", "frequency_guided"])
def test_a_window_of_one_site_can_be_masked(policy: Policy) -> None:
    masked = masked_by(policy, MaskingConfig(), mask_sites(1, 1), 0.5, [np.random.default_rng(1)])
    assert masked.shape == (1, 1)
