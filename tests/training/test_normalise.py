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

S, LOW, HIGH, LEVELS = 0.5, 0.2, 20.0, 40
EVENTS = S * np.random.default_rng(0).normal(size=(50_000, 2))


class Constant(nnx.Module):
    """An energy that is right but for a constant, which the prefactor makes a function of the noise."""

    def __init__(self, values=(0.3,), num_classes=0):
        self.values, self.num_classes = nnx.Variable(jnp.asarray(values)), num_classes

    def __call__(self, z, c, label=0):
        return self.values[label] + 0.0 * jnp.sum(z)


def log_z(value, sigma):
    """What −prefactor · value makes of the normaliser, relative to the noisiest level."""
    prefactor = lambda s: S / s * S**2 / (S**2 + s**2)  # noqa: E731
    return -value * (prefactor(sigma) - prefactor(HIGH))


def error_of(num_draws):
    """The standard error of log Z at the clean end: targets have variance 2d at most, averaged and summed."""
    return np.sqrt(2 * 2 * LEVELS / num_draws) * np.log(HIGH / LOW) / (LEVELS - 1)


def test_a_wrong_normaliser_is_measured_and_taken_away():
    energy = lehr.EnergyNetwork(Constant(), event_shape=(2,), std=S, sigma_range=(LOW, HIGH))
    found = normalise(energy, EVENTS, rng_key=jax.random.key(0), num_levels=LEVELS, num_draws=8192)
    sigmas = np.geomspace(LOW, HIGH, LEVELS)
    # the trapezoid's own error here is 7e-4
    np.testing.assert_allclose(found.log_normalizer, log_z(0.3, sigmas), atol=4 * error_of(8192) + 1e-3)
    assert abs(log_z(0.3, LOW)) > 10 * error_of(8192)  # as it is without
    exact = lehr.Gaussian(jnp.zeros(2), S, energy.schedule)
    x = jnp.array([0.3, -0.2])
    t = energy.schedule.time(-2 * jnp.log(0.5))
    np.testing.assert_allclose(found.log_density(x, t), exact.log_density(x, t), atol=4 * error_of(8192) + 2e-3)
    np.testing.assert_allclose(found.score(x, t), exact.score(x, t), rtol=1e-5)


def test_every_class_has_its_own():
    values = (0.3, -0.2, 0.1)  # the last for all together
    network = Constant(values, num_classes=2)
    energy = lehr.EnergyNetwork(network, event_shape=(2,), std=S, sigma_range=(LOW, HIGH))
    labels = np.arange(len(EVENTS)) % 2
    found = normalise(energy, EVENTS, labels, rng_key=jax.random.key(1), num_levels=LEVELS, num_draws=8192)
    assert found.log_normalizer.shape == (3, LEVELS)
    for row, value in zip(found.log_normalizer, values, strict=True):
        assert row[0] == pytest.approx(log_z(value, LOW), abs=4 * error_of(8192) + 1e-3)


def test_classes_need_their_labels():
    energy = lehr.EnergyNetwork(Constant((0.0,) * 3, num_classes=2), event_shape=(2,), std=S)
    with pytest.raises(ValueError, match="give the labels"):
        normalise(energy, EVENTS, rng_key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"there are none of \[1\]"):
        normalise(energy, EVENTS, np.zeros(len(EVENTS), int), rng_key=jax.random.key(0))


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
