"""Product of a ring and a bar: drivers and kernels at equal cost, from exact and from trained energies.

Prints a table and writes out/bench/ring_times_bar.json. 2,000 chains, five seeds, at most 200 gradient
evaluations a chain. LL: mean log density of the samples under the true product (exact draws: 3.48).
"""

import json
import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

import lehr
from lehr.zoo.targets import target

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "exact"))
from judge import LOG_EVIDENCE, judge

SEEDS, N = range(5), 2000
COST = {
    "HMC": (lehr.HMC(3), {"ladder": 28, "num_warmup": 1, "num_steps": 1}),
    "MALA": (lehr.MALA(), {"ladder": 28, "num_warmup": 1, "num_steps": 5}),
    "UHMC": (lehr.UHMC(3), {"ladder": 28, "num_warmup": 1, "num_steps": 1}),
    "ULA": (lehr.ULA(), {"ladder": 28, "num_warmup": 1, "num_steps": 5}),
}
DRIVERS = [("AnnealedSMC", "HMC"), ("AnnealedSMC", "MALA"), *(("AnnealedMCMC", kernel) for kernel in COST)]
PRIORS = {
    "exact": lambda: target("ring").exact * target("bar").exact,
    "trained": lambda: lehr.load("ring") * lehr.load("bar"),
}


def measure(prior, driver, kernel):
    how, settings = COST[kernel]
    if driver == "AnnealedSMC":
        sampler = lehr.AnnealedSMC(prior, how, num_particles=N, progress=False, **settings)
    else:
        sampler = lehr.AnnealedMCMC(prior, how, num_chains=N, num_samples=1, progress=False, **settings)
    runs = [(sampler.run(seed), judge(sampler.get_samples()["x"])) for seed in SEEDS]
    figures = np.array([f for _, f in runs])
    log_z = [run.log_evidence for run, _ in runs] if driver == "AnnealedSMC" else [np.nan]
    return {
        "evaluations": runs[0][0].attrs["evaluations_per_chain"],
        "log_likelihood": [figures[:, 0].mean(), figures[:, 0].std(ddof=1)],
        "in_mode": figures[:, 1].mean(),
        "mode_std": figures[:, 2].mean(),
        "upper_mass": [figures[:, 3].mean(), figures[:, 3].std(ddof=1)],
        "log_evidence": [np.mean(log_z), np.std(log_z, ddof=1) if len(log_z) > 1 else np.nan],
    }


def spread(mean, sd):
    """Mean and standard deviation over seeds; an unadjusted chain may have run away."""
    return f"{mean:.3f} ± {sd:.3f}" if abs(mean) < 1e4 else f"{mean:.0e}"


def main():
    table = Table(title=f"ring × bar, {N} chains, {len(SEEDS)} seeds; log Z exact {LOG_EVIDENCE:.3f}")
    for name in ("energies", "driver", "kernel", "evals", "LL", "% in mode", "mode std", "upper mass", "log Z"):
        table.add_column(name, justify="right")
    results = {}
    for energies, make in PRIORS.items():
        for driver, kernel in DRIVERS:
            r = measure(make(), driver, kernel)
            results[f"{energies} {driver} {kernel}"] = r
            pairs = [spread(*r[k]) for k in ("log_likelihood", "upper_mass", "log_evidence")]
            table.add_row(
                energies, driver, kernel, str(r["evaluations"]), pairs[0], f"{100 * r['in_mode']:.2f}",
                f"{r['mode_std']:.4f}", pairs[1], pairs[2] if driver == "AnnealedSMC" else "–",
            )  # fmt: skip
    Console(width=130).print(table)
    out = Path("out/bench/ring_times_bar.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
