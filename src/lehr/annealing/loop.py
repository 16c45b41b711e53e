r"""The level loop: one compiled program that takes N chains down a ladder.

Entering level k with the points x' of level k − 1, in this order:

    predict    x' → x, where there is a predictor or weights follow the path
    refresh    log π_k(x) and its gradient; nothing is remembered across levels
    weigh      log weights, evidence, resampling                      (lehr.annealing.weights)
    warm up    num_warmup transitions that tune the step              (lehr.annealing.tuning)
    move       num_steps transitions under π_k, nothing tuned: the corrector

and after the last level, the draws that are kept.

Keys are folded in by name, (seed, stage, level, step, chain), so a chain's randomness does not
depend on how chains are laid out. Statistics are summed inside the scans: memory does not grow
with levels or steps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from blackjax.smc.resampling import systematic
from numpy.typing import ArrayLike

from lehr.annealing.entry import Entry, target_at
from lehr.annealing.keys import per_chain
from lehr.annealing.plan import Plan
from lehr.annealing.progress import report
from lehr.annealing.start import begin
from lehr.annealing.tuning import Tuning, curvature, gain, pooled_scale, with_short_steps
from lehr.annealing.weights import Particles, weigh
from lehr.kernels.base import LogDensity, Stats
from lehr.kernels.line_integral import closed_loop
from lehr.programs.closure import Constants, Structure
from lehr.programs.path import Position
from lehr.programs.reverse import Level

__all__ = ["LOOPS", "Anneal", "Draws", "LevelStats", "Mover", "anneal"]

LOOPS = 32  # chains at which the score is integrated round a closed loop


class LevelStats(NamedTuple):
    """Per level: scalars, and the squared scale (D,); stacked over levels."""

    acceptance_rate: jax.Array
    step_size: jax.Array
    ess: jax.Array
    log_evidence: jax.Array
    resampled: jax.Array
    survivors: jax.Array
    divergences: jax.Array
    nonfinite: jax.Array
    evaluations: jax.Array
    gap: jax.Array
    loop_integral: jax.Array
    inverse_mass: jax.Array
    curvature: jax.Array
    moves: jax.Array


class Draws(NamedTuple):
    """Kept draws; leaves have shape (draws, chains, ...)."""

    position: Position
    logdensity: jax.Array
    stats: Stats


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


class _Carry(NamedTuple):
    particles: Particles
    log_step: jax.Array
    curvature: jax.Array


def anneal(
    structure: Structure,
    plan: Plan,
    constants: Constants,
    times: jax.Array,
    levels: Level,
    tuning: Tuning,
    rng_key: jax.Array,
    threshold: jax.Array,
) -> Anneal:
    """Run N chains down the ladder; pure, to be compiled once per (structure, plan, shapes).

    Args:
        structure: the path's functions.
        plan: what is static.
        constants: the path's data.
        times: the ladder, shape (K,).
        levels: the noise at those times, each (K,).
        tuning: steps (K,) and scales (K, D); without ``plan.is_tuned`` the first step is where tuning starts.
        rng_key: the seed.
        threshold: resample where ESS < threshold · N.
    """
    n, last = plan.num_chains, times.shape[0] - 1
    key_start, key_levels, key_draws, key_final = (jax.random.fold_in(rng_key, i) for i in range(4))
    particles = begin(structure, plan, constants, times[0], key_start)
    prior_variance = jax.tree.map(lambda q: jnp.var(q, 0), particles.chains.position)
    log_steps, inverse_masses = jnp.log(jnp.asarray(tuning.step_size)), jnp.asarray(tuning.scale) ** 2
    enter = Entry(structure, plan, constants, times, levels)
    move = Mover(plan, tuning.short_share)

    def scale(chains: Any, k: jax.Array | int) -> jax.Array:
        if plan.is_tuned:
            return inverse_masses[k]
        return pooled_scale(structure, constants, chains.position, times[k], prior_variance)

    def level(carry: _Carry, k: jax.Array) -> tuple[_Carry, LevelStats]:
        particles, log_step, bend = carry
        key_resample, key_move, key_enter, key_loops = (
            jax.random.fold_in(jax.random.fold_in(key_levels, k), i) for i in range(4)
        )
        decided = None
        if plan.is_tuned:
            log_step, bend, decided = log_steps[k], tuning.curvature[k - 1], tuning.moves[k]
        entered = enter(k, particles, bend, decided, key_enter)
        particles = particles._replace(chains=entered.chains)
        finite_gap = jnp.where(jnp.isfinite(entered.gap), entered.gap, 0.0)
        gap = jnp.sum(finite_gap * jnp.exp(particles.log_weights))
        resampled, ess = jnp.zeros((), bool), jnp.asarray(float(n))
        if plan.weights:
            particles, ess, resampled = weigh(particles, entered.increment, key_resample, threshold)
        inverse_mass = scale(particles.chains, k)
        target = target_at(structure, constants, times[k])
        chains, log_step, moved = move(
            key_move, particles.chains, target, log_step, inverse_mass, plan.num_warmup, plan.num_steps
        )
        bend = curvature(jax.vmap(plan.kernel.gradient)(chains))
        acceptance = jnp.mean(moved.acceptance_rate)
        if plan.progress:
            report(k, times.shape[0], times[k], acceptance, ess / n)
        stats = LevelStats(
            acceptance_rate=acceptance,
            step_size=jnp.exp(log_step),
            ess=ess,
            log_evidence=particles.log_evidence,
            resampled=resampled,
            survivors=jnp.sum(jnp.bincount(particles.ancestors, length=n) > 0),
            divergences=jnp.sum(moved.is_divergent),
            nonfinite=jnp.sum(~jnp.isfinite(entered.chains.logdensity)),
            evaluations=jnp.mean(moved.evaluations),
            gap=gap,
            loop_integral=_loops(structure, constants, chains, inverse_mass, times[k], key_loops),
            inverse_mass=inverse_mass,
            curvature=bend,
            moves=entered.moves,
        )
        return _Carry(particles._replace(chains=chains), log_step, bend), stats

    carry = _Carry(particles, log_steps[0], jnp.ones(inverse_masses.shape[1]))
    (particles, log_step, _), stats = jax.lax.scan(level, carry, jnp.arange(times.shape[0]))
    chains = particles.chains
    if plan.weights:
        draws = _equally_weighted(particles, key_final)
    elif not plan.num_steps:
        draws = _still(jax.tree.map(lambda leaf: leaf[None], (chains.position, chains.logdensity)))
    else:
        target = target_at(structure, constants, times[last])
        chains, draws = _sampled(plan, move, chains, target, log_step, scale(chains, last), key_draws)
    return Anneal(
        stats, draws, chains.position, chains.logdensity, particles.log_weights, particles.log_evidence,
        particles.ancestors, particles.scatter,
    )  # fmt: skip


def _sampled(
    plan: Plan,
    move: Mover,
    chains: Any,
    target: LogDensity,
    log_step: jax.Array,
    inverse_mass: jax.Array,
    rng_key: jax.Array,
) -> tuple[Any, Draws]:
    """Independent chains go on at the last level, and a draw of each is kept every ``thinning`` transitions."""

    def draw(chains: Any, i: jax.Array) -> tuple[Any, Draws]:
        key = jax.random.fold_in(rng_key, i)
        chains, _, moved = move(key, chains, target, log_step, inverse_mass, 0, plan.thinning)
        return chains, Draws(chains.position, chains.logdensity, moved)

    return jax.lax.scan(draw, chains, jnp.arange(plan.num_draws))


def _equally_weighted(particles: Particles, rng_key: jax.Array) -> Draws:
    """The final points, resampled once more: one draw of every chain."""
    n = particles.log_weights.shape[0]
    chosen = systematic(rng_key, jnp.exp(particles.log_weights), n)
    chains = particles.chains
    return _still(jax.tree.map(lambda leaf: leaf[chosen][None], (chains.position, chains.logdensity)))


def _still(draws: tuple[Position, jax.Array]) -> Draws:
    """Draws that no transition was made for."""
    position, logdensity = draws
    none = jnp.zeros(logdensity.shape, int)
    return Draws(position, logdensity, Stats(jnp.ones_like(logdensity), none, none))


def _loops(
    structure: Structure, constants: Constants, chains: Any, inverse_mass: jax.Array, t: jax.Array, rng_key: jax.Array
) -> jax.Array:
    """Root mean square over chains of the score's closed-loop integral."""
    if "unknown" not in structure:
        return jnp.zeros(())
    positions = jax.tree.map(lambda leaf: leaf[:LOOPS], chains.position)
    count = jax.tree.leaves(positions)[0].shape[0]
    unknown = lambda q: structure.unknown(constants, q, t)  # noqa: E731
    loop = jax.vmap(lambda q, key: closed_loop(unknown, q, jnp.sqrt(inverse_mass), key))
    return jnp.sqrt(jnp.mean(loop(positions, per_chain(rng_key, count)) ** 2))


