"""How far the members of a potential disagree: on energies, forces and virial."""

from dataclasses import dataclass
from typing import Callable, Dict, List, Optional, Tuple

import torch
from torch import Tensor

from mdplug.deployed import Deployed, call, deploy, energy_of, head_of, totals
from mdplug.errors import InputError
from mdplug.pairs import Pairs
from mdplug.potential import Model, Potential
from mdplug.system import AtomicSystem

Pulled = Callable[[Dict[str, Tensor]], Tuple[Tensor, Tensor]]  # cotangents -> forces (N, 3) eV/A, virial (S, 3, 3) eV


@dataclass(frozen=True)
class Uncertainty:
    """Standard deviations between members (ddof = 1), as they are: `mdplug calibrate` says what they are worth.

    Attributes:
        members: how many.
        energy: (S,) float64 eV of the total energy. atom_energy: (N,) eV.
        member_energy: (M, S) float64 eV, interaction energies.
        forces: (N,) eV/A, the root of the sum of the variances of the three components; None: not asked for.
        virial: (S, 3, 3) float64 eV, or None.
        distance: (N,) "feature_distance" of the potential, about 1 inside its training data; or None.
        bias: (S,) float64 eV, what a `Biased` potential adds to the energy; or None.
    """

    members: int
    energy: Tensor
    atom_energy: Tensor
    member_energy: Tensor
    forces: Optional[Tensor] = None
    virial: Optional[Tensor] = None
    distance: Optional[Tensor] = None
    bias: Optional[Tensor] = None


def has_members(model: Model) -> bool:
    """Whether a potential has members to compare."""
    return "member_atom_energy" in model.spec.outputs


def has_forces_of_members(model: Model) -> bool:
    """Whether members can be compared by their forces too: not those of an exported file."""
    return has_members(model) and not model.spec.long_range and isinstance(model, Potential | Deployed)


def of_energies(out: Dict[str, Tensor], system_index: Tensor, n_structures: int) -> Uncertainty:
    """From what an evaluation returned, at no cost.

    Args:
        out: with "member_atom_energy" (M, N) eV, and whatever of `call_with_sigma`. system_index: (N,).
    """
    members = out["member_atom_energy"]
    energy = members.new_zeros((members.shape[0], n_structures), dtype=torch.float64)
    energy.index_add_(1, system_index, members.to(torch.float64))
    bias = out.get("bias_energy")
    if bias is not None:
        bias = energy.new_zeros(n_structures).index_add_(0, system_index, bias.to(torch.float64))
    return Uncertainty(
        members.shape[0],
        energy.std(dim=0),
        members.std(dim=0),
        energy,
        out.get("forces_sigma"),
        out.get("virial_sigma"),
        out.get("feature_distance"),
        bias,
    )


def mixtures(members: int, probes: Optional[int], generator: Optional[torch.Generator] = None) -> Tensor:
    """(m, M) weights: the mean over m of the squares of what they make of members' values estimates the variance.

    The rows are random orthonormal vectors among those that sum to zero; z . x squared is the variance (ddof = 1) on
    average, and the mean over all M - 1 rows is it exactly.

    Args:
        members: M. probes: m; None: M - 1, exact.
    """
    most = members - 1
    m = most if probes is None else min(probes, most)
    # Orthonormal basis of what sums to zero, turned at random.
    centred = torch.eye(members, dtype=torch.float64) - 1.0 / members
    basis = torch.linalg.qr(centred[:, :most]).Q
    turn = torch.linalg.qr(torch.randn(most, most, dtype=torch.float64, generator=generator)).Q
    return (basis @ turn[:, :m]).t().contiguous()


