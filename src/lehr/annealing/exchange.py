r"""Replica exchange over the ladder: chains at all levels at once, which swap places.

The chain at the last level visits all modes in their right shares, by way of the noise, so that R-hat
and ESS mean what they say even of multimodal targets. A *round trip* is a chain's way from the noisiest
level to the cleanest and back: the fewer, the less that has been learned of the modes' shares. What
one sweep of moves and swaps is, and why it leaves every level as it is, is in :mod:`lehr.annealing.sweeps`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path as FilePath
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from lehr.annealing.driver import PILOT_CHAINS, Driver
from lehr.annealing.ladder import Ladder, check_count
from lehr.annealing.program import Program
from lehr.annealing.progress import ProgressMeter, as_meter
from lehr.annealing.record import make_run
from lehr.annealing.run import Run
from lehr.annealing.session import Part, Session
from lehr.annealing.sweeps import Sweeping, begin_sweeps, sweep_on, with_room
from lehr.annealing.tuning import Tuning
from lehr.annealing.weights import Weights
from lehr.kernels import Kernel
from lehr.potentials.base import Potential
from lehr.programs.path import Path

__all__ = ["ReplicaExchange"]

_begin = jax.jit(begin_sweeps, static_argnums=(0, 1))
_go_on = jax.jit(sweep_on, static_argnums=(0, 1))
_renewed = jax.jit(with_room, static_argnums=0)


class _Standing(NamedTuple):
    """Where a run stands, and what it needs to go on."""

    program: Program
    tuning: Tuning
    rng_key: jax.Array
    state: Sweeping


class ReplicaExchange(Driver):
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
        progress: as for :class:`~lehr.AnnealedMCMC`, and so ``checkpoint``, ``sharding`` and ``max_batch``; a set of
            replicas is to them what a chain is there.

    Raises:
        ValueError: for counts that are not positive integers, a ladder of one level, or an unadjusted kernel.
        TypeError: for a kernel or model of the wrong kind; when run, for a model with a score: swaps
            compare log densities.
    """

    threshold = 0.5  # the pilot is weighted, as particles are
    _optional = ("moments",)

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
        pilot: int = PILOT_CHAINS,
        tuning: Tuning | None = None,
        progress: bool | ProgressMeter = True,
        checkpoint: str | FilePath | None = None,
        sharding: Mesh | NamedSharding | None = None,
        max_batch: int | None = None,
    ) -> None:
        counts = {"num_steps": num_steps, "num_chains": num_chains, "num_samples": num_samples, "thinning": thinning}
        for name, count in counts.items():
            check_count(name, count)
        check_count("num_warmup", num_warmup, least=0)
        pilot = 0 if tuning is not None else pilot
        super().__init__(
            model, kernel, ladder, num_steps, 0, num_chains, pilot, tuning, "auto", progress, checkpoint, sharding,
            max_batch,
        )  # fmt: skip
        if kernel is not None and not kernel.is_adjusted:
            raise ValueError(
                f"ReplicaExchange swaps by a Metropolis test, which {type(kernel).__name__} would bias: it leaves each "
                "level's density changed. Use a kernel with a test of its own, such as lehr.HMC."
            )
        if len(ladder) < 2 if isinstance(ladder, Ladder) else ladder < 2:
            raise ValueError("ReplicaExchange needs a ladder of at least two levels to swap between.")
        self.num_warmup, self.num_samples, self.thinning = num_warmup, num_samples, thinning
        self._standing: _Standing | None = None

    def extend(self, num_samples: int) -> Run:
        """Go on from where the last run stopped; the Run holds its draws and the new ones.

        Args:
            num_samples: further draws of each chain. Where the run is kept, so are they: asked for again after they
                were cut off, they go on.

        Raises:
            RuntimeError: if there is nothing to go on from.
            ValueError: for a count that is not a positive integer.
        """
        check_count("num_samples", num_samples)
        last, started = self.last_run, time.monotonic()
        assert self._standing is not None
        program, tuning, rng_key, state = self._standing
        program = program._replace(plan=program.plan._replace(num_draws=num_samples))
        begin = partial(_renewed, program.plan, state.replicas, state.sweep)
        part = f"draws after {last.sample_stats['lp'].shape[1]}"
        with self.session(program, rng_key, self.checkpoint is not None, as_meter(self.progress)) as session:
            state = self._sweep(program, tuning, rng_key, begin, 0, session, part)
        self._standing = _Standing(program, tuning, rng_key, state)
        more = self._drawn(0, last.attrs["evaluations_per_chain"], time.monotonic() - started, session)
        seconds = {name: round(last.attrs[name] + more.attrs[name], 3) for name in ("seconds", "compile_seconds")}
        self._run = replace(
            more,
            samples=_appended(last.samples, more.samples),
            sample_stats=_appended(last.sample_stats, more.sample_stats),
            attrs=more.attrs | seconds,
        )
        return self._run

    def sample(self, program: Program, rng_key: jax.Array, resume: bool = False) -> Run:
        """Tune, start anew at every level, warm up, and draw."""
        started, plan, made = time.monotonic(), program.plan, 0.0
        key_pilot, key_start, _ = jax.random.split(rng_key, 3)
        self._run = self._standing = None
        with self.session(program, rng_key, resume, as_meter(self.progress)) as session:
            tuning, trial = self.rehearse(program, key_pilot, session)
            if trial is not None:  # which evaluates at every level to enter it, moving and staying
                made = trial.num_chains * float(np.sum(trial.levels.evaluations) + 2 * len(program.ladder))
            given = plan.layout.shared((program.constants, program.ladder.times, key_start))
            begin = partial(_begin, program.structure, plan, *given)
            state = self._sweep(program, tuning, rng_key, begin, self.num_warmup, session, "run")
        self._standing = _Standing(program, tuning, rng_key, state)
        return self._drawn(self.num_warmup, made / self.num_chains, time.monotonic() - started, session)

    def _sweep(
        self,
        program: Program,
        tuning: Tuning,
        rng_key: jax.Array,
        begin: Callable[[], Sweeping],
        num_warmup: int,
        session: Session,
        part: str,
    ) -> Sweeping:
        """A warm-up, and then the draws that there is room for, as one part of a session."""
        plan, times = program.plan, program.ladder.times
        key_run = jax.random.split(rng_key, 3)[2]
        shared = plan.layout.shared((program.constants, times, tuning, key_run, jnp.asarray(num_warmup)))
        sigma = float(np.exp(-np.asarray(program.path.schedule.log_snr(times[-1])) / 2))

        def go_on(state: Sweeping, stop: int) -> Sweeping:
            return _go_on(program.structure, plan, *shared, state, plan.layout.shared(jnp.asarray(stop)))

        def stand(state: Sweeping) -> dict[str, float]:
            num_sweeps = max(int(state.done) - num_warmup, 0) * plan.thinning
            accepted = float(np.asarray(state.sums.acceptance_rate)[-1]) / num_sweeps if num_sweeps else float("nan")
            return {"sigma": sigma, "acceptance_rate": accepted, "ess": 1.0}

        like = partial(plan.layout.like, begin)
        return session.run(Part(part, num_warmup + plan.num_draws, begin, like, go_on, stand))

    def _drawn(self, num_warmup: int, made: float, seconds: float, session: Session) -> Run:
        """A Run of the draws; ``made`` evaluations of each chain lie behind, and ``num_warmup`` sweeps."""
        assert self._standing is not None
        program, tuning, _, state = self._standing
        plan, num_levels = program.plan, len(program.ladder)
        draws, sums, round_trips = plan.layout.gathered((state.draws, state.sums, state.replicas.round_trips))
        num_sweeps = plan.num_draws * plan.thinning
        made += (float(np.sum(sums.evaluations)) / num_sweeps + num_levels) * (num_sweeps + num_warmup)
        position, logdensity = jax.tree.map(lambda leaf: np.swapaxes(leaf, 0, 1), draws)
        levels: dict[str, Any] = {
            "acceptance_rate": sums.acceptance_rate / num_sweeps,
            "step_size": np.asarray(tuning.step_size),
            "swap_rate": np.append(sums.swap_rate[:-1] / (num_sweeps / 2), np.nan),
            "diverging": sums.divergences,
            "nonfinite": np.zeros(num_levels, int),
        }
        attrs = {
            "kernel": repr(plan.kernel),
            "num_warmup": self.num_warmup,
            "num_steps": self.num_steps * num_sweeps,
            "num_chains": self.num_chains,
            "round_trips": int(np.sum(round_trips)),
            "evaluations_per_chain": round(made, 1),
            "seconds": round(seconds - session.seconds_compiling, 3),
            "compile_seconds": round(session.seconds_compiling, 3),
        }
        return make_run(
            type(self).__name__, program.path, program.ladder, position, {"lp": logdensity}, levels, attrs, tuning
        )

    def weights_of(self, path: Path) -> Weights:
        return "energy"

    def _checked(self, path: Path, kernel: Kernel, weights: Weights | None) -> Path:
        path.refuse_scores("ReplicaExchange")
        if kernel.integrates_score:
            raise ValueError(
                f"swaps compare the log densities that the kernel keeps, and {kernel!r} keeps none. "
                'Use metropolis="exact".'
            )
        return super()._checked(path, kernel, weights)


def _appended(old: dict[str, np.ndarray], new: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Further draws of the same chains, site by site."""
    return {name: np.concatenate([old[name], draws], 1) for name, draws in new.items()}
