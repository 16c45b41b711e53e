r"""The normaliser of an energy, measured on data.

The densities of noisy data obey E_{p_σ}[∂ log p_σ/∂ log σ] = 0, as every normalised family does. With
y = x₀ + σ ε the target of dual score matching, ‖ε‖² − d, has the same mean zero, so that for an
energy log f_σ

    r(σ) = E[∂ log f_σ(y)/∂ log σ − (‖ε‖² − d)]

is what its normaliser makes on average of a step in log σ, and is zero where the time derivative is
right. Down from σ_max, where nothing is left of the network and the constant is known,

    log Z(σ) = −∫_{log σ}^{log σ_max} r d log σ

brings f/Z to the constant of the data. A network learns r from targets with variance 2d, and a bias of
a tenth of a nat is nothing in its loss; averaged over many draws it is seen. Of an energy that was
trained by its score alone the same integral finds the normaliser, to the accuracy to which its
time derivative is right on average.

References:
    Guth, Kadkhodaie & Simoncelli, Learning normalized image densities via dual score
    matching, 2025 (arXiv 2506.05310).
"""

from __future__ import annotations

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from lehr.potentials.base import replace
from lehr.potentials.network import EnergyNetwork

__all__ = ["normalise"]

BATCH = 1024


def normalise(
    energy: EnergyNetwork,
    events: ArrayLike,
    labels: ArrayLike | None = None,
    *,
    rng_key: jax.Array,
    num_levels: int = 24,
    num_draws: int = 4096,
) -> EnergyNetwork:
    """The energy with its normaliser measured and taken away.

    Args:
        energy: a trained energy; of classes it is one measurement for each, and one for all together.
        events: x₀, shape (N, *event_shape).
        labels: their classes, shape (N,), for a network with classes.
        rng_key: of the draws.
        num_levels: levels between which log Z is linear in log σ, uniform over ``energy.sigma_range``.
        num_draws: of y at each level. log Z of d dimensions has a standard error of at most
            √(2d L/num_draws) · (step in log σ), and far less where the energy is nearly right.

    Raises:
        ValueError: if a network with classes is given no labels, or a class has no events.
    """
    energy = replace(energy, log_normalizer=None)
    x0 = jnp.asarray(events, float)
    low, high = (math.log(s) for s in energy.sigma_range)
    levels = jnp.linspace(low, high, num_levels)

    @eqx.filter_jit
    def residuals(energy: EnergyNetwork, x0: jax.Array, rng_key: jax.Array) -> jax.Array:
        def one(rng_key: jax.Array, log_sigma: jax.Array) -> jax.Array:
            key_event, key_noise = jax.random.split(rng_key)
            noise = jax.random.normal(key_noise, x0.shape[1:])
            y = x0[jax.random.randint(key_event, (), 0, len(x0))] + jnp.exp(log_sigma) * noise
            along = (log_sigma,), (jnp.ones(()),)  # forward: one number goes in
            slope = jax.jvp(lambda s: energy.log_density_at(y, jnp.ones(()), jnp.exp(s)), *along)[1]
            return slope - (jnp.sum(noise**2) - noise.size)

        def level(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
            keys = jax.random.split(inputs[0], num_draws)
            return jnp.mean(jax.lax.map(lambda key: one(key, inputs[1]), keys, batch_size=BATCH))

        return jax.lax.map(level, (jax.random.split(rng_key, num_levels), levels))

    def log_z(energy: EnergyNetwork, x0: jax.Array, rng_key: jax.Array) -> np.ndarray:
        slopes = np.asarray(residuals(energy, x0, rng_key))
        rise = (slopes[1:] + slopes[:-1]) / 2 * float(levels[1] - levels[0])
        return np.append(-np.cumsum(rise[::-1])[::-1], 0.0)

    if energy.num_classes == 0:
        return replace(energy, log_normalizer=jnp.asarray(log_z(energy, x0, rng_key)))
    if labels is None:
        raise ValueError(f"the energy has {energy.num_classes} classes: give the labels of the events.")
    counts = np.bincount(np.asarray(labels), minlength=energy.num_classes)
    if np.any(counts == 0):
        raise ValueError(f"every class needs events; there are none of {np.flatnonzero(counts == 0).tolist()}.")
    # Each class's events are drawn from as many, so that one program serves all.
    rng = np.random.default_rng(0)
    of_class = [np.flatnonzero(np.asarray(labels) == k) for k in range(energy.num_classes)] + [np.arange(len(x0))]
    drawn = [np.resize(rng.permutation(each), len(x0)) for each in of_class]
    keys = jax.random.split(rng_key, len(drawn))
    tables = [log_z(energy.given(k), x0[i], key) for k, (i, key) in enumerate(zip(drawn, keys, strict=True))]
    return replace(energy, log_normalizer=jnp.asarray(np.stack(tables)))
