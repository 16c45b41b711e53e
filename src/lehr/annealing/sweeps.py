r"""Sweeps of replica exchange: chains at all levels at once, which move and swap places.

One sweep is num_steps transitions of a kernel at every level, and one offer to swap between
every second pair of neighbours, even and odd pairs in turn (the non-reversible order, in which a
chain that has begun to move down goes on to). A swap of levels k and k + 1 carries each chain to the other level
by x ↦ m + (s/s')(x − m'), with m and s the mean and scale of the diffusion at the two levels, ordinary
latents as they are, and is accepted with probability

    min(1, π_k(T x_{k+1}) π_{k+1}(T⁻¹ x_k) / (π_k(x_k) π_{k+1}(x_{k+1}))),

the Jacobians of T and T⁻¹ being reciprocal. Every level is left invariant. A *round trip* is a chain's way from
the noisiest level to the cleanest and back.

The N sets of K chains know nothing of each other, so a sweep is a function of one set, laid over all of them as
chains are elsewhere. A sweep of the warm-up and a kept draw are one *stage* each, and the run stands in one
:class:`Sweeping` after any of them, as that of :mod:`lehr.annealing.loop` does.

References:
    Swendsen & Wang, Replica Monte Carlo simulation of spin glasses, PRL 1986; Geyer, 1991.
    Syed, Bouchard-Côté, Deligiannidis & Doucet, Non-reversible parallel tempering, JRSS B 2022.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lehr.annealing.entry import target_at
from lehr.annealing.keys import per_chain
from lehr.annealing.layout import Layout
from lehr.annealing.plan import Plan
from lehr.annealing.stages import put, strong
from lehr.annealing.tuning import Tuning, with_short_steps
from lehr.kernels.base import Stats
from lehr.programs.closure import Constants, Structure
from lehr.programs.path import Position

__all__ = ["Replicas", "Sums", "Sweeping", "begin_sweeps", "sweep_on", "with_room"]


class Replicas(NamedTuple):
    """A set of replicas, one chain at each of K levels; stacked over N sets.

    Attributes:
        chains: kernel states, (K, ...).
        visited: 1 if the noisiest level was visited later than the cleanest, −1 if earlier, 0 if neither, (K,).
        round_trips: that ended so far.
    """

    chains: Any
    visited: jax.Array
    round_trips: jax.Array


class Sums(NamedTuple):
    """Totals by level, (K,), over the sweeps of the draws that are kept.

    Means over the sets of acceptance rates, of the chance of a swap with the next cleaner level, and of evaluations;
    and the number of divergences of all.
    """

    acceptance_rate: jax.Array
    swap_rate: jax.Array
    divergences: jax.Array
    evaluations: jax.Array


class Sweeping(NamedTuple):
    """Where a run stands.

    Attributes:
        done: stages that are behind it: sweeps of the warm-up, and then draws.
        sweep: how many sweeps were ever made; it names their randomness.
        replicas: N sets.
        draws: position and log density at the last level, leaves (draws, N, ...); zeros for those yet to come.
        sums: of the draws so far.
    """

    done: jax.Array
    sweep: jax.Array
    replicas: Replicas
    draws: tuple[Position, jax.Array]
    sums: Sums


def begin_sweeps(
    structure: Structure, plan: Plan, constants: Constants, times: jax.Array, rng_key: jax.Array
) -> Sweeping:
    """Every level starts from its own Gaussian summary, latents from their prior.

    Args:
        structure: the path's functions.
        plan: what is static.
        constants: the path's data.
        times: the ladder, (K,).
        rng_key: for the starts.
    """

    def level(key: jax.Array, t: jax.Array) -> Any:
        key_position, key_state = jax.random.split(key)
        position = structure.init(constants, key_position, t)
        return plan.kernel.init(key_state, position, target_at(structure, constants, t))

    def one(key: jax.Array) -> Replicas:
        chains = jax.vmap(level)(per_chain(key, times.size), times)
        return Replicas(chains, jnp.zeros(times.size, int), jnp.zeros((), int))

    replicas = plan.layout.over(one)(per_chain(rng_key, plan.num_chains))
    return with_room(plan, replicas, jnp.zeros((), int))


def with_room(plan: Plan, replicas: Replicas, sweep: jax.Array) -> Sweeping:
    """The state of replicas from which ``plan.num_draws`` draws are yet to be made, after so many sweeps."""
    last = _last(replicas)
    draws = jax.tree.map(lambda leaf: jnp.zeros((plan.num_draws, *leaf.shape), leaf.dtype), last)
    zero = jnp.zeros(replicas.visited.shape[1])
    state = Sweeping(jnp.zeros((), int), sweep, replicas, draws, Sums(zero, zero, zero.astype(int), zero))
    return _laid_out(strong(state), plan.layout)


def sweep_on(
    structure: Structure,
    plan: Plan,
    constants: Constants,
    times: jax.Array,
    tuning: Tuning,
    rng_key: jax.Array,
    num_warmup: jax.Array,
    state: Sweeping,
    stop: jax.Array,
) -> Sweeping:
    """Go on until ``stop`` stages are done; pure, to be compiled once per (structure, plan, shapes).

    Args:
        structure: the path's functions, with ``moments``.
        plan: what is static: ``num_steps`` transitions in a sweep, ``thinning`` sweeps for each draw.
        constants: the path's data.
        times: the ladder, (K,).
        tuning: steps (K,) and scales (K, D).
        rng_key: the seed; sweeps are told apart by their number.
        num_warmup: sweeps before the draws.
        state: where to go on from.
        stop: at most ``num_warmup`` and the draws that there is room for.
    """
    sweep = _Sweep(structure, plan, constants, times, tuning, state.replicas)

    def swept(replicas: Replicas, number: jax.Array) -> tuple[Replicas, Sums]:
        keys = per_chain(jax.random.fold_in(rng_key, number), plan.num_chains)
        replicas, each = plan.layout.over(lambda key, one: sweep(key, one, number))(keys, replicas)
        means = jax.tree.map(lambda leaf: jnp.mean(leaf, 0), each)
        return replicas, means._replace(divergences=jnp.sum(each.divergences, 0))

    def warm_up(state: Sweeping) -> Sweeping:
        replicas, _ = swept(state.replicas, state.sweep)
        state = state._replace(done=state.done + 1, sweep=state.sweep + 1, replicas=replicas)
        return _laid_out(state, plan.layout)

    def draw(state: Sweeping) -> Sweeping:
        replicas, sums = jax.lax.scan(swept, state.replicas, state.sweep + jnp.arange(plan.thinning))
        total = jax.tree.map(lambda so_far, new: so_far + jnp.sum(new, 0), state.sums, sums)
        i = state.done - num_warmup
        draws = put(state.draws, _last(replicas), i)
        return _laid_out(Sweeping(state.done + 1, state.sweep + plan.thinning, replicas, draws, total), plan.layout)

    state = jax.lax.while_loop(lambda s: s.done < jnp.minimum(stop, num_warmup), warm_up, state)
    return jax.lax.while_loop(lambda s: (num_warmup <= s.done) & (s.done < stop), draw, state)


class _Sweep:
    """``sweep(key, replicas, number)``: one set after one sweep, and what happened at each level."""

    def __init__(
        self,
        structure: Structure,
        plan: Plan,
        constants: Constants,
        times: jax.Array,
        tuning: Tuning,
        replicas: Replicas,
    ) -> None:
        self.structure, self.kernel, self.constants, self.times = structure, plan.kernel, constants, times
        self.num_steps, self.step = plan.num_steps, with_short_steps(plan.kernel.build(), tuning.short_share)
        self.step_sizes, self.masses = tuning.step_size, jnp.asarray(tuning.scale) ** 2
        some = jax.tree.map(lambda leaf: leaf[0, 0], replicas.chains.position)
        self.means, self.stds = jax.vmap(lambda t: structure.moments(constants, some, t))(times)

    def __call__(self, rng_key: jax.Array, replicas: Replicas, number: jax.Array) -> tuple[Replicas, Sums]:
        levels = jnp.arange(self.times.size)
        key_move, key_swap = jax.random.split(rng_key)
        chains, moved = jax.vmap(self._move)(per_chain(key_move, levels.size), replicas.chains, levels)
        partner = _partners(levels, number)
        offered = jax.tree.map(lambda leaf: leaf[partner], chains)
        offered = jax.vmap(self._carried)(offered, levels, partner)
        change = jnp.where(partner == levels, 0.0, offered.logdensity - chains.logdensity)
        log_ratio = change + change[partner]
        uniform = jax.random.uniform(key_swap, (levels.size,))[jnp.minimum(levels, partner)]  # one for both of a pair
        accepted = (jnp.log(uniform) < log_ratio) & (partner != levels)

        def swapped(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(accepted.reshape(-1, *[1] * (new.ndim - 1)), new, old)

        chains = jax.tree.map(swapped, offered, chains)
        visited, returned = _visits(swapped(replicas.visited[partner], replicas.visited))
        chance = jnp.exp(jnp.minimum(jnp.nan_to_num(log_ratio, nan=-jnp.inf), 0.0))
        happened = Sums(
            moved.acceptance_rate,
            jnp.where(partner > levels, chance, 0.0),
            moved.is_divergent,
            jnp.asarray(moved.evaluations),
        )
        return Replicas(chains, visited, replicas.round_trips + returned), happened

    def _move(self, rng_key: jax.Array, chain: Any, k: jax.Array) -> tuple[Any, Stats]:
        """One chain at level k: ``num_steps`` transitions, with their mean acceptance and totals of the rest."""
        target = target_at(self.structure, self.constants, self.times[k])

        def one(chain: Any, key: jax.Array) -> tuple[Any, Stats]:
            return self.step(key, chain, target, self.step_sizes[k], self.masses[k])

        chain, stats = jax.lax.scan(one, chain, jax.random.split(rng_key, self.num_steps))
        return chain, Stats(jnp.mean(stats.acceptance_rate), jnp.sum(stats.is_divergent), jnp.sum(stats.evaluations))

    def _carried(self, chain: Any, k: jax.Array, origin: jax.Array) -> Any:
        """A chain of level ``origin`` as it would be at level k."""
        position = dict(chain.position)
        for name in self.structure.diffusion_sites:
            mean, std = self.means[name], self.stds[name]
            position[name] = mean[k] + std[k] / std[origin] * (position[name] - mean[origin])
        target = target_at(self.structure, self.constants, self.times[k])
        return self.kernel.refresh(chain._replace(position=position), target)


def _partners(levels: jax.Array, number: jax.Array) -> jax.Array:
    """The level that each may swap with in a sweep; itself where there is none."""
    asks = (levels + number) % 2 == 0  # the next, cleaner one
    return jnp.clip(jnp.where(asks, levels + 1, levels - 1), 0, levels.size - 1)


def _visits(visited: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What each chain visited last, after a sweep, and whether the one at the noisiest level ended a trip."""
    returned = visited[0] == -1
    down = jnp.where(visited[-1] == 1, -1, visited[-1])
    return visited.at[0].set(1).at[-1].set(down), returned


def _last(replicas: Replicas) -> tuple[Position, jax.Array]:
    """Position and log density of every set at the last level."""
    return jax.tree.map(lambda leaf: leaf[:, -1], (replicas.chains.position, replicas.chains.logdensity))


def _laid_out(state: Sweeping, layout: Layout) -> Sweeping:
    """The same state, with its sets on the devices that they belong to, and all else on every one."""
    done, sweep, sums = layout.spread((state.done, state.sweep, state.sums), axis=None)
    return Sweeping(done, sweep, layout.spread(state.replicas), layout.spread(state.draws, axis=1), sums)
