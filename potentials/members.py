"""Members that share one body: an ensemble at the cost of one model.

A body (any potential that gives "features") is evaluated once; each member adds a linear function of the features to
its atom energies. The mean of the members is the body, to the last bit of its forces: only their differences are new.
Ref.: last-layer ensembles, F. Bigi et al., Mach. Learn.: Sci. Technol. 5, 045018 (2024); A. Kellner and M. Ceriotti,
Mach. Learn.: Sci. Technol. 5, 035006 (2024).
"""

from dataclasses import replace
from typing import Any, Dict, List, Tuple

import torch
from torch import Tensor, nn

from mdplug.compose import Composed, joint_spec, within
from mdplug.errors import InputError
from mdplug.potential import Potential, Pull, dtype_of
from mdplug.spec import Spec


class SharedMembers(Composed):
    """A body and M linear readouts of its features.

    Args:
        spec: config {"parts": [spec of the body], "members": M, "features": F}.
        parts: the body alone.

    Attributes:
        weight: (M, F) eV, of the features less `centre` times `scale`; offset: (M, Z) eV, of each element.
        whiten: (Z, F, F) what makes features of an element, less `centre_of` (Z, F), uncorrelated with unit variance:
            "feature_distance" is the length of the result over sqrt(F), about 1 inside the training data.
    """

    row_of: Tensor
    centre: Tensor
    scale: Tensor
    centre_of: Tensor
    whiten: Tensor

    def __init__(self, spec: Spec, parts: List[Potential]):
        super().__init__(spec, parts)
        members, width, dtype = int(spec.config["members"]), int(spec.config["features"]), dtype_of(parts[0])
        n_kinds = len(spec.species)
        row_of = torch.zeros(119, dtype=torch.int64)
        row_of[list(spec.species)] = torch.arange(n_kinds)
        self.register_buffer("row_of", row_of, persistent=False)
        self.weight = nn.Parameter(torch.zeros(members, width, dtype=dtype))
        self.offset = nn.Parameter(torch.zeros(members, n_kinds, dtype=dtype))
        self.register_buffer("centre", torch.zeros(width, dtype=dtype))
        self.register_buffer("scale", torch.ones(width, dtype=dtype))
        self.register_buffer("centre_of", torch.zeros(n_kinds, width, dtype=dtype))
        self.register_buffer("whiten", torch.eye(width, dtype=dtype).repeat(n_kinds, 1, 1))

    @classmethod
    def of(cls, body: Potential, members: int, width: int) -> "SharedMembers":
        """M members on a body whose features are `width` wide; their weights are zero.

        Raises:
            InputError: a body without features or without a list of elements; fewer than two members.
        """
        require_features(body)
        if members < 2:
            raise InputError(f"an ensemble needs two members at least, not {members}")
        outputs = ("atom_energy", "features", "member_atom_energy", "feature_distance")
        spec = joint_spec("members", cls, [body], outputs)
        config = {**spec.config, "members": members, "features": width}
        return cls(replace(spec, name=body.spec.name, config=config), [body])

    def _of(self, parts: List[Potential]) -> "SharedMembers":
        made = SharedMembers(self.spec, parts).to(self.weight)
        own = {key: value for key, value in self.state_dict().items() if not key.startswith("parts.")}
        made.load_state_dict(own, strict=False)
        made.head, made.origin = self.head, self.origin
        return made.requires_grad_(self.weight.requires_grad).train(self.training)

    def readouts(self, numbers: Tensor, atom_energy: Tensor, features: Tensor) -> Dict[str, Tensor]:
        """Everything that follows from the body's atom energies (n,) and features (n, F) of atoms `numbers` (n,)."""
        row = self.row_of[numbers]
        weight = self.weight - self.weight.mean(dim=0)
        offset = self.offset - self.offset.mean(dim=0)
        apart = torch.mm(weight, ((features - self.centre) * self.scale).t()) + offset[:, row]
        distance = torch.zeros_like(atom_energy)
        for kind in range(self.whiten.shape[0]):
            own = (row == kind).nonzero().squeeze(1)
            if own.shape[0] > 0:
                white = torch.mm(features[own] - self.centre_of[kind], self.whiten[kind])
                distance = distance.index_add(0, own, white.square().mean(dim=1).clamp_min(1e-12).sqrt())
        return {
            "atom_energy": atom_energy,
            "features": features,
            "member_atom_energy": atom_energy + apart,
            "feature_distance": distance,
        }

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
        out: Dict[str, Tensor] = {}
        for body in self.parts:  # one; TorchScript does not index module lists
            p, v = within(body.cutoff, pairs, vectors)
            out = body.local(numbers, p, v, n_owned, system_index, total_charge, total_spin, head)
        return self.readouts(numbers[:n_owned], out["atom_energy"], out["features"])

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
        """See `Potential.local_with_gradient`."""
        out: Dict[str, Tensor] = {}
        for body in self.parts:
            out = body.local_with_gradient(
                numbers, pairs, vectors, n_owned, system_index, total_charge, total_spin, head
            )
        with torch.no_grad():
            found = self.readouts(numbers[:n_owned], out["atom_energy"], out["features"])
        found["pair_gradient"] = out["pair_gradient"]
        return found

    def native(self) -> Potential:
        """See `Potential.native`."""
        return self._of([part.native() for part in self.parts])

    @torch.jit.unused
    def local_with_pull(self, *arguments: Any) -> Tuple[Dict[str, Tensor], Pull]:
        """See `Potential.local_with_pull`."""
        out, pull_body = self.parts[0].local_with_pull(*arguments)
        numbers = arguments[0][: arguments[3]]
        with torch.enable_grad():
            leaves = [out[key].detach().requires_grad_(True) for key in ("atom_energy", "features")]
            found = self.readouts(numbers, leaves[0], leaves[1])

        def pull(cotangents: Dict[str, Tensor]) -> Tensor:
            with torch.enable_grad():
                products = [(found[key] * cotangent).sum() for key, cotangent in cotangents.items()]
                back = torch.autograd.grad(products, leaves, retain_graph=True, materialize_grads=True)
            return pull_body({"atom_energy": back[0], "features": back[1]})

        return {key: value.detach() for key, value in found.items()}, pull

    @torch.jit.unused
    def scales(self) -> Dict[str, Any]:
        """See `Potential.scales`."""
        return {f"parts.0.{key}": value for key, value in self.parts[0].scales().items()}


def require_features(body: Potential) -> None:
    """Refuse a potential that no members can share.

    Raises:
        InputError: it has no features, or no list of elements.
    """
    if "features" not in body.spec.outputs or not body.spec.species:
        raise InputError(
            f"potential {body.spec.name!r} gives no features, or is for any element; members on one body need a "
            "model such as MACE (make an ensemble of several models instead)"
        )
