r"""Metropolis tests for scores: the change of log density, by a line integral.

A score s = ∇ log p without its log p still fixes differences of it,

    log p(x') − log p(x) = ∫₀¹ ⟨s(x + u (x' − x)), x' − x⟩ du,

so a test along a trajectory can be had by quadrature. Each position update of the leapfrog
integrator adds the integral over its own segment to a *ledger*, which stands in BlackJAX's
place for the log density. The rules are Lobatto's: symmetric in the two ends, as detailed
balance needs, and with the ends among the nodes, whose scores the integrator has anyway.

    nodes           2     3     4     5
    extra calls     0     1     2     3     for each leapfrog step

Two nodes are nearly useless: kick and trapezoid cancel, and the log acceptance becomes
(ε²/8) (|s(x_0)|² − |s(x_L)|²) whatever lies between. Three is Simpson's rule, the default.

Where part of the log density is known (a likelihood, a prior, an energy among the factors)
that part enters the test exactly, and only the rest is integrated. The ledger starts each
transition at the known part alone: it means nothing except as a difference along one
trajectory. If s is not a gradient field no acceptance shows it; :func:`closed_loop` does.

References:
    Sjöberg, Lindqvist, Önnheim, Jirstrand & Svensson, MCMC-correction of score-based diffusion
    models for model composition, 2023 (the straight-line integral for MALA and HMC).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from blackjax.mcmc.integrators import IntegratorState
from jax.flatten_util import ravel_pytree

from lehr.kernels.base import LogDensity

__all__ = ["NODES", "PartlyKnown", "ScoreGradient", "closed_loop", "line_integral", "refreshed", "reset"]

# Nodes in [0, 1] and weights of Lobatto's rules.
_ROOT_5, _ROOT_21 = np.sqrt(1 / 5), np.sqrt(3 / 7)
NODES = {
    2: ((0.0, 1.0), (1 / 2, 1 / 2)),
    3: ((0.0, 0.5, 1.0), (1 / 6, 2 / 3, 1 / 6)),
    4: ((0.0, (1 - _ROOT_5) / 2, (1 + _ROOT_5) / 2, 1.0), (1 / 12, 5 / 12, 5 / 12, 1 / 12)),
    5: ((0.0, (1 - _ROOT_21) / 2, 0.5, (1 + _ROOT_21) / 2, 1.0), (1 / 20, 49 / 180, 16 / 45, 49 / 180, 1 / 20)),
}


class PartlyKnown:
    """A log density of which only a part has a value.

    Called, it gives the value of the known part, with the gradient of the whole.

    Args:
        known: that function.
        unknown: a function whose gradient is that of the rest, and whose value means nothing.
    """

    def __init__(self, known: LogDensity, unknown: LogDensity) -> None:
        self.known, self.unknown = known, unknown

    def __call__(self, position: Any) -> jax.Array:
        return self.known(position)


class ScoreGradient(NamedTuple):
    """What a state keeps in place of a gradient.

    Attributes:
        whole: the gradient of the whole log density.
        unknown: that of the part without a value.
        known: the value of the other part.
    """

    whole: Any
    unknown: Any
    known: jax.Array


def refreshed(position: Any, logdensity_fn: PartlyKnown) -> tuple[jax.Array, ScoreGradient]:
    """The ledger and the gradients that a transition starts from."""
    known, whole = jax.value_and_grad(logdensity_fn.known)(position)
    unknown = jax.grad(logdensity_fn.unknown)(position)  # the same network call; XLA makes it once
    return known, ScoreGradient(whole, unknown, known)


def reset(state: Any) -> Any:
    """``state`` with its ledger back at the known part."""
    return state._replace(logdensity=state.logdensity_grad.known)


def line_integral(num_nodes: int = 3) -> Callable[..., Any]:
    """Leapfrog with a ledger in place of the log density: a BlackJAX integrator.

    Give it to ``blackjax.hmc.build_kernel`` or ``blackjax.nuts.build_kernel`` as ``integrator=``, with a
    :class:`PartlyKnown` log density and states made by :func:`refreshed`; ``lehr.HMC(metropolis="line-integral")``
    does that.

    Args:
        num_nodes: of Lobatto's rule on each position update, 2 to 5.
    """
    nodes, weights = NODES[num_nodes]

    def integrator(logdensity_fn: PartlyKnown, kinetic_energy_fn: Callable[..., jax.Array]) -> Any:
        velocity, score = jax.grad(kinetic_energy_fn), jax.grad(logdensity_fn.unknown)

        def one_step(state: IntegratorState, step_size: jax.Array) -> IntegratorState:
            q, old = state.position, state.logdensity_grad
            p = _along(state.momentum, old.whole, step_size / 2)
            v = velocity(p)
            end = _along(q, v, step_size)
            known, new = refreshed(end, logdensity_fn)
            within = [score(_along(q, v, u * step_size)) for u in nodes[1:-1]]
            integral = sum(w * _dot(s, v) for w, s in zip(weights, [old.unknown, *within, new.unknown], strict=True))
            ledger = state.logdensity + known - old.known + step_size * integral
            return IntegratorState(end, _along(p, new.whole, step_size / 2), ledger, new)

        return one_step

    return integrator


def closed_loop(unknown: LogDensity, position: Any, scale: jax.Array, rng_key: jax.Array) -> jax.Array:
    """∮ ⟨s, dx⟩ around a triangle at ``position``, in nats: zero for the score of any density.

    Args:
        unknown: a function whose gradient is the score.
        position: one corner.
        scale: of each coordinate, flat: the other corners lie one scale away, in random directions.
        rng_key: for the directions.

    Returns:
        The integral, by five-point quadrature of each side; what is left for a gradient field
        is the error of the quadrature.
    """
    flat, unravel = ravel_pytree(position)
    score = jax.vmap(lambda q: ravel_pytree(jax.grad(unknown)(unravel(q)))[0])
    directions = jax.random.normal(rng_key, (2, flat.size)) * scale / np.sqrt(flat.size)
    corners = [flat, flat + directions[0], flat + directions[1], flat]
    nodes, weights = (jnp.asarray(c) for c in NODES[5])
    total = jnp.zeros(())
    for a, b in itertools.pairwise(corners):
        total += jnp.dot(weights, score(a + nodes[:, None] * (b - a)) @ (b - a))
    return total


def _along(q: Any, v: Any, step: Any) -> Any:
    return jax.tree.map(lambda a, b: a + step * b, q, v)


def _dot(a: Any, b: Any) -> jax.Array:
    return sum((jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)), jnp.zeros(()))
