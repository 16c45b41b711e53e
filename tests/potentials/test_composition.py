"""Compositions of Gaussians against their closed forms in float64, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluate import noising, readings, scores
from flax import nnx
from stand_ins import Silent

import lehr
from lehr.networks import ResidualMLP

EPS = np.finfo(np.float32).eps
TIMES = np.array([0.0, 0.01, 0.2, 0.6, 0.95, 1.0], np.float32)
X = 1.2 * np.random.default_rng(0).normal(size=(20, 2)).astype(np.float32)

P = lehr.Gaussian([0.4, -0.2], 0.5)
Q = lehr.Gaussian([-0.3, 0.6], [0.8, 0.4])
R = lehr.Gaussian([0.1, 0.1], 1.5)


def weighted_gaussians(members, weights, alpha, sigma):
    """Σ w_i log N_i and its gradient at X."""
    log_density, score = 0.0, 0.0
    for p, w in zip(members, weights, strict=True):
        variance = alpha**2 * np.asarray(p.stds, float) ** 2 + sigma**2
        offset = X - alpha * np.asarray(p.loc, float)
        log_density += w * -np.sum(offset**2 / variance + np.log(2 * np.pi * variance), -1) / 2
        score += w * -offset / variance
    return log_density, score


SCORE = lehr.ScoreNetwork(Silent(), lehr.VPCosine(), (2,))


# Products.


@pytest.mark.parametrize(
    ("build", "weights"),
    [
        (lambda: P * Q * R, [1, 1, 1]),
        (lambda: P * (Q * R), [1, 1, 1]),
        (lambda: (P * Q) / R, [1, 1, -1]),
        (lambda: P / (Q / R), [1, -1, 1]),
        (lambda: (P * Q) ** 2.0 * R, [2, 2, 1]),
        (lambda: lehr.Power(P / Q, 0.5) / R**3, [0.5, -0.5, -3]),
        (lambda: lehr.Product([P * Q, R], [0.25, -2.0]), [0.25, 0.25, -2]),
    ],
)
def test_products_are_flattened(build, weights):
    product = build()
    assert product.members == (P, Q, R)
    np.testing.assert_array_equal(product.weights, weights)
    np.testing.assert_allclose(product.total_weight, sum(weights))


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (2.0, 0.5, -0.25)])
def test_products_weigh_log_densities_and_scores(weights):
    got = readings(lehr.Product([P, Q, R], weights), X, TIMES)
    alpha, sigma = noising(P.schedule, TIMES)
    log_density, score = weighted_gaussians((P, Q, R), weights, alpha, sigma)
    # |log p| and |s| reach 100 here at stds of .4, so that rounding of x enters ten times enlarged.
    np.testing.assert_allclose(got[0], log_density, rtol=64 * EPS, atol=64 * EPS)
    np.testing.assert_allclose(got[1], score, rtol=64 * EPS, atol=64 * EPS)
    np.testing.assert_allclose(got[3], -sigma * score, rtol=64 * EPS, atol=64 * EPS)
    data = (X + sigma**2 * score)[:-1] / alpha[:-1]
    np.testing.assert_allclose(got[2][:-1], data, rtol=64 * EPS, atol=float(64 * EPS / alpha[-2, 0, 0]))
    assert np.all(np.isfinite(got[2][-1]))


def test_weights_are_traced():
    traces = []

    @jax.jit
    def score(w):
        traces.append(w)
        return lehr.Product([P, Q], w).score(jnp.ones(2), 0.3)

    one, other = score(jnp.array([1.0, 0.0])), score(jnp.array([0.0, 1.0]))
    np.testing.assert_allclose(one, P.score(jnp.ones(2), 0.3), rtol=1e-6)
    np.testing.assert_allclose(other, Q.score(jnp.ones(2), 0.3), rtol=1e-6)
    assert len(traces) == 1


def test_moments_of_a_product_are_those_of_the_product_of_gaussians():
    alpha, sigma = float(P.schedule.alpha(0.3)), float(P.schedule.sigma(0.3))
    for members, weights in (((P, Q), (1, 1)), ((P, R), (1.5, -0.5))):
        precisions = [
            w / (alpha**2 * np.asarray(p.stds) ** 2 + sigma**2) for p, w in zip(members, weights, strict=True)
        ]
        mean = sum(c * alpha * np.asarray(p.loc) for c, p in zip(precisions, members, strict=True)) / sum(precisions)
        m = lehr.Product(members, weights).moments(0.3)
        np.testing.assert_allclose(m.mean, mean, rtol=1e-5)
        np.testing.assert_allclose(m.std, sum(precisions) ** -0.5, rtol=1e-5)


def test_moments_of_a_product_leave_out_a_divisor_that_would_leave_no_density():
    narrow = lehr.Gaussian([0.0, 0.0], 0.1)
    np.testing.assert_allclose((P / narrow).moments(0.0).std, P.moments(0.0).std, rtol=1e-6)


def test_width_of_a_product_adds_precisions():
    width = (P * Q).width(0.2)
    np.testing.assert_allclose(width, (P.width(0.2) ** -2.0 + Q.width(0.2) ** -2.0) ** -0.5, rtol=1e-6)
    np.testing.assert_allclose((P / Q).width(0.2), P.width(0.2), rtol=1e-6)


# Mixtures.


def test_mixture_of_gaussians_is_the_gaussian_mixture():
    wanted = lehr.GaussianMixture([P.loc, Q.loc], [P.stds, Q.stds], [0.3, 0.7])
    for got, want in zip(readings(lehr.Mixture([P, Q], [0.3, 0.7]), X, TIMES), readings(wanted, X, TIMES), strict=True):
        np.testing.assert_allclose(got, want, rtol=64 * EPS, atol=64 * EPS)
    mixture = lehr.Mixture([P, Q], [3.0, 7.0])
    for t in (0.0, 0.4):
        np.testing.assert_allclose(mixture.moments(t).mean, wanted.moments(t).mean, rtol=1e-5)
        np.testing.assert_allclose(mixture.moments(t).std, wanted.moments(t).std, rtol=1e-5)
        np.testing.assert_allclose(mixture.width(t), wanted.width(t), rtol=1e-6)


def test_log_normalizers_normalise_the_members():
    # N(m, v)² is N(m, v/2) times 1/(4πv) in two dimensions.
    t, x = 0.0, jnp.array([0.2, 0.3])
    log_z = -np.log(4 * np.pi * 0.5**2)
    got = lehr.Mixture([P**2.0, R], [0.4, 0.6], [log_z, 0.0])
    want = lehr.GaussianMixture([P.loc, R.loc], [0.5 / np.sqrt(2), 1.5], [0.4, 0.6])
    np.testing.assert_allclose(got.log_density(x, t), want.log_density(x, t), rtol=1e-5)
    np.testing.assert_allclose(got.score(x, t), want.score(x, t), rtol=1e-5)


def test_mixture_never_scales_energies_before_adding_densities():
    far = lehr.Gaussian([30.0, 0.0], 0.5)
    mixture, x = lehr.Mixture([P, far], [0.2, 0.8]), jnp.array([0.4, 0.0])  # 1,700 log units apart
    np.testing.assert_allclose(mixture.log_density(x, 0.0), np.log(0.2) + P.log_density(x, 0.0), rtol=1e-6)
    np.testing.assert_allclose(mixture.score(x, 0.0), P.score(x, 0.0), rtol=1e-6)
    same = lehr.Mixture([P, P, P], [0.2, 0.3, 0.5])
    np.testing.assert_allclose(same.log_density(x, 0.5), P.log_density(x, 0.5), rtol=1e-6)


def test_mixture_of_uncalibrated_networks_warns_of_its_masses():
    network = lehr.EnergyNetwork(ResidualMLP(2, width=4, num_blocks=1, num_frequencies=2, rngs=nnx.Rngs(0)))
    with pytest.warns(UserWarning, match="Pass log_normalizers"):
        lehr.Mixture([P, network])
    lehr.Mixture([P, network], log_normalizers=[0.0, 1.0])


# Contrasts.


def test_contrast_of_gaussians_is_the_gaussian_of_the_difference():
    got = readings(lehr.Contrast(P, R, 0.7), X, TIMES)
    alpha, sigma = noising(P.schedule, TIMES)
    vp, vq = alpha**2 * 0.25 + sigma**2, alpha**2 * 2.25 + sigma**2
    precision = 1.7 / vp - 0.7 / vq
    mean = alpha * (1.7 * np.asarray(P.loc, float) / vp - 0.7 * np.asarray(R.loc, float) / vq) / precision
    np.testing.assert_allclose(got[1], -precision * (X - mean), rtol=64 * EPS, atol=64 * EPS)
    log_density, _ = weighted_gaussians((P, R), (1.7, -0.7), alpha, sigma)
    np.testing.assert_allclose(got[0], log_density, rtol=64 * EPS, atol=64 * EPS)
    np.testing.assert_allclose(got[3], sigma * precision * (X - mean), rtol=64 * EPS, atol=64 * EPS)


@pytest.mark.parametrize(
    ("p", "q", "limit"),
    [
        (lehr.Gaussian([0.0], 1.0), lehr.Gaussian([0.0], 0.5), 1 / 3),  # (1 + w)/1 = w/.25
        (lehr.Gaussian(jnp.zeros(2), [0.3, 1.0]), lehr.Gaussian(jnp.zeros(2), 0.8), 16 / 9),  # 1 + w = w/.64
        # covariance [[1, .8], [.8, 1]] has variance 1.8 along the diagonal, where q has .9
        (lehr.Gaussian(jnp.zeros(2), [[1.0, 0.0], [0.8, 0.6]]), lehr.Gaussian(jnp.zeros(2), 0.9**0.5), 1.0),
    ],
)
def test_contrast_of_gaussians_is_refused_exactly_where_it_is_not_integrable(p, q, limit):
    lehr.Contrast(p, q, 0.99 * limit)
    with pytest.raises(ValueError, match=r"not integrable.*\(1 \+ w\)/var_p > w/var_q"):
        lehr.Contrast(p, q, 1.01 * limit)


def test_contrast_with_a_box_below_needs_a_floor(bar):
    with pytest.raises(ValueError, match="Give floor="):
        lehr.Contrast(P, bar)
    np.testing.assert_array_equal(lehr.Contrast(P, bar, 0.0).weights, [1.0, 0.0])
    lehr.Contrast(P, bar, floor=0.1)


def test_floor_is_a_density_added_to_the_divisor(bar):
    w, floor = 0.5, 0.05
    log_density, score, data, noise = readings(lehr.Contrast(P, bar, w, floor=floor), X, TIMES)
    log_p, score_p, *_ = (np.asarray(a, float) for a in readings(P, X, TIMES))
    log_q, score_q, *_ = (np.asarray(a, float) for a in readings(bar, X, TIMES))
    share = np.exp(log_q) / (np.exp(log_q) + floor)
    total = (1 + w) * score_p - w * share[..., None] * np.where(share[..., None] > 0, score_q, 0)
    np.testing.assert_allclose(log_density, (1 + w) * log_p - w * np.log(np.exp(log_q) + floor), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(score, total, rtol=1e-4, atol=1e-4)
    alpha, sigma = noising(P.schedule, TIMES)
    np.testing.assert_allclose(noise, -sigma * total, rtol=1e-4, atol=1e-4)
    wanted = (X + sigma**2 * total)[:-1] / alpha[:-1]
    np.testing.assert_allclose(data[:-1], wanted, rtol=1e-3, atol=1e-4)


# Scores, schedules, errors.


@pytest.mark.parametrize("build", [lambda: P * SCORE, lambda: SCORE**2.0, lambda: lehr.Contrast(SCORE, P, 0.5)])
def test_a_score_in_a_product_leaves_no_log_density(build):
    product = build()
    assert isinstance(product, lehr.ScorePotential)
    assert not isinstance(product, lehr.EnergyPotential)
    assert not hasattr(product, "log_density")
    with pytest.raises(TypeError, match="line-integral"):
        product.at(0.1)


def test_a_score_in_a_product_adds_its_score():
    x, t = jnp.array([0.3, 0.4]), 0.3
    np.testing.assert_allclose((P * SCORE).score(x, t), P.score(x, t), rtol=1e-6)
    # The silent score believes every x: its x̂₀ is x/α.
    np.testing.assert_allclose((P * SCORE).denoise(x, t), P.denoise(x, t), rtol=1e-5)


def test_different_schedules_meet_by_log_snr():
    ve, vp = lehr.VE(0.002, 50.0), lehr.VPLinear()
    box = lehr.Uniform([-0.5, -1.0], [0.5, 1.0], vp)
    p, q, direct = (lehr.Gaussian(P.loc, P.stds, s) for s in (ve, vp, ve))
    product = lehr.Product([p, q, box], [1.0, 1.0, 0.5])
    wanted = lehr.Product([p, direct, lehr.Uniform(box.low, box.high, ve)], [1.0, 1.0, 0.5])
    assert product.schedule == ve
    assert all(member.schedule == ve for member in product.members)
    for got, want in zip(readings(product, X, TIMES), readings(wanted, X, TIMES), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_a_score_network_of_another_schedule_meets_by_log_snr():
    ve = lehr.VE(0.01, 50.0)
    silent = lehr.ScoreNetwork(Silent(), lehr.VPLinear(), (2,), prediction="data")  # x̂₀ = 0: N(0, 0) diffused
    p = lehr.Gaussian(P.loc, P.stds, ve)
    t = np.array([0.2, 0.5, 0.8], np.float32)
    score, data, noise = scores(p * silent, X, t)
    _, sigma = noising(ve, t)
    _, score_p = weighted_gaussians((P,), (1.0,), 1.0, sigma)
    # The level is matched through a time rounded to EPS, which moves σ by about 20 EPS.
    np.testing.assert_allclose(score, score_p - X / sigma**2, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(noise, -sigma * score_p + X / sigma, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(data, sigma**2 * score_p, rtol=1e-4, atol=1e-4 * sigma.max() ** 2)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: P * lehr.Gaussian(0.0), ValueError, r"Gaussian \(2,\), Gaussian \(\)"),
        (lambda: lehr.Mixture([P, lehr.Gaussian([0.0])]), ValueError, "Mixture needs members of one event shape"),
        (lambda: lehr.Contrast(P, lehr.Gaussian([0.0])), ValueError, "Contrast needs members of one event shape"),
        (lambda: lehr.Product([]), ValueError, "empty list"),
        (lambda: lehr.Product([P, 2.0]), TypeError, "composes lehr potentials; got a float"),
        (lambda: P * 2.0, TypeError, "unsupported operand"),
        (lambda: P / 2.0, TypeError, "unsupported operand"),
        (lambda: lehr.Product([P, Q], [1.0]), ValueError, r"expected shape \(2,\)"),
        (lambda: lehr.Product([P, Q], [1.0, np.nan]), ValueError, "weights must be finite"),
        (lambda: P ** jnp.ones(2), ValueError, "scalar exponent"),
        (lambda: lehr.Mixture([P, SCORE]), TypeError, "Mixture needs energies.*ScoreNetwork"),
        (lambda: lehr.Mixture([P, P * SCORE]), TypeError, "Mixture needs energies.*ScoreProduct"),
        (lambda: lehr.Mixture([P, Q], [1.0, 0.0]), ValueError, "probs must be positive"),
        (lambda: lehr.Mixture([P, Q], [1.0]), ValueError, r"probs must have shape \(2,\)"),
        (lambda: lehr.Mixture([P, Q], None, [0.0]), ValueError, r"log_normalizers must have shape \(2,\)"),
        (lambda: lehr.Mixture([P, Q], None, [0.0, np.inf]), ValueError, "log_normalizers must be finite"),
        (lambda: lehr.Contrast(P, R, -0.1), ValueError, "finite scalar >= 0"),
        (lambda: lehr.Contrast(P, R, [0.1]), ValueError, "finite scalar >= 0"),
        (lambda: lehr.Contrast(P, R, floor=0.0), ValueError, "floor must be positive"),
        (lambda: lehr.Contrast(P, SCORE, floor=0.1), TypeError, "floor under a density needs an energy"),
    ],
)
def test_impossible_compositions_are_refused(build, error, message):
    with pytest.raises(error, match=message):
        build()
