r"""The drivers: independent chains, weighted particles, and the plain reverse diffusion.

All are faces of one level loop (:mod:`lehr.annealing.loop`), with the manners of
``numpyro.infer.MCMC``: made from a model and a kernel, started by ``run(key, *args)``.

- :class:`AnnealedMCMC` takes independent chains down the ladder and then draws from each at
  the last level, so that R-hat and ESS mean what they always mean. What a chain cannot
  mend is the share of each mode: a chain that came down into the wrong mode stays.
- :class:`AnnealedSMC` weighs the same chains by how the density changed at each level, and
  resamples: the shares come out right, and with them the evidence.
- :class:`Reverse` makes the moves between levels and nothing else: what a sampler of diffusion
  models usually does, and the baseline of every comparison.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lehr.annealing.keys import as_key
from lehr.annealing.ladder import Ladder, check_count, clean_end
from lehr.annealing.loop import Anneal, anneal
from lehr.annealing.plan import Plan
from lehr.annealing.predictors import Ancestral, Predictor, as_predictor
from lehr.annealing.progress import progress_bar
from lehr.annealing.run import Run, record
from lehr.annealing.tuning import SHORT_SHARE, Tuning, smooth
from lehr.annealing.weights import WEIGHTS, Weights, follow_path
from lehr.kernels import HMC, Kernel
from lehr.potentials.base import Potential
from lehr.programs.closure import Constants, Structure, close
from lehr.programs.path import Path
from lehr.programs.reverse import Level, evaluations

__all__ = ["AnnealedMCMC", "AnnealedSMC", "Program", "Reverse"]

NUM_STARTS = 32  # where there are ordinary latents, each chain chooses its start from as many draws
PILOT_CHAINS = 64
PILOT_WARMUP = 3  # tuned transitions of a pilot chain at each level
_compiled = jax.jit(anneal, static_argnames=("structure", "plan"))


class Program(NamedTuple):
    """A path made ready for the loop.

    Attributes:
        path: bound, and ending where the ladder does.
        plan: what is static.
        ladder: the levels.
        structure: the path's functions.
        constants: its data.
    """

    path: Path
    plan: Plan
    ladder: Ladder
    structure: Structure
    constants: Constants

    @property
    def dimension(self) -> int:
        """D: how many numbers a position has, over all latent sites."""
        return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(self.path.init, jax.random.key(0))))


class _Driver:
    """What all faces share."""

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
        progress: bool,
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
            pilot = PILOT_CHAINS if num_warmup == 0 and tuning is None else 0
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
        self.predictor = predictor if predictor == "auto" else as_predictor(predictor)
        self.progress = progress
        self._run: Run | None = None

    def prepare(self, path: Path, t_min: float | None = None, optional: tuple[str, ...] = ()) -> Program:
        """What is known of a run before it is compiled.

        Args:
            path: bound to its data.
            t_min: where a ladder ends that is yet to be made.
            optional: functions of the path that the loop itself does not need.

        Raises:
            ValueError, TypeError: as :meth:`run`.
        """
        path.bound_arguments()
        kernel, weights = self._kernel(path), self._weights(path)
        path = self._checked(path, kernel, weights)
        ladder = self.ladder
        if not isinstance(ladder, Ladder):
            t_min = clean_end(path.schedule, _finest(path)) if t_min is None else t_min
            ladder = Ladder.log_snr(path.schedule, ladder, t_min=t_min)
        path = path.ending_at(np.asarray(ladder.times)[-1])
        plan = self._plan(path, kernel, weights)
        structure, constants = close(path, *_functions(path, plan), *optional)
        return Program(path, plan, ladder, structure, constants)

    def rehearse(self, program: Program, rng_key: jax.Array) -> tuple[Tuning, Anneal | None]:
        """The steps to take, and the pilot pass that found them, if there was one."""
        path, plan, dimension = program.path, program.plan, program.dimension
        guess = Tuning(plan.kernel.initial_step_size(dimension), 1.0, SHORT_SHARE)
        tuning = (guess if self.tuning is None else self.tuning).on(len(program.ladder), dimension)
        if not self.pilot or not plan.num_steps or not _can_tune(path, plan.kernel):
            return tuning, None
        plan = plan._replace(
            num_chains=self.pilot, num_warmup=PILOT_WARMUP, num_draws=0, is_tuned=False, progress=False
        )
        trial = self._perform(program, plan, tuning, rng_key)
        found = Tuning(
            step_size=jnp.exp(smooth(jnp.log(trial.levels.step_size))),
            scale=trial.levels.inverse_mass**0.5,
            short_share=tuning.short_share,
            curvature=jnp.exp(jax.vmap(smooth, 1, 1)(jnp.log(trial.levels.curvature))),
            moves=trial.levels.moves,
        )
        return found, trial

    def _perform(self, program: Program, plan: Plan, tuning: Tuning, rng_key: jax.Array) -> Anneal:
        times = program.ladder.times
        return jax.block_until_ready(
            _compiled(
                structure=program.structure,
                plan=plan,
                constants=program.constants,
                times=times,
                levels=Level.of(program.path.schedule, times),
                tuning=tuning,
                rng_key=rng_key,
                threshold=jnp.asarray(self._threshold(), float),
            )
        )

    def run(self, rng_key: jax.Array, *args: Any, **kwargs: Any) -> Run:
        """Sample; the result is also kept, for the other methods.

        Args:
            rng_key: a JAX key, or an integer seed.
            args: the model's arguments; none for a potential or a bound path. Arrays and floats are
                data: other values of the same shape compile nothing.
            kwargs: the model's keyword arguments.

        Raises:
            ValueError: for bad data or a model that cannot be annealed, see :class:`~lehr.Path`.
            TypeError: if a factor is a score and the kernel or the weights need an energy, or the
                other way round.
        """
        rng_key = as_key(rng_key)
        path = self.path if self.path.is_bound and not (args or kwargs) else self.path(*args, **kwargs)
        program = self.prepare(path)
        path, plan, ladder = program.path, program.plan, program.ladder
        started = time.monotonic()
        with progress_bar(type(self).__name__, len(ladder)) if self.progress else contextlib.nullcontext():
            key_pilot, key_run = jax.random.split(rng_key)
            tuning, trial = self.rehearse(program, key_pilot)
            plan = plan._replace(is_tuned=trial is not None or self.tuning is not None)
            result = self._perform(program, plan, tuning, key_run)
        self._run = record(type(self).__name__, path, plan, ladder, result, trial, time.monotonic() - started)
        stranded = int(np.sum(~np.isfinite(np.asarray(result.logdensity))))
        if stranded:
            warnings.warn(
                f"{stranded} of {plan.num_chains} chains ended where the log density is not finite; print_summary() "
                "shows at which levels chains diverged.",
                stacklevel=2,
            )
        return self._run

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

    def to_arviz(self) -> Any:
        """The run for ArviZ; see :meth:`lehr.Run.to_arviz`."""
        return self.last_run.to_arviz()

    def _kernel(self, path: Path) -> Kernel:
        """The kernel that was asked for, or the one that suits what is known of the factors."""
        if self.kernel is not None:
            return self.kernel
        return HMC(metropolis="line-integral") if path.score_sites else HMC()

    def _weights(self, path: Path) -> Weights | None:
        return None

    def _checked(self, path: Path, kernel: Kernel, weights: Weights | None) -> Path:
        """The path as the kernel sees it.

        Raises:
            TypeError: if the kernel's test, or the weights, do not suit what is known of the factors.
        """
        if getattr(kernel, "integrate_energies", False):
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
        may_stay = bool(pilots and path.other_sites) and evaluations(path) > 1
        chooses = self.predictor == "auto" and (weights == "energy" or (weights is not None and may_stay))
        predictor = (Ancestral() if pilots else None) if self.predictor == "auto" else as_predictor(self.predictor)
        return Plan(
            kernel=kernel,
            predictor=None if follow_path(weights) else predictor,
            chooses=chooses,
            weights=weights,
            num_chains=self.num_chains,
            num_starts=1 if weights or path.score_sites or not path.latent_sites else NUM_STARTS,
            num_warmup=self.num_warmup if tunes else 0,
            num_steps=self.num_steps if tunes else self.num_steps + self.num_warmup,
            num_draws=self._num_draws(),
            thinning=self._thinning(),
            is_tuned=self.tuning is not None,
            counts_noise=True,
            progress=self.progress,
        )

    def _threshold(self) -> float:
        return 0.0

    def _num_draws(self) -> int:
        return 0

    def _thinning(self) -> int:
        return 1


class AnnealedMCMC(_Driver):
    """Independent chains down the ladder, then draws from each at the last level.

    Args:
        model: a NumPyro model, a potential, or a path.
        kernel: how chains move at a level: by default :class:`~lehr.HMC`, with line integrals where a
            factor is known through its score only.
        ladder: a :class:`~lehr.Ladder`, or a number of levels: uniform in log-SNR on the model's
            schedule, ending where the blur is a tenth of the finest feature.
        num_steps: transitions at each level, at a fixed step size.
        num_warmup: transitions at each level before those, which tune the step size, in place of a pilot.
        num_chains: independent chains.
        num_samples: draws kept from each chain at the last level.
        thinning: transitions for each draw that is kept.
        predictor: how chains move to the next level: ``None`` (they stay where they are),
            ``"ancestral"``, ``"ddim"``, ``"heun"``, ``"restart"`` or a :class:`~lehr.Restart`. The
            kernel then corrects at the level just reached.
        pilot: chains of the pilot pass that finds step sizes and scales for each level, which are then
            frozen; 0 for none. 64 unless ``num_warmup`` or ``tuning`` is given.
        tuning: steps that are known beforehand, a :class:`~lehr.Tuning`.
        progress: show a progress bar, where there is a terminal.

    Raises:
        ValueError: for counts that are not positive integers, an unknown predictor, or more than one
            way of tuning.
        TypeError: for a kernel or model of the wrong kind.

    References:
        Du et al., Reduce, reuse, recycle, ICML 2023.
        Song et al., Score-based generative modeling through SDEs, ICLR 2021 (predictor and corrector).
    """

    def __init__(
        self,
        model: Callable[..., Any] | Potential | Path,
        kernel: Kernel | None = None,
        ladder: int | Ladder = 40,
        num_steps: int = 4,
        num_warmup: int = 0,
        num_chains: int = 256,
        num_samples: int = 100,
        *,
        thinning: int = 1,
        predictor: str | Predictor | None = None,
        pilot: int | None = None,
        tuning: Tuning | None = None,
        progress: bool = True,
    ) -> None:
        check_count("num_steps", num_steps)
        check_count("num_chains", num_chains)
        check_count("num_samples", num_samples)
        check_count("thinning", thinning)
        super().__init__(model, kernel, ladder, num_steps, num_warmup, num_chains, pilot, tuning, predictor, progress)
        self.num_samples, self.thinning = num_samples, thinning

    def _num_draws(self) -> int:
        return self.num_samples

    def _thinning(self) -> int:
        return self.thinning


class AnnealedSMC(_Driver):
    """Weighted and resampled particles down the ladder: right mode masses, and the evidence.

    Args:
        model: a NumPyro model, a potential, or a path.
        kernel: how particles move at a level, with a Metropolis test: by default :class:`~lehr.HMC`,
            with line integrals where a factor is known through its score only.
        ladder: a :class:`~lehr.Ladder`, or a number of levels, as for :class:`AnnealedMCMC`.
        num_steps: transitions at each level, at a fixed step size.
        num_warmup: transitions at each level before those, which tune the step size, in place of a pilot.
        num_particles: N.
        threshold: resample where the effective sample size falls below this share of N.
        weights: ``"energy"``, from log densities; ``"path"``, from the models' own reverse kernels, for
            which scores are enough; ``"both"`` weighs by energies and reports the gap between the
            two, which a badly calibrated energy opens. By default ``"path"`` if a factor is a
            score and ``"energy"`` otherwise.
        predictor: with energy weights, how particles move to the next level: ``"ancestral"``, by a
            proposal that the weights account for; ``None``, they stay; ``"auto"``, whichever the pilot
            found better at each level, and ``None`` without a pilot. Path weights have their own proposal.
        pilot: as for :class:`AnnealedMCMC`, and so ``tuning``.
        tuning: steps that are known beforehand.
        progress: show a progress bar, where there is a terminal.

    Raises:
        ValueError: for counts that are not positive integers, a threshold outside [0, 1], an
            unadjusted kernel, whose weights would be biased, or options that exclude each other.
        TypeError: for a kernel or model of the wrong kind.

    References:
        Del Moral, Doucet & Jasra, Sequential Monte Carlo samplers, JRSS B 2006.
        Skreta et al., Feynman-Kac correctors in diffusion, ICML 2025 (weights of scores).
    """

    def __init__(
        self,
        model: Callable[..., Any] | Potential | Path,
        kernel: Kernel | None = None,
        ladder: int | Ladder = 40,
        num_steps: int = 2,
        num_warmup: int = 0,
        num_particles: int = 1000,
        *,
        threshold: float = 0.5,
        weights: Weights | None = None,
        predictor: str | Predictor | None = "auto",
        pilot: int | None = None,
        tuning: Tuning | None = None,
        progress: bool = True,
    ) -> None:
        check_count("num_steps", num_steps)
        check_count("num_particles", num_particles, least=2)
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold is a share of the particles, between 0 and 1; got {threshold!r}.")
        if weights is not None and weights not in WEIGHTS:
            raise ValueError(f'weights must be "energy", "path" or "both", or None to be chosen; got {weights!r}.')
        super().__init__(
            model, kernel, ladder, num_steps, num_warmup, num_particles, pilot, tuning, predictor, progress
        )
        if kernel is not None and not kernel.is_adjusted:
            raise ValueError(
                f"AnnealedSMC weighs particles as if they followed each level's density, and {type(kernel).__name__} "
                "leaves it biased: weights and evidence would be wrong. Use a kernel with a Metropolis test, such as "
                "lehr.HMC or lehr.MALA, or the unadjusted kernel in lehr.AnnealedMCMC."
            )
        chosen = self.predictor not in (None, "auto")
        if chosen and (follow_path(weights) or not isinstance(self.predictor, Ancestral)):
            raise ValueError(
                "AnnealedSMC must know the density of each move between levels. With energy weights the predictor may "
                'be "ancestral", None or "auto"; path weights bring their own proposal.'
            )
        self.threshold = threshold
        self.weights = weights

    @property
    def log_evidence(self) -> float:
        """log ∫ Π p_i^{w_i}(x) p(θ) L(y | x, θ) dx dθ at the last level, every energy at face value."""
        return self.last_run.log_evidence

    def _weights(self, path: Path) -> Weights:
        if self.weights is not None:
            return self.weights
        return "path" if path.score_sites else "energy"

    def _checked(self, path: Path, kernel: Kernel, weights: Weights | None) -> Path:
        if weights != "path":
            path.refuse_scores(f'AnnealedSMC(weights="{weights}")')
            if kernel.integrates_score:
                raise ValueError(
                    f'weights="{weights}" compares the log densities that the kernel keeps, and {kernel!r} keeps none. '
                    'Use weights="path", or metropolis="exact".'
                )
        if weights != "energy":
            path.refuse_without_denoiser(f'AnnealedSMC(weights="{weights}")')
        if weights == "path" and isinstance(self.predictor, Ancestral):
            raise ValueError("path weights bring their own proposal between levels; leave the predictor out.")
        return super()._checked(path, kernel, weights)

    def _threshold(self) -> float:
        return self.threshold


class Reverse(_Driver):
    """Plain reverse diffusion, along ∇ log π_t as if it were the score of one diffusion model.

    For one model that is how it is usually sampled. For a product the summed scores are not those
    of a diffusion, and the samples follow another density (N(0, 1)² comes out with variance
    1/3): it is the baseline that the other drivers are compared with. A likelihood enters
    through its gradient, as in diffusion posterior sampling.

    Args:
        model: a NumPyro model without ordinary latents, a potential, or a path.
        method: ``"ancestral"``, ``"ddim"``, ``"heun"``, ``"restart"``, or a :class:`~lehr.Restart`.
        num_levels: levels, uniform in log-SNR, or a :class:`~lehr.Ladder`.
        num_samples: independent samples.
        progress: show a progress bar, where there is a terminal.

    Raises:
        ValueError: for counts that are not positive integers, an unknown method, or, when run, a model with
            ordinary latents, which reverse diffusion does not move.

    References:
        Ho, Jain & Abbeel, Denoising diffusion probabilistic models, NeurIPS 2020.
        Chung et al., Diffusion posterior sampling for general noisy inverse problems, ICLR 2023.
    """

    def __init__(
        self,
        model: Callable[..., Any] | Potential | Path,
        method: str | Predictor = "ancestral",
        num_levels: int | Ladder = 100,
        num_samples: int = 1000,
        *,
        progress: bool = True,
    ) -> None:
        check_count("num_samples", num_samples)
        if method is None:
            raise ValueError("Reverse needs a method to move by; without one its samples would stay noise.")
        super().__init__(model, HMC(), num_levels, 0, 0, num_samples, 0, None, method, progress)

    def _plan(self, path: Path, kernel: Kernel, weights: Weights | None) -> Plan:
        return super()._plan(path, kernel, weights)._replace(num_starts=1, counts_noise=False)

    def _checked(self, path: Path, kernel: Kernel, weights: Weights | None) -> Path:
        if path.latent_sites:
            raise ValueError(
                f"reverse diffusion moves the diffusion sites only, and the model has the ordinary latent "
                f"{path.latent_sites[0]!r}, which would keep its draw from the prior. Condition on it "
                "(numpyro.handlers.condition), or use lehr.AnnealedMCMC or lehr.AnnealedSMC."
            )
        return path


def _finest(path: Path) -> Callable[[jax.Array], float]:
    """The narrowest width of a path, as a function of the level."""
    position = path.init(jax.random.key(0))

    def finest(t: jax.Array) -> float:
        widths = path.widths(position, t)
        return min(float(jnp.min(widths[name])) for name in path.diffusion_sites)

    return finest


def _can_tune(path: Path, kernel: Kernel) -> bool:
    """Whether there is an acceptance to tune by: without log densities only a line integral has one."""
    return kernel.integrates_score or not path.score_sites


def _functions(path: Path, plan: Plan) -> list[str]:
    """What the loop needs of a path besides the four functions that it always needs."""
    needed = []
    if path.score_sites:
        needed.append("unknown")
    if plan.follows_path:
        needed += ["reverse_step", "start_density"] + (["others"] if path.other_sites else [])
    elif plan.predictor is not None:
        needed += ["copies"] if plan.counts_noise else ["copies", "moments"]
    return needed
