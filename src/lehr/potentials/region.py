r"""A model that sees a part of a canvas: tapestries are products of such.

    log p_t(x) = log q_t(x[slices])

Outside of what it sees a region says nothing: its score is zero there, its standard deviation
infinite, and the noise is not counted. A product of regions is proper where every number of the
canvas is seen by one of them; :attr:`~lehr.Potential.covered` says which are. A path refuses a
canvas with a hole.

References:
    Du et al., Reduce, reuse, recycle, ICML 2023 (image tapestries).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from lehr.potentials.base import EnergyPotential, Moments, Potential, ScorePotential, replace
from lehr.potentials.reschedule import with_schedule
from lehr.predictions import TINY
from lehr.schedules import Schedule

__all__ = ["EnergyRegion", "Region", "ScoreRegion", "on_one_canvas"]

Index = int | tuple[int | None, int | None, int | None]


def Region(  # noqa: N802
    potential: Potential, slices: Any, event_shape: Sequence[int] | None = None
) -> EnergyRegion | ScoreRegion:
    """``potential`` as a model of ``x[slices]``.

    Args:
        potential: q, of the shape of ``x[slices]``.
        slices: a basic index of x: a slice, an integer, an ellipsis or a tuple of them, as in
            ``np.s_[:, 8:24]``. Negative steps flip.
        event_shape: the canvas's shape. Left out, it is the smallest that the slices fit on, and
            grows in a product to the smallest that all its regions fit on.

    Raises:
        TypeError: if ``potential`` is none, or an index is not basic.
        ValueError: if the slice does not lie on the canvas, has not the potential's shape, or says too little
            to know the canvas from.
    """
    if not isinstance(potential, Potential):
        raise TypeError(f"Region needs a lehr potential; got a {type(potential).__name__}.")
    index = tuple(slices) if isinstance(slices, tuple | list) else (slices,)
    for part in index:
        if not isinstance(part, slice | int | np.integer) and part is not Ellipsis:
            raise TypeError(f"Region needs slices, integers or an ellipsis, as numpy.s_[...] makes them; got {part!r}.")
    canvas = tuple(_reach(part, index) for part in index) if event_shape is None else tuple(event_shape)
    try:
        seen = np.broadcast_to(np.empty(()), canvas)[index].shape
    except IndexError as error:
        raise ValueError(f"the region {slices!r} does not lie on a canvas of shape {canvas}: {error}.") from error
    if seen != potential.event_shape:
        raise ValueError(
            f"the region {slices!r} of a canvas of shape {canvas} has shape {seen}, and the potential is over events "
            f"of shape {potential.event_shape}: they must be the same."
        )
    frozen = tuple((p.start, p.stop, p.step) if isinstance(p, slice) else p for p in index)
    kind: Any = EnergyRegion if isinstance(potential, EnergyPotential) else ScoreRegion
    return kind(potential=potential, index=frozen, event_shape=canvas, grows=event_shape is None)


def on_one_canvas(potentials: list[Potential]) -> list[Potential]:
    """Potentials with the canvas of regions that were given none grown to the smallest that fits all."""
    growing = [p for p in potentials if isinstance(p, _Region) and p.grows]
    if not growing or len({len(getattr(p, "event_shape", ())) for p in potentials}) > 1:
        return potentials
    given = [p.event_shape for p in potentials if not (isinstance(p, _Region) and p.grows)]
    canvas = given[0] if given else tuple(np.max([p.event_shape for p in growing], axis=0).tolist())
    if any(n > m for p in growing for n, m in zip(p.event_shape, canvas, strict=True)):
        return potentials
    return [
        replace(p, event_shape=canvas, grows=not given) if isinstance(p, _Region) and p.grows else p for p in potentials
    ]


class _Region(Potential):
    """What energies and scores that see a part of the canvas share."""

    potential: Potential
    index: tuple[Any, ...] = eqx.field(static=True)
    event_shape: tuple[int, ...] = eqx.field(static=True)
    grows: bool = eqx.field(static=True)

    @property  # type: ignore[misc]
    def schedule(self) -> Schedule:  # type: ignore[override]
        return self.potential.schedule

    @property
    def slices(self) -> tuple[Any, ...]:
        """The basic index of what is seen."""
        return tuple(slice(*part) if isinstance(part, tuple) else part for part in self.index)

    @property
    def covered(self) -> np.ndarray:
        seen = np.zeros(self.event_shape, bool)
        seen[self.slices] = self.potential.covered
        return seen

    @property
    def total_weight(self) -> jax.Array:
        return self._place(self.potential.total_weight)

    @property
    def is_calibrated(self) -> bool:
        return self.potential.is_calibrated

    @property
    def is_diffusion(self) -> bool:
        return self.potential.is_diffusion

    def reschedule(self, schedule: Schedule) -> Potential:
        return replace(self, potential=with_schedule(self.potential, schedule))

    def moments(self, t: ArrayLike) -> Moments:
        m = self.potential.moments(t)
        return Moments(self._place(m.mean), self._place(m.std, jnp.inf))

    def width(self, t: ArrayLike) -> jax.Array:
        return self._place(self.potential.width(t), jnp.inf)

    def _place(self, part: ArrayLike, elsewhere: ArrayLike = 0.0) -> jax.Array:
        return jnp.broadcast_to(jnp.asarray(elsewhere, float), self.event_shape).at[self.slices].set(part)

    def _score(self, x: jax.Array, t: jax.Array) -> jax.Array:
        return self._place(self.potential._score(x[self.slices], t))

    def _denoise(self, x: jax.Array, t: jax.Array) -> jax.Array:
        unseen = x / jnp.maximum(self.schedule.alpha(t), TINY)
        return self._place(self.potential._denoise(x[self.slices], t), unseen)

    def _noise(self, x: jax.Array, t: jax.Array) -> jax.Array:
        return self._place(self.potential._noise(x[self.slices], t))


class ScoreRegion(_Region, ScorePotential):
    """A score of a part of the canvas."""


class EnergyRegion(_Region, EnergyPotential):
    """An energy of a part of the canvas."""

    def _log_density(self, x: jax.Array, t: jax.Array) -> jax.Array:
        return self.potential._log_density(x[self.slices], t)  # type: ignore[attr-defined]


def _reach(part: Any, index: tuple[Any, ...]) -> int:
    """How long an axis must at least be for ``part`` to lie on it."""
    if isinstance(part, int | np.integer) and part >= 0:
        return int(part) + 1
    if isinstance(part, slice):
        ends = (part.stop,) if part.step is None or part.step > 0 else (part.start,)
        if all(isinstance(end, int | np.integer) and end >= 0 for end in ends):
            return int(ends[0]) + (part.step is not None and part.step < 0)
    raise ValueError(
        f"the canvas cannot be told from the region {index!r}, whose part {part!r} has no end of its own: pass "
        "event_shape, the canvas's shape, or write the ends out, as in numpy.s_[0:8, 4:12]."
    )
