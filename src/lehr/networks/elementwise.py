r"""A scalar of an image, summed over pixels, each told what it needs to know of all the others.

Pixels have sharp values of their own, most of them wholly black, and which value is likely depends on the
picture. So every element is read by the same features,

    u_i = [x_i, cos 2πb x_i, sin 2πb x_i],

a residual perceptron makes of all of them one h, and of h for each element a context g_i and weights w_i,

    h   = trunk([u_1, …, u_d], c, label),        g_i = silu(G_i h),        w_i = W_i h
    F   = Σ_i ⟨w_i, u_i⟩ + ⟨a(g_i), silu(A u_i + B G_i h + p_i)⟩ .

A, B, a and b are shared by all elements, so that the shape of an edge is learnt once for all of them; p_i is
the element's own. Elements are to be in the same units about the same centre. Frequencies finer than the noise
are faded out, as in :class:`~lehr.networks.ResidualMLP`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.scipy.stats import norm

from lehr.networks.described import Described
from lehr.networks.mlp import C_BANDWIDTH, Frequencies, ResidualBlock, condition, faded, fourier, saturate

__all__ = ["ElementwiseMLP"]

C_FREQUENCIES = 64


class ElementwiseMLP(Described):
    """A scalar network of an event x and of one condition c (the log noise-to-signal ratio).

    Args:
        num_inputs: d, the number of elements of x.
        width: units in each hidden layer of the trunk.
        num_blocks: residual blocks of the trunk.
        num_frequencies: Fourier features of an element.
        bandwidth: standard deviation of their frequencies, which are the quantiles of a normal distribution, in cycles
            per unit of x.
        context: length of an element's context g_i.
        element_width: hidden units of the layer that elements share.
        reach: where elements of x begin to saturate, x ↦ x/√(1 + (x/reach)²); ``None`` for no saturation.
        limit: where w and a do, likewise, which bounds the output far from the data.
        data_std: s, the standard deviation of the data, of which x has a share s²/(s² + σ²).
        num_classes: K; if not 0 the network takes a label too, 0 to K − 1, or K for any.
        rngs: Flax NNX random streams, ``params`` is used.
    """

    def __init__(
        self,
        num_inputs: int,
        *,
        width: int = 256,
        num_blocks: int = 3,
        num_frequencies: int = 6,
        bandwidth: float = 1.5,
        context: int = 12,
        element_width: int = 24,
        reach: float | None = 6.0,
        limit: float | None = 2.0,
        data_std: float = 1.0,
        num_classes: int = 0,
        rngs: nnx.Rngs,
    ) -> None:
        self.num_inputs, self.width, self.num_blocks = num_inputs, width, num_blocks
        self.num_frequencies, self.bandwidth = num_frequencies, bandwidth
        self.context, self.element_width = context, element_width
        self.reach, self.limit, self.data_std = reach, limit, data_std
        self.num_classes = num_classes
        zeros, num_features = nnx.initializers.zeros_init(), 1 + 2 * num_frequencies
        ranks = (jnp.arange(num_frequencies) + 0.5) / num_frequencies
        self.x_frequencies = Frequencies(bandwidth * norm.ppf((1 + ranks) / 2))
        self.c_frequencies = Frequencies(C_BANDWIDTH * jax.random.normal(rngs.params(), (C_FREQUENCIES,)))
        self.embed_x = nnx.Linear(num_inputs * num_features, width, rngs=rngs)
        self.embed_c = nnx.Linear(2 * C_FREQUENCIES, width, rngs=rngs)
        if num_classes:
            self.embed_label = nnx.Embed(num_classes + 1, width, rngs=rngs)
        self.blocks = nnx.List([ResidualBlock(width, rngs=rngs) for _ in range(num_blocks)])
        self.weigh = nnx.Linear(width, num_inputs * num_features, kernel_init=zeros, rngs=rngs)
        self.inform = nnx.Linear(width, num_inputs * context, rngs=rngs)
        self.position = nnx.Param(0.1 * jax.random.normal(rngs.params(), (num_inputs, element_width)))
        self.element = nnx.Linear(num_features, element_width, rngs=rngs)
        self.element_context = nnx.Linear(context, element_width, use_bias=False, rngs=rngs)
        self.element_readout = nnx.Linear(context, element_width, kernel_init=zeros, rngs=rngs)

    def __call__(self, x: jax.Array, c: jax.Array, label: jax.Array | None = None) -> jax.Array:
        """F, a scalar, at one x of d elements, one scalar c and, if it has classes, one label; none is any."""
        u = self._features(saturate(jnp.ravel(x), self.reach), c).astype(x.dtype)
        e = condition(self, c, label).astype(x.dtype)
        h = self.embed_x(jnp.ravel(u))
        for block in self.blocks:
            h = block(h, nnx.silu(e))
        h = nnx.silu(h)
        linear = jnp.vdot(saturate(self.weigh(h), self.limit), u)
        told = self.inform(h).reshape(self.num_inputs, self.context)
        units = nnx.silu(self.element(u) + self.element_context(told) + self.position[...])
        return linear + jnp.vdot(saturate(self.element_readout(nnx.silu(told)), self.limit), units)

    def _features(self, x: jax.Array, c: jax.Array) -> jax.Array:
        """u, shape (d, 1 + 2 · frequencies)."""
        frequencies = self.x_frequencies[...]
        left = jnp.tile(faded(frequencies**2, c, self.data_std), 2)
        return jax.vmap(lambda x: jnp.append(fourier(frequencies * x) * left, x))(x)
