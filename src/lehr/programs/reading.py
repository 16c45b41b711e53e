r"""What a path reads off its ``Diffusion`` sites besides their density.

Start, step size and guidance need a site's Gaussian summary rather than its density. Each
is a diagonal quadratic −½ Σ (v − m)² τ in the site's value v: written as a distribution in
the site's place, it goes through plates, masks, scales, expansions and linear views of x as
the density itself does, and what arrives at x is read off by differentiation.

A score-only site takes part in a density through a stand-in whose *gradient* is the score
and whose value is zero. It is for those who never look at that value: unadjusted kernels, and
line integrals, which follow the gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from numpy.typing import ArrayLike

from lehr.potentials.base import EnergyPotential, Potential
from lehr.programs.diffusion import Diffusion, map_diffusions

__all__ = ["Quadratic", "is_energy", "known", "quadratic", "unknown"]

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


def is_energy(site: Diffusion) -> bool:
    """Whether the site's potential has a log density."""
    return isinstance(site.potential, EnergyPotential)


def known(fn: Any, forget: bool) -> Any:
    """``fn`` with the stand-in where only a score is known; with ``forget`` everywhere."""
    return map_diffusions(lambda d: d if is_energy(d) and not forget else _Read(d, _stand_in), fn)


def unknown(fn: Any, forget: bool) -> Any:
    """The rest: the stand-in where :func:`known` has it, and nothing elsewhere."""
    return map_diffusions(lambda d: _Read(d, _nothing if is_energy(d) and not forget else _stand_in), fn)


def _moments(p: Potential, x: jax.Array, t: jax.Array) -> jax.Array:
    m = p.moments(t)
    return -jnp.sum(((x - m.mean) / m.std) ** 2) / 2


def _noise(p: Potential, x: jax.Array, t: jax.Array) -> jax.Array:
    return -jnp.sum(p.total_weight * x**2) / 2


def _width(p: Potential, x: jax.Array, t: jax.Array) -> jax.Array:
    return -jnp.sum((x / p.width(t)) ** 2) / 2


_QUADRATICS: dict[str, Callable[[Potential, jax.Array, jax.Array], jax.Array]] = {
    "moments": _moments,
    "noise": _noise,
    "width": _width,
}


def _nothing(p: Potential, x: jax.Array, t: jax.Array) -> jax.Array:
    return jnp.zeros(())


@jax.custom_jvp
def _stand_in(p: Potential, x: jax.Array, t: jax.Array) -> jax.Array:
    """Zero, with the score as its gradient; only for those who never ask its value."""
    return jnp.zeros(())


def _stand_in_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
    p, x, t = primals  # arguments, not closed over: the rule outlives the trace in which it was made
    if any(not isinstance(d, SymbolicZero) for d in jax.tree.leaves((tangents[0], tangents[2]), is_leaf=_is_zero)):
        raise TypeError(
            "a Diffusion that is known through its score only has parameters (a weight, an exponent, a network's "
            "input) that depend on another latent site. Its density as a function of them is not known: a score is a "
            "gradient in x alone. Give an energy, or fix the parameter."
        )
    dx = jnp.zeros_like(x) if isinstance(tangents[1], SymbolicZero) else tangents[1]
    return _stand_in(p, x, t), jnp.vdot(p.score(x, t), dx)


def _is_zero(leaf: Any) -> bool:
    return isinstance(leaf, SymbolicZero)


_stand_in.defjvp(_stand_in_jvp, symbolic_zeros=True)
