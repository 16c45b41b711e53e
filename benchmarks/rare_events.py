"""The probability that a mixture of seven Gaussians exceeds a threshold, down to 1.4e-5, by evidence.

The event is a likelihood: a logistic step of width S at the threshold, whose excess over the true step is weighed
away at the end. On the way down it reads about the probability of the event given x_t, by a guidance strategy of a
few lines. Ratio: estimated over exact probability; CV: its standard deviation over seeds. The budget is 100,000
evaluations a run, of a gradient or of all derivatives of a score, on a ladder placed before by conditional ESS.
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
BUDGET = {"energies": 95_000, "scores": 85_500}  # by a trial of 2,000 particles; of fewer the pilot takes more


class Step(dist.Distribution):
    """Observed always; its log density is that of ``height`` to exceed ``threshold``, by a logistic step."""

    support = dist.constraints.real
    pytree_data_fields = ("height", "threshold")

    def __init__(self, height, threshold):
        self.height, self.threshold = height, threshold
        super().__init__((), ())

    def log_prob(self, value):
        return jax.nn.log_sigmoid((self.height - self.threshold) / S)


@dataclass(frozen=True)
class Crossing(Guidance):
    """The step as it would look given x_t, were the prior a Gaussian of the mixture's mean: it asks no model for a
    score, so that proposals may look at it wherever they go."""

    variance: float
    uses_score = False

    def log_prob(self, noisy):
        mean, share = MASSES @ LOCS, noisy.share
        gain = share * self.variance / (1 - share + share * self.variance)
        (site,) = noisy.read_clean({"x": mean + gain * (noisy.x["x"] / jnp.sqrt(share) - mean)})
        step, spread = site["fn"], gain * (1 - share) / share
        return jax.nn.log_sigmoid((step.height - step.threshold) / jnp.sqrt(S**2 + spread / 1.7**2))


def model(threshold):
    x = numpyro.sample("x", lehr.Diffusion(PRIOR))
    numpyro.sample("event", Step(x[0], threshold), obs=jnp.zeros(()))


def probability(run, threshold):
    """The evidence with the logistic step exchanged for the true one."""
    above = run.particles["x"][:, 0] - threshold
    excess = (above >= 0) * (1 + np.exp(-np.maximum(above, 0) / S))
    return np.exp(run.log_evidence) * np.sum(np.exp(run.log_weights) * excess)


PATH = lehr.Path(model, guidance={"event": Crossing(12.0)})
SCORES = {"metropolis": "line-integral", "integrate_energies": True}  # nothing is asked of an energy but its gradient
BY_ENERGIES = {"kernel": lehr.HMC(2), "weights": "both"}
BY_SCORES = {"kernel": lehr.HMC(2, **SCORES), "weights": "path"}


def main(seeds=24):
    rows, results = [], {}
    for name, how in (("energies", BY_ENERGIES), ("scores", BY_SCORES)):
        for threshold in (7.0, 8.0, 9.0, 10.0):
            tail = stats.norm.sf(threshold, LOCS[:, 0], np.sqrt(COVARIANCES[:, 0, 0]))
            exact = float(MASSES @ tail)
            options = {**how, "num_steps": 1}
            ladder = lehr.Ladder.adaptive(PATH(threshold), 0.88, num_particles=512, t_min=2e-3, t_max=0.75, **options)
            options |= {"ladder": ladder, "pilot": 32, "threshold": 1.0, "progress": False}
            trial = lehr.AnnealedSMC(PATH, num_particles=2000, **options).run(0, threshold)
            n = int(BUDGET[name] / trial.attrs["evaluations_per_chain"])
            smc = lehr.AnnealedSMC(PATH, num_particles=n, **options)
            runs = [smc.run(seed, threshold) for seed in range(seeds)]
            ratios = np.array([probability(run, threshold) for run in runs]) / exact
            error, cv = ratios.std(ddof=1) / np.sqrt(seeds), ratios.std(ddof=1) / ratios.mean()
            made = runs[0].attrs["evaluations_per_chain"] * n
            results[f"{name} {threshold:g}"] = {"ratio": ratios.tolist(), "cv": cv, "evaluations": made}
            levels = runs[0].attrs["num_levels"]
            row = (name, f"{threshold:g}", f"{exact:.3e}", levels, n, f"{made:.0f}")
            rows.append((*row, f"{ratios.mean():.3f} ± {error:.3f}", f"{cv:.3f}"))
            print(*rows[-1], sep="  ", flush=True)
    columns = ("from", "threshold", "exact", "levels", "particles", "evaluations", "ratio", "CV")
    report("rare_events", f"Rare events, {seeds} seeds", columns, rows, results)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
