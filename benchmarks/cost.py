"""What a run costs beside the network evaluations that it makes, and how that grows.

    python benchmarks/cost.py [floor] [scaling] [memory] [devices]

The *floor* of a sampler is the time of the same number of batched gradients in one loop. Each figure is taken in
a process of its own: the peak of its memory is its own, and nothing is compiled beforehand.
"""

import json
import os
import resource
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

from report import report

HERE = Path(__file__).resolve()
REPEATS = 3


# In a process of its own


def perceptron(d, width, blocks):
    import jax
    from flax import nnx

    import lehr
    from lehr.networks import ResidualMLP

    module = ResidualMLP(d, d, width=width, num_blocks=blocks, rngs=nnx.Rngs(0))
    module.readout.kernel[...] = 0.02 * jax.random.normal(jax.random.key(0), module.readout.kernel.shape)
    return lehr.EnergyNetwork(module, lehr.VPCosine(), (d,), head="inner", sigma_range=(0.05, 20.0))


def unet(size, channels, blocks, num_channels=1, **config):
    from flax import nnx

    import lehr
    from lehr.networks.unet import UNet
    from lehr.networks.unet_config import UNetConfig

    config = UNetConfig(
        sample_size=size, in_channels=num_channels, out_channels=num_channels, block_out_channels=channels,
        layers_per_block=blocks, down_block_types=("DownBlock2D",) * len(channels),
        up_block_types=("UpBlock2D",) * len(channels), **config,
    )  # fmt: skip
    module = UNet(config, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(module)
    network = (lambda p, x, c: nnx.merge(graphdef, p)(x, 125 * (c + 4)), state)
    shape = (num_channels, size, size)
    return lehr.EnergyNetwork(network, lehr.VPCosine(), shape, head="inner", std=0.5, sigma_range=(0.05, 20.0))


POTENTIALS = {
    "MLP, 500k": lambda d=64: perceptron(d, 256, 2),
    "U-Net, 28×28": lambda d=784: unet(28, (32, 64), 1, norm_num_groups=8),
    "U-Net, 36M, 3×32×32": lambda d=3072: unet(
        32, (128, 256, 256, 256), 2, 3, downsample_padding=0, flip_sin_to_cos=False, freq_shift=1
    ),
    "ring × bar": lambda d=2: _ring_and_bar(),
}


def _ring_and_bar():
    import lehr

    return lehr.load("ring") * lehr.load("bar")


def measure(name, n, levels, d=None, steps=1, num_integration=3, batch=None, floor=True, shards=1, repeats=REPEATS):
    """One run, twice: with compilation, and without."""
    import jax
    import numpy as np

    import lehr

    p = POTENTIALS[name]() if d is None else POTENTIALS[name](d)
    mesh = jax.make_mesh((jax.device_count(),), ("chains",)) if shards > 1 else None
    tuning = lehr.Tuning(0.3 * np.prod(p.event_shape) ** -0.25, 1.0)
    driver = lehr.AnnealedMCMC(
        p, lehr.HMC(num_integration), ladder=levels, num_steps=steps, num_chains=n, num_samples=1, tuning=tuning,
        max_batch=batch, sharding=mesh, progress=False,
    )  # fmt: skip
    first = driver.run(0)
    again = [driver.run(1 + i).attrs for i in range(repeats)] or [first.attrs]
    attrs = min(again, key=lambda attrs: attrs["seconds"])
    parameters = sum(leaf.size for leaf in jax.tree.leaves(p) if leaf.size > 1000)
    said = {
        "model": name, "chains": n, "levels": levels, "dimension": int(np.prod(p.event_shape)),
        "parameters": parameters, "compile_seconds": first.attrs["compile_seconds"], "seconds": attrs["seconds"],
        "evaluations": attrs["evaluations_per_chain"], "devices": jax.device_count(),
    }  # fmt: skip
    said["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if floor:
        count = max(round(attrs["evaluations_per_chain"]), 2)

        @jax.jit
        def loop(p, x):  # weights are arguments, as in a run: what is constant would be folded
            def step(x, _):
                value, gradient = jax.vmap(jax.value_and_grad(lambda x: p.log_density(x, 0.5)))(x)
                return x + 1e-4 * gradient, value.sum()

            return jax.lax.scan(step, x, length=count)

        x = jax.random.normal(jax.random.key(0), (n, *p.event_shape))
        jax.block_until_ready(loop(p, x))
        times = []
        for _ in range(REPEATS):
            started = time.perf_counter()
            jax.block_until_ready(loop(p, x))
            times.append(time.perf_counter() - started)
        said |= {"floor_seconds": min(times), "ratio": attrs["seconds"] / min(times)}
    return said


# The host of those processes


def apart(devices=1, processes=1, cores=None, **arguments):
    """``measure`` in a new process, or in several; on so many cores for each device, if that is asked."""
    environment = os.environ | {"XLA_FLAGS": os.environ.get("XLA_FLAGS", "")}
    if devices > 1:
        environment["XLA_FLAGS"] += f" --xla_force_host_platform_device_count={devices}"
    port = str(20000 + os.getpid() % 20000)
    command = [sys.executable, str(HERE), "--measure", json.dumps(arguments | {"shards": devices * processes})]
    ends = [command if processes == 1 else [*command, port, str(processes), str(i)] for i in range(processes)]
    owned = sorted(os.sched_getaffinity(0))
    running = []
    for i, end in enumerate(ends):
        own = owned if cores is None else owned[i * cores * devices : (i + 1) * cores * devices]
        pin = partial(os.sched_setaffinity, 0, own)
        running.append(subprocess.Popen(end, env=environment, stdout=subprocess.PIPE, text=True, preexec_fn=pin))
    outputs = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise RuntimeError(f"{arguments} failed.")
    said = [json.loads(output.splitlines()[-1]) for output in outputs]
    print(said[0], file=sys.stderr, flush=True)
    return said[0] | {"processes": processes, "peak_bytes": max(one["peak_bytes"] for one in said)}


def megabytes(figures):
    return f"{figures['peak_bytes'] / 2**20:,.0f}"


def floors():
    runs = [
        apart(name="MLP, 500k", n=1000, levels=20, steps=2),
        apart(name="U-Net, 28×28", n=64, levels=4),
    ]
    columns = ("model", "parameters", "chains", "evaluations", "compile s", "run s", "floor s", "ratio")
    rows = [
        (f["model"], f"{f['parameters']:,}", f["chains"], f["evaluations"], f"{f['compile_seconds']:.1f}",
         f"{f['seconds']:.2f}", f"{f['floor_seconds']:.2f}", f"{f['ratio']:.3f}")
        for f in runs
    ]  # fmt: skip
    report("cost_floor", "A run beside its network evaluations", columns, rows, runs)


def scaling():
    runs = [apart(name="ring × bar", n=n, levels=20, floor=False) for n in (64, 1024, 4096, 16384)]
    runs += [apart(name="MLP, 500k", n=256, levels=10, d=d) for d in (2, 32, 256, 1024, 3072)]
    columns = ("model", "dimension", "chains", "levels", "run s", "µs a chain and evaluation", "ratio", "peak MiB")
    rows = [
        (f["model"], f["dimension"], f["chains"], f["levels"], f"{f['seconds']:.2f}",
         f"{1e6 * f['seconds'] / f['chains'] / f['evaluations']:.1f}", f"{f['ratio']:.3f}" if "ratio" in f else "",
         megabytes(f))
        for f in runs
    ]  # fmt: skip
    report("cost_scaling", "Chains and dimensions", columns, rows, runs)


def memory():
    runs = [apart(name="MLP, 500k", n=1000, levels=levels, floor=False) for levels in (20, 200)]
    runs += [apart(name="ring × bar", n=16384, levels=20, batch=2048, floor=False)]
    large = {"name": "U-Net, 36M, 3×32×32", "n": 256, "levels": 1, "num_integration": 1}
    runs += [apart(**large, batch=8, floor=False, repeats=0)]
    columns = ("model", "dimension", "chains", "levels", "run s", "peak MiB")
    rows = [(f["model"], f["dimension"], f["chains"], f["levels"], f"{f['seconds']:.1f}", megabytes(f)) for f in runs]
    report("cost_memory", "Peak memory of the whole process", columns, rows, runs)


def devices():
    runs = [
        apart(name="MLP, 500k", n=1000 * parts, levels=10, floor=False, devices=d, processes=p, cores=1)
        for parts, d, p in ((1, 1, 1), (2, 2, 1), (2, 1, 2))
    ]
    columns = ("devices", "processes", "chains", "run s", "µs a chain and evaluation")
    rows = [
        (f["devices"], f["processes"], f["chains"], f"{f['seconds']:.2f}",
         f"{1e6 * f['seconds'] / f['chains'] / f['evaluations']:.1f}")
        for f in runs
    ]  # fmt: skip
    report("cost_devices", "Weak scaling on one machine", columns, rows, runs)


PARTS = {"floor": floors, "scaling": scaling, "memory": memory, "devices": devices}

if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        if len(sys.argv) > 3:
            import jax

            jax.config.update("jax_cpu_collectives_implementation", "gloo")
            jax.distributed.initialize(f"127.0.0.1:{sys.argv[3]}", int(sys.argv[4]), int(sys.argv[5]))
        arguments = json.loads(sys.argv[2])
        print(json.dumps(measure(**arguments)))
    else:
        for part in sys.argv[1:] or PARTS:
            PARTS[part]()
