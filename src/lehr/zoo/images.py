"""The shipped models of images, and how each was made.

Pixels lie in [−1, 1]. They come in steps, 1/8 for the digits, and noise much finer than a
step would resolve them: p would then be a sum of spikes, one for each grey value, of which
densities say nothing. The digits stop at σ = .05, where the spikes have blurred together:
what is left of them is a ripple of 2 exp(−2π²σ²/step²) = 8 %. Clothes have 256 grey values
and 784 pixels, most of them black: σ = .03 is what an eye can tell from none.

The energy's correction saturates at 15, where on held-out digits it is at most 6: what a network
makes of places far from all of them is multiplied by s/σ, and was some 15,000 nats in one such
place without a bound. Digits are spread the whole way to their neighbours until the last
recipe, and three quarters of it there: what the first two alone had learned had next to all of
its mass at σ = .05 off the digits in two of the classes.
"""

from __future__ import annotations

import dataclasses

from lehr.training.fit import Recipe
from lehr.zoo.produce import Making

__all__ = ["IMAGES"]

LEARN = Recipe(
    num_steps=6000,
    batch_size=256,
    time_weight=0.05,
    bound_weight=0.0,
    weight_decay=1.0,
    neighbours=6,
    reach=1.0,
    label_dropout=0.5,
)
CALIBRATE = dataclasses.replace(LEARN, num_steps=2000, learning_rate=1e-3, time_weight=0.3)
SETTLE = dataclasses.replace(CALIBRATE, reach=0.75)

IMAGES: dict[str, Making] = {
    "digits": Making(
        kind="energy",
        recipes=(LEARN, CALIBRATE, SETTLE),
        sigma_range=(0.05, 2.5),
        levels=(0.06, 0.1, 0.2, 0.4, 1.0, 2.0),
        compared_at=(0.1, 0.3, 1.0),
        limit=15.0,
    ),
    "fashion": Making(
        kind="score",
        recipes=(Recipe(num_steps=5000, batch_size=128, learning_rate=1.5e-3),),
        sigma_range=(0.03, 10.0),
        levels=(0.06, 0.1, 0.2, 0.4, 1.0, 2.0, 5.0),
    ),
}
