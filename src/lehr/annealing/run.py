r"""What a driver leaves behind.

A :class:`Run` is plain numpy: draws by site and on each site's own scale, statistics by
level, and for weighted runs the weighted particles and the evidence. ``to_arviz`` and
``print_summary`` are views of it (:mod:`lehr.diagnostics`).

**Standard error of the evidence.** With W_e the total weight of the particles that descend
from starting point e,

    V = 1 − (N/(N − 1))^{1 + S} (1 − Σ_e W_e²),     S = N Σ_r Σ_e Var_r(W_e)

estimates the relative variance of Ẑ from one run (Lee & Whiteley, Variance estimation in the particle filter,
Biometrika 2018). S is the number of resamplings if they are multinomial. Systematic resampling only rounds N W_e up or
down, which scatters families less: with f the fraction of N W_e that is rounded, Var(W_e) = f (1 − f)/N². Of a run with
islands the standard error is that of the mean of their Z, from their scatter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any, NamedTuple

import jax
import numpy as np

from lehr.annealing.ladder import Ladder
from lehr.annealing.loop import Anneal, LevelStats, num_loops
from lehr.annealing.plan import Plan
from lehr.annealing.tuning import SHORT_SHARE, Tuning
from lehr.programs.path import Path
from lehr.programs.ratios import is_small, num_derivatives

__all__ = ["Run", "Trial", "make_run", "record"]


@dataclass(frozen=True)
class Run:
    """The outcome of :meth:`AnnealedMCMC.run` or :meth:`AnnealedSMC.run`.

    Attributes:
        method: the driver's name.
        samples: draws at the last level, by site, each of shape (chain, draw, *site). A weighted
            run's are equally weighted, in the order of their ancestry and cut into up to four
            blocks as chains: where lineages have not mixed, R-hat and ESS show it.
        sample_stats: (chain, draw) arrays ``acceptance_rate``, ``diverging``, ``lp``, where they exist.
        observations: observed values, by site.
        levels: per-level arrays, shape (K,): ``t``, ``log_snr``, ``sigma`` (σ/α, the noise in units of
            the data), ``acceptance_rate``, ``step_size``, ``conditional_ess`` (which share of
            the particles is left by what weights gained on the way there), ``ess_weights``, ``log_evidence``,
            ``resampled``, ``survivors`` (distinct ancestors), ``diverging`` (transitions), ``nonfinite`` (chains whose
            log density or gradient was not finite on entry); with both kinds of weights ``gap`` (energy less path,
            nats); with path weights of small events ``correction`` (root mean square of what the ratio by a reverse
            kernel lacks, nats: where it is no small part of one, levels are too far apart); with scores
            ``loop_integral`` (root mean square of ∮ s·dx over triangles of one scale, nats).
        attrs: how the run was made, and what it cost.
        tuning: the steps that were taken and their levels, for another run.
        particles: a weighted run's weighted set, by site, shape (N, *site); empty otherwise.
        log_weights: its normalised log weights, shape (N,); None for an unweighted run.
    """

    method: str
    samples: dict[str, np.ndarray] = field(repr=False)
    sample_stats: dict[str, np.ndarray] = field(repr=False)
    observations: dict[str, np.ndarray] = field(repr=False)
    levels: dict[str, np.ndarray] = field(repr=False)
    attrs: dict[str, Any]
    tuning: Tuning = field(repr=False)
    _path: Path = field(repr=False)
    particles: dict[str, np.ndarray] = field(repr=False, default_factory=dict)
    log_weights: np.ndarray | None = field(repr=False, default=None)
    _log_evidence: float | None = None
    _log_evidence_se: float | None = None

    def get_samples(self, group_by_chain: bool = False) -> dict[str, np.ndarray]:
        """The draws by site.

        Args:
            group_by_chain: keep the leading (chain, draw) dimensions instead of flattening them.
        """
        if group_by_chain:
            return dict(self.samples)
        return {name: draws.reshape(-1, *draws.shape[2:]) for name, draws in self.samples.items()}

    def log_likelihood(self) -> dict[str, np.ndarray]:
        """log p of what was observed at each draw, by observed site that is no diffusion: (chain, draw, *events)."""
        return {name: np.asarray(value) for name, value in self._path.log_likelihood(self.samples, 2).items()}

    @property
    def log_evidence(self) -> float:
        """log ∫ Π p_i^{w_i}(x) p(θ) L(y | x, θ) dx dθ at the last level, every energy at face value:
        absolute for exact and calibrated potentials, relative to the factors' own normalisers otherwise.

        Raises:
            AttributeError: for an unweighted run, which has none.
        """
        return _weighted_only(self._log_evidence)

    @property
    def log_evidence_se(self) -> float:
        """Standard error of ``log_evidence``, estimated from this run's genealogy."""
        return _weighted_only(self._log_evidence_se)

    def to_xarray(self) -> Any:
        """The run as an :class:`xarray.DataTree`, whichever ArviZ is installed."""
        from lehr.diagnostics.tree import to_xarray

        return to_xarray(self)

    def to_arviz(
        self,
        *,
        prior: Mapping[str, Any] | None = None,
        posterior_predictive: Mapping[str, Any] | None = None,
        log_likelihood: Mapping[str, Any] | bool = False,
    ) -> Any:
        """The run as ArviZ has it: ``InferenceData`` for ArviZ 0.x, ``xarray.DataTree`` from 1.0 on.

        Groups: ``/posterior``, ``/sample_stats``, ``/observed_data``, ``/anneal`` with the dimension
        ``noise_level``, for a weighted run ``/particles``, and what is given here.

        Args:
            prior: draws by site, as ``numpyro.infer.Predictive(model, num_samples=...)`` returns them.
            posterior_predictive: draws by site, one for each posterior draw in order, as
                ``Predictive(model, run.get_samples())`` returns them.
            log_likelihood: log p of each observed event at each posterior draw, by site, as
                ``numpyro.infer.log_likelihood`` returns it; True has it computed, and ``arviz.loo`` works then.
                Events in a plate are counted one by one, those joined by ``to_event`` as one.

        Raises:
            ValueError: if a group has not one draw for each of the posterior's.
        """
        from lehr.diagnostics.tree import to_arviz

        if log_likelihood is True:
            log_likelihood = self.log_likelihood()
        return to_arviz(self, prior, posterior_predictive, log_likelihood or None)

    def to_netcdf(self, path: str | FilePath) -> FilePath:
        """Write the tree to a netCDF file; :func:`lehr.from_netcdf` and ArviZ read it."""
        from lehr.diagnostics.tree import to_netcdf

        return to_netcdf(self, path)

    def print_summary(self, console: Any = None) -> None:
        """Print the sites (mean, sd, ESS, R-hat) and the levels (σ, acceptance, step, ESS, divergences).

        Args:
            console: a rich console; standard output by default.
        """
        from lehr.diagnostics.summary import print_summary

        print_summary(self, console)


