"""Comparing our MACE with reference results of mace-torch, for the live and the stored parity tests."""

from collections.abc import Mapping

import ase
import numpy as np

from mdplug.deployed import Prediction, evaluate
from mdplug.potential import Model
from mdplug.system import AtomicSystem

ENERGY_EV_PER_ATOM = 1e-9
RELATIVE = 1e-8
TABLES_EV_PER_A = 1e-4


def system_of(case: dict) -> AtomicSystem:
    """One of the zoo's structures."""
    atoms = ase.Atoms(case["numbers"], case["positions"], cell=case["cell"], pbc=case["pbc"])
    atoms.info.update(charge=case["charge"], spin=case["spin"])
    return AtomicSystem.from_ase(atoms)


def arrays(prediction: Prediction) -> dict[str, np.ndarray]:
    """What is compared, as arrays."""
    names = ("energy", "interaction_energy", "forces", "stress", "atom_energy")
    return {name: getattr(prediction, name).detach().cpu().double().numpy() for name in names}


def check(model: Model, name: str, case: dict, expected: Mapping[str, np.ndarray]) -> None:
    """Assert the gates of exact parity on one structure.

    Args:
        model: ours, float64, exact radial functions. name: of the structure.
        expected: energy, forces, node_energy and, if periodic, stress.
    """
    found = arrays(evaluate(model, system_of(case)))
    n = len(case["numbers"])
    assert abs(found["energy"][0] - expected["energy"]) / n < ENERGY_EV_PER_ATOM, name
    if "embedding" not in model.spec.config or not model.spec.config["embedding_readout"]:
        # upstream's atomic energies leave the embedding's readout out
        np.testing.assert_allclose(found["atom_energy"], expected["node_energy"], rtol=0, atol=ENERGY_EV_PER_ATOM)
    forces, stress = expected["forces"], expected.get("stress")
    assert np.abs(forces).max() > 1e-3, "a structure without forces compares nothing"
    assert np.abs(found["forces"] - forces).max() < RELATIVE * np.abs(forces).max(), name
    if stress is not None:
        assert np.abs(found["stress"][0] - stress).max() < RELATIVE * np.abs(stress).max(), name


def check_tables(model: Model, name: str, case: dict, expected: Mapping[str, np.ndarray]) -> float:
    """Assert the gate of float32 with tables on one structure; returns the largest force error in eV/A."""
    found = arrays(evaluate(model, system_of(case)))
    error = float(np.abs(found["forces"] - expected["forces"]).max())
    assert error < TABLES_EV_PER_A, (name, error)
    return error
