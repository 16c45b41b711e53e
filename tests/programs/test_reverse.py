"""Reverse kernels between two levels, against Bayes' rule for Gaussians in float64."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy import stats
from stand_ins import score_of

import lehr
from lehr.programs.ratios import SMALL, Level, correction, expect
from lehr.programs.reverse import reverse_step, start_density

SCHEDULES = [lehr.VPCosine(), lehr.VPLinear(), lehr.VE(0.01, 20.0), lehr.RectifiedFlow()]
FROM, TO = np.array([0.95, 0.9, 0.6, 0.5, 0.3]), np.array([0.9, 0.3, 0.59, 0.1, 0.03])
M = np.array([0.5, -1.0])
ROOT = np.array([[0.8, 0.0], [-0.5, 0.3]])
P, Q = (M, ROOT @ ROOT.T), (np.array([-0.2, 0.4]), np.diag([0.49, 0.36]))
X = np.array([0.7, 1.3])
CLOSE = {"rtol": 1e-6, "atol": 1e-8}


def gaussian(moments, schedule):
    return lehr.Gaussian(moments[0], np.linalg.cholesky(moments[1]), schedule)


def steps(model, x=X, others=None, pull=0.0):
    """The proposals from {"x": x} for every pair of levels; ``pull`` is added to the gradient."""
    with jax.enable_x64(True):
        path = model() if isinstance(model(), lehr.Path) else lehr.Path(model())
        position = {"x": jnp.asarray(x)} | (others or {})

        def one(t_from, t_to):
            gradient = jax.grad(path.surrogate)(position, t_from)
            pulled = gradient | {"x": gradient["x"] + pull}
            return reverse_step(path, position, expect(path, position, t_from), pulled, t_from, t_to)

        return jax.tree.map(np.asarray, jax.jit(jax.vmap(one))(jnp.asarray(FROM), jnp.asarray(TO)))


def noise(schedule):
    """α', σ', α, σ for every pair."""
    with jax.enable_x64(True):
        both = [(schedule.alpha(jnp.asarray(t)), schedule.sigma(jnp.asarray(t))) for t in (FROM, TO)]
        return np.array([np.asarray(v) for pair in both for v in pair]).T


def log_product(factors, alpha, sigma):
    """Σ w log N(x; α m, α² Σ + σ²) as (precision, slope, constant) of a quadratic in x."""
    d = factors[0][1][0].size
    precision, slope, constant = np.zeros((d, d)), np.zeros(d), 0.0
    for weight, (mean, covariance) in factors:
        v, m = alpha**2 * covariance + sigma**2 * np.eye(d), alpha * mean
        inverse = np.linalg.inv(v)
        precision, slope = precision + weight * inverse, slope + weight * inverse @ m
        constant -= weight * (m @ inverse @ m + np.linalg.slogdet(2 * np.pi * v)[1]) / 2
    return precision, slope, constant


def bayes(factors, schedule, x=X):
    """Mean and covariance of K ∝ π_t(x) f(x' | x), and log ∫ π_t f dx / π_t'(x'), for every pair."""
    for alpha_from, sigma_from, alpha, sigma in noise(schedule):
        a = alpha_from / alpha
        b2 = sigma_from**2 - a**2 * sigma**2
        precision, slope, constant = log_product(factors, alpha, sigma)
        precision, slope = precision + a**2 / b2 * np.eye(x.size), slope + a / b2 * x
        constant -= x @ x / (2 * b2) + x.size * np.log(2 * np.pi * b2) / 2
        covariance = np.linalg.inv(precision)
        mean = covariance @ slope
        log_integral = constant + slope @ mean / 2 + np.linalg.slogdet(2 * np.pi * covariance)[1] / 2
        before, slope, constant = log_product(factors, alpha_from, sigma_from)
        yield mean, covariance, log_integral - (constant + slope @ x - x @ before @ x / 2)


def agrees(found, factors, schedule, x=X):
    for i, (mean, covariance, log_weight) in enumerate(bayes(factors, schedule, x)):
        np.testing.assert_allclose(found.mean[i], mean, **CLOSE)
        np.testing.assert_allclose(found.root[i] @ found.root[i].T, covariance, **CLOSE)
        np.testing.assert_allclose(found.log_det[i], np.linalg.slogdet(covariance)[1] / 2, **CLOSE)
        np.testing.assert_allclose(found.log_weight[i], log_weight, rtol=1e-6, atol=1e-6)


def ids(schedule):
    return type(schedule).__name__


@pytest.mark.parametrize("schedule", SCHEDULES, ids=ids)
@pytest.mark.parametrize("covariance", [0.49 * np.eye(2), P[1]], ids=["isotropic", "full"])
def test_for_one_gaussian_the_proposal_is_the_reverse_kernel_and_weighs_nothing(covariance, schedule):
    moments = (M, covariance)
    found = steps(lambda: gaussian(moments, schedule))
    agrees(found, [(1.0, moments)], schedule)
    np.testing.assert_allclose(found.log_weight, 0, atol=1e-6)
    np.testing.assert_array_equal(found.shift, 0)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=ids)
def test_the_weight_of_a_product_is_the_integral_of_the_forward_kernel_under_it(schedule):
    found = steps(lambda: gaussian(P, schedule) * gaussian(Q, schedule))
    agrees(found, [(1.0, P), (1.0, Q)], schedule)
    assert np.abs(found.log_weight).max() > 0.1


@pytest.mark.parametrize("weight", [0.5, 2.5])
def test_so_is_that_of_a_power(weight):
    agrees(steps(lambda: gaussian(P, SCHEDULES[0]) ** weight), [(weight, P)], SCHEDULES[0])


def test_and_of_a_contrast():
    wide = (Q[0], 2 * Q[1])
    found = steps(lambda: lehr.Contrast(gaussian(P, SCHEDULES[0]), gaussian(wide, SCHEDULES[0]), 0.7))
    agrees(found, [(1.7, P), (-0.7, wide)], SCHEDULES[0])


def test_events_of_a_plate_step_side_by_side():
    x = np.array([[0.7, 1.3], [-0.4, 0.2], [2.0, -1.0]])

    def model():
        with numpyro.plate("events", 3):
            numpyro.sample("x", lehr.Diffusion(gaussian(P, SCHEDULES[0]) * gaussian(Q, SCHEDULES[0])))

    found = steps(lambda: lehr.Path(model)(), x)
    alone = [list(bayes([(1.0, P), (1.0, Q)], SCHEDULES[0], event)) for event in x]
    for i in range(len(FROM)):
        np.testing.assert_allclose(found.mean[i], np.concatenate([pairs[i][0] for pairs in alone]), **CLOSE)
        expected = np.kron(np.eye(3), alone[0][i][1])
        np.testing.assert_allclose(found.root[i] @ found.root[i].T, expected, **CLOSE)
        np.testing.assert_allclose(found.log_weight[i], sum(pairs[i][2] for pairs in alone), rtol=1e-6, atol=1e-6)


def test_a_model_observed_on_a_crop_counts_where_it_looks():
    x = np.array([0.7, 1.3, -0.6])
    whole = (np.array([0.1, 0.2, -0.3]), np.array([[1.0, 0.3, 0.2], [0.3, 0.8, -0.1], [0.2, -0.1, 0.6]]))
    schedule = SCHEDULES[1]

    def model():
        x = numpyro.sample("x", lehr.Diffusion(gaussian(whole, schedule)))
        numpyro.sample("crop", lehr.Diffusion(gaussian(P, schedule)), obs=x[:2])

    found = steps(lambda: lehr.Path(model)(), x)
    for i, (levels, (mean, covariance, _)) in enumerate(
        zip(noise(schedule), bayes([(1.0, whole)], schedule, x), strict=True)
    ):
        precision, slope, constant = log_product([(1.0, P)], *levels[2:])
        before, slope_before, constant_before = log_product([(1.0, P)], *levels[:2])
        padded = np.zeros((3, 3))
        padded[:2, :2] = precision
        slope = np.append(slope, 0.0)
        both = np.linalg.inv(np.linalg.inv(covariance) + padded)
        expected = both @ (np.linalg.solve(covariance, mean) + slope)
        np.testing.assert_allclose(found.mean[i], expected, **CLOSE)
        np.testing.assert_allclose(found.root[i] @ found.root[i].T, both, **CLOSE)
        # E over the reverse kernel of the first of p_t(x)/p_t'(x') of the second
        at = expected
        log_ratio = stats.multivariate_normal(mean, covariance).logpdf(at) - stats.multivariate_normal(
            expected, both
        ).logpdf(at)
        log_ratio += constant + slope @ at - at @ padded @ at / 2
        log_ratio -= constant_before + slope_before @ x[:2] - x[:2] @ before @ x[:2] / 2
        np.testing.assert_allclose(found.log_weight[i], log_ratio, rtol=1e-6, atol=1e-6)


def test_a_score_steps_as_the_energy_does():
    schedule = SCHEDULES[0]
    found = steps(lambda: score_of(gaussian(P, schedule)) * gaussian(Q, schedule))
    agrees(found, [(1.0, P), (1.0, Q)], schedule)


def test_a_ratio_keeps_its_digits_far_from_the_origin():
    """In single precision: at log-SNR 8 and x = 10 a square over its variance is of the order of 10⁵."""
    model, schedule = lehr.Gaussian([10.0, -8.0], [1.0, 0.5], SCHEDULES[1]), SCHEDULES[1]
    t_from, t = schedule.time(7.3), schedule.time(7.9)
    path, position = lehr.Path(model), {"x": jnp.array([10.5, -7.8])}
    gradient = {"x": jnp.zeros(2)}
    found = reverse_step(path, position, expect(path, position, t_from), gradient, t_from, t)
    assert abs(found.log_weight) < 2e-3
    exact = model.log_density(position["x"], t) - model.log_density(position["x"], t_from)
    assert abs(found.log_stay - exact) < 2e-3


# Draws


def likely(y, scale):
    def model():
        x = numpyro.sample("x", lehr.Diffusion(gaussian(P, SCHEDULES[0]) * gaussian(Q, SCHEDULES[0])))
        numpyro.sample("y", dist.Normal(x, scale).to_event(1), obs=jnp.asarray(y))

    return lehr.Path(model)()


@pytest.mark.parametrize("pull", [0.0, 0.3])
def test_a_draw_knows_its_density_wherever_a_likelihood_moves_it(pull):
    found = steps(lambda: likely(X, 2.0), pull=pull)
    assert np.abs(found.shift).max() > 0.01
    for i, (mean, covariance, log_weight) in enumerate(bayes([(1.0, P), (1.0, Q)], SCHEDULES[0])):
        with jax.enable_x64(True):
            step = jax.tree.map(lambda leaf: jnp.asarray(leaf[i]), found)  # noqa: B023
            x, log_ratio, log_proposal = jax.vmap(step.draw)(jax.random.split(jax.random.key(3), 4000))
        moved = found.mean[i] + found.root[i] @ found.shift[i]
        log_k = stats.multivariate_normal(moved, covariance).logpdf(x)
        log_g = stats.multivariate_normal(mean, covariance).logpdf(x) + log_weight
        np.testing.assert_allclose(log_proposal, log_k, atol=1e-6)
        np.testing.assert_allclose(log_ratio, log_g - log_k, atol=1e-6)
        z = np.linalg.solve(found.root[i], (np.asarray(x) - moved).T)
        assert np.abs(z.mean(1)).max() < 4 / np.sqrt(4000)
        assert np.abs(np.cov(z) - np.eye(2)).max() < 4 * np.sqrt(2 / 4000)


def test_a_draw_is_a_smooth_function_of_where_it_starts():
    """Deep within a mode the covariance is nearly isotropic, and its eigenvectors are anyone's guess."""
    with jax.enable_x64(True):
        path = lehr.Path(lehr.GaussianMixture([[-1.0, 0.0], [1.0, 0.5]], 0.3))
        starts, apart = np.random.default_rng(0).normal([1.0, 0.5], 0.3, (8, 2)), 1e-12

        def root(x):
            position = {"x": x}
            gradient = jax.grad(path.surrogate)(position, 0.1)
            return reverse_step(path, position, expect(path, position, 0.1), gradient, 0.1, 0.01).root

        here, there = jax.jit(jax.vmap(root))(np.concatenate([starts, starts + apart])).reshape(2, 8, 2, 2)
    assert np.abs(here - there).max() < 1e3 * apart


def test_a_likelihood_pulls_towards_itself_and_by_three_deviations_at_most():
    far = np.array([50.0, 50.0])
    found = steps(lambda: likely(far, 0.05))
    assert np.abs(found.shift).max() == 3.0
    for i in range(len(FROM)):
        assert (found.root[i] @ found.shift[i]) @ (far - found.mean[i]) > 0


# What ratios lack


MODES = lehr.GaussianMixture([[-1.0, 0.2], [0.9, 0.5], [0.3, -1.1]], [0.5, 0.3, 0.6], [0.3, 0.5, 0.2], SCHEDULES[1])


def errors(potential, log_snr, step, n=2000):
    """Of the log ratio of densities after one reverse step, without its correction and with it."""
    with jax.enable_x64(True):
        path, schedule = lehr.Path(score_of(potential)), potential.schedule
        t_from, t = (jnp.asarray(float(schedule.time(v))) for v in (log_snr, log_snr + step))

        def one(x, key):
            behind = expect(path, {"x": x}, t_from)
            made = reverse_step(path, {"x": x}, behind, {"x": jnp.zeros_like(x)}, t_from, t)
            to, log_ratio, log_proposal = made.draw(key)
            levels = Level.of(schedule, t_from), Level.of(schedule, t)
            delta = -jnp.expm1(levels[0].log_snr - levels[1].log_snr)
            forward = stats_logpdf(x, levels[0].alpha / levels[1].alpha * to, levels[0].sigma * jnp.sqrt(delta))
            log_ratio = log_ratio + log_proposal - forward
            lacks = correction(path, made.kernels, {"x": to}, expect(path, {"x": to}, t), t_from, t)
            exact = potential.log_density(to, t) - potential.log_density(x, t_from)
            return log_ratio - exact, log_ratio + lacks - exact

        x = potential.sample(jax.random.key(0), t_from, (n,))
        return np.asarray(jax.jit(jax.vmap(one))(x, jax.random.split(jax.random.key(1), n)))


def stats_logpdf(x, mean, std):
    return jnp.sum(jax.scipy.stats.norm.logpdf(x, mean, std))


@pytest.mark.parametrize("log_snr", [-1.0, 0.5])
def test_the_correction_is_what_a_ratio_lacks_but_for_higher_orders(log_snr):
    """Third-order terms fall with δ^1.5, those left with δ² and faster."""
    plain, corrected = (np.sqrt(np.mean(e**2)) for e in errors(MODES, log_snr, 0.1))
    assert corrected < plain / 3
    coarse = np.sqrt(np.mean(errors(MODES, log_snr, 0.4)[1] ** 2))
    assert coarse / corrected > 4**1.8


def test_what_is_left_does_not_add_up():
    """The variance of the error is ‖κ‖²/6 and its mean ‖κ‖²/12, the divergence of a Gaussian from the true kernel. The
    third order alone would leave a mean of about a third of the variance, of the other sign."""
    plain, corrected = errors(MODES, 0.0, 0.25, n=20_000)
    assert plain.mean() == pytest.approx(plain.var() / 2, rel=0.3)
    assert abs(corrected.mean()) < plain.var() / 4
    assert corrected.std() < plain.std() / 5


def test_gaussians_lack_nothing():
    for error in errors(gaussian(P, SCHEDULES[1]), 0.0, 1.0, n=50):
        np.testing.assert_allclose(error, 0, atol=1e-5)


# Likelihoods that ask no model


@dataclass(frozen=True)
class Aside(lehr.guidance.Guidance):
    """Reads x_t as it is."""

    uses_score = False

    def log_prob(self, noisy):
        return noisy.log_prob(noisy.sites(noisy.x, noisy.t))


@pytest.mark.parametrize("scale", [2.0, 0.05])
def test_a_normal_likelihood_that_asks_no_model_is_in_the_proposal_but_for_its_narrowest_part(scale):
    y = np.array([0.4, 0.9])

    def model():
        x = numpyro.sample("x", lehr.Diffusion(gaussian(P, SCHEDULES[0])))
        numpyro.sample("y", dist.Normal(x, scale).to_event(1), obs=jnp.asarray(y))

    found = steps(lambda: lehr.Path(model, guidance=Aside())())
    for i, (mean, covariance, _) in enumerate(bayes([(1.0, P)], SCHEDULES[0])):
        whitened = found.root[i] @ found.root[i] / scale**2
        gain = np.clip(np.linalg.eigvalsh(whitened), 0, 1)
        np.testing.assert_allclose(found.log_narrow[i], -np.log1p(gain).sum() / 2, rtol=1e-6)
        if gain.max() < 1:
            posterior = np.linalg.inv(np.linalg.inv(covariance) + np.eye(2) / scale**2)
            centre = posterior @ (np.linalg.solve(covariance, mean) + y / scale**2)
            np.testing.assert_allclose(found.mean[i] + found.root[i] @ found.shift[i], centre, rtol=1e-5, atol=1e-7)
            k = found.root[i] @ found.narrow[i]
            np.testing.assert_allclose(k @ k.T, posterior, rtol=1e-5, atol=1e-8)
    assert (gain.max() < 1) == (scale > 1)


@dataclass(frozen=True)
class Asking(Aside):
    """Says that it asks no model, and does."""

    def log_prob(self, noisy):
        return noisy.log_prob(noisy.read_clean(noisy.denoise(noisy.x)))


def test_who_says_that_it_asks_no_model_is_held_to_it():
    def model():
        x = numpyro.sample("x", lehr.Diffusion(gaussian(P, SCHEDULES[0])))
        numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=jnp.zeros(2))

    with pytest.raises(TypeError, match="uses_score = True"):
        lehr.AnnealedSMC(lehr.Path(model, guidance=Asking()), ladder=4, progress=False).run(0)


