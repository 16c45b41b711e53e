"""The shipped clothes, beside held-out pictures where the data are installed."""

import jax
import numpy as np
import pytest
from fashion_judge import Judge, reverse

import lehr
from lehr.training.data import FASHION, load_data
from lehr.training.evaluate import held_out_losses

needs_data = pytest.mark.skipif(
    not FASHION.is_dir(), reason="the Debian package dataset-fashion-mnist is not installed"
)


@pytest.fixture(scope="module")
def fashion():
    return lehr.load("fashion")


def test_the_card_says_what_it_is(fashion):
    card = lehr.zoo()["fashion"]
    assert (card["kind"], card["licence"], card["sigma_range"]) == ("score", "MIT", [0.03, 10.0])
    assert fashion.event_shape == (28, 28)
    errors = [figure["error"] for figure in card["held_out"]]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 0.4


@needs_data
def test_it_predicts_the_noise_of_held_out_pictures_as_its_card_says(fashion):
    events = load_data("fashion").held_out[-200:]
    (found,) = held_out_losses(fashion, events, sigmas=(0.4,), rng_key=jax.random.key(0))
    (stated,) = (figure for figure in lehr.zoo()["fashion"]["held_out"] if figure["sigma"] == 0.4)
    error = np.hypot(found["standard_error"], stated["standard_error"])
    assert abs(found["error"] - stated["error"]) < 4 * error


@needs_data
@pytest.mark.slow
def test_reverse_diffusion_makes_clothes_of_every_kind(fashion):
    data = load_data("fashion")
    x = reverse(fashion, 200, 50)
    shares = Judge(data).shares(x)
    assert shares.min() > 0.02
    # the total variation of 200 draws from ten equal classes is .067 on average
    assert np.abs(shares - 0.1).sum() / 2 < 0.2
    assert np.mean(np.abs(x) < 1.2) > 0.99
