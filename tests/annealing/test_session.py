"""Runs that are watched, kept, stopped and taken up again: in the end as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from stand_ins import normal_score

import lehr
from lehr.annealing import session

NORMAL = lehr.Gaussian(jnp.zeros(2), 1.0)
TARGET = NORMAL * lehr.Gaussian(jnp.ones(2), 0.5)
NARROWER = NORMAL * lehr.Gaussian(jnp.ones(2), 0.4)
FEW = {"ladder": 6, "num_steps": 1, "pilot": 4}
MAKE = {
    "chains": lambda **options: lehr.AnnealedMCMC(TARGET, num_chains=8, num_samples=5, **FEW, **options),
    "particles": lambda **options: lehr.AnnealedSMC(TARGET, num_particles=32, **FEW, **options),
    "reverse": lambda **options: lehr.Reverse(normal_score(), num_levels=6, num_samples=8, **options),
    "replicas": lambda **options: lehr.ReplicaExchange(
        TARGET, num_chains=2, num_samples=5, num_warmup=3, **FEW, **options
    ),
}


class Watch(lehr.ProgressMeter):
    """Notes what it is told, and does ``act`` once a part has so many stages behind it."""

    def __init__(self, part="", stage=0, act=lambda: None):
        self.part, self.stage, self.act = part, stage, act
        self.told = {}

    def begin(self, label, total):
        self.label = label.split()[-1]
        self.told[self.label] = []

    def update(self, standing):
        self.told[self.label].append(standing)
        if self.label == self.part and standing.done == self.stage:
            self.act()

    def end(self): ...


@pytest.fixture(autouse=True)
def every_stage_is_a_segment_that_is_kept(monkeypatch):
    monkeypatch.setattr(session, "WATCHED", 1e-9)
    monkeypatch.setattr(session, "KEPT", 1e-9)
    monkeypatch.setattr(session, "SAVING_SHARE", np.inf)


@pytest.fixture(scope="module")
def whole():
    """Runs that were left alone, each one segment."""
    return {kind: make(progress=False).run(3) for kind, make in MAKE.items()}


def same(one, other):
    everything = [(run.samples, run.levels, run.log_weights, run.sample_stats) for run in (one, other)]
    return all(jax.tree.leaves(jax.tree.map(lambda a, b: np.array_equal(a, b, equal_nan=True), *everything)))


def raises(error):
    def act():
        raise error

    return act


STOPS = [("chains", "run", 2), ("chains", "run", 9), ("particles", "pilot", 3), ("particles", "run", 4),
         ("reverse", "run", 5), ("replicas", "run", 2), ("replicas", "run", 6)]  # fmt: skip


@pytest.mark.parametrize(("kind", "part", "stage"), STOPS)
def test_a_run_that_failed_half_way_goes_on_and_ends_as_if_it_had_not(kind, part, stage, whole, tmp_path):
    broken = MAKE[kind](progress=Watch(part, stage, raises(OSError("the disk is gone"))), checkpoint=tmp_path)
    with pytest.raises(OSError, match="the disk is gone"):
        broken.run(3)
    watch = Watch()
    run = MAKE[kind](progress=watch, checkpoint=tmp_path).run(3, resume=True)
    assert same(run, whole[kind])
    assert watch.told[part][0].done == stage, "the stages before are not made again"
    assert not same(run, MAKE[kind](progress=False).run(4))


def test_further_draws_are_kept_too(tmp_path):
    whole = MAKE["replicas"](progress=False)
    whole.run(3)
    cut = MAKE["replicas"](progress=Watch("5", 2, raises(OSError("the disk is gone"))), checkpoint=tmp_path)
    cut.run(3)
    with pytest.raises(OSError, match="the disk is gone"):
        cut.extend(4)
    watch = Watch()
    again = MAKE["replicas"](progress=watch, checkpoint=tmp_path)
    again.run(3, resume=True)
    assert same(again.extend(4), whole.extend(4))
    assert [standing.done for standing in watch.told["5"]] == [2, 3, 4]
    assert again.last_run.samples["x"].shape[1] == 9


def test_a_run_that_is_over_is_only_read(whole, tmp_path):
    make = MAKE["particles"]
    assert same(make(checkpoint=tmp_path, progress=False).run(3), whole["particles"])
    watch = Watch()
    assert same(make(checkpoint=tmp_path, progress=watch).run(3, resume=True), whole["particles"])
    assert watch.told == {"pilot": [], "run": []}


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_ends_a_run_that_is_kept_at_its_next_stage(number, error, whole, tmp_path):
    before = signal.getsignal(number)
    watch = Watch("run", 3, lambda: os.kill(os.getpid(), number))
    with pytest.raises(error):
        MAKE["chains"](progress=watch, checkpoint=tmp_path).run(3)
    assert [standing.done for standing in watch.told["run"]] == [1, 2, 3]
    assert signal.getsignal(number) is before
    watch = Watch()
    assert same(MAKE["chains"](progress=watch, checkpoint=tmp_path).run(3, resume=True), whole["chains"])
    assert watch.told["run"][0].done == 4


def test_what_is_resumed_must_be_what_was_begun(tmp_path):
    smc = MAKE["particles"](progress=False, checkpoint=tmp_path)
    smc.run(3)
    with pytest.raises(ValueError, match=r"holds this run, 6 of 6 stages .* resume=True"):
        smc.run(3)
    others = {
        "seed is": (smc, 4),
        "num_chains is 32 there, 64 here": (
            lehr.AnnealedSMC(TARGET, num_particles=64, progress=False, checkpoint=tmp_path, **FEW), 3),
        "kernel is": (lehr.AnnealedSMC(TARGET, lehr.HMC(), num_particles=32, checkpoint=tmp_path, **FEW), 3),
        "^(?!.*model).*data is": (
            lehr.AnnealedSMC(NARROWER, num_particles=32, checkpoint=tmp_path, **FEW), 3),
        "model is": (lehr.AnnealedSMC(NORMAL * TARGET, num_particles=32, checkpoint=tmp_path, **FEW), 3),
        "method is": (MAKE["chains"](checkpoint=tmp_path), 3),
    }  # fmt: skip
    for message, (driver, seed) in others.items():
        with pytest.raises(ValueError, match=message):
            driver.run(seed, resume=True)
    with pytest.raises(ValueError, match="keeps none"):
        MAKE["particles"](progress=False).run(3, resume=True)


def test_a_note_that_cannot_be_read_is_said_so(tmp_path):
    smc = MAKE["particles"](progress=False, checkpoint=tmp_path)
    smc.run(3)
    (tmp_path / "run" / "work.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        smc.run(3, resume=True)


def test_resuming_where_nothing_is_kept_begins(whole, tmp_path):
    run = MAKE["particles"](progress=False, checkpoint=tmp_path / "new").run(3, resume=True)
    assert same(run, whole["particles"])


def test_compilation_is_reported_apart_from_running():
    started = time.monotonic()
    attrs = MAKE["particles"](progress=False).run(3).attrs
    assert attrs["seconds"] > 0
    assert attrs["compile_seconds"] > 0
    assert attrs["seconds"] + attrs["compile_seconds"] <= time.monotonic() - started


KILLED = """
import sys
import jax, numpy as np
if len(sys.argv) > 3:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(sys.argv[3], 2, int(sys.argv[4]))
import lehr
from lehr.annealing import session
session.KEPT, session.SAVING_SHARE = 0.05, np.inf
mesh = jax.make_mesh((jax.device_count(),), ("chains",)) if len(sys.argv) > 3 else None
target = lehr.Gaussian(np.zeros(2), 1.0) * lehr.Gaussian(np.ones(2), 0.5)
draws = 2000 if mesh is None else 30  # processes that agree on what is kept take a good part of a second to keep it
mcmc = lehr.AnnealedMCMC(target, num_chains=512, num_samples=draws, ladder=20, thinning=10, pilot=4,
                         checkpoint=sys.argv[1], sharding=mesh, progress=False)
