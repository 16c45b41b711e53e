"""Products of Gaussians, whose variance a reverse sampler with summed scores gets wrong.

With n independent chains of one draw each, a sample variance has standard error v √(2/n).
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lehr

N = 2000
VP = lehr.VPLinear(0.1, 20.0)


def normal(*variances):
    return lehr.Gaussian(jnp.zeros(2), jnp.sqrt(jnp.array(variances)), VP)


TARGETS = {
    "N(0,1)^2": (lambda: normal(1.0, 1.0) * normal(1.0, 1.0), 0.5),
    "N(0,1)^2.5": (lambda: normal(1.0, 1.0) ** 2.5, 0.4),
    "N(0,10) N(0,1)": (lambda: normal(10.0, 10.0) * normal(1.0, 1.0), 1 / 1.1),
    "crossed / 20": (lambda: normal(10.0, 1.0) * normal(1.0, 10.0) / normal(20.0, 20.0), 1 / 1.05),
    "crossed / 1.1": (lambda: normal(10.0, 1.0) * normal(1.0, 10.0) / normal(1.1, 1.1), 1 / (1.1 - 1 / 1.1)),
}


FEW = ("N(0,1)^2", "crossed / 1.1")  # the others take the same programs again


@pytest.mark.parametrize(
    "kernel", [pytest.param(lehr.HMC(), id="HMC"), pytest.param(lehr.MALA(), id="MALA", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", [n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n in TARGETS])
def test_annealed_chains_end_at_the_product(name, kernel):
    make, variance = TARGETS[name]
    mcmc = lehr.AnnealedMCMC(make(), kernel, ladder=16, num_steps=8, num_chains=N, num_samples=1, progress=False)
    mcmc.run(11)
    x = mcmc.get_samples()["x"]
    z = (x.var(0) / variance - 1) / np.sqrt(2 / N)
    assert np.abs(z).max() < 3
    assert np.abs(x.mean(0) / np.sqrt(variance / N)).max() < 3.5


def test_smc_gives_the_evidence_of_a_product_of_gaussians():
    smc = lehr.AnnealedSMC(normal(10.0, 10.0) * normal(1.0, 1.0), ladder=16, num_particles=N, progress=False)
    run = smc.run(0)
    exact = -np.log(2 * np.pi * 11.0)  # ∫ N(x; 0, 10) N(x; 0, 1) dx = N(0; 0, 11), in two dimensions
    assert abs(run.log_evidence - exact) < 4 * max(run.log_evidence_se, 1e-3)


def reverse_variance(product, num_steps=1000):
    """Variance of the first coordinate that a reverse SDE with the summed scores ends at: linear, so in closed form."""
    t, variance = np.linspace(1, 0, num_steps + 1), 1.0
    slopes = -np.asarray(jax.vmap(lambda t: product.score(jnp.array([1.0, 0.0]), t)[0])((t[1:] + t[:-1]) / 2))
    for high, low, slope in zip(t[:-1], t[1:], slopes, strict=True):
        beta = 0.1 + 19.9 * (high + low) / 2
        variance += (high - low) * beta * (variance * (1 - 2 * slope) + 1)
    return variance


def test_summed_scores_in_a_reverse_sampler_end_elsewhere():
    """The reason for all this: the same score, followed backwards in time, gives 1/3 and not 1/2."""
    assert reverse_variance(normal(1.0, 1.0) * normal(1.0, 1.0)) == pytest.approx(1 / 3, rel=0.02)
