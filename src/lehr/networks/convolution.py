r"""Convolutions that stay fast inside loops.

A k × k convolution is a sum of matrix products, one for each place of the kernel,

    y[h, w] = Σ_{i,j} x[s h + i, s w + j] K[i, j] + b,

over x padded with zeros and strided by s. XLA on CPU runs its own convolution several
times slower inside ``scan`` than outside, its gradient above all; the sum it runs
alike in both. On CPU the sum is therefore what is computed, elsewhere ``lax.conv``; which, is decided
when the program is lowered for its platform.

Events are (height, width, channels); ``vmap`` adds batches.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

__all__ = ["Convolution", "convolve"]

Padding = tuple[tuple[int, int], tuple[int, int]]


@functools.partial(jax.jit, static_argnames=("stride", "padding"))  # so that equal ones are traced once
def convolve(x: jax.Array, kernel: jax.Array, *, stride: int = 1, padding: Padding = ((1, 1), (1, 1))) -> jax.Array:
    """The cross-correlation of one event with a kernel, as networks use it.

    Args:
        x: shape (height, width, channels).
        kernel: shape (k, k, channels, outputs).
        stride: s, in both directions.
        padding: zeros added before and after each of height and width.

    Returns:
        Shape (height', width', outputs).
    """

    def as_products(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return _as_products(x, kernel, stride, padding)

    def direct(x: jax.Array, kernel: jax.Array) -> jax.Array:
        layout = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x[None], kernel, (stride, stride), padding, dimension_numbers=layout)[0]

    return lax.platform_dependent(x, kernel, cpu=as_products, default=direct)


def _as_products(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> jax.Array:
    rows, columns = kernel.shape[:2]
    x = jnp.pad(x, (*padding, (0, 0)))
    height = (x.shape[0] - rows) // stride + 1
    width = (x.shape[1] - columns) // stride + 1
    places = [(i, j) for i in range(rows) for j in range(columns)]
    shifted = (
        lax.slice(
            x, (i, j, 0), (i + stride * (height - 1) + 1, j + stride * (width - 1) + 1, x.shape[2]), (stride, stride, 1)
        )
        for i, j in places
    )
    return sum((s @ kernel[i, j] for s, (i, j) in zip(shifted, places, strict=True)), jnp.zeros((), x.dtype))


class Convolution(nnx.Module):
    """A k × k convolution with a bias.

    Args:
        num_inputs: channels of x.
        num_outputs: channels of the output.
        size: k.
        stride: s.
        padding: zeros before and after each of height and width.
        rngs: Flax NNX random streams, ``params`` is used.
    """

    def __init__(
        self,
        num_inputs: int,
        num_outputs: int,
        size: int = 3,
        *,
        stride: int = 1,
        padding: Padding = ((1, 1), (1, 1)),
        rngs: nnx.Rngs,
    ) -> None:
        self.stride, self.padding = stride, padding
        # drawn as a matrix: XLA takes seconds to compile draws of four dimensions
        drawn = nnx.initializers.lecun_normal()(rngs.params(), (size * size * num_inputs, num_outputs))
        self.kernel = nnx.Param(drawn.reshape(size, size, num_inputs, num_outputs))
        self.bias = nnx.Param(jnp.zeros(num_outputs))

    def __call__(self, x: jax.Array) -> jax.Array:
        """The convolution of x, shape (height, width, num_inputs)."""
        return convolve(x, self.kernel[...], stride=self.stride, padding=self.padding) + self.bias[...]
