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
    """The losses of the untrained energy on this base at one σ, without their weights."""
    std = np.sqrt(np.mean(STDS**2))
    energy = lehr.EnergyNetwork(Flat(), event_shape=(D,), std=std, base=base, sigma_range=(sigma, sigma * (1 + 1e-5)))
    losses = jax.jit(lambda k: dual_score_matching(energy, k, data, weighting="likelihood", with_bound=False))(
        jax.random.key(1)
    )
    return losses._replace(time=losses.time / (1 + (sigma / std) ** 2))


def noise_left(sigma):
    """E Var(‖ε‖² | y) = Σ 4 u − 2 u², u = s²/(s² + σ²): given y, ε_i has variance u, and a mean of variance 1 − u."""
    u = STDS**2 / (STDS**2 + sigma**2)
    return np.sum(4 * u - 2 * u**2)


def left_by_one_spread(sigma):
    """What is left of Σ (ε_i² − 1) when N(0, s̄²) is written in, which takes it for Σ κ y_i² − d σ²/v, κ = σ²/v²: a
    quadratic form in x_i, ε_i of standard normals, whose matrix M has variance 2 tr M² and mean tr M."""
    v = np.mean(STDS**2) + sigma**2
    k = sigma**2 / v**2
    in_x, across, in_noise = -k * STDS**2, -k * STDS * sigma, 1 - k * sigma**2
    mean = np.sum(in_x + in_noise - 1 + sigma**2 / v)
    return np.sum(2 * (in_x**2 + 2 * across**2 + in_noise**2)) + mean**2


@pytest.mark.parametrize("sigma", [0.1, 1.0, 4.0])
def test_in_64_dimensions_what_is_left_of_the_losses_is_their_noise(many, sigma):
    """The control variate: of the time target's variance of 2d = 128 there is left, with all covariances written in,
    123, 48 and 5.3 at these σ; with one spread for all, 128, 62 and 5.5."""
    exact, data = many
    u = STDS**2 / (STDS**2 + sigma**2)
    all_of_them, one = (at_one_level(exact, data, sigma, base) for base in (exact, None))
    # A mean of 4000 sums of 64 squares has a relative error of √(2/64/4000) = .003; of fourth powers, whose variance
    # is about that of χ⁴ for one variable, at most √(14/4000) = .06, and far less for a sum of many.
    assert float(all_of_them.score) == pytest.approx(u.sum(), rel=0.012)
    assert float(all_of_them.time) == pytest.approx(noise_left(sigma), rel=0.1)
    assert float(one.time) == pytest.approx(left_by_one_spread(sigma), rel=0.1)


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
