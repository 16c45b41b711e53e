"""The shipped clothes: reverse diffusion of the score against held-out pictures.

Score: the accuracy at which a support vector machine tells samples from held-out pictures by their 64 first principal
components (½ if they are alike). Distance: Fréchet's, between the Gaussians of those components, in units of their
whole variance. Classes: the total variation between the shares of the ten kinds of clothes, as a machine trained on
training pictures tells them, and those of the data. Training pictures against held-out ones are the floor of each.
`python benchmarks/fashion.py [samples]`
"""

import sys
import time
from pathlib import Path

import numpy as np
from report import report

import lehr
from lehr.training.data import load_data

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "exact"))
from fashion_judge import Judge, reverse

WAYS = (("ancestral", 50), ("ancestral", 200), ("heun", 50))


def main(n=500):
    fashion, data = lehr.load("fashion"), load_data("fashion")
    judge, rng = Judge(data), np.random.default_rng(1)
    truth = data.held_out[rng.permutation(len(data.held_out))[:n]]
    usual = judge.shares(data.held_out)
    sets = {"training pictures": lambda: data.events[rng.permutation(len(data.events))[:n]]}
    for method, levels in WAYS:
        sets[f"Reverse, {method}, {levels} levels"] = lambda m=method, k=levels: reverse(fashion, n, k, method=m)
    rows, results = [], {}
    for name, make in sets.items():
        started = time.monotonic()
        x = make()
        figures = {
            "two_sample_score": judge.two_sample_score(x, truth),
            "distance": judge.distance(x, truth),
            "classes": float(np.abs(judge.shares(x) - usual).sum() / 2),
            "seconds": time.monotonic() - started,
        }
        results[name] = figures
        rows.append((name, *(f"{figures[k]:.3f}" for k in ("two_sample_score", "distance", "classes"))))
        print(*rows[-1], f"{figures['seconds']:.0f} s", sep="  ", flush=True)
    report(
        "fashion", f"28×28 clothes, {n} samples", ("samples", "two-sample score", "distance", "classes"), rows, results
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
