"""Figures of merit for pictures of clothes: what tells kinds of clothes apart, and samples from clothes."""

import jax
import numpy as np
from digits_judge import flat, tell_apart
from scipy.linalg import sqrtm
from sklearn.decomposition import PCA
from sklearn.svm import SVC

import lehr

COMPONENTS, TAUGHT = 64, 6000


def reverse(potential, n, num_levels, seed=0, method="ancestral"):
    """Plain reverse diffusion over the levels that were trained: pictures x/α."""
    low, high = lehr.zoo()["fashion"]["sigma_range"]
    end, start = (float(potential.schedule.time(-2 * np.log(sigma))) for sigma in (low, high))
    ladder = lehr.Ladder.log_snr(potential.schedule, num_levels, t_min=end, t_max=start)
    driver = lehr.Reverse(potential, method, ladder, n, progress=False)
    return driver.run(jax.random.key(seed)).get_samples()["x"] / float(potential.schedule.alpha(end))


class Judge:
    """Pictures by their first principal components, and a machine that knows the ten kinds by those."""

    def __init__(self, data):
        self.components = PCA(COMPONENTS, random_state=0).fit(flat(data.events))
        some = np.random.default_rng(0).permutation(len(data.events))[:TAUGHT]
        self.kinds = SVC(C=10).fit(self.features(data.events[some]), data.labels[some])

    def features(self, pictures):
        return self.components.transform(flat(pictures))

    def two_sample_score(self, first, second):
        """The accuracy at which a machine tells two sets apart: ½ if they are alike."""
        a, b = self.features(first), self.features(second)
        scale = np.concatenate([a, b]).std(0)
        return tell_apart(a / scale, b / scale, SVC())

    def distance(self, first, second):
        """Fréchet's, between the Gaussians of the components, in units of the second's whole variance."""
        a, b = self.features(first), self.features(second)
        cov = [np.cov(c.T) for c in (a, b)]
        between = np.sum((a.mean(0) - b.mean(0)) ** 2) + np.trace(cov[0] + cov[1] - 2 * np.real(sqrtm(cov[0] @ cov[1])))
        return float(between / np.trace(cov[1]))

    def shares(self, pictures):
        """Of the ten kinds, shape (10,)."""
        return np.bincount(self.kinds.predict(self.features(pictures)), minlength=10) / len(pictures)
