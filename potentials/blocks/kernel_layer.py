"""One layer of MACE on the kernels: forward pass, and its adjoint in explicit form."""

from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor, nn

from mdplug.potentials.blocks.contraction import sparse_polynomial
from mdplug.potentials.blocks.interaction import GatedMessenger
from mdplug.potentials.blocks.kernel_graph import Atoms, Gradients, Graph, LayerRadial, coupling
from mdplug.potentials.blocks.knots import LANES, in_blocks, radial_values
from mdplug.potentials.blocks.pull_back import pull_back
from mdplug.potentials.blocks.tables import FIRST_KNOT

ops: Any = torch.ops.mdplug
AT_A_TIME = 2**24  # numbers of radial functions held at a time where they are not tabulated


class Weights(NamedTuple):
    """Matrices of a layer as the kernels want them (see `packed`); `back`: transposed, for the adjoint.

    Attributes:
        polynomial: coefficients, nodes, term, starts.
        linear: what follows the messages, for each group of receivers and irrep, flat. rows: (l_max+1,) its heights.
        mix: after the product. skip: (groups, irreps, ...) of the old features. up: what neighbours are sent.
    """

    polynomial: Tuple[Tensor, Tensor, Tensor, Tensor]
    linear: Tensor
    linear_back: Tensor
    rows: Tensor
    mix: Tensor
    mix_back: Tensor
    skip: Tensor
    skip_back: Tensor
    up: Tensor
    up_back: Tensor


