r"""A residual perceptron for densities in a few dimensions.

    h₀     = W [x, cos(2πBx), sin(2πBx)]
    h_{k+1} = h_k + W₂ silu(W₁ h_k + V e(c)),      e(c) = silu(W_e [cos(2πbc), sin(2πbc)])
    output = W_o silu(h_K)

B and b are drawn once and kept: random Fourier features let a small network resolve
features much finer than the data's spread (Tancik et al., NeurIPS 2020).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

__all__ = ["Frequencies", "ResidualMLP"]


class Frequencies(nnx.Variable):
    """Fixed random frequencies: part of a network's state, not of what is trained."""


class ResidualMLP(nnx.Module):
    """A residual MLP of a vector x and of one condition c (the log noise-to-signal ratio).

    Args:
        num_inputs: d, the length of x.
        num_outputs: length of the output; 0 gives a scalar.
        width: units in each hidden layer.
        num_blocks: residual blocks.
        num_frequencies: random Fourier features of x and of c, each.
        bandwidth: standard deviation of the frequencies of x, in cycles per unit of x.
        rngs: Flax NNX random streams, ``params`` is used.
    """

    def __init__(
        self,
        num_inputs: int,
        num_outputs: int = 0,
        *,
        width: int = 128,
        num_blocks: int = 3,
        num_frequencies: int = 32,
        bandwidth: float = 0.5,
        rngs: nnx.Rngs,
    ) -> None:
        self.num_outputs = num_outputs
        self.x_frequencies = Frequencies(bandwidth * jax.random.normal(rngs.params(), (num_frequencies, num_inputs)))
        self.c_frequencies = Frequencies(0.2 * jax.random.normal(rngs.params(), (num_frequencies,)))
        self.embed_x = nnx.Linear(num_inputs + 2 * num_frequencies, width, rngs=rngs)
        self.embed_c = nnx.Linear(2 * num_frequencies, width, rngs=rngs)
        self.blocks = nnx.List([_Block(width, rngs=rngs) for _ in range(num_blocks)])
        self.readout = nnx.Linear(width, max(num_outputs, 1), kernel_init=nnx.initializers.zeros_init(), rngs=rngs)

    def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
        """The network at one x of shape (d,) and one scalar c; shape (num_outputs,) or ()."""
        h = self.embed_x(jnp.concatenate([x, _fourier(self.x_frequencies[...] @ x)]))
        e = nnx.silu(self.embed_c(_fourier(self.c_frequencies[...] * c)))
        for block in self.blocks:
            h = block(h, e)
        out = self.readout(nnx.silu(h))
        return out if self.num_outputs else out[0]


class _Block(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs) -> None:
        self.expand = nnx.Linear(width, width, rngs=rngs)
        self.condition = nnx.Linear(width, width, use_bias=False, rngs=rngs)
        self.contract = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, h: jax.Array, e: jax.Array) -> jax.Array:
        return h + self.contract(nnx.silu(self.expand(h) + self.condition(e)))


def _fourier(phase: jax.Array) -> jax.Array:
    return jnp.concatenate([jnp.cos(2 * jnp.pi * phase), jnp.sin(2 * jnp.pi * phase)])
