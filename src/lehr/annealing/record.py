r"""From what compiled programs return to a :class:`~lehr.annealing.run.Run`.

**Standard error of the evidence.** With W_e the total weight of the particles that descend
from starting point e,

    V = 1 − (N/(N − 1))^{1 + S} (1 − Σ_e W_e²),     S = N Σ_r Σ_e Var_r(W_e)

estimates the relative variance of Ẑ from one run (Lee & Whiteley, Variance estimation in the particle filter,
Biometrika 2018). S is the number of resamplings if they are multinomial. Systematic resampling only rounds N W_e up or
down, which scatters families less: with f the fraction of N W_e that is rounded, Var(W_e) = f (1 − f)/N². Of a run with
islands the standard error is that of the mean of their Z, from their scatter.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

from lehr.annealing.ladder import Ladder
from lehr.annealing.loop import num_loops
from lehr.annealing.plan import Plan
from lehr.annealing.run import Run
from lehr.annealing.state import Anneal, Draws, LevelStats
from lehr.annealing.tuning import SHORT_SHARE, Tuning
from lehr.programs.path import Path
from lehr.programs.ratios import is_small, num_derivatives

__all__ = ["Trial", "make_run", "record"]


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
    draws = jax.tree.map(lambda leaf: np.swapaxes(leaf, 0, 1), host.draws)
    if plan.weights:
        draws = jax.tree.map(lambda leaf: leaf.reshape(_blocks(leaf.shape[0]), -1, *leaf.shape[2:]), draws)
    attrs = {
        "kernel": repr(plan.kernel) if plan.num_steps else repr(plan.predictor or plan.weights),
        "weights": plan.weights or "none",
        "predictor": repr(plan.predictor),
        "num_warmup": plan.num_warmup,
        "num_steps": plan.num_steps,
        "num_chains": plan.num_chains,
        "pilot_chains": 0 if trial is None else trial.num_chains,
        "stranded": int(np.sum(~np.isfinite(host.logdensity) & np.isfinite(host.log_weights))),
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
    stats, levels = _sample_stats(path, plan, draws), _levels(path, plan, host.levels)
    return make_run(method, path, ladder, draws.position, stats, levels, attrs, tuning, **weighted)


def _levels(path: Path, plan: Plan, stats: LevelStats) -> dict[str, Any]:
    """The statistics by level that say something of this run."""
    levels: dict[str, Any] = {
        "acceptance_rate": stats.acceptance_rate if _is_tested(path, plan) else np.full(stats.ess.shape, np.nan),
        "step_size": stats.step_size,
        "diverging": stats.divergences,
        "nonfinite": stats.nonfinite,
    }
    if plan.weights:
        levels |= {
            "conditional_ess": stats.conditional_ess,
            "ess_weights": stats.ess,
            "log_evidence": stats.log_evidence,
            "resampled": stats.resampled,
            "survivors": stats.survivors,
        }
    if plan.weights == "both":
        levels["gap"] = stats.gap
    if plan.weights == "path" and is_small(path):
        levels["correction"] = stats.correction
    if path.score_sites:
        levels["loop_integral"] = stats.loop_integral
    return levels


def _sample_stats(path: Path, plan: Plan, draws: Draws) -> dict[str, Any]:
    """The statistics of each draw, (chain, draw), where there are any."""
    stats: dict[str, Any] = {} if path.score_sites else {"lp": draws.logdensity}
    if not plan.weights and plan.num_steps:
        if _is_tested(path, plan):
            stats["acceptance_rate"] = draws.stats.acceptance_rate
        stats["diverging"] = draws.stats.is_divergent > 0
    return stats


def _is_tested(path: Path, plan: Plan) -> bool:
    """Whether moves are made, and there is a test of them: without log densities nobody knows what it would say."""
    return plan.num_steps > 0 and (plan.kernel.integrates_score or not path.score_sites)


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
