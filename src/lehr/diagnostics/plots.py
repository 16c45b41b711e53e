"""Pictures of a run: draws over the density they should follow, and the way down the ladder."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lehr.annealing.run import Run
from lehr.potentials.base import EnergyPotential

__all__ = ["plot_density", "plot_ladder", "plot_samples"]

INK, ACCENT, THIRD = "#22333b", "#c8553d", "#588b8b"


def plot_density(
    potential: EnergyPotential,
    t: float = 1e-4,
    extent: tuple[float, float, float, float] = (-1.2, 1.2, -1.2, 1.2),
    *,
    resolution: int = 240,
    ax: Axes | None = None,
) -> Axes:
    """The density of a potential in the plane, relative to its maximum on the grid; the shade is its square root.

    Args:
        potential: an energy over events of shape (2,).
        t: the noise level.
        extent: x from, x to, y from, y to.
        resolution: grid points along each axis.
        ax: where to draw; the current axes by default.

    Raises:
        ValueError: if the events are not points of the plane.
    """
    if potential.event_shape != (2,):
        raise ValueError(f"plot_density draws potentials over the plane; got events of shape {potential.event_shape}.")
    ax = plt.gca() if ax is None else ax
    grid_x, grid_y = np.linspace(*extent[:2], resolution), np.linspace(*extent[2:], resolution)
    points = np.stack(np.meshgrid(grid_x, grid_y), -1).reshape(-1, 2).astype(np.float32)
    log_density = np.asarray(jax.jit(jax.vmap(potential.log_density, (0, None)))(points, t)).reshape(resolution, -1)
    ax.imshow(
        np.exp(log_density - log_density.max()) ** 0.5, extent=extent, origin="lower", cmap="Greys", vmin=0, vmax=1.4
    )
    ax.set(xlim=extent[:2], ylim=extent[2:], aspect="equal")
    return ax


def plot_samples(
    draws: np.ndarray,
    potential: EnergyPotential | None = None,
    *,
    t: float = 1e-4,
    extent: tuple[float, float, float, float] = (-1.2, 1.2, -1.2, 1.2),
    ax: Axes | None = None,
    title: str = "",
) -> Axes:
    """Draws in the plane, over the density they should follow.

    Args:
        draws: shape (n, 2).
        potential: the density below them, if any.
        t: its noise level.
        extent: x from, x to, y from, y to.
        ax: where to draw; the current axes by default.
        title: of the picture.
    """
    ax = plt.gca() if ax is None else ax
    if potential is not None:
        plot_density(potential, t, extent, ax=ax)
    x, y = np.asarray(draws).T
    ax.scatter(x, y, s=4, color=ACCENT, alpha=0.35, linewidths=0)
    ax.set(xlim=extent[:2], ylim=extent[2:], aspect="equal", title=title)
    return ax


def plot_ladder(run: Run, axes: Sequence[Axes] | None = None) -> Figure:
    """Acceptance, step size and effective sample size against the noise level.

    Args:
        run: the run.
        axes: two axes, or three for a weighted run; a new figure by default.
    """
    figures = {"acceptance_rate": "acceptance", "step_size": "step, in units of the scale"}
    if run.log_weights is not None:
        figures["ess_weights"] = "effective sample size of the weights"
    if axes is None:
        _, axes = plt.subplots(len(figures), 1, figsize=(6, 2 * len(figures)), sharex=True, layout="constrained")
    sigma = run.levels["sigma"]
    for ax, (name, label), colour in zip(axes, figures.items(), (INK, THIRD, ACCENT), strict=False):
        ax.plot(sigma, run.levels[name], ".-", color=colour)
        ax.set(xscale="log", title=label, ylim=(0, None))
        ax.title.set_size("medium")
        ax.spines[["top", "right"]].set_visible(False)
    if "ess_weights" in figures:
        for level in np.flatnonzero(run.levels["resampled"]):
            axes[2].axvline(sigma[level], color=INK, lw=0.6, alpha=0.4)
    axes[0].invert_xaxis()
    axes[-1].set_xlabel("noise σ/α, from noise to data" + (" (lines: resampled)" if "ess_weights" in figures else ""))
    return axes[0].get_figure(root=True)  # type: ignore[return-value]
