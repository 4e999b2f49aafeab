"""A potential with its derivatives, and its evaluation on a system. Differentiation is written once, here;
everything but `evaluate` compiles in TorchScript."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Dict, Final, List, Optional

import torch
from torch import Tensor

from mdplug import kernels
from mdplug.errors import InputError
from mdplug.pairs import Pairs
from mdplug.pairs import pairs as find_pairs
from mdplug.potential import Model, Potential, dtype_of
from mdplug.spec import Spec
from mdplug.system import AtomicSystem


class Deployed(Model):
    """A potential with its derivatives: what engines call and files hold.

    The energy is the interaction energy (no atomic reference energies), summed in float64. Pair vectors are formed
    in float64 from float64 positions and only then narrowed to the model's dtype, so that a result does not depend on
    how far from the origin an atom sits. Forces and virial come from one scatter of dE/d(vectors).
    """

    dtype_of: Tensor
    conservative: Final[bool]
    long_range: Final[bool]
    written: Final[bool]

    def __init__(self, potential: Potential):
        super().__init__(potential.spec)
        self.head = potential.head
        self.potential = potential
        self.conservative = potential.spec.conservative
        self.long_range = potential.spec.long_range
        self.written = potential.has_written_adjoint
        self.register_buffer("dtype_of", torch.zeros(1, dtype=dtype_of(potential)), persistent=False)

    def forward(
        self,
        numbers: Tensor,
        positions: Tensor,
        cell: Tensor,
        pbc: Tensor,
        pairs: Tensor,
        shifts: Tensor,
        system_index: Tensor,
        total_charge: Tensor,
        total_spin: Tensor,
        head: Tensor,
        forces: bool = True,
        create_graph: bool = False,
    ) -> Dict[str, Tensor]:
        """Evaluate.

        Args:
            numbers: (N,) int64. positions: (N, 3) float64 A. cell: (S, 3, 3) float64 A. pbc: (S, 3) bool.
            pairs: (2, E) int64. shifts: (E, 3) int64 lattice translations. system_index: (N,) int64.
            total_charge: (S,) e. total_spin: (S,). head: (S,) int64.
            forces: also differentiate. create_graph: keep the graph (training).

        Returns:
            "energy" (S,) float64 eV; "atom_energy" (N,) eV; with forces "forces" (N, 3) float64 eV/A and "virial"
            (S, 3, 3) float64 eV (= -dE/dstrain); and whatever else the potential returns.
        """
        dtype = self.dtype_of.dtype
        receiver, sender = pairs[0], pairs[1]
        if cell.shape[0] == 1:  # a gather of one cell per pair is what costs
            translation = torch.mm(shifts.to(cell.dtype), cell[0])
        else:
            translation = torch.bmm(shifts.to(cell.dtype).unsqueeze(1), cell[system_index[receiver]]).squeeze(1)
        r = (positions.index_select(0, sender) - positions.index_select(0, receiver) + translation).detach()
        if self.written:  # noqa: SIM102  (a constant: TorchScript drops the branch)
            if forces and not create_graph:
                return self.by_written_adjoint(
                    r, numbers, positions, cell, pairs, system_index, total_charge, total_spin, head
                )
        vectors = r.to(dtype).clone()
        x, box = positions.detach().clone(), cell.detach().clone()
        n = numbers.shape[0]
        grad_mode = torch.is_grad_enabled()
        charge, spin = total_charge.to(dtype), total_spin.to(dtype)
        # TorchScript has no enable_grad; an engine may call us with grad mode off.
        torch.set_grad_enabled(True)
        if forces:
            vectors.requires_grad_(True)
            if self.long_range:
                x.requires_grad_(True)
                box.requires_grad_(True)
        out = self.potential.local(numbers, pairs, vectors, n, system_index, charge, spin, head)
        if self.long_range:
            out = self.potential.far(out, x, box, pbc, system_index, total_charge)
        energy = energy_of(out["atom_energy"], system_index, cell)
        grads = torch.jit.annotate(List[Optional[Tensor]], [None, None, None])
        if forces and energy.requires_grad:
            inputs = [vectors, x, box] if self.long_range else [vectors]
            grads = torch.autograd.grad([energy.sum()], inputs, create_graph=create_graph, allow_unused=True)
        torch.set_grad_enabled(grad_mode or create_graph)
        result: Dict[str, Tensor] = {}
        if forces:
            gradient = zeros_if_none(grads[0], vectors)
            direct = totals(r, gradient, pairs, out["atom_energy"].detach(), system_index, positions, cell)
            force, virial = direct["forces"], direct["virial"]
            if self.long_range:
                dx, dbox = zeros_if_none(grads[1], x), zeros_if_none(grads[2], box)
                force = force - dx
                far = torch.zeros_like(cell).index_add(0, system_index, positions.unsqueeze(2) * dx.unsqueeze(1))
                far = far + torch.bmm(cell.transpose(1, 2), dbox)
                virial = virial - 0.5 * (far + far.transpose(1, 2))
            result["forces"] = force if create_graph else force.detach()
            result["virial"] = virial if create_graph else virial.detach()
        torch.set_grad_enabled(grad_mode)
        for key, value in out.items():
            result[key] = value if create_graph else value.detach()
        result["energy"] = energy if create_graph else energy.detach()
        return result

    def by_written_adjoint(
        self,
        r: Tensor,
        numbers: Tensor,
        positions: Tensor,
        cell: Tensor,
        pairs: Tensor,
        system_index: Tensor,
        total_charge: Tensor,
        total_spin: Tensor,
        head: Tensor,
    ) -> Dict[str, Tensor]:
        """As `forward` with forces, for pair vectors `r` (E, 3) float64 A, by the potential's own adjoint."""
        dtype, n = self.dtype_of.dtype, numbers.shape[0]
        charge, spin = total_charge.to(dtype), total_spin.to(dtype)
        out = self.potential.local_with_gradient(numbers, pairs, r.to(dtype), n, system_index, charge, spin, head)
        gradient = out.pop("pair_gradient")
        if torch.jit.is_scripting():  # such a file needs the operators anyway
            out.update(native_totals(r, gradient, pairs, out["atom_energy"], system_index, cell.shape[0]))
        else:
            out.update(totals(r, gradient, pairs, out["atom_energy"], system_index, positions, cell))
        return out


