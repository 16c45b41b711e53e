r"""The two drivers: independent chains, and weighted particles.

Both are faces of one level loop (:mod:`lehr.annealing.loop`), with the manners of
``numpyro.infer.MCMC``: made from a model and a kernel, started by ``run(key, *args)``.

- :class:`AnnealedMCMC` takes independent chains down the ladder and then draws from each at
  the last level, so that R-hat and ESS mean what they always mean. What a chain cannot
  mend is the share of each mode: a chain that came down into the wrong mode stays.
- :class:`AnnealedSMC` weighs the same chains by how the density changed at each level, and
  resamples: the shares come out right, and with them the evidence.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lehr.annealing.ladder import Ladder, check_count, ladder_for
from lehr.annealing.loop import Anneal, Plan, anneal
from lehr.annealing.progress import progress_bar
from lehr.annealing.run import Run, record
from lehr.kernels import HMC, Kernel
from lehr.potentials.base import Potential
from lehr.programs.closure import close
from lehr.programs.path import Path

__all__ = ["AnnealedMCMC", "AnnealedSMC"]

NUM_STARTS = 32  # where there are ordinary latents, each chain chooses its start from as many draws
_compiled = jax.jit(anneal, static_argnames=("structure", "plan"))


class _Driver:
    """What both faces share."""

    weighted: bool

    def __init__(
        self,
        model: Callable[..., Any] | Potential | Path,
        kernel: Kernel | None,
        ladder: int | Ladder,
        num_steps: int,
        num_warmup: int,
        num_chains: int,
        progress: bool,
    ) -> None:
        kernel = HMC() if kernel is None else kernel
        if not isinstance(kernel, Kernel):
            raise TypeError(
                f"{type(self).__name__} needs a lehr kernel such as lehr.HMC(); got {kernel!r}. BlackJAX kernels plug "
                "in through lehr.kernels.Kernel."
            )
        if not isinstance(ladder, Ladder):
            check_count("ladder (a number of levels)", ladder)
        check_count("num_steps", num_steps)
        check_count("num_warmup", num_warmup, least=0)
        self.path = model if isinstance(model, Path) else Path(model)
        self.kernel = kernel
        self.ladder = ladder
        self.num_steps, self.num_warmup, self.num_chains = num_steps, num_warmup, num_chains
        self.progress = progress
        self._run: Run | None = None

    def run(self, rng_key: jax.Array, *args: Any, **kwargs: Any) -> Run:
        """Sample; the result is also kept, for the other methods.

        Args:
            rng_key: a JAX key, or an integer seed.
            args: the model's arguments; none for a potential or a bound path. Arrays and floats are
                data: other values of the same shape compile nothing.
            kwargs: the model's keyword arguments.

        Raises:
            ValueError: for bad data or a model that cannot be annealed, see :class:`~lehr.Path`.
            TypeError: if a factor is a score and the kernel or the weights need an energy.
        """
        rng_key = _as_key(rng_key)
        path = self.path if self.path.is_bound and not (args or kwargs) else self.path(*args, **kwargs)
        self._refuse(path)
        ladder = self._ladder(path)
        path = path.ending_at(ladder.times[-1])
        structure, constants = close(path)
        plan = self._plan(path)
        dimension = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(path.init, rng_key)))
        started = time.monotonic()
        with progress_bar(type(self).__name__, len(ladder)) if self.progress else contextlib.nullcontext():
            result: Anneal = jax.block_until_ready(
                _compiled(
                    structure=structure,
                    plan=plan,
                    constants=constants,
                    times=ladder.times,
                    rng_key=rng_key,
                    threshold=jnp.asarray(self._threshold(), float),
                    step_size=jnp.asarray(self.kernel.initial_step_size(dimension), float),
                )
            )
        self._run = record(type(self).__name__, path, plan, ladder, result, time.monotonic() - started)
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

    def _refuse(self, path: Path) -> None:
        if self.kernel.is_adjusted:
            path.refuse_scores(f"{type(self.kernel).__name__}'s Metropolis test")

    def _ladder(self, path: Path) -> Ladder:
        if isinstance(self.ladder, Ladder):
            return self.ladder
        position = path.init(jax.random.key(0))

        def finest(t: jax.Array) -> float:
            widths = path.widths(position, t)
            return min(float(jnp.min(widths[name])) for name in path.diffusion_sites)

        return ladder_for(path.schedule, finest, self.ladder)

    def _plan(self, path: Path) -> Plan:
        tunes = not path.score_sites  # the acceptance that tuning follows needs energies
        return Plan(
            kernel=self.kernel,
            num_chains=self.num_chains,
            num_starts=1 if self.weighted or not path.latent_sites else NUM_STARTS,
            num_warmup=self.num_warmup if tunes else 0,
            num_steps=self.num_steps if tunes else self.num_steps + self.num_warmup,
            num_draws=self._num_draws(),
            thinning=self._thinning(),
            weighted=self.weighted,
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
        kernel: how chains move; :class:`~lehr.HMC` by default.
        ladder: a :class:`~lehr.Ladder`, or a number of levels: uniform in log-SNR on the model's
            schedule, ending where the blur is a tenth of the finest feature.
        num_steps: transitions at each level, at a fixed step size.
        num_warmup: transitions at each level before those, which tune the step size. With 0 the
            kernel's step size is used as it is.
        num_chains: independent chains.
        num_samples: draws kept from each chain at the last level.
        thinning: transitions for each draw that is kept.
        progress: show a progress bar, where there is a terminal.

    Raises:
        ValueError: for counts that are not positive integers.
        TypeError: for a kernel or model of the wrong kind.

    References:
        Du et al., Reduce, reuse, recycle, ICML 2023.
    """

    weighted = False

    def __init__(
        self,
        model: Callable[..., Any] | Potential | Path,
        kernel: Kernel | None = None,
        ladder: int | Ladder = 40,
        num_steps: int = 4,
        num_warmup: int = 1,
        num_chains: int = 256,
        num_samples: int = 100,
        *,
        thinning: int = 1,
        progress: bool = True,
    ) -> None:
        check_count("num_chains", num_chains)
        check_count("num_samples", num_samples)
        check_count("thinning", thinning)
        super().__init__(model, kernel, ladder, num_steps, num_warmup, num_chains, progress)
        self.num_samples, self.thinning = num_samples, thinning

    def _num_draws(self) -> int:
        return self.num_samples

    def _thinning(self) -> int:
        return self.thinning