# Large events


def test_large_events_keep_the_mean_and_lose_only_the_variance_of_what_is_expected():
    """Then K is N(κ x' + α δ x̂₀, σ² δ): exact but for α² δ² C, which a short step does not see."""
    d, schedule = SMALL + 4, SCHEDULES[1]
    x, moments = np.linspace(-2, 2, d), (np.linspace(0, 1, d), 0.36 * np.eye(d))
    found = steps(lambda: gaussian(moments, schedule), x)
    assert found.root.shape == (len(FROM), d)
    np.testing.assert_allclose(found.log_weight, 0, atol=1e-6)
    levels = zip(noise(schedule), bayes([(1.0, moments)], schedule, x), strict=True)
    for i, ((alpha_from, sigma_from, alpha, sigma), (mean, covariance, _)) in enumerate(levels):
        delta = 1 - (alpha_from * sigma / (alpha * sigma_from)) ** 2
        variance = 0.36 * sigma_from**2 / (0.36 * alpha_from**2 + sigma_from**2)  # of x₀ given x'
        np.testing.assert_allclose(found.mean[i], mean, **CLOSE)
        np.testing.assert_allclose(found.root[i] ** 2, sigma**2 * delta, **CLOSE)
        np.testing.assert_allclose(found.root[i] ** 2 + alpha**2 * delta**2 * variance, np.diag(covariance), **CLOSE)


