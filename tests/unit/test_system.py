"""AtomicSystem: checks at the border, conversions there and back."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule

from mdplug.errors import InputError, MdplugError
from mdplug.system import AtomicSystem, batch

BAD = {
    "zero atoms": (lambda: AtomicSystem.from_ase(Atoms()), "at least one atom"),
    "nan": (lambda: AtomicSystem.from_arrays([1, 1], [[0, 0, 0], [np.nan, 0, 0]]), "atom 1 .*not finite"),
    "no such element": (lambda: AtomicSystem.from_arrays([1, 0], np.eye(3)[:2]), "atom 1 has atomic number 0"),
    "pbc without cell": (lambda: AtomicSystem.from_arrays([1], [[0, 0, 0]], None, True), "no cell"),
    "flat cell": (
        lambda: AtomicSystem.from_arrays([1], [[0, 0, 0]], [[1, 0, 0], [2, 0, 0], [0, 0, 1]], True),
        "flat cell",
    ),
    "nan cell": (lambda: AtomicSystem.from_arrays([1], [[0, 0, 0]], np.full((3, 3), np.nan), True), "cell is not"),
    "shape": (lambda: AtomicSystem.from_arrays([1, 1], [[0, 0, 0]]), "positions must have shape"),
    "cell shape": (lambda: AtomicSystem.from_arrays([1], [[0, 0, 0]], np.eye(2)), "cell must have shape"),
    "empty batch": (lambda: batch([]), "empty list"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_input_is_one_clear_line(case):
    make, match = BAD[case]
    with pytest.raises(InputError, match=match) as caught:
        make()
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, MdplugError)


def test_ase_round_trip():
    water, salt = molecule("H2O"), bulk("NaCl", "rocksalt", a=5.64)
    water.info.update(charge=-1, spin=2)
    system = AtomicSystem.from_ase([water, salt])
    assert system.n_systems == 2
    assert system.total_charge.tolist() == [-1, 0]
    assert system.total_spin.tolist() == [2, 1]
    back = system.to_ase()
    for old, new in zip((water, salt), back, strict=True):
        assert np.array_equal(old.numbers, new.numbers)
        assert np.array_equal(old.positions, new.positions)
        assert np.array_equal(old.cell.array, new.cell.array)
        assert np.array_equal(old.pbc, new.pbc)
    assert torch.isnan(system.volume[0])
    assert float(system.volume[1]) == pytest.approx(salt.get_volume())


def test_pymatgen_equals_ase():
    from pymatgen.io.ase import AseAtomsAdaptor

    crystal = bulk("NaCl", "rocksalt", a=5.64)
    system = AtomicSystem.from_pymatgen(AseAtomsAdaptor.get_structure(crystal))
    assert torch.allclose(system.positions, AtomicSystem.from_ase(crystal).positions)
    assert system.pbc.all()
    molecule_ = AseAtomsAdaptor.get_molecule(molecule("H2O"))
    assert not AtomicSystem.from_pymatgen(molecule_).pbc.any()


def test_openmm_topology():
    from openmm.app import Element, Topology

    topology = Topology()
    residue = topology.addResidue("HOH", topology.addChain())
    topology.addAtom("O", Element.getBySymbol("O"), residue)
    system = AtomicSystem.from_openmm(topology, [[0, 0, 0]], np.eye(3) * 9)
    assert system.numbers.tolist() == [8]
    assert system.pbc.all()
    topology.addAtom("X", None, residue)
    with pytest.raises(InputError, match="atom 1"):
        AtomicSystem.from_openmm(topology, np.zeros((2, 3)))


def test_a_changed_copy_is_checked_like_a_new_system():
    system = AtomicSystem.from_ase(bulk("NaCl", "rocksalt", a=5.64))
    x, cell = system.positions, system.cell
    moved = system.with_(positions=x + 1.0)
    assert torch.equal(moved.positions, x + 1.0)
    assert moved.numbers is system.numbers
    assert torch.equal(system.positions, x)
    huge = system.with_(positions=torch.full_like(x, 1e308))  # finite, though its sum is not
    assert torch.isfinite(huge.positions).all()
    for changes, match in (
        ({"positions": x / 0.0 - x / 0.0}, "atom 0 .*not finite"),
        ({"positions": x[:1]}, "positions must have shape"),
        ({"positions": x.float()}, "positions must have .*float64"),
        ({"cell": cell * np.nan}, "cell is not finite"),
        ({"cell": cell[:, [0, 0, 1]]}, "flat cell"),
        ({"cell": torch.cat([cell, cell])}, "pbc must have shape"),
        ({"pbc": system.pbc, "cell": cell * 0}, "no cell"),
        ({"numbers": system.numbers * 0}, "atomic number 0"),
        ({"numbers": system.numbers[:1]}, "must have shape"),
        ({"system_index": system.system_index + 1}, "system_index must lie"),
    ):
        with pytest.raises(InputError, match=match):
            system.with_(**changes)
    with pytest.raises(TypeError, match="velocities"):
        system.with_(velocities=x)
