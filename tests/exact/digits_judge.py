"""Figures of merit for 8×8 digits: a classifier of them, and a test whether two sets of pictures differ."""

import jax
import numpy as np
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.svm import SVC

import lehr
from lehr.training.data import load_data

SIGMA = 0.05  # where the model's ladders end
DATA = load_data("digits")


def classifier():
    """A support vector machine for the ten digits, trained on the model's own training digits."""
    return SVC(C=10).fit(flat(DATA.events), DATA.labels)


def two_sample_score(first, second, seed=0):
    """The accuracy at which such a machine tells two sets of pictures apart, cross-validated: ½ if they are alike.

    Over n pictures in all its standard deviation is ½/√n: .016 for twice 500.
    """
    return tell_apart(flat(first), flat(second), SVC(C=10), seed)


def tell_apart(first, second, machine, seed=0):
    """The cross-validated accuracy of a machine that is shown two sets of rows."""
    origin = np.repeat([0, 1], [len(first), len(second)])
    folds = StratifiedKFold(5, shuffle=True, random_state=seed)
    return float(cross_val_score(machine, np.concatenate([first, second]), origin, cv=folds).mean())


def held_out(n=500, labels=None, seed=0):
    """Held-out digits, some labels only if asked, under the noise that the model's samples have too."""
    chosen = DATA.held_out if labels is None else DATA.held_out[np.isin(DATA.held_out_labels, labels)]
    rng = np.random.default_rng(seed)
    chosen = chosen[rng.permutation(len(chosen))[:n]]
    return chosen + SIGMA * rng.normal(size=chosen.shape)


def ladder(potential, num_levels, widest=8.0, finest=SIGMA):
    """From where nothing but the Gaussian of the data is left, down to σ/α = ``finest``."""
    start, end = (float(potential.schedule.time(-2 * np.log(s))) for s in (widest, finest))
    return lehr.Ladder.log_snr(potential.schedule, num_levels, t_min=end, t_max=start)


def smc(potential, n, seed=0, num_levels=240, num_steps=0):
    """Weighted particles, by the model's own reverse kernels: pictures x/α."""
    driver = lehr.AnnealedSMC(
        potential,
        ladder=ladder(potential, num_levels),
        num_steps=num_steps,
        num_particles=n,
        weights="path",
        progress=False,
    )
    return pictures(potential, driver.run(jax.random.key(seed)).get_samples()["x"])


def reverse(potential, n, seed=0, num_levels=240):
    """Plain reverse diffusion: pictures x/α."""
    driver = lehr.Reverse(potential, num_levels=ladder(potential, num_levels), num_samples=n, progress=False)
    return pictures(potential, driver.run(jax.random.key(seed)).get_samples()["x"])


def pictures(potential, x):
    """Samples at the ladder's end in the units of the data."""
    return np.asarray(x) / float(potential.schedule.alpha(potential.schedule.time(-2 * np.log(SIGMA))))


def flat(x):
    return np.asarray(x).reshape(len(x), -1)