class KernelLayer(nn.Module):
    """Layer t of a MACE.

    Args:
        model: the MACE; its weights are copied.
    """

    source: Any
    nodes: Tensor
    term: Tensor
    starts: Tensor
    coefficients: Tensor
    no_group: Tensor

    def __init__(self, model: Any, t: int):
        super().__init__()
        layer = model.layers[t]
        messenger = layer.messenger
        self.t, self.source = t, layer
        self.gated = isinstance(messenger, GatedMessenger)
        self.by_species, self.has_density = messenger.by_species, messenger.has_density
        self.by_receiver = not self.gated and messenger.has_skip
        self.l_max, self.channels = messenger.l_max, model.embedding.shape[1]
        self.edge_channels = layer.up.shape[2]
        self.table = layer.send(model.embedding.unsqueeze(0)).squeeze(0) if t == 0 else None
        self.paths: List[Tuple[int, int, int]] = list(messenger.messages.paths)
        self.widths = [sum(1 for p in self.paths if p[2] == ell) * self.edge_channels for ell in range(self.l_max + 1)]
        index, value = coupling(self.paths)
        self.register_buffer("path_table", torch.tensor(self.paths, dtype=torch.int32), persistent=False)
        self.register_buffer("coupling", torch.from_numpy(index), persistent=False)
        self.coefficient = torch.from_numpy(value)  # float64 whatever the model is
        nodes, term, starts, coefficients = sparse_polynomial(layer.product)
        self.register_buffer("nodes", nodes, persistent=False)
        self.register_buffer("term", term, persistent=False)
        self.register_buffer("starts", starts, persistent=False)
        self.register_buffer(
            "coefficients", in_blocks(coefficients.detach(), LANES[coefficients.dtype]), persistent=False
        )
        self.agnostic = coefficients.shape[0] == 1
        none = torch.zeros(0, dtype=torch.int32, device=model.embedding.device)
        self.register_buffer("no_group", none, persistent=False)
        self._weights: Dict[Tuple[int, ...], Weights] = {}

    # --- weights -----------------------------------------------------------------------------------------------------

    def weights(self, radial: LayerRadial, atoms: Atoms) -> "Weights":
        """Matrices for the elements at hand, made once."""
        made = self._weights.get(atoms.present)
        if made is None:
            made = self._make_weights(radial, atoms.present)
            self._weights = {atoms.present: made}
        return made

    def _make_weights(self, radial: LayerRadial, present: Tuple[int, ...]) -> "Weights":
        source = self.source
        none = self.coefficients.new_zeros(0)
        linear = linear_back = rows = none
        if not self.gated:
            groups = [self._linear(radial, present, z) for z in (present if self.by_receiver else (0,))]
            linear = torch.cat([packed(m).flatten() for group in groups for m in group])
            linear_back = torch.cat([packed(m.t()).flatten() for group in groups for m in group])
            rows = torch.tensor([m.shape[0] for m in groups[0]], dtype=torch.int32)
        skip = none
        if source.has_skip:  # (groups, irreps, K, K)
            skip = source.skip.transpose(0, 1)[list(present)] if source.skip_by_species else source.skip.unsqueeze(0)
        polynomial = (self.coefficients, self.nodes, self.term, self.starts)
        mix, mix_back = packed(source.mix), packed(source.mix.transpose(1, 2))
        skip_back = packed(skip.transpose(-1, -2)) if skip.numel() else none
        up, up_back = packed(source.up), packed(source.up.transpose(1, 2))
        return Weights(polynomial, linear, linear_back, rows, mix, mix_back, packed(skip), skip_back, up, up_back)

    def _linear(self, radial: LayerRadial, present: Tuple[int, ...], receiver: int) -> List[Tensor]:
        """For each l, the matrix (rows, K) that follows the messages of receivers of one element."""
        messenger: Any = self.source.messenger
        out = []
        for ell in range(self.l_max + 1):
            if self.by_species:  # path l is (0, l, l); rows: kind of the sender, feature
                assert self.table is not None
                rows = torch.einsum("zk,bk->zbk", self.table[list(present)], radial.weight[:, ell]).flatten(0, 1)
                matrix = rows @ messenger.linear[ell]
            else:
                chosen = [p for p, path in enumerate(self.paths) if path[2] == ell]
                matrix = messenger.linear[chosen].flatten(0, 1)
            if messenger.has_skip:
                matrix = matrix @ messenger.skip[ell, receiver]
            out.append(matrix)
        return out

    def _product(self, weights: "Weights", atoms: Atoms, norm: Tensor, back: bool) -> Tuple[Any, ...]:
        """Arguments of the operators `product` after the first."""
        none = self.no_group
        group = atoms.own_kind if self.by_receiver else none
        kinds = none if self.agnostic else atoms.own_species32
        linear, mix = (weights.linear_back, weights.mix_back) if back else (weights.linear, weights.mix)
        coefficients, *lists = weights.polynomial
        sizes = (atoms.n, self.channels, self.channels)
        return (linear, weights.rows, group, norm, coefficients, kinds, *lists, mix, *sizes)

    def _kinds(self, atoms: Atoms) -> Tensor:
        """(n,) coefficients of each atom, as the operator `polynomial` wants them."""
        species = atoms.own_species32
        return torch.zeros_like(species) if self.agnostic else species

    def _skip_group(self, atoms: Atoms) -> Tensor:
        return atoms.own_kind if self.source.skip_by_species else self.no_group

    # --- forward -----------------------------------------------------------------------------------------------------

    def send(self, features: Tensor, weights: "Weights") -> Tensor:
        """((l_in+1)^2, n, K) -> ((edge_l+1)^2, n, k): what neighbours see."""
        components = self.source.up.shape[0] ** 2
        return ops.linear(features, weights.up, self.no_group, features[:0], components, self.edge_channels)

    def forward(
        self,
        features: Tensor,
        sent: Optional[Tensor],
        radial: LayerRadial,
        graph: Graph,
        atoms: Atoms,
        rho: Optional[Tensor],
    ) -> Tuple[Tensor, Any]:
        """New features ((l_out+1)^2, n, K), and what `backward` needs.

        Args:
            features: ((l_in+1)^2, n, K) sorted. sent: ((edge_l+1)^2, N, k) of all atoms; None where elements say all.
            rho: (n,) density.
        """
        weights = self.weights(radial, atoms)
        messages = self.messages(sent, radial, graph, atoms)
        if self.gated:
            mixed, saved = self._gated(messages, sent, rho, atoms.n)
            out = ops.polynomial(mixed, self.coefficients, self._kinds(atoms), self.nodes, self.term, self.starts)
            out = ops.linear(out, weights.mix, self.no_group, out[:0], out.shape[0], self.channels)
        else:
            # A part of the messages, though empty, would keep the whole of them.
            saved = messages.new_empty(0) if rho is None else 1.0 / (rho + 1.0)
            out, mixed = ops.product(messages, *self._product(weights, atoms, saved, False))
        if self.source.has_skip:
            group = self._skip_group(atoms)
            out = ops.linear(features, weights.skip, group, out, out.shape[0], self.channels)
        return out, (mixed, saved)

    def messages(self, sent: Optional[Tensor], radial: LayerRadial, graph: Graph, atoms: Atoms) -> Tensor:
        """Sums over neighbours: for each l, (2l+1, n, rows), one after another, flat."""
        n = atoms.n
        if sent is None:
            return ops.density(*self._density(radial, graph, atoms)).flatten()
        if radial.table.numel():
            return self._convolve(sent, radial, radial.columns, graph, 0, n)
        pieces: List[List[Tensor]] = []
        for a, b, start, stop in self._chunks(graph, n):
            values = radial_values(radial.columns[start:stop], radial.weight)
            pieces.append(self._split(self._convolve(sent, radial, values, graph, a, b), b - a))
        return torch.cat([torch.cat(parts, dim=1).flatten() for parts in zip(*pieces, strict=True)])

    def _density(self, radial: LayerRadial, graph: Graph, atoms: Atoms) -> Tuple[Any, ...]:
        return (
            graph.harmonics, radial.table, radial.columns, graph.r, graph.table_kind, graph.sender_kind, graph.first,
            len(atoms.present), 0, atoms.n, FIRST_KNOT, radial.step, radial.per_kind,
        )  # fmt: skip

    def _chunks(self, graph: Graph, n: int) -> List[Tuple[int, int, int, int]]:
        """Ranges of the n atoms, and of their pairs, with at most AT_A_TIME radial functions."""
        most = max(AT_A_TIME // (len(self.paths) * self.edge_channels), 1)
        if n == 0 or graph.r.shape[0] <= most:  # known without asking the device
            return [(0, n, 0, graph.r.shape[0])]
        marks = graph.first.tolist()
        out, a = [], 0
        for b in range(1, n + 1):
            if b == n or marks[b + 1] - marks[a] > most:
                out.append((a, b, marks[a], marks[b]))
                a = b
        return out

    def _convolve(
        self, sent: Tensor, radial: LayerRadial, values: Tensor, graph: Graph, begin: int, end: int
    ) -> Tensor:
        return ops.convolution(
            sent, graph.harmonics, radial.table, values, graph.r, graph.table_kind, graph.sender, graph.first,
            self.path_table, self.coupling, self.coefficient, begin, end, FIRST_KNOT, radial.step, radial.per_kind,
        )  # fmt: skip

    def _split(self, flat: Tensor, n: int) -> List[Tensor]:
        sizes = [(2 * ell + 1) * n * width for ell, width in enumerate(self.widths)]
        parts = torch.split(flat, sizes)
        return [part.view(2 * ell + 1, n, self.widths[ell]) for ell, part in enumerate(parts)]

    def _gated(self, messages: Tensor, sent: Optional[Tensor], rho: Optional[Tensor], n: int) -> Tuple[Tensor, Any]:
        """Gates by a small tape of their own: they are element-wise."""
        assert sent is not None
        assert rho is not None
        messenger: Any = self.source.messenger
        with torch.enable_grad():
            leaves = [leaf.detach().requires_grad_(True) for leaf in (messages, sent[:, :n], rho)]
            norm = (1.0 / (messenger.beta * leaves[2] + messenger.alpha)).view(1, -1, 1)
            by_path = [p for m in self._split(leaves[0], n) for p in torch.split(m, self.edge_channels, dim=2)]
            mixed = messenger.combine(by_path, leaves[1], norm)
        return mixed.detach().contiguous(), (mixed, leaves)

    # --- adjoint -----------------------------------------------------------------------------------------------------

    def backward(
        self,
        grad: Tensor,
        saved: Any,
        features: Tensor,
        sent: Optional[Tensor],
        radial: LayerRadial,
        graph: Graph,
        atoms: Atoms,
        gradients: Gradients,
    ) -> Tuple[Tensor, Optional[Tensor]]:
        """Cotangents of `features` and `sent`; those of the pairs are added to `gradients`.

        Args:
            grad: ((l_out+1)^2, n, K). saved: what `forward` gave for it, held here alone: it goes when it is used.
        """
        weights, (mixed, tape) = self.weights(radial, atoms), saved
        del saved
        d_own: Optional[Tensor] = None
        if self.gated:
            d_product = ops.linear(grad, weights.mix_back, self.no_group, grad[:0], grad.shape[0], self.channels)
            d_mixed = ops.polynomial_backward(
                mixed, self.coefficients, self._kinds(atoms), self.nodes, self.term, self.starts, d_product
            )
            out, leaves = tape
            d_messages, d_own, d_rho = pull_back([out], leaves, [d_mixed])
        else:
            d_messages, d_rho = ops.product_backward(grad, mixed, *self._product(weights, atoms, tape, True))
        del mixed, tape
        if self.has_density:
            gradients.density[self.t] = d_rho
        grad_sent = None
        if sent is None:
            shape = (graph.harmonics.shape[1], atoms.n, -1)
            found = ops.density_backward(*self._density(radial, graph, atoms), d_messages.view(shape))
            gradients.add(self.t, 0, *found)
        else:
            grad_sent = self._convolve_backward(d_messages, sent, radial, graph, atoms.n, gradients)
            if d_own is not None:
                grad_sent[:, : atoms.n] += d_own
        if self.source.has_skip and self.t > 0:  # before the first layer there are elements alone
            group, components = self._skip_group(atoms), features.shape[0]
            back = ops.linear(grad, weights.skip_back, group, grad[:0], components, self.channels)
        else:
            back = torch.zeros_like(features)
        return back, grad_sent

    def _convolve_backward(
        self, grad: Tensor, sent: Tensor, radial: LayerRadial, graph: Graph, n: int, gradients: Gradients
    ) -> Tensor:
        """Cotangent of `sent` from that of the messages."""
        tabulated = radial.table.numel() > 0
        chunks = [(0, n, 0, graph.r.shape[0])] if tabulated else self._chunks(graph, n)
        parts = self._split(grad, n) if len(chunks) > 1 else []
        total: Optional[Tensor] = None
        for a, b, first, last in chunks:
            flat = torch.cat([part[:, a:b].flatten() for part in parts]) if parts else grad
            values = radial.columns if tabulated else radial_values(radial.columns[first:last], radial.weight)
            grad_sent, d_harmonics, d_radial = ops.convolution_backward(
                sent, graph.harmonics, radial.table, values, graph.r, graph.table_kind, graph.sender, graph.first,
                self.path_table, self.coupling, self.coefficient, a, b, FIRST_KNOT, radial.step, radial.per_kind, flat,
            )  # fmt: skip
            if not tabulated:
                weight = in_blocks(radial.weight, LANES[radial.weight.dtype]).flatten(1)
                d_radial = torch.mm(d_radial.flatten(1), weight.t())
            gradients.add(self.t, first, d_harmonics, d_radial)
            total = grad_sent if total is None else total + grad_sent
        assert total is not None
        return total


def packed(matrices: Tensor) -> Tensor:
    """(..., k, k') -> (..., blocks, k, C): columns in blocks as the kernels want them."""
    if not matrices.numel():
        return matrices
    flat = in_blocks(matrices.reshape(-1, *matrices.shape[-2:]), LANES[matrices.dtype])
    return flat.view(*matrices.shape[:-2], *flat.shape[1:])
