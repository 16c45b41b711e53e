"""The shipped clothes: reverse diffusion of the score against held-out pictures.

Score: the accuracy at which a support vector machine tells samples from held-out pictures by their 64 first principal
components (½ if they are alike). Distance: Fréchet's, between the Gaussians of those components, in units of their
whole variance. Classes: the total variation between the shares of the ten kinds of clothes, as a machine trained on
training pictures tells them, and those of the data. Training pictures against held-out ones are the floor of each.
`python benchmarks/fashion.py [samples]`
"""

import sys
import time

import jax
import numpy as np
from report import report
from scipy.linalg import sqrtm
from sklearn.decomposition import PCA
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.svm import SVC

import lehr
from lehr.training.data import load_data

COMPONENTS, TAUGHT = 64, 6000
WAYS = (("ancestral", 50), ("ancestral", 200), ("heun", 50))


def reverse(potential, n, num_levels, seed=0, method="ancestral"):
    """Pictures x/α at the cleanest level that was trained."""
    low, high = lehr.zoo()["fashion"]["training"][-1]["sigma_range"]
    end, start = (float(potential.schedule.time(-2 * np.log(sigma))) for sigma in (low, high))
    ladder = lehr.Ladder.log_snr(potential.schedule, num_levels, t_min=end, t_max=start)
    driver = lehr.Reverse(potential, method, ladder, n, progress=False)
    x = driver.run(jax.random.key(seed)).get_samples()["x"]
    return x / float(potential.schedule.alpha(end))


class Judge:
    """What tells clothes apart, and samples from clothes."""

    def __init__(self, data):
        flat = data.events.reshape(len(data.events), -1)
        self.components = PCA(COMPONENTS, random_state=0).fit(flat)
        some = np.random.default_rng(0).permutation(len(flat))[:TAUGHT]
        self.classes = SVC(C=10).fit(self.features(data.events[some]), data.labels[some])

    def features(self, pictures):
        return self.components.transform(np.asarray(pictures).reshape(len(pictures), -1))

    def two_sample_score(self, first, second):
        both = np.concatenate([self.features(first), self.features(second)])
        both /= both.std(0)
        origin = np.repeat([0, 1], [len(first), len(second)])
        return float(cross_val_score(SVC(), both, origin, cv=StratifiedKFold(5, shuffle=True, random_state=0)).mean())

    def distance(self, first, second):
        a, b = self.features(first), self.features(second)
        cov = [np.cov(c.T) for c in (a, b)]
        between = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(cov[0] + cov[1] - 2 * np.real(sqrtm(cov[0] @ cov[1])))
        return float(between / np.trace(cov[1]))

    def shares(self, pictures):
        return np.bincount(self.classes.predict(self.features(pictures)), minlength=10) / len(pictures)


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
