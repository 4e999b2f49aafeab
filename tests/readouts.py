"""Structures whose labels hold a known readout of a MACE body's features."""

import numpy as np
import torch
from contract import liquid

from mdplug.deployed import evaluate
from mdplug.pairs import pairs
from mdplug.system import AtomicSystem
from mdplug.uncertainty import linearised
from mdplug.workflows import last_layer

SPECIES = (1, 8)


def truth(body, seed=3):
    """A readout that the labels hold beside the body: (F + Z,)."""
    width = 2 * body.embedding.shape[1]
    return 0.2 * np.random.default_rng(seed).normal(size=width + len(SPECIES))


def frames_of(body, answer=None, n=14, noise=0.0, seed=0):
    """Structures labelled by the body plus a linear readout `answer` of its raw features."""
    rng = np.random.default_rng(seed)
    frames = []
    for k in range(n):
        atoms = liquid([1, 8], n=8 + k % 5, edge=6.0, seed=seed + k)
        system = AtomicSystem.from_ase(atoms)
        out = evaluate(body, system)
        energy, forces = float(out.energy), out.forces.numpy()
        if answer is not None:
            width = len(answer) - len(SPECIES)
            whole = last_layer.FeatureStatistics(
                np.zeros(width), np.ones(width), np.zeros((2, width)), np.tile(np.eye(width), (2, 1, 1))
            )
            two = last_layer.assemble(body, whole, np.stack([answer, -answer]))  # their mean is the body
            out, pulled = linearised(two, system, pairs(system, two.cutoff))
            one = torch.zeros_like(out["member_atom_energy"])
            one[0] = 1.0
            energy = float(out["member_atom_energy"][0].sum())
            forces = pulled({"member_atom_energy": one})[0].numpy()
        atoms.info |= {"REF_energy": energy + noise * rng.normal(), "charge": 0, "spin": 1, "group": f"g{k}"}
        atoms.info["split"] = "valid" if k % 4 == 3 else "train"
        atoms.arrays["REF_forces"] = forces + noise * rng.normal(size=forces.shape)
        frames.append(atoms)
    return frames
