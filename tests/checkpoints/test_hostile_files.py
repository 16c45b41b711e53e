"""Files that are damaged, that lie, or that mean harm: each is refused, saying why; nothing is run or written."""

import io
import json
import pickle
import zipfile

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import lehr
from lehr.checkpoints.tensors import shapes_of, torch_names
from lehr.networks.unet import UNet
from lehr.networks.unet_config import UNetConfig

CONFIG = {
    "sample_size": 4,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [4],
    "down_block_types": ["DownBlock2D"],
    "up_block_types": ["AttnUpBlock2D"],
    "norm_num_groups": 2,
    "layers_per_block": 1,
    "attention_head_dim": 4,
}
STEM = "unet/diffusion_pytorch_model"


@pytest.fixture(scope="module")
def weights():
    """Weights that fit CONFIG, by PyTorch's names and in its layouts."""
    state = nnx.split(shapes_of(lambda rngs: UNet(UNetConfig(**CONFIG), rngs=rngs)))[1]
    rng = np.random.default_rng(0)
    shapes = [leaf.shape for leaf in jax.tree.leaves(state)]
    shapes = [(s[3], s[2], *s[:2]) if len(s) == 4 else s[::-1] for s in shapes]
    return {name: rng.normal(size=s).astype(np.float32) for name, s in zip(torch_names(state), shapes, strict=True)}


@pytest.fixture
def folder(weights, tmp_path):
    """A folder that loads, until a test spoils it."""
    for part in ("unet", "scheduler"):
        (tmp_path / "model" / part).mkdir(parents=True)
    (tmp_path / "model/unet/config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "model/scheduler/scheduler_config.json").write_text(json.dumps({"_class_name": "DDPMScheduler"}))
    save_file(weights, tmp_path / f"model/{STEM}.safetensors")
    return tmp_path / "model"


# PyTorch files, written by hand.


def data(value):
    """The part of a pickle that makes a plain value."""
    return pickle.dumps(value, 2)[2:-1]


def call(module, name, *arguments):
    return f"c{module}\n{name}\n(".encode() + b"".join(arguments) + b"tR"


def storage(key, length, kind="FloatStorage"):
    return b"(" + data("storage") + f"ctorch\n{kind}\n".encode() + data(key) + data("cpu") + data(length) + b"tQ"


def tensor(key, length, size, stride, offset=0):
    view = data(offset), data(size), data(stride), data(False), call("collections", "OrderedDict")
    return call("torch._utils", "_rebuild_tensor_v2", storage(key, length), *view)


def program(body):
    return b"\x80\x02" + body + b"."


def entries(**named):
    return b"}(" + b"".join(data(name) + value for name, value in named.items()) + b"u"


def archive(body, storages=(), compression=zipfile.ZIP_STORED, **more):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as opened:
        opened.writestr("archive/data.pkl", program(body))
        for key, content in dict(storages).items():
            opened.writestr(f"archive/data/{key}", content)
        for name, content in more.items():
            opened.writestr(f"archive/{name}", content)
    return buffer.getvalue()


def stream(body, keys=(), tail=b""):
    """The older format."""
    head = (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})
    return b"".join(pickle.dumps(h, 2) for h in head) + program(body) + pickle.dumps(list(keys), 2) + tail