def linearised(model: Model, system: AtomicSystem, pairs: Pairs) -> Tuple[Dict[str, Tensor], Pulled]:
    """An evaluation without derivatives, and what takes any cotangents of its outputs to forces and virial.

    Raises:
        InputError: an exported file, or a potential with a long-range part.
    """
    deployed = deploy(model)
    if not isinstance(deployed, Deployed) or deployed.long_range:
        raise InputError(
            f"uncertainty of forces needs a model file (.safetensors) without a long-range part; {model.spec.name!r} "
            "is not one"
        )
    dtype, n = deployed.dtype_of.dtype, system.numbers.shape[0]
    r = pairs.vectors.detach()
    out, pull = deployed.potential.local_with_pull(
        system.numbers, pairs.index, r.to(dtype), n, system.system_index,
        system.total_charge.to(dtype), system.total_spin.to(dtype), head_of(deployed, system),
    )  # fmt: skip

    def pulled(cotangents: Dict[str, Tensor]) -> Tuple[Tensor, Tensor]:
        gradient = pull(cotangents)
        found = totals(r, gradient, pairs.index, out["atom_energy"], system.system_index, system.positions, system.cell)
        return found["forces"], found["virial"]

    return out, pulled


def _sigma(out: Dict[str, Tensor], pulled: Pulled, weights: Tensor) -> Dict[str, Tensor]:
    """ "forces_sigma" and "virial_sigma" from mixtures of members, (m, M)."""
    members = out["member_atom_energy"]
    squares: List[Tensor] = []
    virials: List[Tensor] = []
    for z in weights.to(members):
        forces, virial = pulled({"member_atom_energy": z.unsqueeze(1).expand_as(members)})
        squares.append(forces.square().sum(dim=1))
        virials.append(virial.square())
    return {
        "forces_sigma": torch.stack(squares).mean(dim=0).sqrt(),
        "virial_sigma": torch.stack(virials).mean(dim=0).sqrt(),
    }


def call_with_sigma(
    deployed: Model, system: AtomicSystem, pairs: Pairs, probes: Optional[int] = None, seed: int = 0
) -> Dict[str, Tensor]:
    """What `call` gives with forces, to the last bit, and the disagreement on forces and virial.

    With a written adjoint both come from one forward pass: m mixtures cost m adjoints, nothing else.

    Args:
        deployed: with members (see `has_members`). probes: m; None: M - 1, exact. seed: of the mixtures.

    Returns:
        as `call`, and "forces_sigma" (N,) float64 eV/A, "virial_sigma" (S, 3, 3) float64 eV.

    Raises:
        InputError: an exported file, or a long-range part.
    """
    out, pulled = linearised(deployed, system, pairs)
    if isinstance(deployed, Deployed) and deployed.written:
        result = dict(out)
        result["energy"] = energy_of(out["atom_energy"], system.system_index, system.cell)
        result["forces"], result["virial"] = pulled({"atom_energy": torch.ones_like(out["atom_energy"])})
    else:  # its vectors come from another place, and could differ in the last bit
        result = dict(call(deployed, system, pairs))
    weights = mixtures(out["member_atom_energy"].shape[0], probes, torch.Generator().manual_seed(seed))
    return {**result, **_sigma(out, pulled, weights)}


def uncertainty(
    model: Model,
    system: AtomicSystem,
    pairs: Pairs,
    *,
    probes: Optional[int] = None,
    generator: Optional[torch.Generator] = None,
) -> Uncertainty:
    """Disagreement of the members on energies, forces and virial of a system.

    Args:
        probes: random mixtures of members to differentiate, each at the cost of one set of forces; None: M - 1, which
            is exact.
        generator: of the mixtures; the default repeats itself.

    Raises:
        InputError: a potential without members, an exported file, or a long-range part.
    """
    if not has_members(model):
        raise InputError(f"potential {model.spec.name!r} has no members to disagree; make an ensemble first")
    out, pulled = linearised(model, system, pairs)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    weights = mixtures(out["member_atom_energy"].shape[0], probes, generator)
    return of_energies({**out, **_sigma(out, pulled, weights)}, system.system_index, system.cell.shape[0])
