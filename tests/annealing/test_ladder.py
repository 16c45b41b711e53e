import jax.numpy as jnp
import numpy as np
import pytest

import lehr

SCHEDULES = [lehr.VPLinear(), lehr.VPCosine(), lehr.VE(0.002, 20.0), lehr.RectifiedFlow()]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_levels_are_uniform_in_log_snr_and_end_where_asked(schedule):
    ladder = lehr.Ladder.log_snr(schedule, 30, t_min=0.01)
    log_snr = np.asarray(schedule.log_snr(ladder.times))
    steps = np.diff(log_snr)
    assert float(ladder.times[-1]) == pytest.approx(0.01)
    assert np.all(np.diff(np.asarray(ladder.times)) < 0)
    np.testing.assert_allclose(steps, steps.mean(), rtol=2e-3)  # float32 times near t = 1 of a flow


def test_a_ladder_on_a_schedule_that_ends_in_pure_noise_starts_at_a_finite_level():
    ladder = lehr.Ladder.log_snr(lehr.RectifiedFlow(), 10, t_min=0.01)
    assert float(lehr.RectifiedFlow().log_snr(ladder.times[0])) == pytest.approx(-8.0, abs=1e-3)


def test_a_number_of_levels_ends_at_a_tenth_of_the_finest_feature(ring, bar):
    smc = lehr.AnnealedSMC(ring * bar, ladder=3, num_particles=8, progress=False)
    program = smc.prepare(smc.bind())
    sigma = program.path.schedule.sigma(program.ladder.times[-1])
    finest = (1 / 0.03**2 + 12 / 0.4**2) ** -0.5  # the widths of a product's members add up as precisions
    assert float(sigma) == pytest.approx(finest / 10, rel=1e-3)


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([], "at least one"),
        ([0.1, 0.5], "strictly decreasing"),
        ([0.5, 0.5], "strictly decreasing"),
        ([1.2, 0.5], r"lie in \[0, 1\]"),
        ([0.5, -0.1], r"lie in \[0, 1\]"),
        ([0.5, float("nan")], r"lie in \[0, 1\]"),
        ([[0.5]], "vector"),
    ],
)
def test_ladders_that_lead_nowhere_are_refused(times, message):
    with pytest.raises(ValueError, match=message):
        lehr.Ladder(times)


@pytest.mark.parametrize(
    "arguments", [{"num_levels": 0}, {"num_levels": 2.5}, {"t_min": 0.5, "t_max": 0.5}, {"t_min": 0.0}]
)
def test_bad_ends_and_counts_are_refused(arguments):
    with pytest.raises(ValueError, match=r"num_levels|t_min"):
        lehr.Ladder.log_snr(lehr.VPCosine(), **arguments)


def test_one_level_stands_at_the_clean_end():
    assert np.asarray(lehr.Ladder.log_snr(lehr.VPCosine(), 1, t_min=0.1).times) == pytest.approx(jnp.array([0.1]))
