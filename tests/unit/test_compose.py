"""Sum and Ensemble: what they mean, and what they refuse."""

import pytest
import torch
from contract import liquid

from mdplug.compose import Ensemble, Sum
from mdplug.deployed import evaluate
from mdplug.errors import InputError
from mdplug.potentials.pair import ZBL, LennardJones
from mdplug.potentials.stillinger_weber import StillingerWeber
from mdplug.system import AtomicSystem


@pytest.fixture
def system():
    return AtomicSystem.from_ase(liquid([14], n=20, edge=9.0))


def test_sum_is_the_sum(system):
    parts = [LennardJones.new(0.02, 2.2, 6.0), ZBL.new(2.5, 1.0), StillingerWeber.new()]
    alone = [evaluate(p, system) for p in parts]
    together = evaluate(Sum.of(parts), system)
    assert torch.allclose(together.interaction_energy, sum(p.interaction_energy for p in alone))
    assert torch.allclose(together.forces, sum(p.forces for p in alone))
    assert torch.allclose(together.virial, sum(p.virial for p in alone))


def test_ensemble_is_the_mean_and_keeps_its_members(system):
    members = [LennardJones.new(0.01 * (k + 1), 2.2, 6.0) for k in range(4)]
    together = evaluate(Ensemble.of(members), system)
    alone = [evaluate(m, system) for m in members]
    assert torch.allclose(together.forces, torch.stack([p.forces for p in alone]).mean(dim=0))
    each = together.extras["member_atom_energy"].sum(dim=1)
    assert torch.allclose(each, torch.cat([p.interaction_energy for p in alone]))
    assert len(set(each.tolist())) == 4


def test_species_are_those_in_common():
    both = Sum.of([LennardJones.new(0.02, 2.2, 6.0), StillingerWeber.new()])
    assert both.spec.species == (14,)
    with pytest.raises(InputError, match="no element in common"):
        Sum.of([StillingerWeber.new(14), StillingerWeber.new(32)])
    with pytest.raises(InputError, match="at least one"):
        Sum.of([])


def test_unknown_element_is_named(system):
    water = AtomicSystem.from_arrays([14, 8], [[0, 0, 0], [2, 0, 0]])
    with pytest.raises(InputError, match=r"atom 1 is O.*it knows Si"):
        evaluate(StillingerWeber.new(), water)
