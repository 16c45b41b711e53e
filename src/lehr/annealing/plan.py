"""What is static about a run: together with the structure of its path, it decides what is compiled."""

from __future__ import annotations

from typing import NamedTuple

from lehr.annealing.layout import Layout
from lehr.annealing.predictors import Ancestral, Predictor
from lehr.annealing.weights import Weights, follow_path
from lehr.kernels.base import Kernel

__all__ = ["Plan"]


class Plan(NamedTuple):
    """How chains move, how they are weighed, and how many there are of everything.

    Attributes:
        kernel: how chains move at a level.
        predictor: how they move to the next; None where they stay, or follow the path's weights.
        chooses: where weighted chains move or stay, level by level, by which keeps more of them: they move if that
            loses less than this many times what staying loses. 0 if nobody asks.
        weights: how they are weighed; None for independent chains.
        num_chains: N.
        num_pilot: chains of the pilot pass; 0 for none.
        num_starts: draws that each chain chooses its start from; 1 for weighted chains.
        num_warmup: tuned transitions at each level.
        num_steps: transitions at each level that count.
        num_draws: draws kept of each chain after the last level; a weighted run keeps its final points.
        thinning: transitions for each kept one.
        is_tuned: whether steps are given, level by level, rather than found.
        counts_noise: whether predictors know that a product counts the noise more than once.
        num_islands: sets of weighted chains that are resampled each within itself.
        layout: how chains lie on devices and in memory.
    """

    kernel: Kernel
    predictor: Predictor | None
    chooses: float
    weights: Weights | None
    num_chains: int
    num_pilot: int
    num_starts: int
    num_warmup: int
    num_steps: int
    num_draws: int
    thinning: int
    is_tuned: bool
    counts_noise: bool
    num_islands: int
    layout: Layout

    @property
    def is_informed(self) -> bool:
        """Whether chains move to the next level by what is known of the curvature at theirs."""
        return self.weights is not None and isinstance(self.predictor, Ancestral)

    @property
    def follows_path(self) -> bool:
        """Whether chains move between levels by the models' own reverse kernels."""
        return follow_path(self.weights)
