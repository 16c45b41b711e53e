r"""One model, another schedule.

Two schedules describe the same noising at times t′ and t with λ^A(t′) = λ^B(t); then
x^B = x^A/r with r = α^A_{t′}/α^B_t, and

    log p^B_t(x) = log p^A_{t′}(r x) + d log r,      s^B(x) = r s^A(r x).

At equal λ the ratio of the α's is the ratio of the σ's; whichever is larger is used, so
that r is finite where an α or a σ vanishes.
"""

from __future__ import annotations

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from numpy.typing import ArrayLike

from lehr.potentials.base import EnergyPotential, Moments, Potential, ScorePotential
from lehr.schedules import Schedule

__all__ = ["with_schedule"]


def with_schedule(potential: Potential, schedule: Schedule) -> Potential:
    """The same model seen through another schedule, matched by log-SNR.

    A ladder that runs past the noisiest level of the model's own schedule sees that level.

    Args:
        potential: the model.
        schedule: how it shall be seen.

    Raises:
        TypeError: if ``schedule`` is not a Schedule.
    """
    if not isinstance(schedule, Schedule):
        raise TypeError(f"with_schedule needs a lehr schedule; got {schedule!r}.")
    if potential.schedule == schedule:
        return potential
    if hasattr(potential, "reschedule"):
        return potential.reschedule(schedule)
    kind: Any = EnergyRescheduled if isinstance(potential, EnergyPotential) else ScoreRescheduled
    return kind(potential=potential, schedule=schedule)


class _Rescheduled(Potential):
    potential: Potential
    schedule: Schedule = eqx.field(static=True)

    @property  # type: ignore[misc]
    def event_shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.potential.event_shape

    @property
    def total_weight(self) -> jax.Array:
        return self.potential.total_weight

    @property
    def is_calibrated(self) -> bool:
        return self.potential.is_calibrated

    @property
    def is_diffusion(self) -> bool:
        return self.potential.is_diffusion

    def reschedule(self, schedule: Schedule) -> Potential:
        return with_schedule(self.potential, schedule)

    def moments(self, t: ArrayLike) -> Moments:
        theirs, ratio = self._match(jnp.asarray(t, float))
        m = self.potential.moments(theirs)
        return Moments(m.mean / ratio, m.std / ratio)

    def width(self, t: ArrayLike) -> jax.Array:
        theirs, ratio = self._match(jnp.asarray(t, float))
        return self.potential.width(theirs) / ratio

    def _match(self, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        """t′ and r."""
        own = self.potential.schedule
        theirs = own.time(self.schedule.log_snr(t))
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        ratio = jnp.where(
            alpha > sigma,
            own.alpha(theirs) / jnp.where(alpha > sigma, alpha, 1.0),
            own.sigma(theirs) / jnp.where(alpha > sigma, 1.0, sigma),
        )
        return theirs, ratio

    def _score(self, x: jax.Array, t: jax.Array) -> jax.Array:
        theirs, ratio = self._match(t)
        return ratio * self.potential._score(ratio * x, theirs)

    def _denoise(self, x: jax.Array, t: jax.Array) -> jax.Array:
        theirs, ratio = self._match(t)
        return self.potential._denoise(ratio * x, theirs)

    def _noise(self, x: jax.Array, t: jax.Array) -> jax.Array:
        theirs, ratio = self._match(t)
        return self.potential._noise(ratio * x, theirs)


class ScoreRescheduled(_Rescheduled, ScorePotential):
    """A score seen through another schedule."""


class EnergyRescheduled(_Rescheduled, EnergyPotential):
    """An energy seen through another schedule."""

    def _log_density(self, x: jax.Array, t: jax.Array) -> jax.Array:
        theirs, ratio = self._match(t)
        jacobian = math.prod(self.event_shape) * jnp.log(ratio)
        return self.potential._log_density(ratio * x, theirs) + jacobian  # type: ignore[attr-defined]
