r"""What a diffusion model is to lehr: a time-indexed density, known through its score.

The density p_t of x_t = α_t x₀ + σ_t ε has a score s(x, t) = ∇ log p_t(x), and with it
two more readings of the same thing,

    noise    ε̂  = −σ_t s            the noise expected in x_t,
    denoise  x̂₀ = (x + σ_t² s)/α_t  the data expected behind x_t (Tweedie's formula).

A :class:`Potential` offers these three. An :class:`EnergyPotential` also knows
log p_t(x), up to a constant c(t). The difference is a type, because a Metropolis test, a
mixture and an importance weight need the density itself: a score alone cannot give it.

Subclasses write the single-point formulas ``_score``, ``_denoise``, ``_noise`` and
``_log_density``, each in the closed form that is finite where it is asked for; the public
methods check shapes and times once, here.
"""

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from lehr.schedules import Schedule

__all__ = [
    "SCORE_IS_NO_ENERGY",
    "EnergyPotential",
    "Moments",
    "Potential",
    "ScorePotential",
    "check_event_shapes",
    "check_finite",
    "check_positive",
    "check_time",
    "concrete",
    "from_fields",
    "replace",
]

SCORE_IS_NO_ENERGY = (
    "A Metropolis test, a mixture or a weight needs the log density itself, and handing a kernel the score as the "
    "gradient of a constant would sample another density. Three ways out: a kernel that integrates the score along "
    'each proposal, lehr.HMC(metropolis="line-integral"), or so with lehr.MALA and lehr.NUTS; an unadjusted kernel, '
    'lehr.UHMC or lehr.ULA with lehr.AnnealedMCMC; an energy, lehr.EnergyNetwork. Weights of scores are weights="path".'
)

_M = TypeVar("_M", bound=eqx.Module)


class Moments(eqx.Module):
    """A Gaussian summary of a density: mean and standard deviation, each of the event's shape."""

    mean: jax.Array
    std: jax.Array


class Potential(eqx.Module):
    """A time-indexed density known through its score; one event at a time, ``vmap`` for more.

    Attributes:
        schedule: the noise schedule that gives t its meaning.
        event_shape: shape of x.
        total_weight: the number of times that the noise is counted in p_t: 1 for a diffused
            density, Σ w_i for a product Π p_i^{w_i}, whose members each carry the same noise; a
            scalar, or an array of the event's shape where members see parts of x.
    """

    # Not under `from __future__ import annotations`: equinox reads an AbstractVar in a string as a field.
    schedule: eqx.AbstractVar[Schedule]
    event_shape: eqx.AbstractVar[tuple[int, ...]]

    def score(self, x: ArrayLike, t: ArrayLike) -> jax.Array:
        """∇ log p_t(x), of the shape of ``x``."""
        return self._score(*self._checked(x, t))

    def denoise(self, x: ArrayLike, t: ArrayLike) -> jax.Array:
        """x̂₀ = (x + σ_t² s)/α_t, of the shape of ``x``; E[x₀ | x_t = x] for a single model."""
        return self._denoise(*self._checked(x, t))

    def noise(self, x: ArrayLike, t: ArrayLike) -> jax.Array:
        """ε̂ = −σ_t s, of the shape of ``x``; E[ε | x_t = x] for a single model."""
        return self._noise(*self._checked(x, t))

    def at(self, t: ArrayLike) -> Callable[[jax.Array], jax.Array]:
        """x ↦ log p_t(x), the ``logdensity_fn`` of a BlackJAX kernel."""
        raise TypeError(f"{type(self).__name__} is known through its score only. {SCORE_IS_NO_ENERGY}")

    @property
    def total_weight(self) -> jax.Array:
        return jnp.ones(())

    @property
    def covered(self) -> np.ndarray:
        """Which numbers of x the density is proper in, of the event's shape: all, but for a region of a canvas."""
        return np.ones(self.event_shape, bool)

    @property
    def is_calibrated(self) -> bool:
        """Whether c(t) = 0, for each member where there are several: densities are normalised."""
        return False

    @property
    def is_diffusion(self) -> bool:
        """Whether p_t is the density of α_t x₀ + σ_t ε, so that ``denoise`` is E[x₀ | x_t]: true of
        models and their mixtures, not of products."""
        return True

    @abc.abstractmethod
    def moments(self, t: ArrayLike) -> Moments:
        """Mean and standard deviation of p_t, exact where known, else a Gaussian stand-in.

        Chains start from the one at the first level, whose density is corrected for by the weights.
        """

    @abc.abstractmethod
    def width(self, t: ArrayLike) -> jax.Array:
        """√(α_t² s² + σ_t²) with s the finest feature's standard deviation: the scale of steps."""

    @abc.abstractmethod
    def _score(self, x: jax.Array, t: jax.Array) -> jax.Array: ...

    @abc.abstractmethod
    def _denoise(self, x: jax.Array, t: jax.Array) -> jax.Array: ...

    @abc.abstractmethod
    def _noise(self, x: jax.Array, t: jax.Array) -> jax.Array: ...

    def _checked(self, x: ArrayLike, t: ArrayLike) -> tuple[jax.Array, jax.Array]:
        x = jnp.asarray(x, float)
        if x.shape != self.event_shape:
            raise ValueError(
                f"{type(self).__name__} expects one event of shape {self.event_shape}; got x of shape "
                f"{x.shape}. For several events use jax.vmap(p.score, in_axes=(0, None))."
            )
        return x, check_time(t)

    # Composition; the operators are defined over potentials, so they are imported when used.

    def __mul__(self, other: Any) -> "Potential":
        from lehr.potentials.product import Product

        return Product([self, other]) if isinstance(other, Potential) else NotImplemented

    def __truediv__(self, other: Any) -> "Potential":
        from lehr.potentials.product import Product

        return Product([self, other], [1.0, -1.0]) if isinstance(other, Potential) else NotImplemented

    def __pow__(self, exponent: ArrayLike) -> "Potential":
        from lehr.potentials.product import Power

        return Power(self, exponent)


