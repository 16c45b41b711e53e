"""Moves between levels: alone against closed forms, then in the drivers, and corrected at the level reached."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import lehr
from lehr.annealing.predictors import DDIM, PREDICTORS, Ancestral, Departure, Heun, as_predictor
from lehr.kernels.base import Stats
from lehr.programs.ratios import Level, lost_share

VP = lehr.VPLinear(0.1, 20.0)
SCHEDULES = [lehr.VPCosine(), VP, lehr.VE(0.01, 20.0), lehr.RectifiedFlow()]
M, S = 0.7, 0.6
N = 4000
MIXTURE = lehr.GaussianMixture([[-1.0, 0.0], [1.0, 0.5]], [0.2, 0.3], [0.3, 0.7])


def ids(schedule):
    return type(schedule).__name__


def numbers(level):
    return tuple(float(leaf) for leaf in level)


def marginal(level):
    """Mean and variance of N(M, S²) there."""
    return level.alpha * M, (level.alpha * S) ** 2 + level.sigma**2


def score(x, level):
    mean, variance = marginal(level)
    return -(x - mean) / variance


def move(predictor, x, noisy, clean, key=0):
    """One move of points under N(M, S²), and the gradient it starts from."""
    gradient_at = lambda x, is_clean: score(x, clean if is_clean else noisy)  # noqa: E731
    start = Departure(x, score(x, noisy), jnp.ones_like(x), noisy, clean, gradient_at)
    return predictor.move(jax.random.key(key), start)


def no_other(x, is_clean):
    raise AssertionError("a proposal of known density needs the gradient that it starts from, and no other")


def bayes(x, noisy, clean, mean, variance):
    """Mean and variance of x_t given x_t', where x_t ~ N(mean, variance)."""
    a = noisy.alpha / clean.alpha
    b2 = noisy.sigma**2 - (a * clean.sigma) ** 2
    precision = 1 / variance + a**2 / b2
    return (mean / variance + a * x / b2) / precision, 1 / precision


# Kernels


@pytest.mark.parametrize("schedule", SCHEDULES, ids=ids)
@pytest.mark.parametrize("times", [(0.9, 0.8), (0.6, 0.1), (0.3, 0.29)])
def test_of_a_point_the_ancestral_kernel_is_the_reverse_kernel(times, schedule):
    with jax.enable_x64(True):
        noisy, clean = (Level.of(schedule, t) for t in times)
        x = jnp.array([-1.0, 0.4])
        gradient = -(x - noisy.alpha * M) / noisy.sigma**2
        mean, std = Ancestral().kernel(Departure(x, gradient, jnp.ones(2), noisy, clean, no_other))
        expected = bayes(x, noisy, clean, clean.alpha * M, clean.sigma**2)
        np.testing.assert_allclose(mean, expected[0], rtol=1e-7)
        np.testing.assert_allclose(std**2, expected[1], rtol=1e-7)


@pytest.mark.parametrize("copies", [0.5, 2.0, 3.0])
def test_of_several_points_it_counts_the_forward_kernel_once(copies):
    """π_t = N(α M, σ²)^W, whose score is W times a point's."""
    with jax.enable_x64(True):
        noisy, clean = (Level.of(SCHEDULES[0], t) for t in (0.6, 0.4))
        x = jnp.array([-1.0, 0.4])
        gradient = -copies * (x - noisy.alpha * M) / noisy.sigma**2
        mean, std = Ancestral().kernel(Departure(x, gradient, jnp.full(2, copies), noisy, clean, no_other))
        expected = bayes(x, noisy, clean, clean.alpha * M, clean.sigma**2 / copies)
        np.testing.assert_allclose(mean, expected[0], rtol=1e-7)
        np.testing.assert_allclose(std**2, expected[1], rtol=1e-7)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=ids)
