"""Models that no path can follow are refused, each by what is wrong with it, before anything is compiled."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import lehr

P = lehr.Gaussian(jnp.zeros(2), 1.0)


def chained():
    x = numpyro.sample("x", lehr.Diffusion(P))
    numpyro.sample("z", lehr.Diffusion(lehr.Gaussian(x, 1.0)))


def deaf():
    numpyro.sample("x", lehr.Diffusion(P))
    numpyro.sample("y", dist.Normal(0.0, 1.0), obs=jnp.zeros(()))


def deaf_with_a_latent():
    numpyro.sample("x", lehr.Diffusion(P))
    mu = numpyro.sample("mu", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(mu, 1.0), obs=jnp.zeros(()))


def deaf_expert():
    numpyro.sample("x", lehr.Diffusion(P))
    numpyro.sample("expert", lehr.Diffusion(P), obs=jnp.ones(2))


def endless():
    x = numpyro.sample("x", lehr.Diffusion(P))
    n = numpyro.sample("n", dist.Poisson(3.0))
    numpyro.sample("y", dist.Normal(n * x[0], 1.0), obs=jnp.zeros(()))


def too_many():
    x = numpyro.sample("x", lehr.Diffusion(P))
    with numpyro.plate("n", 9):
        z = numpyro.sample("z", dist.Bernoulli(0.5))
        numpyro.sample("y", dist.Normal(z * x[0], 1.0), obs=jnp.zeros(9))


def twice():
    numpyro.sample("x", lehr.Diffusion(P))
    numpyro.sample("x", lehr.Diffusion(P))


def misshapen():
    x = numpyro.sample("x", lehr.Diffusion(P))
    numpyro.sample("expert", lehr.Diffusion(P), obs=jnp.pad(x, 1))


def misplated():
    x = numpyro.sample("x", lehr.Diffusion(P))
    with numpyro.plate("n", 3):
        numpyro.sample("expert", lehr.Diffusion(P), obs=jnp.stack([x, x]))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (chained, "'z' has parameters that depend on the Diffusion site 'x'"),
        (deaf, "'y' has no path to 'x'"),
        (deaf_with_a_latent, "'y' has no path to 'x'"),
        (deaf_expert, "'expert' has no path to 'x'"),
        (endless, "'n', a Poisson, has a support that cannot be listed"),
        (too_many, "have 512 joint values"),
        (twice, "two sites of one name"),
        (misshapen, r"'expert' is over events of shape \(2,\), and what is observed has shape \(4,\)"),
        (misplated, r"in a batch of \(3,\), and what is observed has shape \(2, 2\)"),
    ],
)
def test_impossible_models_are_refused_by_what_is_wrong_with_them(model, message):
    with pytest.raises(ValueError, match=message):
        lehr.Path(model)()


def test_a_latent_may_be_known_from_elsewhere_too():
    def calibrated():
        x = numpyro.sample("x", lehr.Diffusion(P))
        tau = numpyro.sample("tau", dist.HalfNormal(1.0))
        numpyro.sample("blank", dist.Normal(0.0, tau), obs=jnp.ones(()))
        numpyro.sample("y", dist.Normal(x[0], tau), obs=jnp.zeros(()))

    lehr.Path(calibrated)()


def test_dependence_sees_through_calls_and_misses_none():
    import jax

    from lehr.programs.dependence import dependence

    inner = jax.jit(lambda a, b: (a + b, b))

    def function(v):
        both, _ = inner(v["a"], v["b"])
        loop = jax.lax.fori_loop(0, 3, lambda _, c: c * 2, v["c"])
        return {"both": both, "c": loop, "none": jnp.ones(2), "plain": (v["a"] * 2, np.ones(3))}

    found = dependence(function, {k: jnp.ones(()) for k in "abc"})
    assert found == {"both": {"a", "b"}, "c": {"c"}, "none": set(), "plain": {"a"}}