class AnnealedSMC(_Driver):
    """Weighted and resampled particles down the ladder: right mode masses, and the evidence.

    Args:
        model: a NumPyro model, a potential, or a path; every diffusion factor an energy.
        kernel: how particles move, with a Metropolis test; :class:`~lehr.HMC` by default.
        ladder: a :class:`~lehr.Ladder`, or a number of levels, as for :class:`AnnealedMCMC`.
        num_steps: transitions at each level, at a fixed step size.
        num_warmup: transitions at each level before those, which tune the step size.
        num_particles: N.
        threshold: resample where the effective sample size falls below this share of N.
        progress: show a progress bar, where there is a terminal.

    Raises:
        ValueError: for counts that are not positive integers, a threshold outside [0, 1], or an
            unadjusted kernel, whose weights would be biased.
        TypeError: for a kernel or model of the wrong kind.

    References:
        Del Moral, Doucet & Jasra, Sequential Monte Carlo samplers, JRSS B 2006.
    """

    weighted = True

    def __init__(
        self,
        model: Callable[..., Any] | Potential | Path,
        kernel: Kernel | None = None,
        ladder: int | Ladder = 40,
        num_steps: int = 2,
        num_warmup: int = 1,
        num_particles: int = 1000,
        *,
        threshold: float = 0.5,
        progress: bool = True,
    ) -> None:
        check_count("num_particles", num_particles, least=2)
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold is a share of the particles, between 0 and 1; got {threshold!r}.")
        super().__init__(model, kernel, ladder, num_steps, num_warmup, num_particles, progress)
        if not self.kernel.is_adjusted:
            raise ValueError(
                f"AnnealedSMC weighs particles as if they followed each level's density, and "
                f"{type(self.kernel).__name__} leaves it biased: weights and evidence would be wrong. Use lehr.HMC or "
                "lehr.MALA, or the unadjusted kernel in lehr.AnnealedMCMC."
            )
        self.threshold = threshold

    @property
    def log_evidence(self) -> float:
        """log ∫ Π p_i^{w_i}(x) p(θ) L(y | x, θ) dx dθ at the last level, every energy at face value."""
        return self.last_run.log_evidence

    def _refuse(self, path: Path) -> None:
        path.refuse_scores("AnnealedSMC with energy weights")

    def _threshold(self) -> float:
        return self.threshold


def _as_key(rng_key: Any) -> jax.Array:
    """A typed key, from one, from a raw ``PRNGKey``, or from an integer seed."""
    if isinstance(rng_key, int | np.integer):
        return jax.random.key(rng_key)
    if not isinstance(rng_key, jax.Array):
        raise TypeError(f"rng_key must be a JAX key, as from jax.random.key(0), or an integer; got {rng_key!r}.")
    is_typed = jnp.issubdtype(rng_key.dtype, jax.dtypes.prng_key)
    return rng_key if is_typed else jax.random.wrap_key_data(rng_key)
