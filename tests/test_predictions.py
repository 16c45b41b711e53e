"""The five heads against a Gaussian whose noise and data are known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lehr
from lehr.predictions import PREDICTIONS, predict, read

EPS = np.finfo(np.float32).eps
SCHEDULES = {
    "vp-linear": lehr.VPLinear(),
    "vp-cosine": lehr.VPCosine(),
    "ve": lehr.VE(0.002, 20.0),
    "rectified-flow": lehr.RectifiedFlow(),
    "discrete": lehr.DiscreteSchedule(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))),
}
VARIANCE_PRESERVING = {"vp-linear", "vp-cosine", "discrete"}
HEADS = [(s, p) for s in SCHEDULES for p in PREDICTIONS if p != "v" or s in VARIANCE_PRESERVING]
every_head = pytest.mark.parametrize(("schedule", "prediction"), HEADS)

LOC, STD = np.array([0.3, -0.7]), 0.5
Z = np.random.default_rng(0).normal(size=(8, 2))


def gaussian(schedule, t):
    """x_t, score, x̂₀ and ε̂ of N(LOC, STD²) in float64; arrays (time, draw, coordinate)."""
    alpha, sigma = (np.asarray(f(t), float)[:, None, None] for f in (schedule.alpha, schedule.sigma))
    variance = alpha**2 * STD**2 + sigma**2
    x = np.asarray(alpha * LOC + np.sqrt(variance) * Z, np.float32).astype(float)
    score = -(x - alpha * LOC) / variance
    return alpha, sigma, x, score, LOC + alpha * STD**2 / variance * (x - alpha * LOC), -sigma * score


def readings(schedule, prediction, x, data, noise, t):
    def one(x, data, noise, t):
        return read(prediction, predict(prediction, data, noise, t, schedule), x, t, schedule)

    over_draws = jax.vmap(one, (0, 0, 0, None))
    return jax.jit(jax.vmap(over_draws))(*(jnp.asarray(a, jnp.float32) for a in (x, data, noise, t)))


@every_head
def test_readings_of_a_perfect_head_are_the_gaussians_over_a_whole_ladder(schedule, prediction):
    schedule = SCHEDULES[schedule]
    t = np.asarray(lehr.Ladder.log_snr(schedule, 60).times)
    alpha, sigma, x, score, data, noise = gaussian(schedule, t)
    got = readings(schedule, prediction, x, data, noise, t)
    # Rounding of x, of α x̂₀ and of σ ε̂ is what x̂₀ multiplies by 1/α, ε̂ by 1/σ and s by 1/σ².
    size = 16 * EPS * (np.abs(x) + np.abs(alpha * data) + np.abs(sigma * noise))
    exact = 16 * EPS
    assert np.all(np.abs(got.denoise - data) <= size / alpha + exact)
    assert np.all(np.abs(got.noise - noise) <= size / sigma + exact)
    assert np.all(np.abs(got.score - score) <= size / sigma**2 + exact * np.abs(score))


@every_head
def test_predict_inverts_read(schedule, prediction):
    schedule = SCHEDULES[schedule]
    t = np.asarray(lehr.Ladder.log_snr(schedule, 60).times)
    alpha, sigma, x, *_ = gaussian(schedule, t)
    output = np.broadcast_to(Z[::-1], x.shape).astype(np.float32)

    def there_and_back(x, output, t):
        out = read(prediction, output, x, t, schedule)
        return predict(prediction, out.denoise, out.noise, t, schedule), out.denoise, out.noise

    over_draws = jax.vmap(there_and_back, (0, 0, None))
    back, data, noise = jax.jit(jax.vmap(over_draws))(jnp.asarray(x, jnp.float32), output, t)
    weights = weights_of(prediction, schedule, t)
    # Two readings, each rounded at the size of the terms that it is the difference of.
    terms = np.abs(x) + np.abs(alpha * data) + np.abs(sigma * noise)
    size = np.abs(weights[0]) * (np.abs(data) + terms / alpha) + np.abs(weights[1]) * (np.abs(noise) + terms / sigma)
    assert np.all(np.abs(back - output) <= 16 * EPS * (size + np.abs(output)))


def weights_of(prediction, schedule, t):
    """The coefficients of x̂₀ and ε̂ in a head."""
    unit = jnp.eye(2)
    both = jax.vmap(lambda t: predict(prediction, unit[0], unit[1], t, schedule))(jnp.asarray(t))
    return np.asarray(both, float)[:, :, None, None].swapaxes(0, 1)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_readings_are_finite_at_both_ends(schedule, prediction):
    x, output = jnp.asarray(Z[:2], jnp.float32)
    for t in (0.0, 1.0):
        out = read(prediction, output, x, jnp.asarray(t), SCHEDULES[schedule])
        assert np.all(np.isfinite(np.stack(out))), f"not finite at {t=}"
        assert np.all(np.isfinite(predict(prediction, x, output, jnp.asarray(t), SCHEDULES[schedule])))


PURE = [(s, p) for s, p in HEADS if s in ("vp-cosine", "rectified-flow")]


@pytest.mark.parametrize(("schedule", "prediction"), [head for head in PURE if head[1] in ("data", "v", "velocity")])
def test_heads_that_hold_the_data_keep_it_where_alpha_vanishes(schedule, prediction):
    schedule, t = SCHEDULES[schedule], jnp.ones(())
    data, noise = jnp.asarray(Z[:2], jnp.float32)
    out = read(prediction, predict(prediction, data, noise, t, schedule), noise, t, schedule)
    np.testing.assert_allclose(out.denoise, data, rtol=8 * EPS, atol=8 * EPS)
    np.testing.assert_allclose(out.noise, noise, rtol=8 * EPS, atol=8 * EPS)


@pytest.mark.parametrize(("schedule", "prediction"), [head for head in PURE if head[1] in ("noise", "v", "velocity")])
def test_heads_that_hold_the_noise_keep_it_where_sigma_vanishes(schedule, prediction):
    schedule, t = SCHEDULES[schedule], jnp.zeros(())
    data, noise = jnp.asarray(Z[:2], jnp.float32)
    out = read(prediction, predict(prediction, data, noise, t, schedule), data, t, schedule)
    # The rates are those at t = 1e-6, where x is still the data to within σ of there, 2e-4 at most.
    np.testing.assert_allclose(out.denoise, data, atol=5e-4)
    np.testing.assert_allclose(out.noise, noise, atol=5e-4)


def test_velocity_is_the_derivative_of_the_path():
    schedule, t, h = SCHEDULES["vp-linear"], 0.4, 1e-4
    data, noise = jnp.asarray(Z[:2], jnp.float32)

    def path(t):  # in float64, from the closed form
        alpha = np.exp(-(t**2) * 19.9 / 4 - t * 0.05)
        return alpha * np.asarray(data, float) + np.sqrt(1 - alpha**2) * np.asarray(noise, float)

    slope = (path(t + h) - path(t - h)) / (2 * h)
    np.testing.assert_allclose(predict("velocity", data, noise, jnp.asarray(t), schedule), slope, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("call", [read, predict])
def test_an_unknown_head_is_refused(call):
    with pytest.raises(ValueError, match=r"unknown prediction 'epsilon'.*noise, data, score, v, velocity"):
        call("epsilon", jnp.zeros(2), jnp.zeros(2), jnp.zeros(()), lehr.VPCosine())
