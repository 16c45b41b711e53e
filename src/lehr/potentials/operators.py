r"""Potentials in, potential out.

    Product     log π_t = Σ_i w_i log p_i,t              p * q,  p / q,  p ** w
    Mixture     log π_t = log Σ_i w_i p_i,t / Z_i
    Contrast    log π_t = (1 + w) log p_t − w log q_t    negation; classifier-free guidance

A product of diffused densities is *not* the diffused product: its score, Σ w_i s_i, is the
right one at t = 0 only, and a reverse sampler that follows it ends elsewhere (N(0, 1)²
comes out with variance 1/3 where 1/2 is right). It is a path of targets that ends where it
should, and Markov chains that stay in equilibrium along it arrive there (Du et al., 2023).
A mixture does commute with diffusion, but needs densities: the relative masses of its
members are what a score does not know.

Everything a member can be read as is linear in its score, so one rule serves all: with
member weights w_i (for a mixture: the responsibilities at x),

    s = Σ w_i s_i,    ε̂ = Σ w_i ε̂_i,    x̂₀ = Σ w_i x̂₀_i + (1 − Σ w_i) x/α.

Products are flattened, so that (p * q) / r has three members. Members that come with
different schedules are seen through the first one's, matched by log-SNR: two models are
never asked for the same t when it means two noise levels.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeGuard

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from lehr.potentials.analytic import Gaussian, Uniform
from lehr.potentials.base import (
    EnergyPotential,
    Moments,
    Potential,
    ScorePotential,
    check_event_shapes,
    check_positive,
    concrete,
    replace,
)
from lehr.potentials.region import EnergyRegion, ScoreRegion, on_one_canvas
from lehr.potentials.reschedule import with_schedule
from lehr.predictions import TINY
from lehr.schedules import Schedule

__all__ = [
    "Contrast",
    "EnergyMixture",
    "EnergyProduct",
    "Floored",
    "Mixture",
    "Power",
    "Product",
    "ScoreProduct",
    "factors",
    "members",
]


def Product(potentials: Sequence[Potential], weights: ArrayLike | None = None) -> EnergyProduct | ScoreProduct:  # noqa: N802
    """The product Π_i p_i^{w_i}; an energy if every member is one.

    Args:
        potentials: p_i, of one event shape. Products among them are flattened.
        weights: w_i, shape (n,), any sign; ones by default. Traced data: changing them compiles nothing.

    Raises:
        TypeError: if a member is not a potential.
        ValueError: if event shapes differ, the list is empty, or weights do not fit it.
    """
    potentials = on_one_canvas(list(potentials))
    check_event_shapes(potentials, "Product")
    given = jnp.ones(len(potentials)) if weights is None else jnp.asarray(weights, float)
    if given.shape != (len(potentials),):
        raise ValueError(
            f"Product needs one weight for each member: expected shape ({len(potentials)},); got {given.shape}."
        )
    _refuse_nonfinite("Product weights", given)
    members: list[Potential] = []
    exponents: list[jax.Array] = []
    for p, w in zip(potentials, given, strict=True):
        if isinstance(p, _Product):
            members += p.members
            exponents += [w * inner for inner in p.weights]
        else:
            members.append(p)
            exponents.append(w)
    schedule = members[0].schedule
    seen = tuple(with_schedule(p, schedule) for p in members)
    kind = EnergyProduct if all(isinstance(p, EnergyPotential) for p in seen) else ScoreProduct
    return kind(members=seen, weights=jnp.stack(exponents), schedule=schedule, event_shape=seen[0].event_shape)


def Power(potential: Potential, exponent: ArrayLike) -> EnergyProduct | ScoreProduct:  # noqa: N802
    """p^w, for w > 1 a colder and for w < 1 a warmer p; the same as ``p ** w``.

    Args:
        potential: p.
        exponent: w, a scalar of any sign, traced.

    Raises:
        ValueError: if the exponent is not a finite scalar.
    """
    w = jnp.asarray(exponent, float)
    if w.shape != ():
        raise ValueError(f"Power needs a scalar exponent; got shape {w.shape}.")
    return Product([potential], w[None])


def Mixture(  # noqa: N802
    potentials: Sequence[Potential], probs: ArrayLike | None = None, log_normalizers: ArrayLike | None = None
) -> EnergyMixture:
    """The mixture Σ_i w_i p_i / Z_i of energies.

    Args:
        potentials: p_i, energies of one event shape.
        probs: w_i > 0, shape (n,), normalised here; equal by default.
        log_normalizers: log Z_i, shape (n,), of members that are not normalised; zero by default,
            as is right for exact and for calibrated potentials. For others, and for products, a
            warning says that they are missing.

    Raises:
        TypeError: if a member is a score: a mixture needs relative masses, which scores do not know.
        ValueError: if event shapes differ, or the vectors do not fit.
    """
    potentials = on_one_canvas(list(potentials))
    check_event_shapes(potentials, "Mixture")
    for p in potentials:
        if not np.all(p.covered):
            raise ValueError(
                "Mixture needs members that are densities of all of x; one of them is a Region that leaves numbers of "
                "the canvas unseen. Multiply it by a model of the rest first."
            )
        if not isinstance(p, EnergyPotential):
            raise TypeError(
                f"Mixture needs energies, since it weighs its members by their densities; {type(p).__name__} is "
                "known through its score only. Give an EnergyNetwork or an exact potential."
            )
    n = len(potentials)
    probs = jnp.ones(n) if probs is None else jnp.asarray(probs, float)
    log_z = jnp.zeros(n) if log_normalizers is None else jnp.asarray(log_normalizers, float)
    for name, vector in (("probs", probs), ("log_normalizers", log_z)):
        if vector.shape != (n,):
            raise ValueError(f"Mixture {name} must have shape ({n},); got {vector.shape}.")
        _refuse_nonfinite(f"Mixture {name}", vector)
    known = concrete(probs)
    if known is not None and np.any(known <= 0):
        raise ValueError(f"Mixture probs must be positive; got {known}.")
    if log_normalizers is None and any(isinstance(p, EnergyProduct) or not p.is_calibrated for p in potentials):
        warnings.warn(
            "Mixture of products, or of networks that were not calibrated: their normalisers are unknown, and so are "
            "the masses of the mixture. Pass log_normalizers (lehr.AnnealedSMC estimates a product's), or train with "
            "dual score matching.",
            stacklevel=2,
        )
    schedule = potentials[0].schedule
    seen = tuple(with_schedule(p, schedule) for p in potentials)
    log_weights = jnp.log(probs / jnp.sum(probs)) - log_z
    return EnergyMixture(members=seen, log_weights=log_weights, schedule=schedule, event_shape=seen[0].event_shape)


def Contrast(p: Potential, q: Potential, weight: ArrayLike = 1.0, floor: ArrayLike | None = None) -> Potential:  # noqa: N802
    """p^(1+w)/q^w: more of what p has and q lacks. With p conditional and q unconditional it is
    classifier-free guidance (Ho & Salimans, 2022), with w the excess power, not the "scale" 1 + w.

    It is a density only where p^(1+w) falls off faster than q^w: for Gaussians where
    (1 + w)/var_p > w/var_q. Compact supports make it ill-posed: where q vanishes inside the
    support of p the ratio is unbounded.

    Args:
        p: what to keep, an energy or a score.
        q: what to avoid, of the same event shape.
        weight: w ≥ 0.
        floor: a density in units of q's; q + floor replaces q, which bounds the ratio where q
            vanishes. For a normalised energy q only.

    Raises:
        ValueError: if the contrast of two Gaussians is not integrable, if q is a box without a
            floor, or for a negative weight or a floor that is not positive.
        TypeError: if a floor is asked of a score.
    """
    p, q = on_one_canvas([p, q])
    check_event_shapes([p, q], "Contrast")
    w = jnp.asarray(weight, float)
    known = concrete(w)
    if w.shape != () or (known is not None and not (np.isfinite(known) and known >= 0)):
        raise ValueError(f"Contrast weight must be a finite scalar >= 0; got {weight!r}.")
    if floor is not None:
        q = Floored(q, floor)
    elif known is not None and known > 0:
        _refuse_improper(p, q, float(known))
    return Product([p, q], jnp.stack([1 + w, -w]))


class Factor(NamedTuple):
    """One of the models that a potential is a product of: p(x[slices])^weight."""

    weight: jax.Array
    potential: Potential
    slices: tuple[Any, ...]


def factors(potential: Potential) -> list[Factor]:
    """What a potential is a product of: itself, if it is none."""
    if isinstance(potential, _Product):
        pairs = zip(potential.weights, potential.members, strict=True)
        return [f._replace(weight=w * f.weight) for w, p in pairs for f in factors(p)]
    if _sees_product(potential):
        return [f._replace(slices=potential.slices) for f in factors(potential.potential)]
    return [Factor(jnp.ones(()), potential, (...,))]


def members(potential: Potential) -> list[Potential]:
    """The models of :func:`factors`, without touching an array."""
    if isinstance(potential, _Product):
        return [m for p in potential.members for m in members(p)]
    return members(potential.potential) if _sees_product(potential) else [potential]


def _sees_product(potential: Potential) -> TypeGuard[EnergyRegion | ScoreRegion]:
    """Whether it is a region, of models that see all of it."""
    if not isinstance(potential, EnergyRegion | ScoreRegion):
        return False
    inner = potential.potential.members if isinstance(potential.potential, _Product) else (potential.potential,)
    return not any(isinstance(p, EnergyRegion | ScoreRegion) for p in inner)


class _Product(Potential):
    """What energies and scores share as members of a product."""

    members: tuple[Potential, ...]
    weights: jax.Array
    schedule: Schedule = eqx.field(static=True)
    event_shape: tuple[int, ...] = eqx.field(static=True)

    @property
    def total_weight(self) -> jax.Array:
        return sum((w * p.total_weight for w, p in zip(self.weights, self.members, strict=True)), jnp.zeros(()))

    @property
    def covered(self) -> np.ndarray:
        weights = concrete(self.weights)
        positive = np.ones(len(self.members), bool) if weights is None else weights > 0
        seen = np.zeros(self.event_shape, bool)
        for member, keeps in zip(self.members, positive, strict=True):
            seen |= keeps & member.covered
        return seen

    @property
    def is_calibrated(self) -> bool:
        return all(p.is_calibrated for p in self.members)

    @property
    def is_diffusion(self) -> bool:
        return False

    def reschedule(self, schedule: Schedule) -> Potential:
        return Product([with_schedule(p, schedule) for p in self.members], self.weights)

    def moments(self, t: ArrayLike) -> Moments:
        """Those of the product of the members' Gaussians; members that divide are left out where
        they would leave no density."""
        means, stds = zip(*((m.mean, m.std) for m in (p.moments(t) for p in self.members)), strict=True)
        precisions = jnp.stack([1 / s**2 for s in stds])
        column = self.weights.reshape(-1, *[1] * len(self.event_shape))
        weights = jnp.where(jnp.sum(column * precisions, 0) > 0.1 * precisions[0], column, jnp.maximum(column, 0.0))
        weights = jnp.where(jnp.sum(weights, 0) > 0, weights, 1.0)
        precision = jnp.sum(weights * precisions, 0)
        mean = jnp.sum(weights * precisions * jnp.stack(means), 0) / jnp.where(precision > 0, precision, 1.0)
        return Moments(mean, precision**-0.5)

    def width(self, t: ArrayLike) -> jax.Array:
        narrow = sum(jnp.maximum(w, 0.0) / p.width(t) ** 2 for w, p in zip(self.weights, self.members, strict=True))
        return jnp.where(narrow > 0, narrow, 1.0) ** -0.5

    def _sum(self, reading: Callable[[Potential], jax.Array]) -> jax.Array:
        terms = [w * reading(p) for w, p in zip(self.weights, self.members, strict=True)]
        return sum(terms[1:], terms[0])

    def _score(self, x: jax.Array, t: jax.Array) -> jax.Array:
        return self._sum(lambda p: p._score(x, t))

    def _noise(self, x: jax.Array, t: jax.Array) -> jax.Array:
        return self._sum(lambda p: p._noise(x, t))

    def _denoise(self, x: jax.Array, t: jax.Array) -> jax.Array:
        rest = (1 - jnp.sum(self.weights)) / jnp.maximum(self.schedule.alpha(t), TINY)
        return self._sum(lambda p: p._denoise(x, t)) + rest * x


class ScoreProduct(_Product, ScorePotential):
    """A product with at least one member that is a score."""


class EnergyProduct(_Product, EnergyPotential):
    """A product of energies."""

    def _log_density(self, x: jax.Array, t: jax.Array) -> jax.Array:
        return self._sum(lambda p: p._log_density(x, t))  # type: ignore[attr-defined]


class EnergyMixture(EnergyPotential):
    """A mixture of energies; ``log_weights`` are log w_i − log Z_i."""

    members: tuple[Any, ...]  # EnergyPotential, each
    log_weights: jax.Array
    schedule: Schedule = eqx.field(static=True)
    event_shape: tuple[int, ...] = eqx.field(static=True)

    @property
    def total_weight(self) -> jax.Array:
        return jnp.mean(jnp.stack([p.total_weight for p in self.members]))

    @property
    def is_calibrated(self) -> bool:
        return all(p.is_calibrated for p in self.members)

    @property
    def is_diffusion(self) -> bool:
        return all(p.is_diffusion for p in self.members)

    def reschedule(self, schedule: Schedule) -> EnergyMixture:
        seen = tuple(with_schedule(p, schedule) for p in self.members)
        return replace(self, members=seen, schedule=schedule)

    def moments(self, t: ArrayLike) -> Moments:
        weights = jax.nn.softmax(self.log_weights).reshape(-1, *[1] * len(self.event_shape))
        each = [p.moments(t) for p in self.members]
        means, stds = jnp.stack([m.mean for m in each]), jnp.stack([m.std for m in each])
        mean = jnp.sum(weights * means, 0)
        return Moments(mean, jnp.sqrt(jnp.sum(weights * (stds**2 + (means - mean) ** 2), 0)))

    def width(self, t: ArrayLike) -> jax.Array:
        return jnp.min(jnp.stack([p.width(t) for p in self.members]))

    def _joint(self, x: jax.Array, t: jax.Array) -> jax.Array:
        return self.log_weights + jnp.stack([p._log_density(x, t) for p in self.members])

    def _log_density(self, x: jax.Array, t: jax.Array) -> jax.Array:
        return jax.nn.logsumexp(self._joint(x, t))

    def _average(self, x: jax.Array, t: jax.Array, readings: list[jax.Array]) -> jax.Array:
        return jnp.tensordot(jax.nn.softmax(self._joint(x, t)), jnp.stack(readings), 1)

    def _score(self, x: jax.Array, t: jax.Array) -> jax.Array:
        return self._average(x, t, [p._score(x, t) for p in self.members])

    def _denoise(self, x: jax.Array, t: jax.Array) -> jax.Array:
        return self._average(x, t, [p._denoise(x, t) for p in self.members])

    def _noise(self, x: jax.Array, t: jax.Array) -> jax.Array:
        return self._average(x, t, [p._noise(x, t) for p in self.members])


class Floored(EnergyPotential):
    """log(q_t + floor): q with a constant density under it, for use as a divisor.

    Args:
        potential: q, a normalised energy.
        floor: the constant, in units of q's density; positive.

    Raises:
        TypeError: if q is a score.
        ValueError: if the floor is not positive.
    """

    potential: EnergyPotential
    log_floor: jax.Array

    def __init__(self, potential: Potential, floor: ArrayLike) -> None:
        if not isinstance(potential, EnergyPotential):
            raise TypeError(f"a floor under a density needs an energy; {type(potential).__name__} is a score.")
        self.potential = potential
        self.log_floor = jnp.log(check_positive("floor", floor))

    @property  # type: ignore[misc]
    def schedule(self) -> Schedule:  # type: ignore[override]
        return self.potential.schedule

    @property  # type: ignore[misc]
    def event_shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.potential.event_shape

    @property
    def total_weight(self) -> jax.Array:
        return self.potential.total_weight  # far up, where weights matter, q stands well above the floor

    def moments(self, t: ArrayLike) -> Moments:
        return self.potential.moments(t)

    def width(self, t: ArrayLike) -> jax.Array:
        return self.potential.width(t)

    @property
    def is_calibrated(self) -> bool:
        return self.potential.is_calibrated

    @property
    def is_diffusion(self) -> bool:
        return False

    def reschedule(self, schedule: Schedule) -> Floored:
        return Floored(with_schedule(self.potential, schedule), jnp.exp(self.log_floor))

    def _log_density(self, x: jax.Array, t: jax.Array) -> jax.Array:
        return jnp.logaddexp(self.potential._log_density(x, t), self.log_floor)

    def _denoise(self, x: jax.Array, t: jax.Array) -> jax.Array:
        sigma = self.schedule.sigma(t)
        return (x + sigma**2 * self._score(x, t)) / jnp.maximum(self.schedule.alpha(t), TINY)

    def _noise(self, x: jax.Array, t: jax.Array) -> jax.Array:
        return -self.schedule.sigma(t) * self._score(x, t)


def _refuse_nonfinite(name: str, value: jax.Array) -> None:
    known = concrete(value)
    if known is not None and not np.all(np.isfinite(known)):
        raise ValueError(f"{name} must be finite; got {known}.")


def _refuse_improper(p: Potential, q: Potential, w: float) -> None:
    if isinstance(q, Uniform):
        raise ValueError(
            "Contrast with a box in the denominator is unbounded wherever the box vanishes and p does not. "
            "Give floor=, a density to put under the box."
        )
    if isinstance(p, Gaussian) and isinstance(q, Gaussian):
        kept, avoided = concrete(p.covariance), concrete(q.covariance)
        if kept is None or avoided is None:
            return
        precision = (1 + w) * np.linalg.inv(kept) - w * np.linalg.inv(avoided)
        if np.min(np.linalg.eigvalsh(precision)) <= 0:
            raise ValueError(
                f"Contrast p^{1 + w:g}/q^{w:g} of these Gaussians is not integrable: it needs (1 + w)/var_p > "
                "w/var_q in every direction. Lower the weight, widen q, or give floor=."
            )
