"""A Gaussian prior, a Gaussian likelihood of unknown scale: the posterior against quadrature."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy import stats

import lehr

RNG = np.random.default_rng(3)
A = RNG.normal(size=(8, 2))
Y = A @ np.array([1.0, -0.5]) + 0.5 * RNG.normal(size=8)


def model(y=None):
    x = numpyro.sample("x", lehr.Diffusion(lehr.Gaussian(jnp.zeros(2), 1.0)))
    sigma = numpyro.sample("sigma", dist.HalfNormal(1.0))
    numpyro.sample("y", dist.Normal(jnp.asarray(A, float) @ x, sigma).to_event(1), obs=y)


@pytest.fixture(scope="module")
def truth():
    """Means and standard deviations of x and sigma, and the log evidence: x integrated by hand, sigma on a grid."""
    grid = np.linspace(1e-3, 6, 6000)
    covariance = [A @ A.T + s**2 * np.eye(8) for s in grid]
    log_joint = np.array([stats.multivariate_normal.logpdf(Y, np.zeros(8), c) for c in covariance])
    log_joint += stats.halfnorm.logpdf(grid)
    mass = np.exp(log_joint - log_joint.max())
    weights = mass / mass.sum()
    means = np.array([A.T @ np.linalg.solve(c, Y) for c in covariance])
    squares = means**2 + np.array([np.diag(np.eye(2) - A.T @ np.linalg.solve(c, A)) for c in covariance])
    mean_x, mean_sigma = weights @ means, weights @ grid
    return {
        "x": (mean_x, np.sqrt(weights @ squares - mean_x**2)),
        "sigma": (mean_sigma, np.sqrt(weights @ grid**2 - mean_sigma**2)),
        "log_evidence": np.log(np.trapezoid(mass, grid)) + log_joint.max(),
    }


@pytest.mark.slow
def test_z_scores_over_fifty_keys_are_standard_normal(truth):
    n = 200
    mcmc = lehr.AnnealedMCMC(model, ladder=32, num_steps=4, num_chains=n, num_samples=1, thinning=24, progress=False)
    z = []
    for seed in range(50):
        mcmc.run(seed, y=jnp.asarray(Y, float))
        draws = mcmc.get_samples()
        scores = [(draws[k].mean(0) - mean) / (sd / np.sqrt(n)) for k, (mean, sd) in list(truth.items())[:2]]
        z.append(np.concatenate([np.atleast_1d(s) for s in scores]))
    for coordinate in np.array(z).T:
        assert stats.kstest(coordinate, "norm").pvalue > 1e-3
        assert abs(coordinate.mean()) < 3.3 / np.sqrt(50)


def test_smc_agrees_with_quadrature(truth):
    smc = lehr.AnnealedSMC(model, ladder=40, num_particles=4000, progress=False)
    run = smc.run(0, y=jnp.asarray(Y, float))
    draws = smc.get_samples()
    for site, (mean, sd) in list(truth.items())[:2]:
        assert np.all(np.abs(draws[site].mean(0) - mean) < 4 * sd / np.sqrt(1000))  # a quarter of N effective
        assert np.all(np.abs(draws[site].std(0) / sd - 1) < 0.1)
    assert abs(run.log_evidence - truth["log_evidence"]) < 4 * run.log_evidence_se
