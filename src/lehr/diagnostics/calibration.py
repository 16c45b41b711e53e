r"""Simulation-based calibration: does the whole of a model, its path and its driver, infer what it should?

Draw latents from the prior and data from the latents; infer the latents from the data; count how many
of L posterior draws fall below the true value. If the posterior is right, that rank is uniform on
{0, …, L}, whatever the model. Ranks that pile up at both ends say that posteriors are too narrow, in
the middle that they are too wide, to one side that they are off.

References:
    Cook, Gelman & Rubin, Validation of software for Bayesian models using posterior quantiles, JCGS 2006.
    Talts, Betancourt, Simpson, Vehtari & Gelman, Validating Bayesian inference algorithms with
    simulation-based calibration, 2018 (arXiv 1804.06788).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import handlers
from numpyro.infer import Predictive
from rich.console import Console
from rich.table import Table
from scipy import stats

from lehr.annealing.driver import Driver
from lehr.annealing.drivers import AnnealedSMC
from lehr.annealing.keys import as_key
from lehr.annealing.ladder import check_count
from lehr.annealing.program import Program
from lehr.annealing.progress import as_meter, counted
from lehr.annealing.run import Run
from lehr.programs.path import Path

__all__ = ["Calibration", "sbc"]

Draws = dict[str, np.ndarray]
SMALL = 16  # numbers of a site that are ranked one by one; larger sites by their mean and mean square
BINS = 16
MANY = 0.01  # runs to be doubted: as many as the ranks' own noise would hide


@dataclass(frozen=True)
class Calibration:
    """Ranks of true values among posterior draws.

    Attributes:
        ranks: by quantity, integers in {0, …, ``num_draws``}, shape (S,).
        num_draws: L.
    """

    ranks: dict[str, np.ndarray]
    num_draws: int

    @property
    def pvalues(self) -> dict[str, float]:
        """By quantity, the probability of a χ² as large as that of the ranks in 16 bins, if they were uniform."""
        return {name: float(stats.chisquare(self._counts(ranks)).pvalue) for name, ranks in self.ranks.items()}

    def is_uniform(self, level: float = 0.01) -> bool:
        """Whether no quantity's ranks differ from uniform at this level, shared among all (Bonferroni)."""
        return min(self.pvalues.values()) * len(self.ranks) >= level

    def print_summary(self, console: Console | None = None) -> None:
        """Print a row for each quantity: mean rank, the share in the outer eighths, the p-value.

        Args:
            console: a rich console; standard output by default.
        """
        table = Table("quantity", "mean rank / L (.5)", "share in the outer eighths (.25)", "p-value", title="SBC")
        for name, p in self.pvalues.items():
            counts = self._counts(self.ranks[name])
            outer = (counts[: BINS // 8].sum() + counts[-BINS // 8 :].sum()) / counts.sum()
            table.add_row(name, f"{np.mean(self.ranks[name]) / self.num_draws:.3f}", f"{outer:.3f}", f"{p:.3g}")
        (console or Console()).print(table)

    def plot(self) -> Any:
        """A figure with one histogram of ranks for each quantity, over the band that 99 % of bars of
        uniform ranks fall in."""
        import matplotlib.pyplot as plt

        columns = min(4, len(self.ranks))
        rows = -(-len(self.ranks) // columns)
        figure, axes = plt.subplots(rows, columns, figsize=(3 * columns, 2.2 * rows), squeeze=False, sharey=True)
        for axis, (name, ranks) in zip(axes.ravel(), self.ranks.items(), strict=False):
            low, high = stats.binom.interval(0.99, ranks.size, 1 / BINS)
            axis.axhspan(low, high, color="0.88")
            axis.axhline(ranks.size / BINS, color="0.6", lw=0.8)
            axis.bar((np.arange(BINS) + 0.5) / BINS, self._counts(ranks), width=0.9 / BINS, color="C0")
            axis.set(title=f"{name}   p = {self.pvalues[name]:.2g}", xlabel="rank / L", xlim=(0, 1))
        for axis in axes.ravel()[len(self.ranks) :]:
            axis.remove()
        figure.tight_layout()
        return figure

    def _counts(self, ranks: np.ndarray) -> np.ndarray:
        return np.bincount(ranks * BINS // (self.num_draws + 1), minlength=BINS)


def sbc(
    model: Callable[..., Any] | Driver,
    prior: Callable[..., Any] | Mapping[str, Any] | None = None,
    *args: Any,
    data: str | Iterable[str] | None = None,
    num_simulations: int = 512,
    num_draws: int = 63,
    quantities: Mapping[str, Callable[[Draws], Any]] | None = None,
    rng_key: jax.Array | int = 0,
    **kwargs: Any,
) -> Calibration:
    """Simulation-based calibration of a model under a driver.

    Args:
        model: a NumPyro model, or a driver of one that says how to sample it (256 particles by default), none of
            whose runs is kept.
            Called with ``args`` it draws its data, as for a prior predictive: ``y=None``.
        prior: where simulations come from: another NumPyro model with the same sites; or draws of the
            latents by site, shape (S, *site), for priors that cannot be drawn from directly, such as products;
            the model itself by default.
        args: the model's other arguments.
        data: names of the sites that are observed; by default those that nothing else depends on.
        num_simulations: S.
        num_draws: L, posterior draws that each true value is ranked among; L + 1 a multiple of 16.
        quantities: functions of one draw of all sites, a dict of arrays, to a scalar, by name. By default
            each number of a small site, and of a large one its mean and mean square.
        rng_key: a JAX key, or an integer seed.
        kwargs: the model's other keyword arguments.

    Raises:
        ValueError: for counts that do not fit, or names of sites that the model has not.

    Warns:
        UserWarning: if more than one run in a hundred has cautions (:attr:`lehr.Run.cautions`), with one of them. A
            few have where the data of one simulation are far from what the prior expects.

    Example:
        >>> lehr.sbc(model).print_summary()  # doctest: +SKIP
    """
    check_count("num_simulations", num_simulations, least=BINS)
    check_count("num_draws", num_draws, least=BINS - 1)
    if (num_draws + 1) % BINS:
        raise ValueError(f"num_draws + 1 must be a multiple of {BINS}, for the bins to be equal; got {num_draws=}.")
    driver = model if isinstance(model, Driver) else AnnealedSMC(model, num_particles=256)
    free = driver.path(*args, **kwargs)
    observed = free.sinks if data is None else (data,) if isinstance(data, str) else tuple(data)
    unknown = [name for name in observed if name not in free.other_sites]
    if unknown or not observed:
        raise ValueError(
            f"data must name sites that the model draws when it is given none; got {observed!r}, and the model's are "
            f"{', '.join(map(repr, free.other_sites)) or 'none'}. Let the model take y=None, and pass no y."
        )
    key_prior, key_rank, key_run = jax.random.split(as_key(rng_key), 3)
    truth = _simulate(driver.path.model, prior, key_prior, num_simulations, args, kwargs)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key_rank)))
    ranks: dict[str, list[int]] = {}
    infer = _Inference(driver.as_part(), args, kwargs)
    keys = list(enumerate(jax.random.split(key_run, num_simulations)))
    cautions: list[str] = []
    for i, key in counted(as_meter(driver.progress), "calibration", keys):
        given = {name: jnp.asarray(truth[name][i]) for name in observed}
        run = infer(key, given)
        cautions += run.cautions[:1]
        posterior = _draws(run, num_draws, rng)
        true = {name: value[i] for name, value in truth.items() if name in posterior}
        for name, (value, others) in _quantities(true, posterior, quantities).items():
            below, ties = np.sum(others < value), np.sum(others == value)
            ranks.setdefault(name, []).append(int(below + rng.integers(ties + 1)))
    if len(cautions) > MANY * num_simulations:
        warnings.warn(f"{len(cautions)} of {num_simulations} runs are to be doubted; one: {cautions[0]}", stacklevel=2)
    return Calibration({name: np.array(found) for name, found in ranks.items()}, num_draws)


class _Inference:
    """``infer(key, data) -> Run``. Tracing a model takes longer than sampling a small one, so that it is done twice
    only: where the data of the second simulation are all that sets its program apart from that of the first, they
    take each other's place in it from then on."""

    def __init__(self, driver: Driver, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        model = driver.path.model
        self.driver, self.args, self.kwargs = driver, args, kwargs
        self.unbound = Path(lambda data, *a, **k: handlers.condition(model, data=data)(*a, **k), driver.path.guidance)
        self.programs: list[tuple[Program, dict[str, jax.Array]]] = []
        self.is_plain = type(driver).run is Driver.run
        self.is_shared: bool | None = None

    def __call__(self, rng_key: jax.Array, data: dict[str, jax.Array]) -> Run:
        if self.is_shared:
            program, old = self.programs[0]
            return self.driver.sample(program.exchange(old, data), rng_key)
        path = self.unbound(data, *self.args, **self.kwargs)
        if not self.is_plain:
            return self.driver.on(path).run(rng_key)
        program = self.driver.prepare(path)
        if len(self.programs) < 2:
            self.programs.append((program, data))
        if self.is_shared is None and len(self.programs) == 2:
            first, old = self.programs[0]
            self.is_shared = first.exchange(old, data).is_like(program)
        return self.driver.sample(program, rng_key)


def _simulate(model: Any, prior: Any, rng_key: jax.Array, size: int, args: Any, kwargs: Any) -> Draws:
    """Draws of all sites from the prior, and of data from those."""
    if isinstance(prior, Mapping):
        short = [name for name, value in prior.items() if np.shape(value)[0] < size]
        if short:
            raise ValueError(
                f"prior[{short[0]!r}] has {np.shape(prior[short[0]])[0]} draws; {size} simulations need as many."
            )
        latents = {name: np.asarray(value)[:size] for name, value in prior.items()}
        drawn = Predictive(model, posterior_samples=latents)(rng_key, *args, **kwargs)
        return {name: np.asarray(value) for name, value in {**latents, **drawn}.items()}
    drawn = Predictive(model if prior is None else prior, num_samples=size)(rng_key, *args, **kwargs)
    return {name: np.asarray(value) for name, value in drawn.items()}


def _draws(run: Run, size: int, rng: np.random.Generator) -> Draws:
    """Posterior draws: of weighted particles by their weights, of chains at random."""
    if run.log_weights is not None:
        weights = np.exp(run.log_weights)
        chosen = rng.choice(weights.size, size, p=weights / weights.sum())
        return {name: value[chosen] for name, value in run.particles.items()}
    samples = run.get_samples()
    chosen = rng.choice(len(next(iter(samples.values()))), size)
    return {name: value[chosen] for name, value in samples.items()}


def _quantities(true: Draws, posterior: Draws, quantities: Any) -> dict[str, tuple[Any, np.ndarray]]:
    """By quantity, its true value and its posterior draws."""
    if quantities is not None:
        each = [
            {name: value[i] for name, value in posterior.items()} for i in range(len(next(iter(posterior.values()))))
        ]
        return {name: (f(true), np.array([f(draw) for draw in each])) for name, f in quantities.items()}
    found: dict[str, tuple[Any, np.ndarray]] = {}
    for name, value in true.items():
        flat, others = np.ravel(value), posterior[name].reshape(len(posterior[name]), -1)
        if flat.size > SMALL:
            found[f"mean {name}"] = (flat.mean(), others.mean(1))
            found[f"mean {name}²"] = ((flat**2).mean(), (others**2).mean(1))
            continue
        labels = (
            [name] if np.ndim(value) == 0 else [f"{name}[{', '.join(map(str, i))}]" for i in np.ndindex(value.shape)]
        )
        found |= {label: (flat[i], others[:, i]) for i, label in enumerate(labels)}
    return found
