"""Weights that come back as they went, and everything that must not be loaded."""

import json
import os
import subprocess
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lehr
from lehr.networks import PatchMixer, ResidualMLP

NETWORK = {"num_inputs": 2, "width": 8, "num_blocks": 1, "num_frequencies": 4}


@pytest.fixture
def saved(tmp_path):
    energy = lehr.EnergyNetwork(
        ResidualMLP(**NETWORK, rngs=nnx.Rngs(3)), lehr.VPLinear(0.2, 10.0), mean=[1.0, 2.0], std=0.5, calibrated=True
    )
    energy = jax.tree.map(lambda leaf: leaf + 0.1, energy)  # the readout starts at zero, which would hide mistakes
    path = lehr.save(energy, tmp_path / "model", title="a test")
    return energy, path


def edit(path, **changes):
    card = path.with_suffix(".json")
    card.write_text(json.dumps(json.loads(card.read_text()) | changes))


@pytest.mark.parametrize("suffix", ["", ".safetensors", ".json"])
def test_a_potential_comes_back_as_it_was(saved, suffix):
    energy, path = saved
    back = lehr.load(path.with_suffix(suffix))
    x = jnp.array([0.3, -0.7])
    for t in (0.0, 0.3, 1.0):
        np.testing.assert_array_equal(back.log_density(x, t), energy.log_density(x, t))
    assert back.schedule == lehr.VPLinear(0.2, 10.0)
    assert back.is_calibrated
    assert float(back.feature_scale) == float(energy.feature_scale)


def pictures(kind):
    """A potential with classes, of 2×2 pictures: an energy over Gaussians, or a score by a mixer of patches."""
    if kind == "score":
        network = PatchMixer((2, 2), patch=1, width=4, num_blocks=1, token_width=3, rngs=nnx.Rngs(0))
        made = lehr.ScoreNetwork(network, lehr.VPCosine(), (2, 2), prediction="v", mean=0.5, std=0.3)
    else:
        locs, factors = np.random.default_rng(0).normal(size=(3, 4)), np.eye(4) * [[[0.3]], [[0.5]], [[0.2]]]
        network = ResidualMLP(
            **(NETWORK | {"num_inputs": 4, "num_outputs": 4, "num_classes": 3, "reach": 3.0}), rngs=nnx.Rngs(0)
        )
        base = lehr.GaussianMixture(locs, factors, [0.2, 0.5, 0.3])
        made = lehr.EnergyNetwork(network, None, (2, 2), head="inner", base=base, std=0.7, limit=2.0)
    params, rest = eqx.partition(made, eqx.is_inexact_array)
    return eqx.combine(jax.tree.map(lambda leaf: leaf + 0.1, params), rest)


@pytest.mark.parametrize("kind", ["energy", "score"])
def test_bases_classes_and_scores_come_back_too(kind, tmp_path):
    made = pictures(kind)
    back = lehr.load(lehr.save(made, tmp_path / kind, licence="none"))
    x = jnp.array([[0.3, -0.7], [1.0, 0.1]])
    versions = [(made, back)] if kind == "score" else [(made.given(k), back.given(k)) for k in range(4)]
    for first, second in versions:
        for t in (0.1, 0.9):
            np.testing.assert_array_equal(first.score(x, t), second.score(x, t))
    card = json.loads((tmp_path / f"{kind}.json").read_text())
    assert card["kind"] == kind
    assert card["licence"] == "none"
    for t in (0.2, 0.8):
        np.testing.assert_array_equal(back.moments(t).std, made.moments(t).std)


def test_half_precision_rounds_the_network_and_nothing_else(tmp_path):
    made = pictures("energy")
    back = lehr.load(lehr.save(made, tmp_path / "half", dtype="float16"))
    for ours, theirs in zip(jax.tree.leaves(made.network.params), jax.tree.leaves(back.network.params), strict=True):
        np.testing.assert_array_equal(np.asarray(ours, np.float16).astype(np.float32), theirs)
    np.testing.assert_array_equal(made.base.basis, back.base.basis)


def test_weights_that_are_not_numbers_are_refused(tmp_path):
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, lehr.load("bar").network.params)
    path = lehr.save(eqx.tree_at(lambda p: p.network.params, lehr.load("bar"), broken), tmp_path / "broken")
    with pytest.raises(lehr.CheckpointError, match="not finite"):
        lehr.load(path)