def test_of_points_large_events_are_exact_products_too():
    d, schedule = SMALL + 4, SCHEDULES[0]
    x, points = np.linspace(-2, 2, d), [(np.linspace(0, 1, d), 1e-16 * np.eye(d)), (np.zeros(d), 1e-16 * np.eye(d))]
    found = steps(lambda: gaussian(points[0], schedule) * gaussian(points[1], schedule), x)
    for i, (mean, covariance, log_weight) in enumerate(bayes([(1.0, p) for p in points], schedule, x)):
        np.testing.assert_allclose(found.mean[i], mean, **CLOSE)
        np.testing.assert_allclose(found.root[i] ** 2, np.diag(covariance), **CLOSE)
        np.testing.assert_allclose(found.log_weight[i], log_weight, rtol=1e-5, atol=1e-5)


# The start


def grid_mass(path, t, half=8.0, n=401):
    axis = np.linspace(-half, half, n)
    points = jnp.asarray(np.stack(np.meshgrid(axis, axis), -1).reshape(-1, 2), float)
    return float(jnp.exp(jax.vmap(lambda x: start_density(path, {"x": x}, t))(points)).sum()) * (axis[1] - axis[0]) ** 2


@pytest.mark.parametrize("t", [1.0, 0.4])
def test_the_start_of_one_model_is_a_normalised_gaussian(t):
    mixture = lehr.GaussianMixture([[-1.5, 0.0], [1.0, 1.0]], 0.4, [0.3, 0.7])
    assert grid_mass(lehr.Path(mixture), t) == pytest.approx(1, abs=1e-4)


