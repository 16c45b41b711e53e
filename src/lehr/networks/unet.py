r"""The convolutional U-Net of DDPM and its descendants.

    down   resnets (and attention) at one resolution, each output kept; then halve
    mid    resnet, attention, resnet
    up     resnets (and attention), each joined by the output kept last; then double

The structure, the options and the names of the parameters are those of diffusers'
``UNet2DModel``, so that its checkpoints, and others that can be renamed to it, are read
without rewriting: a tensor's name is its path in the module. Events are (channels, height,
width) as there; inside, channels come last.

References:
    Ho et al., Denoising diffusion probabilistic models, NeurIPS 2020.
    Dhariwal & Nichol, Diffusion models beat GANs on image synthesis, NeurIPS 2021.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lehr.networks.convolution import Convolution
from lehr.networks.embeddings import Fourier, Learned, Positional, TwoLayers
from lehr.networks.unet_blocks import (
    Attention,
    Common,
    Downsample,
    ResnetBlock,
    Upsample,
    group_norm,
    normalise,
)
from lehr.networks.unet_config import DOWN_BLOCKS, UP_BLOCKS, UNetConfig

__all__ = ["UNet"]


class UNet(nnx.Module):
    """The network of a :class:`UNetConfig`, called as ``unet(x, c)``, or ``unet(x, c, label)`` if it has classes.

    Args:
        config: its structure.
        rngs: Flax NNX random streams, ``params`` is used.
    """

    def __init__(self, config: UNetConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        channels = config.block_out_channels
        common = Common(
            config.time_channels,
            config.act_fn,
            config.norm_num_groups,
            config.norm_eps,
            config.resnet_time_scale_shift == "scale_shift",
        )
        self.conv_in = Convolution(config.in_channels, channels[0], rngs=rngs)
        waves = channels[0] * (2 if config.time_embedding_type == "fourier" else 1)
        self.time_proj = _time_projection(config, rngs)
        self.time_embedding = TwoLayers(waves, common.time_channels, rngs=rngs)
        self.class_embedding = _class_embedding(config, waves, rngs)

        last = len(channels) - 1
        kept, width = [channels[0]], channels[0]
        self.down_blocks: Any = nnx.List([])
        for level, kind in enumerate(config.down_block_types):
            inputs = [width] + [channels[level]] * (config.layers_per_block - 1)
            self.down_blocks.append(_Down(config, common, kind, inputs, channels[level], level < last, rngs))
            width = channels[level]
            kept += [width] * (config.layers_per_block + (level < last))
        self.mid_block = None if config.mid_block_type is None else _Middle(config, common, width, rngs)
        self.up_blocks: Any = nnx.List([])
        for level, kind in zip(range(last, -1, -1), config.up_block_types, strict=True):
            inputs = [width + kept.pop()] + [channels[level] + kept.pop() for _ in range(config.layers_per_block)]
            self.up_blocks.append(_Up(config, common, kind, inputs, channels[level], level > 0, rngs))
            width = channels[level]
        self.conv_norm_out = group_norm(width, common.num_groups, common.epsilon, rngs)
        self.conv_out = Convolution(width, config.out_channels, rngs=rngs)

    def __call__(self, x: jax.Array, c: jax.Array, label: jax.Array | None = None) -> jax.Array:
        """The network at one x.

        Args:
            x: shape (in_channels, height, width).
            c: the training step, which may lie between integers; σ for a ``"fourier"`` embedding. A scalar.
            label: the class, an integer scalar, for a network with classes.

        Returns:
            The shape of x.
        """
        c = jnp.asarray(c, jnp.promote_types(x.dtype, jnp.float32))
        e = self.time_embedding(self.time_proj(c))
        if self.class_embedding is not None:
            if label is None:
                raise ValueError("this U-Net has classes and is called with a label: unet(x, c, label).")
            embed_as_time = isinstance(self.class_embedding, TwoLayers)
            e += self.class_embedding(self.time_proj(jnp.asarray(label, c.dtype)) if embed_as_time else label)
        e = e.astype(x.dtype)
        h = self.conv_in(jnp.moveaxis(2 * x - 1 if self.config.center_input_sample else x, 0, -1))
        kept = [h]
        for down in self.down_blocks:
            h = down(h, e, kept)
        if self.mid_block is not None:
            h = self.mid_block(h, e)
        for up in self.up_blocks:
            h = up(h, e, kept)
        y = self.conv_out(jax.nn.silu(normalise(self.conv_norm_out, h)))
        y = jnp.moveaxis(y[..., : x.shape[0]], -1, 0)
        return y / c if self.config.time_embedding_type == "fourier" else y


def _time_projection(config: UNetConfig, rngs: nnx.Rngs) -> Positional | Fourier | Learned:
    length = config.block_out_channels[0]
    match config.time_embedding_type:
        case "fourier":
            return Fourier(length, rngs=rngs)
        case "learned":
            return Learned(config.num_train_timesteps or 0, length, rngs=rngs)
    return Positional(length, cosines_first=config.flip_sin_to_cos, shift=config.freq_shift)


def _class_embedding(config: UNetConfig, waves: int, rngs: nnx.Rngs) -> TwoLayers | nnx.Embed | None:
    if config.class_embed_type == "timestep":
        return TwoLayers(waves, config.time_channels, rngs=rngs)
    if config.num_class_embeds is not None:
        return nnx.Embed(config.num_class_embeds, config.time_channels, rngs=rngs)
    return None


def _attention(config: UNetConfig, channels: int, rngs: nnx.Rngs) -> Attention:
    return Attention(channels, config.head_channels(channels), config.norm_num_groups, config.norm_eps, rngs=rngs)


class _Down(nnx.Module):
    """One resolution on the way down."""

    def __init__(
        self,
        config: UNetConfig,
        common: Common,
        kind: str,
        inputs: list[int],
        channels: int,
        halves: bool,
        rngs: nnx.Rngs,
    ) -> None:
        attends, resampling = DOWN_BLOCKS[kind]
        self.resnets = nnx.List([ResnetBlock(n, channels, common, rngs=rngs) for n in inputs])
        self.attentions = nnx.List([_attention(config, channels, rngs) for _ in inputs] if attends else [])
        self.downsamplers: Any = nnx.List([])
        if halves and (resampling or config.downsample_type) == "resnet":
            self.downsamplers.append(ResnetBlock(channels, channels, common, resample="down", rngs=rngs))
        elif halves:
            self.downsamplers.append(Downsample(channels, config.downsample_padding, rngs=rngs))

    def __call__(self, h: jax.Array, e: jax.Array, kept: list[jax.Array]) -> jax.Array:
        for i, resnet in enumerate(self.resnets):
            h = resnet(h, e)
            if self.attentions:
                h = self.attentions[i](h)
            kept.append(h)
        for downsample in self.downsamplers:
            h = downsample(h, e)
            kept.append(h)
        return h


class _Middle(nnx.Module):
    """The coarsest resolution between the two ways."""

    def __init__(self, config: UNetConfig, common: Common, channels: int, rngs: nnx.Rngs) -> None:
        rescale = config.mid_block_scale_factor
        groups = config.attn_norm_num_groups or (None if common.scale_shift else common.num_groups)
        self.resnets = nnx.List([ResnetBlock(channels, channels, common, rescale=rescale, rngs=rngs) for _ in range(2)])
        self.attentions: Any = nnx.List([])
        if config.add_attention:
            head = config.head_channels(channels)
            self.attentions.append(Attention(channels, head, groups, common.epsilon, rescale=rescale, rngs=rngs))

    def __call__(self, h: jax.Array, e: jax.Array) -> jax.Array:
        h = self.resnets[0](h, e)
        for attention in self.attentions:
            h = attention(h)
        return self.resnets[1](h, e)


class _Up(nnx.Module):
    """One resolution on the way up."""

    def __init__(
        self,
        config: UNetConfig,
        common: Common,
        kind: str,
        inputs: list[int],
        channels: int,
        doubles: bool,
        rngs: nnx.Rngs,
    ) -> None:
        attends, resampling = UP_BLOCKS[kind]
        self.resnets = nnx.List([ResnetBlock(n, channels, common, rngs=rngs) for n in inputs])
        self.attentions = nnx.List([_attention(config, channels, rngs) for _ in inputs] if attends else [])
        self.upsamplers: Any = nnx.List([])
        if doubles and (resampling or config.upsample_type) == "resnet":
            self.upsamplers.append(ResnetBlock(channels, channels, common, resample="up", rngs=rngs))
        elif doubles:
            self.upsamplers.append(Upsample(channels, rngs=rngs))

    def __call__(self, h: jax.Array, e: jax.Array, kept: list[jax.Array]) -> jax.Array:
        for i, resnet in enumerate(self.resnets):
            h = resnet(jnp.concatenate([h, kept.pop()], axis=-1), e)
            if self.attentions:
                h = self.attentions[i](h)
        for upsample in self.upsamplers:
            h = upsample(h, e)
        return h
