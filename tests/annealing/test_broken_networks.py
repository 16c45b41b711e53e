"""Networks that go wrong at run time: the run ends, says where, and the chains that met nothing are right."""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from stand_ins import Plain, ScoreOf

import lehr

N, K = 4000, 10
NORMAL = lehr.Gaussian(jnp.zeros(1), 1.0)
FEW = {"ladder": K, "num_steps": 2, "progress": False}
FAR = 1.5  # where the network breaks, at noise levels between .3 and 3
TRUTH = stats.truncnorm(-np.inf, FAR)


class Broken(Plain):
    """N(0, 1), at all levels, but ``value`` times that for x > 1.5 at the middle ones; ``always``: at all of them."""

    value: float
    always: bool = eqx.field(static=True, default=False)

    def _log_density(self, x, t):
        sigma = self.schedule.sigma(t) / self.schedule.alpha(t)
        here = (x[0] > FAR) & (self.always | ((sigma > 0.3) & (sigma < 3)))
        return jnp.where(here, self.value, 1.0) * self.inner._log_density(x, t)


class Flat(Plain):
    """An energy that is constant."""

    def _log_density(self, x, t):
        return jnp.zeros(())


class BrokenScore(ScoreOf):
    """The score of N(0, 1), NaN there."""

    def _score(self, x, t):
        return jnp.where(x[0] > FAR, jnp.nan, 1.0) * self.inner._score(x, t)


VALUES = {"nan": np.nan, "overflow": np.inf}


def middle(run):
    return (run.levels["sigma"] > 0.3) & (run.levels["sigma"] < 3)


@pytest.mark.filterwarnings("ignore:.*of 4000 chains ended")
@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES.keys())
def test_chains_that_meet_a_broken_level_are_counted_there_and_the_others_unharmed(value):
    run = lehr.AnnealedMCMC(Broken(NORMAL, value), num_chains=N, num_samples=5, **FEW).run(0)
    assert np.all((run.levels["nonfinite"] > 0) == middle(run))
    assert np.all(np.isfinite(run.levels["acceptance_rate"]) & np.isfinite(run.levels["step_size"]))
    x = run.samples["x"][..., 0]
    unharmed = x[:, -1][x[:, -1] < 1]
    assert stats.kstest(unharmed, stats.truncnorm(-np.inf, 1).cdf).pvalue > 1e-3
    assert np.all(np.isfinite(x))


@pytest.mark.parametrize("weights", ["energy", "path"])
@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES.keys())
def test_particles_that_meet_a_broken_place_have_no_weight(value, weights):
    """What is left is the density where it can be computed: N(0, 1) below 1.5, if it is broken at all levels."""
    run = lehr.AnnealedSMC(Broken(NORMAL, value, always=True), num_particles=N, weights=weights, **FEW).run(0)
    x = run.get_samples()["x"][:, 0]
    assert np.sum(run.levels["nonfinite"]) > 0
    assert x.max() < FAR
    error = 3.5 * TRUTH.std() / np.sqrt(run.levels["survivors"][-1])
    assert x.mean() == pytest.approx(TRUTH.mean(), abs=error)
    assert np.isfinite(run.log_evidence)
    assert np.all(np.isfinite(run.levels["step_size"]))


def test_a_score_that_breaks_is_survived():
    run = lehr.AnnealedSMC(BrokenScore(NORMAL), num_particles=N, **FEW).run(0)
    x = run.get_samples()["x"][:, 0]
    assert np.sum(run.levels["nonfinite"]) > 0
    assert np.all(np.isfinite(x))
    assert x.max() < FAR
    error = 3.5 * TRUTH.std() / np.sqrt(run.levels["survivors"][-1])
    assert x.mean() == pytest.approx(TRUTH.mean(), abs=error)


def test_a_plain_reverse_run_says_how_many_were_lost():
    with pytest.warns(UserWarning, match="of 1000 chains ended where the log density is not finite"):
        run = lehr.Reverse(Broken(NORMAL, np.nan), num_levels=K, num_samples=1000, progress=False).run(0)
    x = run.get_samples()["x"][:, 0]
    assert np.any(np.isfinite(x))


@pytest.mark.parametrize("driver", [lehr.AnnealedMCMC, lehr.AnnealedSMC])
def test_a_network_that_says_the_same_everywhere_takes_no_part(driver):
    """Beside a density it leaves that density as it is."""
    run = driver(Flat(NORMAL) * lehr.Gaussian([0.5], 0.5), ladder=K, num_warmup=1, progress=False).run(0)
    x = run.get_samples()["x"]
    assert np.all(np.isfinite(x))
    assert x.mean() == pytest.approx(0.5, abs=0.1)
    assert x.std() == pytest.approx(0.5, rel=0.1)
