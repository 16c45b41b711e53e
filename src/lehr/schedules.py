r"""Noise schedules: how much signal and how much noise at each time.

A schedule maps a time t in [0, 1] to the pair (α_t, σ_t) of

    x_t = α_t x₀ + σ_t ε,    ε ~ N(0, I),

with t = 0 the data and t = 1 the noise. Two schedules tell the same story at different
speeds and in different units; what they share is the log signal-to-noise ratio

    λ_t = 2 log(α_t / σ_t),

strictly decreasing in t. ``log_snr`` and its inverse ``time`` are therefore how schedules
meet, and every formula below is arranged so that both keep their relative precision in
float32 at both ends, where 1 − α² would cancel.

Schedules are frozen values: hashable, equal when their parameters are equal, and static
under ``jax.jit``.

References:
    Song et al., Score-based generative modeling through SDEs, ICLR 2021.
    Nichol & Dhariwal, Improved denoising diffusion probabilistic models, ICML 2021.
    Kingma et al., Variational diffusion models, NeurIPS 2021.
    Liu et al., Flow straight and fast, ICLR 2023.
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass, field
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from numpy.typing import ArrayLike

__all__ = ["VE", "DiscreteSchedule", "RectifiedFlow", "Schedule", "VPCosine", "VPLinear"]


class Schedule(abc.ABC):
    """t in [0, 1] ↦ (α_t, σ_t); the data at t = 0, the noise at t = 1."""

    def __init_subclass__(cls) -> None:
        jax.tree_util.register_static(cls)

    @abc.abstractmethod
    def alpha(self, t: ArrayLike) -> jax.Array:
        """α_t, what is left of the signal; same shape as ``t``."""

    @abc.abstractmethod
    def sigma(self, t: ArrayLike) -> jax.Array:
        """σ_t, the standard deviation of the noise; same shape as ``t``."""

    @abc.abstractmethod
    def log_snr(self, t: ArrayLike) -> jax.Array:
        """λ_t = 2 log(α_t / σ_t), strictly decreasing; may be ±inf at the ends."""

    @abc.abstractmethod
    def time(self, log_snr: ArrayLike) -> jax.Array:
        """The time t at which λ_t = ``log_snr``, clipped to [0, 1]."""


@dataclass(frozen=True)
class VPLinear(Schedule):
    """Variance preserving with linear β: log α_t = −t²(β₁ − β₀)/4 − tβ₀/2 (Song et al., 2021).

    Args:
        beta_min: β₀ > 0, the rate of noising at t = 0.
        beta_max: β₁ > β₀, the rate at t = 1.

    Raises:
        ValueError: if not 0 < β₀ < β₁.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        if not 0 < self.beta_min < self.beta_max:
            raise ValueError(f"VPLinear needs 0 < beta_min < beta_max; got {self.beta_min=}, {self.beta_max=}.")

    def _minus_log_alpha(self, t: ArrayLike) -> jax.Array:
        t = jnp.asarray(t, float)
        return t * t * (self.beta_max - self.beta_min) / 4 + t * self.beta_min / 2

    def alpha(self, t: ArrayLike) -> jax.Array:
        return jnp.exp(-self._minus_log_alpha(t))

    def sigma(self, t: ArrayLike) -> jax.Array:
        return jnp.sqrt(-jnp.expm1(-2 * self._minus_log_alpha(t)))

    def log_snr(self, t: ArrayLike) -> jax.Array:
        return -jnp.log(jnp.expm1(2 * self._minus_log_alpha(t)))

    def time(self, log_snr: ArrayLike) -> jax.Array:
        exponent = jax.nn.softplus(-jnp.asarray(log_snr, float))  # −2 log α
        slope = self.beta_max - self.beta_min
        root = jnp.sqrt(self.beta_min**2 / 4 + slope * exponent / 2)
        return jnp.clip(exponent / (self.beta_min / 2 + root), 0.0, 1.0)


@dataclass(frozen=True)
class VPCosine(Schedule):
    """Variance preserving with α_t a cosine, α₀ = 1 and α₁ = 0 (Nichol & Dhariwal, 2021).

    α_t = cos(π/2 · (t + s)/(1 + s)) / cos(π/2 · s/(1 + s)).

    Args:
        offset: s ≥ 0, which keeps the first steps from being too small.

    Raises:
        ValueError: if ``offset`` is negative.
    """

    offset: float = 0.008

    def __post_init__(self) -> None:
        if self.offset < 0:
            raise ValueError(f"VPCosine needs offset >= 0; got {self.offset=}.")

    @property
    def _rate(self) -> float:
        return math.pi / 2 / (1 + self.offset)

    @property
    def _start(self) -> float:
        return self._rate * self.offset

    def alpha(self, t: ArrayLike) -> jax.Array:
        t = jnp.asarray(t, float)
        return jnp.sin(self._rate * (1 - t)) / math.cos(self._start)

    def sigma(self, t: ArrayLike) -> jax.Array:
        t = jnp.asarray(t, float)
        moved = self._rate * t  # cos²a − cos²b = sin(b − a) sin(b + a)
        return jnp.sqrt(jnp.sin(moved) * jnp.sin(moved + 2 * self._start)) / math.cos(self._start)

    def log_snr(self, t: ArrayLike) -> jax.Array:
        return 2 * (jnp.log(self.alpha(t)) - jnp.log(self.sigma(t)))

    def time(self, log_snr: ArrayLike) -> jax.Array:
        log_snr = jnp.asarray(log_snr, float)
        noise = math.cos(self._start) ** 2 * jax.nn.sigmoid(-log_snr)
        sine = jnp.sqrt(math.sin(self._start) ** 2 + noise)
        cosine = math.cos(self._start) * jnp.sqrt(jax.nn.sigmoid(log_snr))
        end = jnp.arctan2(sine, cosine)
        near = jnp.clip(noise / jnp.maximum(jnp.sin(end + self._start), 1e-30), 0.0, 1.0)
        moved = jnp.where(near < 0.5, jnp.arcsin(jnp.minimum(near, 0.5)), end - self._start)
        return jnp.clip(moved / self._rate, 0.0, 1.0)