def energy_of(atom_energy: Tensor, system_index: Tensor, cell: Tensor) -> Tensor:
    """(S,) float64 eV: sums of atom energies (N,) over each structure. system_index: (N,). cell: (S, 3, 3)."""
    if not torch.jit.is_scripting():  # noqa: SIM102  (TorchScript drops the branch)
        if kernels.serves(atom_energy) and not atom_energy.requires_grad:
            return torch.ops.mdplug.sum_atoms.default(atom_energy.contiguous(), system_index, cell.shape[0])
    return torch.zeros_like(cell[:, 0, 0]).index_add(0, system_index, atom_energy.to(torch.float64))


def totals(
    r: Tensor,
    pair_gradient: Tensor,
    pairs: Tensor,
    atom_energy: Tensor,
    system_index: Tensor,
    positions: Tensor,
    cell: Tensor,
) -> Dict[str, Tensor]:
    """The one scatter of dE/d(vectors): "forces" (N, 3) eV/A and symmetric "virial" (S, 3, 3) eV; "energy" (S,) eV.

    Args:
        r: (E, 3) float64 A. pair_gradient: (E, 3) eV/A. pairs: (2, E). atom_energy: (N,) eV. system_index: (N,).
        positions: (N, 3). cell: (S, 3, 3).
    """
    if not torch.jit.is_scripting():  # noqa: SIM102  (TorchScript drops the branch)
        if kernels.serves(r) and not pair_gradient.requires_grad:
            return native_totals(r, pair_gradient, pairs, atom_energy, system_index, cell.shape[0])
    gradient = pair_gradient.to(torch.float64)
    force = torch.zeros_like(positions).index_add(0, pairs[0], gradient)
    force = force.index_add(0, pairs[1], -gradient)
    if cell.shape[0] == 1:
        virial = torch.mm(r.t(), gradient).unsqueeze(0)
    else:
        outer = r.unsqueeze(2) * gradient.unsqueeze(1)
        virial = torch.zeros_like(cell).index_add(0, system_index[pairs[0]], outer)
    virial = -0.5 * (virial + virial.transpose(1, 2))
    return {"energy": energy_of(atom_energy, system_index, cell), "forces": force, "virial": virial}


def native_totals(
    r: Tensor, pair_gradient: Tensor, pairs: Tensor, atom_energy: Tensor, system_index: Tensor, systems: int
) -> Dict[str, Tensor]:
    """`totals` by the native operator."""
    energy, forces, virial = torch.ops.mdplug.sum_pairs(
        r.contiguous(),
        pair_gradient.contiguous(),
        pairs.contiguous(),
        atom_energy.contiguous(),
        system_index.contiguous(),
        systems,
    )
    return {"energy": energy, "forces": forces, "virial": virial}


def zeros_if_none(grad: Optional[Tensor], like: Tensor) -> Tensor:
    """A gradient that autograd left out because nothing depends on its input."""
    return torch.zeros_like(like) if grad is None else grad


