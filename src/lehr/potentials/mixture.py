r"""Mixtures of energies: log π_t = log Σ_i w_i p_i,t / Z_i.

A mixture commutes with diffusion, but needs densities: the relative masses of its members
are what a score does not know. At x the members have the responsibilities

    r_i = w_i p_i,t(x)/Z_i / Σ_j w_j p_j,t(x)/Z_j,

and whatever is linear in a score is their average: s = Σ r_i s_i, and so ε̂ and x̂₀.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from lehr.potentials.base import (
    EnergyPotential,
    Moments,
    Potential,
    check_event_shapes,
    check_finite,
    concrete,
    replace,
)
from lehr.potentials.product import EnergyProduct
from lehr.potentials.region import on_one_canvas
from lehr.potentials.reschedule import with_schedule
from lehr.schedules import Schedule

__all__ = ["EnergyMixture", "Mixture"]


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
        check_finite(f"Mixture {name}", vector)
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
