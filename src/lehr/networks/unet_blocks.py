r"""What U-Nets for images are built of; one event (height, width, channels) at a time.

    ResnetBlock   h = conv₁(a(n₁(x))),  then the time e enters, as h + W a(e) before n₂ or as
                  n₂(h)(1 + γ) + β after it with (γ, β) = W a(e);  y = (x + conv₂(a(h)))/r
    Attention     y = (x + W_o softmax(q kᵀ/√d) v)/r,   (q, k, v) linear in the normalised pixels

n are group norms, a is the activation, r a rescaling. Attributes are named as the tensors of
diffusers' checkpoints are, so that a tensor's name is its path.

References:
    Ho et al., Denoising diffusion probabilistic models, NeurIPS 2020.
    Dhariwal & Nichol, Diffusion models beat GANs on image synthesis, NeurIPS 2021 (scale and shift).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from lehr.networks.convolution import Convolution

__all__ = ["ACTIVATIONS", "Attention", "Common", "Downsample", "ResnetBlock", "Upsample", "group_norm", "normalise"]

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "swish": jax.nn.silu,
    "silu": jax.nn.silu,
    "mish": jax.nn.mish,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
}


@dataclasses.dataclass(frozen=True)
class Common:
    """What all blocks of one U-Net share.

    Attributes:
        time_channels: length of the embedding e.
        activation: a, a key of :data:`ACTIVATIONS`.
        num_groups: of each group norm.
        epsilon: ε of each group norm.
        scale_shift: whether the time enters as scale and shift.
    """

    time_channels: int
    activation: str
    num_groups: int
    epsilon: float
    scale_shift: bool


def group_norm(channels: int, num_groups: int, epsilon: float, rngs: nnx.Rngs) -> nnx.GroupNorm:
    """A group norm whose variance is computed about its mean, for the sake of float32."""
    return nnx.GroupNorm(channels, num_groups, epsilon=epsilon, use_fast_variance=False, rngs=rngs)


def normalise(norm: nnx.GroupNorm, x: jax.Array) -> jax.Array:
    """``norm`` of one event, whose first axis it would take for the batch."""
    return norm(x[None])[0]


# Functions of the module, so that networks of one structure are equal.


def _keep(x: jax.Array) -> jax.Array:
    return x


def _double(x: jax.Array) -> jax.Array:
    """Each pixel repeated 2 × 2 times."""
    height, width, channels = x.shape
    return jnp.broadcast_to(x[:, None, :, None], (height, 2, width, 2, channels)).reshape(2 * height, 2 * width, -1)


def _halve(x: jax.Array) -> jax.Array:
    """Means over 2 × 2 pixels."""
    height, width, channels = x.shape
    return x.reshape(height // 2, 2, width // 2, 2, channels).mean((1, 3))


class ResnetBlock(nnx.Module):
    """Two convolutions around the time embedding, beside a shortcut.

    Args:
        num_inputs: channels of x.
        num_outputs: channels of the output.
        common: what all blocks share.
        rescale: r.
        resample: whether x and the first activation are halved (``"down"``) or doubled (``"up"``).
        rngs: Flax NNX random streams.
    """

    def __init__(
        self,
        num_inputs: int,
        num_outputs: int,
        common: Common,
        *,
        rescale: float = 1.0,
        resample: Literal["down", "up"] | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        self.activate, self.rescale, self.scale_shift = ACTIVATIONS[common.activation], rescale, common.scale_shift
        self.resample = {"down": _halve, "up": _double, None: _keep}[resample]
        self.norm1 = group_norm(num_inputs, common.num_groups, common.epsilon, rngs)
        self.conv1 = Convolution(num_inputs, num_outputs, rngs=rngs)
        self.time_emb_proj = nnx.Linear(common.time_channels, num_outputs * (1 + common.scale_shift), rngs=rngs)
        self.norm2 = group_norm(num_outputs, common.num_groups, common.epsilon, rngs)
        self.conv2 = Convolution(num_outputs, num_outputs, rngs=rngs)
        unequal = num_inputs != num_outputs
        self.conv_shortcut = (
            Convolution(num_inputs, num_outputs, 1, padding=((0, 0), (0, 0)), rngs=rngs) if unequal else None
        )

    def __call__(self, x: jax.Array, e: jax.Array) -> jax.Array:
        """The block at x, with the embedding e of shape (time_channels,)."""
        h = self.conv1(self.resample(self.activate(normalise(self.norm1, x))))
        x = self.resample(x)
        told = self.time_emb_proj(self.activate(e))
        if self.scale_shift:
            scale, shift = jnp.split(told, 2)
            h = normalise(self.norm2, h) * (1 + scale) + shift
        else:
            h = normalise(self.norm2, h + told)
        h = self.conv2(self.activate(h))
        return ((x if self.conv_shortcut is None else self.conv_shortcut(x)) + h) / self.rescale


class Attention(nnx.Module):
    """Self-attention among pixels.

    Args:
        channels: of x.
        head_channels: d, of each head; as many heads as fit.
        num_groups: of the group norm; None for none.
        epsilon: ε of the group norm.
        rescale: r.
        rngs: Flax NNX random streams.
    """

    def __init__(
        self,
        channels: int,
        head_channels: int,
        num_groups: int | None,
        epsilon: float,
        *,
        rescale: float = 1.0,
        rngs: nnx.Rngs,
    ) -> None:
        self.head_channels, self.rescale = head_channels, rescale
        inner = channels // head_channels * head_channels
        self.group_norm = None if num_groups is None else group_norm(channels, num_groups, epsilon, rngs)
        self.to_q, self.to_k, self.to_v = (nnx.Linear(channels, inner, rngs=rngs) for _ in range(3))
        self.to_out = nnx.List([nnx.Linear(inner, channels, rngs=rngs)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Attention at x; of the same shape."""
        h = (x if self.group_norm is None else normalise(self.group_norm, x)).reshape(-1, x.shape[-1])
        q, k, v = (to(h).reshape(h.shape[0], -1, self.head_channels) for to in (self.to_q, self.to_k, self.to_v))
        weights = jax.nn.softmax(jnp.einsum("qhd,khd->hqk", q, k) / jnp.sqrt(float(self.head_channels)), axis=-1)
        out = self.to_out[0](jnp.einsum("hqk,khd->qhd", weights, v).reshape(h.shape[0], -1))
        return (x + out.reshape(x.shape)) / self.rescale


class Downsample(nnx.Module):
    """A convolution of stride two; without padding, zeros are added below and to the right only.

    Args:
        channels: of x and of the output.
        padding: zeros on every side.
        rngs: Flax NNX random streams.
    """

    def __init__(self, channels: int, padding: int, *, rngs: nnx.Rngs) -> None:
        sides = (padding, padding) if padding else (0, 1)
        self.conv = Convolution(channels, channels, stride=2, padding=(sides, sides), rngs=rngs)

    def __call__(self, x: jax.Array, e: jax.Array) -> jax.Array:
        """x at half the resolution; the embedding e is not used."""
        return self.conv(x)


class Upsample(nnx.Module):
    """Every pixel repeated 2 × 2 times, then a convolution.

    Args:
        channels: of x and of the output.
        rngs: Flax NNX random streams.
    """

    def __init__(self, channels: int, *, rngs: nnx.Rngs) -> None:
        self.conv = Convolution(channels, channels, rngs=rngs)

    def __call__(self, x: jax.Array, e: jax.Array) -> jax.Array:
        """x at twice the resolution; the embedding e is not used."""
        return self.conv(_double(x))