def test_told_of_the_curvature_it_is_exact_for_any_gaussian(schedule):
    with jax.enable_x64(True):
        noisy, clean = (Level.of(schedule, t) for t in (0.6, 0.3))
        x = jnp.array([-1.0, 0.4])
        curvature = jnp.full(2, 1 / marginal(noisy)[1])
        start = Departure(x, score(x, noisy), jnp.ones(2), noisy, clean, no_other)
        mean, std = Ancestral().informed(start, curvature)
        expected = bayes(x, noisy, clean, *marginal(clean))
        np.testing.assert_allclose(mean, expected[0], rtol=1e-7)
        np.testing.assert_allclose(std**2, expected[1], rtol=1e-7)


def test_where_a_likelihood_dominates_the_curvature_it_follows_the_likelihood():
    with jax.enable_x64(True):
        noisy, clean = (Level.of(SCHEDULES[1], t) for t in (0.6, 0.55))
        curvature, centre = 50 / noisy.sigma**2, 0.2  # in units of x'
        x = jnp.array([-1.0, 0.4])
        start = Departure(x, -curvature * (x - centre), jnp.ones(2), noisy, clean, no_other)
        mean, std = Ancestral().informed(start, jnp.full(2, curvature))
        a = noisy.alpha / clean.alpha
        expected = bayes(x, noisy, clean, centre / a, 1 / (a**2 * curvature))  # both in units of the data
        np.testing.assert_allclose(mean, expected[0], rtol=1e-7)
        np.testing.assert_allclose(std**2, expected[1], rtol=1e-7)


# The probability flow


def flow(predictor, schedule, num_levels):
    """From λ = −2 to 3 in that many steps, from a point: the error against the closed form."""
    with jax.enable_x64(True):
        levels = Level.of(schedule, schedule.time(jnp.linspace(-2.0, 3.0, num_levels + 1)))
        start = jnp.array([-1.0])

        def step(x, pair):
            return move(predictor, x, *pair), None

        pairs = tuple(jax.tree.map(lambda leaf: leaf[part], levels) for part in (slice(-1), slice(1, None)))  # noqa: B023
        found, _ = jax.jit(lambda x: jax.lax.scan(step, x, pairs))(start)
        first, last = (jax.tree.map(lambda leaf: leaf[i], levels) for i in (0, -1))  # noqa: B023
        (mean_from, v_from), (mean, v) = marginal(first), marginal(last)
        return float(jnp.abs(found - mean - (start - mean_from) * jnp.sqrt(v / v_from))[0])


@pytest.mark.parametrize("schedule", SCHEDULES, ids=ids)
@pytest.mark.parametrize(("predictor", "order"), [(DDIM(), 1), (Heun(), 2)], ids=["ddim", "heun"])
def test_the_order_of_the_probability_flow_is(predictor, order, schedule):
    errors = np.array([flow(predictor, schedule, k) for k in (64, 128, 256)])
    np.testing.assert_allclose(np.log2(errors[:-1] / errors[1:]), order, atol=0.1)


@pytest.mark.parametrize("predictor", [lehr.Restart(), lehr.Restart(3, "ddim")], ids=["heun", "ddim"])
def test_restart_leaves_the_marginal_as_it_is_and_forgets_where_it_came_from(predictor):
    n, schedule = 100_000, SCHEDULES[0]
    noisy, clean = (Level.of(schedule, schedule.time(log_snr)) for log_snr in (-0.1, 0.1))
    (mean_from, v_from), (mean, v) = marginal(noisy), marginal(clean)
    x = mean_from + jnp.sqrt(v_from) * jax.random.normal(jax.random.key(1), (n,))
    y = np.asarray(jax.jit(lambda x: move(predictor, x, noisy, clean))(x))
    steps = 1 + predictor.num_restarts
    bias = {"heun": 1e-3, "ddim": 2e-3}[predictor.method] * steps  # of the flow's own steps of .2 in log-SNR
    assert abs(y.mean() - mean) < 4 * np.sqrt(v / n) + bias
    assert abs(y.var() / v - 1) < 4 * np.sqrt(2 / n) + bias
    kept = (noisy.alpha / clean.alpha) ** 2 * v / v_from  # of the variance, each time that noise is added back
    expected = np.sqrt(kept) ** predictor.num_restarts
    assert np.corrcoef(np.asarray(x), y)[0, 1] == pytest.approx(float(expected), abs=5 / np.sqrt(n) + bias)


