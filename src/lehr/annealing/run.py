r"""What a driver leaves behind.

A :class:`Run` is plain numpy: draws by site and on each site's own scale, statistics by
level, and for weighted runs the weighted particles and the evidence. ``to_arviz`` and
``print_summary`` are views of it (:mod:`lehr.diagnostics`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

import numpy as np

from lehr.annealing.tuning import Tuning
from lehr.programs.path import Path

__all__ = ["FEWEST", "Run"]

FEWEST = 5  # effective particles of a hundred or more: where fewer are, what the run says rests on them


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

    @property
    def cautions(self) -> list[str]:
        """What makes the run worth less than it seems, and what to do: a driver's ``run`` warns of each."""
        said, num_chains = [], self.attrs["num_chains"]
        if stranded := self.attrs.get("stranded"):
            said.append(
                f"{stranded} of {num_chains} chains ended where the log density is not finite; "
                "print_summary() shows at which levels chains diverged."
            )
        effective = self.levels.get("ess_weights", np.array([np.inf]))
        k = int(np.argmin(effective))
        if effective[k] < min(FEWEST, FEWEST / 100 * num_chains):
            said.append(
                f"at level {k} (σ/α = {self.levels['sigma'][k]:.3g}) only {effective[k]:.1f} of {num_chains} "
                "weighted particles were effective: the level lies too far from the one before, and weights there are "
                "not to be relied on. Use more levels or more transitions at each; weights by energies where all "
                "factors are."
            )
        return said

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


def _weighted_only(value: float | None) -> float:
    if value is None:
        raise AttributeError(
            "independent annealed chains carry no weights and estimate no evidence; use lehr.AnnealedSMC."
        )
    return value
