"""What is a plain function of the distance, for a MACE on the kernels. Compiles in TorchScript."""

from typing import Any, Final, List, NamedTuple, Tuple

from torch import Tensor, nn

from mdplug.potentials.blocks.knots import Tables, depends_on_species
from mdplug.potentials.blocks.tables import FIRST_KNOT, cubic


class PairScalars(NamedTuple):
    """What `PairFunctions` gives; empty tensors stand for what there is not.

    Attributes:
        repulsion: (n,). repulsion_slope: (P,).
        columns: of each layer (P, b), of those without tables. column_slopes: the same.
        densities: of each layer (n,). density_slopes: (P,).
    """

    repulsion: Tensor
    repulsion_slope: Tensor
    columns: List[Tensor]
    column_slopes: List[Tensor]
    densities: List[Tensor]
    density_slopes: List[Tensor]


class PairFunctions(nn.Module):
    """Repulsion, radial columns where they are not tabulated, and the densities of the layers that have one.

    Args:
        mace: the MACE, of whose parts these are. tabulated: radial functions come from tables.
    """

    has_repulsion: Final[bool]
    tabulated: Final[bool]

    def __init__(self, mace: Any, tabulated: bool):
        super().__init__()
        messengers = [layer.messenger for layer in mace.layers]
        self.has_repulsion, self.tabulated, self.first_knot = mace.has_repulsion, tabulated, FIRST_KNOT
        self.repulsion = mace.repulsion
        self.radial: Any = nn.Identity() if tabulated else mace.radial
        self.n_radial: List[int] = [messenger.n_radial for messenger in messengers]
        self.has_density: List[bool] = [messenger.has_density for messenger in messengers]
        self.kinds_matter = depends_on_species(mace.radial)  # tables differ between pairs of elements
        self.species_matter = self.kinds_matter or self.has_repulsion or not tabulated

    def forward(
        self, tables: Tables, r: Tensor, receiver: Tensor, receiving: Tensor, sending: Tensor, kind: Tensor, n: int,
        slopes: bool,
    ) -> PairScalars:  # fmt: skip
        """Evaluate.

        Args:
            r: (P,) A. receiver: (P,) int32. receiving, sending: (P,) species, where they matter.
            kind: (P,) int32 table, or empty. n: receivers. slopes: of radial columns, too; the others come anyway.
        """
        x, none = r.unsqueeze(1), r[:0]
        repulsion, repulsion_slope = none, none
        if self.has_repulsion:
            values, repulsion_slope = self.repulsion.with_slope(x, receiving, sending)
            repulsion = summed(values, receiver, n)
        made, d_made = self._columns(tables, x, receiving, sending, kind, slopes)
        columns: List[Tensor] = []
        column_slopes: List[Tensor] = []
        densities: List[Tensor] = []
        density_slopes: List[Tensor] = []
        for t, b in enumerate(self.n_radial):
            b = 0 if self.tabulated else b
            columns.append(made[t][:, :b].contiguous())
            column_slopes.append(d_made[t][:, :b])
            if self.has_density[t]:
                densities.append(summed(made[t][:, b], receiver, n))
                density_slopes.append(d_made[t][:, b])
            else:
                densities.append(none)
                density_slopes.append(none)
        return PairScalars(repulsion, repulsion_slope, columns, column_slopes, densities, density_slopes)

    def _columns(
        self, tables: Tables, x: Tensor, receiving: Tensor, sending: Tensor, kind: Tensor, slopes: bool
    ) -> Tuple[List[Tensor], List[Tensor]]:
        """Of each layer, columns (P, b) and densities (P, 1) side by side; the latter alone where there are tables."""
        if self.tabulated:
            values = derivatives = x[:, :0]
            of = tables.densities
            if of.coefficients.numel() > 0:
                values, derivatives = cubic(of.coefficients, kind.long(), x, self.first_knot, of.step, of.n_intervals)
            made: List[Tensor] = []
            d_made: List[Tensor] = []
            k = 0
            for has_density in self.has_density:
                width = 1 if has_density else 0
                made.append(values.narrow(1, k, width))
                d_made.append(derivatives.narrow(1, k, width))
                k += width
            return made, d_made
        else:  # noqa: RET505  (TorchScript drops the branch that a constant rules out)
            if slopes:
                return self.radial.with_slopes(x, receiving, sending)
            columns = self.radial(x, receiving, sending)
            return columns, columns


def summed(values: Tensor, receiver: Tensor, n: int) -> Tensor:
    """(P,) -> (n,), over the pairs that each atom receives."""
    return values.new_zeros(n).index_add(0, receiver, values)
