r"""How chains enter a level: they move or stay, are refreshed, and gain weight.

A weighted chain that moves to a cleaner level does so by a proposal whose density is known; what it
gains is in :mod:`lehr.annealing.weights`. Where it stays, the gain is log π_t(x) − log π_t'(x). For
diffusion models alone moving is better, and in many dimensions the only way: staying, all
coordinates are too wide for the next level at once. Under a sharp likelihood staying is better, since
the proposal knows little of it. A pilot pass tries both at every level, by the conditional
effective sample size (Σ W w)²/Σ W w² of the incremental weights w, and the rest follow.

Reference:
    Zhou, Johansen & Aston, Toward automatic model comparison, JCGS 2016 (conditional ESS).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.scipy.stats import norm

from lehr.annealing.keys import per_chain
from lehr.annealing.plan import Plan
from lehr.annealing.predictors import Ancestral, Departure
from lehr.annealing.weights import Particles, overall
from lehr.kernels.base import LogDensity
from lehr.kernels.line_integral import PartlyKnown
from lehr.programs.closure import Constants, Structure
from lehr.programs.path import Position
from lehr.programs.ratios import Level, log_forward
from lehr.programs.reverse import ReverseStep

__all__ = ["Entered", "Entry", "conditional_ess", "is_sound", "target_at"]


class Entered(NamedTuple):
    """The chains at the level entered.

    Attributes:
        moves: whether chains moved to it.
        chains: refreshed kernel states.
        increment: what each log weight gains, (N,).
        gap: energy increment less path increment, (N,); zeros unless both are asked for.
        correction: by which the path increment had to be corrected, (N,); zeros where nothing tells.
    """

    moves: jax.Array
    chains: Any
    increment: jax.Array
    gap: jax.Array
    correction: jax.Array

    def typical_correction(self, log_weights: jax.Array) -> jax.Array:
        """Its root mean square over the chains, by their normalised weights before the level."""
        return jnp.sqrt(jnp.sum(jnp.exp(log_weights) * self.correction**2))


class Entry:
    """``enter(k, particles, curvature, moves, key) -> Entered`` for one run."""

    def __init__(self, structure: Structure, plan: Plan, constants: Constants, times: jax.Array, levels: Level) -> None:
        self.structure, self.plan, self.constants = structure, plan, constants
        self.times, self.levels = times, levels

    def __call__(
        self, k: jax.Array, particles: Particles, curvature: jax.Array, moves: jax.Array | None, rng_key: jax.Array
    ) -> Entered:
        """Take all chains to level k.

        Args:
            k: the level; the start, which the chains hold with its density, for k = 0.
            particles: at level k − 1.
            curvature: of −log π there, (D,).
            moves: whether to move, where that was decided before.
            rng_key: for the proposals.
        """
        is_first = k == 0
        keys = per_chain(rng_key, self.plan.num_chains)
        chains = particles.chains

        def stay() -> Any:
            return self.plan.layout.over(lambda chain: self._stay(chain, k))(chains)

        def move() -> Any:
            return self.plan.layout.over(lambda chain, key: self._move(chain, key, k, curvature))(chains, keys)

        if self.plan.predictor is None and not self.plan.follows_path:
            return Entered(jnp.zeros((), bool), *stay())

        if moves is None and self.plan.chooses:
            both = stay(), move()
            ess_stay, ess_move = (conditional_ess(overall(particles), gained) for _, gained, *_ in both)
            better = (1 - ess_move < self.plan.chooses * (1 - ess_stay)) & ~is_first
            return Entered(better, *jax.tree.map(lambda a, b: jnp.where(better, b, a), *both))
        given = ~is_first if moves is None or not self.plan.chooses else moves & ~is_first
        return Entered(given, *jax.lax.cond(given, move, stay))

    def _stay(self, chain: Any, k: jax.Array) -> tuple[Any, jax.Array, jax.Array, jax.Array]:
        """The chain refreshed, with its increment, gap and correction."""
        t = self.times[k]
        fresh = self.plan.kernel.refresh(chain, target_at(self.structure, self.constants, t))
        by_energy = fresh.logdensity - chain.logdensity
        if not self.plan.follows_path:
            return fresh, by_energy, jnp.zeros(()), jnp.zeros(())
        t_from, arrived = self.times[jnp.maximum(k - 1, 0)], self._arrived(chain.position, t)

        def start() -> tuple[jax.Array, jax.Array]:
            density = self.structure.start_density(self.constants, chain.position, t)
            return density - chain.logdensity, jnp.zeros(())

        def on() -> tuple[jax.Array, jax.Array]:
            step = self._reverse_step(chain, t_from, t)
            correction = self._correction(step, chain.position, arrived, t_from, t)
            others = self._others(chain.position, t) - self._others(chain.position, t_from)
            return step.log_stay + correction + others, correction

        by_path, correction = jax.lax.cond(k == 0, start, on)
        return fresh, self._gained(fresh, by_energy, by_path), by_energy - by_path, correction

    def _move(
        self, chain: Any, rng_key: jax.Array, k: jax.Array, curvature: jax.Array
    ) -> tuple[Any, jax.Array, jax.Array, jax.Array]:
        """The chain where it went, with its increment, gap and correction."""
        before = jnp.maximum(k - 1, 0)
        t_from, t = self.times[before], self.times[k]
        position, log_energy, log_path, correction = self._propose(chain, rng_key, before, k, curvature)
        target = target_at(self.structure, self.constants, t)
        fresh = self.plan.kernel.refresh(chain._replace(position=position), target)
        by_energy = fresh.logdensity - chain.logdensity + log_energy
        if not self.plan.follows_path:
            return fresh, by_energy, jnp.zeros(()), jnp.zeros(())
        by_path = log_path + correction + self._others(position, t) - self._others(chain.position, t_from)
        return fresh, self._gained(fresh, by_energy, by_path), by_energy - by_path, correction

    def _gained(self, fresh: Any, by_energy: jax.Array, by_path: jax.Array) -> jax.Array:
        """The increment that counts; by the path nothing says that a place is out of bounds but a score that breaks."""
        if self.plan.weights == "both":
            return by_energy
        return jnp.where(is_sound(self.plan.kernel.gradient(fresh)), by_path, -jnp.inf)

    def _propose(
        self, chain: Any, rng_key: jax.Array, before: jax.Array, k: jax.Array, curvature: jax.Array
    ) -> tuple[Position, jax.Array, jax.Array, jax.Array]:
        """x, with log f − log K, log Π (r_i/f)^{w_i} + log f − log K, and what that lacks."""
        plan, zero = self.plan, jnp.zeros(())
        if plan.follows_path:
            t_from, t = self.times[before], self.times[k]
            x_noisy, put = self._split(chain.position)
            step = self._reverse_step(chain, t_from, t)
            x, log_path, log_proposal = step.draw(rng_key)
            position, log_noising = put(x), log_forward(x, x_noisy, self._level(before), self._level(k))
            correction = self._correction(step, position, self._arrived(position, t), t_from, t)
            return position, log_noising - log_proposal, log_path, correction
        start, put = self._departure(chain, before, k)
        if plan.is_informed:
            assert isinstance(plan.predictor, Ancestral)
            bend, _ = self._split(ravel_pytree(chain.position)[1](curvature))
            mean, std = plan.predictor.informed(start, bend)
            noise = jax.random.normal(rng_key, mean.shape)
            x = mean + std * noise
            log_proposal = jnp.sum(norm.logpdf(noise) - jnp.log(std))
            return put(x), log_forward(x, start.x, start.noisy, start.clean) - log_proposal, zero, zero
        assert plan.predictor is not None
        return put(plan.predictor.move(rng_key, start)), zero, zero, zero

    def _reverse_step(self, chain: Any, t_from: jax.Array, t: jax.Array) -> ReverseStep:
        behind = self.structure.expect(self.constants, chain.position, t_from)
        gradient = self.plan.kernel.gradient(chain)
        step: ReverseStep = self.structure.reverse_step(self.constants, chain.position, behind, gradient, t_from, t)
        return step

    def _arrived(self, position: Position, t: jax.Array) -> Any:
        """What is expected where a step ends, if that is asked: the network call is the one of the refresh."""
        return self.structure.expect(self.constants, position, t) if "correction" in self.structure else None

    def _correction(
        self, step: ReverseStep, position: Position, arrived: Any, t_from: jax.Array, t: jax.Array
    ) -> jax.Array:
        """What the ratio of a reverse step lacks."""
        if arrived is None:
            return jnp.zeros(())
        return self.structure.correction(self.constants, step.kernels, position, arrived, t_from, t)

    def _departure(self, chain: Any, before: jax.Array, k: jax.Array) -> tuple[Departure, Any]:
        """Where a predictor starts from, and how to put what it returns in the place of x."""
        t_from, t = self.times[before], self.times[k]
        x, put = self._split(chain.position)
        gradient, _ = self._split(self.plan.kernel.gradient(chain))
        copies, _ = self._split(chain.position | self.structure.copies(self.constants, chain.position, t_from))
        copies = copies if self.plan.counts_noise else jnp.ones_like(copies)

        def gradient_at(x: jax.Array, is_clean: bool) -> jax.Array:
            there = t if is_clean else t_from
            return self._split(jax.grad(lambda q: self.structure.log_density(self.constants, q, there))(put(x)))[0]

        return Departure(x, gradient, copies, self._level(before), self._level(k), gradient_at), put

    def _level(self, k: jax.Array) -> Level:
        return jax.tree.map(lambda leaf: leaf[k], self.levels)

    def _others(self, position: Position, t: jax.Array) -> jax.Array:
        return self.structure.others(self.constants, position, t) if "others" in self.structure else jnp.zeros(())

    def _split(self, position: Position) -> tuple[jax.Array, Any]:
        """All of x, flat, and how to put another in its place."""
        flat, unravel = ravel_pytree({name: position[name] for name in self.structure.diffusion_sites})
        return flat, lambda to: position | unravel(to)


def is_sound(tree: Any) -> jax.Array:
    """Whether all numbers in ``tree`` are finite."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def conditional_ess(log_weights: jax.Array, increments: jax.Array) -> jax.Array:
    """(Σ W w)²/Σ W w² in [0, 1], for normalised weights W and incremental weights w."""
    increments = jnp.where(jnp.isnan(increments), -jnp.inf, increments)
    lse = jax.nn.logsumexp
    return jnp.exp(2 * lse(log_weights + increments) - lse(log_weights + 2 * increments))


def target_at(structure: Structure, constants: Constants, t: jax.Array) -> LogDensity:
    """log π_t as kernels take it."""

    def known(position: Position) -> jax.Array:
        return structure.log_density(constants, position, t)

    if "unknown" not in structure:
        return known
    return PartlyKnown(known, lambda position: structure.unknown(constants, position, t))
