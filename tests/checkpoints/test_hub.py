"""Models of the hub, without the network: from a cache laid out as the hub's client lays it out."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lehr
from lehr.checkpoints import hub

RANDOM = Path(__file__).parent / "data" / "tiny-random"
COMMIT = "0123456789abcdef0123456789abcdef01234567"

PROGRAM = """
import numpy as np, jax, lehr
p, q = lehr.load("someone/tiny"), lehr.load({folder!r})
print(all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(p.network), jax.tree.leaves(q.network), strict=True)))
asked = (("someone/else", {{}}), ("someone/tiny", {{"revision": "v2"}}), ("someone/tiny", {{"variant": "fp16"}}))
for name, options in asked:
    try:
        lehr.load(name, **options)
    except FileNotFoundError as error:
        print("someone/" in str(error) or "fp16" in str(error))
"""


def test_a_model_in_the_cache_is_found_by_name_without_the_network(tmp_path):
    pytest.importorskip("huggingface_hub")
    model = tmp_path / "hub/models--someone--tiny"
    (model / "refs").mkdir(parents=True)
    (model / "refs/main").write_text(COMMIT)
    for i, file in enumerate(sorted(f for f in RANDOM.rglob("*") if f.is_file())):
        link = model / "snapshots" / COMMIT / file.relative_to(RANDOM)
        link.parent.mkdir(parents=True, exist_ok=True)
        (model / "blobs").mkdir(exist_ok=True)
        shutil.copy(file, model / "blobs" / str(i))
        link.symlink_to(os.path.relpath(model / "blobs" / str(i), link.parent))
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    program = [sys.executable, "-c", PROGRAM.format(folder=str(RANDOM))]
    said = subprocess.run(program, capture_output=True, text=True, env=environment, check=True)
    assert said.stdout.split() == ["True"] * 4


def test_without_the_client_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"lehr\[hub\]"):
        hub.fetch("someone/tiny")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint.*Shipped"):
        lehr.load("some/one/else")
