"""One layer of MACE on the kernels: forward pass, and its adjoint in explicit form."""

from typing import Any, Dict, List, Optional, Tuple

import torch
from torch import Tensor, nn

from mdplug.potentials.blocks.contraction import sparse_polynomial
from mdplug.potentials.blocks.interaction import GatedMessenger
from mdplug.potentials.blocks.kernel_graph import Atoms, Gradients, Graph, LayerRadial, coupling
from mdplug.potentials.blocks.knots import LANES, in_blocks, radial_values
from mdplug.potentials.blocks.tables import FIRST_KNOT

ops: Any = torch.ops.mdplug
AT_A_TIME = 2**24  # numbers of radial functions held at a time where they are not tabulated


class KernelLayer(nn.Module):
    """Layer t of a MACE.

    Args:
        model: the MACE; its weights are copied.
    """

    def __init__(self, model: Any, t: int):
        super().__init__()
        layer = model.layers[t]
        messenger = layer.messenger
        self.t, self.source = t, layer
        self.gated = isinstance(messenger, GatedMessenger)
        self.by_species, self.has_density = messenger.by_species, messenger.has_density
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
        self._weights: Dict[Tuple[int, ...], List[List[Tensor]]] = {}

    # --- weights -----------------------------------------------------------------------------------------------------

    def linear(self, radial: LayerRadial, atoms: Atoms) -> List[List[Tensor]]:
        """For each group of receivers, for each l, the matrix that follows the messages (rows, K)."""
        key = (*atoms.present, -1, *(g[0] for g in atoms.groups))
        made = self._weights.get(key)
        if made is None:
            made = [self._linear(radial, atoms.present, species) for species, _, _ in self._groups(atoms)]
            self._weights = {key: made}
        return made

    def _groups(self, atoms: Atoms) -> Tuple[Tuple[int, int, int], ...]:
        """Receivers that share all matrices before the product: by species only where these depend on it."""
        by_species = not self.gated and self.source.messenger.has_skip
        return atoms.groups if by_species else ((-1, 0, atoms.n),)

    def _linear(self, radial: LayerRadial, present: Tuple[int, ...], receiver: int) -> List[Tensor]:
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
            out.append(matrix.contiguous())
        return out

    # --- forward -----------------------------------------------------------------------------------------------------

    def forward(
        self,
        features: Tensor,
        sent: Optional[Tensor],
        radial: LayerRadial,
        graph: Graph,
        atoms: Atoms,
        rho: Optional[Tensor],
    ) -> Tuple[Tensor, List[Any]]:
        """New features ((l_out+1)^2, n, K), and what `backward` needs.

        Args:
            features: ((l_in+1)^2, n, K) sorted. sent: ((edge_l+1)^2, N, k) of all atoms; None where elements say all.
            rho: (n,) density.
        """
        saved: List[Any] = []
        parts: List[Tensor] = []
        linear = None if self.gated else self.linear(radial, atoms)
        for g, (_, begin, end) in enumerate(self._groups(atoms)):
            messages = self.messages(sent, radial, graph, atoms, begin, end)
            norm = None
            if self.gated:
                mixed, tape = self._gated(messages, sent, rho, begin, end)
            else:
                assert linear is not None
                mixed = messages[0].new_empty((self.l_max + 1) ** 2, end - begin, self.channels)
                for ell, message in enumerate(messages):
                    into = mixed[ell * ell : (ell + 1) ** 2].view(-1, self.channels)
                    torch.mm(message.view(-1, message.shape[2]), linear[g][ell], out=into)
                if rho is not None:
                    norm = 1.0 / (rho[begin:end] + 1.0).view(1, -1, 1)
                    mixed.mul_(norm)
                tape = norm
            kinds = self._kinds(atoms, begin, end)
            product = ops.polynomial(mixed, self.coefficients, kinds, self.nodes, self.term, self.starts)
            saved.append((mixed, tape))
            parts.append(per_irrep(product, self.source.mix))
        out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        if self.source.has_skip:
            for species, begin, end in atoms.groups:
                add_per_irrep(out[:, begin:end], features[:, begin:end], self._skip(species))
        return out, saved

    def _kinds(self, atoms: Atoms, begin: int, end: int) -> Tensor:
        return torch.zeros_like(atoms.species32[begin:end]) if self.agnostic else atoms.species32[begin:end]

    def _skip(self, species: int) -> Tensor:
        return self.source.skip[:, species] if self.source.skip_by_species else self.source.skip

    def messages(
        self, sent: Optional[Tensor], radial: LayerRadial, graph: Graph, atoms: Atoms, begin: int, end: int
    ) -> List[Tensor]:
        """Sums over the neighbours of some receivers: per l, (2l+1, n, rows of `linear`)."""
        first, last = (int(graph.first[begin]), int(graph.first[end])) if radial.table.numel() == 0 else (0, 0)
        if sent is None:
            density = ops.density(
                graph.harmonics, radial.table, radial.columns[first:last], graph.r, graph.table_kind,
                graph.sender_kind, graph.first, len(atoms.present), begin, end, FIRST_KNOT,
                radial.step, radial.per_kind,
            )  # fmt: skip
            return [density[ell * ell : (ell + 1) ** 2] for ell in range(self.l_max + 1)]
        n = end - begin
        if radial.table.numel():
            flat = self._convolve(sent, radial, radial.columns, graph, begin, end)
            return self._split(flat, n)
        pieces: List[List[Tensor]] = []
        for a, b in self._chunks(graph.first, begin, end):
            values = self._values(radial, radial.columns[int(graph.first[a]) : int(graph.first[b])])
            pieces.append(self._split(self._convolve(sent, radial, values, graph, a, b), b - a))
        return [torch.cat(parts, dim=1) for parts in zip(*pieces, strict=True)]

    def _values(self, radial: LayerRadial, columns: Tensor) -> Tensor:
        return radial_values(columns, radial.weight)

    def _chunks(self, first: Tensor, begin: int, end: int) -> List[Tuple[int, int]]:
        """Ranges of atoms with at most AT_A_TIME radial functions of their pairs."""
        if end == begin:
            return [(begin, end)]
        most = max(AT_A_TIME // (len(self.paths) * self.edge_channels), 1)
        marks = first[begin : end + 1].tolist()
        out, a = [], 0
        for b in range(1, len(marks)):
            if b == len(marks) - 1 or marks[b + 1] - marks[a] > most:
                out.append((begin + a, begin + b))
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

    def _gated(
        self, messages: List[Tensor], sent: Optional[Tensor], rho: Optional[Tensor], begin: int, end: int
    ) -> Tuple[Tensor, Any]:
        """Gates by a small tape of their own: they are element-wise."""
        assert sent is not None
        assert rho is not None
        messenger: Any = self.source.messenger
        with torch.enable_grad():
            leaves = [*messages, sent[:, begin:end].detach(), rho[begin:end].detach()]
            leaves = [leaf.detach().requires_grad_(True) for leaf in leaves]
            norm = (1.0 / (messenger.beta * leaves[-1] + messenger.alpha)).view(1, -1, 1)
            by_path = [part for m in leaves[:-2] for part in torch.split(m, self.edge_channels, dim=2)]
            mixed = messenger.combine(by_path, leaves[-2], norm)
        return mixed.detach().contiguous(), (mixed, leaves)

    # --- adjoint -----------------------------------------------------------------------------------------------------

    def backward(
        self,
        grad: Tensor,
        saved: List[Any],
        features: Tensor,
        sent: Optional[Tensor],
        radial: LayerRadial,
        graph: Graph,
        atoms: Atoms,
        rho: Optional[Tensor],
        gradients: Gradients,
    ) -> Tuple[Tensor, Optional[Tensor]]:
        """Cotangents of `features` and `sent`; those of the pairs are added to `gradients`.

        Args:
            grad: ((l_out+1)^2, n, K).
        """
        grad_features = torch.zeros_like(features)
        grad_own = None if sent is None or not self.gated else torch.zeros_like(sent)
        grad_rho = None if rho is None else torch.zeros_like(rho)
        grad_sent = None
        linear = None if self.gated else self.linear(radial, atoms)
        mix = self.source.mix.transpose(1, 2)
        if self.source.has_skip:
            for species, begin, end in atoms.groups:
                skip = self._skip(species).transpose(1, 2)
                add_per_irrep(grad_features[:, begin:end], grad[:, begin:end], skip)
        for g, (_, begin, end) in enumerate(self._groups(atoms)):
            mixed, tape = saved[g]
            d_mixed = ops.polynomial_backward(
                mixed, self.coefficients, self._kinds(atoms, begin, end), self.nodes, self.term, self.starts,
                per_irrep(grad[:, begin:end], mix),
            )  # fmt: skip
            if self.gated:
                out, leaves = tape
                *d_messages, d_own, d_rho = torch.autograd.grad(out, leaves, d_mixed)
                assert grad_own is not None
                assert grad_rho is not None
                grad_own[:, begin:end] += d_own
                grad_rho[begin:end] = d_rho
                part = self._convolve_backward(d_messages, sent, radial, graph, begin, end, gradients)  # type: ignore[arg-type]
                grad_sent = part if grad_sent is None else grad_sent + part
                continue
            assert linear is not None
            if tape is not None:
                assert grad_rho is not None
                grad_rho[begin:end] = -(d_mixed * mixed * tape).sum(dim=(0, 2))
                d_mixed.mul_(tape)
            if sent is None:
                self._density_backward(d_mixed, linear[g], radial, graph, atoms, begin, end, gradients)
            else:
                d_messages = [
                    torch.matmul(d_mixed[ell * ell : (ell + 1) ** 2], linear[g][ell].t())
                    for ell in range(self.l_max + 1)
                ]
                part = self._convolve_backward(d_messages, sent, radial, graph, begin, end, gradients)
                grad_sent = part if grad_sent is None else grad_sent + part
        if grad_rho is not None:
            gradients.density[self.t] = grad_rho
        if grad_sent is not None and grad_own is not None:
            grad_sent = grad_sent + grad_own
        return grad_features, grad_sent

    def _density_backward(
        self,
        d_mixed: Tensor,
        linear: List[Tensor],
        radial: LayerRadial,
        graph: Graph,
        atoms: Atoms,
        begin: int,
        end: int,
        gradients: Gradients,
    ) -> None:
        width = linear[0].shape[0]
        d_density = d_mixed.new_empty(d_mixed.shape[0], end - begin, width)
        for ell, matrix in enumerate(linear):
            rows = d_mixed[ell * ell : (ell + 1) ** 2].view(-1, self.channels)
            torch.mm(rows, matrix.t(), out=d_density[ell * ell : (ell + 1) ** 2].view(-1, width))
        first, last = int(graph.first[begin]), int(graph.first[end])
        d_harmonics, d_radial = ops.density_backward(
            graph.harmonics, radial.table, radial.columns[first:last], graph.r, graph.table_kind,
            graph.sender_kind, graph.first, len(atoms.present), begin, end, FIRST_KNOT,
            radial.step, radial.per_kind, d_density,
        )  # fmt: skip
        gradients.harmonics[first:last] += d_harmonics
        if radial.table.numel():
            gradients.r[first:last] += d_radial
        else:
            if self.t not in gradients.columns:
                gradients.columns[self.t] = torch.zeros_like(radial.columns)
            gradients.columns[self.t][first:last] = d_radial

    def _convolve_backward(
        self,
        parts: List[Tensor],
        sent: Tensor,
        radial: LayerRadial,
        graph: Graph,
        begin: int,
        end: int,
        gradients: Gradients,
    ) -> Tensor:
        """Cotangent of `sent` from receivers begin..end, whose messages have the cotangents `parts`."""
        tabulated = radial.table.numel() > 0
        weight = in_blocks(radial.weight, LANES[radial.weight.dtype]).flatten(1)
        total = torch.zeros(0)
        for a, b in [(begin, end)] if tabulated else self._chunks(graph.first, begin, end):
            first, last = int(graph.first[a]), int(graph.first[b])
            flat = torch.cat([part[:, a - begin : b - begin].flatten() for part in parts])
            values = radial.columns if tabulated else self._values(radial, radial.columns[first:last])
            grad_sent, d_harmonics, d_radial = ops.convolution_backward(
                sent, graph.harmonics, radial.table, values, graph.r, graph.table_kind, graph.sender, graph.first,
                self.path_table, self.coupling, self.coefficient, a, b, FIRST_KNOT, radial.step, radial.per_kind, flat,
            )  # fmt: skip
            gradients.harmonics[first:last] += d_harmonics
            if tabulated:
                gradients.r[first:last] += d_radial
            else:
                if self.t not in gradients.columns:
                    gradients.columns[self.t] = torch.zeros_like(radial.columns)
                gradients.columns[self.t][first:last] = torch.mm(d_radial.flatten(1), weight.t())
            total = grad_sent if total.numel() == 0 else total + grad_sent
        return total


def per_irrep(features: Tensor, weight: Tensor) -> Tensor:
    """A matrix per irrep: ((L+1)^2, n, K) x (L'+1, K, K') -> ((L'+1)^2, n, K'), L' <= L."""
    out = features.new_empty(weight.shape[0] ** 2, features.shape[1], weight.shape[2])
    for ell in range(weight.shape[0]):
        torch.matmul(features[ell * ell : (ell + 1) ** 2], weight[ell], out=out[ell * ell : (ell + 1) ** 2])
    return out


def add_per_irrep(out: Tensor, features: Tensor, weight: Tensor) -> None:
    """Adds `per_irrep` to the first components of `out`, as far as `features` and `weight` go."""
    for ell in range(weight.shape[0]):
        rows = slice(ell * ell, (ell + 1) ** 2)
        if (ell + 1) ** 2 > min(out.shape[0], features.shape[0]):
            break
        out[rows] += torch.matmul(features[rows], weight[ell])
