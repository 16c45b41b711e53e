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
