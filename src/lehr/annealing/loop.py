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

from lehr.annealing.entry import Entry, Plan, target_at
from lehr.annealing.progress import report
from lehr.annealing.tuning import SHORT_STEP, Tuning, curvature, gain, squared_scale
from lehr.annealing.weights import Particles, weigh
from lehr.kernels.base import LogDensity, Stats, Step
from lehr.kernels.line_integral import PartlyKnown, closed_loop
from lehr.programs.closure import Constants, Structure
from lehr.programs.path import Position
from lehr.programs.reverse import Level

__all__ = ["Anneal", "Draws", "LevelStats", "Mover", "anneal", "per_chain", "starter"]

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
    n = plan.num_chains
    key_start, key_levels, key_draws, key_final = (jax.random.fold_in(rng_key, i) for i in range(4))
    start, log_start = jax.vmap(starter(structure, plan, constants, times[0]))(per_chain(key_start, n))
    prior_variance = jax.tree.map(lambda q: jnp.var(q, 0), start)
    log_steps, inverse_masses = jnp.log(jnp.asarray(tuning.step_size)), jnp.asarray(tuning.scale) ** 2

    def target(t: jax.Array) -> LogDensity:
        return target_at(structure, constants, t)

    def scale(chains: Any, k: jax.Array, t: jax.Array) -> jax.Array:
        if plan.is_tuned:
            return inverse_masses[k]
        widths = structure.widths(constants, jax.tree.map(lambda leaf: leaf[0], chains.position), t)
        return squared_scale(chains.position, widths, prior_variance)

    nowhere = PartlyKnown(*[lambda _: jnp.zeros(())] * 2)
    chains = jax.vmap(lambda key, q: plan.kernel.init(key, q, nowhere))(per_chain(key_start, n), start)
    chains = chains._replace(logdensity=log_start)  # what the first weight compares with
    particles = Particles(chains, jnp.full(n, -jnp.log(n)), jnp.zeros(()), jnp.arange(n))
    enter = Entry(structure, plan, constants, times, levels)
    mover = Mover(plan, tuning.short_share)

    def level(carry: _Carry, k: jax.Array) -> tuple[_Carry, LevelStats]:
        t = times[k]
        keys = [jax.random.fold_in(jax.random.fold_in(key_levels, k), i) for i in range(4)]
        particles, log_step, bend = carry
        if plan.is_tuned:
            log_step = log_steps[k]
        bend = tuning.curvature[k - 1] if plan.is_tuned else bend
        entered = enter(k, particles, bend, tuning.moves[k] if plan.is_tuned else None, keys[2])
        chains, increment, gap, moves = entered
        nonfinite = jnp.sum(~jnp.isfinite(chains.logdensity))
        particles = particles._replace(chains=chains)
        resampled, ess = jnp.zeros((), bool), jnp.asarray(float(n))
        gap = jnp.sum(jnp.where(jnp.isfinite(gap), gap, 0.0) * jnp.exp(particles.log_weights))
        if plan.weights:
            particles, ess, resampled = weigh(particles, increment, keys[0], threshold)
        survivors = jnp.sum(jnp.bincount(particles.ancestors, length=n) > 0)

        inverse_mass = scale(particles.chains, k, t)
        chains, log_step, moved = mover(
            keys[1], particles.chains, target(t), log_step, inverse_mass, plan.num_warmup, plan.num_steps
        )
        bend = curvature(jax.vmap(plan.kernel.gradient)(chains))
        loops = _loops(structure, constants, chains, inverse_mass, t, keys[3])
        acceptance = jnp.mean(moved.acceptance_rate)
        if plan.progress:
            report(k, times.shape[0], t, acceptance, ess / n)
        stats = LevelStats(
            acceptance, jnp.exp(log_step), ess, particles.log_evidence, resampled, survivors,
            jnp.sum(moved.is_divergent), nonfinite, jnp.mean(moved.evaluations), gap, loops, inverse_mass,
            bend, moves,
        )  # fmt: skip
        return _Carry(particles._replace(chains=chains), log_step, bend), stats

    start_carry = _Carry(particles, log_steps[0], jnp.ones(inverse_masses.shape[1]))
    (particles, log_step, _), stats = jax.lax.scan(level, start_carry, jnp.arange(times.shape[0]))

    if plan.weights:
        draws = _equally_weighted(particles, key_final)
    elif not plan.num_steps:
        chains = particles.chains
        draws = _still(jax.tree.map(lambda leaf: leaf[None], (chains.position, chains.logdensity)))
    else:
        last = times.shape[0] - 1
        inverse_mass = scale(particles.chains, jnp.asarray(last), times[last])

        def draw(chains: Any, i: jax.Array) -> tuple[Any, Draws]:
            key = jax.random.fold_in(key_draws, i)
            chains, _, moved = mover(key, chains, target(times[last]), log_step, inverse_mass, 0, plan.thinning)
            return chains, Draws(chains.position, chains.logdensity, moved)

        chains, draws = jax.lax.scan(draw, particles.chains, jnp.arange(plan.num_draws))
        particles = particles._replace(chains=chains)
    chains = particles.chains
    return Anneal(
        stats, draws, chains.position, chains.logdensity, particles.log_weights, particles.log_evidence,
        particles.ancestors,
    )  # fmt: skip


