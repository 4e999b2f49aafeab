"""MACE's message-passing layers: messages, normalisation, product and skip, with all factors inside the weights.

Features are stored component-major, ((L+1)^2, atoms, channels), so that every linear map is one matrix product.
Kinds: "A" plain, "R" residual, "D" density-normalised, "DR" both, "NL" non-linear (names of upstream in the notes of
each class). Source: Batatia et al. (arXiv 2206.07697, 2401.00096) and the public mace-torch 0.3 checkpoints.
"""

import math
from typing import Any, Dict, Final, List

import torch
from torch import Tensor, nn
from torch.nn import functional

from mdplug.potentials.blocks.activations import ACTIVATION_NORM
from mdplug.potentials.blocks.contraction import SymmetricContraction
from mdplug.potentials.blocks.convolution import (
    Graph,
    Messages,
    density_trick,
    neighbour_sum,
    pad,
    per_irrep,
    per_species,
    split_irreps,
)

KINDS = ("A", "R", "D", "DR", "NL")


def _weight(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*shape, dtype=dtype))


class Messenger(nn.Module):
    """From neighbours to the ((l_max+1)^2, n, K) features that the product takes: kinds A, R, D, DR.

    Args:
        kind: see above. l_in: of the sender features. l_max: of the harmonics. channels: K. edge_channels: k.
        n_species: S. n_radial: radial features b.
        by_species: sender features depend on the element alone, so that the neighbour density suffices.
    """

    by_species: Final[bool]
    has_density: Final[bool]
    has_skip: Final[bool]
    n_radial: int

    def __init__(
        self,
        kind: str,
        l_in: int,
        l_max: int,
        channels: int,
        edge_channels: int,
        n_species: int,
        n_radial: int,
        by_species: bool,
        neighbours: float,
        dtype: torch.dtype,
    ):
        super().__init__()
        self.by_species, self.has_density, self.has_skip = by_species, "D" in kind, "R" not in kind
        self.n_radial, self.l_max, self.neighbours = n_radial, l_max, neighbours
        self.messages = Messages(l_in, l_max, dtype)
        n_paths = len(self.messages.paths)
        self.radial_weight = _weight(n_radial, n_paths, edge_channels, dtype=dtype)
        self.linear = _weight(n_paths, edge_channels, channels, dtype=dtype)
        skip = (l_max + 1, n_species, channels, channels) if self.has_skip else (0, n_species, channels, channels)
        self.skip = _weight(*skip, dtype=dtype)

    def forward(
        self, sent: Tensor, table: Tensor, own: Tensor, columns: Tensor, harmonics: Tensor, graph: Graph
    ) -> Tensor:
        """Messages.

        Args:
            sent: (N, (l_in+1)^2, k) features of all atoms. table: (S', k) the same by element (if `by_species`).
            own: ((l_in+1)^2, n, k) sorted features of the receivers (NL only).
            columns: (E, b [+ 1]) radial features and density. harmonics: (E, (l_max+1)^2).
        """
        radial = pad(columns.narrow(1, 0, self.n_radial), graph.slot, graph.n * graph.width)
        if self.by_species:
            weights: List[Tensor] = []
            for ell in range(self.l_max + 1):  # path l is (0, l, l)
                on_pair = (table.unsqueeze(1) * self.radial_weight[:, ell]).flatten(0, 1)
                weights.append(torch.mm(on_pair, self.linear[ell]))
            out = density_trick(harmonics, radial, weights, graph)
        else:
            out = self.mix(self.messages(sent, radial, self.radial_weight, graph))
        if self.has_density:
            rho = neighbour_sum(columns[:, self.n_radial], graph)
            out = out / (rho + 1.0).view(1, -1, 1)
        if self.has_skip:
            out = per_species(out, self.skip, graph)
        return out

    def mix(self, messages: List[Tensor]) -> Tensor:
        """Linear map of all paths onto their output irrep."""
        sums: List[Tensor] = [messages[0] for _ in range(0)]
        for p, message in enumerate(messages):
            part = torch.matmul(message, self.linear[p])
            l3 = (part.shape[1] - 1) // 2
            if l3 < len(sums):
                sums[l3] = sums[l3] + part
            else:
                sums.append(part)
        return torch.cat(sums, dim=1).transpose(0, 1)

    @torch.jit.unused
    def scales(self) -> Dict[str, Tensor | float]:
        """Factor between a weight of unit variance and the weight stored here."""
        n_species, channels, edge_channels = self.skip.shape[1], self.linear.shape[2], self.linear.shape[1]
        by_path = [1.0 / math.sqrt(self.messages.fan_in[p[2]] * edge_channels) for p in self.messages.paths]
        linear = torch.tensor(by_path, dtype=torch.float64).view(-1, 1, 1)
        return {
            "radial_weight": ACTIVATION_NORM["silu"] / math.sqrt(self.n_radial),
            "linear": linear if self.has_density else linear / self.neighbours,
            "skip": 1.0 / math.sqrt(channels * n_species),
        }


