"""Each recipe of the documentation runs as it is written, and its density is finite with a gradient in all of x."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

import lehr
from lehr.potentials.base import Moments

BLOCKS = re.findall(r"```python\n(.*?)```", (Path(__file__).parent.parent / "docs" / "recipes.md").read_text(), re.S)
RNG = np.random.default_rng(0)
Y = RNG.normal(size=(8, 8))


class Image(lehr.EnergyPotential):
    """A standard Gaussian over images, moved by ``loc``."""

    loc: jax.Array
    shape: tuple = (8, 8)

    @property
    def schedule(self):
        return lehr.VPCosine()

    @property
    def event_shape(self):
        return self.shape

    is_calibrated = True

    def moments(self, t):
        alpha = self.schedule.alpha(t)
        return Moments(alpha * self.loc * jnp.ones(self.shape), jnp.ones(self.shape))

    def width(self, t):
        return jnp.ones(())

    def _log_density(self, x, t):
        return jnp.sum(dist.Normal(self.schedule.alpha(t) * self.loc, 1.0).log_prob(x))

    def _denoise(self, x, t):
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        return (x + sigma**2 * self._score(x, t)) / jnp.maximum(alpha, 1e-6)

    def _noise(self, x, t):
        return -self.schedule.sigma(t) * self._score(x, t)


@pytest.fixture(scope="module")
def recipes():
    names = {"jax": jax, "jnp": jnp, "np": np, "numpyro": numpyro, "dist": dist, "lehr": lehr}
    names |= {"prior": Image(jnp.zeros(())), "conditional": Image(jnp.ones(())), "of_label": lambda z: Image(z / 10.0)}
    names |= {"coloured": Image(jnp.zeros(()), (8, 8, 3)), "y": Y, "seen": RNG.uniform(size=(8, 8)) < 0.5}
    names["classifier"] = lambda x: jnp.array([x.sum(), 0.0, x[0, 0]])
    names["noisy_classifier"] = lambda x, t: jnp.array([x.sum() - t, t])
    for block in BLOCKS[:-1]:
        exec(block, names)
    return names


ARGUMENTS = {
    "inpainting": (Y, RNG.uniform(size=(8, 8)) < 0.5),
    "deblurring": (Y, np.ones((3, 3)) / 9),
    "super_resolution": (Y[:4, :4],),
    "colourisation": (Y,),
    "classified": (1,),
    "classified_by_a_noise_aware_one": (1,),
    "no_8": (),
    "whose": (Y,),
    "tapestry": (),
    "symmetric": (),
    "stack": (RNG.normal(size=(3, 8, 8)),),
    "wave": (RNG.normal(size=(12, 8)),),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_recipe_is_a_path(recipes, name):
    path = lehr.Path(recipes[name])(*ARGUMENTS[name])
    position = path.init(jax.random.key(0), 0.5)
    value, slope = jax.jit(jax.value_and_grad(path.log_density))(position, 0.5)
    assert np.isfinite(value)
    for leaf in jax.tree.leaves(slope):
        assert np.all(np.isfinite(leaf))
        assert np.all(leaf != 0)


def test_the_woven_tapestry_is_the_observed_one(recipes):
    x = {"x": jnp.asarray(RNG.normal(size=(8, 20)))}
    woven, observed = lehr.Path(recipes["woven"]), lehr.Path(recipes["tapestry"])()
    np.testing.assert_allclose(woven.log_density(x, 0.3), observed.log_density(x, 0.3), rtol=1e-6)


def test_guided_is_one_model_stretched_by_the_other(recipes):
    x = jnp.asarray(Y)
    want = 3 * recipes["conditional"].log_density(x, 0.3) - 2 * recipes["prior"].log_density(x, 0.3)
    np.testing.assert_allclose(recipes["guided"].log_density(x, 0.3), want, rtol=1e-5)


def test_a_class_is_divided_out_or_left_out(recipes):
    x, of_label = jnp.asarray(Y), recipes["of_label"]
    of_class = np.array([of_label(k).log_density(x, 0.3) for k in range(10)])
    p = recipes["prior"].log_density(x, 0.3)
    want = 2 * p - np.logaddexp(of_class[8] + np.log(0.95), p + np.log(0.05))
    np.testing.assert_allclose(recipes["not_an_8"].log_density(x, 0.3), want, rtol=1e-5)
    as_factor = lehr.Path(recipes["no_8"], {"no_8": lehr.guidance.Raw()})().log_density({"x": x}, 0.3)
    np.testing.assert_allclose(as_factor, want, rtol=1e-5)
    others = jax.nn.logsumexp(np.delete(of_class, 8)) - np.log(9)
    np.testing.assert_allclose(recipes["any_other"].log_density(x, 0.3), others, rtol=1e-5)


def test_afterwards_runs_as_written(recipes):
    exec(BLOCKS[-1], recipes)
    assert recipes["tree"]["posterior_predictive"]["y"].shape == (4, 16, 8, 8)
    assert np.all(np.isfinite(recipes["tree"]["log_likelihood"]["y"]))
