r"""The level loop: N chains go down a ladder, as far as they are told.

Entering level k with the points x' of level k − 1, in this order:

    predict    x' → x, where there is a predictor or weights follow the path
    refresh    log π_k(x) and its gradient; nothing is remembered across levels
    weigh      log weights, evidence, resampling                      (lehr.annealing.weights)
    warm up    num_warmup transitions that tune the step              (lehr.annealing.tuning)
    move       num_steps transitions under π_k, nothing tuned: the corrector

and after the last level, the draws that are kept. A level and a kept draw are one *stage* each. All that
the next stage needs is one :class:`State`, so a run may be stopped after any of them and taken up again:
:func:`begin_run` makes the first state, :func:`advance` goes on from one to a later one, in one compiled
program whatever the number of stages, and :func:`finish` reads the last.

Keys are folded in by name, (seed, stage, level, step, chain), so a chain's randomness does not
depend on how chains are laid out, nor on where a run was stopped. Statistics are summed inside the loops: memory
does not grow with steps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from blackjax.smc.resampling import systematic

from lehr.annealing.entry import Entry, conditional_ess, is_sound, target_at
from lehr.annealing.keys import per_chain
from lehr.annealing.mover import Mover
from lehr.annealing.plan import Plan
from lehr.annealing.stages import put, strong
from lehr.annealing.start import begin
from lehr.annealing.tuning import Tuning, curvature, pooled_scale
from lehr.annealing.weights import Particles, overall, weigh
from lehr.kernels.base import Stats
from lehr.kernels.line_integral import closed_loop
from lehr.programs.closure import Constants, Structure
from lehr.programs.path import Position
from lehr.programs.ratios import Level

__all__ = ["Anneal", "Draws", "LevelStats", "State", "advance", "begin_run", "finish", "num_loops", "num_stages"]

LOOPS = 32  # the most chains at which the score is integrated round a closed loop
CHAINS_PER_LOOP = 64  # so that the loops cost about a quarter of an evaluation of each chain


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


def num_loops(plan: Plan) -> int:
    """At how many chains the score is integrated round a closed loop."""
    return min(LOOPS, max(plan.num_chains // CHAINS_PER_LOOP, 2), plan.num_chains)


def begin_run(
    structure: Structure, plan: Plan, constants: Constants, times: jax.Array, tuning: Tuning, rng_key: jax.Array
) -> State:
    """The state before the first level; the arguments are those of :func:`advance`."""
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
    return _laid_out(strong(state), plan)


def advance(
    structure: Structure,
    plan: Plan,
    constants: Constants,
    times: jax.Array,
    noise: Level,
    tuning: Tuning,
    rng_key: jax.Array,
    threshold: jax.Array,
    state: State,
    stop: jax.Array,
) -> State:
    """Go on until ``stop`` stages are done; pure, to be compiled once per (structure, plan, shapes).

    Args:
        structure: the path's functions.
        plan: what is static.
        constants: the path's data.
        times: the ladder, shape (K,).
        noise: the noise at those times, each (K,).
        tuning: steps (K,) and scales (K, D); without ``plan.is_tuned`` the first step is where tuning starts.
        rng_key: the seed.
        threshold: resample where ESS < threshold · N.
        state: where to go on from.
        stop: at most :func:`num_stages`.
    """
    num_levels = times.shape[0]
    enter = Entry(structure, plan, constants, times, noise)
    move = Mover(plan, tuning.short_share)
    gradients = jax.vmap(plan.kernel.gradient)

    def level(state: State) -> State:
        k = state.done
        key_resample, key_move, key_enter, key_loops, key_bend = _keys(rng_key, 1, k, 5)
        particles, log_step, bend, decided = state.particles, state.log_step, state.curvature, None
        if plan.is_tuned:
            log_step, bend, decided = jnp.log(tuning.step_size[k]), tuning.curvature[k - 1], tuning.moves[k]
        entered = enter(k, particles, bend, decided, key_enter)
        finite_gap = jnp.where(jnp.isfinite(entered.gap), entered.gap, 0.0)
        gap = jnp.sum(finite_gap * jnp.exp(overall(particles)))
        correction = entered.typical_correction(overall(particles))
        particles = particles._replace(chains=entered.chains)
        resampled, ess, kept = jnp.zeros((), bool), jnp.asarray(float(plan.num_chains)), jnp.ones(())
        if plan.weights:
            kept = conditional_ess(overall(particles), entered.increment)
            particles, ess, resampled = weigh(particles, entered.increment, key_resample, threshold, plan.layout)
        if plan.is_tuned:
            inverse_mass = tuning.scale[k] ** 2
        else:
            at = particles.chains.position
            inverse_mass = pooled_scale(structure, constants, at, times[k], state.start_variance)
        target = target_at(structure, constants, times[k])
        chains, log_step, moved = move(
            key_move, particles.chains, target, log_step, inverse_mass, plan.num_warmup, plan.num_steps
        )
        if plan.is_tuned:
            bend = tuning.curvature[k]
        elif plan.is_informed:
            bend = curvature(plan.kernel, chains, target, inverse_mass, key_bend, plan.layout)
        particles = particles._replace(chains=chains)
        stats = LevelStats(
            acceptance_rate=jnp.mean(moved.acceptance_rate),
            step_size=jnp.exp(log_step),
            conditional_ess=kept,
            ess=ess,
            log_evidence=particles.total_log_evidence,
            resampled=resampled,
            survivors=jnp.sum(jnp.bincount(particles.ancestors, length=plan.num_chains) > 0),
            divergences=jnp.sum(moved.is_divergent),
            nonfinite=jnp.sum(~jax.vmap(is_sound)((entered.chains.logdensity, gradients(entered.chains)))),
            evaluations=jnp.mean(moved.evaluations),
            gap=gap,
            correction=correction,
            loop_integral=_loops(structure, plan, constants, chains, inverse_mass, times[k], key_loops),
            inverse_mass=inverse_mass,
            curvature=bend,
            moves=entered.moves,
        )
        levels = put(state.levels, stats, k)
        return _laid_out(State(k + 1, particles, log_step, bend, state.start_variance, levels, state.draws), plan)

    def draw(state: State) -> State:
        """Independent chains go on at the last level; one draw of each is kept."""
        i = state.done - num_levels
        (key,) = _keys(rng_key, 2, i, 1)
        target = target_at(structure, constants, times[-1])
        scale = state.levels.inverse_mass[-1]
        chains, _, moved = move(key, state.particles.chains, target, state.log_step, scale, 0, plan.thinning)
        draws = put(state.draws, Draws(chains.position, chains.logdensity, moved), i)
        state = state._replace(done=state.done + 1, particles=state.particles._replace(chains=chains), draws=draws)
        return _laid_out(state, plan)

    state = jax.lax.while_loop(lambda s: s.done < jnp.minimum(stop, num_levels), level, state)
    if plan.num_draws:
        state = jax.lax.while_loop(lambda s: (num_levels <= s.done) & (s.done < stop), draw, state)
    return state


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


def _keys(rng_key: jax.Array, stage: int, i: jax.Array, count: int) -> list[jax.Array]:
    key = jax.random.fold_in(jax.random.fold_in(rng_key, stage), i)
    return [jax.random.fold_in(key, j) for j in range(count)]


def _laid_out(state: State, plan: Plan) -> State:
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


def _loops(
    structure: Structure,
    plan: Plan,
    constants: Constants,
    chains: Any,
    inverse_mass: jax.Array,
    t: jax.Array,
    rng_key: jax.Array,
) -> jax.Array:
    """Root mean square over chains of the score's closed-loop integral."""
    if "unknown" not in structure:
        return jnp.zeros(())
    count = num_loops(plan)
    positions = jax.tree.map(lambda leaf: leaf[:count], chains.position)
    unknown = lambda q: structure.unknown(constants, q, t)  # noqa: E731
    loop = lambda q, key: closed_loop(unknown, q, jnp.sqrt(inverse_mass), key)  # noqa: E731
    around = plan.layout._replace(mesh=None).over(loop)
    return jnp.sqrt(jnp.mean(around(positions, per_chain(rng_key, count)) ** 2))
