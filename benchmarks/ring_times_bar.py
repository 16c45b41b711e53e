"""Product of a ring and a bar: all drivers, from energies and from scores alone, exact and trained.

LL: mean log density of the samples under the true product (exact draws: 3.48). The reference rows repeat the
settings of Du et al. (2023): cosine schedule of 100 steps, ten transitions a level with one absolute step size;
there, unadjusted kernels leave out the last level. `python benchmarks/ring_times_bar.py [seeds]`
"""

import sys
from pathlib import Path

import numpy as np
from report import report
from reverse import SummedScores, cosine

import lehr
from lehr.zoo.targets import target

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "exact"))
from judge import LOG_EVIDENCE, judge

N = 2000
SCORES = {"metropolis": "line-integral", "integrate_energies": True}  # nothing is asked of an energy but its gradient
RING_BAR = {
    "exact": lambda: target("ring").exact * target("bar").exact,
    "trained": lambda: lehr.load("ring") * lehr.load("bar"),
}


def reference(prior):
    schedule = cosine()
    prior = lehr.with_schedule(prior, schedule)
    steps = np.arange(100)[::-1] / 99
    whole, short = lehr.Ladder(steps), lehr.Ladder(steps[:-1])

    def chains(kernel, ladder, step_size):
        how = {"num_chains": N, "num_samples": 1, "tuning": lehr.Tuning(step_size), "progress": False}
        return lehr.AnnealedMCMC(prior, kernel, ladder, 10, **how)

    return {
        "reference: reverse, summed scores": SummedScores(prior, N),
        "Reverse on its levels": lehr.Reverse(prior, "ancestral", whole, N, progress=False),
        "reference: ULA": chains(lehr.ULA(), short, np.sqrt(0.002)),
        "reference: MALA": chains(lehr.MALA(), whole, np.sqrt(0.002)),
        "reference: U-HMC": chains(lehr.UHMC(3), short, 0.03),
        "reference: HMC, damping .5": chains(lehr.GHMC(3, 0.5), whole, 0.03),
        "the same from scores": chains(lehr.GHMC(3, 0.5, **SCORES), whole, 0.03),
    }


def ours(prior):
    tuned = {"pilot": 0, "num_warmup": 1}  # within each level: nothing to share among few seeds

    def smc(kernel, ladder, num_steps, **how):
        return lehr.AnnealedSMC(prior, kernel, ladder, num_steps, num_particles=N, progress=False, **how)

    def mcmc(kernel, ladder, num_steps, **how):
        how = {"num_chains": N, "num_samples": 1, "progress": False, **how}
        return lehr.AnnealedMCMC(prior, kernel, ladder, num_steps, **how)

    return {
        "AnnealedSMC, HMC": smc(lehr.HMC(3), 28, 1, **tuned),
        "AnnealedSMC, MALA": smc(lehr.MALA(), 28, 5, **tuned),
        "AnnealedSMC, path, HMC from scores": smc(lehr.HMC(2, **SCORES), 23, 1, weights="path", pilot=32),
        "AnnealedSMC, path, MALA from scores": smc(lehr.MALA(**SCORES), 36, 1, weights="path", pilot=32),
        "AnnealedMCMC, HMC": mcmc(lehr.HMC(3), 28, 1, **tuned),
        "AnnealedMCMC, HMC from scores": mcmc(lehr.HMC(3, **SCORES), 28, 1, **tuned),
        "AnnealedMCMC, HMC, heun": mcmc(lehr.HMC(3), 25, 1, predictor="heun", **tuned),
        "Reverse, heun": lehr.Reverse(prior, "heun", 100, N, progress=False),
    }


def measure(sampler, seeds):
    rows, log_z = [], []
    for seed in range(seeds):
        run = sampler.run(seed)
        rows.append(judge(sampler.get_samples()["x"]))
        log_z.append(run.log_evidence if run.log_weights is not None else np.nan)
    figures = np.array(rows)
    return {
        "evaluations": run.attrs["evaluations_per_chain"],
        "log_likelihood": [figures[:, 0].mean(), figures[:, 0].std(ddof=1)],
        "in_mode": figures[:, 1].mean(),
        "mode_std": figures[:, 2].mean(),
        "upper_mass": [figures[:, 3].mean(), figures[:, 3].std(ddof=1)],
        "log_evidence": [np.mean(log_z), np.std(log_z, ddof=1)],
    }


def spread(mean, sd):
    """Mean and standard deviation over seeds; an unadjusted chain may have run away."""
    return "–" if np.isnan(mean) else f"{mean:.3f} ± {sd:.3f}" if abs(mean) < 1e4 else f"{mean:.0e}"


def main(seeds=5):
    rows, results = [], {}
    for energies, make in RING_BAR.items():
        for name, sampler in {**ours(make()), **reference(make())}.items():
            r = results[f"{energies} {name}"] = measure(sampler, seeds)
            pairs = [spread(*r[k]) for k in ("log_likelihood", "upper_mass", "log_evidence")]
            rows.append(
                (
                    energies,
                    name,
                    r["evaluations"],
                    pairs[0],
                    f"{100 * r['in_mode']:.2f}",
                    f"{r['mode_std']:.4f}",
                    *pairs[1:],
                )
            )
            print(*rows[-1], sep="  ", flush=True)
    title = f"ring × bar, {N} chains, {seeds} seeds; log Z exact {LOG_EVIDENCE:.3f}"
    report(
        "ring_times_bar",
        title,
        ("densities", "sampler", "evals", "LL", "% in mode", "mode std", "upper mass", "log Z"),
        rows,
        results,
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
