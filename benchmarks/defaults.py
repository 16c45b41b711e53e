"""Untuned defaults against a grid of hand-made settings: eight modes of unequal mass in 2, 16 and 128 dimensions.

ESS: 1 / mean over modes of E[(p̂ − p)²]/(p(1 − p)) over seeds, that is how many independent draws would have estimated
the masses as well. What counts is ESS per gradient evaluation of all particles; the default pays for its pilot.
A grid point has no pilot: steps in units of the modes' own width at each level, and their own curvature for the moves
between levels. The best points by few seeds are run again with fresh ones, so that none is best by luck.
`python benchmarks/defaults.py [seeds]`
"""

import itertools
import sys

import jax
import numpy as np
from mixtures import MASSES, mixture
from report import report

import lehr

N, STD, SCREEN, FINALISTS = 1000, 0.3, 8, 3
LEVELS, MOVES, STEPS = (6, 12, 24), ((1, 1), (1, 3)), (0.7, 1.0, 1.4)


def hand_made(p, d, levels, num_steps, leapfrogs):
    """A driver, prepared, and its tuning as a function of the step."""
    tuning = lehr.Tuning(1.0)
    smc = lehr.AnnealedSMC(p, lehr.HMC(leapfrogs), levels, num_steps, num_particles=N, tuning=tuning, progress=False)
    program = smc.prepare(smc.path)
    t = program.ladder.times
    width = np.sqrt(np.asarray(p.schedule.alpha(t) * STD) ** 2 + np.asarray(p.schedule.sigma(t)) ** 2)[:, None]

    def sample(step, seed):
        smc.tuning = lehr.Tuning(1.2 * d**-0.25 * step, width, 0.125, width**-2)
        return smc.sample(program, jax.random.key(seed))

    return sample


def as_it_comes(p, **how):
    """A run of what nobody tuned, as a function of its seed, and the levels that it starts from."""
    smc = lehr.AnnealedSMC(p, num_particles=N, progress=False, **how)
    program = smc.prepare(smc.path)
    return (lambda seed: smc.sample(program, jax.random.key(seed))), program.ladder


def settings(p):
    """What nobody tuned: the defaults, and what is taken beside a likelihood, with the levels placed or not."""
    beside = {"kernel": lehr.HMC(), "num_steps": 2, "pilot": 64}
    default, uniform = as_it_comes(p)
    placed = lehr.Ladder.adaptive(p, kernel=lehr.HMC(), num_steps=2)
    return {
        "default": default,
        "the same on levels uniform in log-SNR": as_it_comes(p, ladder=uniform)[0],
        "HMC(), num_steps=2, ladder=40, pilot=64": as_it_comes(p, ladder=40, **beside)[0],
        "the same on Ladder.adaptive": as_it_comes(p, ladder=placed, **beside)[0],
    }


def losses(sample, locs, seeds):
    """(seeds,) mean over modes of (p̂ − p)²/(p(1 − p)), and evaluations for each particle."""
    found = []
    for seed in seeds:
        run = sample(seed)
        modes = ((run.particles["x"][:, None] - locs) ** 2).sum(-1).argmin(1)
        masses = np.bincount(modes, np.exp(run.log_weights), 8)
        found.append(np.mean((masses - MASSES) ** 2 / (MASSES * (1 - MASSES))))
    return np.array(found), run.attrs["evaluations_per_chain"]


def main(seeds=64):
    rows, results = [], {}
    fresh = range(1000, 1000 + seeds)
    for d in (2, 16, 128):
        p, locs = mixture(d)
        points = []
        for levels, (num_steps, leapfrogs) in itertools.product(LEVELS, MOVES):
            sample = hand_made(p, d, levels, num_steps, leapfrogs)
            for step in STEPS:
                one = lambda seed, sample=sample, step=step: sample(step, seed)  # noqa: E731
                loss, made = losses(one, locs, range(SCREEN))
                points.append((loss.mean() * made, f"{levels} levels, {num_steps} × L = {leapfrogs}, step {step}", one))
                print(d, points[-1][1], f"ESS {1 / loss.mean():.0f}, evaluations {made}", flush=True)
        best = sorted(points, key=lambda point: point[0])[:FINALISTS]
        shown = settings(p)
        shown |= {f"by hand: {name}": one for _, name, one in best}
        measured = {name: losses(one, locs, fresh) for name, one in shown.items()}
        top = min(loss.mean() * made for name, (loss, made) in measured.items() if name.startswith("by hand"))
        for name, (loss, made) in measured.items():
            error = loss.std(ddof=1) / loss.mean() / np.sqrt(seeds)  # relative, of the ESS
            ratio = top / (loss.mean() * made)
            results[f"{d} {name}"] = {"losses": loss.tolist(), "evaluations": made, "relative": ratio}
            ess = 1 / loss.mean()
            told = (f"{ess:.0f} ± {ess * error:.0f}", f"{ess / made:.2f}", f"{ratio:.2f} ± {ratio * error:.2f}")
            rows.append((d, name, made, *told))
            print(*rows[-1], sep="  ", flush=True)
    columns = ("d", "settings", "evaluations", f"ESS of {N}", "ESS / evaluation", "of the best by hand")
    report("defaults", f"Masses of eight modes, {seeds} seeds", columns, rows, results)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
