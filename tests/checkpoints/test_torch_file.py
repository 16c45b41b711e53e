"""PyTorch's files, of both formats, as PyTorch reads them; its other children: ADM, EDM; and Flax's trees."""

import json
import pickle
import shutil
import sys
import types

import jax
import numpy as np
import pytest
from flax import serialization
from orbax.checkpoint import StandardCheckpointer
from stored import DATA, RANDOM, compiled, same

import lehr
from lehr.checkpoints.convert import convert
from lehr.checkpoints.edm import read_edm
from lehr.checkpoints.torch_file import read_torch
from lehr.checkpoints.trees import read_tree


@pytest.mark.parametrize("name", ["zip", "legacy"])
def test_tensors_are_what_pytorch_saved_bit_for_bit(name):
    content = read_torch(DATA / "torch" / f"{name}.pt")
    expected = np.load(DATA / "torch" / "expected.npz")
    weights = content.pop("weights")
    assert weights.keys() == set(expected)
    for key, want in expected.items():
        got = weights[key]
        assert got.shape == want.shape
        assert got.dtype == want.dtype or key == "brain"  # numpy has no bfloat16 of its own to save
        np.testing.assert_array_equal(got.astype(want.dtype), want)
        assert not got.flags.writeable
    assert content == {"step": 7, "shape": (2, 3), "names": ["a", ("b", None)], "set": {1, 2}, "rate": 1e-3}


# Guided-diffusion.


@pytest.mark.parametrize("name", ["legacy", "new-order"])
def test_a_guided_diffusion_file_is_converted_to_the_same_network(name, tmp_path):
    source, stored = DATA / "adm" / name, np.load(DATA / "adm" / f"{name}.npz")
    convert(source.with_suffix(".pt"), source.with_suffix(".json"), tmp_path / "model", entry="model")
    p, times = lehr.load(tmp_path / "model"), stored["t"] / 999
    assert p.event_shape == (3, 8, 8)
    if p.num_classes is None:
        arguments = (stored["x"], times)
        noise = compiled(jax.vmap(p.noise), *arguments)(*arguments)
    else:
        arguments = (stored["x"], times, stored["y"])
        noise = compiled(jax.vmap(lambda x, t, y: p.given(y).noise(x, t)), *arguments)(*arguments)
    # Outputs of order one, after thirty layers in single precision.
    np.testing.assert_allclose(noise, stored["out"][:, :3], atol=2e-5)


def flags(tmp_path, **changes):
    file = tmp_path / "flags.json"
    file.write_text(json.dumps(json.loads((DATA / "adm/legacy.json").read_text()) | changes))
    return file


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_channels": 64}, "does not fit"),
        ({"colour": 1}, "unknown flags: colour"),
        ({"class_cond": False}, "class_cond"),
        ({"num_res_blocks": 2}, "no place|does not fit|missing"),
        ({"channel_mult": "2,1"}, "begin with 1"),
        ({"noise_schedule": "jumpy"}, "noise_schedule"),
        ({"diffusion_steps": 4000, "rescale_timesteps": True}, "rescale_timesteps"),
        ({"resblock_updown": False}, "no place|does not fit|missing"),
    ],
)
def test_flags_that_do_not_fit_are_refused_and_nothing_is_written(changes, message, tmp_path):
    with pytest.raises(lehr.CheckpointError, match=message):
        convert(DATA / "adm/legacy.pt", flags(tmp_path, **changes), tmp_path / "model", entry="model")
    assert not (tmp_path / "model").exists()


def test_a_state_dict_with_diffusers_configs_is_converted(tmp_path):
    config = tmp_path / "config.json"
    unet = json.loads((RANDOM / "unet/config.json").read_text())
    scheduler = json.loads((RANDOM / "scheduler/scheduler_config.json").read_text())
    config.write_text(json.dumps({"unet": unet, "scheduler": scheduler}))
    convert(RANDOM / "unet/diffusion_pytorch_model.safetensors", config, tmp_path / "model")
    same(lehr.load(tmp_path / "model"))
    with pytest.raises(FileExistsError, match="not empty"):
        convert(RANDOM / "unet/diffusion_pytorch_model.safetensors", config, tmp_path / "model")


def test_entries_of_a_file_are_named_when_one_is_missing(tmp_path):
    with pytest.raises(lehr.CheckpointError, match="model, step"):
        convert(DATA / "adm/legacy.pt", DATA / "adm/legacy.json", tmp_path / "model")
    with pytest.raises(lehr.CheckpointError, match="no entry 'ema'; there is model, step"):
        convert(DATA / "adm/legacy.pt", DATA / "adm/legacy.json", tmp_path / "model", entry="ema")


