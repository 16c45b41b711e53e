"""What somebody else's U-Net costs: its gradient by call and inside a loop, and a large one to load.

By call and in a loop the same gradient should take about the same time. On CPU XLA's own convolution does not; the
sum of products that lehr uses in its place does.
"""

import json
import multiprocessing
import tempfile
import time
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from report import report
from safetensors.numpy import save_file

import lehr
from lehr.checkpoints.tensors import shapes_of, torch_names
from lehr.networks import convolution
from lehr.networks.unet import UNet
from lehr.networks.unet_config import UNetConfig

DIGITS = Path(__file__).parent.parent / "tests/checkpoints/data/digits8"
BATCH, STEPS, REPEATS = 16, 20, 15
CIFAR = {
    "sample_size": 32,
    "block_out_channels": [128, 256, 256, 256],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "attention_head_dim": None,
    "norm_eps": 1e-6,
}


def gradient(p, x, t):
    output, back = jax.vjp(lambda x: jax.vmap(p.noise, (0, None))(x, t), x)
    return back(output)[0]


def looped(p, x, t):
    return lax.scan(lambda x, _: (x - 1e-3 * gradient(p, x, t), None), x, length=STEPS)[0]


def milliseconds(function, *arguments):
    """The least time of one gradient."""
    program = jax.jit(function).lower(*arguments).compile()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        times.append(time.perf_counter() - start)
    return 1e3 * min(times) / (STEPS if function is looped else 1)


def direct(x, kernel, *, stride=1, padding=((1, 1), (1, 1))):
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x[None], kernel, (stride, stride), padding, dimension_numbers=layout)[0]


def time_gradients():
    p, t = lehr.load(DIGITS), jnp.asarray(0.4)
    x = jax.random.normal(jax.random.key(0), (BATCH, *p.event_shape))
    results = {"lehr's": {"call": milliseconds(gradient, p, x, t), "loop": milliseconds(looped, p, x, t)}}
    jax.clear_caches()
    with mock.patch.object(convolution, "convolve", direct):
        results["XLA's"] = {"call": milliseconds(gradient, p, x, t), "loop": milliseconds(looped, p, x, t)}
    return results


def write_large(folder):
    """The structure of the published DDPM for CIFAR-10, with random weights."""
    for part in ("unet", "scheduler"):
        (folder / part).mkdir()
    config = UNetConfig(**CIFAR)
    (folder / "unet/config.json").write_text(json.dumps(CIFAR))
    (folder / "scheduler/scheduler_config.json").write_text("{}")
    state = nnx.split(shapes_of(lambda rngs: UNet(config, rngs=rngs)))[1]
    shapes = [leaf.shape for leaf in jax.tree.leaves(state)]
    shapes = [(s[3], s[2], *s[:2]) if len(s) == 4 else s[::-1] for s in shapes]
    rng = np.random.default_rng(0)
    tensors = {n: rng.normal(size=s).astype(np.float32) for n, s in zip(torch_names(state), shapes, strict=True)}
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    save_file(tensors, file)
    return file.stat().st_size, sum(t.size for t in tensors.values())


def load_large(folder):
    """Seconds, and the most memory held while loading, beyond what the process had before, in bytes."""
    lehr.load(DIGITS)  # so that the first use of the libraries is not counted
    Path("/proc/self/clear_refs").write_text("5")  # the most memory is counted from here: getrusage knows the parent's
    before = held("VmRSS")
    start = time.perf_counter()
    jax.block_until_ready(lehr.load(folder))
    seconds = time.perf_counter() - start
    return seconds, held("VmHWM") - before


def held(entry):
    """Memory of this process, in bytes: VmRSS now, VmHWM at most."""
    line = next(s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith(entry))
    return 1024 * int(line.split()[1])


def main():
    gradients = time_gradients()
    with tempfile.TemporaryDirectory() as folder:
        size, parameters = write_large(Path(folder))
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            seconds, memory = pool.apply(load_large, (folder,))
    rows = [
        (f"{name} convolution", f"{ms['call']:.1f}", f"{ms['loop']:.1f}", f"{ms['loop'] / ms['call']:.1f}")
        for name, ms in gradients.items()
    ]
    results = {
        "gradient_ms": gradients,
        "load": {"parameters": parameters, "bytes": size, "seconds": seconds, "peak_bytes": memory},
    }
    report(
        "loading",
        f"Gradient of a U-Net of 701,345 parameters, batch {BATCH}, ms. A file of {parameters:,} parameters loads "
        f"in {seconds:.1f} s, holding at most {memory / size:.1f} times its size",
        ("", "by call", f"in a loop of {STEPS}", "ratio"),
        rows,
        results,
    )


if __name__ == "__main__":
    main()
