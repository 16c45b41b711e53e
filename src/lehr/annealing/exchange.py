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
from typing import Any, NamedTuple

import jax
import numpy as np

from lehr.annealing.driver import PILOT_CHAINS, Driver
from lehr.annealing.ladder import Ladder, check_count
from lehr.annealing.program import Program
from lehr.annealing.progress import NoMeter
from lehr.annealing.run import Run, make_run
from lehr.annealing.sweeps import Replicas, Sums, begin, sweeps
from lehr.annealing.tuning import Tuning
from lehr.annealing.weights import Weights
from lehr.kernels import Kernel
from lehr.potentials.base import Potential
from lehr.programs.path import Path

__all__ = ["ReplicaExchange"]


class _Standing(NamedTuple):
    """Where a run stands, and what it needs to go on."""

    program: Program
    tuning: Tuning
    rng_key: jax.Array
    replicas: Replicas


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
    ) -> None:
        counts = {"num_steps": num_steps, "num_chains": num_chains, "num_samples": num_samples, "thinning": thinning}
        for name, count in counts.items():
            check_count(name, count)
        check_count("num_warmup", num_warmup, least=0)
        pilot = 0 if tuning is not None else pilot
        super().__init__(model, kernel, ladder, num_steps, 0, num_chains, pilot, tuning, "auto")
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
            num_samples: further draws of each chain.

        Raises:
            RuntimeError: if there is nothing to go on from.
            ValueError: for a count that is not a positive integer.
        """
        check_count("num_samples", num_samples)
        last, started = self.last_run, time.monotonic()
        more = self._drawn(num_samples, last.attrs["evaluations_per_chain"], 0, started)
        seconds = round(last.attrs["seconds"] + more.attrs["seconds"], 3)
        self._run = replace(
            more,
            samples=_appended(last.samples, more.samples),
            sample_stats=_appended(last.sample_stats, more.sample_stats),
            attrs=more.attrs | {"seconds": seconds},
        )
        return self._run

    def sample(self, program: Program, rng_key: jax.Array, resume: bool = False) -> Run:
        """Tune, start anew at every level, warm up, and draw."""
        started = time.monotonic()
        key_pilot, key_start, key_run = jax.random.split(rng_key, 3)
        with self.session(program, rng_key, resume, NoMeter()) as session:
            tuning, trial = self.rehearse(program, key_pilot, session)
        made = 0.0
        if trial is not None:  # which evaluates at every level to enter it, moving and staying
            made = trial.num_chains * float(np.sum(trial.levels.evaluations) + 2 * len(program.ladder))
        replicas = begin(
            program.structure, program.plan.kernel, self.num_chains, program.constants, program.ladder.times, key_start
        )
        self._run, self._standing = None, _Standing(program, tuning, key_run, replicas)
        if self.num_warmup:
            self._sweep(self.num_warmup, 1)
        return self._drawn(self.num_samples, made / self.num_chains, self.num_warmup, started)

    def _sweep(self, num_draws: int, thinning: int) -> tuple[Any, Sums]:
        """Go on; the draws, leaves (draw, chain, ...), and the statistics of these sweeps."""
        assert self._standing is not None
        program, tuning, rng_key, replicas = self._standing
        replicas, draws, sums = sweeps(
            program.structure, program.plan.kernel, self.num_steps, num_draws, thinning,
            program.constants, program.ladder.times, tuning, rng_key, replicas,
        )  # fmt: skip
        self._standing = self._standing._replace(replicas=replicas)
        return jax.tree.map(np.asarray, (draws, sums))

    def _drawn(self, num_draws: int, made: float, num_warmup: int, started: float) -> Run:
        """Draws from here on, as a Run; ``made`` evaluations of each chain, and a warm-up, lie behind."""
        assert self._standing is not None
        draws, sums = self._sweep(num_draws, self.thinning)
        program, tuning, _, replicas = self._standing
        num_levels, num_sweeps = len(program.ladder), num_draws * self.thinning
        made += (float(np.sum(sums.evaluations) / num_sweeps) + num_levels) * (num_sweeps + num_warmup)
        position, logdensity = jax.tree.map(lambda leaf: np.swapaxes(leaf, 0, 1), draws)
        levels: dict[str, Any] = {
            "acceptance_rate": sums.acceptance_rate,
            "step_size": np.asarray(tuning.step_size),
            "swap_rate": np.append(sums.swap_rate[:-1], np.nan),
            "diverging": sums.divergences,
            "nonfinite": np.zeros(num_levels, int),
        }
        attrs = {
            "kernel": repr(program.plan.kernel),
            "num_warmup": self.num_warmup,
            "num_steps": self.num_steps * num_sweeps,
            "num_chains": self.num_chains,
            "round_trips": int(np.sum(replicas.round_trips)),
            "evaluations_per_chain": round(made, 1),
            "seconds": round(time.monotonic() - started, 3),
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
