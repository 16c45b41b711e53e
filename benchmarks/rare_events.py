"""The probability that a mixture of seven Gaussians exceeds a threshold, down to 1.4e-5, by evidence.

The event is a likelihood: a step Φ((x₁ − τ)/S) at the threshold τ, whose excess over the true step is weighed away
at the end. On the way down it is the probability of that step given x_t, were the prior a Gaussian: first one of the
mixture's own mean and variance, then one whose tail beyond τ has the probability and the mean excess that a first run
of 500 particles found. Ratio: estimated over exact probability; CV: its standard deviation over seeds. The budget is
100,000 evaluations a run, of a gradient or of one derivative of a score. What is done once for all seeds is not
counted but printed: the first run, and a trial that finds the step sizes; nor is the placing of levels for the two.
Particles move between levels by the model's reverse kernels, and are weighed by energies or by scores alone.
Nearly all of a rare event hangs on a few particles: they are resampled at every level, before transitions scatter them.
`python benchmarks/rare_events.py [seeds]`
"""

import sys
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax.scipy.special import log_ndtr
from report import report
from scipy import stats

import lehr
from lehr.programs.guidance import Guidance

MASSES = np.array([0.10, 0.18, 0.14, 0.22, 0.10, 0.16, 0.10])
LOCS = np.array([(-6, -2), (-4, 4), (-1, -5), (-10, 3), (4, 3), (4, -3), (5, 0)], float)
COVARIANCES = np.array(
    [
        [[0.36, 0.30], [0.30, 0.81]],
        [[0.81, -0.25], [-0.25, 0.49]],
        [[0.49, 0.20], [0.20, 0.81]],
        [[0.04, 0.04], [0.04, 0.09]],
        [[2.40, 1.85], [1.85, 2.00]],
        [[2.40, -1.85], [-1.85, 2.00]],
        [[0.30, 0.00], [0.00, 0.30]],
    ]
)
PRIOR = lehr.GaussianMixture(LOCS, np.linalg.cholesky(COVARIANCES), MASSES, lehr.VPLinear())
S = 0.05
T_MIN = 5e-3
ALPHA = float(PRIOR.schedule.alpha(T_MIN))  # data at the last level are smaller by this
ESS = 0.92
FIRST = 500  # particles of the runs made once
BUDGET = 99_500  # by the cost of a particle among 500: the loops of few are rounded up


class Step(dist.Distribution):
    """Observed always; its log density is that of ``height`` to exceed ``threshold``, by a step of width S."""

    support = dist.constraints.real
    pytree_data_fields = ("height", "threshold")

    def __init__(self, height, threshold):
        self.height, self.threshold = height, threshold
        super().__init__((), ())

    def log_prob(self, value):
        return log_ndtr((self.height - self.threshold) / S)


@dataclass(frozen=True)
class Crossing(Guidance):
    """The step given x_t, were the prior a Gaussian in every coordinate: it asks no model for a score, so that
    proposals may look at it wherever they go."""

    mean: float
    variance: float
    uses_score = False

    def log_prob(self, noisy):
        share = noisy.share
        gain = share * self.variance / (1 - share + share * self.variance)
        (site,) = noisy.read_clean({"x": self.mean + gain * (noisy.x["x"] / jnp.sqrt(share) - self.mean)})
        step, spread = site["fn"], gain * (1 - share) / share
        return log_ndtr((step.height - step.threshold) / jnp.sqrt(S**2 + spread))

    @classmethod
    def of_tail(cls, threshold, probability, excess):
        """By the Gaussian that has this probability and mean excess beyond the threshold."""
        z = stats.norm.isf(probability)
        std = excess / (stats.norm.pdf(z) / probability - z)
        return cls(float(threshold - z * std), float(std**2))


def model(threshold):
    x = numpyro.sample("x", lehr.Diffusion(PRIOR))
    numpyro.sample("event", Step(x[0], threshold), obs=jnp.zeros(()))


def tail(run, threshold):
    """The evidence with the true step in the place of the smooth one, and the mean excess over the threshold."""
    x = run.particles["x"][:, 0]
    above = x / ALPHA - threshold
    shares = np.exp(run.log_weights) * (above >= 0) / stats.norm.cdf((x - threshold) / S)
    return np.exp(run.log_evidence) * np.sum(shares), np.sum(shares * above) / np.sum(shares)


MEAN, VARIANCE = (float(np.average(c, weights=MASSES)) for c in (LOCS[:, 0], LOCS[:, 0] ** 2 + COVARIANCES[:, 0, 0]))
ITSELF = Crossing(MEAN, VARIANCE - MEAN**2)
SCORES = {"metropolis": "line-integral", "integrate_energies": True}  # nothing is asked of an energy but its gradient
BY_ENERGIES = {"kernel": lehr.HMC(2), "weights": "both"}
BY_SCORES = {"kernel": lehr.HMC(2, **SCORES), "weights": "path"}


def prepared(threshold, crossing, how):
    """How to run under this guidance: a driver, as a function of the number of particles and what else it takes."""
    path, options = lehr.Path(model, guidance={"event": crossing}), {**how, "num_steps": 1}
    ladder = lehr.Ladder.adaptive(path(threshold), ESS, num_particles=512, t_min=T_MIN, t_max=0.75, **options)
    options |= {"ladder": ladder, "threshold": 1.0, "progress": False}
    return lambda n, **tuned: lehr.AnnealedSMC(path, num_particles=n, **options, **tuned)


def main(seeds=24):
    rows, results = [], {}
    for name, how in (("energies", BY_ENERGIES), ("scores", BY_SCORES)):
        for threshold in (7.0, 8.0, 9.0, 10.0):
            jax.clear_caches()  # programs of the last threshold
            beyond = stats.norm.sf(threshold, LOCS[:, 0], np.sqrt(COVARIANCES[:, 0, 0]))
            exact = float(MASSES @ beyond)
            first = prepared(threshold, ITSELF, how)(FIRST).run(0, threshold)
            driver = prepared(threshold, Crossing.of_tail(threshold, *tail(first, threshold)), how)
            trial = driver(FIRST).run(seeds, threshold)
            tuned = {"tuning": trial.tuning}
            n = int(BUDGET / driver(FIRST, **tuned).run(seeds, threshold).attrs["evaluations_per_chain"])
            smc, once = driver(n, **tuned), FIRST * sum(r.attrs["evaluations_per_chain"] for r in (first, trial))
            runs = [smc.run(seed, threshold) for seed in range(seeds)]
            ratios = np.array([tail(run, threshold)[0] for run in runs]) / exact
            error, cv = ratios.std(ddof=1) / np.sqrt(seeds), ratios.std(ddof=1) / ratios.mean()
            made = runs[0].attrs["evaluations_per_chain"] * n
            results[f"{name} {threshold:g}"] = {"ratio": ratios.tolist(), "cv": cv, "evaluations": made, "once": once}
            levels = runs[0].attrs["num_levels"]
            row = (name, f"{threshold:g}", f"{exact:.3e}", levels, n, f"{made:.0f}", f"{once:.0f}")
            rows.append((*row, f"{ratios.mean():.3f} ± {error:.3f}", f"{cv:.3f}"))
            print(*rows[-1], sep="  ", flush=True)
    columns = ("from", "threshold", "exact", "levels", "particles", "evaluations", "once", "ratio", "CV")
    report("rare_events", f"Rare events, {seeds} seeds", columns, rows, results)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
