"""Products of Gaussians in closed form: sampled variance against the exact one, in standard errors.

Independent chains by energies, and weighted particles by scores alone, 5,000 of each and four seeds.
"""

import sys
from pathlib import Path

import numpy as np
from report import report

import lehr

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "exact"))
from test_gaussians import TARGETS, reverse_variance

N, SEEDS = 5000, 4
SCORES = {"metropolis": "line-integral", "integrate_energies": True}


def samplers(prior):
    return {
        "HMC": lehr.AnnealedMCMC(prior, lehr.HMC(), 16, 8, num_chains=N, num_samples=1, progress=False),
        "MALA": lehr.AnnealedMCMC(prior, lehr.MALA(), 16, 8, num_chains=N, num_samples=1, progress=False),
        "path weights": lehr.AnnealedSMC(
            prior, lehr.HMC(**SCORES), 32, 4, num_particles=N, weights="path", progress=False
        ),
    }


def main():
    rows, results = [], {}
    for name, (make, exact) in TARGETS.items():
        row = [name, f"{exact:.4f}", f"{reverse_variance(make()):.4f}"]
        for how, sampler in samplers(make()).items():
            variances = []
            for seed in range(SEEDS):
                sampler.run(seed)
                variances.append(sampler.get_samples()["x"].var(0).mean())  # two coordinates: half one's variance
            error = max(np.std(variances, ddof=1), exact / np.sqrt(N)) / np.sqrt(SEEDS)
            z = (np.mean(variances) - exact) / error
            results[f"{name} {how}"] = {"variance": float(np.mean(variances)), "z": float(z)}
            row += [f"{np.mean(variances):.4f}", f"{z:+.1f}"]
        rows.append(row)
        print(*row, sep="  ", flush=True)
    columns = ("target", "exact", "reverse, summed scores", "HMC", "z", "MALA", "z", "path weights", "z")
    report(
        "gaussians",
        f"Variance of products of Gaussians, {N} chains (z: error in standard errors)",
        columns,
        rows,
        results,
    )


if __name__ == "__main__":
    main()
