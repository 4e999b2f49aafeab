"""Potentials made of potentials; each is itself a Potential, so that it scripts, saves and runs like one."""

import json
from typing import Any, Dict, Iterable, List, Tuple

import torch
from torch import Tensor, nn

from mdplug.errors import InputError
from mdplug.potential import Potential, Pull
from mdplug.registry import architecture
from mdplug.spec import Spec


def inside(cutoff: float, vectors: Tensor) -> Tensor:
    """Places of the pairs that are closer than `cutoff` (A)."""
    return (vectors.detach().square().sum(dim=1) < cutoff * cutoff).nonzero().squeeze(1)


def within(cutoff: float, pairs: Tensor, vectors: Tensor) -> Tuple[Tensor, Tensor]:
    """The pairs of a list that are closer than `cutoff` (A)."""
    keep = inside(cutoff, vectors)
    return pairs[:, keep], vectors[keep]


def joint_spec(name: str, cls: type, parts: List[Potential], outputs: Tuple[str, ...]) -> Spec:
    specs = [p.spec for p in parts]
    if not specs:
        raise InputError(f"{name} needs at least one potential")
    if any(s.long_range for s in specs):
        raise InputError(f"{name} takes short-range potentials only; {specs[0].name!r} has a long-range part")
    first = specs[0]
    for s in specs[1:]:
        if s.heads != first.heads:
            raise InputError(
                f"{name}: {s.name!r} has heads {s.heads}, {first.name!r} has {first.heads}; choose one each"
            )
    limited = [set(s.species) for s in specs if s.species]
    species = sorted(set.intersection(*limited)) if limited else []
    if limited and not species:
        raise InputError(f"{name}: its potentials have no element in common")
    return Spec(
        name=name,
        architecture=f"{cls.__module__}:{cls.__name__}",
        config={"parts": [json.loads(s.to_json()) for s in specs]},
        cutoff=max(s.cutoff for s in specs),
        layers=max(s.layers for s in specs),
        exchange_width=max(s.exchange_width for s in specs),
        species=tuple(species),
        dtype=first.dtype,
        outputs=outputs,
        heads=first.heads,
        level_of_theory=first.level_of_theory,
        conservative=all(s.conservative for s in specs),
        atomic_energies=first.atomic_energies,
        licence="; ".join(sorted({s.licence for s in specs})),
        cite=tuple(dict.fromkeys(c for s in specs for c in s.cite)),
        provenance={"parts": [s.provenance for s in specs]},
    )


def _rebuild(spec: Spec) -> List[Potential]:
    parts = [Spec.from_json(json.dumps(one), spec.name) for one in spec.config["parts"]]
    return [architecture(one.architecture, spec.name).from_spec(one) for one in parts]


class Composed(Potential):
    """Shared by Sum and Ensemble: parts, each with its own cutoff."""

    def __init__(self, spec: Spec, parts: List[Potential]):
        super().__init__(spec)
        self.parts: Any = nn.ModuleList(parts)
        self.has_written_adjoint = any(part.has_written_adjoint for part in parts)

    @classmethod
    def from_spec(cls, spec: Spec) -> "Composed":
        """See `Potential.from_spec`."""
        return cls(spec, _rebuild(spec))

    def _of(self, parts: List[Potential]) -> "Composed":
        made = type(self)(self.spec, parts)
        made.head, made.origin = self.head, self.origin
        return made

    def with_tables(self) -> "Composed":
        """See `Potential.with_tables`."""
        return self._of([p.with_tables() for p in self.parts])

    def with_kernels(self, tables: bool) -> "Composed":
        """See `Potential.with_kernels`."""
        return self._of([p.with_kernels(tables) for p in self.parts])

    def without_kernels(self) -> "Composed":
        """See `Potential.without_kernels`."""
        return self._of([p.without_kernels() for p in self.parts])

    def with_exact_radial(self) -> "Composed":
        """See `Potential.with_exact_radial`."""
        return self._of([p.with_exact_radial() for p in self.parts])

    def part_energies(
        self,
        numbers: Tensor,
        pairs: Tensor,
        vectors: Tensor,
        n_owned: int,
        system_index: Tensor,
        total_charge: Tensor,
        total_spin: Tensor,
        head: Tensor,
    ) -> Tensor:
        """(M, n_owned) eV, the atom energies of each part."""
        energies: List[Tensor] = []
        for part in self.parts:
            p, v = within(part.cutoff, pairs, vectors)
            out = part.local(numbers, p, v, n_owned, system_index, total_charge, total_spin, head)
            energies.append(out["atom_energy"])
        return torch.stack(energies)

    @torch.jit.unused
    def part_gradients(self, numbers: Tensor, pairs: Tensor, vectors: Tensor, *rest: Any) -> Tuple[Tensor, Tensor]:
        """`part_energies`, and (E, 3) eV/A the gradient of their sum; arguments as there."""
        energies: List[Tensor] = []
        total = torch.zeros_like(vectors)
        for part in self.parts:
            keep = inside(part.cutoff, vectors)
            p, v = pairs[:, keep], vectors[keep]
            if part.has_written_adjoint:
                out = part.local_with_gradient(numbers, p, v, *rest)
                gradient = out["pair_gradient"]
            else:
                with torch.enable_grad():
                    out = part.local(numbers, p, v.requires_grad_(True), *rest)
                    (gradient,) = torch.autograd.grad(out["atom_energy"].sum(), v, allow_unused=True)
            energies.append(out["atom_energy"].detach())
            if gradient is not None:
                total.index_add_(0, keep, gradient)
        return torch.stack(energies), total

    @torch.jit.unused
    def part_pulls(self, numbers: Tensor, pairs: Tensor, vectors: Tensor, *rest: Any) -> Tuple[Tensor, Any]:
        """`part_energies`, and the function from their cotangents (M, n_owned) to that of the vectors (E, 3)."""
        energies: List[Tensor] = []
        pulls: List[Tuple[Tensor, Pull]] = []
        for part in self.parts:
            keep = inside(part.cutoff, vectors)
            out, pull = part.local_with_pull(numbers, pairs[:, keep], vectors[keep], *rest)
            energies.append(out["atom_energy"])
            pulls.append((keep, pull))

        def pull_all(cotangents: Tensor) -> Tensor:
            total = torch.zeros_like(vectors)
            for (keep, one), cotangent in zip(pulls, cotangents, strict=True):
                if bool(cotangent.any()):
                    total.index_add_(0, keep, one({"atom_energy": cotangent}))
            return total

        return torch.stack(energies), pull_all