class GatedMessenger(nn.Module):
    """Kind NL: density-normalised messages plus the atom's own features, gated, then mixed again.

    Each irrep l > 0 is multiplied by its own gate; `linear` and `residual` give the features, `gate_linear` and
    `gate_residual` the l_max gates per channel, from the scalar paths and the scalar features.
    """

    by_species: Final[bool]
    has_density: Final[bool]
    n_radial: int

    def __init__(
        self,
        l_in: int,
        l_max: int,
        channels: int,
        edge_channels: int,
        n_radial: int,
        dtype: torch.dtype,
    ):
        super().__init__()
        self.by_species, self.has_density = False, True
        self.n_radial, self.l_max, self.channels = n_radial, l_max, channels
        self.messages = Messages(l_in, l_max, dtype)
        n_paths, k = len(self.messages.paths), edge_channels
        n_common = min(l_in, l_max) + 1
        self.radial_weight = _weight(n_radial, n_paths, k, dtype=dtype)
        self.linear = _weight(n_paths, k, channels, dtype=dtype)
        self.gate_linear = _weight(self.messages.fan_in[0], k, channels * l_max, dtype=dtype)
        self.residual = _weight(n_common, k, channels, dtype=dtype)
        self.gate_residual = _weight(k, channels * l_max, dtype=dtype)
        self.mixer = _weight(l_max + 1, channels, channels, dtype=dtype)
        self.alpha = _weight(1, dtype=dtype)
        self.beta = _weight(1, dtype=dtype)

    def forward(
        self, sent: Tensor, table: Tensor, own: Tensor, columns: Tensor, harmonics: Tensor, graph: Graph
    ) -> Tensor:
        """Messages; arguments as in `Messenger.forward`."""
        radial = pad(columns.narrow(1, 0, self.n_radial), graph.slot, graph.n * graph.width)
        rho = neighbour_sum(columns[:, self.n_radial], graph)
        norm = (1.0 / (self.beta * rho + self.alpha)).view(1, -1, 1)
        messages = [m.transpose(0, 1) for m in self.messages(sent, radial, self.radial_weight, graph)]
        return self.combine(messages, own, norm)

    def combine(self, messages: List[Tensor], own: Tensor, norm: Tensor) -> Tensor:
        """((l_max+1)^2, n, K) features from the messages of all paths, (2 l3 + 1, n, k) each.

        Args:
            own: ((l_in+1)^2, n, k) sorted features of the receivers. norm: (1, n, 1), what the density divides by.
        """
        irreps: List[Tensor] = [messages[0] for _ in range(0)]
        residual = split_irreps(own, 0)
        gates = torch.matmul(own[0], self.gate_residual)
        for p, message in enumerate(messages):
            message = message * norm
            part = torch.matmul(message, self.linear[p])
            l3 = (part.shape[0] - 1) // 2
            if l3 == 0 and self.l_max > 0:
                gates = gates + torch.matmul(message[0], self.gate_linear[p])
            if l3 < len(irreps):
                irreps[l3] = irreps[l3] + part
            else:
                if l3 < self.residual.shape[0]:
                    part = part + torch.matmul(residual[l3], self.residual[l3])
                irreps.append(part)
        irreps[0] = functional.silu(irreps[0])
        if self.l_max > 0:
            for ell, gate in enumerate(torch.split(torch.sigmoid(gates), self.channels, dim=1)):
                irreps[ell + 1] = irreps[ell + 1] * gate
        return per_irrep(torch.cat(irreps, dim=0), self.mixer)

    @torch.jit.unused
    def scales(self) -> Dict[str, Tensor | float]:
        """Factor between a weight of unit variance and the weight stored here (gate constants are in `mixer`)."""
        k = self.linear.shape[1]
        by_path = [1.0 / math.sqrt(self.messages.fan_in[p[2]] * k) for p in self.messages.paths]
        gate = [ACTIVATION_NORM["silu"]] + [ACTIVATION_NORM["sigmoid"]] * self.l_max
        return {
            "radial_weight": 1.0,
            "linear": torch.tensor(by_path, dtype=torch.float64).view(-1, 1, 1),
            "gate_linear": 1.0 / math.sqrt(self.messages.fan_in[0] * k),
            "residual": 1.0 / math.sqrt(k),
            "gate_residual": 1.0 / math.sqrt(k),
            "mixer": torch.tensor(gate, dtype=torch.float64).view(-1, 1, 1) / math.sqrt(self.channels),
        }


