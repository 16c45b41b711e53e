"""Where a pilot places levels, and what its tuning is between those that it saw."""

import jax.numpy as jnp
import numpy as np
import pytest

import lehr
from lehr.annealing.spacing import interpolated, spaced

SCHEDULE = lehr.VPCosine()
LADDER = lehr.Ladder.log_snr(SCHEDULE, 41, t_min=float(SCHEDULE.time(6.0)))


def log_snr(ladder):
    return np.asarray(SCHEDULE.log_snr(ladder.times), np.float64)


def shares(deviations):
    """Conditional ESS of normal log weights of these standard deviations; the first belongs to the start."""
    return np.append(0.01, np.exp(-(np.asarray(deviations) ** 2)))


@pytest.mark.parametrize("deviation", [0.0, 1e-3, 0.5])
def test_where_all_steps_lose_alike_levels_stay_where_they_are(deviation):
    after = spaced(LADDER, SCHEDULE, shares(np.full(40, deviation)))
    np.testing.assert_allclose(log_snr(after), log_snr(LADDER), atol=2e-3)


def test_a_step_that_loses_a_multiple_of_the_mean_is_cut_to_the_reciprocal_of_half_of_one_more():
    """Step k covers s_k/2 mean(s) + 1/2 of a step: pieces of it are that much shorter."""
    deviations = np.repeat([0.1, 0.9, 0.1], [12, 16, 12])
    after = log_snr(spaced(LADDER, SCHEDULE, shares(deviations)))
    before = log_snr(LADDER)
    step, relative = before[1] - before[0], np.array([0.1, 0.9]) / deviations.mean()
    middle = (after > before[15]) & (after < before[25])
    np.testing.assert_allclose(np.diff(after[middle]), step / (0.5 + 0.5 * relative[1]), rtol=0.02)
    np.testing.assert_allclose(np.diff(after)[:3], step / (0.5 + 0.5 * relative[0]), rtol=0.02)


@pytest.mark.parametrize("deviations", [np.r_[9.0, np.zeros(39)], np.full(40, np.inf), np.full(40, np.nan)])
def test_the_ends_stay_and_no_step_is_more_than_doubled_whatever_the_pilot_met(deviations):
    after = spaced(LADDER, SCHEDULE, shares(deviations))
    assert len(after) == len(LADDER)
    assert after.times[0] == LADDER.times[0]
    assert after.times[-1] == LADDER.times[-1]
    steps = np.diff(log_snr(after))
    assert np.all(steps > 0)
    assert steps.max() < 2.001 * np.diff(log_snr(LADDER)).max()


def test_one_step_that_went_astray_does_not_draw_all_levels_to_itself():
    """It and its two neighbours, which it is smoothed over, have half of 3 × 8/40, and 3/40 of the rest: 14 of 40."""
    astray = np.full(40, 0.01)
    astray[20] = 20.0
    after = log_snr(spaced(LADDER, SCHEDULE, shares(astray)))
    before = log_snr(LADDER)
    drawn = np.sum((after > before[19]) & (after < before[22]))
    assert 13 <= drawn <= 15


def test_a_ladder_of_two_levels_has_nothing_to_place():
    two = lehr.Ladder([0.9, 0.1])
    assert spaced(two, SCHEDULE, np.array([1.0, 0.3])) is two


def test_tuning_is_interpolated_by_its_logarithms_and_moves_by_the_nearest_level():
    before, known = LADDER, log_snr(LADDER)
    after = spaced(LADDER, SCHEDULE, shares(np.linspace(0.1, 1.0, 40)))
    powers = np.array([0.3, -0.7])
    found = lehr.Tuning(
        np.exp(-0.2 * known), np.exp(known[:, None] * powers), 0.125, np.exp(-known[:, None] * powers), known > 0
    )
    carried = interpolated(found, SCHEDULE, before, after)
    asked = log_snr(after)
    np.testing.assert_allclose(carried.step_size, np.exp(-0.2 * asked), rtol=1e-3)
    np.testing.assert_allclose(carried.scale, np.exp(asked[:, None] * powers), rtol=1e-3)
    np.testing.assert_allclose(carried.curvature, np.exp(-asked[:, None] * powers), rtol=1e-3)
    assert np.array_equal(np.asarray(carried.moves), asked > known[known <= 0].max() / 2 + known[known > 0].min() / 2)
    np.testing.assert_array_equal(carried.times, after.times)


@pytest.fixture(scope="module")
def eight_modes():
    angle = 2 * np.pi * np.arange(8) / 8
    locs = np.zeros((8, 16))
    locs[:, 0], locs[:, 1] = 2 * np.cos(angle), 2 * np.sin(angle)
    return lehr.GaussianMixture(locs, 0.3, np.array([6, 5, 4, 3, 2, 2, 1, 1.0]) / 24)


@pytest.fixture(scope="module")
def run(eight_modes):
    return lehr.AnnealedSMC(eight_modes, num_particles=500, progress=False).run(0)


def test_levels_crowd_where_modes_part_and_particles_are_lost_more_evenly(eight_modes, run):
    ends = {"t_min": float(run.levels["t"][-1]), "t_max": float(run.levels["t"][0])}
    uniform = lehr.Ladder.log_snr(eight_modes.schedule, len(run.levels["t"]), **ends)
    by_hand = lehr.AnnealedSMC(eight_modes, ladder=uniform, num_particles=500, progress=False).run(0)
    np.testing.assert_array_equal(by_hand.levels["t"], np.asarray(uniform.times))  # a Ladder is taken as it is
    lost, lost_by_hand = (1 - r.levels["conditional_ess"][1:] for r in (run, by_hand))
    assert lost.sum() < 0.8 * lost_by_hand.sum()
    assert np.sort(lost)[-3:].mean() < 0.8 * np.sort(lost_by_hand)[-3:].mean()


def test_a_tuning_knows_its_levels(eight_modes, run):
    again = lehr.AnnealedSMC(eight_modes, ladder=24, num_steps=1, kernel=lehr.MALA(), tuning=run.tuning, progress=False)
    np.testing.assert_array_equal(again.run(1).levels["t"], run.levels["t"])
    np.testing.assert_array_equal(again.last_run.tuning.times, run.levels["t"])
    assert jnp.allclose(again.last_run.log_evidence, 0.0, atol=5 * again.last_run.log_evidence_se)


def test_one_level_may_be_tuned_by_hand():
    chains = lehr.AnnealedMCMC(
        lehr.Gaussian([0.0], 1.0), ladder=1, num_chains=2, num_samples=1, tuning=lehr.Tuning(0.5)
    )
    assert len(chains.prepare(chains.path).ladder) == 1


def test_path_weights_do_not_show_what_a_long_step_loses_and_leave_levels_uniform():
    product = lehr.GaussianMixture([[-1.0], [1.0]], 0.1) * lehr.Gaussian([0.5], 1.0)
    run = lehr.AnnealedSMC(product, ladder=6, num_particles=20, weights="path", pilot=4, progress=False).run(0)
    np.testing.assert_allclose(np.diff(run.levels["log_snr"], 2), 0.0, atol=2e-3)
