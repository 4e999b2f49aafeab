"""One layer of MACE on the kernels: forward pass, and its adjoint in explicit form. Compiles in TorchScript."""

from typing import Any, Final, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor, nn

from mdplug.potentials.blocks.contraction import sparse_polynomial
from mdplug.potentials.blocks.interaction import GatedMessenger
from mdplug.potentials.blocks.kernel_gates import Gated, Gates
from mdplug.potentials.blocks.kernel_graph import Atoms, Cotangents, Graph, LayerRadial, coupling
from mdplug.potentials.blocks.kernel_pairs import PairScalars
from mdplug.potentials.blocks.kernel_weights import Weights
from mdplug.potentials.blocks.knots import LANES, in_blocks, radial_values
from mdplug.potentials.blocks.tables import FIRST_KNOT

ops: Any = torch.ops.mdplug
AT_A_TIME = 2**24  # numbers of radial functions held at a time where they are not tabulated


class Saved(NamedTuple):
    """What `KernelLayer.forward` keeps for its adjoint.

    Attributes:
        mixed: ((l_max+1)^2, n, K), what the polynomial took. norm: (n,) factor of the messages, or empty.
        gated: of non-linear layers.
    """

    mixed: Tensor
    norm: Tensor
    gated: Optional[Gated]


class Tape(NamedTuple):
    """What the adjoint needs of the forward pass; lists by layer.

    Attributes:
        features: before each layer, and after the last. sent: what neighbours see. exchanged: tapes of its exchange.
        saved: by each layer. slopes: (n, K) of the energy along scalar features. weights, radial: as layers take them.
        scale: (n,) eV. vec: (P, 3) A. origin: (P,) places of the pairs among those that were given.
    """

    features: List[Tensor]
    sent: List[Tensor]
    exchanged: List[List[Tensor]]
    saved: List[Saved]
    slopes: List[Tensor]
    weights: List[Weights]
    radial: List[LayerRadial]
    graph: Graph
    atoms: Atoms
    scalars: PairScalars
    scale: Tensor
    vec: Tensor
    origin: Tensor


