"""Models of parts of a canvas: the tapestry against its closed form, and against the same written as observed sites."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from stand_ins import ScoreOf

import lehr

SCHEDULE = lehr.VPCosine()
RNG = np.random.default_rng(0)
ROOTS = [np.tril(0.3 * RNG.normal(size=(4, 4))) + np.eye(4) for _ in range(3)]
LOCS = RNG.normal(size=(3, 4))
STARTS = (0, 2, 3)
PATCHES = [lehr.Gaussian(m, r, SCHEDULE) for m, r in zip(LOCS, ROOTS, strict=True)]
CROPS = [np.s_[i : i + 4] for i in STARTS]
X = RNG.normal(size=7)


def field():
    return lehr.Product([lehr.Region(p, c) for p, c in zip(PATCHES, CROPS, strict=True)])


def woven():
    x = numpyro.sample("x", lehr.Diffusion(lehr.Region(PATCHES[0], CROPS[0], (7,))))
    for i in (1, 2):
        numpyro.sample(f"patch{i}", lehr.Diffusion(PATCHES[i]), obs=x[CROPS[i]])


def posterior():
    """Mean and covariance of the tapestry at t = 0, by adding precisions."""
    precision, pull = np.zeros((7, 7)), np.zeros(7)
    for m, r, c in zip(LOCS, ROOTS, CROPS, strict=True):
        own = np.linalg.inv(r @ r.T)
        precision[c, c] += own
        pull[c] += own @ m
    covariance = np.linalg.inv(precision)
    return covariance @ pull, covariance


@pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
def test_a_tapestry_adds_what_each_patch_sees(t):
    p = field()
    assert p.event_shape == (7,)
    want = sum(float(q.log_density(X[c], t)) for q, c in zip(PATCHES, CROPS, strict=True))
    np.testing.assert_allclose(p.log_density(X, t), want, rtol=1e-6)
    score = np.zeros(7)
    for q, c in zip(PATCHES, CROPS, strict=True):
        score[c] += q.score(X[c], t)
    np.testing.assert_allclose(p.score(X, t), score, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.grad(p.log_density)(jnp.asarray(X), t), score, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_the_readings_are_one_score(t):
    for p in (field(), lehr.Region(PATCHES[0], CROPS[1], (7,))):
        alpha, sigma = SCHEDULE.alpha(t), SCHEDULE.sigma(t)
        score = p.score(X, t)
        np.testing.assert_allclose(p.noise(X, t), -sigma * score, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(p.denoise(X, t), (X + sigma**2 * score) / alpha, rtol=1e-5, atol=1e-4)


def test_observed_sites_weave_the_same_tapestry_to_rounding():
    paths = lehr.Path(field()), lehr.Path(woven)()
    key = jax.random.key(0)
    for t in (0.02, 0.5, 1.0):
        one, other = (path.log_density({"x": jnp.asarray(X)}, t) for path in paths)
        np.testing.assert_allclose(one, other, rtol=1e-6)
        one, other = (path.init(key, t)["x"] for path in paths)
        np.testing.assert_allclose(one, other, rtol=1e-5)
        one, other = (path.widths({"x": jnp.asarray(X)}, t)["x"] for path in paths)
        np.testing.assert_allclose(one, other, rtol=1e-6)
        one, other = (path.copies({"x": jnp.asarray(X)}, t)["x"] for path in paths)
        np.testing.assert_allclose(one, [1, 1, 2, 3, 2, 2, 1])
        np.testing.assert_allclose(one, other)


def test_both_forms_step_down_alike():
    from lehr.programs.ratios import expect
    from lehr.programs.reverse import reverse_step, start_density

    steps, x = [], {"x": jnp.asarray(X)}
    for path in (lehr.Path(field()), lehr.Path(woven)()):
        gradient = jax.grad(path.log_density)(x, 0.5)
        step = reverse_step(path, x, expect(path, x, 0.5), gradient, 0.5, 0.45)
        steps.append((step.mean, step.log_weight, step.log_stay, start_density(path, x, 1.0)))
    for one, other in zip(*steps, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["energy", "path"])
def test_sampled_tapestries_have_the_covariance_of_the_closed_form(weights):
    n, seeds = 4000, 4
    smc = lehr.AnnealedSMC(field(), num_particles=n, weights=weights, progress=False)
    draws = np.stack([smc.run(seed).particles["x"] for seed in range(seeds)])
    mass = np.stack([np.exp(smc.run(seed).log_weights) for seed in range(seeds)])
    mean, covariance = posterior()
    means = np.einsum("sn,snd->sd", mass, draws)
    np.testing.assert_array_less(np.abs(means.mean(0) - mean), 5 * np.sqrt(np.diag(covariance) / n / seeds * 4))
    away = draws - mean
    second = np.einsum("sn,snd,sne->sde", mass, away, away)
    error = second.std(0, ddof=1) / np.sqrt(seeds)
    # t with 3 degrees of freedom over 28 distinct entries: 1 in 1,000 exceeds 13 standard errors somewhere
    np.testing.assert_array_less(np.abs(second.mean(0) - covariance), 13 * error)


def test_two_dimensional_crops_flips_and_transposes_are_seen_as_numpy_sees_them():
    patch = lehr.Gaussian(RNG.normal(size=4), ROOTS[0], SCHEDULE)

    class Square(lehr.EnergyPotential):
        """The patch as a 2 × 2 image."""

        inner: lehr.EnergyPotential
        schedule: lehr.Schedule = eqx.field(static=True)
        event_shape: tuple[int, ...] = eqx.field(static=True)

        def moments(self, t):
            return jax.tree.map(lambda m: jnp.broadcast_to(m, (4,)).reshape(2, 2), self.inner.moments(t))

        def width(self, t):
            return self.inner.width(t)

        def _log_density(self, x, t):
            return self.inner._log_density(x.reshape(-1), t)

        def _denoise(self, x, t):
            return self.inner._denoise(x.reshape(-1), t).reshape(2, 2)

        def _noise(self, x, t):
            return self.inner._noise(x.reshape(-1), t).reshape(2, 2)

    square = Square(patch, SCHEDULE, (2, 2))
    canvas = RNG.normal(size=(3, 5))
    for index in (np.s_[1:3, 2:4], np.s_[2:0:-1, 0:2], np.s_[0:2, ..., 0:4:2], np.s_[0:3:2, 3:5]):
        p = lehr.Region(square, index, canvas.shape)
        np.testing.assert_allclose(p.log_density(canvas, 0.3), patch.log_density(canvas[index].ravel(), 0.3), rtol=1e-6)

    def views():
        x = numpyro.sample("x", lehr.Diffusion(lehr.Gaussian(jnp.zeros(4), 1.0, SCHEDULE)))
        numpyro.sample("flipped", lehr.Diffusion(patch), obs=x[::-1])
        numpyro.sample("turned", lehr.Diffusion(patch), obs=x.reshape(2, 2).T.ravel())
        numpyro.sample("padded", lehr.Diffusion(PATCHES[1]), obs=jnp.pad(x[:2], 1))

    x = X[:4]
    got = lehr.Path(views)().log_density({"x": jnp.asarray(x)}, 0.3)
    want = lehr.Gaussian(jnp.zeros(4), 1.0, SCHEDULE).log_density(x, 0.3) + patch.log_density(x[::-1], 0.3)
    want += patch.log_density(x[[0, 2, 1, 3]], 0.3) + PATCHES[1].log_density(np.pad(x[:2], 1), 0.3)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_a_canvas_with_a_hole_is_refused_by_name():
    ends = lehr.Region(PATCHES[0], np.s_[0:4]) * lehr.Region(PATCHES[1], np.s_[6:10])
    with pytest.raises(ValueError, match=r"has a hole: no model sees 2 of its numbers, within x\[4:6\]"):
        lehr.Path(ends)
    # a divisor covers nothing
    with pytest.raises(ValueError, match=r"within x\[4:7\]"):
        lehr.Path(lehr.Region(PATCHES[0], np.s_[0:4]) / lehr.Region(PATCHES[1], np.s_[3:7]))

    def mended():
        x = numpyro.sample("x", lehr.Diffusion(ends))
        numpyro.sample("mend", lehr.Diffusion(PATCHES[2]), obs=x[3:7])

    def seen_but_not_covered():
        x = numpyro.sample("x", lehr.Diffusion(ends))
        numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=jnp.zeros(10))

    lehr.Path(mended)()
    with pytest.raises(ValueError, match="has a hole"):  # far up a likelihood holds nothing
        lehr.Path(seen_but_not_covered)()


def test_a_score_of_a_region_is_a_score():
    score = ScoreOf(PATCHES[1])
    p = lehr.Product(
        [lehr.Region(PATCHES[0], CROPS[0]), lehr.Region(score, CROPS[1]), lehr.Region(PATCHES[2], CROPS[2])]
    )
    assert isinstance(p, lehr.ScorePotential)
    np.testing.assert_allclose(p.score(X, 0.5), field().score(X, 0.5), rtol=1e-6)


def test_regions_of_other_schedules_meet_by_log_snr():
    other = lehr.Region(lehr.Gaussian(LOCS[1], ROOTS[1], lehr.VE(0.01, 20.0)), CROPS[1], (7,))
    p = lehr.Region(PATCHES[0], CROPS[0], (7,)) * other
    want = PATCHES[0].log_density(X[:4], 0.4) + PATCHES[1].log_density(X[2:6], 0.4)
    np.testing.assert_allclose(p.log_density(X, 0.4), want, rtol=1e-5)


@pytest.mark.parametrize(
    ("slices", "shape", "error", "message"),
    [
        (np.s_[0:3], (7,), ValueError, r"has shape \(3,\), and the potential is over events of shape \(4,\)"),
        (np.s_[5:9], (7,), ValueError, r"has shape \(2,\)"),
        (np.s_[0:4, 0:4], (7,), ValueError, "does not lie on a canvas"),
        (np.s_[2:], None, ValueError, "pass event_shape"),
        (np.array([0, 1, 2, 3]), (7,), TypeError, "needs slices"),
    ],
)
def test_impossible_regions_are_refused(slices, shape, error, message):
    with pytest.raises(error, match=message):
        lehr.Region(PATCHES[0], slices, shape)


def test_a_mixture_of_what_leaves_a_hole_is_refused():
    with pytest.raises(ValueError, match="densities of all of x"):
        lehr.Mixture([lehr.Region(PATCHES[0], CROPS[0], (7,)), lehr.Gaussian(jnp.zeros(7), 1.0, SCHEDULE)])
