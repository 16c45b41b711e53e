"""Weights that come back as they went, and everything that must not be loaded."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import lehr
from lehr.networks import ResidualMLP

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


def test_a_missing_model_is_said_to_be_missing_and_the_shipped_ones_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="ring"):
        lehr.load("rnig")
    with pytest.raises(FileNotFoundError, match="Shipped"):
        lehr.load(tmp_path / "nothing")


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
        ({"head": "tail"}, "unknown energy head"),
    ],
)
def test_a_card_that_does_not_fit_is_refused(saved, changes, message):
    _, path = saved
    edit(path, **changes)
    with pytest.raises(ValueError, match=message):
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


def test_a_shipped_model_loads_and_runs_in_double_precision_too():
    program = """
import jax.numpy as jnp, lehr
run = lehr.AnnealedSMC(lehr.load("bar"), ladder=2, num_particles=4, progress=False).run(0)
print(run.samples["x"].dtype, bool(jnp.isfinite(run.log_evidence)))
"""
    environment = os.environ | {"JAX_ENABLE_X64": "1"}
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert said.stdout.split() == ["float64", "True"]
