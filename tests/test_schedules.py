"""Schedules against their closed forms in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lehr

EPS = np.finfo(np.float32).eps
ALPHAS_CUMPROD = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))


def vp_linear(t):
    alpha = np.exp(-(t**2) * (20 - 0.1) / 4 - t * 0.1 / 2)
    return alpha, np.sqrt(1 - alpha**2)


def vp_cosine(t):
    alpha = np.cos(np.pi / 2 * (t + 0.008) / 1.008) / np.cos(np.pi / 2 * 0.008 / 1.008)
    return alpha, np.sqrt(1 - alpha**2)


def discrete(t):
    table = np.log(ALPHAS_CUMPROD / (1 - ALPHAS_CUMPROD))
    square = 1 / (1 + np.exp(-np.interp(t, np.linspace(0, 1, 1000), table)))
    return np.sqrt(square), np.sqrt(1 - square)


CASES = {
    "vp-linear": (lehr.VPLinear(), vp_linear),
    "vp-cosine": (lehr.VPCosine(), vp_cosine),
    "ve": (lehr.VE(0.002, 20.0), lambda t: (np.ones_like(t), 0.002 * 1e4**t)),
    "rectified-flow": (lehr.RectifiedFlow(), lambda t: (1 - t, t)),
    "discrete": (lehr.DiscreteSchedule(ALPHAS_CUMPROD), discrete),
}
every_schedule = pytest.mark.parametrize(("schedule", "closed_form"), CASES.values(), ids=CASES)


def rate(schedule, t):
    """|dλ/dt|, by which the rounding of t enters λ."""
    return np.abs(np.asarray(jax.vmap(jax.grad(lambda t: schedule.log_snr(t)))(jnp.asarray(t, jnp.float32)), float))


@every_schedule
def test_alpha_sigma_and_log_snr_are_the_closed_forms(schedule, closed_form):
    t = jnp.linspace(0, 1, 401)[1:-1]
    alpha, sigma = closed_form(np.asarray(t, float))
    # Arguments of exp and sin carry a few roundings of numbers of size 10 at most.
    np.testing.assert_allclose(schedule.alpha(t), alpha, rtol=20 * EPS)
    np.testing.assert_allclose(schedule.sigma(t), sigma, rtol=20 * EPS)
    np.testing.assert_allclose(schedule.log_snr(t), 2 * np.log(alpha / sigma), rtol=20 * EPS, atol=20 * EPS)


@every_schedule
def test_time_inverts_log_snr_over_a_whole_ladder(schedule, closed_form):
    t = np.asarray(lehr.Ladder.log_snr(schedule, 60).times)
    log_snr = schedule.log_snr(t)
    # λ is known to a rounding of itself, which moves t by as much over |dλ/dt|.
    tolerance = 8 * EPS * (t + (1 + np.abs(log_snr)) / rate(schedule, t))
    assert np.all(np.abs(np.asarray(schedule.time(log_snr)) - t) <= tolerance)


@every_schedule
def test_log_snr_inverts_time_over_a_whole_ladder(schedule, closed_form):
    t = np.asarray(lehr.Ladder.log_snr(schedule, 60).times)
    wanted = np.linspace(schedule.log_snr(t[0]), schedule.log_snr(t[-1]), 60, dtype=np.float32)
    found = np.asarray(schedule.log_snr(schedule.time(wanted)))
    tolerance = 8 * EPS * (1 + np.abs(wanted) + rate(schedule, t) * t)
    assert np.all(np.abs(found - wanted) <= tolerance)


@every_schedule
def test_log_snr_falls_strictly_and_time_is_clipped_to_its_ends(schedule, closed_form):
    assert np.all(np.diff(schedule.log_snr(np.linspace(1e-3, 1, 300)[:-1])) < 0)
    np.testing.assert_array_equal(schedule.time(np.array([200.0, -200.0])), [0.0, 1.0])


@pytest.mark.parametrize("name", ["vp-linear", "vp-cosine", "discrete"])
def test_variance_preserving_schedules_preserve_variance(name):
    schedule, _ = CASES[name]
    t = jnp.linspace(0, 1, 401)
    np.testing.assert_allclose(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, 1.0, rtol=8 * EPS)


@pytest.mark.parametrize("name", ["vp-cosine", "rectified-flow"])
def test_schedules_that_end_in_pure_noise_have_exact_ends(name):
    schedule, _ = CASES[name]
    ends = jnp.array([0.0, 1.0])
    np.testing.assert_allclose(schedule.alpha(ends), [1.0, 0.0], rtol=EPS)
    np.testing.assert_allclose(schedule.sigma(ends), [0.0, 1.0], rtol=EPS)
    np.testing.assert_array_equal(schedule.log_snr(ends), [np.inf, -np.inf])


def test_discrete_schedule_is_its_table_at_the_steps():
    schedule = lehr.DiscreteSchedule(ALPHAS_CUMPROD)
    steps = np.arange(1000) / 999
    # λ reaches 10 in size, so ᾱ carries ten roundings.
    np.testing.assert_allclose(schedule.alpha(steps) ** 2, ALPHAS_CUMPROD, rtol=20 * EPS)
    np.testing.assert_allclose(schedule.sigma(steps) ** 2, 1 - ALPHAS_CUMPROD, rtol=200 * EPS)
    assert schedule.alphas_cumprod == tuple(ALPHAS_CUMPROD)


def test_discrete_schedule_interpolates_log_snr_linearly():
    schedule = lehr.DiscreteSchedule([0.9, 0.5, 0.2])
    log_snr = np.log([9.0, 1.0, 0.25])
    np.testing.assert_allclose(
        schedule.log_snr(np.array([0.125, 0.75])), [0.75 * log_snr[0], log_snr[2] / 2], rtol=1e-6
    )


def test_discrete_schedule_reads_a_terminal_zero_as_a_finite_log_snr():
    schedule = lehr.DiscreteSchedule([1.0, 0.5, 0.0])
    np.testing.assert_array_equal(schedule.log_snr(np.array([0.0, 0.5, 1.0])), [25.0, 0.0, -25.0])


def test_schedules_are_equal_by_value_and_hashable():
    pairs = [
        (lehr.VPLinear(), lehr.VPLinear(0.1, 20.0), lehr.VPLinear(0.1, 19.0)),
        (lehr.VPCosine(), lehr.VPCosine(0.008), lehr.VPCosine(0.01)),
        (lehr.VE(0.01, 5.0), lehr.VE(0.01, 5.0), lehr.VE(0.01, 6.0)),
        (lehr.RectifiedFlow(), lehr.RectifiedFlow(), lehr.VPCosine()),
        (
            lehr.DiscreteSchedule([0.9, 0.1]),
            lehr.DiscreteSchedule(np.array([0.9, 0.1])),
            lehr.DiscreteSchedule([0.9, 0.2]),
        ),
    ]
    for one, same, other in pairs:
        assert one == same
        assert hash(one) == hash(same)
        assert one != other


def test_equal_schedules_share_one_trace():
    traces = []

    @jax.jit
    def sigma(schedule, t):
        traces.append(schedule)
        return schedule.sigma(t)

    np.testing.assert_allclose(sigma(lehr.VE(0.01, 1.0), 0.5), 0.1, rtol=1e-6)
    np.testing.assert_allclose(sigma(lehr.VE(0.01, 1.0), 1.0), 1.0, rtol=1e-6)
    assert len(traces) == 1
    np.testing.assert_allclose(sigma(lehr.VE(0.04, 1.0), 0.5), 0.2, rtol=1e-6)
    assert len(traces) == 2


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: lehr.VPLinear(0.0, 20.0), "0 < beta_min < beta_max"),
        (lambda: lehr.VPLinear(2.0, 1.0), "0 < beta_min < beta_max"),
        (lambda: lehr.VPCosine(-0.1), "offset >= 0"),
        (lambda: lehr.VE(0.0, 1.0), "0 < sigma_min < sigma_max"),
        (lambda: lehr.VE(1.0, 1.0), "0 < sigma_min < sigma_max"),
        (lambda: lehr.DiscreteSchedule([0.5]), "at least two"),
        (lambda: lehr.DiscreteSchedule([[0.9, 0.5]]), "at least two"),
        (lambda: lehr.DiscreteSchedule([1e-4, 0.02]), "not betas"),
        (lambda: lehr.DiscreteSchedule([0.9, 0.9]), "strictly decreasing"),
        (lambda: lehr.DiscreteSchedule([1.1, 0.5]), "within"),
        (lambda: lehr.DiscreteSchedule([0.9, -0.5]), "within"),
        (lambda: lehr.DiscreteSchedule([0.9, np.nan, 0.5]), "strictly decreasing"),
    ],
)
def test_impossible_schedules_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
