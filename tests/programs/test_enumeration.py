"""Discrete latents: summed out of the density and of the start, drawn from their conditional at the end."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from scipy import special, stats

import lehr

LOCS, SCALES, MASSES = (
    np.array([[-1.0, 0.5], [1.2, -0.3], [0.0, 2.0]]),
    np.array([0.5, 0.4, 0.7]),
    np.array([0.5, 0.3, 0.2]),
)
X, Y, TAU = np.array([0.4, 0.2]), np.array([1.0, 0.3]), 0.6
TIMES = (0.01, 0.3, 0.8)
SCHEDULE = lehr.VPCosine()


def labelled(y=None):
    """A class-conditional prior with its label as a latent."""
    z = numpyro.sample("z", dist.Categorical(probs=jnp.asarray(MASSES)))
    x = numpyro.sample("x", lehr.Diffusion(lehr.Gaussian(jnp.asarray(LOCS)[z], jnp.asarray(SCALES)[z], SCHEDULE)))
    if y is not None:
        numpyro.sample("y", dist.Normal(x, TAU).to_event(1), obs=y)


@pytest.mark.parametrize("t", TIMES)
def test_a_latent_label_makes_a_mixture(t):
    mixture = lehr.GaussianMixture(LOCS, SCALES, MASSES, SCHEDULE)
    path = lehr.Path(labelled)()
    np.testing.assert_allclose(
        jax.jit(path.log_density)({"x": jnp.asarray(X)}, t), mixture.log_density(X, t), rtol=1e-5
    )
    got = jax.jit(jax.grad(path.log_density))({"x": jnp.asarray(X)}, t)["x"]
    np.testing.assert_allclose(got, mixture.score(X, t), rtol=1e-4, atol=1e-4)


def test_it_starts_from_the_mixture_of_its_starts():
    path = lehr.Path(labelled)()
    alpha, sigma = float(SCHEDULE.alpha(0.9)), float(SCHEDULE.sigma(0.9))
    each = [
        stats.norm(alpha * m, np.hypot(alpha * s, sigma)).logpdf(X).sum() for m, s in zip(LOCS, SCALES, strict=True)
    ]
    np.testing.assert_allclose(
        path.log_start({"x": jnp.asarray(X)}, 0.9), special.logsumexp(each + np.log(MASSES)), rtol=1e-5
    )
    draws = jax.jit(jax.vmap(lambda k: path.init(k, 0.5)["x"]))(jax.random.split(jax.random.key(0), 4000))
    alpha, sigma = float(SCHEDULE.alpha(0.5)), float(SCHEDULE.sigma(0.5))
    mean = alpha * MASSES @ LOCS
    error = np.std(draws, 0) / np.sqrt(4000)
    np.testing.assert_array_less(np.abs(np.mean(draws, 0) - mean), 4 * error)


@pytest.mark.parametrize("t", TIMES)
def test_each_label_denoises_for_itself(t):
    path = lehr.Path(labelled)(Y)
    alpha, sigma = float(SCHEDULE.alpha(t)), float(SCHEDULE.sigma(t))
    terms = []
    for w, m, s in zip(MASSES, LOCS, SCALES, strict=True):
        total = alpha**2 * s**2 + sigma**2
        denoised = m + alpha * s**2 / total * (X - alpha * m)
        prior = stats.norm(alpha * m, np.sqrt(total)).logpdf(X).sum()
        terms.append(np.log(w) + prior + stats.norm(denoised, TAU).logpdf(Y).sum())
    np.testing.assert_allclose(jax.jit(path.log_density)({"x": jnp.asarray(X)}, t), special.logsumexp(terms), rtol=2e-5)


def test_labels_are_drawn_from_their_conditional():
    path = lehr.Path(labelled)(Y).ending_at(0.01)
    n = 20_000
    z = np.asarray(
        jax.jit(lambda p: path.constrain(p, 2))({"x": jnp.broadcast_to(jnp.asarray(X), (2, n // 2, 2))})["z"]
    )
    assert z.shape == (2, n // 2)
    alpha, sigma = float(SCHEDULE.alpha(0.01)), float(SCHEDULE.sigma(0.01))
    each = [
        stats.norm(alpha * m, np.hypot(alpha * s, sigma)).logpdf(X).sum() for m, s in zip(LOCS, SCALES, strict=True)
    ]  # what was observed, y given x, says no more of z
    want = special.softmax(each + np.log(MASSES))
    found = np.bincount(z.ravel(), minlength=3) / n
    np.testing.assert_array_less(np.abs(found - want), 4 * np.sqrt(want * (1 - want) / n) + 1e-9)


def test_several_discrete_latents_are_listed_jointly():
    def outliers(y):
        x = numpyro.sample("x", lehr.Diffusion(lehr.Gaussian(jnp.zeros(2), 1.0, SCHEDULE)))
        kind = numpyro.sample("kind", dist.Categorical(probs=jnp.array([0.2, 0.5, 0.3])))
        with numpyro.plate("looks", 2):
            bad = numpyro.sample("bad", dist.Bernoulli(0.1))
            numpyro.sample("y", dist.Normal(x + kind, jnp.where(bad == 1, 5.0, 0.3)), obs=y)

    got = jax.jit(lehr.Path(outliers)(Y).ending_at(0.1).log_density)({"x": jnp.asarray(X)}, 0.1)
    terms = [
        np.log(p)
        + sum(
            np.logaddexp(np.log(0.1) + stats.norm(a + k, 5).logpdf(b), np.log(0.9) + stats.norm(a + k, 0.3).logpdf(b))
            for a, b in zip(X, Y, strict=True)
        )
        for k, p in enumerate((0.2, 0.5, 0.3))
    ]
    prior = stats.norm(0, 1).logpdf(X).sum()  # a standard Gaussian stays one
    np.testing.assert_allclose(got, prior + special.logsumexp(terms), rtol=1e-5)


@pytest.mark.parametrize("energy", ["uncalibrated", "product"])
def test_labels_whose_normalisers_nobody_knows_are_warned_of(energy):
    def model():
        z = numpyro.sample("z", dist.Bernoulli(0.5))
        p = lehr.Gaussian(jnp.asarray(LOCS)[z], 0.5, SCHEDULE)
        if energy == "product":
            p = p * lehr.Gaussian(jnp.zeros(2), 1.0, SCHEDULE)
        else:
            p = lehr.EnergyNetwork((lambda shift, x, c: x - shift, z), SCHEDULE, (2,), calibrated=False)
        numpyro.sample("x", lehr.Diffusion(p))

    with pytest.warns(UserWarning, match="depends on the discrete latent 'z'.*normaliser is unknown"):
        lehr.Path(model)()


@pytest.mark.slow
def test_smc_finds_the_labels_of_what_was_observed():
    n = 4000
    smc = lehr.AnnealedSMC(labelled, num_particles=n, progress=False)
    run = smc.run(jax.random.key(0), Y)
    evidence = [stats.norm(m, np.hypot(s, TAU)).logpdf(Y).sum() for m, s in zip(LOCS, SCALES, strict=True)] + np.log(
        MASSES
    )
    want = special.softmax(evidence)
    found = np.bincount(smc.get_samples()["z"].astype(int), minlength=3) / n
    # resampling and correlated moves leave a fifth of the particles' worth of draws at the least
    np.testing.assert_array_less(np.abs(found - want), 4 * np.sqrt(want * (1 - want) / (n / 5)))
    assert abs(smc.log_evidence - special.logsumexp(evidence)) < 4 * run.log_evidence_se + 0.01
