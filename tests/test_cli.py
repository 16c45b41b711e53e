"""The command line, as a user types it."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import lehr
from lehr.demo import MEASUREMENTS, truth

LEHR = [sys.executable, "-c", "from lehr.cli import main; main()"]


def run(*arguments, folder):
    return subprocess.run([*LEHR, *arguments], capture_output=True, text=True, cwd=folder, check=True).stdout


def test_zoo_lists_the_shipped_models(tmp_path):
    said = run("zoo", folder=tmp_path)
    assert all(name in said for name in lehr.zoo())


def test_train_writes_a_model_that_loads(tmp_path):
    run("train", "zoo/bar", "--folder", "models", "--num-steps", "2", folder=tmp_path)
    card = json.loads((tmp_path / "models" / "bar.json").read_text())
    assert card["training"]["num_steps"] == 2
    assert lehr.load(tmp_path / "models" / "bar").is_calibrated


def test_convert_writes_a_folder_that_loads(tmp_path):
    source = Path(__file__).parent / "checkpoints/data/adm/legacy"
    weights, flags = (str(source.with_suffix(suffix)) for suffix in (".pt", ".json"))
    said = run("convert", weights, "--config", flags, "--entry", "model", "--folder", "model", folder=tmp_path)
    assert 'lehr.load("model")' in said
    assert lehr.load(tmp_path / "model").num_classes == 10


@pytest.mark.slow
def test_train_makes_a_model_of_a_file_of_events(tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "mine.npz", events=rng.normal(size=(40, 3)), labels=np.repeat([0, 1], 20))
    for kind, extra in (("energy", ()), ("score", ("--kind", "score"))):
        run("train", "mine.npz", "--folder", kind, "--num-steps", "2", "--batch-size", "8", *extra, folder=tmp_path)
        made = lehr.load(tmp_path / kind / "mine")
        card = json.loads((tmp_path / kind / "mine.json").read_text())
        assert card["kind"] == kind
        assert card["classes"] == (2 if kind == "energy" else 0)
        assert [figure["sigma"] for figure in card["held_out"]] == sorted(f["sigma"] for f in card["held_out"])
        # Two steps change next to nothing: the error is that of the data's Gaussian, for an energy at least.
        if kind == "energy":
            assert 0.5 < card["held_out"][0]["error"] < 1.5
            assert made.given(1).is_calibrated


@pytest.mark.slow
def test_the_demo_agrees_with_the_exact_answers(tmp_path):
    from lehr.demo import demo

    runs = demo(tmp_path, num_particles=1000)
    for name, exact in (("product", truth(None)), ("posterior", truth(MEASUREMENTS))):
        run = runs[name]
        assert abs(run.log_evidence - exact.log_evidence) < 0.2 + 3 * run.log_evidence_se
        assert (run.get_samples()["x"][:, 1] > 0).mean() == pytest.approx(exact.upper_mass, abs=0.1)
    assert runs["posterior"].get_samples()["sigma"].mean() == pytest.approx(truth(MEASUREMENTS).sigma[0], abs=0.05)
    assert all((tmp_path / f).stat().st_size > 1000 for f in ("demo.nc", "product.nc", "demo.png", "ladder.png"))


def test_the_exact_answer_without_data_is_the_product_itself():
    exact = truth(None)
    assert exact.upper_mass == pytest.approx(0.5, abs=1e-3)
    assert exact.log_evidence == pytest.approx(np.log(0.25 / 0.8), abs=1e-6)
    assert exact.height[1] == pytest.approx(np.sqrt(0.25 + 0.03**2), rel=1e-3)
