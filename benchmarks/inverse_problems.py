"""Linear inverse problems whose posterior is a mixture in closed form: sliced W2 to it, by guidance strategy.

Prior: 25 Gaussians of unit covariance at (−8i, −8j), tiled to d numbers. Data: y = A x + noise, k numbers.
W2: over 200 directions, between 1,000 of the particles and 1,000 exact draws; floor: between two sets of exact draws.
There are more particles than that, since those of one ancestor are not independent of each other.
Excess: mean over problems of W2 less its floor, with its standard error. A problem compiles nothing anew.
`python benchmarks/inverse_problems.py [problems] [d,…] [k,…] [strategy,…] [particles]`, strategies by number and "8,"
for one.
"""

import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from report import report
from scipy import special, stats

import lehr

N = 1000
GRID = np.array([(-8.0 * i, -8.0 * j) for i in range(-2, 3) for j in range(-2, 3)])
STRATEGIES = {
    "moment matching": (lehr.guidance.MomentMatching(), 40),
    "Tweedie": (lehr.guidance.Tweedie(), 40),
    "Tweedie, annealed at rate 2": (lehr.guidance.Annealed(rate=2), 80),
    "Tweedie, annealed at rate 10": (lehr.guidance.Annealed(rate=10), 80),
    "raw": (lehr.guidance.Raw(), 40),
}


def problem(rng, d, k):
    """Weights of the prior, the operator, the noise, and an observation."""
    weights = rng.standard_normal(25) ** 2
    weights /= weights.sum()
    diagonal = np.sort(rng.uniform(size=k))[::-1]
    left, right = (
        stats.ortho_group.rvs(k, random_state=rng) if k > 1 else np.ones((1, 1)),
        np.linalg.qr(rng.standard_normal((d, k)))[0],
    )
    operator = left @ (diagonal[:, None] * right.T)
    noise = rng.uniform() * diagonal.max()
    locs = np.tile(GRID, (1, d // 2))
    x = locs[rng.choice(25, p=weights)] + rng.standard_normal(d)
    return weights, operator, noise, operator @ x + noise * rng.standard_normal(k)


def exact_draws(rng, d, weights, operator, noise, y, n):
    """From the posterior, a mixture of 25 Gaussians of one covariance."""
    locs = np.tile(GRID, (1, d // 2))
    marginal = operator @ operator.T + noise**2 * np.eye(len(y))
    logits = np.log(weights) + [stats.multivariate_normal(m, marginal).logpdf(y) for m in locs @ operator.T]
    gain = np.linalg.solve(marginal, operator).T
    chosen = rng.choice(25, n, p=special.softmax(logits))
    means = locs + (y - locs @ operator.T) @ gain.T
    root = np.linalg.cholesky(np.eye(d) - gain @ operator + 1e-12 * np.eye(d))
    return means[chosen] + rng.standard_normal((n, d)) @ root.T


def sliced(a, b, directions):
    """Sliced Wasserstein distance of order two between equally many points."""
    along = np.sort(a @ directions, 0) - np.sort(b @ directions, 0)
    return float(np.sqrt(np.mean(along**2)))


def model(log_weights, operator, noise, y):
    d = operator.shape[1]
    prior = lehr.GaussianMixture(np.tile(GRID, (1, d // 2)), np.ones(25), jnp.exp(log_weights), lehr.VPLinear())
    x = numpyro.sample("x", lehr.Diffusion(prior))
    numpyro.sample("y", dist.Normal(operator @ x, noise).to_event(1), obs=y)


class Posterior:
    """A driver of :func:`model`, prepared once: a problem changes its data only."""

    def __init__(self, guidance, levels, particles):
        self.smc = lehr.AnnealedSMC(lehr.Path(model, guidance), ladder=levels, num_particles=particles, progress=False)
        self.program = None

    def run(self, seed, *data):
        data = tuple(jnp.asarray(value, float) for value in data)
        if self.program is None:
            self.program, self.data = self.smc.prepare(self.smc.bind(*data)), data
        return self.smc.sample(self.program.exchange(self.data, data), jax.random.key(seed))


def main(problems=20, dimensions=(8, 80), numbers=(1, 2, 4), strategies=(0, 1, 2, 3, 4), particles=8000):
    rows, results = [], {}
    for d, k in itertools.product(dimensions, numbers):
        drivers = {
            name: Posterior(*how, particles) for i, (name, how) in enumerate(STRATEGIES.items()) if i in strategies
        }
        distance, floors, made = {name: [] for name in drivers}, [], {}
        for i in range(problems):
            rng = np.random.default_rng((d, k, i))
            weights, operator, noise, y = problem(rng, d, k)
            directions = rng.standard_normal((d, 200))
            directions /= np.linalg.norm(directions, axis=0)
            draws = [exact_draws(rng, d, weights, operator, noise, y, N) for _ in range(4)]
            floors.append(np.mean([sliced(draws[0], b, directions) for b in draws[1:]]))
            for name, posterior in drivers.items():
                run = posterior.run(i, np.log(weights), operator, [noise], y)
                chosen = rng.choice(particles, N, replace=False)
                distance[name].append(sliced(run.get_samples()["x"][chosen], draws[0], directions))
                made[name] = run.attrs["evaluations_per_chain"]
        for name in drivers:
            away = np.subtract(distance[name], floors)
            error = away.std(ddof=1) / np.sqrt(problems)
            results[f"d={d} k={k} {name}"] = {"excess": away.tolist(), "floor": floors, "evaluations": made[name]}
            row = (d, k, name, f"{made[name]:.0f}", f"{np.mean(distance[name]):.3f}", f"{np.mean(floors):.3f}")
            rows.append((*row, f"{away.mean():+.3f} ± {error:.3f}", f"{np.median(away):+.3f}"))
            print(*rows[-1], sep="  ", flush=True)
    columns = ("d", "k", "guidance", "evaluations", "sliced W2", "floor", "excess", "median excess")
    report("inverse_problems", f"Linear inverse problems, {problems} of each kind", columns, rows, results)


if __name__ == "__main__":
    main(*(tuple(int(i) for i in given.split(",") if i) if "," in given else int(given) for given in sys.argv[1:]))
