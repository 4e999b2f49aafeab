"""What the kernels need of the weights of a MACE, for some elements: matrices in their order, and radial tables."""

from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from mdplug.potentials.blocks.interaction import GatedMessenger
from mdplug.potentials.blocks.knots import (
    LANES,
    Columns,
    LayerTable,
    Tables,
    depends_on_species,
    in_blocks,
    make_tables,
    to_device,
)


class Weights(NamedTuple):
    """Matrices of a layer, as the kernels want them (see `packed`); `back`: transposed, for the adjoint.

    Attributes:
        linear: what follows the messages, for each group of receivers and irrep, flat. rows: (l_max+1,) its heights.
        mix: after the product. skip: (groups, irreps, ...) of the old features. up: what neighbours are sent.
        radial: (b, blocks, P, C) from columns to radial functions, where these are not tabulated.
    """

    linear: Tensor
    linear_back: Tensor
    rows: Tensor
    mix: Tensor
    mix_back: Tensor
    skip: Tensor
    skip_back: Tensor
    up: Tensor
    up_back: Tensor
    radial: Tensor


class Made(NamedTuple):
    """What is made of the weights for some elements.

    Attributes:
        present: (S',) int64 these species, on the host. weights: of each layer.
        tables: those of `no_tables` where radial functions are exact.
    """

    present: Tensor
    tables: Tables
    weights: List[Weights]


class Maker:
    """Makes what is wanted of a MACE, and keeps the tables: where elements do not matter, they serve any.

    Args:
        mace: the definition. tabulated: radial functions come from tables.
    """

    def __init__(self, mace: Any, tabulated: bool):
        self.mace, self.tabulated = mace, tabulated
        self.kinds_matter = depends_on_species(mace.radial)
        self._known: Optional[Tuple[Tuple[int, ...], Tables]] = None

    def tables(self, present: Tuple[int, ...]) -> Tables:
        """Of the elements at hand."""
        key = present if self.kinds_matter else ()
        known = self._known
        if known is None or known[0] != key:
            made = make_tables(self.mace, present) if self.tabulated else no_tables(self.mace)
            known = self._known = (key, to_device(made, self.mace.embedding.device))
        return known[1]

    def make(self, present: Tensor) -> Made:
        """All that evaluations need, for elements (S',) int64."""
        tables = self.tables(tuple(present.tolist()))
        weights = []
        for t, layer in enumerate(self.mace.layers):
            radial_weight = tables.layers[t].weight if self.tabulated else layer.messenger.radial_weight
            weights.append(make_weights(self.mace, t, radial_weight, self.tabulated, present))
        return Made(present, tables, weights)


def make_weights(mace: Any, t: int, radial_weight: Tensor, tabulated: bool, present: Tensor) -> Weights:
    """Matrices of layer t for the elements `present`; radial_weight: (b, P, k) on the radial features at hand."""
    layer = mace.layers[t]
    messenger = layer.messenger
    none = layer.mix.new_zeros(0)
    at = present.to(none.device)
    linear = linear_back = none
    rows = torch.zeros(0, dtype=torch.int32)
    if not isinstance(messenger, GatedMessenger):
        table = layer.send(mace.embedding[at].unsqueeze(0)).squeeze(0) if t == 0 else none
        receivers = present.tolist() if messenger.has_skip else [0]
        groups = [_linear(messenger, radial_weight, table, z) for z in receivers]
        linear = torch.cat([packed(m).flatten() for group in groups for m in group])
        linear_back = torch.cat([packed(m.t()).flatten() for group in groups for m in group])
        rows = torch.tensor([m.shape[0] for m in groups[0]], dtype=torch.int32)
    skip = skip_back = none
    if layer.has_skip:  # (groups, irreps, K, K)
        matrices = layer.skip.transpose(0, 1)[at] if layer.skip_by_species else layer.skip.unsqueeze(0)
        skip, skip_back = packed(matrices), packed(matrices.transpose(-1, -2))
    mix, mix_back = packed(layer.mix), packed(layer.mix.transpose(1, 2))
    up, up_back = packed(layer.up), packed(layer.up.transpose(1, 2))
    radial = none if tabulated else in_blocks(radial_weight, LANES[radial_weight.dtype])
    made = Weights(linear, linear_back, rows, mix, mix_back, skip, skip_back, up, up_back, radial)
    return Weights(*[one.detach() for one in made])


def _linear(messenger: Any, radial_weight: Tensor, table: Tensor, receiver: int) -> List[Tensor]:
    """For each l, the matrix (rows, K) that follows the messages of receivers of one element."""
    out = []
    for ell, linear in enumerate(torch.split(messenger.linear, messenger.messages.fan_in)):
        matrix = linear.flatten(0, 1)
        if messenger.by_species:  # path l is (0, l, l); rows: kind of the sender, feature
            matrix = torch.einsum("zk,bk->zbk", table, radial_weight[:, ell]).flatten(0, 1) @ matrix
        if messenger.has_skip:
            matrix = matrix @ messenger.skip[ell, receiver]
        out.append(matrix)
    return out


def no_tables(mace: Any) -> Tables:
    """Where radial functions are exact."""
    none = mace.embedding.new_zeros(0)
    return Tables([LayerTable(none, none)] * len(mace.layers), none, 1.0, 2, Columns(none, 1.0, 1), 0.0, 0.0)


def report(tables: Tables) -> Dict[str, Any]:
    """What tables are good for; nothing where there are none."""
    if tables.layers[0].table.numel() == 0:
        return {}
    return {
        "radial": "quintic splines",
        "slope_error": tables.slope_error,
        "value_error": tables.value_error,
        "knots": tables.per_kind - 1,
    }


def packed(matrices: Tensor) -> Tensor:
    """(..., k, k') -> (..., blocks, k, C): columns in blocks as the kernels want them."""
    if not matrices.numel():
        return matrices
    flat = in_blocks(matrices.reshape(-1, *matrices.shape[-2:]), LANES[matrices.dtype])
    return flat.view(*matrices.shape[:-2], *flat.shape[1:])
