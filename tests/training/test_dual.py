"""Dual score matching against what its losses are known to be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from stand_ins import Flat

import lehr
from lehr.networks import ResidualMLP
from lehr.training.dual import dual_score_matching

S = 0.4


@pytest.fixture(scope="module")
def losses():
    """Losses of the exact energy of Gaussian data, averaged over many batches: what no network can go below."""
    energy = lehr.EnergyNetwork(Flat(), event_shape=(2,), mean=jnp.array([1.0, -1.0]), std=S)
    data = jnp.array([1.0, -1.0]) + S * jax.random.normal(jax.random.key(0), (64, 2000, 2))
    batches = jax.jit(jax.vmap(lambda k, x: dual_score_matching(energy, k, x)))(
        jax.random.split(jax.random.key(1), 64), data
    )
    return jax.tree.map(np.asarray, batches)


def test_the_weighted_score_loss_of_the_exact_energy_is_the_dimension_at_every_level(losses):
    error = losses.score.std() / np.sqrt(64)
    assert abs(losses.score.mean() - 2.0) < 4 * error


def test_the_weighted_time_loss_of_the_exact_energy_is_the_variance_that_is_left(losses):
    sigma = np.exp(np.linspace(np.log(0.002), np.log(20), 20001))
    remaining = 2 * 2 * (S**2 + 2 * sigma**2) / (S**2 + sigma**2)  # (v/s²) Var(‖ε‖² | y), in two dimensions
    error = losses.time.std() / np.sqrt(64)
    assert abs(losses.time.mean() - remaining.mean()) < 4 * error


def test_no_gaussian_breaks_the_bound_on_the_time_derivative(losses):
    assert losses.bound.max() == 0.0


def test_an_energy_that_rises_too_fast_breaks_it():
    class Spike(nnx.Module):
        def __call__(self, z, c):
            return -10.0 * jnp.exp(-c) + 0.0 * jnp.sum(z)

    energy = lehr.EnergyNetwork(Spike(), event_shape=(2,), std=S)
    data = S * jax.random.normal(jax.random.key(0), (256, 2))
    assert dual_score_matching(energy, jax.random.key(1), data).bound > 1.0


D = 64
STDS = np.linspace(0.05, 1.0, D)  # of the data, along axes turned at random


@pytest.fixture(scope="module")
def many():
    """Gaussian data in 64 dimensions: its energy with every covariance written in, and with one pooled spread."""
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(D, D)))[0]
    exact = lehr.Gaussian(np.zeros(D), np.linalg.cholesky(turn * STDS**2 @ turn.T))
    data = exact.sample(jax.random.key(0), 0.0, (4000,))
    return exact, data


def at_one_level(exact, data, sigma, base):
    """The unweighted losses of the untrained energy on this base at one σ."""
    energy = lehr.EnergyNetwork(
        Flat(), event_shape=(D,), std=np.sqrt(np.mean(STDS**2)), base=base, sigma_range=(sigma, sigma * (1 + 1e-5))
    )
    return jax.jit(lambda key: dual_score_matching(energy, key, data, weighting="likelihood", with_bound=False))(
        jax.random.key(1)
    )


@pytest.mark.parametrize("sigma", [0.1, 1.0, 4.0])
def test_in_64_dimensions_what_is_left_of_the_losses_is_their_noise(many, sigma):
    """With the covariance written in, E Var(ε | y) = Σ u_i and E Var(‖ε‖² | y) = Σ 4 u_i − 2 u_i², u = s²/(s² + σ²):
    given y, ε_i has variance u_i, and a mean of variance 1 − u_i."""
    exact, data = many
    u = STDS**2 / (STDS**2 + sigma**2)
    losses = at_one_level(exact, data, sigma, exact)
    # Over 4000 events a mean square of 64 terms has a relative error of √(2/64)/√4000 at least, their fourth moment
    # some times that: 4 % is four to five of them.
    assert float(losses.score) == pytest.approx(u.sum(), rel=0.02)
    assert float(losses.time) == pytest.approx((4 * u - 2 * u**2).sum(), rel=0.1)


def test_what_is_written_in_takes_the_variance_out_of_the_time_loss(many):
    """Of the target's variance of 2d = 128: at σ four times the widest spread nearly all with one spread written in,
    and more yet with all of them; close to the data the one spread does harm, and all of them help."""
    exact, data = many
    far = {base: float(at_one_level(exact, data, 4.0, exact if base else None).time) for base in (False, True)}
    near = {base: float(at_one_level(exact, data, 0.1, exact if base else None).time) for base in (False, True)}
    assert far[True] < far[False] < 2 * D / 6
    assert near[False] > 4 * D  # worse than nothing: one spread mistakes what is narrow
    assert near[True] < 2 * D


@pytest.mark.slow
def test_the_relative_masses_of_modes_that_no_score_connects_are_learnt():
    target = lehr.GaussianMixture([[-1.0], [1.0]], 0.05, [0.2, 0.8])
    untrained = lehr.EnergyNetwork(
        ResidualMLP(1, width=48, num_blocks=2, num_frequencies=16, rngs=nnx.Rngs(0)),
        event_shape=(1,),
        mean=0.6,
        std=0.8,
    )
    recipe = lehr.Recipe(num_steps=3000, batch_size=512, learning_rate=4e-3)
    energy = lehr.fit(untrained, lambda k, n: target.sample(k, 0.0, (n,)), jax.random.key(0), recipe)
    t = energy.schedule.time(-2 * jnp.log(0.02))
    gap = energy.log_density(jnp.array([1.0]), t) - energy.log_density(jnp.array([-1.0]), t)
    assert float(gap) == pytest.approx(np.log(4), abs=0.25)
    assert energy.is_calibrated


def test_a_sampler_of_the_wrong_shape_is_refused():
    energy = lehr.EnergyNetwork(Flat(), event_shape=(2,))
    with pytest.raises(ValueError, match="asked for n"):
        lehr.fit(energy, lambda k, n: jnp.zeros((n, 3)), jax.random.key(0))


def test_a_training_that_blows_up_says_so():
    class Blown(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.array(jnp.nan))

        def __call__(self, z, c):
            return self.w[...] * jnp.sum(z)

    energy = lehr.EnergyNetwork(Blown(), event_shape=(2,))
    with pytest.raises(FloatingPointError, match="learning_rate"):
        lehr.fit(energy, lambda k, n: jnp.zeros((n, 2)), jax.random.key(0), lehr.Recipe(num_steps=2, batch_size=8))