class KernelLayer(nn.Module):
    """Layer t of a MACE.

    Args:
        model: the MACE; its weights are copied.
    """

    gated: Final[bool]
    by_species: Final[bool]
    has_density: Final[bool]
    has_skip: Final[bool]
    first_layer: Final[bool]
    coefficient: Tensor
    nodes: Tensor
    term: Tensor
    starts: Tensor
    coefficients: Tensor
    no_group: Tensor

    def __init__(self, model: Any, t: int):
        super().__init__()
        layer = model.layers[t]
        messenger = layer.messenger
        self.t, self.first_layer = t, t == 0
        self.gated, self.has_skip = isinstance(messenger, GatedMessenger), layer.has_skip
        self.by_species, self.has_density = messenger.by_species, messenger.has_density
        self.by_receiver = not self.gated and messenger.has_skip
        self.skip_by_species = layer.skip_by_species
        self.l_max, self.n_radial, self.channels = messenger.l_max, messenger.n_radial, model.embedding.shape[1]
        self.edge_channels, self.edge_components = layer.up.shape[2], layer.up.shape[0] ** 2
        self.gates: Any = Gates(messenger) if self.gated else nn.Identity()
        paths: List[Tuple[int, int, int]] = list(messenger.messages.paths)
        self.n_paths, self.at_a_time, self.first_knot = len(paths), AT_A_TIME, FIRST_KNOT
        self.widths = [count * self.edge_channels for count in messenger.messages.fan_in]
        index, value = coupling(paths)
        self.register_buffer("path_table", torch.tensor(paths, dtype=torch.int32), persistent=False)
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

    def _kinds(self, atoms: Atoms) -> Tensor:
        """(n,) coefficients of each atom, as the operator `polynomial` wants them."""
        return torch.zeros_like(atoms.own_species32) if self.agnostic else atoms.own_species32

    def _product_kinds(self, atoms: Atoms) -> Tensor:
        return self.no_group if self.agnostic else atoms.own_species32

    def _receivers(self, atoms: Atoms) -> Tensor:
        return atoms.own_kind if self.by_receiver else self.no_group

    def _skip_group(self, atoms: Atoms) -> Tensor:
        return atoms.own_kind if self.skip_by_species else self.no_group

    # --- forward -----------------------------------------------------------------------------------------------------

    def send(self, features: Tensor, weights: Weights) -> Tensor:
        """((l_in+1)^2, n, K) -> ((edge_l+1)^2, n, k): what neighbours see."""
        return ops.linear(features, weights.up, self.no_group, features[:0], self.edge_components, self.edge_channels)

    def send_back(self, grad_sent: Tensor, weights: Weights, grad: Tensor) -> Tensor:
        """Cotangent of the features: that of what they sent, carried back and added to `grad`."""
        return ops.linear(grad_sent, weights.up_back, self.no_group, grad, grad.shape[0], grad.shape[2])

    def forward(
        self,
        features: Tensor,
        sent: Tensor,
        weights: Weights,
        radial: LayerRadial,
        graph: Graph,
        atoms: Atoms,
        rho: Tensor,
    ) -> Tuple[Tensor, Saved]:
        """New features ((l_out+1)^2, n, K), and what `backward` needs.

        Args:
            features: ((l_in+1)^2, n, K) sorted. sent: ((edge_l+1)^2, N, k) of all atoms, or nothing: elements say all.
            rho: (n,) density, where the layer has one.
        """
        messages = self.messages(sent, radial, graph, atoms)
        gated: Optional[Gated] = None
        if self.gated:
            norm = rho
            mixed, gated = self.gates(self._split(messages, atoms.n), sent[:, : atoms.n], rho)
            mixed = mixed.contiguous()
            out = ops.polynomial(mixed, self.coefficients, self._kinds(atoms), self.nodes, self.term, self.starts)
            out = ops.linear(out, weights.mix, self.no_group, out[:0], out.shape[0], self.channels)
        else:
            # A part of the messages, though empty, would keep the whole of them.
            norm = 1.0 / (rho + 1.0) if self.has_density else messages.new_empty(0)
            out, mixed = ops.product(
                messages, weights.linear, weights.rows, self._receivers(atoms), norm, self.coefficients,
                self._product_kinds(atoms), self.nodes, self.term, self.starts, weights.mix,
                atoms.n, self.channels, self.channels,
            )  # fmt: skip
        if self.has_skip:
            out = ops.linear(features, weights.skip, self._skip_group(atoms), out, out.shape[0], self.channels)
        return out, Saved(mixed, norm, gated)

    def messages(self, sent: Tensor, radial: LayerRadial, graph: Graph, atoms: Atoms) -> Tensor:
        """Sums over neighbours: for each l, (2l+1, n, rows), one after another, flat."""
        n = atoms.n
        if self.by_species:
            density = ops.density(
                graph.harmonics, radial.table, radial.columns, graph.r, graph.table_kind, graph.sender_kind,
                graph.first, atoms.present.shape[0], 0, n, self.first_knot, radial.step, radial.per_kind,
            )  # fmt: skip
            return density.flatten()
        if radial.table.numel() > 0:
            return self._convolve(sent, radial, radial.columns, graph, 0, n)
        pieces = torch.jit.annotate(List[List[Tensor]], [])
        for a, b, start, stop in self._chunks(graph, n):
            values = radial_values(radial.columns[start:stop], radial.weight)
            pieces.append(self._split(self._convolve(sent, radial, values, graph, a, b), b - a))
        whole: List[Tensor] = []
        for ell in range(self.l_max + 1):
            whole.append(torch.cat([piece[ell] for piece in pieces], dim=1).flatten())
        return torch.cat(whole)

    def _chunks(self, graph: Graph, n: int) -> List[Tuple[int, int, int, int]]:
        """Ranges of the n atoms, and of their pairs, with at most AT_A_TIME radial functions."""
        most = max(self.at_a_time // (self.n_paths * self.edge_channels), 1)
        if n == 0 or graph.r.shape[0] <= most:  # known without asking the device
            return [(0, n, 0, graph.r.shape[0])]
        marks: List[int] = graph.first.long().tolist()
        out = torch.jit.annotate(List[Tuple[int, int, int, int]], [])
        a = 0
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
            self.path_table, self.coupling, self.coefficient, begin, end, self.first_knot, radial.step, radial.per_kind,
        )  # fmt: skip

    def _split(self, flat: Tensor, n: int) -> List[Tensor]:
        """For each l (2l+1, n, rows)."""
        parts: List[Tensor] = []
        at = 0
        for ell in range(self.l_max + 1):
            size = (2 * ell + 1) * n * self.widths[ell]
            parts.append(flat.narrow(0, at, size).view(2 * ell + 1, n, self.widths[ell]))
            at += size
        return parts

    # --- adjoint -----------------------------------------------------------------------------------------------------

    def backward(
        self,
        grad: Tensor,
        saved: Saved,
        features: Tensor,
        sent: Tensor,
        weights: Weights,
        radial: LayerRadial,
        graph: Graph,
        atoms: Atoms,
    ) -> Cotangents:
        """Cotangents of what `forward` took.

        Args:
            grad: ((l_out+1)^2, n, K). saved: what `forward` gave for it, held here alone: it goes when it is used.
        """
        n = atoms.n
        d_own = grad.new_empty(0)
        if self.gated:
            d_product = ops.linear(grad, weights.mix_back, self.no_group, grad[:0], grad.shape[0], self.channels)
            d_mixed = ops.polynomial_backward(
                saved.mixed, self.coefficients, self._kinds(atoms), self.nodes, self.term, self.starts, d_product
            )
            gated = saved.gated
            assert gated is not None
            d_parts, d_own, d_rho = self.gates.backward(d_mixed, gated, sent[:, :n])
            d_messages = torch.cat([part.flatten() for part in d_parts])
        else:
            d_messages, d_rho = ops.product_backward(
                grad, saved.mixed, weights.linear_back, weights.rows, self._receivers(atoms), saved.norm,
                self.coefficients, self._product_kinds(atoms), self.nodes, self.term, self.starts, weights.mix_back,
                n, self.channels, self.channels,
            )  # fmt: skip
        del saved
        if self.by_species:
            d_sent = d_own
            d_harmonics, d_radial = ops.density_backward(
                graph.harmonics, radial.table, radial.columns, graph.r, graph.table_kind, graph.sender_kind,
                graph.first, atoms.present.shape[0], 0, n, self.first_knot, radial.step, radial.per_kind,
                d_messages.view(graph.harmonics.shape[1], n, -1 if n > 0 else int(weights.rows[0])),
            )  # fmt: skip
        else:
            d_sent, d_harmonics, d_radial = self._convolve_backward(d_messages, sent, radial, graph, n)
            if self.gated:
                d_sent[:, :n] += d_own
        if self.has_skip and not self.first_layer:  # before the first layer there are elements alone
            group = self._skip_group(atoms)
            back = ops.linear(grad, weights.skip_back, group, grad[:0], features.shape[0], self.channels)
        else:
            back = torch.zeros_like(features)
        return Cotangents(back, d_sent, d_harmonics, d_radial, d_rho)

    def _convolve_backward(
        self, grad: Tensor, sent: Tensor, radial: LayerRadial, graph: Graph, n: int
    ) -> Tuple[Tensor, Tensor, Tensor]:
        """Cotangents of `sent`, harmonics and radial functions from that of the messages."""
        tabulated = radial.table.numel() > 0
        chunks = [(0, n, 0, graph.r.shape[0])] if tabulated else self._chunks(graph, n)
        parts = self._split(grad, n)
        d_sent: List[Tensor] = []
        d_harmonics: List[Tensor] = []
        d_radial: List[Tensor] = []
        for a, b, start, stop in chunks:
            flat, values = grad, radial.columns
            if len(chunks) > 1:
                flat = torch.cat([part[:, a:b].flatten() for part in parts])
            if not tabulated:
                values = radial_values(radial.columns[start:stop], radial.weight)
            of_sent, of_harmonics, of_radial = ops.convolution_backward(
                sent, graph.harmonics, radial.table, values, graph.r, graph.table_kind, graph.sender, graph.first,
                self.path_table, self.coupling, self.coefficient, a, b, self.first_knot, radial.step, radial.per_kind,
                flat,
            )  # fmt: skip
            if not tabulated:
                of_radial = torch.mm(of_radial.flatten(1), radial.weight.flatten(1).t())
            if len(d_sent) > 0:
                d_sent[0] += of_sent
            else:
                d_sent.append(of_sent)
            d_harmonics.append(of_harmonics)
            d_radial.append(of_radial)
        if len(chunks) > 1:
            return d_sent[0], torch.cat(d_harmonics), torch.cat(d_radial)
        return d_sent[0], d_harmonics[0], d_radial[0]
