r"""Products of potentials: log π_t = Σ_i w_i log p_i,t, as p * q, p / q and p ** w.

A product of diffused densities is *not* the diffused product: its score, Σ w_i s_i, is the
right one at t = 0 only, and a reverse sampler that follows it ends elsewhere (N(0, 1)²
comes out with variance 1/3 where 1/2 is right). It is a path of targets that ends where it
should, and Markov chains that stay in equilibrium along it arrive there (Du et al., 2023).

Everything a member can be read as is linear in its score, so one rule serves all:

    s = Σ w_i s_i,    ε̂ = Σ w_i ε̂_i,    x̂₀ = Σ w_i x̂₀_i + (1 − Σ w_i) x/α.

Products are flattened, so that (p * q) / r has three members. Members that come with
different schedules are seen through the first one's, matched by log-SNR: two models are
never asked for the same t when it means two noise levels.

References:
    Du et al., Reduce, reuse, recycle, ICML 2023.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeGuard

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from lehr.potentials.base import (
    EnergyPotential,
    Moments,
    Potential,
    ScorePotential,
    check_event_shapes,
    check_finite,
    concrete,
)
from lehr.potentials.region import EnergyRegion, ScoreRegion, on_one_canvas
from lehr.potentials.reschedule import with_schedule
from lehr.predictions import TINY
from lehr.schedules import Schedule

__all__ = ["EnergyProduct", "Factor", "Power", "Product", "ScoreProduct", "factors", "members"]


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
    check_finite("Product weights", given)
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