print("begins", flush=True)
run = mcmc.run(3, resume=True)
if jax.process_index() == 0:
    np.save(sys.argv[2], run.samples["x"])
"""


def _processes(count, folder, out, port):
    arguments = [sys.executable, "-c", KILLED, str(folder), str(out)]
    if count == 1:
        return [subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)]
    ends = [[*arguments, f"127.0.0.1:{port}", str(i)] for i in range(count)]
    return [subprocess.Popen(end, stdout=subprocess.PIPE, text=True) for end in ends]


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_runs_that_are_killed_twenty_times_end_as_one_that_was_not(count, tmp_path):
    """Killed without warning at random moments: while compiling, sampling or writing."""
    rng, port = np.random.default_rng(count), 20000 + os.getpid() % 20000

    def stage(folder):
        kept = (tmp_path / folder / "run").glob("[0-9]*")
        return max((int(p.name) for p in kept if p.name.isdigit()), default=0)

    def go(folder, kill_after=None):
        """How the processes ended; killed so long after they began, or after they first kept a stage."""
        nonlocal port
        port += 1
        processes = _processes(count, tmp_path / folder, tmp_path / f"{folder}.npy", port)
        for process in processes:
            while process.stdout.readline() not in ("begins\n", ""):
                pass
        if kill_after is not None:
            stood = stage(folder)
            while kill_after < 1 and stage(folder) == stood and processes[0].poll() is None:
                time.sleep(0.01)
            time.sleep(kill_after)
            for process in processes:
                process.kill()
        for process in processes:
            process.communicate(timeout=600)
        return {process.returncode for process in processes}

    assert go("whole") == {0}
    stood = []
    for i in range(20):  # every fourth at any time, compiling perhaps; the others soon after a stage was kept
        go("killed", kill_after=rng.uniform(1, 8) if i % 4 == 0 else rng.uniform(0, 0.3))
        stood.append(stage("killed"))
    assert len(set(stood)) > 3, f"killed before anything was kept, or after the end: {stood}"
    assert go("killed") == {0}
    np.testing.assert_array_equal(np.load(tmp_path / "killed.npy"), np.load(tmp_path / "whole.npy"))
    assert json.loads((tmp_path / "killed" / "run" / "work.json").read_text())["num_chains"] == 512
    print(f"stages kept after each of the kills: {stood}")