def starter(structure: Structure, plan: Plan, constants: Constants, t: jax.Array) -> Any:
    """How one chain starts: ``start(key) -> (position, log start density)``.

    An ordinary latent drawn from its prior may lie where the likelihood is a cliff, and no step
    that suits the other chains would ever move it. Unweighted chains therefore choose, each for
    itself, one of ``num_starts`` draws, with the importance weights of the first level.
    """

    def draw(rng_key: jax.Array) -> tuple[Position, jax.Array]:
        position = structure.init(constants, rng_key, t)
        if not plan.counts_noise:  # as wide as one diffusion is at this level, not as a product of several
            means, copies = structure.moments(constants, position, t)[0], structure.copies(constants, position, t)
            wider = {k: m + jnp.sqrt(jnp.maximum(copies[k], 1.0)) * (position[k] - m) for k, m in means.items()}
            position = position | wider
        return position, structure.log_start(constants, position, t)

    def choose(rng_key: jax.Array) -> tuple[Position, jax.Array]:
        key_draws, key_choice = jax.random.split(rng_key)
        drawn = jax.vmap(draw)(jax.random.split(key_draws, plan.num_starts))
        weights = jax.vmap(lambda q: structure.log_density(constants, q, t))(drawn[0]) - drawn[1]
        chosen = jax.random.categorical(key_choice, jnp.where(jnp.isfinite(weights), weights, -jnp.inf))
        return jax.tree.map(lambda leaf: leaf[chosen], drawn)

    return choose if plan.num_starts > 1 else draw


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
        self.plan, self.short_share = plan, short_share
        self.step: Step = plan.kernel.build()

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

        def transition(rng_key: jax.Array, chain: Any, log_step: jax.Array) -> tuple[Any, Stats]:
            key_step, key_length = jax.random.split(rng_key)
            short = jax.random.bernoulli(key_length, jnp.asarray(self.short_share))
            step_size = jnp.exp(log_step) * jnp.where(short, SHORT_STEP, 1.0)
            return self.step(key_step, chain, target, step_size, inverse_mass)

        def one(state: tuple[Any, jax.Array, Stats], i: jax.Array) -> tuple[tuple[Any, jax.Array, Stats], None]:
            chains, log_step, sums = state
            keys = per_chain(jax.random.fold_in(rng_key, i), n)
            chains, stats = jax.vmap(transition, (0, 0, None))(keys, chains, log_step)
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


def per_chain(rng_key: jax.Array, n: int) -> jax.Array:
    """One key for each chain."""
    return jax.vmap(lambda i: jax.random.fold_in(rng_key, i))(jnp.arange(n))
