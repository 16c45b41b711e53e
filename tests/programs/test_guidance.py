"""Strategies of guidance against closed forms: exact where x is Gaussian, and the user's own density at the end."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy import stats

import lehr
from lehr.programs.guidance import Annealed, MomentMatching, Raw, Tweedie

SCHEDULE = lehr.VPCosine()
TIMES = jnp.array([0.05, 0.3, 0.6, 0.9, 1.0])
D = 4
RNG = np.random.default_rng(0)
ROOT = np.tril(RNG.normal(size=(D, D)) / 2 + np.eye(D))
LOC = RNG.normal(size=D)
PRIOR = lehr.Gaussian(LOC, ROOT, SCHEDULE)
A, B = RNG.normal(size=(3, D)), RNG.normal(size=(2, D))
Y, Z, S, R = RNG.normal(size=3), RNG.normal(size=2), 0.3, 0.5
X = RNG.normal(size=D)


def model(y, z):
    x = numpyro.sample("x", lehr.Diffusion(PRIOR))
    numpyro.sample("y", dist.Normal(A @ x, S).to_event(1), obs=y)
    with numpyro.plate("looks", 2):
        numpyro.sample("z", dist.Normal(B @ x, R), obs=z)


def log_joint(guidance, times=TIMES, x=X):
    path = lehr.Path(model, guidance)(Y, Z)
    return jax.jit(jax.vmap(lambda t: path.log_density({"x": jnp.asarray(x)}, t)))(times)


def exact(t, x=X):
    """log p_t(x) + log p(y, z | x_t = x), by the joint Gaussian of (x_t, y, z)."""
    alpha, sigma = float(SCHEDULE.alpha(t)), float(SCHEDULE.sigma(t))
    prior = ROOT @ ROOT.T
    look = np.vstack([alpha * np.eye(D), A, B])
    noise = np.diag(np.r_[np.full(D, sigma**2), np.full(3, S**2), np.full(2, R**2)])
    return stats.multivariate_normal(look @ LOC, look @ prior @ look.T + noise).logpdf(np.r_[x, Y, Z])


# float32, with a residual divided by variances down to .1 and by the α = .006 of the highest level
ROUNDING = {"rtol": 3e-5, "atol": 3e-4}


@pytest.mark.parametrize("strategy", [MomentMatching(), MomentMatching(dense=0, max_steps=10)], ids=["dense", "CG"])
def test_moment_matching_is_exact_for_gaussians_at_every_level(strategy):
    with jax.enable_x64(True):
        prior = lehr.Gaussian(LOC, ROOT, SCHEDULE)

        def model(y, z):
            x = numpyro.sample("x", lehr.Diffusion(prior))
            numpyro.sample("y", dist.Normal(A @ x, S).to_event(1), obs=y)
            with numpyro.plate("looks", 2):
                numpyro.sample("z", dist.Normal(B @ x, R), obs=z)

        path = lehr.Path(model, strategy)(Y, Z)
        slope = jax.jit(jax.value_and_grad(path.log_density))
        for t in np.asarray(TIMES[:-1], float):
            value, got = slope({"x": jnp.asarray(X)}, t)
            alpha, sigma = float(SCHEDULE.alpha(t)), float(SCHEDULE.sigma(t))
            precision = np.linalg.inv(ROOT @ ROOT.T) + A.T @ A / S**2 + B.T @ B / R**2
            pull = np.linalg.solve(ROOT @ ROOT.T, LOC) + A.T @ Y / S**2 + B.T @ Z / R**2
            covariance = alpha**2 * np.linalg.inv(precision) + sigma**2 * np.eye(D)
            want = np.linalg.solve(covariance, alpha * np.linalg.solve(precision, pull) - X)
            np.testing.assert_allclose(got["x"], want, rtol=1e-6, atol=1e-6 * np.abs(want).max())
            if strategy.dense:  # of larger determinants only the diagonal is seen
                np.testing.assert_allclose(value, exact(t), rtol=1e-7)


def test_one_look_alone_knows_nothing_of_the_other():
    """Two observations of one x are not independent given x_t: taken one by one they would count C twice."""
    strategies = {"y": MomentMatching(), "z": MomentMatching(max_steps=3)}  # two strategies, each by itself
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(log_joint(strategies)[3], exact(0.9), rtol=1e-3)
    np.testing.assert_allclose(log_joint(MomentMatching())[3], exact(0.9), **ROUNDING)


def test_without_its_covariance_the_likelihood_is_too_sure_and_raw_surer_still():
    def look(y):
        x = numpyro.sample("x", lehr.Diffusion(lehr.Gaussian(jnp.zeros(1), 0.3, lehr.VPLinear())))
        numpyro.sample("y", dist.Normal(x, 0.3).to_event(1), obs=y)

    def precision(guidance):
        path = lehr.Path(look, guidance)(jnp.zeros(1))
        return -float(jax.jit(jax.hessian(path.log_density))({"x": jnp.zeros(1)}, 0.4)["x"]["x"][0, 0])

    alpha, sigma = (float(f(0.4)) for f in (lehr.VPLinear().alpha, lehr.VPLinear().sigma))
    want = 1 / (alpha**2 * 0.3**2 / 2 + sigma**2)
    slope = alpha * 0.09 / (alpha**2 * 0.09 + sigma**2)
    own = 1 / (alpha**2 * 0.09 + sigma**2)
    np.testing.assert_allclose(precision(MomentMatching()), want, rtol=1e-5)
    np.testing.assert_allclose(precision(Tweedie()), own + slope**2 / 0.09, rtol=1e-5)
    np.testing.assert_allclose(precision(Raw()), own + 1 / 0.09, rtol=1e-5)
    assert want < own + slope**2 / 0.09 < own + 1 / 0.09


def test_the_annealed_exponent_weighs_the_likelihood_and_leaves_the_prior():
    def scaled(y):
        tau = numpyro.sample("tau", dist.HalfNormal(1.0))
        x = numpyro.sample("x", lehr.Diffusion(PRIOR))
        numpyro.sample("y", dist.Normal(A @ x, tau).to_event(1), obs=y)

    position = {"x": jnp.asarray(X), "tau": jnp.asarray(-0.3)}

    def density(guidance, observed=True):
        path = lehr.Path(scaled if observed else lambda y: blind(), guidance)(Y)
        return jax.jit(jax.vmap(lambda t: path.log_density(position, t)))(TIMES)

    def blind():
        numpyro.sample("tau", dist.HalfNormal(1.0))
        numpyro.sample("x", lehr.Diffusion(PRIOR))

    whole, prior = density(Tweedie()), density(Tweedie(), observed=False)
    share = SCHEDULE.alpha(TIMES) ** 2  # of variance one
    np.testing.assert_allclose(density(Annealed(rate=2.0)), prior + share**2 * (whole - prior), **ROUNDING)
    raw = density(Raw())
    np.testing.assert_allclose(density(Annealed(Raw())), prior + share * (raw - prior), **ROUNDING)


@pytest.mark.parametrize(
    "guidance", [Raw(), Tweedie(), MomentMatching(), MomentMatching(dense=0), Annealed(), Annealed(MomentMatching())]
)
def test_at_the_end_every_strategy_is_the_users_own_joint(guidance):
    got = jax.jit(lehr.Path(model, guidance)(Y, Z).ending_at(0.05).log_density)({"x": jnp.asarray(X)}, 0.05)
    own = stats.norm(A @ X, S).logpdf(Y).sum() + stats.norm(B @ X, R).logpdf(Z).sum()
    np.testing.assert_allclose(got, PRIOR.log_density(X, 0.05) + own, **ROUNDING)


def test_masked_numbers_are_not_observed_and_scaled_sites_are_powers():
    seen = np.array([True, False, True])

    def masked(y):
        x = numpyro.sample("x", lehr.Diffusion(PRIOR))
        numpyro.sample("y", dist.Normal(A @ x, S).mask(seen).to_event(1), obs=y)

    def cut(y):
        x = numpyro.sample("x", lehr.Diffusion(PRIOR))
        numpyro.sample("y", dist.Normal(A[seen] @ x, S).to_event(1), obs=y[seen])

    def twice(y):
        x = numpyro.sample("x", lehr.Diffusion(PRIOR))
        with numpyro.handlers.scale(scale=2.0):
            numpyro.sample("y", dist.Normal(A[seen] @ x, S).to_event(1), obs=y[seen])

    paths = [lehr.Path(m, MomentMatching())(Y) for m in (masked, cut, twice)]
    at = [jax.jit(path.log_density)({"x": jnp.asarray(X)}, 0.6) for path in paths]
    prior = PRIOR.log_density(X, 0.6)
    np.testing.assert_allclose(at[0], at[1], **ROUNDING)
    np.testing.assert_allclose(at[2] - prior, 2 * (at[1] - prior), **ROUNDING)


def test_the_covariance_is_that_of_the_posterior_of_x0_for_any_prior():
    mixture = lehr.GaussianMixture(
        np.array([[-1.0, 0.2], [0.8, 1.0]]), np.array([0.4, 0.6]), np.array([0.3, 0.7]), SCHEDULE
    )
    t, x = 0.5, np.array([0.1, 0.4])
    alpha, sigma = float(SCHEDULE.alpha(t)), float(SCHEDULE.sigma(t))

    # x₀ | x_t is a mixture of Gaussians: its moments in closed form
    v = np.array([0.16, 0.36])
    locs, masses = np.array([[-1.0, 0.2], [0.8, 1.0]]), np.array([0.3, 0.7])
    total = alpha**2 * v + sigma**2
    weights = masses * np.array(
        [stats.multivariate_normal(alpha * m, s * np.eye(2)).pdf(x) for m, s in zip(locs, total, strict=True)]
    )
    weights /= weights.sum()
    means = locs + (alpha * v / total)[:, None] * (x - alpha * locs)
    mean = weights @ means
    covariance = np.diag([weights @ (v * sigma**2 / total)] * 2) + (weights[:, None] * (means - mean)).T @ (
        means - mean
    )

    def look(y):
        x = numpyro.sample("x", lehr.Diffusion(mixture))
        numpyro.sample("y", dist.Normal(x, S).to_event(1), obs=y)

    got = jax.jit(lehr.Path(look, MomentMatching())(Y[:2]).log_density)({"x": jnp.asarray(x)}, t)
    want = mixture.log_density(x, t) + stats.multivariate_normal(mean, covariance + S**2 * np.eye(2)).logpdf(Y[:2])
    np.testing.assert_allclose(got, want, **ROUNDING)


def test_moment_matching_refuses_what_is_not_normal():
    def counts(y):
        x = numpyro.sample("x", lehr.Diffusion(PRIOR))
        numpyro.sample("y", dist.Poisson(jnp.exp(x)).to_event(1), obs=y)

    with pytest.raises(ValueError, match="'y' is a Poisson"):
        lehr.Path(counts, MomentMatching())(jnp.ones(D))
    lehr.Path(counts, {"y": Tweedie()})(jnp.ones(D))
    with pytest.raises(ValueError, match="'y' is a Poisson"):
        lehr.Path(counts, Annealed(MomentMatching()))(jnp.ones(D))


def test_an_exponent_that_does_not_grow_is_refused():
    with pytest.raises(ValueError, match="positive rate"):
        Annealed(rate=0.0)


def test_the_level_of_a_site_is_that_of_the_x_it_reads():
    def classified(label):
        x = numpyro.sample("x", lehr.Diffusion(PRIOR))
        t = lehr.current_level()
        numpyro.sample("label", dist.Bernoulli(logits=x[0] - 3 * t), obs=label)

    for guidance, end in ((Raw(), 0.0), (Tweedie(), 0.1)):
        path = lehr.Path(classified, guidance)(1).ending_at(end)
        for t in (0.1, 0.6):
            x0, level = (X[0], t) if guidance == Raw() or t <= end else (PRIOR.denoise(X, t)[0], end)
            want = PRIOR.log_density(X, t) + stats.bernoulli(1 / (1 + np.exp(-(x0 - 3 * level)))).logpmf(1)
            np.testing.assert_allclose(path.log_density({"x": jnp.asarray(X)}, t), want, **ROUNDING)
    with pytest.raises(RuntimeError, match="there is no noise level here"):
        lehr.current_level()


def test_a_model_that_asks_for_its_level_is_read_out_at_the_end_of_the_ladder():
    def model():
        numpyro.sample("x", lehr.Diffusion(PRIOR))
        numpyro.deterministic("level", lehr.current_level())

    path = lehr.Path(model)().ending_at(0.1)
    read = path.constrain({"x": jnp.stack([jnp.asarray(X)] * 3)}, batch_ndims=1)
    np.testing.assert_allclose(read["x"], np.stack([X] * 3))
    np.testing.assert_allclose(read["level"], 0.1)
