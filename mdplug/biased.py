"""A potential that is drawn to, or held off, what its ensemble does not agree on."""

from dataclasses import replace
from typing import Any, Dict, List, Tuple

import torch
from torch import Tensor

from mdplug.compose import Composed, joint_spec
from mdplug.errors import InputError
from mdplug.potential import Potential, Pull
from mdplug.spec import Spec

FLOOR_EV = 1e-3  # where members agree the slope of sigma has no limit: below this it is rounded off


class Biased(Composed):
    """E - strength x sum over atoms of sigma, sigma the standard deviation of the members' energies of an atom.

    A positive strength draws the dynamics to where members disagree, a negative one holds it off. Every atom has its
    own term, so that two systems far apart do not feel each other's bias; forces and virial are its exact slope. Linear
    in sigma as in C. van der Oord et al., npj Comput. Mater. 9, 168 (2023), which takes sigma of the total energy.

    Args:
        spec: config {"parts": [spec], "strength": float, "floor_eV": float}. parts: one, with members.
    """

    def __init__(self, spec: Spec, parts: List[Potential]):
        super().__init__(spec, parts)
        self.strength, self.floor_eV = float(spec.config["strength"]), float(spec.config["floor_eV"])

    @classmethod
    def of(cls, potential: Potential, strength: float, floor_eV: float = FLOOR_EV) -> "Biased":
        """Compose.

        Raises:
            InputError: a potential without members.
        """
        if "member_atom_energy" not in potential.spec.outputs:
            raise InputError(f"potential {potential.spec.name!r} has no members to disagree; give it an ensemble")
        spec = joint_spec("biased", cls, [potential], (*potential.spec.outputs, "bias_energy"))
        config = {**spec.config, "strength": float(strength), "floor_eV": float(floor_eV)}
        made = cls(replace(spec, name=potential.spec.name, config=config), [potential])
        made.head = potential.head
        return made

    def bias(self, member_atom_energy: Tensor) -> Tensor:
        """(n,) eV, from (M, n) eV."""
        variance = member_atom_energy.var(dim=0, unbiased=True)
        return -self.strength * ((variance + self.floor_eV**2).sqrt() - self.floor_eV)

    def local(
        self,
        numbers: Tensor,
        pairs: Tensor,
        vectors: Tensor,
        n_owned: int,
        system_index: Tensor,
        total_charge: Tensor,
        total_spin: Tensor,
        head: Tensor,
    ) -> Dict[str, Tensor]:
        """See `Potential.local`; "bias_energy" (n_owned,) eV is a part of "atom_energy"."""
        out: Dict[str, Tensor] = {}
        for part in self.parts:  # one
            out = part.local(numbers, pairs, vectors, n_owned, system_index, total_charge, total_spin, head)
        return self._with_bias(out, self.bias(out["member_atom_energy"]))

    def _with_bias(self, out: Dict[str, Tensor], bias: Tensor) -> Dict[str, Tensor]:
        result: Dict[str, Tensor] = {}
        for key, value in out.items():
            result[key] = value
        result["atom_energy"] = out["atom_energy"] + bias
        result["bias_energy"] = bias
        return result

    @torch.jit.unused
    def local_with_gradient(self, *arguments: Any) -> Dict[str, Tensor]:
        """See `Potential.local_with_gradient`; one adjoint for energy and bias together."""
        out, pull = self.local_with_pull(*arguments)
        return {**out, "pair_gradient": pull({"atom_energy": torch.ones_like(out["atom_energy"])})}

    @torch.jit.unused
    def local_with_pull(self, *arguments: Any) -> Tuple[Dict[str, Tensor], Pull]:
        """See `Potential.local_with_pull`."""
        out, pull_part = self.parts[0].local_with_pull(*arguments)
        with torch.enable_grad():
            leaf = out["member_atom_energy"].detach().requires_grad_(True)
            bias = self.bias(leaf)
            (slope,) = torch.autograd.grad([bias.sum()], [leaf])  # (M, n): an atom's bias knows its own members alone

        def pull(cotangents: Dict[str, Tensor]) -> Tensor:
            own = dict(cotangents)
            weight = own.pop("bias_energy", torch.zeros_like(out["atom_energy"]))
            weight = weight + own.get("atom_energy", torch.zeros_like(weight))
            own["member_atom_energy"] = own.get("member_atom_energy", torch.zeros_like(slope)) + weight * slope
            return pull_part(own)

        return self._with_bias(out, bias.detach()), pull
