"""Analytic pair potentials: references for every engine test, and repulsive cores.

All pair energies are switched off smoothly (C2) between `switch` and `cutoff`, so forces and their slopes stay
continuous: E = sum over unordered pairs of u(r) s(r).
"""

from typing import Any, Dict

import torch
from torch import Tensor, nn

from mdplug.errors import InputError
from mdplug.potential import Potential
from mdplug.spec import Spec
from mdplug.units import BOHR, COULOMB


def smooth_switch(r: Tensor, start: float, stop: float) -> Tensor:
    """OpenMM's switching function: 1 below `start`, 0 above `stop`, 1 - 10x^3 + 15x^4 - 6x^5 between (A)."""
    x = ((r - start) / (stop - start)).clamp(0.0, 1.0)
    return 1.0 - x * x * x * (10.0 - x * (15.0 - 6.0 * x))


def pair_spec(name: str, cls: type, config: Dict[str, Any], species: Any = ()) -> Spec:
    """The Spec of an analytic pair potential."""
    return Spec(
        name=name,
        architecture=f"{cls.__module__}:{cls.__name__}",
        config=config,
        cutoff=float(config["cutoff"]),
        species=tuple(int(z) for z in species),
        licence="MIT",
    )


class PairPotential(Potential):
    """A sum over pairs; a subclass writes `pair_energy`."""

    def __init__(self, spec: Spec):
        super().__init__(spec)
        cutoff = float(spec.config["cutoff"])
        switch = float(spec.config["switch"])
        if not 0.0 < switch < cutoff:
            raise InputError(f"{spec.name}: switch must lie between 0 and cutoff, got {switch} and {cutoff} A")
        self.switch = switch

    @torch.jit.unused
    def scales(self) -> Dict[str, Any]:
        """See `Potential.scales`: physical parameters are of their own size."""
        return {name: float(value.detach().abs()) for name, value in self.named_parameters()}

    def pair_energy(self, r: Tensor, z_i: Tensor, z_j: Tensor) -> Tensor:
        """(E,) eV of pairs at distances r (A)."""
        raise NotImplementedError("pair_energy")

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
        """See `Potential.local`; half of each pair energy goes to its receiver."""
        r = torch.linalg.vector_norm(vectors, dim=1)
        energy = self.pair_energy(r, numbers[pairs[0]], numbers[pairs[1]]) * smooth_switch(r, self.switch, self.cutoff)
        return {"atom_energy": vectors.new_zeros(n_owned).index_add(0, pairs[0], 0.5 * energy)}


class LennardJones(PairPotential):
    """4 epsilon ((sigma/r)^12 - (sigma/r)^6), one kind of atom.

    Args (of `new`): epsilon eV, sigma A, cutoff A, switch A.
    """

    def __init__(self, spec: Spec):
        super().__init__(spec)
        self.epsilon = nn.Parameter(torch.tensor(float(spec.config["epsilon"]), dtype=torch.float64))
        self.sigma = nn.Parameter(torch.tensor(float(spec.config["sigma"]), dtype=torch.float64))

    @classmethod
    def new(cls, epsilon: float, sigma: float, cutoff: float, switch: float | None = None) -> "LennardJones":
        """Build one; `switch` defaults to 0.9 cutoff."""
        config = {"epsilon": epsilon, "sigma": sigma, "cutoff": cutoff, "switch": switch or 0.9 * cutoff}
        return cls(pair_spec("lj", cls, config))

    def pair_energy(self, r: Tensor, z_i: Tensor, z_j: Tensor) -> Tensor:
        """See `PairPotential.pair_energy`."""
        x = (self.sigma / r).pow(6)
        return 4.0 * self.epsilon * (x * x - x)


class Morse(PairPotential):
    """D ((1 - exp(-a (r - r0)))^2 - 1), one kind of atom.

    Args (of `new`): depth eV, a 1/A, r0 A, cutoff A, switch A.
    """

    def __init__(self, spec: Spec):
        super().__init__(spec)
        self.depth = nn.Parameter(torch.tensor(float(spec.config["depth"]), dtype=torch.float64))
        self.a = nn.Parameter(torch.tensor(float(spec.config["a"]), dtype=torch.float64))
        self.r0 = nn.Parameter(torch.tensor(float(spec.config["r0"]), dtype=torch.float64))

    @classmethod
    def new(cls, depth: float, a: float, r0: float, cutoff: float, switch: float | None = None) -> "Morse":
        """Build one; `switch` defaults to 0.9 cutoff."""
        config = {"depth": depth, "a": a, "r0": r0, "cutoff": cutoff, "switch": switch or 0.9 * cutoff}
        return cls(pair_spec("morse", cls, config))

    def pair_energy(self, r: Tensor, z_i: Tensor, z_j: Tensor) -> Tensor:
        """See `PairPotential.pair_energy`."""
        x = 1.0 - torch.exp(-self.a * (r - self.r0))
        return self.depth * (x * x - 1.0)


class ZBL(PairPotential):
    """Ziegler-Biersack-Littmark screened nuclear repulsion, any elements.

    u(r) = k Z_i Z_j phi(r/a) / r, a = 0.8854 a0 / (Z_i^0.23 + Z_j^0.23)
    (J. F. Ziegler, J. P. Biersack, U. Littmark, The Stopping and Range of Ions in Solids, 1985).
    """

    weights: Tensor
    decays: Tensor

    def __init__(self, spec: Spec):
        super().__init__(spec)
        self.register_buffer("weights", torch.tensor([0.18175, 0.50986, 0.28022, 0.02817], dtype=torch.float64))
        # (attributes: TorchScript does not see module constants)
        self.coulomb, self.bohr = COULOMB, BOHR
        self.register_buffer("decays", torch.tensor([3.19980, 0.94229, 0.40290, 0.20162], dtype=torch.float64))

    @classmethod
    def new(cls, cutoff: float = 2.0, switch: float = 1.0) -> "ZBL":
        """Build one."""
        return cls(pair_spec("zbl", cls, {"cutoff": cutoff, "switch": switch}))

    def pair_energy(self, r: Tensor, z_i: Tensor, z_j: Tensor) -> Tensor:
        """See `PairPotential.pair_energy`."""
        zi, zj = z_i.to(r.dtype), z_j.to(r.dtype)
        x = r * (zi.pow(0.23) + zj.pow(0.23)) / (0.8854 * self.bohr)
        phi = (self.weights * torch.exp(-self.decays * x.unsqueeze(1))).sum(dim=1)
        return self.coulomb * zi * zj * phi / r
