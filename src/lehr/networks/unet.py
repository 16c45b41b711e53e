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

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lehr.networks.convolution import Convolution
from lehr.networks.embeddings import Fourier, Learned, Positional, TwoLayers
from lehr.networks.unet_blocks import (
    ACTIVATIONS,
    Attention,
    Common,
    Downsample,
    ResnetBlock,
    Upsample,
    group_norm,
    normalise,
)

__all__ = ["UNet", "UNetConfig"]

# Block types to (whether with attention, how it resamples; None: as the config says).
DOWN_BLOCKS = {
    "DownBlock2D": (False, "conv"),
    "AttnDownBlock2D": (True, None),
    "ResnetDownsampleBlock2D": (False, "resnet"),
}
UP_BLOCKS = {"UpBlock2D": (False, "conv"), "AttnUpBlock2D": (True, None), "ResnetUpsampleBlock2D": (False, "resnet")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """The structure of a :class:`UNet`, under the names and with the defaults of diffusers.

    Attributes:
        sample_size: height and width of x, or one number for both; divisible by two for each halving.
        in_channels: channels of x.
        out_channels: as many, or twice as many where a variance is predicted too, which is not read.
        center_input_sample: whether x is taken from [0, 1] to [−1, 1] first.
        time_embedding_type: ``"positional"``, ``"learned"``, or ``"fourier"``: told a σ, it divides by it.
        time_embedding_dim: length of the time's embedding; four times the first ``block_out_channels`` by default.
        freq_shift: δ of the positional embedding.
        flip_sin_to_cos: whether its cosines stand before its sines.
        down_block_types: one a resolution: ``DownBlock2D``, ``AttnDownBlock2D``, ``ResnetDownsampleBlock2D``.
        mid_block_type: ``"UNetMidBlock2D"``, or None for none.
        up_block_types: the coarsest first: ``UpBlock2D``, ``AttnUpBlock2D``, ``ResnetUpsampleBlock2D``.
        block_out_channels: one a resolution.
        layers_per_block: resnets on the way down; one more on the way up.
        mid_block_scale_factor: r of the blocks in the middle.
        downsample_padding: zeros on every side of a halving convolution; 0 for right and below only.
        downsample_type: how blocks with attention halve: ``"conv"`` or ``"resnet"``.
        upsample_type: how they double.
        dropout: of training; not used.
        act_fn: activation of the resnets.
        attention_head_dim: channels of each head; None for a single head.
        num_attention_heads: heads, the same number at every resolution, in place of ``attention_head_dim``.
            Not an option of diffusers; some of the networks of Dhariwal & Nichol need it.
        norm_num_groups: of group norms.
        attn_norm_num_groups: of the one in the middle's attention, which under scale and shift has none by default.
        norm_eps: ε of group norms.
        resnet_time_scale_shift: ``"default"`` or ``"scale_shift"``.
        add_attention: whether the middle has attention.
        class_embed_type: None for a table with a row for each class, ``"timestep"`` to embed labels as times.
        num_class_embeds: number of classes.
        num_train_timesteps: rows of a learned time embedding.

    Raises:
        ValueError: naming the option, for a value or a combination that there is no network for.
    """

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 3
    out_channels: int = 3
    center_input_sample: bool = False
    time_embedding_type: str = "positional"
    time_embedding_dim: int | None = None
    freq_shift: float = 0
    flip_sin_to_cos: bool = True
    down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")
    mid_block_type: str | None = "UNetMidBlock2D"
    up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    layers_per_block: int = 2
    mid_block_scale_factor: float = 1
    downsample_padding: int = 1
    downsample_type: str | None = "conv"
    upsample_type: str | None = "conv"
    dropout: float = 0.0
    act_fn: str = "silu"
    attention_head_dim: int | None = 8
    num_attention_heads: int | None = None
    norm_num_groups: int = 32
    attn_norm_num_groups: int | None = None
    norm_eps: float = 1e-5
    resnet_time_scale_shift: str = "default"
    add_attention: bool = True
    class_embed_type: str | None = None
    num_class_embeds: int | None = None
    num_train_timesteps: int | None = None

    def __post_init__(self) -> None:
        for name in ("down_block_types", "up_block_types", "block_out_channels"):
            value = getattr(self, name)
            if not isinstance(value, list | tuple) or not value:
                raise ValueError(f"{name} lists one entry a resolution; got {value!r}.")
            object.__setattr__(self, name, tuple(value))
        if isinstance(self.sample_size, list):
            object.__setattr__(self, "sample_size", tuple(self.sample_size))
        self._check_choices()
        self._check_sizes()

    def _check_choices(self) -> None:
        for name, known in {
            "down_block_types": DOWN_BLOCKS,
            "up_block_types": UP_BLOCKS,
            "mid_block_type": ("UNetMidBlock2D", None),
            "time_embedding_type": ("positional", "fourier", "learned"),
            "downsample_type": ("conv", "resnet", None),
            "upsample_type": ("conv", "resnet", None),
            "act_fn": ACTIVATIONS,
            "resnet_time_scale_shift": ("default", "scale_shift"),
            "class_embed_type": (None, "timestep"),
        }.items():
            value = getattr(self, name)
            for choice in value if isinstance(value, tuple) else (value,):
                if choice not in known:
                    raise ValueError(f"{name} {choice!r} is not supported; expected one of {list(known)}.")
        if self.time_embedding_type == "learned" and not _counts(self.num_train_timesteps, least=2):
            raise ValueError("a learned time embedding needs num_train_timesteps, its number of rows.")

    def _check_sizes(self) -> None:
        levels = len(self.block_out_channels)
        if not levels == len(self.down_block_types) == len(self.up_block_types):
            raise ValueError(
                "block_out_channels, down_block_types and up_block_types go together; got "
                f"{levels}, {len(self.down_block_types)} and {len(self.up_block_types)} entries."
            )
        for name in ("in_channels", "layers_per_block", "norm_num_groups", "block_out_channels"):
            value = getattr(self, name)
            if not all(_counts(v) for v in (value if isinstance(value, tuple) else (value,))):
                raise ValueError(f"{name} must be positive integers; got {value!r}.")
        for name in (
            "time_embedding_dim",
            "attention_head_dim",
            "num_attention_heads",
            "attn_norm_num_groups",
            "num_class_embeds",
        ):
            value = getattr(self, name)
            if value is not None and not _counts(value):
                raise ValueError(f"{name} must be a positive integer or null; got {value!r}.")
        if self.out_channels not in (self.in_channels, 2 * self.in_channels):
            raise ValueError(f"out_channels must be in_channels or twice that; got {self.out_channels!r}.")
        if not isinstance(self.downsample_padding, int) or self.downsample_padding not in (0, 1):
            raise ValueError(f"downsample_padding must be 0 or 1; got {self.downsample_padding!r}.")
        for name in ("norm_eps", "mid_block_scale_factor"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"{name} must be a positive number; got {value!r}.")
        if not isinstance(self.freq_shift, int | float) or not 0 <= self.freq_shift < self.block_out_channels[0] // 2:
            raise ValueError(
                f"freq_shift must be less than half of the first block_out_channels; got {self.freq_shift!r}."
            )
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups or self.head_channels(channels) > channels:
                raise ValueError(
                    f"{channels} channels do not divide into norm_num_groups = {self.norm_num_groups} groups, "
                    f"or not into heads of {self.head_channels(channels)}."
                )
        height_and_width = self.sample_size if isinstance(self.sample_size, tuple) else (self.sample_size,) * 2
        if self.sample_size is not None and not (
            len(height_and_width) == 2 and all(_counts(s) and s % 2 ** (levels - 1) == 0 for s in height_and_width)
        ):
            raise ValueError(
                f"sample_size must divide by {2 ** (levels - 1)}, halved {levels - 1} times; got {self.sample_size!r}."
            )

    @property
    def event_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of x.

        Raises:
            ValueError: if ``sample_size`` is not known.
        """
        if self.sample_size is None:
            raise ValueError("the config does not say sample_size, the height and width of x; name it.")
        height, width = self.sample_size if isinstance(self.sample_size, tuple) else (self.sample_size,) * 2
        return self.in_channels, height, width

    @property
    def time_channels(self) -> int:
        """Length of the time's embedding."""
        return self.time_embedding_dim or 4 * self.block_out_channels[0]

    def head_channels(self, channels: int) -> int:
        """Channels of each attention head at a resolution that has ``channels`` in all."""
        if self.num_attention_heads is not None:
            return max(channels // self.num_attention_heads, 1)
        return self.attention_head_dim or channels


def _counts(value: object, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


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
        c = jnp.asarray(c, x.dtype)
        e = self.time_embedding(self.time_proj(c))
        if self.class_embedding is not None:
            if label is None:
                raise ValueError("this U-Net has classes and is called with a label: unet(x, c, label).")
            embed_as_time = isinstance(self.class_embedding, TwoLayers)
            e += self.class_embedding(self.time_proj(jnp.asarray(label, x.dtype)) if embed_as_time else label)
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
