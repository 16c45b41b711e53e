"""The reverse sampler of Du et al. (2023) on the ring and the bar, by which noise it takes, from exact summed scores.

Its code draws step i with the variance β_i of the forward step, and the last step too; the posterior
q(x_{i-1} | x_i, x_0), as :class:`lehr.Reverse` has it, has less. `python benchmarks/reverse.py [seeds]`
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
from judge import judge

N = 2000


def cosine(num_steps=100):
    """The reference's schedule, ᾱ_i from the cosine with β clipped at .999."""
    f = np.cos((np.arange(num_steps + 1) / num_steps + 0.008) / 1.008 * np.pi / 2) ** 2
    return lehr.DiscreteSchedule(np.cumprod(np.minimum(f[1:] / f[:-1], 1).clip(0.001)))


class SummedScores:
    """Reverse diffusion from N(0, I) along the score of a prior, with the manners of a driver.

    Args:
        prior: on a DiscreteSchedule.
        num_samples: how many.
        posterior: whether a step has the variance of the posterior, in place of β_i.
        last: of the step from the last level to the data: its "mean and noise", its "mean", or "nothing".
    """

    def __init__(self, prior, num_samples, posterior=False, last="mean and noise"):
        self.prior, self.num_samples = prior, num_samples
        steps = int(prior.schedule.step(1.0))
        self.times = jnp.linspace(1.0, 0.0, steps + 1)
        share = np.asarray(prior.schedule.alpha(self.times), np.float64) ** 2  # ᾱ, noisiest first
        cleaner = np.append(share[1:], 1.0)
        beta = 1 - share / cleaner
        variance = beta * (1 - cleaner) / (1 - share) if posterior else beta.copy()
        if last != "mean and noise":
            variance[-1] = 0.0
        count = steps if last == "nothing" else steps + 1
        self.steps = tuple(jnp.asarray(table[:count], float) for table in (self.times, beta, variance))

    def run(self, seed):
        def step(x, now):
            t, beta, variance, key = now
            mean = (x + beta * jax.vmap(self.prior.score, (0, None))(x, t)) / jnp.sqrt(1 - beta)
            return mean + jnp.sqrt(variance) * jax.random.normal(key, x.shape), None

        keys = jax.random.split(jax.random.key(seed), len(self.times) + 1)
        start = jax.random.normal(keys[0], (self.num_samples, 2))
        x, _ = jax.lax.scan(step, start, (*self.steps, keys[1 : len(self.steps[0]) + 1]))
        self.samples = {"x": np.asarray(x)}
        return types.SimpleNamespace(attrs={"evaluations_per_chain": len(self.steps[0])}, log_weights=None)

    def get_samples(self):
        return self.samples


def main(seeds=5):
    prior = lehr.with_schedule(target("ring").exact * target("bar").exact, cosine())
    samplers = {
        ("β, the reference", "mean and noise"): SummedScores(prior, N),
        ("β", "mean"): SummedScores(prior, N, last="mean"),
        ("β", "nothing"): SummedScores(prior, N, last="nothing"),
        ("posterior", "mean"): SummedScores(prior, N, True, "mean"),
        ("posterior", "nothing"): SummedScores(prior, N, True, "nothing"),
        ("posterior, lehr.Reverse", "nothing"): lehr.Reverse(
            prior, "ancestral", lehr.Ladder(np.arange(100)[::-1] / 99), N, progress=False
        ),
    }
    rows, results = [], {}
    for name, sampler in samplers.items():
        figures = []
        for seed in range(seeds):
            sampler.run(seed)
            figures.append(judge(sampler.get_samples()["x"]))
        mean, sd = np.mean(figures, 0), np.std(figures, 0, ddof=1)
        results[", ".join(name)] = {"mean": mean.tolist(), "sd": sd.tolist()}
        rows.append(
            (*name, f"{mean[0]:.2f} ± {sd[0]:.2f}", f"{100 * mean[1]:.1f} ± {100 * sd[1]:.1f}", f"{mean[2]:.4f}")
        )
        print(*rows[-1], sep="  ", flush=True)
    columns = ("variance of a step", "after the last level", "LL", "% in mode", "mode std")
    report("reverse", f"Summed scores backwards, {N} samples, {seeds} seeds", columns, rows, results)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
