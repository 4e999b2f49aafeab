"""Model files: what is refused, and with which words."""

import json
import zipfile

import pytest
import torch
from safetensors.torch import save_file

import mdplug
from mdplug.artifact import SPEC_KEY, read_spec
from mdplug.errors import InputError, ModelFileError
from mdplug.potentials.pair import LennardJones
from mdplug.spec import CONTRACT, Spec


@pytest.fixture
def model(tmp_path):
    return mdplug.save(LennardJones.new(0.01, 3.0, 8.0), tmp_path / "lj.safetensors")


def rewrite(path, **changes):
    """The same file with keys of its Spec changed (None: removed)."""
    record = json.loads(read_spec(path).to_json())
    for key, value in changes.items():
        record.pop(key, None)
        if value is not None:
            record[key] = value
    save_file({"_empty": torch.zeros(1)}, path, metadata={SPEC_KEY: json.dumps(record)})


def refuse(path, match, **options):
    with pytest.raises((ModelFileError, InputError), match=match) as caught:
        mdplug.load(path, **options)
    assert "\n" not in str(caught.value)


def test_newer_contract(model):
    rewrite(model, contract=CONTRACT + 1)
    refuse(model, "upgrade mdplug")


def test_unknown_and_missing_keys(model):
    rewrite(model, surprise=1)
    refuse(model, "unknown key 'surprise'")


def test_missing_key(model):
    rewrite(model, cutoff=None)
    refuse(model, "missing key 'cutoff'")


def test_architecture_is_not_free_text(model):
    rewrite(model, architecture="os:system")
    refuse(model, "not installed")


@pytest.mark.parametrize("keep", [0, 4, 40, -3])
def test_truncated(model, keep):
    data = model.read_bytes()
    model.write_bytes(data[:keep])
    refuse(model, "truncated|not a model file")


def test_foreign_files(tmp_path):
    foreign = tmp_path / "model.txt"
    foreign.write_text("this is no model file at all")
    refuse(foreign, "not a model file")
    plain = tmp_path / "plain.safetensors"
    save_file({"w": torch.zeros(2)}, plain)
    refuse(plain, "without an mdplug description")
    script = tmp_path / "theirs.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(script))
    refuse(script, "TorchScript of another program")
    pickle = tmp_path / "pickle.pt"
    torch.save({"a": torch.zeros(1)}, pickle)
    refuse(pickle, "mdplug convert")
    assert zipfile.is_zipfile(pickle)
    refuse(tmp_path / "absent", "shipped models: electrolyte")
    refuse(tmp_path, "not a file")


def test_weights_that_do_not_fit(model):
    spec = read_spec(model)
    save_file({"epsilon": torch.zeros(3)}, model, metadata={SPEC_KEY: spec.to_json()})
    refuse(model, "weights do not fit")


def test_options(model):
    refuse(model, "dtype must be", dtype="half")
    refuse(model, "no head 'dft'.*default", head="dft")
    refuse(model, "radial must be", radial="spline")
    refuse(model, "unknown device", device="abacus")
    if not torch.cuda.is_available():
        refuse(model, "no CUDA device", device="cuda")


def test_heads_must_be_named(tmp_path):
    potential = LennardJones.new(0.01, 3.0, 8.0)
    record = {**json.loads(potential.spec.to_json()), "heads": ["pbe", "r2scan"]}
    path = tmp_path / "two.safetensors"
    mdplug.save(LennardJones(Spec.from_json(json.dumps(record), "test")), path)
    refuse(path, "name one with head=: pbe, r2scan")
    assert mdplug.load(path, head="r2scan").head == 1


def test_weights_round_trip_exactly(model):
    again = mdplug.load(model)
    assert float(again.sigma) == 3.0
    assert not any(p.requires_grad for p in again.parameters())
    assert not list(model.parent.glob("*.part"))
