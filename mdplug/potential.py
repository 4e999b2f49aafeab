"""The contract: a potential is one function of a state.

An architecture writes `local` (and, if long-ranged, `far`); differentiation is written once, in `Deployed`
(mdplug/deployed.py). Everything here compiles in TorchScript.
"""

from typing import Any, Callable, Dict, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from mdplug.errors import InputError
from mdplug.exchange import exchange
from mdplug.spec import Spec

Pull = Callable[[Dict[str, Tensor]], Tensor]


class Model(nn.Module):
    """Anything that can be evaluated: a Potential, a Deployed one, a file that `export` wrote.

    Attributes:
        spec: what the model is (see `Spec`).
        head: index of the level of theory to use; None: the one each structure names.
        cutoff: A.
        origin: how `load` made it ({"path", "device", "dtype", "head", "radial"}); None: built in memory.
    """

    head: Optional[int]
    cutoff: float

    def __init__(self, spec: Spec):
        super().__init__()
        self.spec = spec  # not annotated above: TorchScript would try to compile the class
        self.head = None
        self.origin: Optional[Dict[str, Any]] = None
        self.cutoff = float(spec.cutoff)


class Potential(Model):
    """An interatomic potential: subclass it, call `super().__init__(spec)`, write `local`.

    Attributes:
        alone: compiled for one process: `exchange` and its operator are left out of the file.
        has_written_adjoint: `local_with_gradient` is there, and `Deployed` takes it instead of autograd.
    """

    __constants__ = ["alone", "has_written_adjoint"]  # inherited, which Final annotations are not
    has_written_adjoint = False

    def __init__(self, spec: Spec):
        super().__init__(spec)
        self.alone = False

    @classmethod
    def from_spec(cls, spec: Spec) -> "Potential":
        """An untrained module of this architecture, built from `spec.config`; weights are loaded into it."""
        return cls(spec)

    @classmethod
    def untrained(cls, spec: Spec, statistics: Dict[str, float], generator: torch.Generator) -> "Potential":
        """A potential to train: random weights, normalised by the statistics of the labels.

        Args:
            spec: what to build.
            statistics: "mean_neighbours", "rms_force" (eV/A), "mean_interaction_energy" (eV/atom).
            generator: source of the random weights.
        """
        return cls.from_spec(spec)

    def scales(self) -> Dict[str, Any]:
        """{parameter: typical size of its entries} where far from one; an optimiser steps relative to it."""
        return {}

    def exchange(self, features: Tensor, n_owned: int) -> Tensor:
        """Ghost rows of (N, width) features filled from their owners; call it between message-passing layers."""
        if self.alone:
            return features
        else:  # noqa: RET505  (TorchScript drops the branch that a constant rules out)
            return exchange(features, n_owned)

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
        """Short-range part.

        Args:
            numbers: (N,) int64 atomic numbers; rows >= n_owned are ghosts.
            pairs: (2, E) int64, receiver i (< n_owned) and sender j, sorted by receiver.
            vectors: (E, 3) A, r_ij = r_j - r_i + shift, in the model's dtype.
            n_owned: atoms whose energy is asked for.
            system_index: (N,) int64.
            total_charge: (S,) e, in the model's dtype.
            total_spin: (S,) multiplicity 2S+1, in the model's dtype.
            head: (S,) int64.

        Returns:
            "atom_energy" (n_owned,) eV, the interaction energy without atomic reference energies; may add
            "charge" (n_owned,) e, "member_atom_energy" (M, n_owned) eV, "features" (n_owned, K).
        """
        raise NotImplementedError("local")

    @torch.jit.unused
    def local_with_gradient(
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
        """As `local`, with "pair_gradient" (E, 3) eV/A added: d(sum of atom energies)/d(vectors), without a tape."""
        raise NotImplementedError("local_with_gradient")

    @torch.jit.unused
    def local_with_pull(
        self,
        numbers: Tensor,
        pairs: Tensor,
        vectors: Tensor,
        n_owned: int,
        system_index: Tensor,
        total_charge: Tensor,
        total_spin: Tensor,
        head: Tensor,
    ) -> Tuple[Dict[str, Tensor], Pull]:
        """`local`, and the function that carries cotangents of its outputs back to the vectors.

        It takes {output: cotangent, of the output's shape}, those left out being zero, gives (E, 3), and may be called
        again: forces of a member, of a bias, or of a random mixture of members are one call each.
        """
        with torch.enable_grad():
            leaf = vectors.detach().clone().requires_grad_(True)
            out = self.local(numbers, pairs, leaf, n_owned, system_index, total_charge, total_spin, head)

        def pull(cotangents: Dict[str, Tensor]) -> Tensor:
            with torch.enable_grad():
                products = [(out[k] * c).sum() for k, c in cotangents.items() if out[k].requires_grad]
                if not products:
                    return torch.zeros_like(vectors)
                found = torch.autograd.grad(products, [leaf], retain_graph=True, allow_unused=True)[0]
            return torch.zeros_like(vectors) if found is None else found

        return {key: value.detach() for key, value in out.items()}, pull

    def far(
        self,
        near: Dict[str, Tensor],
        positions: Tensor,
        cell: Tensor,
        pbc: Tensor,
        system_index: Tensor,
        total_charge: Tensor,
    ) -> Dict[str, Tensor]:
        """Long-range part: takes what `local` returned, returns it with the energy of far interactions added.

        Args:
            near: result of `local`.
            positions: (N, 3) A. cell: (S, 3, 3) A. pbc: (S, 3) bool. system_index: (N,). total_charge: (S,) e.
        """
        return near

    def with_tables(self) -> "Potential":
        """A copy whose radial functions are spline tables, where an architecture has them; else itself."""
        return self

    def with_kernels(self, tables: bool) -> "Potential":
        """The fastest form for inference on the device it is on; without operators for that, plain torch.

        Args:
            tables: radial functions as spline tables (see `with_tables`); False: exact.
        """
        return self.with_tables() if tables else self

    def without_kernels(self) -> "Potential":
        """The form in plain torch operators, which compiles: itself, unless `with_kernels` made it."""
        return self

    def for_species(self, species: Sequence[int]) -> "Potential":
        """A copy that knows some of the elements, where an architecture can be made smaller so.

        Args:
            species: atomic numbers.

        Raises:
            InputError: an architecture that cannot, or an element that it does not know.
        """
        raise InputError(f"{self.spec.name!r} cannot be made for fewer elements; leave species out")

    def native(self) -> "Potential":
        """The form of `with_kernels` that compiles, for files: itself, where it has no operators of its own.

        Raises:
            InputError: its written adjoint does not compile, or it knows more elements than such a file holds.
        """
        if self.has_written_adjoint:
            raise InputError(f"{self.spec.name!r} has no form on the native operators; use --for portable")
        return self

    def with_exact_radial(self) -> "Potential":
        """The form with exact radial functions: itself, unless `with_tables` or `with_kernels` made it.

        Raises:
            InputError: the weights behind the tables are not there.
        """
        return self


def dtype_of(potential: Model) -> torch.dtype:
    """The dtype a potential computes in: that of its first floating tensor, else its spec's."""
    for tensor in list(potential.parameters()) + list(potential.buffers()):
        if tensor.is_floating_point():
            return tensor.dtype
    return getattr(torch, potential.spec.dtype)


def device_of(model: nn.Module) -> torch.device:
    """The device a model computes on: that of its first tensor, else the CPU."""
    for tensor in list(model.parameters()) + list(model.buffers()):
        return tensor.device
    return torch.device("cpu")