# EDM.


class Meta:
    """What EDM's classes pickle themselves as: a function, and a record with their source."""

    def __init__(self, class_name, state, source="raise SystemExit('the source was run')"):
        self.meta = {"type": "class", "version": 6, "module_src": source, "class_name": class_name, "state": state}

    def __reduce__(self):
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (self.meta,)


class Stored:
    """A tensor as a pickle that is not torch.save's holds it: its storage is a file of PyTorch in bytes."""

    def __init__(self, data, shape):
        self.data, self.shape = data, shape

    def __reduce__(self):
        strides = tuple(int(np.prod(self.shape[i + 1 :])) for i in range(len(self.shape)))
        return sys.modules["torch._utils"]._rebuild_tensor_v2, (Loaded(self.data), 0, self.shape, strides, False, {})


class Loaded:
    def __init__(self, data):
        self.data = data

    def __reduce__(self):
        return sys.modules["torch.storage"]._load_from_bytes, (self.data,)


@pytest.fixture
def edm(tmp_path, monkeypatch):
    """A pickle in EDM's layout, written with modules of its names that do nothing."""
    for module, function in (
        ("torch_utils.persistence", "_reconstruct_persistent_obj"),
        ("torch._utils", "_rebuild_tensor_v2"),
        ("torch.storage", "_load_from_bytes"),
    ):
        fake = types.ModuleType(module)
        exec(f"def {function}(*a): raise AssertionError", fake.__dict__)
        fake.__dict__[function].__module__ = module
        for part in (module, module.split(".")[0]):
            monkeypatch.setitem(sys.modules, part, fake)
    tensor = Stored((DATA / "torch/storage.bin").read_bytes(), (2, 3))
    layer = Meta("Linear", {"_parameters": {"weight": tensor}, "_buffers": {"scale": tensor}, "_modules": {}})
    inner = Meta("Net", {"_parameters": {}, "_modules": {"layer": layer}})
    state = {"_init_kwargs": {"img_channels": 3}, "sigma_data": 0.5, "_modules": {"model": inner}, "_parameters": {}}
    file = tmp_path / "network.pkl"
    file.write_bytes(pickle.dumps({"ema": Meta("EDMPrecond", state), "loss_fn": None}))
    return file


def test_an_edm_pickle_is_a_record_and_its_source_is_not_run(edm):
    record = read_edm(edm)
    assert (record.class_name, record.arguments, record.attributes["sigma_data"]) == (
        "EDMPrecond", {"img_channels": 3}, 0.5,
    )  # fmt: skip
    assert record.tensors.keys() == {"model.layer.weight", "model.layer.scale"}
    for tensor in record.tensors.values():
        np.testing.assert_array_equal(tensor, np.arange(6, dtype=np.float32).reshape(2, 3) / 2)
    with pytest.raises(lehr.CheckpointError, match="no network 'net'; there is ema, loss_fn"):
        read_edm(edm, "net")


# Flax's trees.

TREE = {"params": {"Dense_0": {"kernel": np.arange(6.0, dtype=np.float32).reshape(2, 3), "bias": np.ones(3)}}}


def test_trees_of_msgpack_and_orbax_come_back(tmp_path):
    (tmp_path / "model.msgpack").write_bytes(serialization.msgpack_serialize(TREE))
    with StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "folder", TREE)
    for path in (tmp_path / "model.msgpack", tmp_path / "folder"):
        jax.tree.map(np.testing.assert_array_equal, read_tree(path), TREE)


def test_what_is_no_tree_of_arrays_is_refused(tmp_path):
    file = tmp_path / "model.msgpack"
    for content, message in (
        (serialization.msgpack_serialize(TREE)[:-9], "cannot be read"),
        (serialization.msgpack_serialize({"a": "text"}), "holds a str"),
        (b"\x01", "must hold a tree"),
    ):
        file.write_bytes(content)
        with pytest.raises(lehr.CheckpointError, match=message):
            read_tree(file)
    shutil.copytree(RANDOM, tmp_path / "not-orbax")
    with pytest.raises(lehr.CheckpointError, match="orbax"):
        read_tree(tmp_path / "not-orbax")
    with pytest.raises(FileNotFoundError, match="no parameters"):
        read_tree(tmp_path / "nothing")
