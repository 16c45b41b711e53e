r"""The levels of a weighted run, spaced by what its pilot saw.

On the way to level k particles keep a share CESS_k of their number, and

    s_k = √(−log CESS_k)

is the standard deviation of what their log weights gain, where that is normal. A run loses Σ s_k² in all. With a
path of a given length Σ s_k that is least where every step has the same part of it, so K levels stand close where
the density changes fast. A pilot of few chains knows s roughly, and nothing of what none of them met: half of each
step is therefore measured by s, and half by log-SNR, which no step then covers more than twice as fast as it would
if levels were uniform. The ends stay where they are.

Path weights leave levels uniform: what their reverse kernels lack over a long step does not show in them.

References:
    Gelman & Meng, Simulating normalizing constants: from importance sampling to bridge sampling to path sampling,
    Statistical Science 1998 (the length of a path).
    Syed, Bouchard-Côté, Chern & Doucet, Optimised annealed sequential Monte Carlo samplers, 2024 (arXiv 2408.12057).
"""

from __future__ import annotations

import numpy as np

from lehr.annealing.ladder import Ladder
from lehr.annealing.tuning import Tuning
from lehr.schedules import Schedule

__all__ = ["interpolated", "spaced"]

BY_LOSS = 0.5  # the part of each step that is measured by s
LARGEST = 8.0  # times its part of log-SNR that a step may have by s: one that went astray is not to draw all levels


def spaced(ladder: Ladder, schedule: Schedule, conditional_ess: np.ndarray) -> Ladder:
    """As many levels as before between the same ends, at equal distances.

    Args:
        ladder: the pilot's.
        schedule: of the path.
        conditional_ess: the shares kept on the way to each level, (K,); the first, which is a start, does not count.
    """
    times = np.array(ladder.times, np.float64)
    if times.size < 3:
        return ladder
    log_snr = np.asarray(schedule.log_snr(ladder.times), np.float64)
    kept = np.clip(np.nan_to_num(conditional_ess[1:]), 1e-300, 1.0)
    loss = np.sqrt(-np.log(kept))
    ends = np.pad(loss, 1, mode="edge")
    loss = (ends[:-2] + 2 * loss + ends[2:]) / 4
    length = np.diff(log_snr) / (log_snr[-1] - log_snr[0])
    if loss.sum() > 0:
        by_loss = BY_LOSS * np.minimum(loss / loss.sum(), LARGEST * length)
        length = by_loss + (1 - by_loss.sum()) * length
    so_far = np.append(0.0, np.cumsum(length))
    inner = np.interp(np.linspace(0, so_far[-1], times.size)[1:-1], so_far, log_snr)
    times[1:-1] = np.asarray(schedule.time(inner))
    return Ladder(times)


def interpolated(tuning: Tuning, schedule: Schedule, before: Ladder, after: Ladder) -> Tuning:
    """What was found at the levels of one ladder as it is between them, at those of another.

    Args:
        tuning: arrays over the levels of ``before``.
        schedule: of the path.
        before: a ladder.
        after: another of the same ends.
    """
    known, asked = (np.asarray(schedule.log_snr(ladder.times), np.float64) for ladder in (before, after))

    def between(values: np.ndarray) -> np.ndarray:
        logs = np.log(np.asarray(values))
        return np.exp(np.apply_along_axis(lambda column: np.interp(asked, known, column), 0, logs))

    step_size, scale, curvature = (between(v) for v in (tuning.step_size, tuning.scale, tuning.curvature))
    nearest = np.abs(asked[:, None] - known).argmin(1)
    moves = np.asarray(tuning.moves)[nearest]
    return tuning._replace(step_size=step_size, scale=scale, curvature=curvature, moves=moves, times=after.times)