def test_predictors_count_the_gradients_that_they_take_besides_the_first():
    for predictor in [*PREDICTORS.values(), lehr.Restart(3), lehr.Restart(2, "ddim")]:
        calls = []

        def gradient_at(x, is_clean, calls=calls):
            calls.append(is_clean)
            return -x

        noisy, clean = (Level.of(VP, t) for t in (0.5, 0.4))
        start = Departure(jnp.ones(1), -jnp.ones(1), jnp.ones(1), noisy, clean, gradient_at)
        predictor.move(jax.random.key(0), start)
        assert len(calls) == predictor.evaluations


# Reverse


@pytest.mark.parametrize("method", ["ancestral", "ddim", "heun", "restart"])
def test_reverse_gives_the_masses_and_widths_of_a_mixture(method):
    num_levels = 200 if method in ("ancestral", "ddim") else 60
    reverse = lehr.Reverse(MIXTURE, method, num_levels, N, progress=False)
    run = reverse.run(0)
    x, left = reverse.get_samples()["x"], reverse.get_samples()["x"][:, 0] < 0
    assert abs(left.mean() - 0.3) < 4 * np.sqrt(0.21 / N)
    sigma = run.levels["sigma"][-1]
    for part, std in ((x[left], 0.2), (x[~left], 0.3)):
        assert np.abs(part.std(0) / np.hypot(std, sigma) - 1).max() < 4 / np.sqrt(2 * len(part)) + 0.01


def test_reverse_of_a_product_follows_the_summed_scores_to_a_third():
    normal = lehr.Gaussian(jnp.zeros(2), 1.0, VP)
    reverse = lehr.Reverse(normal * normal, "ancestral", 600, N, progress=False)
    reverse.run(1)
    variance = reverse.get_samples()["x"].var(0)
    assert np.abs(variance * 3 - 1).max() < 4 * np.sqrt(2 / N) + 0.02  # and the end's own noise


def test_reverse_is_for_diffusion_sites_only():
    def model():
        x = numpyro.sample("x", lehr.Diffusion(MIXTURE))
        scale = numpyro.sample("scale", dist.HalfNormal(1.0))
        numpyro.sample("y", dist.Normal(x, scale).to_event(1), obs=jnp.zeros(2))

    with pytest.raises(ValueError, match="'scale'"):
        lehr.Reverse(model, progress=False).run(0)
    with pytest.raises(ValueError, match="method"):
        lehr.Reverse(MIXTURE, None)


# With a corrector


@pytest.mark.parametrize("predictor", ["ancestral", "heun"])
def test_a_predictor_and_a_corrector_end_at_the_product(predictor):
    normal = lehr.Gaussian(jnp.array([0.3, 0.0]), 1.0, VP)
    mcmc = lehr.AnnealedMCMC(
        normal * normal, ladder=16, num_steps=8, num_warmup=1, num_chains=N, num_samples=1, predictor=predictor,
        progress=False,
    )  # fmt: skip
    mcmc.run(3)
    x = mcmc.get_samples()["x"]
    assert np.abs(x.var(0) / 0.5 - 1).max() < 4 * np.sqrt(2 / N)
    assert np.abs(x.mean(0) - [0.3, 0.0]).max() < 4 * np.sqrt(0.5 / N)


