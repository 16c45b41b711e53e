"""One model under two schedules: the same noising in other units."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from evaluate import readings
from flax import nnx
from stand_ins import Plain

import lehr
from lehr.networks import ResidualMLP

EPS = np.finfo(np.float32).eps
VP, VE, FLOW = lehr.VPCosine(), lehr.VE(0.005, 50.0), lehr.RectifiedFlow()
MIXTURE = lehr.GaussianMixture([[0.5], [-0.8]], [0.2, 0.4], [1.0, 3.0])
T = np.array([0.1, 0.3, 0.6, 0.9], np.float32)
X = np.linspace(-2, 2, 9, dtype=np.float32)[:, None]


class GaussianNoise(nnx.Module):
    """The ε̂ of N(.5, .2²), a function of σ/α and of x/α alone but for the scale of x: VP is assumed."""

    def __init__(self):
        self.loc = nnx.Param(jnp.array(0.5))

    def __call__(self, x, c):
        alpha, sigma = jnp.sqrt(jax.nn.sigmoid(-2 * c)), jnp.sqrt(jax.nn.sigmoid(2 * c))
        return sigma * (x - alpha * self.loc) / (alpha**2 * 0.2**2 + sigma**2)


def network():
    mlp = ResidualMLP(1, width=8, num_blocks=1, num_frequencies=4, rngs=nnx.Rngs(0))
    mlp.readout.kernel = nnx.Param(jax.random.normal(jax.random.key(1), (8, 1)))
    return lehr.EnergyNetwork(mlp, VP, (1,), mean=0.2, std=0.7)


ENERGIES = {
    "plain": Plain(MIXTURE),
    "network": network(),
    "product": lehr.Product([Plain(MIXTURE), network()], [1.0, 0.5]),
    "mixture": lehr.Mixture([Plain(MIXTURE), MIXTURE], log_normalizers=[0.0, 0.0]),
    "floored": lehr.Contrast(Plain(MIXTURE), lehr.Uniform([-1.0], [1.0]), 0.5, floor=0.1).members[1],
}


@eqx.filter_jit
def matched(p, seen, x, t):
    """Readings of ``seen`` at (x, t), and of ``p`` at the same noising in its own units."""

    def one(x, t):
        theirs = p.schedule.time(seen.schedule.log_snr(t))
        ratio = p.schedule.sigma(theirs) / seen.schedule.sigma(t)
        here = seen.log_density(x, t), seen.score(x, t), seen.denoise(x, t), seen.noise(x, t)
        y = ratio * x
        there = p.log_density(y, theirs), ratio * p.score(y, theirs), p.denoise(y, theirs), p.noise(y, theirs)
        return here, there, ratio

    return jax.vmap(lambda t: jax.vmap(lambda x: one(x, t))(x))(t)


@pytest.mark.parametrize("schedule", [VE, FLOW, lehr.VPLinear()])
def test_an_energy_seen_through_another_schedule_is_the_density_diffused_under_it(schedule):
    t = np.array([0.01, 0.1, 0.3, 0.6, 0.9, 0.99], np.float32)
    seen, direct = lehr.with_schedule(Plain(MIXTURE), schedule), lehr.with_schedule(MIXTURE, schedule)
    assert not isinstance(seen, lehr.GaussianMixture)
    for got, want in zip(readings(seen, X, t), readings(direct, X, t), strict=True):
        # The level is matched through a time rounded to EPS; a mode of std .2 enlarges that by |x|²/.04.
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4)
    for s in t:
        np.testing.assert_allclose(seen.moments(s).mean, direct.moments(s).mean, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(seen.moments(s).std, direct.moments(s).std, rtol=1e-4)
        np.testing.assert_allclose(seen.width(s), direct.width(s), rtol=1e-4)


def test_a_score_seen_through_another_schedule_is_the_score_diffused_under_it():
    score = lehr.with_schedule(lehr.ScoreNetwork(GaussianNoise(), VP, (1,), mean=0.5, std=0.2), VE)
    direct = lehr.Gaussian([0.5], 0.2, VE)
    assert isinstance(score, lehr.ScorePotential)
    for s in T:
        for name in ("score", "denoise", "noise"):
            read = jax.jit(jax.vmap(getattr(score, name), (0, None)))
            np.testing.assert_allclose(read(X, s), [getattr(direct, name)(x, s) for x in X], rtol=2e-4, atol=2e-4)
        np.testing.assert_allclose(score.moments(s).std, direct.moments(s).std, rtol=1e-4)


@pytest.mark.parametrize("name", ["plain", "network", "product", "mixture"])
@pytest.mark.parametrize("schedule", [VE, FLOW])
def test_noise_and_data_agree_at_equal_log_snr_and_densities_up_to_the_jacobian(name, schedule):
    p = ENERGIES[name]
    here, there, ratio = matched(p, lehr.with_schedule(p, schedule), X, T)
    # Readings agree to the rounding of the matched time, enlarged by the narrowest mode, .2.
    for got, want in zip(here[1:], there[1:], strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=1e-5 * float(jnp.max(jnp.abs(want))))
    # log r for each time that a density is counted: a product has its total weight of them.
    weight = 1.5 if name == "product" else 1.0
    np.testing.assert_allclose(here[0], there[0] + weight * np.log(ratio), rtol=1e-5, atol=5e-4)


@pytest.mark.parametrize("schedule", [VE, FLOW])
def test_a_rescheduled_density_integrates_to_one(schedule):
    seen = lehr.with_schedule(Plain(MIXTURE), schedule)
    t = np.array([0.05, 0.4, 0.8, 1.0], np.float32)
    for s in t:
        spread = float(seen.moments(s).std[0])
        grid = np.linspace(-8, 8, 2001, dtype=np.float32)[:, None] * spread
        mass = np.sum(np.exp(np.asarray(readings(seen, grid, s[None])[0], float))) * 0.008 * spread
        np.testing.assert_allclose(mass, 1.0, rtol=1e-4)


@pytest.mark.parametrize("name", ENERGIES)
def test_there_and_back_is_the_same_model(name):
    p = ENERGIES[name]
    back = lehr.with_schedule(lehr.with_schedule(p, VE), p.schedule)
    assert back.schedule == p.schedule
    assert jax.tree.structure(back) == jax.tree.structure(p)
    for got, want in zip(readings(back, X, T), readings(p, X, T), strict=True):
        np.testing.assert_allclose(got, want, rtol=8 * EPS, atol=8 * EPS)


def test_a_ladder_beyond_the_noisiest_level_sees_that_level():
    seen = lehr.with_schedule(Plain(lehr.with_schedule(MIXTURE, lehr.VE(0.01, 20.0))), VP)
    x = jnp.array([0.7])
    # At λ = −∞ the model still has σ = 20: in units of the noise its data shrink to 1/20.
    wanted = lehr.GaussianMixture(MIXTURE.locs / 20, np.hypot([1, 1], np.array([0.2, 0.4]) / 20), [1.0, 3.0])
    np.testing.assert_allclose(seen.log_density(x, 1.0), wanted.log_density(x, 0.0), rtol=1e-5)
    np.testing.assert_allclose(seen.score(x, 1.0), wanted.score(x, 0.0), rtol=1e-5)


def test_readings_are_finite_where_either_schedule_is_singular():
    for inner, outer in ((VP, FLOW), (FLOW, VP)):
        seen = lehr.with_schedule(Plain(lehr.with_schedule(MIXTURE, inner)), outer)
        log_density, score, data, noise = readings(seen, X, np.array([0.0, 1.0], np.float32))
        direct = lehr.with_schedule(MIXTURE, outer)
        for got, want in zip((log_density, score, data, noise), readings(direct, X, np.float32([0, 1])), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_the_own_schedule_changes_nothing():
    assert lehr.with_schedule(MIXTURE, lehr.VPCosine()) is MIXTURE


def test_what_is_not_a_schedule_is_refused():
    with pytest.raises(TypeError, match=r"needs a lehr schedule; got 0\.5"):
        lehr.with_schedule(MIXTURE, 0.5)
