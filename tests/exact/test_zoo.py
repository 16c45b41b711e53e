"""The shipped models against the densities they were trained on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lehr
from lehr.zoo.images import IMAGES
from lehr.zoo.planar import density_error
from lehr.zoo.targets import TARGETS, target


def test_every_target_is_shipped_with_a_card_that_says_what_it_is():
    cards = lehr.zoo()
    assert set(TARGETS) <= set(cards) <= {*TARGETS, *IMAGES}
    for name in TARGETS:
        card = cards[name]
        assert card["title"] == target(name).title
        assert card["licence"] == "Apache-2.0"
        assert card["calibrated"]
        assert card["sigma_range"][0] <= 0.002


@pytest.mark.parametrize("name", TARGETS)
def test_the_log_density_is_right_and_normalised_at_every_level(name):
    for figure in density_error(lehr.load(name), target(name).exact, jax.random.key(5), 1000):
        assert abs(figure["mean"]) < 0.08
        assert figure["spread"] < 0.15


def masses(first, second, probs, in_first):
    """Mass of the first member among draws of the mixture of two shipped models."""
    smc = lehr.AnnealedSMC(
        lehr.Mixture([lehr.load(first), lehr.load(second)], probs),
        ladder=28,
        num_steps=1,
        num_particles=2000,
        progress=False,
    )
    share = []
    for seed in range(3):
        smc.run(seed)
        share.append(in_first(smc.get_samples()["x"]).mean())
    return np.mean(share)


@pytest.mark.slow
def test_a_mixture_of_trained_bars_has_the_masses_it_was_given():
    assert masses("left_bar", "right_bar", [0.3, 0.7], lambda x: x[:, 0] < 0) == pytest.approx(0.3, abs=0.05)


@pytest.mark.slow
def test_a_mixture_of_trained_corners_has_the_masses_it_was_given():
    assert masses("corners_up", "corners_down", [0.3, 0.7], lambda x: x[:, 1] > 0) == pytest.approx(0.3, abs=0.05)


@pytest.mark.slow
@pytest.mark.seam
def test_stock_blackjax_samples_a_shipped_model_at_a_fixed_level():
    import blackjax

    t, n = 0.6, 4000  # σ/α ≈ 1.4, where the ring is one mode
    ring, exact = lehr.load("ring"), target("ring").exact
    draws = exact.sample(jax.random.key(0), t, (n,))
    kernels = {
        "hmc": blackjax.hmc(ring.at(t), 0.8, jnp.ones(2), 4),
        "mala": blackjax.mala(ring.at(t), 0.4),
        "nuts": blackjax.nuts(ring.at(t), 0.6, jnp.ones(2)),
    }
    for name, kernel in kernels.items():

        def chain(key, x, kernel=kernel):
            step = lambda state, k: (kernel.step(k, state)[0], None)  # noqa: E731
            return jax.lax.scan(step, kernel.init(x), jax.random.split(key, 8))[0].position

        x = np.asarray(jax.jit(jax.vmap(chain))(jax.random.split(jax.random.key(1), n), draws))
        moments = exact.moments(t)
        np.testing.assert_allclose(
            x.mean(0), moments.mean, atol=4 * float(moments.std.max()) / np.sqrt(n), err_msg=name
        )
        np.testing.assert_allclose(x.std(0), moments.std, rtol=4 / np.sqrt(2 * n) + 0.01, err_msg=name)
