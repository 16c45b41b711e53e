"""Product of a ring and a bar: all drivers, from energies and from scores alone, exact and trained.

LL: mean log density of the samples under the true product (exact draws: 3.48). The reference rows repeat the
settings of Du et al. (2023): cosine schedule of 100 steps, ten transitions a level with one absolute step size;
there, unadjusted kernels leave out the last level. `python benchmarks/ring_times_bar.py [seeds]`
"""

import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from report import report

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


def cosine(num_steps=100):
    """The reference's schedule, ᾱ_i from the cosine with β clipped at .999."""
    f = np.cos((np.arange(num_steps + 1) / num_steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return lehr.DiscreteSchedule(np.cumprod(np.minimum(f[1:] / f[:-1], 1).clip(0.001)))


class SummedScores:
    """The reference's own reverse sampler: from N(0, I), noise of variance β_i in every step, the last included.

    :class:`lehr.Reverse` takes the variance of the posterior q(x_{i-1} | x_i, x_0) and ends at the last level.
    """

    def __init__(self, prior):
        self.prior, step = prior, prior.schedule.step(1.0)
        clean = np.asarray(prior.schedule.alpha(jnp.arange(int(step) + 1) / step)) ** 2
        self.levels = clean, np.concatenate([[1.0], clean[:-1]])

    def run(self, seed):
        def level(x, now):
            t, clean, cleaner, key = now
            beta = 1 - clean / cleaner
            mean = (x + beta * jax.vmap(self.prior.score, (0, None))(x, t)) / jnp.sqrt(1 - beta)
            return mean + jnp.sqrt(beta) * jax.random.normal(key, x.shape), None

        clean, cleaner = (jnp.asarray(table[::-1]) for table in self.levels)
        keys = jax.random.split(jax.random.key(seed), len(clean) + 1)
        times = jnp.linspace(1.0, 0.0, len(clean))
        x = jax.lax.scan(level, jax.random.normal(keys[0], (N, 2)), (times, clean, cleaner, keys[1:]))[0]
        self.samples = {"x": np.asarray(x)}
        return types.SimpleNamespace(attrs={"evaluations_per_chain": len(clean)}, log_weights=None)

    def get_samples(self):
        return self.samples


def reference(prior):
    schedule = cosine()
    prior = lehr.with_schedule(prior, schedule)
    steps = np.arange(100)[::-1] / 99
    whole, short = lehr.Ladder(steps), lehr.Ladder(steps[:-1])

    def chains(kernel, ladder, step_size):
        how = {"num_chains": N, "num_samples": 1, "tuning": lehr.Tuning(step_size), "progress": False}
        return lehr.AnnealedMCMC(prior, kernel, ladder, 10, **how)

    return {
        "reference: reverse, summed scores": SummedScores(prior),
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
        "AnnealedSMC, path, HMC from scores": smc(lehr.HMC(2, **SCORES), 26, 1, weights="path", pilot=32),
        "AnnealedSMC, path, MALA from scores": smc(lehr.MALA(**SCORES), 36, 1, weights="path", pilot=32),
        "AnnealedMCMC, HMC": mcmc(lehr.HMC(3), 28, 1, **tuned),
        "AnnealedMCMC, HMC from scores": mcmc(lehr.HMC(3, **SCORES), 28, 1, **tuned),
        "AnnealedMCMC, HMC, heun": mcmc(lehr.HMC(3), 25, 1, predictor="heun", **tuned),
        "Reverse, ancestral": lehr.Reverse(prior, "ancestral", 100, N, progress=False),
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
