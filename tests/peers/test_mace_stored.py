"""Parity with mace-torch where it is not installed: stored checkpoints and results, and published golden numbers."""

import json

import numpy as np
import pytest
from peers import mace_zoo
from peers.mace_fixtures import FOLDER, checkpoint, expected
from peers.mace_parity import arrays, check, system_of

from mdplug.deployed import evaluate
from mdplug.errors import ModelFileError
from mdplug.potentials.convert.mace import convert_module

# Of two independent codes (mace-torch 0.3.16 and a re-implementation): interaction energy (eV), force on O (eV/A).
GOLDEN = {
    "mp0": (0.203765137, (-0.04617922, -0.05567723, -0.00824215)),
    "mp0-L2": (0.201421475, (-0.04418012, -0.05391431, -0.0086835)),
    "off23": (0.414430606, (-0.00629813, -0.00954907, 0.00247555)),
    "density": (0.276944030, (-0.4362974, -0.45556057, -0.23881494)),
    "mh1": (-18.886627114, (-0.02491292, 0.00050642, -0.03221277)),
    "omol": (3.665387654, (0.00116813, -0.00277781, -0.03012061)),
    "soft+gauss": (0.238791327, (-0.00448797, 0.00243552, -0.01852642)),
}


def model_of(tag, folder):
    model = convert_module(checkpoint(tag, folder), f"{tag}.model")
    model.head = len(model.spec.heads) - 1
    return model


@pytest.mark.parametrize("tag", GOLDEN)
def test_golden_numbers(tag, tmp_path):
    found = arrays(evaluate(model_of(tag, tmp_path), system_of(mace_zoo.golden_cluster())))
    energy, force = GOLDEN[tag]
    assert found["interaction_energy"][0] == pytest.approx(energy, abs=1e-9)
    np.testing.assert_allclose(found["forces"][1], force, rtol=0, atol=1e-8)


@pytest.mark.parametrize("tag", mace_zoo.PARITY)
def test_stored_results(tag, tmp_path):
    model = model_of(tag, tmp_path)
    for name, case in {**mace_zoo.structures(), "golden": mace_zoo.golden_cluster()}.items():
        check(model, name, case, expected(tag, name))


@pytest.mark.parametrize("tag", mace_zoo.REFUSED)
def test_refused_kinds(tag, tmp_path):
    with pytest.raises(ModelFileError, match=r"attention|SO\(3\)|pseudo-scalars"):
        convert_module(checkpoint(tag, tmp_path), f"{tag}.model")


def test_the_fixtures_say_where_they_come_from():
    versions = json.loads((FOLDER / "provenance.json").read_text())
    assert versions["mace-torch"] == "0.3.16"
    assert set(versions["tags"]) == set(mace_zoo.VARIANTS)
