"""Tables that say whether to believe a run.

A coordinate that never moved has ESS = N and R-hat = NaN by the usual formulas; here it is
masked and counted instead, since a stuck chain is the first thing to know about.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from lehr.annealing.run import Run

__all__ = ["SiteSummary", "print_summary", "summarise"]

MAX_ROWS = 12
COLUMNS = {  # of the table of levels, where a run has them
    "sigma": ("σ/α", ".3g"),
    "acceptance_rate": ("accepted", ".3g"),
    "step_size": ("step", ".3g"),
    "swap_rate": ("swapped", ".2f"),
    "ess_weights": ("ESS", ".0f"),
    "log_evidence": ("log Z", ".3f"),
    "gap": ("gap", "+.3f"),
    "loop_integral": ("∮ s·dx", ".2g"),
    "diverging": ("diverging", ".0f"),
}
LARGE_GAP = 0.15  # nats at one level: beyond what short steps leave between the two kinds of weights
LARGE_LOOP = 0.1  # nats round a triangle of one scale


class SiteSummary(NamedTuple):
    """Summary of a site, element by element; arrays of the site's shape.

    Attributes:
        mean: posterior mean.
        sd: posterior standard deviation.
        ess: bulk effective sample size over all chains; NaN where stuck.
        r_hat: rank-normalised split R-hat; NaN where stuck or with one chain.
        stuck: True where a draw never changed in any chain.
        stuck_chains: how many chains did not move in this element.
    """

    mean: np.ndarray
    sd: np.ndarray
    ess: np.ndarray
    r_hat: np.ndarray
    stuck: np.ndarray
    stuck_chains: np.ndarray


def summarise(draws: np.ndarray) -> SiteSummary:
    """Diagnose one site.

    Args:
        draws: shape (chain, draw, *site).
    """
    import arviz as az  # here, since it is slow to import

    draws = np.asarray(draws, np.float64)
    site = draws.shape[2:]
    flat = draws.reshape(*draws.shape[:2], -1)
    still = np.all(flat == flat[:, :1], axis=1) & (draws.shape[1] > 1)  # one draw says nothing of moving
    stuck = np.all(still, axis=0)
    ess, r_hat = np.full(stuck.shape, np.nan), np.full(stuck.shape, np.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # short or single chains give NaN, which says it
        for i in np.flatnonzero(~stuck & np.all(np.isfinite(flat), axis=(0, 1))):
            ess[i] = float(az.ess(flat[..., i]))
            r_hat[i] = float(az.rhat(flat[..., i])) if flat.shape[0] > 1 else np.nan
    columns = (flat.mean((0, 1)), flat.std((0, 1)), ess, r_hat, stuck, still.sum(0))
    return SiteSummary(*(c.reshape(site) for c in columns))


def print_summary(run: Run, console: Console | None = None) -> None:
    """Print the table of sites and the table of levels of ``run``."""
    console = Console() if console is None else console
    console.print(_sites(run))
    console.print(_levels(run))
    for line in _remarks(run):
        console.print(line, highlight=False)


def _sites(run: Run) -> Table:
    chains, draws = next(iter(run.samples.values())).shape[:2]
    table = Table(title=f"{run.method}: {chains} × {draws} draws", title_justify="left")
    table.add_column("site")
    for name in ("mean", "sd", "ESS", "R-hat"):
        table.add_column(name, justify="right")
    for name, values in run.samples.items():
        s = summarise(values[:, :, *_shown(values)])
        for index in np.ndindex(s.mean.shape):
            label = name + (f"[{', '.join(map(str, index))}]" if index else "")
            ess = "stuck" if s.stuck[index] else _number(s.ess[index], ".0f")
            row = (label, f"{s.mean[index]:.4g}", f"{s.sd[index]:.3g}", ess, _number(s.r_hat[index], ".3f"))
            table.add_row(*row)
        hidden = int(np.prod(values.shape[2:])) - s.mean.size
        if hidden > 0:
            table.add_row(f"[dim]… {hidden} more of {name}", "", "", "", "")
    return table


def _shown(values: np.ndarray) -> tuple[Any, ...]:
    """Which elements of a large site get a row: the first few along each axis."""
    site = values.shape[2:]
    if np.prod(site) <= MAX_ROWS:
        return ()
    side = max(1, int(MAX_ROWS ** (1 / len(site))))
    return tuple(slice(0, side) for _ in site)


def _levels(run: Run) -> Table:
    columns = {name: column for name, column in COLUMNS.items() if name in run.levels}
    table = Table(title=f"{run.attrs['num_levels']} levels, {run.attrs['kernel']}", title_justify="left")
    for title in ("level", *(title for title, _ in columns.values())):
        table.add_column(title, justify="right")
    last = len(run.levels["t"]) - 1
    for k in sorted({round(i) for i in np.linspace(0, last, min(MAX_ROWS, last + 1))}):
        table.add_row(str(k), *(_number(run.levels[name][k], form) for name, (_, form) in columns.items()))
    return table


def _number(value: Any, form: str) -> str:
    return "–" if np.isnan(value) else format(value, form)


def _remarks(run: Run) -> list[str]:
    lines = [f"{run.attrs['evaluations_per_chain']} gradient evaluations a chain, {run.attrs['seconds']:.1f} s."]
    if run.log_weights is not None:
        meaning = (
            "absolute: every potential is normalised"
            if run.attrs["calibrated"]
            else "relative to the unknown normalisers of the potentials that are not calibrated"
        )
        survivors = int(run.levels["survivors"][-1])
        lines.append(f"log evidence {run.log_evidence:.3f} ± {run.log_evidence_se:.3f} ({meaning}).")
        lines.append(f"{survivors} of {run.log_weights.size} starting points have descendants.")
    stuck = {name: summarise(v) for name, v in run.samples.items()} if _any_still(run) else {}
    for name, s in stuck.items():
        if s.stuck_chains.any():
            lines.append(
                f"[yellow]{name}: {int(s.stuck.sum())} elements never moved in any chain, "
                f"{int((s.stuck_chains > 0).sum())} in some; up to {int(s.stuck_chains.max())} chains are stuck."
            )
    lines += [f"[yellow]{caution}" for caution in run.cautions]
    diverging, nonfinite = int(run.levels["diverging"].sum()), int(run.levels["nonfinite"].sum())
    if diverging:
        worst = int(np.argmax(run.levels["diverging"]))
        made = run.attrs["num_levels"] * run.attrs["num_steps"] * run.attrs["num_chains"]
        lines.append(
            f"[yellow]{diverging} divergent transitions ({diverging / made:.1%}), most at level {worst} "
            f"(σ/α = {run.levels['sigma'][worst]:.3g})."
        )
    if "gap" in run.levels and np.max(np.abs(run.levels["gap"])) > LARGE_GAP:
        gap = run.levels["gap"]
        worst = int(np.argmax(np.abs(gap)))
        sigma = run.levels["sigma"][worst]
        lines.append(
            f"[yellow]energy and path weights disagree: {gap.sum():+.2f} nats in all, most at level {worst} "
            f"({gap[worst]:+.2f} at σ/α = {sigma:.3g}). Either the energies are badly calibrated in time there, or the "
            "levels stand too far apart for the path weights: with twice as many levels the latter goes away."
        )
    if "loop_integral" in run.levels and np.max(run.levels["loop_integral"]) > LARGE_LOOP:
        worst = int(np.argmax(run.levels["loop_integral"]))
        lines.append(
            f"[yellow]the score is not a gradient: its integral round a small triangle is "
            f"{run.levels['loop_integral'][worst]:.2f} nats at level {worst} (σ/α = {run.levels['sigma'][worst]:.3g}). "
            "Metropolis tests by line integrals then depend on the way that chains take."
        )
    if "round_trips" in run.attrs:
        trips = run.attrs["round_trips"]
        lines.append(
            f"{trips} round trips between the ends of the ladder, {trips / run.attrs['num_chains']:.0f} a chain."
        )
    if nonfinite:
        worst = int(np.argmax(run.levels["nonfinite"]))
        lines.append(f"[red]log density not finite for {nonfinite} chain-levels, most at level {worst}.")
    return lines


def _any_still(run: Run) -> bool:
    return any(np.any(np.all(v == v[:, :1], axis=1)) for v in run.samples.values() if v.shape[1] > 1)
