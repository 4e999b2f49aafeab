"""Levels of theory: the chosen head decides the reference energies, too."""

import json

import pytest

import mdplug
from mdplug.deployed import evaluate
from mdplug.potentials.pair import LennardJones
from mdplug.spec import Spec
from mdplug.system import AtomicSystem


def test_total_energy_follows_the_chosen_head(tmp_path):
    plain = LennardJones.new(0.01, 3.0, 8.0)
    record = json.loads(plain.spec.to_json())
    record.update(heads=["pbe", "scan"], atomic_energies={"pbe": {"Ar": -1.0}, "scan": {"Ar": -7.0}})
    path = mdplug.save(LennardJones(Spec.from_json(json.dumps(record), "test")), tmp_path / "two.safetensors")
    system = AtomicSystem.from_arrays([18, 18], [[0, 0, 0], [3.5, 0, 0]])
    pair = float(evaluate(plain, system).energy)
    for head, reference in (("pbe", -2.0), ("scan", -14.0)):
        prediction = evaluate(mdplug.load(path, head=head), system)
        assert float(prediction.energy) == pytest.approx(pair + reference)
        assert float(prediction.interaction_energy) == pytest.approx(pair)
