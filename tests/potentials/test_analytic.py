"""Exact potentials against float64 references, far tails and both ends of time included."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluate import readings
from scipy.special import log_ndtr, logsumexp
from scipy.stats import multivariate_normal

import lehr
from lehr.potentials.box import mean_in_box

EPS = np.finfo(np.float32).eps
TIMES = np.array([0.0, 1e-3, 0.05, 0.3, 0.7, 0.97, 1.0], np.float32)


@eqx.filter_jit
def derivatives(p, x, t):
    """Those of the log density, of the score and of the denoiser at all (t, x)."""

    def one(x, t):
        return jax.grad(p.log_density)(x, t), jax.jacrev(p.score)(x, t), jax.jacrev(p.denoise)(x, t)

    return jax.vmap(lambda t: jax.vmap(lambda x: one(x, t))(x))(t)


@eqx.filter_jit
def densities(p, x, t):
    return jnp.exp(jax.vmap(lambda t: jax.vmap(lambda x: p.log_density(x, t))(x))(t))


# Gaussians and their mixtures: Σ w_k N(α m_k, α² C_k + σ² I).

LOCS = np.array([[0.5, -0.3], [-1.0, 0.2], [0.1, 1.2]])
SPATIAL = np.array([[0.5, -0.3, 0.1], [-1.0, 0.2, 0.4], [0.1, 1.2, -0.5]])
FACTORS = np.array(  # in three dimensions, since the axes of two are easily a reflection, its own transpose
    [
        [[0.5, 0.0, 0.0], [0.3, 0.3, 0.0], [-0.1, 0.2, 0.4]],
        [[0.3, 0.0, 0.0], [-0.2, 0.4, 0.0], [0.3, 0.1, 0.5]],
        [[0.6, 0.0, 0.0], [0.1, 0.3, 0.0], [0.2, -0.3, 0.3]],
    ]
)
WEIGHTS = np.array([1.0, 2.0, 5.0])


def diagonal(*stds):
    return np.stack([np.diag(np.square(s)) for s in stds])


NORMALS = {
    "gaussian-scalar": (lehr.Gaussian(LOCS[0], 0.4), LOCS[:1], diagonal([0.4, 0.4]), [1.0]),
    "gaussian-diagonal": (lehr.Gaussian(LOCS[0], [0.2, 0.6]), LOCS[:1], diagonal([0.2, 0.6]), [1.0]),
    "gaussian-factor": (lehr.Gaussian(SPATIAL[0], FACTORS[0]), SPATIAL[:1], FACTORS[:1] @ FACTORS[:1].mT, [1.0]),
    "mixture-scalar": (lehr.GaussianMixture(LOCS, 0.3, WEIGHTS), LOCS, diagonal(*[[0.3, 0.3]] * 3), WEIGHTS),
    "mixture-of-widths": (
        lehr.GaussianMixture(LOCS, [0.2, 0.3, 0.5]),
        LOCS,
        diagonal([0.2, 0.2], [0.3, 0.3], [0.5, 0.5]),
        np.ones(3),
    ),
    "mixture-diagonal": (
        lehr.GaussianMixture(LOCS, [[0.2, 0.3], [0.4, 0.5], [0.6, 0.2]], WEIGHTS),
        LOCS,
        diagonal([0.2, 0.3], [0.4, 0.5], [0.6, 0.2]),
        WEIGHTS,
    ),
    "mixture-factor": (lehr.GaussianMixture(SPATIAL, FACTORS, WEIGHTS), SPATIAL, FACTORS @ FACTORS.mT, WEIGHTS),
}
every_normal = pytest.mark.parametrize("name", NORMALS)


def normal_readings(locs, covariances, weights, alpha, sigma, x):
    """log density, score, denoise and noise at x (n, d), in float64."""
    total = alpha**2 * covariances + sigma**2 * np.eye(locs.shape[1])
    joint = np.log(np.asarray(weights) / np.sum(weights)) + np.stack(
        [multivariate_normal(alpha * m, c).logpdf(x) for m, c in zip(locs, total, strict=True)], -1
    )
    log_density = logsumexp(joint, -1)
    share = np.exp(joint - log_density[:, None])
    offset = np.einsum("kij,nkj->nki", np.linalg.inv(total), x[:, None] - alpha * locs)
    data = locs + alpha * np.einsum("kij,nkj->nki", covariances, offset)
    score = -np.einsum("nk,nki->ni", share, offset)
    return log_density, score, np.einsum("nk,nki->ni", share, data), -sigma * score


@every_normal
def test_normal_readings_are_scipys(name):
    p, locs, covariances, weights = NORMALS[name]
    x = 1.5 * np.random.default_rng(0).normal(size=(40, *p.event_shape)).astype(np.float32)
    values = readings(p, x, TIMES)
    for i, t in enumerate(TIMES):
        noising = float(p.schedule.alpha(t)), float(p.schedule.sigma(t))

        def reference(x, noising=noising):
            return normal_readings(locs, covariances, weights, *noising, x)

        x64, h = x.astype(float), 1e-5
        moved = [(reference(x64 + h * e), reference(x64 - h * e)) for e in np.eye(x.shape[1])]
        for j, (got, want) in enumerate(zip(values, reference(x64), strict=True)):
            # Rounding of x and of α m, enlarged by the reading's own slope, and of the value itself.
            slope = sum(np.abs(up[j] - down[j]) for up, down in moved) / (2 * h)
            error, size = np.abs(np.asarray(got[i]) - want), 3 * slope + np.abs(want) + 1
            assert np.max(error / size) <= 16 * EPS, f"reading {j} at {t=}: {np.max(error / size) / EPS:.0f} EPS"


@pytest.mark.parametrize("name", ["gaussian-factor", "mixture-factor"])
def test_derivatives_of_normals_obey_tweedies_formulas(name):
    p = NORMALS[name][0]
    x = 1.5 * np.random.default_rng(1).normal(size=(10, *p.event_shape)).astype(np.float32)
    t = np.array([0.05, 0.4, 0.9], np.float32)
    gradient, curvature, spread = derivatives(p, x, t)
    np.testing.assert_allclose(gradient, readings(p, x, t)[1], rtol=1e-4, atol=1e-5)
    alpha, sigma = (np.asarray(f(t), float)[:, None, None, None] for f in (p.schedule.alpha, p.schedule.sigma))
    # ∂x̂₀/∂x = (I + σ² ∂s/∂x)/α, where σ² ∂s/∂x is of order one and 1/α multiplies its rounding.
    np.testing.assert_allclose(alpha * spread, np.eye(x.shape[1]) + sigma**2 * curvature, atol=1e-5)


@pytest.mark.parametrize("name", ["gaussian-diagonal", "mixture-of-widths", "mixture-diagonal"])
def test_normal_densities_integrate_to_one(name):
    grid = np.linspace(-6, 6, 241, dtype=np.float32)
    x = np.stack(np.meshgrid(grid, grid), -1).reshape(-1, 2)
    mass = np.sum(np.asarray(densities(NORMALS[name][0], x, TIMES[[0, 3, 6]]), float), -1) * 0.05**2
    np.testing.assert_allclose(mass, 1.0, atol=1e-5)  # trapezoids are exact to far less; float32 is not


def test_events_of_any_shape_are_read_like_vectors():
    loc, std = np.arange(6.0) / 5 - 1, np.linspace(0.3, 0.8, 6)
    vector, array = lehr.Gaussian(loc, std), lehr.Gaussian(loc.reshape(2, 3), std.reshape(2, 3))
    x, t = np.linspace(-2, 3, 6, dtype=np.float32)[None], TIMES[3:4]
    for flat, shaped in zip(readings(vector, x, t), readings(array, x.reshape(1, 2, 3), t), strict=True):
        np.testing.assert_allclose(np.ravel(shaped), np.ravel(flat), rtol=8 * EPS, atol=8 * EPS)


# Boxes, in units of the noise: centre c, half width h.

NODES, NODE_WEIGHTS = np.polynomial.legendre.leggauss(400)


def box_readings(c, h):
    """G(c, h), ∂G/∂c and the mean place in the box, in float64: by quadrature over the box where
    it is narrow, by differences of log Φ where it is wide."""
    a = -abs(c)
    if h <= 1:
        log_terms = np.log(NODE_WEIGHTS / 2) - (a - h * NODES) ** 2 / 2
        log_mass = logsumexp(log_terms)
        place = NODES @ np.exp(log_terms - log_mass)
        log_density, slope = log_mass - np.log(2 * np.pi) / 2, h * place - a
    else:
        upper, lower = log_ndtr(a + h), log_ndtr(a - h)
        log_mass = upper + np.log1p(-np.exp(lower - upper))
        edges = np.exp(-np.square([a + h, a - h]) / 2 - np.log(2 * np.pi) / 2 - log_mass)
        log_density, slope = log_mass - np.log(2 * h), edges[0] - edges[1]
        place = (slope + a) / h
    sign = np.sign(a) * np.sign(c) if c else 1.0
    return log_density, sign * slope, sign * place


BOXES = {
    "data": (2.0, lehr.VE(0.002, 50.0), [0.0, 0.3, 0.6, 0.8, 1.0]),
    "thin": (0.001, lehr.VE(0.002, 50.0), [0.0, 0.1, 0.3, 1.0]),
    "tiny-alpha": (1.0, lehr.VPCosine(), [0.05, 0.5, 0.9, 0.99, 0.9999, 1.0]),
}


@pytest.mark.parametrize("name", BOXES)
def test_box_is_exact_out_to_a_hundred_sigma(name):
    width, schedule, times = BOXES[name]
    middle = 0.25
    p = lehr.Uniform([middle - width / 2], [middle + width / 2], schedule)
    low, high = float(p.low[0]), float(p.high[0])
    for t in times:
        alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
        away = sigma * np.array([0.01, 0.5, 1.0, 2.0, 5.0, 9.0, 10.5, 30.0, 100.0])
        edge = alpha * (high - low) / 2
        places = np.concatenate([[0.0, 0.5 * edge], np.maximum(edge - away, 0), edge + away])
        x = (alpha * middle + np.concatenate([places, -places])).astype(np.float32)[:, None]
        log_density, score, data, noise = readings(p, x, jnp.float32([t]))

        h = alpha * (high - low) / 2 / sigma
        c = (x[:, 0].astype(float) - alpha * (low + high) / 2) / sigma
        want, slope, place = np.array([box_readings(v, h) for v in c]).T
        # x in units of σ is known to EPS (|x| + α|m|)/σ; the log density enlarges that by its slope,
        # and the place in a box far narrower than the noise by |c|/h where it is not expanded in h.
        rounding = EPS * (1 + np.abs(c) + alpha * np.abs(middle) / sigma)
        size = rounding * (1 + np.abs(slope)) + EPS * (np.abs(want) + abs(np.log(sigma)))
        assert np.all(np.abs(log_density[0] - (want - np.log(sigma))) <= 16 * size)
        assert np.all(np.abs(noise[0, :, 0] + slope) <= 64 * rounding)
        assert np.all(np.abs(score[0, :, 0] * sigma - slope) <= 64 * rounding)
        wanted = (low + high) / 2 + (high - low) / 2 * place
        loose = np.minimum(64 * rounding / max(h, EPS), 0.02)
        assert np.all(np.abs(data[0, :, 0] - wanted) <= (high - low) / 2 * loose + 2 * EPS)
        assert np.all((data[0, :, 0] >= low - EPS) & (data[0, :, 0] <= high + EPS))


CORNERS = np.array([[0.0, 0.0], [0.19, -0.9], [0.3, 0.0], [-0.7, 1.6], [30.0, -100.0]], np.float32)


def test_box_at_the_noise_end_is_the_standard_normal(bar):
    log_density, score, data, noise = (a[-1] for a in readings(bar, CORNERS, TIMES))
    normal = -np.sum(CORNERS.astype(float) ** 2, -1) / 2 - np.log(2 * np.pi)
    np.testing.assert_allclose(log_density, normal, rtol=4 * EPS)
    np.testing.assert_allclose(score, -CORNERS, rtol=4 * EPS)
    np.testing.assert_allclose(noise, CORNERS, rtol=4 * EPS)
    np.testing.assert_allclose(data, 0.0, atol=EPS)


def test_box_at_the_data_end_is_flat_inside_and_forbidding_outside(bar):
    log_density, score, data, noise = (a[0] for a in readings(bar, CORNERS, TIMES))
    np.testing.assert_allclose(log_density[:2], -np.log(0.8), atol=64 * EPS)  # log σ of the least σ, 1e-6, cancels
    np.testing.assert_array_equal(score[:2], 0.0)
    nearest = np.clip(CORNERS, [-0.2, -1.0], [0.2, 1.0])
    np.testing.assert_allclose(data, nearest, rtol=8 * EPS, atol=EPS)
    assert np.all(log_density[2:] < -1e8)
    assert np.all(np.isfinite(score) & np.isfinite(noise))


def test_box_densities_integrate_to_one():
    p = lehr.Uniform([-0.3], [1.1])
    grid = np.linspace(-8, 8, 8001, dtype=np.float32)
    t = np.array([0.02, 0.1, 0.5, 0.95, 1.0], np.float32)
    mass = np.sum(np.asarray(densities(p, grid[:, None], t), float), -1) * 0.002
    np.testing.assert_allclose(mass, 1.0, atol=1e-5)


def test_box_in_two_dimensions_is_a_product_and_its_derivatives_are_tweedies(bar):
    x, step = CORNERS[:4], 1e-4
    log_density, score, *_ = readings(bar, CORNERS, TIMES)
    gradient, curvature, spread = derivatives(bar, CORNERS, TIMES)
    np.testing.assert_allclose(gradient, score, rtol=1e-5, atol=1e-5)
    assert np.all(np.isfinite(curvature) & np.isfinite(spread))
    for i, t in list(enumerate(TIMES))[1:]:
        alpha, sigma = float(bar.schedule.alpha(t)), float(bar.schedule.sigma(t))
        c, h = x.astype(float) / sigma, np.broadcast_to(alpha * np.array([0.2, 1.0]) / sigma, x.shape)
        here, up, down = (np.vectorize(box_readings)(c + e, h) for e in (0.0, step, -step))
        want = np.sum(here[0] - np.log(sigma), -1)
        np.testing.assert_allclose(log_density[i, :4], want, rtol=16 * EPS, atol=16 * EPS)
        # ∂²G/∂c² lies in [−1, 0]; it is a difference of float32 numbers up to 1 + |c|.
        second = (up[1] - down[1]) / (2 * step)
        scaled, derivative = (np.diagonal(a[i, :4], axis1=1, axis2=2) for a in (sigma**2 * curvature, spread))
        np.testing.assert_allclose(scaled, second, atol=1e-3)
        if alpha > 0:  # Tweedie's second formula: ∂x̂₀/∂x = (1 + σ² ∂s/∂x)/α
            np.testing.assert_allclose(alpha * derivative, 1 + second, atol=1e-3)


# Draws and summaries.

EXACT = {
    "gaussian": lehr.Gaussian(LOCS[0], [0.2, 0.6]),
    "gaussian-factor": lehr.Gaussian(SPATIAL[0], FACTORS[0]),
    "mixture": lehr.GaussianMixture(LOCS, [0.2, 0.3, 0.5], WEIGHTS),
    "mixture-factor": lehr.GaussianMixture(SPATIAL, FACTORS, WEIGHTS),
    "uniform": lehr.Uniform([-0.2, 0.5], [0.4, 1.5]),
}


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
def test_draws_have_the_stated_moments(name, t):
    p, n = EXACT[name], 20_000
    draws = np.asarray(p.sample(jax.random.key(3), t, (n,)), float)
    m = p.moments(t)
    z = (draws - m.mean) / m.std
    # Five standard errors: 1/√n for means, √((κ − 1)/n) for variances, with kurtosis κ ≤ 4 here.
    assert np.all(np.abs(np.mean(z, 0)) < 5 / np.sqrt(n))
    assert np.all(np.abs(np.mean(z**2, 0) - 1) < 5 * np.sqrt(3 / n))


@pytest.mark.parametrize("name", ["gaussian-factor", "mixture-factor"])
def test_draws_have_the_correlations_of_their_factors(name):
    p, locs, covariances, weights = NORMALS[name]
    share = np.asarray(weights) / np.sum(weights)
    mean = share @ locs
    wanted = np.einsum("k,kij->ij", share, covariances + np.einsum("ki,kj->kij", locs - mean, locs - mean))
    n = 20_000
    draws = np.asarray(p.sample(jax.random.key(5), 0.0, (n,)), float) - mean
    error = np.sqrt(np.outer(np.diag(wanted), np.diag(wanted)) / n)
    assert np.all(np.abs(draws.T @ draws / n - wanted) < 5 * np.sqrt(3) * error)
    np.testing.assert_allclose(p.moments(0.0).std ** 2, np.diag(wanted), rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "finest"),
    [
        ("gaussian", 0.2),
        ("gaussian-factor", np.linalg.svd(FACTORS[0])[1].min()),
        ("mixture", 0.2),
        ("mixture-factor", np.linalg.svd(FACTORS)[1].min()),
        ("uniform", 0.6 / np.sqrt(12)),
    ],
)
def test_width_is_the_finest_feature_blurred(name, finest):
    p = EXACT[name]
    for t in (0.0, 0.2, 1.0):
        alpha, sigma = float(p.schedule.alpha(t)), float(p.schedule.sigma(t))
        np.testing.assert_allclose(p.width(t), np.hypot(alpha * finest, sigma), rtol=1e-5)


def test_covariance_is_that_of_the_factor():
    np.testing.assert_allclose(lehr.Gaussian(SPATIAL[0], FACTORS[0]).covariance, FACTORS[0] @ FACTORS[0].T, rtol=1e-5)
    np.testing.assert_allclose(lehr.Gaussian(LOCS[0], [0.2, 0.6]).covariance, np.diag([0.04, 0.36]), rtol=1e-6)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: lehr.Gaussian(jnp.zeros(2), jnp.ones(3)), r"Gaussian scale must have shape.*\(2,\).*\(3,\)"),
        (lambda: lehr.Gaussian(jnp.zeros(2), 0.0), "Gaussian scale must be positive"),
        (lambda: lehr.Gaussian(jnp.zeros(2), [1.0, np.inf]), "positive and finite"),
        (lambda: lehr.Gaussian(jnp.zeros(2), [[1.0, 0.0], [1.0, 0.0]]), "L Lᵀ must be positive"),
        (lambda: lehr.GaussianMixture(jnp.zeros(2)), r"locs must have shape \(k, d\)"),
        (lambda: lehr.GaussianMixture(LOCS, jnp.ones(2)), "scales must have shape"),
        (lambda: lehr.GaussianMixture(LOCS, -1.0), "scales must be positive"),
        (lambda: lehr.GaussianMixture(LOCS, 1.0, [1.0, 0.0, 1.0]), "weights must be positive"),
        (lambda: lehr.GaussianMixture(LOCS, 1.0, [1.0, 1.0]), r"weights must have shape \(3,\)"),
        (lambda: lehr.Uniform([0.0], [1.0, 1.0]), "one shape"),
        (lambda: lehr.Uniform([0.0, 1.0], [1.0, 1.0]), "high - low must be positive"),
        (lambda: lehr.Gaussian(jnp.zeros(2)).score(jnp.zeros(3), 0.5), r"event of shape \(2,\).*\(3,\).*vmap"),
        (lambda: lehr.Gaussian(jnp.zeros(2)).score(jnp.zeros(2), jnp.zeros(2)), "one time t.*vmap"),
        (lambda: lehr.Gaussian(jnp.zeros(2)).log_density(jnp.zeros(2), 1.5), "t = 1.5"),
        (lambda: lehr.Gaussian(jnp.zeros(2)).at(-0.1), "t = -0.1"),
    ],
)
def test_impossible_arguments_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_second_derivatives_of_a_box_are_right_in_single_precision():
    """Far tails meet their asymptotic series where the square of an error function underflows."""
    c, h = (v.ravel() for v in np.meshgrid(np.linspace(-60, 60, 601), np.geomspace(0.01, 50, 60)))
    slope = jax.vmap(jax.grad(mean_in_box))
    single = np.asarray(slope(jnp.asarray(c, jnp.float32), jnp.asarray(h, jnp.float32)))
    with jax.enable_x64(True):
        double = np.asarray(slope(jnp.asarray(c), jnp.asarray(h)))
    np.testing.assert_allclose(single * h, double * h, atol=2e-3)
