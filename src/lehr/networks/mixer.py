r"""A mixer of patches: images without convolutions.

The image is cut into patches, each a token of p × p × channels values, projected to ``width``
and given a learnt position. A block mixes across tokens and then within each,

    h ← h + g₁ ⊙ Mᵀ-MLP(n₁(h)),      h ← h + g₂ ⊙ MLP(n₂(h)),

where n normalises each token and then scales and shifts it, and where all scales, shifts and
gates g are linear in the condition e = silu(W [cos(2πbc), sin(2πbc)] + L_label). Gates and
readout start at zero, so that the network starts at zero. It is made of matrix products only,
which XLA runs inside loops on a CPU as fast as outside; convolutions it does not.

References:
    Tolstikhin et al., MLP-Mixer: an all-MLP architecture for vision, NeurIPS 2021.
    Peebles & Xie, Scalable diffusion models with transformers, ICCV 2023 (conditioned scales and gates).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from lehr.networks.described import Described
from lehr.networks.mlp import C_BANDWIDTH, Frequencies, condition

__all__ = ["PatchMixer"]


class PatchMixer(Described):
    """A mixer of the patches of an image x, under one condition c (the log noise-to-signal ratio).

    Args:
        image_shape: shape of x, (height, width) or (height, width, channels).
        patch: side p of a patch; it divides height and width.
        width: channels of a token.
        num_blocks: mixer blocks.
        token_width: hidden units of the mixing across tokens.
        expansion: hidden units of the mixing within a token, in units of ``width``.
        num_frequencies: random Fourier features of c.
        num_classes: K; if not 0 the network takes a label too, 0 to K − 1, or K for any.
        rngs: Flax NNX random streams, ``params`` is used.

    Raises:
        ValueError: if patches do not tile the image.
    """

    def __init__(
        self,
        image_shape: tuple[int, ...],
        *,
        patch: int = 4,
        width: int = 128,
        num_blocks: int = 6,
        token_width: int = 96,
        expansion: int = 2,
        num_frequencies: int = 32,
        num_classes: int = 0,
        rngs: nnx.Rngs,
    ) -> None:
        image_shape = tuple(image_shape)
        if len(image_shape) not in (2, 3) or image_shape[0] % patch or image_shape[1] % patch:
            raise ValueError(
                f"PatchMixer needs an image of shape (height, width) or (height, width, channels) whose sides are "
                f"multiples of patch = {patch}; got {image_shape}."
            )
        self.image_shape, self.patch, self.width, self.num_blocks = image_shape, patch, width, num_blocks
        self.token_width, self.expansion, self.num_frequencies = token_width, expansion, num_frequencies
        self.num_classes = num_classes
        num_tokens = image_shape[0] * image_shape[1] // patch**2
        num_values = patch**2 * (image_shape[2] if len(image_shape) == 3 else 1)
        self.c_frequencies = Frequencies(C_BANDWIDTH * jax.random.normal(rngs.params(), (num_frequencies,)))
        self.embed_x = nnx.Linear(num_values, width, rngs=rngs)
        self.embed_c = nnx.Linear(2 * num_frequencies, width, rngs=rngs)
        if num_classes:
            self.embed_label = nnx.Embed(num_classes + 1, width, rngs=rngs)
        self.position = nnx.Param(0.1 * jax.random.normal(rngs.params(), (num_tokens, width)))
        self.blocks = nnx.List(
            [_Block(num_tokens, width, token_width, expansion, rngs=rngs) for _ in range(num_blocks)]
        )
        self.readout = nnx.Linear(width, num_values, kernel_init=nnx.initializers.zeros_init(), rngs=rngs)

    def __call__(self, x: jax.Array, c: jax.Array, label: jax.Array | None = None) -> jax.Array:
        """The network at one image x, one scalar c and, if it has classes, one label (none is any);
        of the shape of x."""
        h = self.embed_x(self._patches(x)) + self.position[...]
        e = nnx.silu(condition(self, c, label)).astype(x.dtype)
        for block in self.blocks:
            h = block(h, e)
        return self._image(self.readout(_normalise(h)), x.shape)

    def _patches(self, x: jax.Array) -> jax.Array:
        """(height, width[, channels]) → (tokens, values)."""
        p, (height, width) = self.patch, x.shape[:2]
        tiles = x.reshape(height // p, p, width // p, p, -1).transpose(0, 2, 1, 3, 4)
        return tiles.reshape(height * width // p**2, -1)

    def _image(self, tokens: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """The inverse of :meth:`_patches`."""
        p, (height, width) = self.patch, shape[:2]
        tiles = tokens.reshape(height // p, width // p, p, p, -1)
        return tiles.transpose(0, 2, 1, 3, 4).reshape(shape)


class _Block(nnx.Module):
    def __init__(self, num_tokens: int, width: int, token_width: int, expansion: int, *, rngs: nnx.Rngs) -> None:
        zeros = nnx.initializers.zeros_init()
        self.modulate = nnx.Linear(width, 6 * width, kernel_init=zeros, rngs=rngs)
        self.gather = nnx.Linear(num_tokens, token_width, rngs=rngs)
        self.spread = nnx.Linear(token_width, num_tokens, rngs=rngs)
        self.expand = nnx.Linear(width, expansion * width, rngs=rngs)
        self.contract = nnx.Linear(expansion * width, width, rngs=rngs)

    def __call__(self, h: jax.Array, e: jax.Array) -> jax.Array:
        scale, shift, gate, scale_within, shift_within, gate_within = jnp.split(self.modulate(e), 6)
        across = (_normalise(h) * (1 + scale) + shift).T
        h = h + gate * self.spread(nnx.gelu(self.gather(across))).T
        within = _normalise(h) * (1 + scale_within) + shift_within
        return h + gate_within * self.contract(nnx.gelu(self.expand(within)))


def _normalise(h: jax.Array) -> jax.Array:
    """Each token to mean 0 and variance 1."""
    return (h - jnp.mean(h, -1, keepdims=True)) * jax.lax.rsqrt(jnp.var(h, -1, keepdims=True) + 1e-5)
