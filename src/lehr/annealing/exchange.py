r"""Replica exchange over the ladder: chains at all levels at once, which swap places.

One sweep is num_steps transitions of a kernel at every level, and one offer to swap between
every second pair of neighbours, even and odd pairs in turn (the non-reversible order, in which a
chain that has begun to move down goes on to). A swap of levels k and k + 1 carries each chain to the other level
by x ↦ m + (s/s')(x − m'), with m and s the mean and scale of the diffusion at the two levels, ordinary
latents as they are, and is accepted with probability

    min(1, π_k(T x_{k+1}) π_{k+1}(T⁻¹ x_k) / (π_k(x_k) π_{k+1}(x_{k+1}))),

the Jacobians of T and T⁻¹ being reciprocal. Every level is left invariant, so the chain at the
last one visits all modes in their right shares, by way of the noise, and R-hat and ESS mean what they say
even of multimodal targets. A *round trip* is a chain's way from the noisiest level to the cleanest and
back: the fewer, the less that has been learned of the modes' shares.

References:
    Swendsen & Wang, Replica Monte Carlo simulation of spin glasses, PRL 1986; Geyer, 1991.
    Syed, Bouchard-Côté, Deligiannidis & Doucet, Non-reversible parallel tempering, JRSS B 2022.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lehr.annealing.drivers import AnnealedSMC, Program
from lehr.annealing.entry import target_at
from lehr.annealing.keys import as_key, per_chain
from lehr.annealing.ladder import Ladder, check_count
from lehr.annealing.plan import Plan
from lehr.annealing.run import Run, constrained
from lehr.annealing.tuning import Tuning, with_short_steps
from lehr.kernels import Kernel
from lehr.potentials.base import Potential
from lehr.programs.closure import Constants, Structure
from lehr.programs.path import Path, Position

__all__ = ["ReplicaExchange"]


class _Replicas(NamedTuple):
    """Chains at all levels; leaves lead with (K, N)."""

    chains: Any
    visited: jax.Array  # 1 if the noisiest level was visited later than the cleanest, −1 if earlier, 0 if neither
    round_trips: jax.Array  # (N,)
    sweep: jax.Array


class _Sums(NamedTuple):
    """Statistics of the sweeps, by level."""

    acceptance_rate: jax.Array
    swap_rate: jax.Array
    divergences: jax.Array
    evaluations: jax.Array


class ReplicaExchange:
    """Chains at all levels of a ladder that swap places: honest diagnostics for multimodal targets.

    Args:
        model: a NumPyro model, a potential, or a path; every factor an energy.
        kernel: how chains move at a level, with a Metropolis test; :class:`~lehr.HMC` by default.
        ladder: a :class:`~lehr.Ladder`, or a number of levels, as for :class:`~lehr.AnnealedMCMC`.
        num_steps: transitions of each chain between two swaps.
        num_chains: independent sets of replicas, N; the chains of R-hat.
        num_samples: sweeps that are kept, one draw of the last level each.
        num_warmup: sweeps before those, which are not.
        thinning: sweeps for each draw that is kept.
        pilot: chains of the pilot that finds step sizes and scales, at least 2.
        tuning: steps that are known beforehand, in place of a pilot.

    Raises:
        ValueError: for counts that are not positive integers, a ladder of one level, or an unadjusted kernel.
        TypeError: for a kernel or model of the wrong kind; when run, for a model with a score: swaps
            compare log densities.
    """

    def __init__(
        self,
        model: Callable[..., Any] | Potential | Path,
        kernel: Kernel | None = None,
        ladder: int | Ladder = 24,
        num_steps: int = 1,
        num_chains: int = 8,
        num_samples: int = 1000,
        num_warmup: int = 200,
        *,
        thinning: int = 1,
        pilot: int = 64,
        tuning: Tuning | None = None,
    ) -> None:
        for name, count in (("num_chains", num_chains), ("num_samples", num_samples), ("thinning", thinning)):
            check_count(name, count)
        check_count("num_warmup", num_warmup, least=0)
        if kernel is not None and isinstance(kernel, Kernel) and not kernel.is_adjusted:
            raise ValueError(
                f"ReplicaExchange swaps by a Metropolis test, which {type(kernel).__name__} would bias: it leaves each "
                "level's density changed. Use a kernel with a test of its own, such as lehr.HMC."
            )
        self._driver = AnnealedSMC(
            model,
            kernel,
            ladder,
            num_steps,
            num_particles=2,
            weights="energy",
            pilot=0 if tuning is not None else pilot,
            tuning=tuning,
            progress=False,
        )
        if len(ladder) < 2 if isinstance(ladder, Ladder) else ladder < 2:
            raise ValueError("ReplicaExchange needs a ladder of at least two levels to swap between.")
        self.num_steps, self.num_chains, self.num_samples = num_steps, num_chains, num_samples
        self.num_warmup, self.thinning = num_warmup, thinning
        self._run: Run | None = None
        self._state: tuple[Program, Tuning, Any, jax.Array, _Replicas] | None = None

    def run(self, rng_key: jax.Array, *args: Any, **kwargs: Any) -> Run:
        """Start anew, warm up and sample; arguments and errors as for :meth:`lehr.AnnealedSMC.run`."""
        driver, rng_key = self._driver, as_key(rng_key)
        path = driver.path if driver.path.is_bound and not (args or kwargs) else driver.path(*args, **kwargs)
        program = driver.prepare(path, optional=("moments",))
        key_pilot, key_start, key_run = jax.random.split(rng_key, 3)
        started = time.monotonic()
        tuning, trial = driver.rehearse(program, key_pilot)
        pilot = (
            0
            if trial is None
            else trial.ancestors.size * float(np.sum(trial.levels.evaluations) + 2 * tuning.step_size.size)
        )
        replicas = _begin(
            program.structure, program.plan, self.num_chains, program.constants, program.ladder.times, key_start
        )
        self._state = (program, tuning, pilot, key_run, replicas)
        self._run = None
        if self.num_warmup:
            self._sweep(self.num_warmup, 1)
        return self._collect(self.num_samples, started)

    def extend(self, num_samples: int) -> Run:
        """Go on from where the last run stopped; the Run holds its draws and the new ones.

        Args:
            num_samples: further draws of each chain.

        Raises:
            RuntimeError: if there is nothing to go on from.
            ValueError: for a count that is not a positive integer.
        """
        check_count("num_samples", num_samples)
        if self._state is None:
            raise RuntimeError("this ReplicaExchange has not been run; call .run(key, ...) first.")
        return self._collect(num_samples, time.monotonic())

    @property
    def last_run(self) -> Run:
        """The last :class:`~lehr.Run`.

        Raises:
            RuntimeError: if nothing has been run.
        """
        if self._run is None:
            raise RuntimeError("this ReplicaExchange has not been run; call .run(key, ...) first.")
        return self._run

    def get_samples(self, group_by_chain: bool = False) -> dict[str, np.ndarray]:
        """The draws at the last level, by site; see :meth:`lehr.Run.get_samples`."""
        return self.last_run.get_samples(group_by_chain)

    def print_summary(self) -> None:
        """Print a table of sites and a table of levels; see :meth:`lehr.Run.print_summary`."""
        self.last_run.print_summary()

    def to_arviz(self) -> Any:
        """The run for ArviZ; see :meth:`lehr.Run.to_arviz`."""
        return self.last_run.to_arviz()

    def _sweep(self, num_draws: int, thinning: int) -> tuple[Any, _Sums]:
        assert self._state is not None
        program, tuning, pilot, rng_key, replicas = self._state
        replicas, draws, sums = _sweeps(
            program.structure, program.plan, num_draws, thinning,
            program.constants, program.ladder.times, tuning, rng_key, replicas,
        )  # fmt: skip
        self._state = (program, tuning, pilot, rng_key, replicas)
        return jax.tree.map(np.asarray, (draws, sums))

    def _collect(self, num_draws: int, started: float) -> Run:
        assert self._state is not None
        before = 0 if self._state is None else int(self._state[-1].sweep)
        (position, logdensity), sums = self._sweep(num_draws, self.thinning)
        program, tuning, pilot, _, replicas = self._state
        path, ladder, last = program.path, program.ladder, self._run
        log_snr = np.asarray(path.schedule.log_snr(ladder.times))
        samples = constrained(path, jax.tree.map(lambda leaf: np.swapaxes(leaf, 0, 1), position), 2)
        stats = {"lp": np.swapaxes(logdensity, 0, 1)}
        seconds = time.monotonic() - started
        warmup = self.num_warmup if last is None else 0
        made = pilot / self.num_chains if last is None else last.attrs["evaluations_per_chain"]
        per_sweep = float(np.sum(sums.evaluations) / (num_draws * self.thinning)) + len(ladder)
        made += per_sweep * (num_draws * self.thinning + (before if warmup else 0))
        if last is not None:
            samples = {k: np.concatenate([last.samples[k], v], 1) for k, v in samples.items()}
            stats = {k: np.concatenate([last.sample_stats[k], v], 1) for k, v in stats.items()}
            seconds += last.attrs["seconds"]
        swaps = np.append(sums.swap_rate[:-1], np.nan)
        self._run = Run(
            method="ReplicaExchange",
            samples=samples,
            sample_stats=stats,
            observations={k: np.asarray(v) for k, v in path.observations.items() if not isinstance(v, jax.core.Tracer)},
            levels={
                "t": np.asarray(ladder.times),
                "log_snr": log_snr,
                "sigma": np.exp(-log_snr / 2),
                "acceptance_rate": np.asarray(sums.acceptance_rate),
                "step_size": np.asarray(tuning.step_size),
                "swap_rate": swaps,
                "diverging": np.asarray(sums.divergences),
                "nonfinite": np.zeros(len(ladder), int),
            },
            particles={},
            log_weights=None,
            attrs={
                "kernel": repr(program.plan.kernel),
                "guidance": ", ".join(sorted({repr(g) for g in path.guidance.values()})),
                "num_levels": len(ladder),
                "num_warmup": self.num_warmup,
                "num_steps": self.num_steps * num_draws * self.thinning,
                "num_chains": self.num_chains,
                "round_trips": int(np.sum(replicas.round_trips)),
                "evaluations_per_chain": round(made, 1),
                "seconds": round(seconds, 3),
                "calibrated": int(path.is_calibrated),
            },
            tuning=tuning,
        )
        return self._run


def _start(
    structure: Structure, plan: Plan, num_chains: int, constants: Constants, times: jax.Array, rng_key: jax.Array
) -> _Replicas:
    """Every level starts from its own Gaussian summary, latents from their prior."""

    def one(key: jax.Array, t: jax.Array) -> Any:
        key_position, key_state = jax.random.split(key)
        position = structure.init(constants, key_position, t)
        return plan.kernel.init(key_state, position, target_at(structure, constants, t))

    levels = jax.vmap(
        lambda k, t: jax.vmap(lambda key: one(key, t))(per_chain(jax.random.fold_in(rng_key, k), num_chains))
    )
    chains = levels(jnp.arange(times.size), times)
    return _Replicas(chains, jnp.zeros((times.size, num_chains), int), jnp.zeros(num_chains, int), jnp.zeros((), int))


def _run_sweeps(
    structure: Structure,
    plan: Plan,
    num_draws: int,
    thinning: int,
    constants: Constants,
    times: jax.Array,
    tuning: Tuning,
    rng_key: jax.Array,
    replicas: _Replicas,
) -> tuple[_Replicas, tuple[Position, jax.Array], _Sums]:
    """``num_draws · thinning`` sweeps; the last level's position and log density after every ``thinning``."""
    step = with_short_steps(plan.kernel.build(), tuning.short_share)
    size, n = replicas.visited.shape
    levels = jnp.arange(size)
    masses = jnp.asarray(tuning.scale) ** 2
    some = jax.tree.map(lambda leaf: leaf[0, 0], replicas.chains.position)
    means, stds = jax.vmap(lambda t: structure.moments(constants, some, t))(times)

    def move(key: jax.Array, chain: Any, k: jax.Array) -> tuple[Any, Any]:
        target = target_at(structure, constants, times[k])

        def one(chain: Any, key: jax.Array) -> tuple[Any, Any]:
            return step(key, chain, target, tuning.step_size[k], masses[k])

        chain, stats = jax.lax.scan(one, chain, jax.random.split(key, plan.num_steps))
        rate, lost, made = stats
        return chain, (jnp.mean(rate), jnp.sum(lost), jnp.sum(made * jnp.ones(plan.num_steps, int)))

    def carried(chain: Any, k: jax.Array, origin: jax.Array) -> Any:
        """A chain of level ``origin`` as it would be at level k."""
        position = dict(chain.position)
        for name in structure.diffusion_sites:
            scale = stds[name][k] / stds[name][origin]
            position[name] = means[name][k] + scale * (position[name] - means[name][origin])
        return plan.kernel.refresh(chain._replace(position=position), target_at(structure, constants, times[k]))

    def sweep(replicas: _Replicas, _: None) -> tuple[_Replicas, _Sums]:
        key_move, key_swap = jax.random.split(jax.random.fold_in(rng_key, replicas.sweep))
        keys = jax.vmap(lambda k: per_chain(jax.random.fold_in(key_move, k), n))(levels)
        chains, (rates, lost, made) = jax.vmap(jax.vmap(move, (0, 0, None)))(keys, replicas.chains, levels)
        upper = (levels + replicas.sweep) % 2 == 0  # who offers to swap with the next, cleaner level
        partner = jnp.clip(jnp.where(upper, levels + 1, levels - 1), 0, size - 1)
        partner = jnp.where(partner[partner] == levels, partner, levels)
        offered = jax.tree.map(lambda leaf: leaf[partner], chains)
        offered = jax.vmap(jax.vmap(carried, (0, None, None)))(offered, levels, partner)
        change = jnp.where((partner == levels)[:, None], 0.0, offered.logdensity - chains.logdensity)
        log_ratio = change + change[partner]
        uniform = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(key_swap, k), (n,)))(levels)
        uniform = uniform[jnp.minimum(levels, partner)]  # one number for both of a pair
        accepted = (jnp.log(uniform) < log_ratio) & (partner != levels)[:, None]
        pick = lambda new, old: jnp.where(accepted.reshape(size, n, *[1] * (new.ndim - 2)), new, old)  # noqa: E731
        chains = jax.tree.map(pick, offered, chains)
        visited = pick(replicas.visited[partner], replicas.visited)
        returned = visited[0] == -1
        trips = replicas.round_trips + returned
        visited = visited.at[0].set(1).at[-1].set(jnp.where(visited[-1] == 1, -1, visited[-1]))
        asked = upper & (partner != levels)
        swaps = jnp.where(asked, jnp.mean(jnp.exp(jnp.minimum(jnp.nan_to_num(log_ratio, nan=-jnp.inf), 0.0)), 1), 0.0)
        sums = _Sums(jnp.mean(rates, 1), swaps, jnp.sum(lost, 1), jnp.mean(made, 1))
        return _Replicas(chains, visited, trips, replicas.sweep + 1), sums

    def draw(replicas: _Replicas, _: None) -> tuple[_Replicas, Any]:
        replicas, sums = jax.lax.scan(sweep, replicas, None, length=thinning)
        last = jax.tree.map(lambda leaf: leaf[-1], (replicas.chains.position, replicas.chains.logdensity))
        return replicas, (last, jax.tree.map(lambda leaf: jnp.sum(leaf, 0), sums))

    replicas, (draws, sums) = jax.lax.scan(draw, replicas, None, length=num_draws)
    total = jax.tree.map(lambda leaf: jnp.sum(leaf, 0), sums)
    count = num_draws * thinning
    rates = _Sums(total.acceptance_rate / count, total.swap_rate / (count / 2), total.divergences, total.evaluations)
    return replicas, draws, rates


_begin = jax.jit(_start, static_argnums=(0, 1, 2))
_sweeps = jax.jit(_run_sweeps, static_argnums=(0, 1, 2, 3))
