r"""What all drivers share: a model is bound to its data, made ready, tuned by a pilot, run, and read.

A pilot pass of few chains goes down the whole ladder first, with three tuned transitions at each
level, and leaves a :class:`~lehr.Tuning`; where a number of levels was asked for, it also says where they
stand (:mod:`lehr.annealing.spacing`). The chains that count take it as it is.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path as FilePath
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from lehr.annealing.keys import as_key
from lehr.annealing.ladder import Ladder, check_count, clean_end
from lehr.annealing.layout import as_layout
from lehr.annealing.plan import Plan
from lehr.annealing.predictors import Ancestral, Predictor, as_predictor
from lehr.annealing.program import Program, digest
from lehr.annealing.progress import ProgressMeter, as_meter
from lehr.annealing.record import Trial, record
from lehr.annealing.run import Run
from lehr.annealing.session import Session
from lehr.annealing.tuning import SHORT_SHARE, Tuning, smooth
from lehr.annealing.weights import Weights, follow_path
from lehr.kernels import HMC, Kernel
from lehr.potentials.base import Potential
from lehr.programs.closure import Constants, Structure, close
from lehr.programs.path import Path
from lehr.programs.ratios import is_small

__all__ = ["Driver"]

NUM_STARTS = 32  # where there are ordinary latents, each chain chooses its start from as many draws
PILOT_CHAINS = 64  # unless it is said otherwise
CLEARLY = 0.7  # beside a likelihood proposals know little, without one nearly all, and a pilot sees little of either
PILOT_WARMUP = 3  # tuned transitions of a pilot chain at each level


class Driver:
    """A model, how chains move, and the ladder that they go down.

    A subclass says how chains are weighed, what it refuses, and what it does with a program once it
    is tuned: by default it goes down the ladder once.

    Attributes:
        num_samples: draws kept of each chain after the last level.
        thinning: transitions for each draw that is kept.
        threshold: weighted chains are resampled where their effective sample size is below this share.
        num_islands: sets of weighted chains that are resampled each within itself.
    """

    num_samples: int = 0
    thinning: int = 1
    threshold: float = 0.0
    num_islands: int = 1
    _optional: tuple[str, ...] = ()  # functions of the path that the level loop itself does not need

    def __init__(
        self,
        model: Callable[..., Any] | Potential | Path,
        kernel: Kernel | None,
        ladder: int | Ladder,
        num_steps: int,
        num_warmup: int,
        num_chains: int,
        pilot: int | None,
        tuning: Tuning | None,
        predictor: str | Predictor | None,
        progress: bool | ProgressMeter = False,
        checkpoint: str | FilePath | None = None,
        sharding: Mesh | NamedSharding | None = None,
        max_batch: int | None = None,
    ) -> None:
        if kernel is not None and not isinstance(kernel, Kernel):
            raise TypeError(
                f"{type(self).__name__} needs a lehr kernel such as lehr.HMC(); got {kernel!r}. BlackJAX kernels plug "
                "in through lehr.Kernel."
            )
        if not isinstance(ladder, Ladder):
            check_count("ladder (a number of levels)", ladder)
        check_count("num_warmup", num_warmup, least=0)
        if pilot is None:
            pilot = PILOT_CHAINS if num_steps and num_warmup == 0 and tuning is None else 0
        check_count("pilot (a number of chains)", pilot, least=0)
        if sum((pilot > 0, num_warmup > 0, tuning is not None)) > 1:
            raise ValueError(
                "steps are tuned by a pilot pass, or by num_warmup transitions at each level, or given as tuning: "
                f"choose one. Got pilot={pilot}, num_warmup={num_warmup}, tuning={'given' if tuning else None}."
            )
        if pilot == 1:
            raise ValueError("a pilot pass of one chain has no spread to go by; give at least 2, or 0 for no pilot.")
        self.path = model if isinstance(model, Path) else Path(model)
        self.kernel = kernel
        self.ladder = ladder
        self.num_steps, self.num_warmup, self.num_chains = num_steps, num_warmup, num_chains
        self.pilot, self.tuning = pilot, tuning
        self.predictor: Predictor | Literal["auto"] | None = "auto" if predictor == "auto" else as_predictor(predictor)
        self.progress, self.checkpoint = progress, checkpoint
        self.layout = as_layout(sharding, max_batch, num_chains)
        as_meter(progress)
        self._run: Run | None = None

    def run(self, rng_key: jax.Array | int, *args: Any, resume: bool = False, **kwargs: Any) -> Run:
        """Sample; the result is also kept, for the other methods.

        Args:
            rng_key: a JAX key, or an integer seed.
            args: the model's arguments; none for a potential or a bound path. Arrays and floats are
                data: other values of the same shape compile nothing.
            resume: go on with the run that the driver's ``checkpoint`` folder holds, if it holds one; the result is
                that of a run that was never stopped. Everything else must be as it was, the seed included.
            kwargs: the model's keyword arguments.

        Raises:
            ValueError: for bad data or a model that cannot be annealed, see :class:`~lehr.Path`; if the checkpoint
                folder holds another run, with what differs, or this one without ``resume``.
            TypeError: if a factor is a score and the kernel or the weights need an energy, or the
                other way round.

        Warns:
            UserWarning: of each of the run's :attr:`~lehr.Run.cautions`.
        """
        rng_key = as_key(rng_key)
        self._run = self.sample(self.prepare(self.bind(*args, **kwargs)), rng_key, resume)
        for caution in self._run.cautions:
            warnings.warn(caution, stacklevel=2)
        return self._run

    def bind(self, *args: Any, **kwargs: Any) -> Path:
        """The path of the model with these arguments; that of a potential, or a bound one, needs none."""
        return self.path if self.path.is_bound and not (args or kwargs) else self.path(*args, **kwargs)

    def on(self, path: Path) -> Self:
        """The same driver, with another path in place of its own."""
        driver = copy.copy(self)
        driver.path = path
        return driver

    def as_part(self) -> Self:
        """The same driver as a part of a larger work: it says nothing and keeps nothing."""
        driver = copy.copy(self)
        driver.progress, driver.checkpoint = False, None
        return driver

    def prepare(self, path: Path, t_min: float | None = None) -> Program:
        """What is known of a run before it is compiled.

        Args:
            path: bound to its data.
            t_min: where a ladder ends that is yet to be made.

        Raises:
            ValueError, TypeError: as :meth:`run`.
        """
        path.bound_arguments()
        return self._settled(path)._program(path, t_min)

    def _settled(self, path: Path) -> Self:
        """The driver with what was left open decided for a path."""
        return self

    def _program(self, path: Path, t_min: float | None) -> Program:
        kernel, weights = self._kernel(path), self.weights_of(path)
        path = self._checked(path, kernel, weights)
        ladder = self.ladder if isinstance(self.ladder, Ladder) else self._levels(path, self.ladder, t_min)
        path = path.ending_at(np.asarray(ladder.times)[-1])
        plan = self._plan(path, kernel, weights)
        return Program.of(path, plan, ladder, *self._optional)

    def _levels(self, path: Path, number: int, t_min: float | None) -> Ladder:
        """So many levels: those that the tuning was found for, or uniform in log-SNR."""
        known = None if self.tuning is None else self.tuning.times
        if known is not None and len(known) == number:
            return Ladder(known)
        if t_min is None:
            t_min = clean_end(path.schedule, float(_finest(*close(path, ("init", "widths")))))
        return Ladder.log_snr(path.schedule, number, t_min=t_min)

    def rehearse(self, program: Program, rng_key: jax.Array, session: Session) -> tuple[Tuning, Trial | None]:
        """The steps to take, and the pilot pass that found them, if there was one, as a part of a session."""
        plan, dimension = program.plan, program.dimension
        guess = Tuning(plan.kernel.initial_step_size(dimension), 1.0, SHORT_SHARE)
        tuning = (guess if self.tuning is None else self.tuning).on(len(program.ladder), dimension)
        if not plan.num_pilot or not plan.num_steps or not _can_tune(program.path, plan.kernel):
            return tuning, None
        shards = plan.layout.num_shards
        plan = plan._replace(
            num_chains=-(-plan.num_pilot // shards) * shards,
            num_warmup=PILOT_WARMUP,
            num_draws=0,
            is_tuned=False,
            num_islands=1,
        )
        state = program.anneal(plan, tuning, rng_key, self.threshold, session, "pilot")
        trial = Trial(plan.num_chains, plan.layout.gathered(state.levels))
        found = Tuning(
            step_size=np.exp(smooth(np.log(trial.levels.step_size))),
            scale=trial.levels.inverse_mass**0.5,
            short_share=tuning.short_share,
            curvature=np.exp(smooth(np.log(trial.levels.curvature))),
            moves=trial.levels.moves,
        )
        return found, trial

    def _placed(self, program: Program, tuning: Tuning, trial: Trial) -> tuple[Program, Tuning]:
        """The program at the levels that the pilot asks for, and its tuning there: as they are, by default."""
        return program, tuning

    @property
    def last_run(self) -> Run:
        """The last :class:`~lehr.Run`.

        Raises:
            RuntimeError: if nothing has been run.
        """
        if self._run is None:
            raise RuntimeError(f"this {type(self).__name__} has not been run; call .run(key, ...) first.")
        return self._run

    def get_samples(self, group_by_chain: bool = False) -> dict[str, np.ndarray]:
        """The draws at the last level, by site, on each site's own scale; see :meth:`lehr.Run.get_samples`."""
        return self.last_run.get_samples(group_by_chain)

    def print_summary(self) -> None:
        """Print a table of sites and a table of levels; see :meth:`lehr.Run.print_summary`."""
        self.last_run.print_summary()

    def to_arviz(self, **groups: Any) -> Any:
        """The run for ArviZ, with further groups such as ``prior=``; see :meth:`lehr.Run.to_arviz`."""
        return self.last_run.to_arviz(**groups)

    def session(self, program: Program, rng_key: jax.Array, resume: bool, meter: ProgressMeter) -> Session:
        """What the host does while the program runs."""
        facts: dict[str, Any] = {}
        if self.checkpoint is not None:
            facts = program.facts(
                method=type(self).__name__,
                seed=np.asarray(jax.random.key_data(rng_key)).tolist(),
                num_warmup=self.num_warmup,
                pilot=self.pilot,
                tuning=None if self.tuning is None else digest(tuple(self.tuning)),
                threshold=self.threshold,
            )
        return Session(type(self).__name__, meter, self.checkpoint, facts, resume)

    def sample(self, program: Program, rng_key: jax.Array, resume: bool = False) -> Run:
        """Tune, and go down the ladder once: :meth:`run` on what :meth:`prepare` returned, and no warnings."""
        path, plan = program.path, program.plan
        started = time.monotonic()
        with self.session(program, rng_key, resume, as_meter(self.progress)) as session:
            key_pilot, key_run = jax.random.split(rng_key)
            tuning, trial = self.rehearse(program, key_pilot, session)
            if trial is not None:
                program, tuning = self._placed(program, tuning, trial)
            plan = plan._replace(is_tuned=trial is not None or self.tuning is not None)
            state = program.anneal(plan, tuning, key_run, self.threshold, session, "run")
            result = program.outcome(plan, key_run, state)
        seconds = time.monotonic() - started
        return record(
            type(self).__name__, path, plan, program.ladder, result, trial,
            {"seconds": seconds - session.seconds_compiling, "compile_seconds": session.seconds_compiling},
        )  # fmt: skip

    def _kernel(self, path: Path) -> Kernel:
        """The kernel that was asked for, or the one that suits what is known of the factors."""
        if self.kernel is not None:
            return self.kernel
        return HMC(metropolis="line-integral") if path.score_sites else HMC()

    def weights_of(self, path: Path) -> Weights | None:
        """How chains on a path are weighed; None for chains that are not."""
        return None

    def _checked(self, path: Path, kernel: Kernel, weights: Weights | None) -> Path:
        """The path as the kernel sees it.

        Raises:
            TypeError: if the kernel's test, or the weights, do not suit what is known of the factors.
        """
        if kernel.integrate_energies:
            return path.as_scores()
        if kernel.integrates_score and not path.score_sites:
            raise TypeError(
                f"{kernel!r} integrates scores because it has no log density, but here every factor is an energy: the "
                'exact test is cheaper. Use metropolis="exact", or integrate_energies=True to compare the two.'
            )
        if kernel.is_adjusted and not kernel.integrates_score and self.num_steps:
            path.refuse_scores(f"{type(kernel).__name__}'s Metropolis test")
        return path

    def _plan(self, path: Path, kernel: Kernel, weights: Weights | None) -> Plan:
        tunes = _can_tune(path, kernel)
        pilots = self.tuning is not None or (self.pilot > 0 and tunes)
        # Models alone move by path weights, which are then free of noise. Beside a likelihood they may stay, where
        # the covariance of x₀ is known: without it the ratio of densities is right along the proposal only.
        may_stay = bool(pilots and path.other_sites) and is_small(path)
        asks = self.predictor == "auto" and (weights == "energy" or (weights is not None and may_stay))
        predictor = (Ancestral() if pilots else None) if self.predictor == "auto" else self.predictor
        return Plan(
            kernel=kernel,
            predictor=None if follow_path(weights) else predictor,
            chooses=asks * (CLEARLY if path.other_sites else 1 / CLEARLY),
            weights=weights,
            num_chains=self.num_chains,
            num_pilot=self.pilot,
            num_starts=1 if weights or path.score_sites or not path.latent_sites else NUM_STARTS,
            num_warmup=self.num_warmup if tunes else 0,
            num_steps=self.num_steps if tunes else self.num_steps + self.num_warmup,
            num_draws=self.num_samples,
            thinning=self.thinning,
            is_tuned=self.tuning is not None,
            counts_noise=True,
            num_islands=self.num_islands,
            layout=self.layout,
        )


@partial(jax.jit, static_argnames="structure")
def _finest(structure: Structure, constants: Constants) -> jax.Array:
    """The narrowest width of x at the clean end."""
    position = structure.init(constants, jax.random.key(0), jnp.ones(()))
    widths = structure.widths(constants, position, jnp.zeros(()))
    return jnp.min(jnp.stack([jnp.min(widths[name]) for name in structure.diffusion_sites]))


def _can_tune(path: Path, kernel: Kernel) -> bool:
    """Whether there is an acceptance to tune by: without log densities only a line integral has one."""
    return kernel.integrates_score or not path.score_sites
