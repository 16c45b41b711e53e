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

import copy
from collections.abc import Callable
from pathlib import Path as FilePath
from typing import Any, Literal, Self

import numpy as np
from jax.sharding import Mesh, NamedSharding

from lehr.annealing.driver import Driver
from lehr.annealing.ladder import Ladder, check_count
from lehr.annealing.plan import Plan
from lehr.annealing.predictors import Ancestral, Predictor
from lehr.annealing.program import Program
from lehr.annealing.progress import ProgressMeter
from lehr.annealing.record import Trial
from lehr.annealing.spacing import interpolated, spaced
from lehr.annealing.tuning import Tuning
from lehr.annealing.weights import WEIGHTS, Weights, follow_path
from lehr.kernels import HMC, MALA, Kernel
from lehr.potentials.base import Potential
from lehr.programs.path import Path

__all__ = ["AnnealedMCMC", "AnnealedSMC", "Reverse"]


class AnnealedMCMC(Driver):
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
        keep: ``"thin"`` keeps ``num_samples`` draws of each chain; ``"last"`` makes the same transitions and keeps
            the last draw only, as memory may ask for.
        predictor: how chains move to the next level: ``None`` (they stay where they are),
            ``"ancestral"``, ``"ddim"``, ``"heun"``, ``"restart"`` or a :class:`~lehr.Restart`. The
            kernel then corrects at the level just reached.
        pilot: chains of the pilot pass that finds step sizes and scales for each level, which are then
            frozen; 0 for none. 64 unless ``num_warmup`` or ``tuning`` is given.
        tuning: steps that are known beforehand, a :class:`~lehr.Tuning`.
        progress: a bar where there is a terminal or a notebook, a line now and then where there is none; False
            for silence; or a :class:`~lehr.ProgressMeter` of your own.
        checkpoint: a folder in which the run is kept while it goes on, so that ``run(..., resume=True)`` can take it
            up; Ctrl-C and SIGTERM then end it once it has been kept.
        sharding: spreads chains over devices: a ``jax.sharding.Mesh`` with an axis ``"chains"``, or a
            ``NamedSharding`` whose first dimension is spread; of several processes, over all of theirs.
        max_batch: the most chains of a device that are worked on at once, where memory is short; None for all.

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
        keep: Literal["thin", "last"] = "thin",
        predictor: str | Predictor | None = None,
        pilot: int | None = None,
        tuning: Tuning | None = None,
        progress: bool | ProgressMeter = True,
        checkpoint: str | FilePath | None = None,
        sharding: Mesh | NamedSharding | None = None,
        max_batch: int | None = None,
    ) -> None:
        check_count("num_steps", num_steps)
        check_count("num_chains", num_chains)
        check_count("num_samples", num_samples)
        check_count("thinning", thinning)
        if keep not in ("thin", "last"):
            raise ValueError(f'keep must be "thin", every thinning-th draw, or "last", the last one; got {keep!r}.')
        super().__init__(
            model, kernel, ladder, num_steps, num_warmup, num_chains, pilot, tuning, predictor, progress, checkpoint,
            sharding, max_batch,
        )  # fmt: skip
        keeps_all = keep == "thin"
        self.num_samples, self.thinning = (num_samples, thinning) if keeps_all else (1, num_samples * thinning)


# What AnnealedSMC takes where nothing is said. Of energies alone the moves between levels know nearly all there is.
ALONE = {"kernel": MALA(), "ladder": 24, "num_steps": 1, "pilot": 32}
LEVELS, STEPS = 40, 2


