"""Products of Gaussians in closed form: sampled variance against the exact one, in standard errors.

Prints a table and writes out/bench/gaussians.json. 5,000 independent chains, one draw each.
"""

import json
import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

import lehr

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "exact"))
from test_gaussians import TARGETS, reverse_variance

N = 5000


def main():
    table = Table(title=f"Variance of products of Gaussians, {N} chains (z: error in standard errors)")
    for name in ("target", "exact", "reverse, summed scores", "HMC", "z", "MALA", "z"):
        table.add_column(name, justify="right")
    results = {}
    for name, (make, exact) in TARGETS.items():
        row = [name, f"{exact:.4f}", f"{reverse_variance(make()):.4f}"]
        for kernel in (lehr.HMC(), lehr.MALA()):
            mcmc = lehr.AnnealedMCMC(
                make(), kernel, ladder=16, num_steps=8, num_chains=N, num_samples=1, progress=False
            )
            mcmc.run(3)
            variance = mcmc.get_samples()["x"].var(0).mean()  # two coordinates: half the variance of one
            z = (variance / exact - 1) / np.sqrt(1 / N)
            results[f"{name} {type(kernel).__name__}"] = {"variance": float(variance), "z": float(z)}
            row += [f"{variance:.4f}", f"{z:+.1f}"]
        table.add_row(*row)
    Console(width=110).print(table)
    out = Path("out/bench/gaussians.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
