r"""The evidence of a model, for comparing models: posterior over prior, with its error from islands.

    p(y) = ∫ Π p_i^{w_i}(x) p(θ) L(y | x, θ) dx dθ  /  ∫ Π p_i^{w_i}(x) p(θ) dx dθ

A driver estimates the numerator with every factor at face value. A product of models has a
normaliser of its own, which the denominator takes away: it is the same integral without the
likelihood, and 1 where the prior is one normalised model. What remains does not depend on how the
factors are normalised, so that two forward operators, or two priors, may be compared.

Each integral is averaged over islands, independent runs whose scatter is its standard error:
log p̂ = log (1/n Σ Ẑ_j), and by the delta method its error is the relative one of the mean.

References:
    Del Moral, Doucet & Jasra, Sequential Monte Carlo samplers, JRSS B 2006.
    Kass & Raftery, Bayes factors, JASA 1995.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from lehr.annealing.drivers import AnnealedSMC
from lehr.annealing.keys import as_key
from lehr.annealing.ladder import check_count
from lehr.annealing.progress import as_meter, counted
from lehr.potentials.base import Potential
from lehr.programs.path import Path

__all__ = ["Evidence", "LogBayesFactor", "evidence"]


class LogBayesFactor(NamedTuple):
    """log p(y | one model) − log p(y | another), in nats, and its standard error."""

    value: float
    standard_error: float


@dataclass(frozen=True)
class Evidence:
    """log p(y) of a model; the difference of two is a :class:`LogBayesFactor`.

    Attributes:
        log_evidence: log p̂(y), in nats.
        standard_error: of it, from the scatter of the islands.
        posterior: log of the numerator, by island, shape (n,).
        prior: log of the denominator, by island; one zero where it is known to be 1.
    """

    log_evidence: float
    standard_error: float
    posterior: np.ndarray = field(repr=False)
    prior: np.ndarray = field(repr=False)

    def __sub__(self, other: Evidence) -> LogBayesFactor:
        if not isinstance(other, Evidence):
            return NotImplemented
        error = float(np.hypot(self.standard_error, other.standard_error))
        return LogBayesFactor(self.log_evidence - other.log_evidence, error)


def evidence(
    model: Callable[..., Any] | Path | AnnealedSMC,
    rng_key: jax.Array | int,
    *args: Any,
    num_islands: int = 8,
    **kwargs: Any,
) -> Evidence:
    """log p(y) of a model, whatever its factors' own normalisers are.

    Args:
        model: a NumPyro model, a path, or an :class:`~lehr.AnnealedSMC` that says how to sample it; of its runs
            none is kept.
        rng_key: a JAX key, or an integer seed.
        args: the model's arguments, as for :meth:`AnnealedSMC.run`.
        num_islands: independent runs of each integral, at least 2.
        kwargs: the model's keyword arguments.

    Raises:
        ValueError: for fewer than two islands, or a model without observations.

    Example:
        >>> lehr.evidence(blurred, 0, y=y) - lehr.evidence(sharp, 0, y=y)  # doctest: +SKIP
        LogBayesFactor(value=3.2, standard_error=0.05)
    """
    check_count("num_islands", num_islands, least=2)
    if isinstance(model, Potential):
        raise TypeError("a potential has no data to be the evidence of; AnnealedSMC(p).run(key).log_evidence is log Z.")
    smc = model if isinstance(model, AnnealedSMC) else AnnealedSMC(model)
    path = smc.bind(*args, **kwargs)
    prior = path.prior()
    if prior.other_sites == path.other_sites:
        raise ValueError("the model has no observed site besides its Diffusion sites, and so no evidence of any data.")
    key_posterior, key_prior = jax.random.split(as_key(rng_key))
    above = _islands(smc, path, key_posterior, num_islands, "posterior")
    known = prior.is_normalised and (path.is_calibrated or smc.weights_of(path) == "path")
    below = np.zeros(1) if known else _islands(smc, prior, key_prior, num_islands, "prior")
    (log_above, error_above), (log_below, error_below) = _log_mean(above), _log_mean(below)
    return Evidence(log_above - log_below, float(np.hypot(error_above, error_below)), above, below)


def _islands(smc: AnnealedSMC, path: Path, rng_key: jax.Array, num_islands: int, what: str) -> np.ndarray:
    driver, keys = smc.on(path).as_part(), list(jax.random.split(rng_key, num_islands))
    runs = counted(as_meter(smc.progress), f"evidence, {what}", keys)
    return np.array([driver.run(key).log_evidence for key in runs])


def _log_mean(log_values: np.ndarray) -> tuple[float, float]:
    """log of the mean, and its standard error."""
    values = np.exp(log_values - log_values.max())
    error = values.std(ddof=1) / values.mean() / np.sqrt(values.size) if values.size > 1 else 0.0
    return float(np.log(values.mean()) + log_values.max()), float(error)