class Mover:
    """How all chains move at one level.

    ``move(key, chains, target, log_step, inverse_mass, num_warmup, num_steps)`` returns the chains, the
    step size, and for each chain the mean acceptance and number of divergences of the steps that
    count, and the evaluations of all, (chains,).
    """

    def __init__(self, plan: Plan, short_share: ArrayLike) -> None:
        self.plan, self.step = plan, with_short_steps(plan.kernel.build(), short_share)

    def __call__(
        self,
        rng_key: jax.Array,
        chains: Any,
        target: LogDensity,
        log_step: jax.Array,
        inverse_mass: jax.Array,
        num_warmup: int,
        num_steps: int,
    ) -> tuple[Any, jax.Array, Stats]:
        n = self.plan.num_chains
        none = Stats(jnp.zeros(n), jnp.zeros(n, int), jnp.zeros(n, int))
        if num_warmup + num_steps == 0:
            return chains, log_step, none

        def one(state: tuple[Any, jax.Array, Stats], i: jax.Array) -> tuple[tuple[Any, jax.Array, Stats], None]:
            chains, log_step, sums = state
            keys = per_chain(jax.random.fold_in(rng_key, i), n)
            step_size = jnp.exp(log_step)
            chains, stats = jax.vmap(lambda key, chain: self.step(key, chain, target, step_size, inverse_mass))(
                keys, chains
            )
            error = jnp.mean(stats.acceptance_rate) - self.plan.kernel.target_acceptance
            counts = i >= num_warmup
            sums = Stats(
                sums.acceptance_rate + jnp.where(counts, stats.acceptance_rate, 0.0),
                sums.is_divergent + jnp.where(counts, stats.is_divergent, 0),
                sums.evaluations + stats.evaluations,
            )
            return (chains, log_step + gain(i, num_warmup) * error, sums), None

        (chains, log_step, sums), _ = jax.lax.scan(one, (chains, log_step, none), jnp.arange(num_warmup + num_steps))
        return chains, log_step, sums._replace(acceptance_rate=sums.acceptance_rate / max(num_steps, 1))