def test_what_a_card_cannot_describe_is_not_saved(tmp_path):
    class Own(nnx.Module):
        def __call__(self, z, c):
            return jnp.sum(z)

    with pytest.raises(TypeError, match="Own"):
        lehr.save(lehr.EnergyNetwork(Own()), tmp_path / "own")
    with pytest.raises(TypeError, match="only networks"):
        lehr.save(lehr.Gaussian([0.0]), tmp_path / "own")
    box = lehr.EnergyNetwork(ResidualMLP(**NETWORK, rngs=nnx.Rngs(0)), base=lehr.Uniform([0.0, 0.0], [1.0, 1.0]))
    with pytest.raises(TypeError, match="Uniform"):
        lehr.save(box, tmp_path / "box")
    assert not list(tmp_path.iterdir())


def test_a_missing_model_is_said_to_be_missing_and_the_shipped_ones_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="ring"):
        lehr.load("rnig")
    with pytest.raises(FileNotFoundError, match="Shipped"):
        lehr.load(tmp_path / "nothing")


def test_a_shipped_model_has_the_name_that_it_is_trained_by_too():
    first, second = (jax.tree.leaves(lehr.load(name)) for name in ("ring", "zoo/ring"))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_one_that_was_trained_into_a_folder_of_that_name_is_the_one_that_is_loaded(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lehr.save(saved[0], "zoo/ring")
    assert lehr.load("zoo/ring").schedule == lehr.VPLinear(0.2, 10.0)


def test_a_card_without_weights_is_refused(saved):
    _, path = saved
    path.unlink()
    with pytest.raises(FileNotFoundError, match="weights are not"):
        lehr.load(path)


def test_weights_without_a_card_are_refused(saved):
    _, path = saved
    path.with_suffix(".json").unlink()
    with pytest.raises(FileNotFoundError, match="no card"):
        lehr.load(path)


def test_truncated_weights_are_refused(saved):
    _, path = saved
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(lehr.CheckpointError, match="truncated"):
        lehr.load(path)


def test_weights_that_are_not_the_cards_are_refused(saved):
    _, path = saved
    edit(path, sha256="0" * 64)
    with pytest.raises(lehr.CheckpointError, match="SHA-256"):
        lehr.load(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network": {"type": "ResidualMLP", **NETWORK, "width": 16}}, "does not fit"),
        ({"network": {"type": "ResidualMLP", **NETWORK, "num_blocks": 2}}, "does not fit"),
        ({"network": {"type": "Oracle"}}, "unknown network"),
        ({"network": {"type": "ResidualMLP", **NETWORK, "colour": 1}}, "does not build"),
        ({"schedule": {"type": "Sundial"}}, "unknown schedule"),
        ({"format": "lehr-0"}, "lehr-0"),
        ({"kind": "flow"}, "unknown kind 'flow'"),
        ({"head": "tail"}, "unknown energy head"),
        ({"limit": -1.0}, "describes no potential: limit must be positive"),
        ({"limit": "far"}, "describes no potential"),
        ({"sigma_range": [1.0]}, "describes no potential"),
        ({"std": "wide"}, "describes no potential"),
        ({"event_shape": 2}, "describes no potential"),
        ({"log_normalizer": [[0.0]]}, "describes no potential"),
    ],
)
def test_a_card_that_does_not_fit_is_refused(saved, changes, message):
    _, path = saved
    edit(path, **changes)
    with pytest.raises(lehr.CheckpointError, match=message):
        lehr.load(path)


def test_a_card_that_lacks_entries_says_which(saved):
    _, path = saved
    card = path.with_suffix(".json")
    card.write_text(json.dumps({"format": "lehr-1", "kind": "energy"}))
    with pytest.raises(lehr.CheckpointError, match="event_shape"):
        lehr.load(path)
    card.write_text("{")
    with pytest.raises(lehr.CheckpointError, match="JSON"):
        lehr.load(path)


@pytest.mark.slow
def test_a_shipped_model_loads_and_runs_in_double_precision_too():
    program = """
import jax.numpy as jnp, lehr
run = lehr.AnnealedSMC(lehr.load("bar"), ladder=2, num_particles=4, progress=False).run(0)
print(run.samples["x"].dtype, bool(jnp.isfinite(run.log_evidence)))
"""
    environment = os.environ | {"JAX_ENABLE_X64": "1"}
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert said.stdout.split() == ["float64", "True"]
