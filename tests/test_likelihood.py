"""The log likelihood by the probability flow against densities in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stand_ins import ScoreOf

import lehr

# The solver's tolerance of 1e-5 a step, some hundred steps; a thousandth of a nat is what is promised.
NATS = 1e-3
FACTOR = np.linalg.cholesky([[1.0, 0.6], [0.6, 0.5]])
LOCS = np.array([[-1.0, 0.0], [1.0, 0.5], [0.0, 2.0]])
SCHEDULES = [lehr.VPCosine(), lehr.VPLinear(), lehr.VE(0.01, 60.0), lehr.RectifiedFlow()]


def check(p, t, n=32):
    level = p.schedule.time(-2 * jnp.log(0.1 * p.width(0.0))) if t is None else t
    x = p.sample(jax.random.key(0), level, (n,))
    found = lehr.log_likelihood(p, x, t)
    np.testing.assert_allclose(found.value, jax.vmap(p.log_density, (0, None))(x, level), atol=NATS)
    assert np.all(np.asarray(found.standard_error) == 0)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_it_is_the_density_of_a_mixture_at_the_clean_end_of_any_schedule(schedule):
    check(lehr.GaussianMixture(LOCS, [0.1, 0.3, 0.2], [0.2, 0.5, 0.3], schedule), None)


def test_it_is_the_density_of_a_gaussian_at_a_given_level():
    check(lehr.Gaussian([0.3, -0.2], FACTOR), 0.5)


def test_a_score_is_enough_and_one_event_too():
    p = lehr.Gaussian([0.3, -0.2], FACTOR)
    x = p.sample(jax.random.key(1), 0.3)
    found = lehr.log_likelihood(ScoreOf(inner=p), x, 0.3)
    assert found.value.shape == ()
    assert float(found.value) == pytest.approx(float(p.log_density(x, 0.3)), abs=NATS)


def test_data_far_from_the_origin_and_of_another_scale_are_no_harder():
    p = lehr.GaussianMixture(100 + 30 * LOCS, [3.0, 9.0, 6.0], [0.2, 0.5, 0.3])
    x = p.sample(jax.random.key(0), 0.1, (20,))
    found = lehr.log_likelihood(p, x, 0.1).value
    # x of a hundred in float32, over modes of width 3 to 9: 1e-6 × 100/3 × a few σ, well below the promise.
    np.testing.assert_allclose(found, jax.vmap(p.log_density, (0, None))(x, 0.1), atol=2 * NATS)


def test_random_signs_are_unbiased_and_know_their_error():
    d, n = 80, 64
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(d, d)))[0]
    p = lehr.Gaussian(np.zeros(d), np.linalg.cholesky(rotation * np.linspace(0.2, 2.0, d) ** 2 @ rotation.T))
    x = p.sample(jax.random.key(0), 0.1, (n,))
    found = lehr.log_likelihood(p, x, 0.1, rng_key=jax.random.key(3), tolerance=1e-4)
    exact = np.asarray(jax.vmap(p.log_density, (0, None))(x, 0.1))
    standard = (np.asarray(found.value) - exact) / np.asarray(found.standard_error)
    # With 16 probes these follow Student's t of 15 degrees: variance 15/13; over n events their mean square has
    # variance 2 (15/13)² 14/11 / n, their mean 15/13 / n.
    assert abs(standard.mean()) < 4 * np.sqrt(15 / 13 / n)
    assert abs(np.mean(standard**2) - 15 / 13) < 4 * 15 / 13 * np.sqrt(2 * 14 / 11 / n)


def test_what_has_no_flow_is_refused():
    p = lehr.Gaussian([0.3, -0.2], FACTOR)
    with pytest.raises(TypeError, match="log_evidence"):
        lehr.log_likelihood(p * p, [0.0, 0.0])
    with pytest.raises(ValueError, match="log-SNR is infinite"):
        lehr.log_likelihood(p, [0.0, 0.0], 0.0)
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        lehr.log_likelihood(p, np.zeros((3, 3)))
    with pytest.raises(ValueError, match="num_probes"):
        lehr.log_likelihood(p, [0.0, 0.0], num_probes=1)