class Layer(nn.Module):
    """One interaction and its product: features of all atoms in, new features of the owned atoms out.

    Args:
        messenger: a Messenger or GatedMessenger. kind: see the module. l_in, l_out: of the features before and after.
        edge_l: highest degree sent. degree: highest power of the product. agnostic: product without element weights.
    """

    has_skip: Final[bool]
    skip_by_species: Final[bool]

    def __init__(
        self,
        messenger: nn.Module,
        kind: str,
        l_in: int,
        l_out: int,
        edge_l: int,
        l_max: int,
        degree: int,
        channels: int,
        edge_channels: int,
        n_species: int,
        agnostic: bool,
        dtype: torch.dtype,
    ):
        super().__init__()
        self.has_skip, self.skip_by_species = kind in ("R", "DR", "NL"), kind != "NL"
        self.messenger = messenger
        self.product = SymmetricContraction(l_max, l_out, degree, 1 if agnostic else n_species, channels, dtype)
        self.up = _weight(edge_l + 1, channels, edge_channels, dtype=dtype)
        self.mix = _weight(l_out + 1, channels, channels, dtype=dtype)
        n_common = min(l_in, l_out) + 1 if self.has_skip else 0
        skip = (n_common, n_species, channels, channels) if self.skip_by_species else (n_common, channels, channels)
        self.skip = _weight(*skip, dtype=dtype)

    def send(self, features: Tensor) -> Tensor:
        """((l_in+1)^2, n, K) -> ((edge_l+1)^2, n, k): what neighbours see."""
        return per_irrep(features, self.up)

    def forward(
        self,
        features: Tensor,
        sent: Tensor,
        table: Tensor,
        own: Tensor,
        columns: Tensor,
        harmonics: Tensor,
        graph: Graph,
    ) -> Tensor:
        """New features ((l_out+1)^2, n, K) of the owned atoms, sorted; the rest as in `Messenger.forward`.

        Args:
            features: ((l_in+1)^2, n, K) old features of the owned atoms, sorted.
        """
        messages = self.messenger(sent, table, own, columns, harmonics, graph)
        product = self.product(messages, graph.present, graph.sizes, graph.kinds)
        out = per_irrep(product, self.mix)
        if not self.has_skip:
            return out
        skip = per_species(features, self.skip, graph) if self.skip_by_species else per_irrep(features, self.skip)
        if skip.shape[0] < out.shape[0]:  # the first layer has scalars only
            skip = torch.cat([skip, torch.zeros_like(out[skip.shape[0] :])], dim=0)
        return out + skip

    @torch.jit.unused
    def scales(self) -> Dict[str, Tensor | float]:
        """Factor between a weight of unit variance and the weight stored here, but for product weights (1)."""
        channels, n_species = self.mix.shape[1], self.skip.shape[1] if self.skip_by_species else 1
        out: Dict[str, Tensor | float] = {
            "up": 1.0 / math.sqrt(channels),
            "mix": 1.0 / math.sqrt(channels),
            "skip": 1.0 / math.sqrt(channels * n_species),
        }
        messenger: Any = self.messenger
        out.update({f"messenger.{key}": value for key, value in messenger.scales().items()})
        return out
