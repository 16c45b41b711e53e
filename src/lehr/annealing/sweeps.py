r"""Sweeps of replica exchange: chains at all levels at once, which move and swap places.

One sweep is num_steps transitions of a kernel at every level, and one offer to swap between
every second pair of neighbours, even and odd pairs in turn (the non-reversible order, in which a
chain that has begun to move down goes on to). A swap of levels k and k + 1 carries each chain to the other level
by x ↦ m + (s/s')(x − m'), with m and s the mean and scale of the diffusion at the two levels, ordinary
latents as they are, and is accepted with probability

    min(1, π_k(T x_{k+1}) π_{k+1}(T⁻¹ x_k) / (π_k(x_k) π_{k+1}(x_{k+1}))),

the Jacobians of T and T⁻¹ being reciprocal. Every level is left invariant. A *round trip* is a chain's way from
the noisiest level to the cleanest and back.

References:
    Swendsen & Wang, Replica Monte Carlo simulation of spin glasses, PRL 1986; Geyer, 1991.
    Syed, Bouchard-Côté, Deligiannidis & Doucet, Non-reversible parallel tempering, JRSS B 2022.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lehr.annealing.entry import target_at
from lehr.annealing.keys import per_chain
from lehr.annealing.tuning import Tuning, with_short_steps
from lehr.kernels.base import Kernel, Stats
from lehr.programs.closure import Constants, Structure
from lehr.programs.path import Position

__all__ = ["Replicas", "Sums", "begin", "sweeps"]


class Replicas(NamedTuple):
    """N chains at each of K levels.

    Attributes:
        chains: kernel states, stacked, (K, N).
        visited: 1 if the noisiest level was visited later than the cleanest, −1 if earlier, 0 if neither, (K, N).
        round_trips: that ended so far, (N,).
        sweep: how many were made.
    """

    chains: Any
    visited: jax.Array
    round_trips: jax.Array
    sweep: jax.Array


class Sums(NamedTuple):
    """Statistics of sweeps by level, (K,): mean rates, the swaps being those with the next cleaner level; total
    divergences; and the total over sweeps of the evaluations of one chain."""

    acceptance_rate: jax.Array
    swap_rate: jax.Array
    divergences: jax.Array
    evaluations: jax.Array


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def begin(
    structure: Structure, kernel: Kernel, num_chains: int, constants: Constants, times: jax.Array, rng_key: jax.Array
) -> Replicas:
    """Every level starts from its own Gaussian summary, latents from their prior.

    Args:
        structure: the path's functions.
        kernel: whose states the chains are.
        num_chains: N.
        constants: the path's data.
        times: the ladder, (K,).
        rng_key: for the draws.
    """

    def one(key: jax.Array, t: jax.Array) -> Any:
        key_position, key_state = jax.random.split(key)
        position = structure.init(constants, key_position, t)
        return kernel.init(key_state, position, target_at(structure, constants, t))

    def level(k: jax.Array, t: jax.Array) -> Any:
        return jax.vmap(lambda key: one(key, t))(per_chain(jax.random.fold_in(rng_key, k), num_chains))

    chains = jax.vmap(level)(jnp.arange(times.size), times)
    return Replicas(chains, jnp.zeros((times.size, num_chains), int), jnp.zeros(num_chains, int), jnp.zeros((), int))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def sweeps(
    structure: Structure,
    kernel: Kernel,
    num_steps: int,
    num_draws: int,
    thinning: int,
    constants: Constants,
    times: jax.Array,
    tuning: Tuning,
    rng_key: jax.Array,
    replicas: Replicas,
) -> tuple[Replicas, tuple[Position, jax.Array], Sums]:
    """``num_draws · thinning`` sweeps.

    Args:
        structure: the path's functions, with ``moments``.
        kernel: how chains move at a level.
        num_steps: transitions of each chain in a sweep.
        num_draws: of the last level, one after every ``thinning`` sweeps.
        thinning: sweeps for each draw.
        constants: the path's data.
        times: the ladder, (K,).
        tuning: steps (K,) and scales (K, D).
        rng_key: the seed; sweeps are told apart by their number.
        replicas: to go on from.

    Returns:
        The replicas; position and log density at the last level, leaves (num_draws, N, ...); and statistics.
    """
    one = _Sweep(structure, kernel, num_steps, constants, times, tuning, rng_key, replicas)

    def draw(replicas: Replicas, _: None) -> tuple[Replicas, Any]:
        replicas, sums = jax.lax.scan(one, replicas, None, length=thinning)
        last = jax.tree.map(lambda leaf: leaf[-1], (replicas.chains.position, replicas.chains.logdensity))
        return replicas, (last, jax.tree.map(lambda leaf: jnp.sum(leaf, 0), sums))

    replicas, (draws, sums) = jax.lax.scan(draw, replicas, None, length=num_draws)
    total = jax.tree.map(lambda leaf: jnp.sum(leaf, 0), sums)
    count = num_draws * thinning
    rates = Sums(total.acceptance_rate / count, total.swap_rate / (count / 2), total.divergences, total.evaluations)
    return replicas, draws, rates


class _Sweep:
    """``sweep(replicas, None) -> (replicas, Sums)``, the statistics being those of one sweep."""

    def __init__(
        self,
        structure: Structure,
        kernel: Kernel,
        num_steps: int,
        constants: Constants,
        times: jax.Array,
        tuning: Tuning,
        rng_key: jax.Array,
        replicas: Replicas,
    ) -> None:
        self.structure, self.kernel, self.constants, self.times = structure, kernel, constants, times
        self.num_steps, self.rng_key = num_steps, rng_key
        self.step = with_short_steps(kernel.build(), tuning.short_share)
        self.step_sizes, self.masses = tuning.step_size, jnp.asarray(tuning.scale) ** 2
        some = jax.tree.map(lambda leaf: leaf[0, 0], replicas.chains.position)
        self.means, self.stds = jax.vmap(lambda t: structure.moments(constants, some, t))(times)

    def __call__(self, replicas: Replicas, _: None) -> tuple[Replicas, Sums]:
        size, n = replicas.visited.shape
        levels = jnp.arange(size)
        key_move, key_swap = jax.random.split(jax.random.fold_in(self.rng_key, replicas.sweep))
        keys = jax.vmap(lambda k: per_chain(jax.random.fold_in(key_move, k), n))(levels)
        chains, moved = jax.vmap(jax.vmap(self._move, (0, 0, None)))(keys, replicas.chains, levels)
        partner = _partners(levels, replicas.sweep)
        offered = jax.tree.map(lambda leaf: leaf[partner], chains)
        offered = jax.vmap(jax.vmap(self._carried, (0, None, None)))(offered, levels, partner)
        change = jnp.where((partner == levels)[:, None], 0.0, offered.logdensity - chains.logdensity)
        log_ratio = change + change[partner]
        uniform = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(key_swap, k), (n,)))(levels)
        uniform = uniform[jnp.minimum(levels, partner)]  # one number for both of a pair
        accepted = (jnp.log(uniform) < log_ratio) & (partner != levels)[:, None]

        def swapped(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(accepted.reshape(size, n, *[1] * (new.ndim - 2)), new, old)

        chains = jax.tree.map(swapped, offered, chains)
        visited, returned = _visits(swapped(replicas.visited[partner], replicas.visited))
        chance = jnp.mean(jnp.exp(jnp.minimum(jnp.nan_to_num(log_ratio, nan=-jnp.inf), 0.0)), 1)
        sums = Sums(
            acceptance_rate=jnp.mean(moved.acceptance_rate, 1),
            swap_rate=jnp.where(partner > levels, chance, 0.0),
            divergences=jnp.sum(moved.is_divergent, 1),
            evaluations=jnp.mean(moved.evaluations, 1),
        )
        return Replicas(chains, visited, replicas.round_trips + returned, replicas.sweep + 1), sums

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


def _partners(levels: jax.Array, sweep: jax.Array) -> jax.Array:
    """The level that each may swap with in a sweep; itself where there is none."""
    asks = (levels + sweep) % 2 == 0  # the next, cleaner one
    return jnp.clip(jnp.where(asks, levels + 1, levels - 1), 0, levels.size - 1)


def _visits(visited: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What each chain visited last, after a sweep, and which of the N chains at the noisiest level ended a trip."""
    returned = visited[0] == -1
    down = jnp.where(visited[-1] == 1, -1, visited[-1])
    return visited.at[0].set(1).at[-1].set(down), returned
