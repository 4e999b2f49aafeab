"""Our MACE against mace-torch, same random weights, every kind of model: exact in float64, tables in float32.

mace-torch runs in a process of its own (importing it changes global state here), once: its checkpoints and results are
kept in pytest's cache.
"""

import hashlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from peers import mace_zoo
from peers.mace_parity import check, check_tables

import mdplug
from mdplug.errors import ModelFileError
from mdplug.potentials.convert.mace import convert

pytestmark = pytest.mark.skipif(importlib.util.find_spec("mace") is None, reason="mace-torch is not installed")
SEED = 20


@pytest.fixture(scope="module")
def zoo(request, tmp_path_factory):
    """Folder with TAG.model and TAG.npz of every variant."""
    source = Path(mace_zoo.__file__)
    key = hashlib.sha256(
        source.read_bytes() + f"{SEED} {importlib.metadata.version('mace-torch')}".encode()
    ).hexdigest()
    cache = getattr(request.config, "cache", None)
    folder = cache.mkdir("mace-zoo") / key[:12] if cache else tmp_path_factory.mktemp("mace-zoo")
    missing = [tag for tag in mace_zoo.VARIANTS if not (folder / f"{tag}.npz").exists()]
    if missing:
        command = [sys.executable, "-W", "ignore", str(source), "--seed", str(SEED), str(folder), *missing]
        single = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        done = subprocess.run(command, env=single, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
    return folder


def expected(zoo, tag, case):
    with np.load(zoo / f"{tag}.npz") as rows:
        return {key.split("/")[1]: rows[key] for key in rows.files if key.startswith(f"{case}/")}


@pytest.mark.timeout(1800)  # the first test waits for the reference
@pytest.mark.parametrize("tag", mace_zoo.PARITY)
def test_float64_with_exact_radial(zoo, tag):
    model = convert(zoo / f"{tag}.model")
    model.head = len(model.spec.heads) - 1
    assert bool(model.spec.provenance["remarks"]) == (tag == "cheb+agnesi")
    for name, case in mace_zoo.structures().items():
        check(model, name, case, expected(zoo, tag, name))
    assert "mace" not in sys.modules


@pytest.mark.parametrize("tag", mace_zoo.PARITY)
def test_float32_with_tables(zoo, tag, tmp_path, record_property):
    path = mdplug.save(convert(zoo / f"{tag}.model"), tmp_path / "m.safetensors")
    heads = mdplug.artifact.read_spec(path).heads
    model = mdplug.load(path, dtype="float32", head=heads[-1])
    errors = {}
    for name, case in mace_zoo.structures().items():
        errors[name] = check_tables(model, name, case, expected(zoo, tag, name))
    record_property("force_error_eV_per_A", errors)
    record_property("table", model.table_report)
    if tag == "cheb+agnesi":  # its forces are no slope of a table
        assert not model.table_report
        return
    assert 0 < model.table_error < 1e-4
    assert model.table_report["slope_error"] == model.table_error


@pytest.mark.parametrize(("tag", "words"), [("att", "attention"), ("so3", r"SO\(3\)"), ("pseudo", "pseudo-scalars")])
def test_other_kinds_are_refused_by_name(zoo, tag, words):
    with pytest.raises(ModelFileError, match=words):
        convert(zoo / f"{tag}.model")


def test_a_wrong_weight_is_noticed(zoo):
    """Negative control: the gates see a change of one part in a million."""
    model = convert(zoo / "mp0.model")
    model.get_parameter("layers.1.messenger.linear").data.mul_(1 + 1e-6)
    case = mace_zoo.structures()["crystal"]
    with pytest.raises(AssertionError):
        check(model, "crystal", case, expected(zoo, "mp0", "crystal"))
