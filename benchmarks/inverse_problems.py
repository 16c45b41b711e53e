"""Linear inverse problems whose posterior is a mixture in closed form: sliced W2 to it, by guidance strategy.

Prior: 25 Gaussians of unit covariance at (−8i, −8j), tiled to d numbers. Data: y = A x + noise, k numbers.
W2: over 200 directions, between 1,000 samples and 1,000 exact draws; floor: between two sets of exact draws.
Excess: mean over problems of W2 less its floor, with its standard error. A problem compiles nothing anew.
`python benchmarks/inverse_problems.py [problems]`
"""

import sys

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
    "moment matching": lehr.guidance.MomentMatching(),
    "Tweedie": lehr.guidance.Tweedie(),
    "raw": lehr.guidance.Raw(),
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


def main(problems=20):
    rows, results = [], {}
    for d in (8, 80):
        for k in (1, 2, 4):
            drivers = {
                name: lehr.AnnealedSMC(lehr.Path(model, guidance), num_particles=N, progress=False)
                for name, guidance in STRATEGIES.items()
            }
            excess, distance, floors = {name: [] for name in drivers}, {name: [] for name in drivers}, []
            for i in range(problems):
                rng = np.random.default_rng((d, k, i))
                weights, operator, noise, y = problem(rng, d, k)
                directions = rng.standard_normal((d, 200))
                directions /= np.linalg.norm(directions, axis=0)
                draws = [exact_draws(rng, d, weights, operator, noise, y, N) for _ in range(4)]
                floor = np.mean([sliced(draws[0], b, directions) for b in draws[1:]])
                floors.append(floor)
                for name, smc in drivers.items():
                    smc.run(i, np.log(weights), operator, noise, y)
                    found = sliced(smc.get_samples()["x"], draws[0], directions)
                    distance[name].append(found)
                    excess[name].append(found - floor)
            for name, smc in drivers.items():
                away = np.array(excess[name])
                made = smc.last_run.attrs["evaluations_per_chain"]
                error = away.std(ddof=1) / np.sqrt(problems)
                results[f"d={d} k={k} {name}"] = {"excess": away.tolist(), "floor": floors, "evaluations": made}
                row = (d, k, name, f"{made:.0f}", f"{np.mean(distance[name]):.3f}", f"{np.mean(floors):.3f}")
                rows.append((*row, f"{away.mean():+.3f} ± {error:.3f}", f"{np.median(away):+.3f}"))
                print(*rows[-1], sep="  ", flush=True)
    columns = ("d", "k", "guidance", "evaluations", "sliced W2", "floor", "excess", "median excess")
    report("inverse_problems", f"Linear inverse problems, {problems} of each kind", columns, rows, results)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