def test_the_start_of_a_product_is_that_of_its_models_and_the_others_share_in_it():
    schedule, t, y = SCHEDULES[1], 0.9, jnp.array([0.3, 0.1])
    wide = lehr.Gaussian(M, [0.5, 0.9], schedule)

    def model():
        x = numpyro.sample("x", lehr.Diffusion(gaussian(Q, schedule) * wide**2))
        numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)

    path = lehr.Path(model)()
    position = {"x": jnp.asarray(X, float)}
    models = gaussian(Q, schedule).log_density(X, t) + 2 * wide.log_density(X, t)  # exact, being Gaussians
    expected = models + path.others(position, t)
    np.testing.assert_allclose(start_density(path, position, t), expected, rtol=1e-5)


# Levels and refusals


def test_a_level_reads_the_schedule_for_one_time_or_for_many():
    one, many = Level.of(SCHEDULES[2], 0.3), Level.of(SCHEDULES[2], jnp.array([0.5, 0.3]))
    assert one.alpha.shape == ()
    assert many.alpha.shape == many.sigma.shape == many.log_snr.shape == (2,)
    np.testing.assert_allclose([leaf[1] for leaf in many], list(one), rtol=1e-6)


def test_a_floor_has_no_denoiser_and_so_no_path_weights():
    p, q = gaussian(P, SCHEDULES[0]), gaussian(Q, SCHEDULES[0])
    floored = lehr.Contrast(p, q, 0.5, floor=0.01)
    for weights in ("path", "both"):
        with pytest.raises(TypeError, match="denoiser"):
            lehr.AnnealedSMC(floored, weights=weights, ladder=4, progress=False).run(0)