def whole(weights, make=archive):
    """A good file with all of the weights in it."""
    body, storages = b"}(", {}
    for i, (name, value) in enumerate(weights.items()):
        stride = tuple(s // 4 for s in np.ascontiguousarray(value).strides)
        body += data(name) + tensor(str(i), value.size, value.shape, stride)
        storages[str(i)] = value.tobytes()
    if make is archive:
        return archive(body + b"u", storages)
    tail = b"".join((len(s) // 4).to_bytes(8, "little") + s for s in storages.values())
    return stream(body + b"u", storages, tail)


@pytest.mark.parametrize("make", [archive, stream])
def test_good_files_written_so_are_read(folder, weights, make):
    expected = lehr.load(folder).network
    (folder / f"{STEM}.safetensors").unlink()
    (folder / f"{STEM}.bin").write_bytes(whole(weights, make))
    jax.tree.map(np.testing.assert_array_equal, lehr.load(folder).network, expected)


# What is done to them.


def pickled(content):
    """The weights replaced by a PyTorch file."""

    def spoil(folder):
        (folder / f"{STEM}.safetensors").unlink()
        (folder / f"{STEM}.bin").write_bytes(content)

    return spoil


def stored(edit):
    """The weights edited."""

    def spoil(folder):
        file = folder / f"{STEM}.safetensors"
        save_file(edit(load_file(file)), file)

    return spoil


def raw(edit):
    """The bytes of the weights edited."""

    def spoil(folder):
        file = folder / f"{STEM}.safetensors"
        file.write_bytes(edit(file.read_bytes()))

    return spoil


def stated(**changes):
    """The network's config changed."""
    return text("unet/config.json", json.dumps(CONFIG | changes))


def noise(**changes):
    """The scheduler's config changed."""
    return text("scheduler/scheduler_config.json", json.dumps(changes))


def text(name, content):
    return lambda folder: (folder / name).write_text(content)


def shards(where, files=()):
    """The weights replaced by an index of shards."""

    def spoil(folder):
        content = load_file(folder / f"{STEM}.safetensors")
        (folder / f"{STEM}.safetensors").unlink()
        for name in files:
            save_file(content, folder / "unet" / name)
        index = {"weight_map": {name: where for name in [*content, "more"]} if isinstance(where, str) else where}
        (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps(index))

    return spoil


def header(content):
    """A safetensors file with a header of one's own."""
    encoded = json.dumps(content).encode()
    return lambda _: len(encoded).to_bytes(8, "little") + encoded + bytes(64)


def changed(name, edit):
    return stored(lambda tensors: {k: edit(v) if k == name else v for k, v in tensors.items()})


BIAS = "conv_in.bias"
TOUCH = data("touch canary")
ONE = {"0": np.ones(4, np.float32).tobytes()}
HOSTILE = {
    # Damaged.
    "truncated weights": (raw(lambda b: b[:-40]), "cannot be read as safetensors"),
    "empty weights": (raw(lambda b: b""), "cannot be read as safetensors"),
    "a web page": (raw(lambda b: b"<!doctype html>" * 99), "cannot be read as safetensors"),
    "a header longer than the file": (raw(lambda b: (2**40).to_bytes(8, "little") + b[8:]), "safetensors"),
    "tensors that overlap": (
        raw(header({n: {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]} for n in "ab"})),
        "safetensors",
    ),
    "a truncated archive": (pickled(archive(b"}", ONE)[:-30]), "damaged"),
    "a truncated stream": (
        pickled(stream(entries(a=tensor("0", 4, (4,), (1,))), ["0"], (4).to_bytes(8, "little") + bytes(12))),
        "truncated",
    ),
    "noise": (pickled(bytes(range(256)) * 9), "damaged"),
    # Weights that are not what they should be.
    "not a number": (changed(BIAS, lambda v: v * np.nan), "conv_in.bias.*not finite"),
    "overflow": (changed(BIAS, lambda v: np.full_like(v, np.inf, np.float16)), "not finite"),
    "integers": (changed(BIAS, lambda v: v.astype(np.int8)), "conv_in.bias.*must be floating"),
    "complex numbers": (changed(BIAS, lambda v: v.astype(np.complex64)), "conv_in.bias.*floating|cannot be read"),
    "another shape": (changed(BIAS, lambda v: v[:3]), r"conv_in.bias.*shape \(3,\)"),
    "a transposed matrix": (changed("time_embedding.linear_1.weight", lambda v: v.T.copy()), "shape"),
    "a missing tensor": (stored(lambda t: {k: v for k, v in t.items() if k != BIAS}), "1 tensors are missing.*conv_in"),
    "one tensor too many": (stored(lambda t: t | {"backdoor.weight": np.ones(1, np.float32)}), "no place.*backdoor"),
    # Configs that lie.
    "other channels": (stated(block_out_channels=[8]), "does not fit"),
    "another depth": (stated(layers_per_block=2), "does not fit"),
    "a million layers": (stated(layers_per_block=10**6), "asks for 2000001 blocks"),
    "huge channels": (stated(block_out_channels=[2**40]), "does not fit"),
    "words for numbers": (stated(norm_eps="small"), "norm_eps|not supported between"),
    "no number": (text("unet/config.json", json.dumps(CONFIG | {"norm_eps": float("nan")})), "norm_eps"),
    "an unknown block": (stated(down_block_types=["SkipDownBlock2D"]), "SkipDownBlock2D"),
    "an unknown option": (stated(use_oracle=True), "unknown keys: use_oracle"),
    "another network": (stated(_class_name="UNet2DConditionModel"), "UNet2DConditionModel"),
    "a list for a config": (text("unet/config.json", "[1]"), "must hold a JSON object"),
    "half a config": (text("unet/config.json", json.dumps(CONFIG)[:40]), "not valid JSON"),
    "nested brackets": (text("unet/config.json", "[" * 200_000), "not valid JSON"),
    "no size": (stated(sample_size=None), "sample_size"),
    "an unknown noise": (noise(beta_schedule="sundial"), "sundial"),
    "a billion steps": (noise(num_train_timesteps=10**9), "num_train_timesteps"),
    # Paths.
    "a shard outside": (shards("../../secret.safetensors"), "must lie in the folder"),
    "a shard of the system": (shards("/etc/passwd"), "must lie in the folder"),
    "a shard that is the folder": (shards(".."), "must lie in the folder"),
    "a missing shard": (shards("a.safetensors"), "which is not there"),
    "a tensor that is not in its shard": (shards("a.safetensors", ["a.safetensors"]), "more is in a.safetensors.*not"),
    "an index of nothing": (shards({}), "no weight_map"),
    # Pickles that run.
    "a command": (pickled(archive(call("posix", "system", TOUCH))), "posix.system.*not run"),
    "a command in a stream": (pickled(stream(call("os", "system", TOUCH))), "os.system.*not run"),
    "a bare pickle": (pickled(program(call("subprocess", "call", TOUCH))), "subprocess.call.*not run"),
    "code": (pickled(archive(call("builtins", "exec", data("open('canary', 'w')")))), "builtins.exec"),
    "a way round": (pickled(archive(call("builtins", "getattr", data("a"), data("b")))), "builtins.getattr"),
    "a dotted name": (pickled(archive(call("torch._utils", "np.fromfile", TOUCH))), "np.fromfile"),
    "a whole model": (pickled(archive(b"cmodel\nNet\n)\x81}b")), "NEWOBJ|model.Net"),
    "an old way to call": (pickled(archive(b"(" + TOUCH + b"iposix\nsystem\n")), "INST"),
    "a registered extension": (pickled(archive(b"\x82\x01")), "EXT1"),
    "a changed function": (
        pickled(archive(b"ctorch._utils\n_rebuild_parameter\n" + b"N}(" + data("_make") + b"Nu\x86b")),
        "change a function",
    ),
    "a function for a tensor": (pickled(archive(entries(a=b"ctorch\nSize\n"))), "stands where data should be"),
    "an object for a storage": (pickled(archive(entries(a=data("archive") + b"Q"))), "damaged|no storage"),
    # Much from little.
    "a bomb": (pickled(archive(b"}", {"0": bytes(10**7)}, zipfile.ZIP_DEFLATED)), "compressed archive"),
    "a storage that is not there": (pickled(archive(entries(a=tensor("0", 2**40, (1,), (1,))), ONE)), "storage '0'"),
    "a stream's storage that is not there": (
        pickled(stream(entries(a=tensor("0", 2**40, (1,), (1,))), ["0"])), "larger than what is there",
    ),
    "a view beyond its storage": (pickled(archive(entries(a=tensor("0", 4, (5,), (1,))), ONE)), "beyond its storage"),
    "a view from beyond": (pickled(archive(entries(a=tensor("0", 4, (1,), (1,), 9)), ONE)), "beyond its storage"),
    "a view backwards": (pickled(archive(entries(a=tensor("0", 4, (2,), (-1,))), ONE)), "stride"),
    "one number many times": (pickled(archive(entries(a=tensor("0", 4, (2**30, 2**30), (0, 0))), ONE)), "beyond"),
    "a memo out of proportion": (pickled(archive(b"}r\xff\xff\xff\x7f")), "memo out of all proportion"),
    "a string longer than the file": (pickled(archive(b"\x8d" + (2**60).to_bytes(8, "little"))), "damaged"),
    "a list in itself": (pickled(archive(b"]q\x00h\x00a")), "damaged|recursion"),
    "another byte order": (pickled(archive(b"}", byteorder=b"big")), "big-endian"),
    "no program": (pickled(archive(b"}").replace(b"data.pkl", b"data.txt")), "no single data.pkl"),
    "a number": (pickled(archive(data(7))), "must hold named tensors"),
    "weights among other things": (pickled(archive(entries(step=data(7)))), "step is something else.*--entry"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_it_is_refused_and_nothing_is_run_or_written(name, folder, monkeypatch):
    spoil, message = HOSTILE[name]
    spoil(folder)
    monkeypatch.chdir(folder)
    before = sorted((file, file.stat().st_mtime_ns) for file in folder.parent.rglob("*"))
    with pytest.raises(lehr.CheckpointError, match=message):
        lehr.load(folder)
    assert sorted((file, file.stat().st_mtime_ns) for file in folder.parent.rglob("*")) == before


@pytest.mark.parametrize(("lacking", "message"), [("unet", "no unet/config.json"), ("scheduler", "no noise schedule")])
def test_an_incomplete_folder_says_what_is_missing(lacking, message, folder):
    for file in (folder / lacking).iterdir():
        file.unlink()
    with pytest.raises(FileNotFoundError, match=message):
        lehr.load(folder)


def test_a_variant_is_a_word(folder):
    with pytest.raises(ValueError, match="a variant is a word"):
        lehr.load(folder, variant="../../secret")
