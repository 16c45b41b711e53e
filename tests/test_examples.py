"""The example for a cluster, on two processes of this machine."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lehr

CLUSTER = Path(__file__).parent.parent / "examples" / "cluster.py"


@pytest.mark.slow
def test_the_cluster_example_runs_on_two_processes_and_is_over_when_it_is_run_again(tmp_path):
    def run(port):
        command = [sys.executable, str(CLUSTER), "--coordinator", f"127.0.0.1:{port}", "--out", str(tmp_path)]
        ends = [[*command, "--particles", "128", "--process", str(i)] for i in range(2)]
        running = [subprocess.Popen(end, stdout=subprocess.PIPE, text=True) for end in ends]
        outputs = [process.communicate(timeout=900)[0] for process in running]
        assert [process.returncode for process in running] == [0, 0]
        return outputs

    port = 20000 + os.getpid() % 20000
    first, second = run(port)
    assert "sigma" in first
    assert "sigma" not in second, "the first process alone speaks"
    kept = lehr.from_netcdf(tmp_path / "posterior.nc").posterior
    assert kept["x"].shape == (4, 32, 2)
    again, _ = run(port + 1)
    seconds = re.compile(r"[\d.]+ s\b")
    assert seconds.sub("", again) == seconds.sub("", first)
