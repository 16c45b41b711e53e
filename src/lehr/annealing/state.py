"""Where a run stands: all that the next stage of the level loop needs, from which any run goes on.

:func:`begin_run` makes the first state and :func:`finish` reads the last; between them is :mod:`lehr.annealing.loop`.
Statistics are rows that wait to be filled, so a state is as large at the beginning as at the end.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from blackjax.smc.resampling import systematic

from lehr.annealing.plan import Plan
from lehr.annealing.stages import strong
from lehr.annealing.start import begin
from lehr.annealing.tuning import Tuning
from lehr.annealing.weights import Particles, overall
from lehr.kernels.base import Stats
from lehr.programs.closure import Constants, Structure
from lehr.programs.path import Position

__all__ = ["Anneal", "Draws", "LevelStats", "State", "begin_run", "finish", "laid_out", "num_stages"]


class LevelStats(NamedTuple):
    """Per level: scalars, and the squared scale and the curvature (D,) that were gone by; stacked over levels."""

    acceptance_rate: jax.Array
    step_size: jax.Array
    conditional_ess: jax.Array
    ess: jax.Array
    log_evidence: jax.Array
    resampled: jax.Array
    survivors: jax.Array
    divergences: jax.Array
    nonfinite: jax.Array
    evaluations: jax.Array
    gap: jax.Array
    correction: jax.Array
    loop_integral: jax.Array
    inverse_mass: jax.Array
    curvature: jax.Array
    moves: jax.Array


class Draws(NamedTuple):
    """Kept draws; leaves have shape (draws, chains, ...)."""

    position: Position
    logdensity: jax.Array
    stats: Stats


class State(NamedTuple):
    """Where a run stands.

    Attributes:
        done: stages that are behind it: levels, and then draws.
        particles: the chains, with their weights.
        log_step: the step size.
        curvature: of −log π at the last level, as measured there or as the tuning has it, (D,).
        start_variance: of the chains' start, by site.
        levels: statistics; zeros at levels yet to come.
        draws: kept; zeros in place of those yet to come, and none at all of weighted chains.
    """

    done: jax.Array
    particles: Particles
    log_step: jax.Array
    curvature: jax.Array
    start_variance: Any
    levels: LevelStats
    draws: Draws


class Anneal(NamedTuple):
    """What a run leaves: per-level statistics, the final chains and weights, the kept draws."""

    levels: LevelStats
    draws: Draws
    position: Position
    logdensity: jax.Array
    log_weights: jax.Array
    log_evidence: jax.Array
    ancestors: jax.Array
    scatter: jax.Array


def num_stages(plan: Plan, num_levels: int) -> int:
    """How many stages a run has."""
    return num_levels + plan.num_draws


def begin_run(
    structure: Structure, plan: Plan, constants: Constants, times: jax.Array, tuning: Tuning, rng_key: jax.Array
) -> State:
    """The state before the first level; the arguments are those of :func:`lehr.annealing.loop.advance`."""
    particles = begin(structure, plan, constants, times[0], jax.random.fold_in(rng_key, 0))
    position, n, k = particles.chains.position, plan.num_chains, times.shape[0]
    dimension = tuning.scale.shape[1]
    zero, count, flag = jnp.zeros(k), jnp.zeros(k, int), jnp.zeros(k, bool)
    vector = jnp.zeros((k, dimension))
    levels = LevelStats(
        acceptance_rate=zero, step_size=zero, conditional_ess=zero, ess=zero, log_evidence=zero, resampled=flag,
        survivors=count, divergences=count, nonfinite=count, evaluations=zero, gap=zero, correction=zero,
        loop_integral=zero, inverse_mass=vector, curvature=vector, moves=flag,
    )  # fmt: skip
    num_draws = plan.num_draws
    some = jnp.zeros((num_draws, n))
    empty = jax.tree.map(lambda leaf: jnp.zeros((num_draws, *leaf.shape), leaf.dtype), position)
    draws = Draws(empty, some, Stats(some, some.astype(int), some.astype(int)))
    variance = jax.tree.map(lambda q: jnp.var(q, 0), position)
    state = State(
        jnp.zeros((), int), particles, jnp.log(tuning.step_size[0]), jnp.ones(dimension), variance, levels, draws
    )
    return laid_out(strong(state), plan)


def finish(plan: Plan, rng_key: jax.Array, state: State) -> Anneal:
    """What a run leaves whose last stage is done."""
    particles, chains = state.particles, state.particles.chains
    log_weights = overall(particles)
    draws = state.draws
    if plan.weights:  # the final points, resampled once more: one draw of every chain
        chosen = systematic(jax.random.fold_in(rng_key, 3), jnp.exp(log_weights), plan.num_chains)
        draws = _still(jax.tree.map(lambda leaf: leaf[chosen], (chains.position, chains.logdensity)))
    elif not plan.num_draws:
        draws = _still((chains.position, chains.logdensity))
    return Anneal(
        state.levels, draws, chains.position, chains.logdensity, log_weights, particles.log_evidence,
        particles.ancestors, particles.scatter,
    )  # fmt: skip


def laid_out(state: State, plan: Plan) -> State:
    """The same state, with its chains on the devices that they belong to, and all else on every one."""
    layout, particles, draws = plan.layout, state.particles, state.draws
    chains, log_weights, ancestors = layout.spread((particles.chains, particles.log_weights, particles.ancestors))
    shared = layout.spread(state._replace(particles=(particles.log_evidence, particles.scatter), draws=()), axis=None)  # type: ignore[arg-type]
    log_evidence, scatter = shared.particles
    particles = Particles(chains, log_weights, log_evidence, ancestors, scatter)
    return shared._replace(particles=particles, draws=layout.spread(draws, axis=1))


def _still(points: tuple[Position, jax.Array]) -> Draws:
    """One draw of each chain that no transition was made for."""
    position, logdensity = jax.tree.map(lambda leaf: leaf[None], points)
    none = jnp.zeros(logdensity.shape, int)
    return Draws(position, logdensity, Stats(jnp.ones_like(logdensity), none, none))
