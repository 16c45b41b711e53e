r"""How a U-Net is told the time: a scalar c to a vector.

    positional   [sin, cos](c ω_k),   ω_k = 10000^{−k/(n − δ)},  k = 0 … n − 1
    fourier      [sin, cos](2π w_k log c),   w_k drawn once and kept
    learned      row c of a table; between two rows, the straight line

References:
    Vaswani et al., Attention is all you need, NeurIPS 2017 (positional).
    Tancik et al., Fourier features let networks learn high frequency functions, NeurIPS 2020.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

__all__ = ["Fourier", "Learned", "Positional", "TwoLayers"]


class Positional(nnx.Module):
    """Sines and cosines of c, with fixed frequencies.

    Args:
        length: of the vector; an odd one ends in a zero.
        cosines_first: whether cosines stand before sines.
        shift: δ.
    """

    def __init__(self, length: int, *, cosines_first: bool, shift: float) -> None:
        self.length, self.cosines_first, self.shift = length, cosines_first, shift

    def __call__(self, c: jax.Array) -> jax.Array:
        """The vector of one scalar c."""
        half = self.length // 2
        # Single precision, rounded as PyTorch does: these very frequencies are what networks were trained with.
        exponent = np.arange(half, dtype=np.float32) * np.float32(-math.log(10000)) / np.float32(half - self.shift)
        phase = c * jnp.asarray(np.exp(exponent.astype(np.float64)).astype(np.float32), c.dtype)
        waves = (jnp.cos(phase), jnp.sin(phase)) if self.cosines_first else (jnp.sin(phase), jnp.cos(phase))
        return jnp.concatenate([*waves, jnp.zeros(self.length % 2, phase.dtype)])


class Fourier(nnx.Module):
    """Sines and cosines of log c, with random frequencies.

    Args:
        length: number of frequencies, half the length of the vector.
        rngs: Flax NNX random streams, ``params`` is used.
    """

    def __init__(self, length: int, *, rngs: nnx.Rngs) -> None:
        self.weight = nnx.Variable(16 * jax.random.normal(rngs.params(), (length,)))

    def __call__(self, c: jax.Array) -> jax.Array:
        """The vector of one scalar c > 0."""
        phase = 2 * jnp.pi * jnp.log(c) * self.weight[...]
        return jnp.concatenate([jnp.sin(phase), jnp.cos(phase)])


class Learned(nnx.Module):
    """A table with one row for each training step.

    Args:
        num_steps: rows.
        length: columns.
        rngs: Flax NNX random streams, ``params`` is used.
    """

    def __init__(self, num_steps: int, length: int, *, rngs: nnx.Rngs) -> None:
        self.weight = nnx.Param(jax.random.normal(rngs.params(), (num_steps, length)))

    def __call__(self, c: jax.Array) -> jax.Array:
        """The row of one scalar c in [0, num_steps − 1]."""
        table = self.weight[...]
        below = jnp.clip(jnp.floor(c), 0, table.shape[0] - 2).astype(int)
        part = c - below
        return (1 - part) * table[below] + part * table[below + 1]


class TwoLayers(nnx.Module):
    """W₂ silu(W₁ z).

    Args:
        num_inputs: length of z.
        num_outputs: length of the result.
        rngs: Flax NNX random streams.
    """

    def __init__(self, num_inputs: int, num_outputs: int, *, rngs: nnx.Rngs) -> None:
        self.linear_1 = nnx.Linear(num_inputs, num_outputs, rngs=rngs)
        self.linear_2 = nnx.Linear(num_outputs, num_outputs, rngs=rngs)

    def __call__(self, z: jax.Array) -> jax.Array:
        """The result for one z of shape (num_inputs,)."""
        return self.linear_2(jax.nn.silu(self.linear_1(z)))
