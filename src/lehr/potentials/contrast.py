r"""More of one model and less of another: log π_t = (1 + w) log p_t − w log q_t.

Negation is this, and so is classifier-free guidance (Ho & Salimans, 2022), with p
conditional and q not. It is a product with a negative weight, and like every such product it
is a density only where p^(1+w) falls off faster than q^w. A constant density under q bounds
the ratio where q vanishes; so does, relative to p, a share of p in a mixture that is q.

References:
    Ho & Salimans, Classifier-free diffusion guidance, 2022.
    Du et al., Reduce, reuse, recycle, ICML 2023.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from lehr.potentials.analytic import Gaussian, Uniform
from lehr.potentials.base import EnergyPotential, Moments, Potential, check_event_shapes, check_positive, concrete
from lehr.potentials.product import Product
from lehr.potentials.region import on_one_canvas
from lehr.potentials.reschedule import with_schedule
from lehr.predictions import TINY
from lehr.schedules import Schedule

__all__ = ["Contrast", "Floored"]


def Contrast(p: Potential, q: Potential, weight: ArrayLike = 1.0, floor: ArrayLike | None = None) -> Potential:  # noqa: N802
    """p^(1+w)/q^w: more of what p has and q lacks. With p conditional and q unconditional it is
    classifier-free guidance (Ho & Salimans, 2022), with w the excess power, not the "scale" 1 + w.

    It is a density only where p^(1+w) falls off faster than q^w: for Gaussians where
    (1 + w)/var_p > w/var_q. Compact supports make it ill-posed: where q vanishes inside the
    support of p the ratio is unbounded. To take a class q out of p and leave the others as
    they are, divide by a mixture that has a share m of p, ``Mixture([q, p], [1 - m, m])``:
    p/q is then at most 1/m, and 1/m of everything that q knows nothing of.

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
