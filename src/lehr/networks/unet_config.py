"""The structure of a U-Net, under the names and with the defaults of diffusers' ``UNet2DModel``."""

from __future__ import annotations

import dataclasses
import math

from lehr.networks.unet_blocks import ACTIVATIONS

__all__ = ["DOWN_BLOCKS", "UP_BLOCKS", "UNetConfig"]

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