@dataclass(frozen=True)
class Prediction:
    """What `evaluate` returns.

    Attributes:
        energy: (S,) float64 eV, total: interaction energy + atomic reference energies.
        interaction_energy: (S,) float64 eV.
        atom_energy: (N,) eV, interaction part.
        forces: (N, 3) float64 eV/A, or None.
        virial: (S, 3, 3) float64 eV, = -dE/dstrain, or None.
        stress: (S, 3, 3) float64 eV/A^3, = dE/dstrain / V; NaN where a structure has no volume; or None.
        extras: whatever else the potential returns ("charge", "member_atom_energy", ...).
    """

    energy: Tensor
    interaction_energy: Tensor
    atom_energy: Tensor
    forces: Optional[Tensor]
    virial: Optional[Tensor]
    stress: Optional[Tensor]
    extras: Dict[str, Tensor]


def check_species(numbers: Tensor, spec: Spec) -> None:
    """Refuse elements a potential has not been made for.

    Raises:
        InputError: naming the first such atom, its element and what the potential knows.
    """
    if not spec.species:
        return
    known = torch.tensor(spec.species, dtype=numbers.dtype, device=numbers.device)
    bad = ~torch.isin(numbers, known)
    if bool(bad.any()):
        from ase.data import chemical_symbols

        atom = int(bad.nonzero()[0, 0])
        raise InputError(
            f"atom {atom} is {chemical_symbols[int(numbers[atom])]}, which potential {spec.name!r} does not know; "
            f"it knows {' '.join(chemical_symbols[z] for z in spec.species)}"
        )


def head_of(model: Model, system: AtomicSystem) -> Tensor:
    """(S,) int64 level of theory: the model's choice, else the one each structure names."""
    return system.head if model.head is None else _chosen(model.head, system.n_systems, system.head.device)


@lru_cache(maxsize=64)
def _chosen(head: int, n_systems: int, device: torch.device) -> Tensor:
    """The same tensor every time, which a device need not compare."""
    with torch.inference_mode(False):
        return torch.full((n_systems,), head, dtype=torch.int64, device=device)


def reference_energy(system: AtomicSystem, spec: Spec, head: Tensor) -> Tensor:
    """(S,) float64 eV: sum of the atomic reference energies of each structure at levels of theory `head` (S,)."""
    table = torch.zeros(max(len(spec.heads), 1), 119, dtype=torch.float64)
    if spec.atomic_energies:
        from ase.data import atomic_numbers

        for h, name in enumerate(spec.heads):
            for symbol, value in spec.atomic_energies.get(name, {}).items():
                table[h, atomic_numbers[symbol]] = value
    table = table.to(system.numbers.device)
    atom = table[head[system.system_index], system.numbers]
    return torch.zeros_like(system.total_charge).index_add(0, system.system_index, atom)


def deploy(potential: Model) -> Model:
    """The callable with derivatives: a Potential is wrapped, anything that already has them is handed back."""
    return Deployed(potential) if isinstance(potential, Potential) else potential


def call(
    deployed: Model, system: AtomicSystem, pairs: Pairs, forces: bool = True, create_graph: bool = False
) -> Dict[str, Tensor]:
    """Hand a system to a deployed potential; the one place that spells out its arguments."""
    if forces and not create_graph and pairs.system is system and isinstance(deployed, Deployed) and deployed.written:
        return deployed.by_written_adjoint(
            pairs.vectors.detach(),
            system.numbers,
            system.positions,
            system.cell,
            pairs.index,
            system.system_index,
            system.total_charge,
            system.total_spin,
            head_of(deployed, system),
        )
    return deployed(
        system.numbers,
        system.positions,
        system.cell,
        system.pbc,
        pairs.index,
        pairs.shifts,
        system.system_index,
        system.total_charge,
        system.total_spin,
        head_of(deployed, system),
        forces,
        create_graph,
    )


def evaluate(
    potential: Model,
    system: AtomicSystem,
    pairs: Optional[Pairs] = None,
    *,
    forces: bool = True,
    create_graph: bool = False,
) -> Prediction:
    """Energy, forces, virial and stress of a system.

    Args:
        potential: a Potential, a Deployed one, or an exported file as `load` gives it.
        system: one or several structures.
        pairs: a pair list at (at least) the potential's cutoff; found here if None.
        forces: differentiate.
        create_graph: keep the graph for a loss on forces.

    Raises:
        InputError: an element the potential does not know.
    """
    deployed = deploy(potential)
    spec = deployed.spec
    check_species(system.numbers, spec)
    if pairs is None:
        pairs = find_pairs(system, spec.cutoff)
    out = dict(call(deployed, system, pairs, forces, create_graph))
    interaction = out.pop("energy")
    virial = out.pop("virial", None)
    return Prediction(
        energy=interaction + reference_energy(system, spec, head_of(deployed, system)),
        interaction_energy=interaction,
        atom_energy=out.pop("atom_energy"),
        forces=out.pop("forces", None),
        virial=virial,
        stress=None if virial is None else -virial / system.volume[:, None, None],
        extras=out,
    )
