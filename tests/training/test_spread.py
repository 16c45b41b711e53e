"""Events moved along the lines to their neighbours: what stays, what grows, and who counts as one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lehr
from lehr.training.data import as_sampler
from lehr.training.spread import nearest, spread

RNG = np.random.default_rng(0)
EVENTS, LABELS = RNG.normal(size=(60, 2, 3)).astype(np.float32), np.repeat([0, 1, 2], 20)


def test_neighbours_are_the_nearest_others_of_the_same_class():
    near = nearest(EVENTS, LABELS, 4)
    for i, found in enumerate(near):
        away = np.linalg.norm((EVENTS - EVENTS[i]).reshape(60, -1), axis=1)
        others = [j for j in np.argsort(away) if j != i and LABELS[j] == LABELS[i]]
        np.testing.assert_array_equal(found, others[:4])


def test_a_twin_is_a_neighbour_and_an_event_is_not_its_own():
    events = np.array([[0.0], [0.0], [0.0], [5.0]])
    near = nearest(events, None, 2)
    assert all(i not in row for i, row in enumerate(near))
    assert all(set(near[i]) == {0, 1, 2} - {i} for i in range(3))


@pytest.mark.parametrize("reach", [0.5, 1.0])
def test_the_mean_stays_and_the_covariance_grows_by_that_of_the_differences(reach):
    """Of each event by itself: u is uniform, of variance r²/3; by four standard errors."""
    line = np.array([[-3.0], [-1.0], [0.0], [2.0], [4.0]])
    near, n = np.array([[2], [2], [1], [2], [3]]), 400_000
    i, x = spread(jax.random.key(1), n, jnp.asarray(line), near, reach)
    away = line[near[:, 0], 0] - line[:, 0]
    for k in range(1, 4):  # those at the ends are clipped
        moved = np.asarray(x)[np.asarray(i) == k, 0]
        std = reach * np.abs(away[k]) / np.sqrt(3)
        assert moved.mean() == pytest.approx(line[k, 0], abs=4 * std / np.sqrt(moved.size))
        assert moved.std() == pytest.approx(std, rel=4 / np.sqrt(moved.size))
        assert np.abs(moved - line[k, 0]).max() <= reach * np.abs(away[k])


def test_no_coordinate_leaves_its_range():
    events = EVENTS.copy()
    events[:, 0] = -1.0
    _, x = spread(jax.random.key(0), 5000, jnp.asarray(events), nearest(events, LABELS, 3), 0.5)
    assert np.all((x >= events.min(0)) & (x <= events.max(0)))
    np.testing.assert_array_equal(x[:, 0], -1.0)


def test_labels_stay_with_their_events():
    at_home = EVENTS + 100.0 * LABELS[:, None, None]
    sampler = as_sampler((at_home, LABELS), (2, 3), 3, 8, neighbours=3)
    x, y = sampler(jax.random.key(2), 1000)
    np.testing.assert_array_equal(np.round(np.mean(x, (1, 2)) / 100).astype(int), y)
    assert len(np.unique(np.asarray(x), axis=0)) == 1000


def test_what_has_no_neighbours_is_refused():
    with pytest.raises(ValueError, match="class 1 has 3 events; each needs 3 neighbours"):
        nearest(EVENTS[:23], LABELS[:23], 3)
    with pytest.raises(ValueError, match="only an array of events has neighbours"):
        as_sampler(lambda key, n: jax.random.normal(key, (n, 2)), (2,), 0, 8, neighbours=2)
    with pytest.raises(ValueError, match="neighbours must be 0"):
        lehr.Recipe(neighbours=-1)
    with pytest.raises(ValueError, match="reach positive"):
        lehr.Recipe(neighbours=6, reach=0.0)
