"""Replica exchange against closed forms."""

import numpy as np
import pytest
from stand_ins import normal_score

import lehr

MASSES = np.array([0.75, 0.25])
MODES = lehr.GaussianMixture([[-1.0, 0.0], [1.0, 0.5]], 0.1, MASSES)


@pytest.fixture(scope="module")
def sampler():
    exchange = lehr.ReplicaExchange(MODES, ladder=12, num_chains=16, num_samples=400, num_warmup=100)
    exchange.run(0)
    return exchange


def test_masses_of_separated_modes_come_out_within_their_own_error(sampler):
    left = sampler.get_samples(group_by_chain=True)["x"][..., 0] < 0
    error = left.mean(1).std(ddof=1) / np.sqrt(16)
    assert error < 0.03
    assert abs(left.mean() - MASSES[0]) < 4 * error


def test_each_mode_keeps_its_shape(sampler):
    x = sampler.get_samples()["x"]
    inside = x[x[:, 0] < 0] - np.array([-1.0, 0.0])
    blurred = np.sqrt(0.1**2 + float(sampler.last_run.levels["sigma"][-1]) ** 2)
    assert inside.std() == pytest.approx(blurred, rel=0.05)


def test_it_says_how_often_chains_swap_and_come_back(sampler):
    run = sampler.last_run
    assert run.attrs["round_trips"] > 100
    assert np.all(run.levels["swap_rate"][:-1] > 0.2)
    assert np.isnan(run.levels["swap_rate"][-1])
    assert run.to_arviz().posterior["x"].shape == (16, 400, 2)


def test_it_goes_on_from_where_it_stopped():
    exchange = lehr.ReplicaExchange(
        MODES, ladder=4, num_chains=2, num_samples=10, num_warmup=0, tuning=lehr.Tuning(0.1)
    )
    first = exchange.run(0).samples["x"]
    more = exchange.extend(10).samples["x"]
    assert more.shape == (2, 20, 2)
    np.testing.assert_array_equal(more[:, :10], first)
    longer = lehr.ReplicaExchange(MODES, ladder=4, num_chains=2, num_samples=20, num_warmup=0, tuning=lehr.Tuning(0.1))
    np.testing.assert_allclose(longer.run(0).samples["x"], more, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_swapped_is_refused():
    with pytest.raises(ValueError, match="at least two levels"):
        lehr.ReplicaExchange(MODES, ladder=1)
    with pytest.raises(ValueError, match="ULA"):
        lehr.ReplicaExchange(MODES, lehr.ULA())
    with pytest.raises(TypeError, match="ReplicaExchange needs log densities"):
        lehr.ReplicaExchange(normal_score(), ladder=4).run(0)
    with pytest.raises(ValueError, match="swaps compare the log densities"):
        lehr.ReplicaExchange(MODES, lehr.HMC(metropolis="line-integral", integrate_energies=True), ladder=4).run(0)
    with pytest.raises(RuntimeError, match="not been run"):
        lehr.ReplicaExchange(MODES).extend(10)
