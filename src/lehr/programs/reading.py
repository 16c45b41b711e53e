r"""What a path reads off its ``Diffusion`` sites besides their density.

Start, step size and guidance need a site's Gaussian summary rather than its density. Each
is a diagonal quadratic −½ Σ (v − m)² τ in the site's value v: written as a distribution in
the site's place, it goes through plates, masks, scales, expansions and linear views of x as
the density itself does, and what arrives at x is read off by differentiation.

A score-only site takes part in a density through a stand-in whose *gradient* is the score
and whose value is zero. It is for unadjusted kernels, which never look at the value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from numpy.typing import ArrayLike

from lehr.potentials.base import EnergyPotential, Potential
from lehr.programs.diffusion import Diffusion, map_diffusions

__all__ = ["Quadratic", "quadratic", "unadjusted"]

Quadratic = Literal["moments", "noise", "width"]


class _Read(Diffusion):
    """A Diffusion whose log_prob is another reading of its potential."""

    pytree_aux_fields = ("reading",)

    def __init__(self, site: Diffusion, reading: Callable[[Potential, jax.Array, jax.Array], jax.Array]) -> None:
        super().__init__(site.potential, site.bound_level())
        self.reading = reading

    def log_prob(self, value: ArrayLike, intermediates: Any = None) -> jax.Array:
        return self.over_events(lambda x: self.reading(self.potential, x, self.bound_level()), value)


def quadratic(fn: Any, kind: Quadratic) -> Any:
    """``fn`` with each Diffusion replaced by a Gaussian summary of it.

    ``"moments"``: its own mean and variance. ``"noise"``: precision ``total_weight`` about zero,
    the number of times that the noise is counted. ``"width"``: precision 1/width².
    """
    return map_diffusions(lambda d: _Read(d, _QUADRATICS[kind]), fn)


def unadjusted(fn: Any) -> Any:
    """``fn`` with scores in place of densities where only a score is known."""
    return map_diffusions(lambda d: d if isinstance(d.potential, EnergyPotential) else _Read(d, _stand_in), fn)


def _moments(p: Potential, x: jax.Array, t: jax.Array) -> jax.Array:
    m = p.moments(t)
    return -jnp.sum(((x - m.mean) / m.std) ** 2) / 2


def _noise(p: Potential, x: jax.Array, t: jax.Array) -> jax.Array:
    return -p.total_weight * jnp.sum(x**2) / 2


def _width(p: Potential, x: jax.Array, t: jax.Array) -> jax.Array:
    return -jnp.sum((x / p.width(t)) ** 2) / 2


_QUADRATICS: dict[str, Callable[[Potential, jax.Array, jax.Array], jax.Array]] = {
    "moments": _moments,
    "noise": _noise,
    "width": _width,
}


@jax.custom_jvp
def _stand_in(p: Potential, x: jax.Array, t: jax.Array) -> jax.Array:
    """Zero, with the score as its gradient; only for those who never ask its value."""
    return jnp.zeros(())


@_stand_in.defjvp
def _(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
    p, x, t = primals  # arguments, not closed over: the rule outlives the trace in which it was made
    return _stand_in(p, x, t), jnp.vdot(p.score(x, t), tangents[1])
