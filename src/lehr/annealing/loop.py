r"""The level loop: one compiled program that takes N chains down a ladder.

Entering level k with the points x of level k − 1, in this order:

    refresh    log π_k(x) and its gradient; nothing is remembered across levels
    weigh      log w += log π_k(x) − log π_{k−1}(x)                (at k = 0: − log start density)
    resample   systematically where ESS < threshold · N; weights become equal
    warm up    num_warmup transitions; after each, log c += γ_n (mean acceptance − target)
    move       num_steps transitions, c frozen

and after the last level, the draws that are kept. log Z accumulates log Σ W w for each
entry, with W the normalised weights before it (Del Moral, Doucet & Jasra, 2006).

The step in coordinate i is c · min(width_i(t), spread_i): the width is the path's own scale
at the level, √(α² s² + σ²); the spread is half the distance between the 16 % and 84 % quantiles
over the chains, which is what ordinary latents go by, and what a sharp likelihood makes smaller
than the width. c is pooled over chains, carried from level to level, and tuned in warm-up steps
alone. One transition in eight takes a quarter of the step, so that a chain where the density
is steeper than elsewhere can still move; tuning and the reported acceptance average over both.

Keys are folded in by name, (seed, stage, level, step, chain), so a chain's randomness does not
depend on how chains are laid out. Statistics are summed inside the scans: memory does not grow
with levels or steps.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from blackjax.smc.resampling import systematic
from jax.flatten_util import ravel_pytree

from lehr.annealing.progress import report
from lehr.kernels.base import Kernel, LogDensity, Stats, Step, refresh
from lehr.programs.closure import Constants, Structure
from lehr.programs.path import Position

__all__ = ["Anneal", "Draws", "LevelStats", "Plan", "anneal"]

PRIOR_CHAINS = 5.0  # how many chains' worth the prior spread counts in the pooled one
GAIN_DECAY = 0.6
ONE_SIGMA = (0.1587, 0.8413)  # the quantiles at ±1σ of a Gaussian
SHORT_SHARE, SHORT_STEP = 0.125, 0.25  # which share of transitions take which share of the step


class Plan(NamedTuple):
    """What is static about a run: together with the structure, it decides what is compiled.

    Attributes:
        kernel: how chains move.
        num_chains: N.
        num_starts: draws that each chain chooses its start from; 1 for weighted chains.
        num_warmup: tuned transitions at each level.
        num_steps: frozen transitions at each level.
        num_draws: draws kept of each chain after the last level; a weighted run keeps its final points.
        thinning: transitions for each kept one.
        weighted: whether chains are weighted and resampled along the path.
        progress: whether levels are reported as they finish.
    """

    kernel: Kernel
    num_chains: int
    num_starts: int
    num_warmup: int
    num_steps: int
    num_draws: int
    thinning: int
    weighted: bool
    progress: bool


class LevelStats(NamedTuple):
    """Per level: scalars; stacked over levels, shape (K,)."""

    acceptance_rate: jax.Array
    step_size: jax.Array
    ess: jax.Array
    log_evidence: jax.Array
    resampled: jax.Array
    survivors: jax.Array
    divergences: jax.Array
    nonfinite: jax.Array


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
    log_step: jax.Array


class _Carry(NamedTuple):
    chains: Any
    log_weights: jax.Array  # normalised: Σ exp = 1
    log_evidence: jax.Array
    ancestors: jax.Array
    log_step: jax.Array


def anneal(
    structure: Structure,
    plan: Plan,
    constants: Constants,
    times: jax.Array,
    rng_key: jax.Array,
    threshold: jax.Array,
    step_size: jax.Array,
) -> Anneal:
    """Run N chains down the ladder; pure, to be compiled once per (structure, plan, shapes).

    Args:
        structure: the path's functions.
        plan: what is static.
        constants: the path's data.
        times: the ladder, shape (K,).
        rng_key: the seed.
        threshold: resample where ESS < threshold · N.
        step_size: ε to start from.
    """
    n = plan.num_chains
    step = plan.kernel.build()
    key_start, key_levels, key_draws, key_final = (jax.random.fold_in(rng_key, i) for i in range(4))

    start, log_start = jax.vmap(_starter(structure, plan, constants, times[0]))(_per_chain(key_start, n))
    prior_variance = jax.tree.map(lambda q: jnp.var(q, 0), start)

    def target(t: jax.Array) -> Any:
        return lambda position: structure.log_density(constants, position, t)

    chains = jax.vmap(lambda q: plan.kernel.init(q, lambda _: jnp.zeros(())))(start)
    carry = _Carry(
        chains._replace(logdensity=log_start),  # so that the first increment is log π_0 − log start
        jnp.full(n, -jnp.log(n)),
        jnp.zeros(()),
        jnp.arange(n),
        jnp.log(step_size),
    )

    def level(carry: _Carry, now: tuple[jax.Array, jax.Array]) -> tuple[_Carry, LevelStats]:
        k, t = now
        key_resample, key_move = (jax.random.fold_in(jax.random.fold_in(key_levels, k), i) for i in range(2))
        log_density = target(t)
        fresh = jax.vmap(lambda chain: refresh(chain, log_density))(carry.chains)
        increment = fresh.logdensity - carry.chains.logdensity
        nonfinite = jnp.sum(~jnp.isfinite(fresh.logdensity))
        carry = carry._replace(chains=fresh)
        resampled, ess = jnp.zeros((), bool), jnp.asarray(float(n))
        if plan.weighted:
            carry, ess, resampled = _weigh(carry, increment, key_resample, threshold)
        survivors = jnp.sum(jnp.bincount(carry.ancestors, length=n) > 0)

        move = _mover(step, plan, log_density, _inverse_mass(structure, constants, carry, prior_variance, t))
        chains, log_step, moved = move(key_move, carry.chains, carry.log_step, plan.num_warmup, plan.num_steps)
        acceptance = jnp.mean(moved.acceptance_rate)
        if plan.progress:
            report(k, times.shape[0], t, acceptance, ess / n)
        stats = LevelStats(
            acceptance, jnp.exp(log_step), ess, carry.log_evidence, resampled, survivors,
            jnp.sum(moved.is_divergent), nonfinite,
        )  # fmt: skip
        return carry._replace(chains=chains, log_step=log_step), stats

    carry, levels = jax.lax.scan(level, carry, (jnp.arange(times.shape[0]), times))

    if plan.weighted:
        chains, draws = carry.chains, _equally_weighted(carry, key_final)
    else:
        move = _mover(
            step, plan, target(times[-1]), _inverse_mass(structure, constants, carry, prior_variance, times[-1])
        )

        def draw(chains: Any, i: jax.Array) -> tuple[Any, Draws]:
            chains, _, moved = move(jax.random.fold_in(key_draws, i), chains, carry.log_step, 0, plan.thinning)
            return chains, Draws(chains.position, chains.logdensity, moved)

        chains, draws = jax.lax.scan(draw, carry.chains, jnp.arange(plan.num_draws))
    return Anneal(
        levels, draws, chains.position, chains.logdensity, carry.log_weights, carry.log_evidence,
        carry.ancestors, carry.log_step,
    )  # fmt: skip


def _starter(structure: Structure, plan: Plan, constants: Constants, t: jax.Array) -> Any:
    """How one chain starts: ``start(key) -> (position, log start density)``.

    An ordinary latent drawn from its prior may lie where the likelihood is a cliff, and no step
    that suits the other chains would ever move it. Unweighted chains therefore choose, each for
    itself, one of ``num_starts`` draws, with the importance weights of the first level.
    """

    def draw(rng_key: jax.Array) -> tuple[Position, jax.Array]:
        position = structure.init(constants, rng_key, t)
        return position, structure.log_start(constants, position, t)

    def choose(rng_key: jax.Array) -> tuple[Position, jax.Array]:
        key_draws, key_choice = jax.random.split(rng_key)
        drawn = jax.vmap(draw)(jax.random.split(key_draws, plan.num_starts))
        weights = jax.vmap(lambda q: structure.log_density(constants, q, t))(drawn[0]) - drawn[1]
        chosen = jax.random.categorical(key_choice, jnp.where(jnp.isfinite(weights), weights, -jnp.inf))
        return jax.tree.map(lambda leaf: leaf[chosen], drawn)

    return choose if plan.num_starts > 1 else draw


def _equally_weighted(carry: _Carry, rng_key: jax.Array) -> Draws:
    """The final points, resampled once more: one draw of every chain."""
    n = carry.log_weights.shape[0]
    chosen = systematic(rng_key, jnp.exp(carry.log_weights), n)
    position, logdensity = jax.tree.map(
        lambda leaf: leaf[chosen][None], (carry.chains.position, carry.chains.logdensity)
    )
    return Draws(position, logdensity, Stats(jnp.ones((1, n)), jnp.zeros((1, n), int)))


def _weigh(
    carry: _Carry, increment: jax.Array, rng_key: jax.Array, threshold: jax.Array
) -> tuple[_Carry, jax.Array, jax.Array]:
    """Weigh, account for the evidence, and resample if the weights have become too uneven."""
    n = carry.log_weights.shape[0]
    weights = carry.log_weights + increment
    weights = jnp.where(jnp.isnan(weights), -jnp.inf, weights)  # who once had no weight gets none back
    gain = jax.nn.logsumexp(weights)
    alive = jnp.isfinite(gain)
    weights = jnp.where(alive, weights - gain, -jnp.log(n))
    ess = jnp.exp(-jax.nn.logsumexp(2 * weights))
    resample = ess < threshold * n

    def again() -> tuple[Any, jax.Array, jax.Array]:
        chosen = systematic(rng_key, jnp.exp(weights), n)
        return (*jax.tree.map(lambda leaf: leaf[chosen], (carry.chains, carry.ancestors)), jnp.full(n, -jnp.log(n)))

    chains, ancestors, weights = jax.lax.cond(resample, again, lambda: (carry.chains, carry.ancestors, weights))
    carry = carry._replace(
        chains=chains, ancestors=ancestors, log_weights=weights, log_evidence=carry.log_evidence + gain
    )
    return carry, jnp.where(alive, ess, 0.0), resample


def _inverse_mass(
    structure: Structure, constants: Constants, carry: _Carry, prior_variance: Position, t: jax.Array
) -> jax.Array:
    """The squared scale of each coordinate, flat: the lesser of width² and pooled variance."""
    position = carry.chains.position
    n = carry.log_weights.shape[0]
    widths = structure.widths(constants, jax.tree.map(lambda leaf: leaf[0], position), t)

    def squared_scale(q: jax.Array, width: jax.Array, prior: jax.Array) -> jax.Array:
        low, high = jnp.quantile(q, jnp.array(ONE_SIGMA), axis=0)
        pooled = ((high - low) / 2) ** 2
        cap = jnp.where(jnp.isfinite(width), width**2, prior + 1e-12)
        shrunk = (n * pooled + PRIOR_CHAINS * cap) / (n + PRIOR_CHAINS)
        return jnp.where(jnp.isfinite(shrunk), jnp.minimum(shrunk, width**2), cap)

    return ravel_pytree(jax.tree.map(squared_scale, position, widths, prior_variance))[0]


def _mover(step: Step, plan: Plan, log_density: LogDensity, inverse_mass: jax.Array) -> Any:
    """How all chains move at one level: ``move(key, chains, log_step, num_warmup, num_steps)``.

    Returns the chains, the step size, and of the steps that count each chain's mean acceptance and
    number of divergences, (chains,).
    """

    def move(rng_key: jax.Array, chains: Any, log_step: jax.Array, num_warmup: int, num_steps: int) -> Any:
        def one(state: tuple[Any, jax.Array, Stats], i: jax.Array) -> tuple[tuple[Any, jax.Array, Stats], None]:
            chains, log_step, sums = state

            def transition(rng_key: jax.Array, chain: Any) -> tuple[Any, Stats]:
                key_step, key_length = jax.random.split(rng_key)
                short = jax.random.bernoulli(key_length, SHORT_SHARE)
                step_size = jnp.exp(log_step) * jnp.where(short, SHORT_STEP, 1.0)
                return step(key_step, chain, log_density, step_size, inverse_mass)

            keys = _per_chain(jax.random.fold_in(rng_key, i), plan.num_chains)
            chains, stats = jax.vmap(transition)(keys, chains)
            error = jnp.mean(stats.acceptance_rate) - plan.kernel.target_acceptance
            gain = jnp.where(i < num_warmup, (i + 1.0) ** -GAIN_DECAY, 0.0)
            sums = jax.tree.map(lambda total, now: total + jnp.where(i < num_warmup, 0, now), sums, stats)
            return (chains, log_step + gain * error, sums), None

        none = Stats(jnp.zeros(plan.num_chains), jnp.zeros(plan.num_chains, int))
        (chains, log_step, sums), _ = jax.lax.scan(one, (chains, log_step, none), jnp.arange(num_warmup + num_steps))
        return chains, log_step, sums._replace(acceptance_rate=sums.acceptance_rate / num_steps)

    return move


def _per_chain(rng_key: jax.Array, n: int) -> jax.Array:
    return jax.vmap(lambda i: jax.random.fold_in(rng_key, i))(jnp.arange(n))