@dataclass(frozen=True)
class VE(Schedule):
    """Variance exploding: α = 1, σ_t = σ_min (σ_max/σ_min)^t (Song et al., 2021).

    Args:
        sigma_min: σ₀ > 0; "data" means data blurred by σ_min.
        sigma_max: σ₁ > σ₀, much wider than the data.

    Raises:
        ValueError: if not 0 < σ_min < σ_max.
    """

    sigma_min: float
    sigma_max: float

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(f"VE needs 0 < sigma_min < sigma_max; got {self.sigma_min=}, {self.sigma_max=}.")

    @property
    def _span(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)

    def alpha(self, t: ArrayLike) -> jax.Array:
        return jnp.ones_like(jnp.asarray(t, float))

    def sigma(self, t: ArrayLike) -> jax.Array:
        return self.sigma_min * jnp.exp(self._span * jnp.asarray(t, float))

    def log_snr(self, t: ArrayLike) -> jax.Array:
        return -2 * (math.log(self.sigma_min) + self._span * jnp.asarray(t, float))

    def time(self, log_snr: ArrayLike) -> jax.Array:
        log_sigma = -jnp.asarray(log_snr, float) / 2
        return jnp.clip((log_sigma - math.log(self.sigma_min)) / self._span, 0.0, 1.0)


@dataclass(frozen=True)
class RectifiedFlow(Schedule):
    """The straight line between data and noise: α = 1 − t, σ = t (Liu et al., 2023)."""

    def alpha(self, t: ArrayLike) -> jax.Array:
        return 1 - jnp.asarray(t, float)

    def sigma(self, t: ArrayLike) -> jax.Array:
        return jnp.asarray(t, float)

    def log_snr(self, t: ArrayLike) -> jax.Array:
        t = jnp.asarray(t, float)
        return 2 * (jnp.log1p(-t) - jnp.log(t))

    def time(self, log_snr: ArrayLike) -> jax.Array:
        return jax.nn.sigmoid(-jnp.asarray(log_snr, float) / 2)


@dataclass(frozen=True)
class DiscreteSchedule(Schedule):
    """A variance-preserving schedule read from a checkpoint's own numbers.

    λ is interpolated piecewise-linearly in i/(T − 1) between the T steps. Names of schedules
    do not fix their formulas across libraries; the table of ᾱ does.

    Args:
        alphas_cumprod: ᾱ_i = α²_i, shape (T,), strictly decreasing within [0, 1], T ≥ 2.
            A terminal ᾱ of zero is read as λ = −25, a first one of one as λ = +25.

    Raises:
        ValueError: if the table is not a strictly decreasing sequence within [0, 1].
    """

    alphas_cumprod: tuple[float, ...] = field(repr=False)

    def __init__(self, alphas_cumprod: ArrayLike) -> None:
        table = np.asarray(alphas_cumprod, np.float64)
        if table.ndim != 1 or table.size < 2:
            raise ValueError(f"DiscreteSchedule needs a vector of at least two ᾱ; got shape {table.shape}.")
        if not (np.all(np.diff(table) < 0) and table[-1] >= 0 and table[0] <= 1):
            raise ValueError(
                "DiscreteSchedule needs ᾱ strictly decreasing within [0, 1], from data to noise; "
                f"got values from {table[0]:.4g} to {table[-1]:.4g}. Pass alphas_cumprod, not betas."
            )
        object.__setattr__(self, "alphas_cumprod", tuple(table.tolist()))

    @cached_property
    def _table(self) -> tuple[np.ndarray, np.ndarray]:
        table = np.asarray(self.alphas_cumprod)
        with np.errstate(divide="ignore"):
            log_snr = np.clip(np.log(table) - np.log1p(-table), -25.0, 25.0)
        return np.linspace(0.0, 1.0, table.size), log_snr

    def alpha(self, t: ArrayLike) -> jax.Array:
        return jnp.sqrt(jax.nn.sigmoid(self.log_snr(t)))

    def sigma(self, t: ArrayLike) -> jax.Array:
        return jnp.sqrt(jax.nn.sigmoid(-self.log_snr(t)))

    def log_snr(self, t: ArrayLike) -> jax.Array:
        times, log_snr = self._table
        return jnp.interp(jnp.asarray(t, float), jnp.asarray(times, float), jnp.asarray(log_snr, float))

    @property
    def num_steps(self) -> int:
        """T, the number of training steps."""
        return len(self.alphas_cumprod)

    def step(self, t: ArrayLike) -> jax.Array:
        """The continuous index i = t (T − 1), exactly an integer at the ``time_of_step`` of that integer."""
        index = jnp.asarray(t, float) * (self.num_steps - 1)
        nearest = jnp.round(index)
        rounding = 2 * jnp.finfo(index.dtype).eps * (self.num_steps - 1)
        # The value is the integer's, the derivative that of the line.
        return jnp.where(jnp.abs(index - nearest) <= rounding, index + lax.stop_gradient(nearest - index), index)

    def time_of_step(self, index: ArrayLike) -> jax.Array:
        """The time t = i/(T − 1) of step i, which may lie between integers."""
        return jnp.asarray(index, float) / (self.num_steps - 1)

    def time(self, log_snr: ArrayLike) -> jax.Array:
        times, table = self._table
        return jnp.interp(-jnp.asarray(log_snr, float), jnp.asarray(-table, float), jnp.asarray(times, float))