class Sum(Composed):
    """E = sum of its parts; reference energies and heads are those of the first."""

    @classmethod
    def of(cls, parts: Iterable[Potential]) -> "Sum":
        """Compose.

        Raises:
            InputError: long-range parts, different heads, or no element in common.
        """
        given = list(parts)
        return cls(joint_spec("sum", cls, given, ("atom_energy",)), given)

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
        """See `Potential.local`."""
        energies = self.part_energies(numbers, pairs, vectors, n_owned, system_index, total_charge, total_spin, head)
        return {"atom_energy": energies.sum(dim=0)}

    @torch.jit.unused
    def local_with_gradient(self, *arguments: Any) -> Dict[str, Tensor]:
        """See `Potential.local_with_gradient`."""
        energies, gradient = self.part_gradients(*arguments)
        return {"atom_energy": energies.sum(dim=0), "pair_gradient": gradient}

    @torch.jit.unused
    def local_with_pull(self, *arguments: Any) -> Tuple[Dict[str, Tensor], Pull]:
        """See `Potential.local_with_pull`."""
        energies, pull = self.part_pulls(*arguments)

        def pull_sum(cotangents: Dict[str, Tensor]) -> Tensor:
            return pull(cotangents["atom_energy"].expand_as(energies))

        return {"atom_energy": energies.sum(dim=0)}, pull_sum


class Ensemble(Composed):
    """Mean of its members, whose energies are handed on as "member_atom_energy" (M, n_owned)."""

    @classmethod
    def of(cls, members: Iterable[Potential]) -> "Ensemble":
        """Compose; errors as for `Sum.of`."""
        given = list(members)
        return cls(joint_spec("ensemble", cls, given, ("atom_energy", "member_atom_energy")), given)

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
        """See `Potential.local`."""
        energies = self.part_energies(numbers, pairs, vectors, n_owned, system_index, total_charge, total_spin, head)
        return {"atom_energy": energies.mean(dim=0), "member_atom_energy": energies}

    @torch.jit.unused
    def local_with_gradient(self, *arguments: Any) -> Dict[str, Tensor]:
        """See `Potential.local_with_gradient`."""
        energies, gradient = self.part_gradients(*arguments)
        mean = {"atom_energy": energies.mean(dim=0), "pair_gradient": gradient / len(energies)}
        return {**mean, "member_atom_energy": energies}

    @torch.jit.unused
    def local_with_pull(self, *arguments: Any) -> Tuple[Dict[str, Tensor], Pull]:
        """See `Potential.local_with_pull`."""
        energies, pull = self.part_pulls(*arguments)

        def pull_members(cotangents: Dict[str, Tensor]) -> Tensor:
            if list(cotangents) == ["atom_energy"]:  # as `local_with_gradient`, to the last bit
                return pull(cotangents["atom_energy"].expand_as(energies)) / len(energies)
            each = cotangents.get("member_atom_energy", torch.zeros_like(energies))
            if "atom_energy" in cotangents:
                each = each + cotangents["atom_energy"] / len(energies)
            return pull(each)

        return {"atom_energy": energies.mean(dim=0), "member_atom_energy": energies}, pull_members
