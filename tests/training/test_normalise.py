"""The normaliser of an energy that is wrong by a known function of the noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lehr
from lehr.checkpoints.native import read_checkpoint, save
from lehr.networks import ResidualMLP
from lehr.training.normalise import normalise

S, LOW, HIGH, LEVELS = 0.5, 0.2, 20.0, 24


class Constant(nnx.Module):
    """An energy that is right but for a constant, which the prefactor makes a function of the noise."""

    def __init__(self, values=(0.3,), num_classes=0):
        self.values, self.num_classes = nnx.Variable(jnp.asarray(values)), num_classes

    def __call__(self, z, c, label=0):
        return self.values[label] + 0.0 * jnp.sum(z)


def log_z(value, sigma):
    """What −prefactor · value makes of the normaliser."""
    return -value * S / sigma * S**2 / (S**2 + sigma**2)


def test_a_wrong_normaliser_is_found_and_taken_away():
    """The particles' proposals know the curvature but for what a pilot mistakes: .02 for 1,000 of them is plenty."""
    energy = lehr.EnergyNetwork(Constant(), event_shape=(2,), std=S, sigma_range=(LOW, HIGH))
    found = normalise(energy, jax.random.key(0))
    np.testing.assert_allclose(found.log_normalizer, log_z(0.3, np.geomspace(LOW, HIGH, LEVELS)), atol=0.02)
    assert abs(log_z(0.3, LOW)) > 0.5  # as it is without
    assert found.is_calibrated
    exact = lehr.Gaussian(jnp.zeros(2), S, energy.schedule)
    x = jnp.array([0.3, -0.2])
    t = energy.schedule.time(-2 * jnp.log(0.5))
    np.testing.assert_allclose(found.log_density(x, t), exact.log_density(x, t), atol=0.03)
    np.testing.assert_allclose(found.score(x, t), exact.score(x, t), rtol=1e-5)


def test_every_class_has_its_own():
    values = (0.3, -0.2, 0.1)  # the last for all together
    energy = lehr.EnergyNetwork(Constant(values, num_classes=2), event_shape=(2,), std=S, sigma_range=(LOW, HIGH))
    found = normalise(energy, jax.random.key(1))
    assert found.log_normalizer.shape == (3, LEVELS)
    for row, value in zip(found.log_normalizer, values, strict=True):
        assert row[0] == pytest.approx(log_z(value, LOW), abs=0.02)


@pytest.mark.parametrize("shape", [(1,), (3, 4)])
def test_a_table_that_does_not_fit_is_refused(shape):
    with pytest.raises(ValueError, match="log_normalizer must have shape"):
        lehr.EnergyNetwork(Constant(), event_shape=(2,), log_normalizer=np.zeros(shape))


def test_it_is_saved_with_the_energy(tmp_path):
    network = ResidualMLP(2, width=8, num_blocks=1, rngs=nnx.Rngs(0))
    energy = lehr.EnergyNetwork(network, event_shape=(2,), log_normalizer=[0.25, 0.5, 0.0])
    again = read_checkpoint(save(energy, tmp_path / "normalised"))
    x = jnp.array([0.1, 0.2])
    np.testing.assert_array_equal(again.log_density(x, 0.3), energy.log_density(x, 0.3))
    bare = lehr.EnergyNetwork(network, event_shape=(2,))
    assert not np.allclose(bare.log_density(x, 0.3), energy.log_density(x, 0.3))


class Hole(nnx.Module):
    """An energy with a place at z = (3, 0), where hardly any data are, that has all the mass."""

    def __call__(self, z, c):
        return -60.0 * jnp.exp(-2 * jnp.sum((z - jnp.array([3.0, 0.0])) ** 2))


@pytest.mark.filterwarnings("ignore:at level")
def test_an_energy_with_a_hole_is_refused_and_a_bounded_one_is_not():
    def made(limit):
        return lehr.EnergyNetwork(Hole(), event_shape=(2,), std=S, sigma_range=(0.05, HIGH), limit=limit)

    with pytest.raises(RuntimeError, match="where no data are"):
        normalise(made(None), jax.random.key(2), num_particles=256)
    found = normalise(made(0.2), jax.random.key(2), num_particles=256)
    assert np.all(np.isfinite(found.log_normalizer))
