"""The contract's own negative controls: potentials that break one law each must fail."""

import pytest
import torch
from contract import check

from mdplug.potential import Potential
from mdplug.potentials.pair import LennardJones, pair_spec


class Broken(LennardJones):
    """Lennard-Jones with one fault, chosen by the `fault` of its config."""

    def local(self, numbers, pairs, vectors, n_owned, system_index, total_charge, total_spin, head):
        fault = self.spec.config["fault"]
        r = torch.linalg.vector_norm(vectors, dim=1)
        energy = self.pair_energy(r, numbers[pairs[0]], numbers[pairs[1]])
        if fault != "hard cutoff":
            atom_energy = sound_energy(self, numbers, pairs, vectors, n_owned)
        else:
            atom_energy = vectors.new_zeros(n_owned).index_add(0, pairs[0], 0.5 * energy)
        if fault == "axis":
            atom_energy = atom_energy.index_add(0, pairs[0], 1e-3 * torch.exp(-r) * (vectors[:, 0] / r) ** 2)
        if fault == "detached":
            atom_energy = atom_energy.detach() + 0.0 * vectors.sum()
        if fault == "not extensive":
            atom_energy = atom_energy * (1.0 + 1e-4 * n_owned)
        if fault == "order":
            atom_energy = atom_energy * (1.0 + 1e-4 * torch.arange(n_owned, dtype=r.dtype))
        return {"atom_energy": atom_energy}


def sound_energy(model, numbers, pairs, vectors, n_owned):
    zeros = vectors.new_zeros(1)
    return LennardJones.local(model, numbers, pairs, vectors, n_owned, numbers, zeros, zeros, numbers)["atom_energy"]


@pytest.mark.parametrize("fault", ["hard cutoff", "axis", "detached", "not extensive", "order"])
def test_a_broken_potential_is_caught(fault, tmp_path):
    assert issubclass(Broken, Potential)
    config = {"epsilon": 0.02, "sigma": 2.2, "cutoff": 5.0, "switch": 4.5, "fault": fault}
    with pytest.raises(AssertionError):
        check(Broken(pair_spec("broken", Broken, config)), [18], tmp_path)