@dataclass(frozen=True)
class Witness(lehr.HMC):
    """A kernel that stays, and tells in place of its acceptance what ``tells`` says, and in place of
    divergences whether its state knows another density than the one that it is given."""

    tells: str = "position"

    def build(self):
        def step(rng_key, state, logdensity_fn, step_size, inverse_mass):
            x = state.position["x"]
            told = x[0] ** 2 if self.tells == "position" else logdensity_fn({"x": jnp.zeros_like(x)})
            differs = ~jnp.isclose(logdensity_fn(state.position), state.logdensity, rtol=1e-5, atol=1e-5)
            return state, Stats(told, differs)

        return step


def witnessed(tells, predictor="ddim"):
    """Per level: what was told, and by how many transitions the state was found out of date."""
    chains = lehr.AnnealedMCMC(
        lehr.Gaussian(jnp.zeros(1), 0.5, lehr.VE(0.01, 20.0)), Witness(tells=tells), ladder=12, num_steps=1,
        pilot=0, num_chains=50, num_samples=1, predictor=predictor, progress=False,
    )  # fmt: skip
    levels = chains.run(0).levels
    return levels, levels["sigma"] ** 2 + 0.25


def test_the_corrector_runs_at_the_level_just_reached():
    levels, variance = witnessed("density")
    assert levels["diverging"].sum() == 0
    np.testing.assert_allclose(levels["acceptance_rate"], -np.log(2 * np.pi * variance) / 2, rtol=1e-4, atol=1e-4)


def test_the_predictor_has_moved_before_the_corrector_runs():
    levels, variance = witnessed("position")
    noisy, clean = levels["sigma"][:-1], levels["sigma"][1:]
    shrinkage = 1 - noisy * (noisy - clean) / variance[:-1]  # of a step, which is linear for a Gaussian
    ratio = levels["acceptance_rate"] / levels["acceptance_rate"][0]
    np.testing.assert_allclose(ratio, np.append(1, np.cumprod(shrinkage**2)), rtol=1e-3)


def test_without_a_predictor_chains_stay():
    levels, _ = witnessed("position", None)
    np.testing.assert_allclose(levels["acceptance_rate"], levels["acceptance_rate"][0], rtol=1e-6)


# Refusals


@pytest.mark.parametrize(
    "make",
    [
        lambda: as_predictor("euler"),
        lambda: lehr.AnnealedMCMC(MIXTURE, predictor="euler"),
        lambda: lehr.AnnealedSMC(MIXTURE, predictor="euler"),
        lambda: lehr.Reverse(MIXTURE, "euler"),
    ],
)
def test_an_unknown_predictor_is_refused_by_the_names_of_the_known(make):
    with pytest.raises(ValueError, match=r"'ancestral', 'ddim', 'heun', 'restart'.*lehr\.Restart"):
        make()


@pytest.mark.parametrize("arguments", [{"num_restarts": 0}, {"num_restarts": 1.5}, {"method": "ancestral"}])
def test_restarts_that_make_no_sense_are_refused(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        lehr.Restart(**arguments)


@pytest.mark.parametrize("predictor", ["ddim", "heun", "restart", lehr.Restart(2)])
def test_weights_refuse_moves_of_unknown_density(predictor):
    with pytest.raises(ValueError, match="must know the density"):
        lehr.AnnealedSMC(MIXTURE, predictor=predictor)


def test_path_weights_refuse_a_predictor():
    with pytest.raises(ValueError, match="own proposal"):
        lehr.AnnealedSMC(MIXTURE, weights="path", predictor="ancestral")


def test_the_lost_share_goes_from_none_to_all():
    level = lambda log_snr: Level(1.0, 1.0, jnp.asarray(log_snr))  # noqa: E731
    assert float(lost_share(level(1.0), level(1.0))) == 0
    assert float(lost_share(level(-8.0), level(8.0))) == pytest.approx(1, abs=1e-6)
    assert float(lost_share(level(0.0), level(1e-4))) == pytest.approx(1e-4, rel=1e-4)
