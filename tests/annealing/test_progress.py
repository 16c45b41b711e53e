"""Meters: what they are told, what they show, and where they keep silent."""

import io
import math
import multiprocessing

import jax.numpy as jnp
import pytest
from rich.console import Console

import lehr
from lehr.annealing.progress import NoMeter, PlainLines, RichBar, Standing, as_meter, counted

STANDING = Standing(done=3, total=12, sigma=0.1234, acceptance_rate=0.76, ess=0.5, seconds_left=3725)


class Told(lehr.ProgressMeter):
    def __init__(self):
        self.said = []

    def begin(self, label, total):
        self.said.append((label, total))

    def update(self, standing):
        self.said.append(standing)

    def end(self):
        self.said.append("end")


def terminal():
    return Console(file=io.StringIO(), force_terminal=True, width=150)


def shown(meter):
    meter.begin("AnnealedSMC run", 12)
    meter.update(STANDING)
    meter.update(STANDING._replace(done=12, seconds_left=0.0))
    meter.end()
    return meter.console.file.getvalue()


def test_a_standing_says_all_that_is_known():
    assert str(STANDING) == "σ 0.123  accepted 0.76  ESS 50%  1:02:05 left"
    assert str(STANDING._replace(acceptance_rate=math.nan, seconds_left=None)) == "σ 0.123  ESS 50%"


def test_the_bar_shows_the_part_the_stage_and_the_standing():
    said = shown(RichBar(terminal()))
    for word in ("AnnealedSMC run", "12/12", "ESS 50%"):
        assert word in said


def test_lines_come_at_their_interval_and_not_of_what_is_soon_over():
    console = Console(file=io.StringIO(), width=40)
    lines = shown(PlainLines(console, seconds=0.0)).splitlines()
    assert lines[0] == f"AnnealedSMC run 3/12  {STANDING}"
    assert len(lines) == 2
    assert shown(PlainLines(Console(file=io.StringIO()), seconds=60)) == ""


def _kind_in_worker(queue):
    queue.put(type(as_meter(True)).__name__)


def test_the_meter_suits_where_the_program_runs(monkeypatch):
    assert isinstance(as_meter(False), NoMeter)
    own = Told()
    assert as_meter(own) is own
    with pytest.raises(TypeError, match="progress must be"):
        lehr.AnnealedSMC(lehr.Gaussian(jnp.zeros(2), 1.0), progress="bar")
    assert isinstance(as_meter(True), PlainLines)
    with monkeypatch.context() as patch:
        patch.setattr(Console, "is_terminal", True)
        assert isinstance(as_meter(True), RichBar)
        patch.setattr(multiprocessing, "parent_process", lambda: object())
        assert isinstance(as_meter(True), NoMeter)
        patch.undo()
        patch.setattr("jax.process_index", lambda: 1)
        assert isinstance(as_meter(True), NoMeter)


def test_a_run_tells_its_meter_of_every_part_and_of_its_end():
    told = Told()
    target = lehr.Gaussian(jnp.zeros(2), 1.0)
    run = lehr.AnnealedMCMC(target, ladder=5, num_chains=8, num_samples=3, pilot=4, progress=told).run(0)
    parts = [said for said in told.said if isinstance(said, tuple) and not isinstance(said, Standing)]
    assert parts == [("AnnealedMCMC pilot", 5), ("AnnealedMCMC run", 8)]
    last = told.said[-2]
    assert told.said[-1] == "end"
    assert (last.done, last.total, last.seconds_left) == (8, 8, 0.0)
    assert last.sigma == pytest.approx(run.levels["sigma"][-1], rel=1e-5)
    assert last.acceptance_rate == pytest.approx(run.levels["acceptance_rate"][-1], rel=1e-5)
    assert last.ess == 1.0


def test_a_meter_is_told_of_the_end_of_a_run_that_fails():
    told = Told()
    told.update = lambda _: 1 / 0
    with pytest.raises(ZeroDivisionError):
        lehr.AnnealedSMC(lehr.Gaussian(jnp.zeros(2), 1.0), ladder=5, num_particles=8, progress=told).run(0)
    assert told.said[-1] == "end"


def test_many_runs_are_one_piece_of_work():
    """Evidence and calibration make a run for each island or simulation; of these nobody is told, and none is kept."""
    told = Told()
    assert list(counted(told, "evidence", "abc")) == ["a", "b", "c"]
    assert told.said[0] == ("evidence", 3)
    assert [said.done for said in told.said[1:-1]] == [1, 2, 3]
    assert str(told.said[3]) == "0:00 left"
    part = lehr.AnnealedSMC(lehr.Gaussian(jnp.zeros(2), 1.0), progress=told, checkpoint="kept").as_part()
    assert (part.progress, part.checkpoint) == (False, None)
