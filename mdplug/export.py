"""Potentials as TorchScript files that run without mdplug's Python.

The portable form needs torch alone; the native form needs mdplug's operator library, loaded first. `forward` of both is
that of `Deployed`; their part `torchforce` is what OpenMM's TorchForce runs: positions in nm and a box in, kJ/mol out,
with the pair list found inside in plain torch.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Dict, Optional, Tuple

import torch
from torch import Tensor, nn

from mdplug import kernels
from mdplug.artifact import Exported, load, quiet_torchscript, read_spec, save_torchscript
from mdplug.deployed import Deployed, check_species
from mdplug.errors import InputError
from mdplug.pairs_torch import torch_pairs
from mdplug.potential import Model, Potential, dtype_of
from mdplug.registry import resolve
from mdplug.units import KJ_MOL_PER_EV, NM

TARGETS = ("portable", "native", "lammps")


class ForTorchForce(nn.Module):
    """A deployed potential in OpenMM's units, for atoms that `set_topology` names.

    Attributes:
        deployed: the potential with derivatives.
    """

    numbers: Tensor
    atoms: Tensor
    total_charge: Tensor
    total_spin: Tensor
    head: Tensor

    def __init__(self, deployed: Deployed):
        super().__init__()
        self.deployed = deployed
        self.cutoff = float(deployed.cutoff)
        # Attributes: TorchScript does not see module constants.
        self.angstrom_per_nm, self.kj_mol_per_ev = NM, KJ_MOL_PER_EV
        self.register_buffer("numbers", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("atoms", torch.zeros(0, dtype=torch.int64))
        self.register_buffer("total_charge", torch.zeros(1, dtype=torch.float64))
        self.register_buffer("total_spin", torch.ones(1, dtype=torch.float64))
        self.register_buffer("head", torch.zeros(1, dtype=torch.int64))

    @torch.jit.export
    def set_topology(self, numbers: Tensor, atoms: Tensor, charge: float, spin: float, head: int) -> None:
        """Say which atoms the potential acts on.

        Args:
            numbers: (n,) int64 atomic numbers. atoms: (n,) int64 their places among OpenMM's particles.
            charge: total charge, e. spin: multiplicity 2S+1. head: index of the level of theory.
        """
        self.numbers = numbers.to(self.numbers.device)
        self.atoms = atoms.to(self.atoms.device)
        self.total_charge = torch.full_like(self.total_charge, charge)
        self.total_spin = torch.full_like(self.total_spin, spin)
        self.head = torch.full_like(self.head, head)

    def forward(self, positions: Tensor, box: Optional[Tensor] = None) -> Tuple[Tensor, Tensor]:
        """What TorchForce calls.

        Args:
            positions: (P, 3) nm of all particles. box: (3, 3) nm, rows; none: not periodic.

        Returns:
            interaction energy in kJ/mol, float64; forces (P, 3) in kJ/mol/nm, zero where the potential does not act.
        """
        if self.numbers.shape[0] == 0:
            raise RuntimeError("this mdplug model has no atoms yet; call set_topology first")
        x = positions.detach().to(torch.float64) * self.angstrom_per_nm
        own = x.index_select(0, self.atoms)
        if box is None:
            cell = torch.zeros_like(x[:1]).expand(3, 3)
        else:
            cell = box.detach().to(torch.float64) * self.angstrom_per_nm
        pbc = torch.full_like(cell[0], 0.0 if box is None else 1.0).to(torch.bool)
        pairs, shifts = torch_pairs(own, cell, pbc, self.cutoff)
        out = self.deployed(
            self.numbers,
            own,
            cell.unsqueeze(0),
            pbc.unsqueeze(0),
            pairs,
            shifts,
            torch.zeros_like(self.numbers),
            self.total_charge,
            self.total_spin,
            self.head,
        )
        forces = torch.zeros_like(x).index_add(0, self.atoms, out["forces"])
        return out["energy"].sum() * self.kj_mol_per_ev, forces * (self.kj_mol_per_ev * self.angstrom_per_nm)


class WithTorchForce(nn.Module):
    """What a file holds: `forward` as `Deployed.forward`, and the form for TorchForce; one set of weights."""

    def __init__(self, deployed: Deployed):
        super().__init__()
        self.torchforce = ForTorchForce(deployed)

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
        """See `Deployed.forward`."""
        return self.torchforce.deployed(
            numbers,
            positions,
            cell,
            pbc,
            pairs,
            shifts,
            system_index,
            total_charge,
            total_spin,
            head,
            forces,
            create_graph,
        )


def portable(potential: Potential) -> Exported:
    """The portable form in memory; the potential itself is left as it is."""
    return _compiled(potential, potential.without_kernels(), "portable")


def native(potential: Potential) -> Exported:
    """The form on mdplug's native operators, its adjoint written out, in memory; the potential is left as it is.

    Raises:
        InputError: the operators are not here, or the potential has no such form.
    """
    reason = kernels.load()
    if reason:
        raise InputError(f"a file on mdplug's native operators cannot be made here ({reason}); use --for portable")
    fast = potential.with_kernels(False)  # what was loaded has its kernels already
    if not fast.has_written_adjoint:
        raise InputError(f"{potential.spec.name!r} has no form on the native operators; use --for portable")
    return _compiled(potential, fast.native(), "native")


def _compiled(potential: Potential, form: Potential, target: str) -> Exported:
    own = copy.deepcopy(form).eval().requires_grad_(False)
    for part in own.modules():
        if isinstance(part, Potential):
            part.alone = True  # one process: the operator that crosses domain borders is not compiled in
    spec = replace(form.spec, dtype=str(dtype_of(form)).removeprefix("torch."))
    with quiet_torchscript():
        script = torch.jit.script(WithTorchForce(Deployed(own)).eval())
    exported = Exported(script, spec, target)
    exported.head = potential.head
    return exported


def export(
    potential: Potential | str | Path,
    out: str | Path,
    target: str = "portable",
    *,
    dtype: str | None = None,
    radial: str | None = None,
    species: Sequence[int] | None = None,
) -> Path:
    """Write a potential as TorchScript; `mdplug.load` reads it, and so does torch alone.

    Args:
        potential: in memory, or a model file, or the name of a shipped one.
        out: by habit NAME.pt; written atomically.
        target: "portable": torch alone is needed to run it. "native": mdplug's operator library, too; several times
            faster on the CPU.
        dtype: "float32" or "float64"; None: as trained.
        radial: "exact" or "tables"; None: exact in float64, tables in float32 (where an architecture has them).
        species: atomic numbers that the file is for, of those the potential knows; None: all of them.

    Raises:
        InputError: an unknown target or one that this version does not write; a file that is an export already;
            dtype or radial for a potential in memory; no native operators, or none for this potential; elements that
            it does not know, or too many for a native file.
    """
    if target not in TARGETS:
        raise InputError(f"unknown export target {target!r}; choose one of: {', '.join(TARGETS)}")
    if target == "lammps":
        raise InputError(f"export target {target!r} is not in this version of mdplug; use portable")
    given = _loaded(potential, dtype, radial)
    if species is not None:
        given = given.for_species(species)
    return save_torchscript(native(given) if target == "native" else portable(given), out)


def _loaded(potential: Potential | str | Path, dtype: str | None, radial: str | None) -> Potential:
    if isinstance(potential, Potential):
        if dtype is not None or radial is not None:
            raise InputError("dtype and radial are for model files; a potential in memory is exported as it is")
        return potential
    if isinstance(potential, Model):
        raise InputError(f"{potential.spec.name!r} is an exported model already; export its safetensors file")
    path = resolve(potential)
    # Every level of theory stays in the file: `head` is an argument of the compiled form.
    first = read_spec(path).heads[0] if path.is_file() else None
    model = load(path, dtype=dtype, radial=radial, head=first)
    if not isinstance(model, Potential):
        raise InputError(f"{path} is an exported model already; export its safetensors file")
    model.head = None
    return model


def for_torchforce(
    model: Model | str | Path,
    numbers: Sequence[int],
    *,
    atoms: Sequence[int] | None = None,
    charge: float = 0.0,
    spin: float = 1.0,
    head: str | None = None,
) -> torch.jit.ScriptModule:
    """A module for OpenMM's TorchForce: `forward(positions[, box])` -> (energy, forces), see `ForTorchForce`.

    The force needs `setOutputsForces(True)`, and the box is handed over if it uses periodic boundary conditions.

    Args:
        model: a Potential, what `load` gives, or a model file (safetensors or portable).
        numbers: (n,) atomic numbers of the atoms it acts on.
        atoms: (n,) their places among OpenMM's particles; None: 0 ... n-1.
        charge: total charge of these atoms, e.
        spin: multiplicity 2S+1 of these atoms.
        head: level of theory by name; None: the model's own choice.

    Raises:
        InputError: no atoms, an element or a head that the model does not know, `atoms` that do not fit `numbers`.
    """
    if not isinstance(model, Model):
        model = load(model, head=head)
    z = torch.as_tensor(list(numbers), dtype=torch.int64)
    places = torch.arange(len(z)) if atoms is None else torch.as_tensor(list(atoms), dtype=torch.int64)
    if len(z) == 0:
        raise InputError("no atoms to act on; give numbers with at least one atomic number")
    if places.shape != z.shape or len(places.unique()) != len(places) or int(places.min()) < 0:
        raise InputError(f"atoms must be {len(z)} different indices, one for each of numbers")
    check_species(z, model.spec)
    index = _head_index(model, head)
    exported = model if isinstance(model, Exported) else portable(_potential(model))
    with quiet_torchscript():
        script = copy.deepcopy(exported.script.torchforce)
    script.set_topology(z, places, float(charge), float(spin), index)
    return script


def _potential(model: Model) -> Potential:
    inner = getattr(model, "potential", model)  # Deployed holds one
    if not isinstance(inner, Potential):
        raise InputError(f"potential must be a Potential or a model file, got {type(model).__name__}; use mdplug.load")
    return inner


def _head_index(model: Model, head: str | None) -> int:
    heads: Tuple[str, ...] = model.spec.heads
    if head is None:
        if model.head is None and len(heads) > 1:
            raise InputError(f"{model.spec.name!r} has several levels of theory; name one: {', '.join(heads)}")
        return model.head or 0
    if head not in heads:
        raise InputError(f"{model.spec.name!r} has no head {head!r}; it has: {', '.join(heads)}")
    return heads.index(head)