class Trial(NamedTuple):
    """What a pilot pass leaves: how many chains it had, and their statistics by level, as numpy arrays."""

    num_chains: int
    levels: LevelStats


def make_run(
    method: str,
    path: Path,
    ladder: Ladder,
    position: dict[str, np.ndarray],
    sample_stats: dict[str, np.ndarray],
    levels: dict[str, np.ndarray],
    attrs: dict[str, Any],
    tuning: Tuning,
    **weighted: Any,
) -> Run:
    """A :class:`Run`, with what there is to say of any path and ladder.

    Args:
        method: the driver's name.
        path: bound.
        ladder: the levels.
        position: draws at the last level, unconstrained, leaves (chain, draw, ...).
        sample_stats: as the Run has them.
        levels: statistics by level, besides the levels themselves.
        attrs: how the run was made.
        tuning: the steps that were taken.
        weighted: what a weighted run has besides.
    """
    log_snr = np.asarray(path.schedule.log_snr(ladder.times))
    return Run(
        method=method,
        samples=_constrained(path, position, 2),
        sample_stats=sample_stats,
        observations={k: np.asarray(v) for k, v in path.observations.items() if not isinstance(v, jax.core.Tracer)},
        levels={"t": np.asarray(ladder.times), "log_snr": log_snr, "sigma": np.exp(-log_snr / 2)} | levels,
        attrs=attrs
        | {
            "guidance": ", ".join(sorted({repr(g) for g in path.guidance.values()})),
            "num_levels": len(ladder),
            "calibrated": int(path.is_calibrated),
        },
        tuning=tuning,
        _path=path,
        **weighted,
    )