class ScorePotential(Potential):
    """A potential whose score is known and whose log density is not."""


class EnergyPotential(Potential):
    """A potential whose unnormalised log density is known too."""

    def log_density(self, x: ArrayLike, t: ArrayLike) -> jax.Array:
        """log p_t(x) + c(t), a scalar; c = 0 for exact and for calibrated potentials."""
        return self._log_density(*self._checked(x, t))

    def at(self, t: ArrayLike) -> Callable[[jax.Array], jax.Array]:
        """x ↦ log p_t(x), the ``logdensity_fn`` of a BlackJAX kernel."""
        t = check_time(t)
        return lambda x: self.log_density(x, t)

    @abc.abstractmethod
    def _log_density(self, x: jax.Array, t: jax.Array) -> jax.Array: ...

    def _score(self, x: jax.Array, t: jax.Array) -> jax.Array:
        return jax.grad(self._log_density)(x, t)


def concrete(x: Any) -> np.ndarray | None:
    """``x`` as a numpy array when its values are known now, None when it is being traced."""
    return None if isinstance(x, jax.core.Tracer) else np.asarray(x)


def check_time(t: ArrayLike) -> jax.Array:
    """``t`` as a scalar array; refused when it is known now and lies outside [0, 1]."""
    t = jnp.asarray(t, float)
    value = concrete(t)
    if t.shape != ():
        raise ValueError(f"expected one time t, a scalar; got shape {t.shape}. Use jax.vmap for several.")
    if value is not None and not 0 <= value <= 1:
        raise ValueError(f"times run from t = 0 (data) to t = 1 (noise); got t = {float(value):g}.")
    return t


def check_positive(name: str, value: ArrayLike) -> jax.Array:
    """``value`` as an array; refused when it is known now and not finite and positive."""
    value = jnp.asarray(value, float)
    known = concrete(value)
    if known is not None and not np.all(np.isfinite(known) & (known > 0)):
        raise ValueError(f"{name} must be positive and finite; got {known}.")
    return value


def replace(module: _M, **changes: Any) -> _M:
    """A copy of ``module`` with some fields, static ones too, set anew."""
    return from_fields(type(module), **{f.name: getattr(module, f.name) for f in dataclasses.fields(module)} | changes)


def from_fields(kind: type[_M], **fields: Any) -> _M:
    """A module of this kind with these fields, as they are."""
    module = object.__new__(kind)
    for name, value in fields.items():
        object.__setattr__(module, name, value)
    return module


def check_event_shapes(potentials: Sequence[Potential], operator: str) -> tuple[int, ...]:
    """The common event shape of ``potentials``.

    Raises:
        TypeError: if a member is not a Potential.
        ValueError: if there are none, or their event shapes differ.
    """
    if not potentials:
        raise ValueError(f"{operator} needs at least one potential; got an empty list.")
    for p in potentials:
        if not isinstance(p, Potential):
            raise TypeError(f"{operator} composes lehr potentials; got a {type(p).__name__}: {p!r}.")
    shapes = [p.event_shape for p in potentials]
    if len(set(shapes)) > 1:
        listed = ", ".join(f"{type(p).__name__} {s}" for p, s in zip(potentials, shapes, strict=True))
        raise ValueError(f"{operator} needs members of one event shape; got {listed}.")
    return shapes[0]


def check_finite(name: str, value: jax.Array) -> None:
    """Raise a ValueError if a value that is known holds NaN or infinities."""
    known = concrete(value)
    if known is not None and not np.all(np.isfinite(known)):
        raise ValueError(f"{name} must be finite; got {known}.")
