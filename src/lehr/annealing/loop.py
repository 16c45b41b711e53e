r"""The level loop: N chains go down a ladder, as far as they are told.

Entering level k with the points x' of level k − 1, in this order:

    predict    x' → x, where there is a predictor or weights follow the path
    refresh    log π_k(x) and its gradient; nothing is remembered across levels
    weigh      log weights, evidence, resampling                      (lehr.annealing.weights)
    warm up    num_warmup transitions that tune the step              (lehr.annealing.tuning)
    move       num_steps transitions under π_k, nothing tuned: the corrector

and after the last level, the draws that are kept. A level and a kept draw are one *stage* each. All that
the next stage needs is one :class:`~lehr.annealing.state.State`, so a run may be stopped after any of them and taken up
again: :func:`advance` goes on from one state to a later one, in one compiled program whatever the number of stages.

Keys are folded in by name, (seed, stage, level, step, chain), so a chain's randomness does not
depend on how chains are laid out, nor on where a run was stopped. Statistics are summed inside the loops: memory
does not grow with steps.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lehr.annealing.entry import Entry, conditional_ess, is_sound, target_at
from lehr.annealing.keys import per_chain
from lehr.annealing.mover import Mover
from lehr.annealing.plan import Plan
from lehr.annealing.stages import put
from lehr.annealing.state import Draws, LevelStats, State, laid_out
from lehr.annealing.tuning import Tuning, curvature, pooled_scale
from lehr.annealing.weights import overall, weigh
from lehr.kernels.line_integral import closed_loop
from lehr.programs.closure import Constants, Structure
from lehr.programs.ratios import Level

__all__ = ["advance", "num_loops"]

LOOPS = 32  # the most chains at which the score is integrated round a closed loop
CHAINS_PER_LOOP = 64  # so that the loops cost about a quarter of an evaluation of each chain


def num_loops(plan: Plan) -> int:
    """At how many chains the score is integrated round a closed loop."""
    return min(LOOPS, max(plan.num_chains // CHAINS_PER_LOOP, 2), plan.num_chains)


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
    descent = _Descent(structure, plan, constants, times, noise, tuning, rng_key, threshold)
    num_levels = times.shape[0]
    state = jax.lax.while_loop(lambda s: s.done < jnp.minimum(stop, num_levels), descent.level, state)
    if plan.num_draws:
        state = jax.lax.while_loop(lambda s: (num_levels <= s.done) & (s.done < stop), descent.draw, state)
    return state


class _Descent:
    """One stage more: a level, or a kept draw. What it is made of are the arguments of :func:`advance`."""

    def __init__(
        self,
        structure: Structure,
        plan: Plan,
        constants: Constants,
        times: jax.Array,
        noise: Level,
        tuning: Tuning,
        rng_key: jax.Array,
        threshold: jax.Array,
    ) -> None:
        self.structure, self.plan, self.constants, self.times = structure, plan, constants, times
        self.tuning, self.rng_key, self.threshold = tuning, rng_key, threshold
        self.enter = Entry(structure, plan, constants, times, noise)
        self.move = Mover(plan, tuning.short_share)
        self.gradients = jax.vmap(plan.kernel.gradient)

    def level(self, state: State) -> State:
        """Enter the next level, weigh, and move there."""
        plan, k = self.plan, state.done
        key_resample, key_move, key_enter, key_loops, key_bend = _keys(self.rng_key, 1, k, 5)
        log_step, bend, decided = state.log_step, state.curvature, None
        if plan.is_tuned:
            log_step, decided = jnp.log(self.tuning.step_size[k]), self.tuning.moves[k]
            bend = self.tuning.curvature[k - 1]
        entered = self.enter(k, state.particles, bend, decided, key_enter)
        before = overall(state.particles)
        particles = state.particles._replace(chains=entered.chains)
        resampled, ess, kept = jnp.zeros((), bool), jnp.asarray(float(plan.num_chains)), jnp.ones(())
        if plan.weights:
            kept = conditional_ess(before, entered.increment)
            particles, ess, resampled = weigh(particles, entered.increment, key_resample, self.threshold, plan.layout)
        target = target_at(self.structure, self.constants, self.times[k])
        inverse_mass = self._inverse_mass(k, particles.chains.position, state.start_variance)
        chains, log_step, moved = self.move(
            key_move, particles.chains, target, log_step, inverse_mass, plan.num_warmup, plan.num_steps
        )
        if plan.is_tuned:
            bend = self.tuning.curvature[k]
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
            nonfinite=jnp.sum(~jax.vmap(is_sound)((entered.chains.logdensity, self.gradients(entered.chains)))),
            evaluations=jnp.mean(moved.evaluations),
            gap=jnp.sum(jnp.where(jnp.isfinite(entered.gap), entered.gap, 0.0) * jnp.exp(before)),
            correction=entered.typical_correction(before),
            loop_integral=self._loop_integral(chains, inverse_mass, self.times[k], key_loops),
            inverse_mass=inverse_mass,
            curvature=bend,
            moves=entered.moves,
        )
        levels = put(state.levels, stats, k)
        return laid_out(State(k + 1, particles, log_step, bend, state.start_variance, levels, state.draws), plan)

    def draw(self, state: State) -> State:
        """Independent chains go on at the last level; one draw of each is kept."""
        i = state.done - self.times.shape[0]
        (key,) = _keys(self.rng_key, 2, i, 1)
        target = target_at(self.structure, self.constants, self.times[-1])
        scale = state.levels.inverse_mass[-1]
        chains, _, moved = self.move(key, state.particles.chains, target, state.log_step, scale, 0, self.plan.thinning)
        draws = put(state.draws, Draws(chains.position, chains.logdensity, moved), i)
        state = state._replace(done=state.done + 1, particles=state.particles._replace(chains=chains), draws=draws)
        return laid_out(state, self.plan)

    def _inverse_mass(self, k: jax.Array, position: Any, start_variance: Any) -> jax.Array:
        """The squared scale (D,) at level k: as it was tuned, or pooled from where the chains are."""
        if self.plan.is_tuned:
            return self.tuning.scale[k] ** 2
        return pooled_scale(self.structure, self.constants, position, self.times[k], start_variance)

    def _loop_integral(self, chains: Any, inverse_mass: jax.Array, t: jax.Array, rng_key: jax.Array) -> jax.Array:
        """Root mean square over chains of the score's closed-loop integral."""
        if "unknown" not in self.structure:
            return jnp.zeros(())
        count = num_loops(self.plan)
        positions = jax.tree.map(lambda leaf: leaf[:count], chains.position)
        unknown = lambda q: self.structure.unknown(self.constants, q, t)  # noqa: E731
        loop = lambda q, key: closed_loop(unknown, q, jnp.sqrt(inverse_mass), key)  # noqa: E731
        around = self.plan.layout._replace(mesh=None).over(loop)
        return jnp.sqrt(jnp.mean(around(positions, per_chain(rng_key, count)) ** 2))


def _keys(rng_key: jax.Array, stage: int, i: jax.Array, count: int) -> list[jax.Array]:
    key = jax.random.fold_in(jax.random.fold_in(rng_key, stage), i)
    return [jax.random.fold_in(key, j) for j in range(count)]
