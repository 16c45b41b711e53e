r"""The noise levels that a driver visits, from noise to data.

Levels are uniform in log-SNR unless told otherwise: neighbouring densities then overlap
about equally all the way down. The last level should lie well below the finest feature of
the target, since what is sampled there is the target blurred by its σ: a ladder that stops
at σ = .025 turns modes of standard deviation .030 into .039.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from lehr.schedules import Schedule

if TYPE_CHECKING:
    from lehr.annealing.weights import Weights
    from lehr.kernels import Kernel
    from lehr.potentials.base import Potential
    from lehr.programs.path import Path

__all__ = ["Ladder"]

NOISIEST = -8.0  # log-SNR: what a ladder starts from where the schedule itself ends at −inf
PURE_NOISE = -20.0  # a schedule that ends below this ends in pure noise
FINEST_SHARE = 0.1  # of the finest feature's std: the default blur at the end of a ladder


class Ladder:
    """Strictly decreasing times in [0, 1].

    Args:
        times: the levels, noisiest first, shape (K,), K ≥ 1.

    Raises:
        ValueError: if the ladder is empty, not strictly decreasing, or leaves [0, 1].
    """

    def __init__(self, times: ArrayLike) -> None:
        table = np.asarray(times, np.float64)
        if table.ndim != 1 or table.size == 0:
            raise ValueError(f"a ladder is a vector of at least one time; got shape {table.shape}.")
        if not np.all(np.isfinite(table)) or table.min() < 0 or table.max() > 1:
            raise ValueError(
                f"the times of a ladder lie in [0, 1]; got values from {table.min():g} to {table.max():g}."
            )
        if np.any(np.diff(table) >= 0):
            raise ValueError(
                "a ladder leads from noise to data: its times must be strictly decreasing. Got "
                f"{np.array2string(table[:6], precision=4)}{'…' if table.size > 6 else ''}; reverse them?"
            )
        self.times = jnp.asarray(table, float)
        if np.any(np.diff(np.asarray(self.times)) >= 0):
            raise ValueError("two levels of the ladder are equal in float32; take fewer levels.")

    @classmethod
    def log_snr(
        cls, schedule: Schedule, num_levels: int = 40, t_min: float | None = None, t_max: float = 1.0
    ) -> Ladder:
        """Levels uniform in log-SNR, both ends included.

        Args:
            schedule: whose log-SNR it is.
            num_levels: K ≥ 1; a ladder of one level stands at ``t_min``.
            t_min: the last level. Defaults to where σ/α = .002.
            t_max: the first level. Where the schedule ends in pure noise, below λ = −20, the ladder
                starts at λ = −8, where σ/α = 55.

        Raises:
            ValueError: if ``num_levels`` is not a positive integer, or not 0 <= t_min < t_max <= 1.
        """
        check_count("num_levels", num_levels)
        if t_min is None:
            t_min = float(schedule.time(-2 * np.log(2e-3)))
        if not 0 <= t_min < t_max <= 1:
            raise ValueError(f"a ladder needs 0 <= t_min < t_max <= 1; got {t_min=}, {t_max=}.")
        clean = float(schedule.log_snr(t_min))
        if not np.isfinite(clean):
            raise ValueError(f"the log-SNR is infinite at {t_min=}; end the ladder a little above t = 0.")
        if num_levels == 1:
            return cls([t_min])
        levels = np.linspace(noisy_end(schedule, t_max), clean, num_levels)
        times = np.array(schedule.time(levels), np.float64)
        times[-1] = t_min
        return cls(times)

    @classmethod
    def adaptive(
        cls,
        path: Path | Potential,
        ess: float = 0.9,
        *,
        kernel: Kernel | None = None,
        weights: Weights | None = None,
        num_particles: int = 256,
        num_steps: int | None = None,
        t_min: float | None = None,
        t_max: float = 1.0,
        max_levels: int = 1000,
        rng_key: jax.Array | int = 0,
    ) -> Ladder:
        """As many levels as it takes: each as far from the last as a pilot's particles can follow.

        A pilot of weighted particles walks down. The next level is where the conditional effective
        sample size of their incremental weights has fallen to the share ``ess``, found by bisection in
        log-SNR; there they are resampled and moved, and so on. Levels then stand close where the
        density changes fast. The ladder is fixed once it is returned.

        Args:
            path: a path that is bound to its data, or a potential.
            ess: the share, between 0 and 1; the closer to 1, the more levels.
            kernel: how the pilot moves; by default as :class:`~lehr.AnnealedSMC` does.
            weights: how it is weighed, likewise.
            num_particles: of the pilot.
            num_steps: its transitions at each level, beside those that tune the step, likewise.
            t_min: the last level; by default where the blur is a tenth of the finest feature.
            t_max: the first level.
            max_levels: give up beyond.
            rng_key: the pilot's seed.

        Raises:
            ValueError: for a share outside (0, 1), or if ``max_levels`` do not suffice.
            TypeError: if the path is unbound, or a factor has neither an energy nor a denoiser.

        Reference:
            Zhou, Johansen & Aston, Toward automatic model comparison, JCGS 2016.
        """
        from lehr.annealing.adaptive import adaptive_times  # the loop's parts; imported when used

        return cls(
            adaptive_times(path, ess, kernel, weights, num_particles, num_steps, t_min, t_max, max_levels, rng_key)
        )

    def __len__(self) -> int:
        return self.times.shape[0]

    def __repr__(self) -> str:
        return f"Ladder({len(self)} levels, t = {float(self.times[0]):.4g} … {float(self.times[-1]):.4g})"


def clean_end(schedule: Schedule, finest: float) -> float:
    """Where the blur is a tenth of the finest feature."""
    return max(float(schedule.time(-2 * np.log(FINEST_SHARE * finest))), 1e-5)


def noisy_end(schedule: Schedule, t_max: float) -> float:
    """The log-SNR that a ladder starts at."""
    noisy = float(schedule.log_snr(t_max))
    return noisy if noisy > PURE_NOISE else NOISIEST


def check_count(name: str, value: object, least: int = 1) -> None:
    """Refuse what is not an integer of at least ``least``."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}; got {value!r}.")