def record(
    method: str,
    path: Path,
    plan: Plan,
    ladder: Ladder,
    host: Any,
    trial: Trial | None,
    seconds: dict[str, float],
) -> Run:
    """What the compiled programs returned, as a :class:`Run`.

    Args:
        method: the driver's name.
        path: bound.
        plan: what was static.
        ladder: the levels.
        host: what was returned, as numpy arrays.
        trial: the pilot's.
        seconds: what it took.
    """
    levels = {
        "acceptance_rate": host.levels.acceptance_rate,
        "step_size": host.levels.step_size,
        "diverging": host.levels.divergences,
        "nonfinite": host.levels.nonfinite,
    }
    if plan.weights:
        levels |= {
            "conditional_ess": host.levels.conditional_ess,
            "ess_weights": host.levels.ess,
            "log_evidence": host.levels.log_evidence,
            "resampled": host.levels.resampled,
            "survivors": host.levels.survivors,
        }
    if plan.weights == "both":
        levels["gap"] = host.levels.gap
    if plan.weights == "path" and is_small(path):
        levels["correction"] = host.levels.correction
    if path.score_sites:
        levels["loop_integral"] = host.levels.loop_integral
    by_chain = jax.tree.map(lambda leaf: np.swapaxes(leaf, 0, 1), host.draws)
    if plan.weights:
        by_chain = jax.tree.map(lambda leaf: leaf.reshape(_blocks(leaf.shape[0]), -1, *leaf.shape[2:]), by_chain)
    stats = {} if path.score_sites else {"lp": by_chain.logdensity}
    if not (path.score_sites and not plan.kernel.integrates_score) and plan.num_steps:
        if not plan.weights:
            stats["acceptance_rate"] = by_chain.stats.acceptance_rate
    else:  # without log densities nobody knows what a test would have said
        levels["acceptance_rate"] = np.full(len(ladder), np.nan)
    if not plan.weights and plan.num_steps:
        stats["diverging"] = by_chain.stats.is_divergent > 0
    attrs = {
        "kernel": repr(plan.kernel) if plan.num_steps else repr(plan.predictor or plan.weights),
        "weights": plan.weights or "none",
        "predictor": repr(plan.predictor),
        "num_warmup": plan.num_warmup,
        "num_steps": plan.num_steps,
        "num_chains": plan.num_chains,
        "pilot_chains": 0 if trial is None else trial.num_chains,
        "evaluations_per_chain": _evaluations(path, plan, host, trial),
        **{name: round(value, 3) for name, value in seconds.items()},
    }
    tuning = Tuning(
        step_size=host.levels.step_size,
        scale=host.levels.inverse_mass**0.5,
        short_share=SHORT_SHARE,
        curvature=host.levels.curvature,
        moves=host.levels.moves,
        times=np.asarray(ladder.times),
    )
    weighted: dict[str, Any] = {}
    if plan.weights:
        weighted = {
            "particles": _constrained(path, host.position, 1),
            "log_weights": host.log_weights,
            "_log_evidence": float(host.levels.log_evidence[-1]),
            "_log_evidence_se": _evidence_error(host),
        }
    return make_run(method, path, ladder, by_chain.position, stats, levels, attrs, tuning, **weighted)


def _evaluations(path: Path, plan: Plan, result: Anneal, trial: Trial | None) -> float:
    """Gradient evaluations for each chain, with the pilot's and the diagnostics' shared among all."""
    k = result.levels.evaluations.size
    between = 1.0  # the refresh
    if plan.follows_path:
        derivatives = num_derivatives(path)
        between += (1 + derivatives) * (k - 1) / k  # to leave a level
        between += derivatives if plan.weights == "path" else 0  # and where a step arrives
    elif plan.predictor is not None:
        between += plan.predictor.evaluations * (k - 1) / k
    starts = plan.num_starts if plan.num_starts > 1 else 0
    made = float(np.sum(result.draws.stats.evaluations))
    made += plan.num_chains * (float(np.sum(result.levels.evaluations)) + k * between + starts)
    if trial is not None:
        made += trial.num_chains * k * ((plan.chooses > 0 and plan.predictor is not None) + plan.is_informed)
        made += trial.num_chains * (float(np.sum(trial.levels.evaluations)) + k * between)
    if path.score_sites:
        made += 15 * num_loops(plan) * k
    made /= plan.num_chains
    return int(made) if made == int(made) else round(made, 2)


def _constrained(path: Path, position: dict[str, np.ndarray], batch_ndims: int) -> dict[str, np.ndarray]:
    """Positions as draws of the sites, each on its own scale."""
    return {name: np.asarray(value) for name, value in path.constrain(position, batch_ndims).items()}


def _blocks(n: int) -> int:
    return next(c for c in (4, 2, 1) if n % c == 0)


def _evidence_error(host: Anneal) -> float:
    islands = host.log_evidence.size
    if islands > 1:
        shares = np.exp(host.log_evidence - host.levels.log_evidence[-1])  # Z of each over their mean
        return float(np.std(shares, ddof=1) / np.sqrt(islands))
    n = host.log_weights.size
    families = np.bincount(host.ancestors, np.exp(host.log_weights), n)
    variance = 1 - (n / (n - 1)) ** (1 + float(host.scatter[0])) * (1 - float(np.sum(families**2)))
    return float(np.sqrt(max(variance, 0.0)))


def _weighted_only(value: float | None) -> float:
    if value is None:
        raise AttributeError(
            "independent annealed chains carry no weights and estimate no evidence; use lehr.AnnealedSMC."
        )
    return value
