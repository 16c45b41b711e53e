"""Where chains lie changes nothing but rounding: batches, devices, processes; and islands."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import on_devices
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import lehr
from lehr.annealing.keys import per_chain
from lehr.annealing.layout import Layout, as_layout
from lehr.annealing.weights import Particles, overall, weigh

HERE = Path(__file__).parent
NORMAL = lehr.Gaussian(jnp.zeros(2), 1.0)
MESH = jax.make_mesh((1,), ("chains",))


# What is asked for


def test_a_mesh_or_a_sharding_says_where_chains_lie():
    for sharding in (MESH, NamedSharding(MESH, PartitionSpec("chains"))):
        layout = as_layout(sharding, None, 8)
        assert (layout.mesh.axis_names, layout.axis, layout.num_shards) == (("chains",), "chains", 1)
        assert hash(layout) == hash(as_layout(sharding, None, 8))
    other = jax.make_mesh((1,), ("walkers",))
    assert as_layout(NamedSharding(other, PartitionSpec("walkers")), 5, 8).axis == "walkers"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sharding": jax.devices()}, TypeError, "must be a jax.sharding.Mesh"),
        ({"sharding": jax.make_mesh((1,), ("walkers",))}, ValueError, 'named "chains" in a mesh'),
        ({"sharding": NamedSharding(MESH, PartitionSpec())}, ValueError, "first in a NamedSharding"),
        ({"max_batch": 0}, ValueError, "at least 1"),
        ({"max_batch": 2.5}, ValueError, "at least 1"),
        ({"islands": 0}, ValueError, "islands"),
        ({"islands": 7}, ValueError, "7 islands of at least 2 particles each do not make 64"),
        ({"islands": 64}, ValueError, "at least 2 particles"),
    ],
)
def test_what_cannot_be_laid_out_is_refused_before_anything_runs(options, error, message):
    with pytest.raises(error, match=message):
        lehr.AnnealedSMC(NORMAL, num_particles=64, **options)


# Batches


@pytest.mark.parametrize(
    ("n", "max_batch", "batches"), [(12, None, 1), (12, 12, 1), (12, 4, 3), (12, 5, 3), (13, 5, 3)]
)
def test_batches_are_at_most_as_large_as_memory_allows_and_change_nothing(n, max_batch, batches):
    layout = Layout(max_batch=max_batch)

    def once(key, x):
        return x + jax.random.normal(key, x.shape), jnp.sum(x)

    keys, x = per_chain(jax.random.key(0), n), jnp.arange(2.0 * n).reshape(n, 2)
    got, expected = layout.over(once)(keys, x), jax.vmap(once)(keys, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, expected)
    text = str(jax.make_jaxpr(layout.over(lambda x: x * 2))(x))
    assert ("scan" in text) == (batches > 1)


@pytest.mark.slow
def test_a_run_in_batches_is_the_run_at_once():
    make = lambda **where: {name: driver.run(3, *data) for name, driver, data in on_devices.runs(**where)}  # noqa: E731
    at_once, in_batches = make(), make(max_batch=8)
    for name, run in at_once.items():
        for site, draws in run.samples.items():
            np.testing.assert_allclose(in_batches[name].samples[site], draws, rtol=2e-3, atol=2e-4, err_msg=name)


# Devices and processes


def _on_devices(folder, devices, processes=1):
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} --xla_cpu_multi_thread_eigen=false",
        "JAX_ENABLE_X64": "1",  # so that rounding stays rounding, however long a trajectory amplifies it
        "PYTHONPATH": str(HERE.parent),
    }
    port = 20000 + (os.getpid() * 7 + devices) % 20000
    out = folder / f"{devices}x{processes}.npz"
    command = [sys.executable, str(HERE.parent / "on_devices.py"), str(out)]
    ends = [command] if processes == 1 else [[*command, f"127.0.0.1:{port}", str(i)] for i in range(processes)]
    running = [subprocess.Popen(end, env=environment) for end in ends]
    assert [process.wait(timeout=900) for process in running] == [0] * processes
    return np.load(out)


@pytest.fixture(scope="module")
def on_one_device(tmp_path_factory):
    return _on_devices(tmp_path_factory.mktemp("one"), 1)


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "processes"), [(2, 1), (1, 2)])
def test_devices_and_processes_change_nothing_but_rounding(devices, processes, on_one_device, tmp_path):
    got = _on_devices(tmp_path, devices, processes)
    assert (int(on_one_device["devices"]), int(got["devices"])) == (1, 2)
    for name, expected in on_one_device.items():
        if name != "devices":
            np.testing.assert_allclose(got[name], expected, rtol=1e-6, atol=1e-6, err_msg=name)


def test_no_device_waits_for_another_within_a_transition():
    """NUTS loops until its own chains are done: no all-reduce in the loop's condition."""
    layout = as_layout(MESH, None, 8)
    kernel = lehr.NUTS()
    state = jax.vmap(lambda q: kernel.init(jax.random.key(0), q, NORMAL.at(0.0)))(jnp.zeros((8, 2)))
    step = layout.over(lambda key, state: kernel.build()(key, state, NORMAL.at(0.0), 0.5, jnp.ones(2)))
    program = jax.make_jaxpr(step)(per_chain(jax.random.key(0), 8), state)
    outside = [equation.primitive.name for equation in program.eqns]
    assert "shard_map" in outside
    assert "while" in str(program)
    assert "while" not in outside
    assert not any(word in str(program) for word in ("psum", "pmax", "all_gather", "all_reduce"))


# Islands


def test_islands_resample_within_themselves_and_count_as_their_evidence():
    n = 8  # in two islands
    log_evidence = jnp.log(jnp.array([1.0, 3.0]))
    particles = Particles(jnp.arange(n), jnp.full(n, -jnp.log(4.0)), log_evidence, jnp.arange(n), jnp.zeros(2))
    np.testing.assert_allclose(np.exp(overall(particles)), [1 / 16] * 4 + [3 / 16] * 4, rtol=1e-6)
    gained = jnp.log(jnp.array([4.0, 0, 0, 0, 1, 1, 1, 1]))
    after, ess, resampled = weigh(particles, gained, jax.random.key(0), jnp.asarray(0.5), Layout())
    assert bool(resampled)
    np.testing.assert_array_equal(after.chains, [0, 0, 0, 0, 4, 5, 6, 7])
    np.testing.assert_allclose(after.log_evidence, log_evidence, atol=1e-6)
    weights = np.array([1 / 4, 0, 0, 0, 3 / 16, 3 / 16, 3 / 16, 3 / 16])
    assert float(ess) == pytest.approx(1 / np.sum(weights**2), rel=1e-5)
    assert float(after.total_log_evidence) == pytest.approx(np.log(2.0), abs=1e-6)


def test_the_evidence_of_islands_is_right_and_so_is_its_error():
    """Over seeds, (log Z − truth)/standard error is a Student's t, nearly: its mean square is near 1."""
    a, b = lehr.Gaussian(jnp.zeros(2), 1.0), lehr.Gaussian(jnp.ones(2), 0.5)
    smc = lehr.AnnealedSMC(a * b, ladder=8, num_particles=512, islands=16, num_steps=1, num_warmup=1, progress=False)
    runs = [smc.run(seed) for seed in range(24)]
    truth = 2 * (-0.5 * np.log(2 * np.pi * 1.25) - 0.5 / 1.25)
    z = np.array([(run.log_evidence - truth) / run.log_evidence_se for run in runs])
    assert abs(z.mean()) < 4 / np.sqrt(len(z))
    assert 0.5 < np.mean(z**2) < 2.0  # 24 draws: 4 standard errors are 1.2
