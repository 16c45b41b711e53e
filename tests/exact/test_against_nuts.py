"""NumPyro's own NUTS at the last level, beside annealed chains: two samplers of one density, on unimodal models."""

import arviz as az
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import MCMC, NUTS

import lehr

SCHEDULE = lehr.VPCosine()
ROOT = jnp.array([[1.0, 0.0, 0.0], [0.6, 0.7, 0.0], [-0.3, 0.2, 0.5]])


def gaussian(y):
    x = numpyro.sample("x", lehr.Diffusion(lehr.Gaussian(jnp.array([0.5, -1.0, 0.2]), ROOT, SCHEDULE)))
    numpyro.sample("y", dist.Normal(x[:2], 0.4).to_event(1), obs=y)


def product(y):
    p, q = lehr.Gaussian(jnp.zeros(3), 1.0, SCHEDULE), lehr.Gaussian(jnp.ones(3), ROOT, SCHEDULE)
    x = numpyro.sample("x", lehr.Diffusion(p * q**0.5))
    numpyro.sample("y", dist.StudentT(4.0, x[:2], 0.4).to_event(1), obs=y)


def unknown_scale(y):
    tau = numpyro.sample("tau", dist.HalfNormal(1.0))
    x = numpyro.sample("x", lehr.Diffusion(lehr.Gaussian(jnp.zeros(1), 1.0, SCHEDULE)))
    with numpyro.plate("looks", 8):
        numpyro.sample("y", dist.Normal(x, tau), obs=jnp.linspace(-1, 1, 8) + y[0])


def hierarchy(y):
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    with numpyro.plate("units", 2):
        x = numpyro.sample("x", lehr.Diffusion(lehr.Gaussian(jnp.zeros(2), 0.5, SCHEDULE)))
        numpyro.sample("y", dist.Normal(x + mu, 0.3).to_event(1), obs=jnp.stack([y, -y + 1]))


@pytest.mark.slow
@pytest.mark.parametrize("model", [gaussian, product, unknown_scale, hierarchy])
def test_annealed_chains_agree_with_nuts(model):
    y = jnp.array([1.0, 0.2])
    mcmc = lehr.AnnealedMCMC(model, ladder=16, num_chains=64, num_samples=200, progress=False)
    run = mcmc.run(jax.random.key(0), y)
    ours = mcmc.get_samples(group_by_chain=True)
    at_end = lehr.noise_level(model, float(run.levels["t"][-1]))
    nuts = MCMC(
        NUTS(at_end), num_warmup=500, num_samples=2000, num_chains=2, chain_method="vectorized", progress_bar=False
    )
    nuts.run(jax.random.key(1), y)
    theirs = nuts.get_samples(group_by_chain=True)
    for name in theirs:
        a, b = (np.asarray(draws[name]) for draws in (ours, theirs))
        a, b = (draws.reshape(*draws.shape[:2], -1) for draws in (a, b))
        for i in range(a.shape[2]):
            for power in (1, 2):
                errors = [(v[..., i] ** power).std() / np.sqrt(float(az.ess(v[..., i] ** power))) for v in (a, b)]
                gap = (a[..., i] ** power).mean() - (b[..., i] ** power).mean()
                # some 40 comparisons in all: beyond 4.5 standard errors once in 3,000
                assert abs(gap) < 4.5 * np.hypot(*errors), (name, i, power, gap, errors)
