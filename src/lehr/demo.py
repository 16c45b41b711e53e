r"""The demonstration: compose two pretrained models, then add data and an unknown noise scale.

The ring is eight Gaussians (std .03) on a circle of radius .5, the bar is uniform on
|x| < .2, |y| < 1: their product is two Gaussians at (0, ±.5) with half of the mass each, and
log ∫ ring · bar = log(.25/.8). With measurements y_i = x₂ + σ ε_i and σ ~ HalfNormal(.5) the
posterior is a sum over the two modes of integrals over σ, done here on a grid. Everything
the sampler says is printed beside these.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from rich.console import Console
from rich.table import Table

from lehr.annealing.drivers import AnnealedSMC
from lehr.annealing.run import Run
from lehr.diagnostics.plots import ACCENT, INK, plot_ladder, plot_samples
from lehr.kernels import HMC
from lehr.potentials.base import Potential
from lehr.programs.diffusion import Diffusion
from lehr.zoo import load
from lehr.zoo.targets import target

__all__ = ["MEASUREMENTS", "Truth", "demo", "measured", "truth"]

MEASUREMENTS = np.array([0.9, -0.3, 0.35, 0.1])
MODE, STD, NOISE_SCALE = 0.5, 0.03, 0.5


def measured(prior: Potential, y: jax.Array | None = None) -> None:
    """The model: a diffusion prior for a point, and measurements of its height with unknown noise."""
    x = numpyro.sample("x", Diffusion(prior))
    sigma = numpyro.sample("sigma", dist.HalfNormal(NOISE_SCALE))
    with numpyro.plate("measurements", len(MEASUREMENTS)):
        numpyro.sample("y", dist.Normal(x[1], sigma), obs=y)


class Truth(NamedTuple):
    """The exact answer: moments of the height and of σ, mass of the upper mode, log evidence."""

    height: tuple[float, float]
    sigma: tuple[float, float]
    upper_mass: float
    log_evidence: float
    sigma_density: tuple[np.ndarray, np.ndarray]


def truth(y: np.ndarray | None) -> Truth:
    """The exact posterior given the measurements, or the exact prior product for ``None``."""
    height = np.linspace(-1, 1, 4001)
    sigma = np.linspace(5e-4, 4, 2000)
    modes = np.exp(-((height[:, None] - np.array([MODE, -MODE])) ** 2) / (2 * STD**2)).sum(1)
    prior = modes[:, None] * np.exp(-((sigma / NOISE_SCALE) ** 2) / 2)
    prior /= prior.sum()
    log_likelihood = np.zeros_like(prior)
    for value in () if y is None else y:
        log_likelihood += -(((value - height[:, None]) / sigma) ** 2) / 2 - np.log(sigma * np.sqrt(2 * np.pi))
    joint = prior * np.exp(log_likelihood)
    evidence = joint.sum()
    joint /= evidence
    over_height, over_sigma = joint.sum(1), joint.sum(0)

    def moments(grid: np.ndarray, mass: np.ndarray) -> tuple[float, float]:
        mean = float(mass @ grid)
        return mean, float(np.sqrt(mass @ grid**2 - mean**2))

    return Truth(
        moments(height, over_height),
        moments(sigma, over_sigma),
        float(over_height[height > 0].sum()),
        float(np.log(evidence) + np.log(0.25 / 0.8)),
        (sigma, over_sigma / (sigma[1] - sigma[0])),
    )


def demo(folder: str | Path = "out", *, num_particles: int = 2000, seed: int = 0) -> dict[str, Run]:
    """Run the demonstration; prints tables, writes pictures and netCDF files.

    Args:
        folder: where ``demo.nc`` (the posterior), ``product.nc`` and the pictures go.
        num_particles: particles of both runs.
        seed: of both runs.

    Returns:
        The two runs, ``"product"`` and ``"posterior"``.
    """
    folder, console = Path(folder), Console()
    prior = load("ring") * load("bar")
    how: Any = {"ladder": 28, "num_warmup": 1, "num_steps": 1, "num_particles": num_particles}

    console.rule("ring × bar: two pretrained energies, multiplied")
    product = AnnealedSMC(lambda: numpyro.sample("x", Diffusion(prior)), HMC(3), **how).run(jax.random.key(seed))
    _report(console, product, truth(None))

    console.rule("… and four measurements of the height, with noise of unknown scale")
    sampler = AnnealedSMC(measured, HMC(3), **how)
    posterior = sampler.run(jax.random.key(seed + 1), prior, y=jnp.asarray(MEASUREMENTS, float))
    _report(console, posterior, truth(MEASUREMENTS))

    product.to_netcdf(folder / "product.nc")
    posterior.to_netcdf(folder / "demo.nc")
    _draw(product, posterior).savefig(folder / "demo.png", dpi=130)
    plot_ladder(posterior).savefig(folder / "ladder.png", dpi=130)
    plt.close("all")
    console.print(f"Written: {', '.join(str(folder / f) for f in ('demo.nc', 'product.nc', 'demo.png', 'ladder.png'))}")
    return {"product": product, "posterior": posterior}


def _report(console: Console, run: Run, exact: Truth) -> None:
    run.print_summary(console)
    draws = run.get_samples()
    table = Table(title="sampled beside exact", title_justify="left")
    for name in ("", "sampled", "exact"):
        table.add_column(name, justify="right")
    height = draws["x"][:, 1]
    rows = {
        "mean height": (height.mean(), exact.height[0]),
        "sd of height": (height.std(), exact.height[1]),
        "mass of the upper mode": ((height > 0).mean(), exact.upper_mass),
        "log evidence": (run.log_evidence, exact.log_evidence),
    }
    if "sigma" in draws:
        rows["mean σ"] = (draws["sigma"].mean(), exact.sigma[0])
        rows["sd of σ"] = (draws["sigma"].std(), exact.sigma[1])
    for name, (sampled, known) in rows.items():
        table.add_row(name, f"{sampled:.3f}", f"{known:.3f}")
    console.print(table)


def _draw(product: Run, posterior: Run) -> plt.Figure:
    figure, axes = plt.subplots(1, 4, figsize=(15, 4), layout="constrained")
    exact: Any = target("ring").exact * target("bar").exact
    for ax, name in zip(axes[:1], ("ring",), strict=True):
        plot_samples(np.empty((0, 2)), target(name).exact, ax=ax, title="the ring, and the bar over it")
        ax.add_patch(plt.Rectangle((-0.2, -1), 0.4, 2, fill=False, color=INK))
    plot_samples(product.get_samples()["x"], exact, ax=axes[1], title="ring × bar")
    plot_samples(posterior.get_samples()["x"], exact, ax=axes[2], title="given four measured heights")
    for y in MEASUREMENTS:
        axes[2].axhline(y, color=INK, lw=0.7, alpha=0.6)
    grid, density = truth(MEASUREMENTS).sigma_density
    axes[3].hist(posterior.get_samples()["sigma"], bins=60, range=(0, 2), density=True, color=ACCENT, alpha=0.5)
    axes[3].plot(grid, density, color=INK, label="exact")
    axes[3].set(xlim=(0, 2), title="the noise scale σ", xlabel="σ", yticks=[])
    axes[3].legend(frameon=False)
    return figure