class AnnealedSMC(Driver):
    """Weighted and resampled particles down the ladder: right mode masses, and the evidence.

    What is left out is chosen once the model is seen. Energies alone take 24 levels of one transition of
    :class:`~lehr.MALA`: their moves between levels know the curvature, and do most of the work. Beside a likelihood, or
    with a score among the factors, there are 40 levels of two transitions of :class:`~lehr.HMC`.

    Args:
        model: a NumPyro model, a potential, or a path.
        kernel: how particles move at a level, with a Metropolis test; the default has line integrals where a factor is
            known through its score only.
        ladder: a :class:`~lehr.Ladder`, or a number of levels between the same ends as for :class:`AnnealedMCMC`. Where
            there is a pilot it places them, closest where its particles lost most; without one, and with path weights,
            they are uniform in log-SNR.
        num_steps: transitions at each level, at a fixed step size; with path weights it may be 0, and the models'
            reverse kernels are then all that moves x (a twisted diffusion sampler).
        num_warmup: transitions at each level before those, which tune the step size, in place of a pilot.
        num_particles: N.
        threshold: resample where the effective sample size falls below this share of N.
        islands: sets of particles that are resampled each within itself: no traffic between devices if they are a
            multiple of those, and a standard error of the evidence from their scatter.
        weights: ``"energy"``, from log densities; ``"path"``, from the models' own reverse kernels, for
            which scores are enough; ``"both"`` weighs by energies and reports the gap between the
            two, which a badly calibrated energy opens. By default ``"path"`` if a factor is a
            score and ``"energy"`` otherwise.
        predictor: with energy weights, how particles move to the next level: ``"ancestral"``, by a
            proposal that the weights account for; ``None``, they stay; ``"auto"``, whichever the pilot
            found better at each level, and ``None`` without a pilot. Path weights have their own proposal.
        pilot: as for :class:`AnnealedMCMC`, and so ``tuning``; 32 chains for energies alone.
        tuning: steps that are known beforehand.
        progress: as for :class:`AnnealedMCMC`, and so ``checkpoint``, ``sharding`` and ``max_batch``.

    Raises:
        ValueError: for counts that are not positive integers, a threshold outside [0, 1], an
            unadjusted kernel, whose weights would be biased, or options that exclude each other.
        TypeError: for a kernel or model of the wrong kind.

    References:
        Del Moral, Doucet & Jasra, Sequential Monte Carlo samplers, JRSS B 2006.
        Skreta et al., Feynman-Kac correctors in diffusion, ICML 2025 (weights of scores).
        Wu et al., Practical and asymptotically exact conditional sampling in diffusion models, NeurIPS 2023.
    """

    def __init__(
        self,
        model: Callable[..., Any] | Potential | Path,
        kernel: Kernel | None = None,
        ladder: int | Ladder | None = None,
        num_steps: int | None = None,
        num_warmup: int = 0,
        num_particles: int = 1000,
        *,
        threshold: float = 0.5,
        islands: int = 1,
        weights: Weights | None = None,
        predictor: str | Predictor | None = "auto",
        pilot: int | None = None,
        tuning: Tuning | None = None,
        progress: bool | ProgressMeter = True,
        checkpoint: str | FilePath | None = None,
        sharding: Mesh | NamedSharding | None = None,
        max_batch: int | None = None,
    ) -> None:
        given = {"kernel": kernel, "ladder": ladder, "num_steps": num_steps, "pilot": pilot}
        self._open = {name for name, value in given.items() if value is None}
        num_steps = STEPS if num_steps is None else num_steps
        check_count("num_steps", num_steps, least=0)
        check_count("num_particles", num_particles, least=2)
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold is a share of the particles, between 0 and 1; got {threshold!r}.")
        if weights is not None and weights not in WEIGHTS:
            raise ValueError(f'weights must be "energy", "path" or "both", or None to be chosen; got {weights!r}.')
        check_count("islands", islands)
        if num_particles % islands or num_particles // islands < 2:
            raise ValueError(f"{islands} islands of at least 2 particles each do not make {num_particles} particles.")
        super().__init__(
            model, kernel, LEVELS if ladder is None else ladder, num_steps, num_warmup, num_particles, pilot,
            tuning, predictor, progress, checkpoint, sharding, max_batch,
        )  # fmt: skip
        self.num_islands = islands
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

    def weights_of(self, path: Path) -> Weights:
        if self.weights is not None:
            return self.weights
        return "path" if path.score_sites else "energy"

    def _settled(self, path: Path) -> Self:
        if path.other_sites or self.weights_of(path) != "energy":
            return self
        driver = copy.copy(self)
        for name in self._open - (set() if self.pilot else {"pilot"}):
            setattr(driver, name, ALONE[name])
        return driver

    def _placed(self, program: Program, tuning: Tuning, trial: Trial) -> tuple[Program, Tuning]:
        if isinstance(self.ladder, Ladder) or program.plan.weights == "path":
            return program, tuning
        schedule, before = program.path.schedule, program.ladder
        after = spaced(before, schedule, np.asarray(trial.levels.conditional_ess))
        return program._replace(ladder=after), interpolated(tuning, schedule, before, after)

    def _checked(self, path: Path, kernel: Kernel, weights: Weights | None) -> Path:
        if weights != "path":
            if not self.num_steps:
                raise ValueError(
                    f'num_steps=0 with weights="{weights}" leaves particles where they are: only path weights come '
                    "with moves of their own. Give num_steps >= 1."
                )
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


class Reverse(Driver):
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
        progress: as for :class:`AnnealedMCMC`, and so ``checkpoint``, ``sharding`` and ``max_batch``.

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
        progress: bool | ProgressMeter = True,
        checkpoint: str | FilePath | None = None,
        sharding: Mesh | NamedSharding | None = None,
        max_batch: int | None = None,
    ) -> None:
        check_count("num_samples", num_samples)
        if method is None:
            raise ValueError("Reverse needs a method to move by; without one its samples would stay noise.")
        super().__init__(
            model, HMC(), num_levels, 0, 0, num_samples, 0, None, method, progress, checkpoint, sharding, max_batch
        )

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
