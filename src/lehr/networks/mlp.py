r"""A residual perceptron, of vectors and of small images.

    h₀     = W [x, cos(2πBx), sin(2πBx)]
    h_{k+1} = h_k + W₂ silu(W₁ h_k + V e),      e = silu(W_e [cos(2πbc), sin(2πbc)] + L_label)
    output = W_o silu(h_K)

B and b are drawn once and kept: random Fourier features let a small network resolve
features much finer than the data's spread (Tancik et al., NeurIPS 2020); those finer than the
noise can be faded out (Barron et al., Mip-NeRF, ICCV 2021). L has one row for
each class and one more, the null label, for "any class".
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lehr.networks.described import Described

__all__ = [
    "C_BANDWIDTH",
    "Frequencies",
    "ResidualBlock",
    "ResidualMLP",
    "condition",
    "faded",
    "fourier",
    "saturate",
]

C_BANDWIDTH = 0.2  # of the frequencies of c, in cycles per unit: σ/α is resolved to about a factor of e


class Frequencies(nnx.Variable):
    """Fixed random frequencies: part of a network's state, not of what is trained."""


class ResidualMLP(Described):
    """A residual MLP of an event x and of one condition c (the log noise-to-signal ratio).

    Args:
        num_inputs: d, the number of elements of x.
        num_outputs: length of the output; 0 gives a scalar. An output as long as x has the shape of x.
        width: units in each hidden layer.
        num_blocks: residual blocks.
        num_frequencies: random Fourier features of x and of c, each.
        bandwidth: standard deviation of the frequencies of x, in cycles per unit of x.
        axis_aligned: whether each frequency looks at one element of x alone, as suits images, whose
            pixels have sharp values of their own; otherwise in a random direction.
        reach: where elements of x begin to saturate, x ↦ x/√(1 + (x/reach)²); ``None`` for no saturation.
        limit: where elements of the output do, likewise. Far from the data a network says anything, and an
            energy made of it may lead chains there; bounded, it leaves its tails to the density it corrects.
        data_std: s, the standard deviation of the data. If given, x is read as having unit variance, of
            which g² = σ²/(s² + σ²) is noise, and frequencies finer than the noise are faded out, by
            exp(−2π²B²g²): a density blurred by the noise has none.
        num_classes: K; if not 0 the network takes a label too, 0 to K − 1, or K for any.
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
        axis_aligned: bool = False,
        reach: float | None = None,
        limit: float | None = None,
        data_std: float | None = None,
        num_classes: int = 0,
        rngs: nnx.Rngs,
    ) -> None:
        self.num_inputs, self.num_outputs = num_inputs, num_outputs
        self.width, self.num_blocks = width, num_blocks
        self.num_frequencies, self.bandwidth, self.axis_aligned = num_frequencies, bandwidth, axis_aligned
        self.reach, self.limit, self.data_std = reach, limit, data_std
        self.num_classes = num_classes
        frequencies = bandwidth * jax.random.normal(rngs.params(), (num_frequencies, num_inputs))
        if axis_aligned:
            frequencies *= jnp.arange(num_inputs) == jnp.arange(num_frequencies)[:, None] % num_inputs
        self.x_frequencies = Frequencies(frequencies)
        self.c_frequencies = Frequencies(C_BANDWIDTH * jax.random.normal(rngs.params(), (num_frequencies,)))
        self.embed_x = nnx.Linear(num_inputs + 2 * num_frequencies, width, rngs=rngs)
        self.embed_c = nnx.Linear(2 * num_frequencies, width, rngs=rngs)
        if num_classes:
            self.embed_label = nnx.Embed(num_classes + 1, width, rngs=rngs)
        self.blocks = nnx.List([ResidualBlock(width, rngs=rngs) for _ in range(num_blocks)])
        self.readout = nnx.Linear(width, max(num_outputs, 1), kernel_init=nnx.initializers.zeros_init(), rngs=rngs)

    def __call__(self, x: jax.Array, c: jax.Array, label: jax.Array | None = None) -> jax.Array:
        """The network at one x of d elements, one scalar c and, if it has classes, one label; none is any."""
        flat = saturate(jnp.ravel(x), self.reach)
        frequencies = self.x_frequencies[...]
        features = fourier(frequencies @ flat)
        if self.data_std is not None:
            features *= jnp.tile(faded(jnp.sum(frequencies**2, -1), c, self.data_std), 2)
        h = self.embed_x(jnp.concatenate([flat, features.astype(x.dtype)]))
        e = condition(self, c, label).astype(x.dtype)
        for block in self.blocks:
            h = block(h, nnx.silu(e))
        out = saturate(self.readout(nnx.silu(h)), self.limit)
        if self.num_outputs == 0:
            return out[0]
        return out.reshape(x.shape) if self.num_outputs == x.size else out


class ResidualBlock(nnx.Module):
    """h + W₂ silu(W₁ h + V e), of hidden units h and a condition e, both of length ``width``."""

    def __init__(self, width: int, *, rngs: nnx.Rngs) -> None:
        self.expand = nnx.Linear(width, width, rngs=rngs)
        self.condition = nnx.Linear(width, width, use_bias=False, rngs=rngs)
        self.contract = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, h: jax.Array, e: jax.Array) -> jax.Array:
        return h + self.contract(nnx.silu(self.expand(h) + self.condition(e)))


def condition(network: Any, c: jax.Array, label: jax.Array | None) -> jax.Array:
    """What a network of this package is told of the noise and, if it has classes, of the label; none is any."""
    e: jax.Array = network.embed_c(fourier(network.c_frequencies[...] * c))
    if network.num_classes:
        e = e + network.embed_label(jnp.asarray(network.num_classes if label is None else label))
    return e


def faded(squares: jax.Array, c: jax.Array, data_std: float) -> jax.Array:
    """exp(−2π²B²g²) for squared frequencies B²: what the noise, g² = σ²/(s² + σ²), leaves of each."""
    return jnp.exp(-2 * math.pi**2 * jax.nn.sigmoid(2 * (c - math.log(data_std))) * squares)


def fourier(phase: jax.Array) -> jax.Array:
    """cos 2πφ and sin 2πφ, one after the other."""
    return jnp.concatenate([jnp.cos(2 * jnp.pi * phase), jnp.sin(2 * jnp.pi * phase)])


def saturate(x: jax.Array, limit: float | None) -> jax.Array:
    """x/√(1 + (x/limit)²), bounded by ``limit``; x itself without one."""
    return x if limit is None else x * jax.lax.rsqrt(1 + (x / limit) ** 2)
