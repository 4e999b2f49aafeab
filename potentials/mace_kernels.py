"""MACE on the operators of mdplug.kernels, with its adjoint written out: energies and forces without a tape.

The same function as `MACE` with the same weights. Atoms are sorted by element, so that everything that depends on it is
a matrix product on a block of rows; pairs are sorted by receiver for the forward pass and by sender for the adjoint.
"""

import copy
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor, nn

from mdplug import kernels
from mdplug.errors import InputError
from mdplug.potential import Potential
from mdplug.potentials.blocks.kernel_graph import Atoms, Gradients, Graph, Kept, LayerRadial, Levels, sort_atoms
from mdplug.potentials.blocks.kernel_layer import KernelLayer
from mdplug.potentials.blocks.knots import Tables, depends_on_species, make_tables, to_device
from mdplug.potentials.blocks.pull_back import pull_back
from mdplug.potentials.mace import MACE

ops: Any = torch.ops.mdplug


class PairScalars(NamedTuple):
    """What is a plain function of the distance, on a small tape of its own.

    Attributes:
        r: (P, 1) A, the leaf. repulsion: (n,) or None. densities, columns: by layer.
    """

    r: Tensor
    repulsion: Optional[Tensor]
    densities: Dict[int, Tensor]
    columns: Dict[int, Tensor]


class KernelMACE(Potential):
    """A MACE for inference, on the CPU or a CUDA device (see mdplug/kernels/README.md).

    Args:
        mace: the definition, radial functions exact; it stays inside, for gradients of higher order.
        tables: radial functions as quintic splines; False: exact.
    """

    has_written_adjoint = True

    def __init__(self, mace: MACE, tables: bool):
        super().__init__(mace.spec)
        self.head = mace.head
        self.definition = copy.deepcopy(mace).requires_grad_(False).eval()
        self.tabulated = tables
        left, right = self.definition.harmonics.products()
        self.register_buffer("left", left.cpu(), persistent=False)
        self.register_buffer("right", right.cpu(), persistent=False)
        self._species_matter = depends_on_species(mace.radial)
        self._build()

    def _build(self) -> None:
        """Everything that is derived from the definition and its dtype."""
        mace = self.definition
        self.layers: Any = nn.ModuleList([KernelLayer(mace, t) for t in range(len(mace.layers))])
        self.table_error = 0.0
        self.table_report: Dict[str, Any] = {}
        self._tables: Dict[Tuple[int, ...], Tables] = {}
        self._known: Optional[Tuple[Kept, Atoms]] = None  # one attribute: threads share this module
        self._known_levels: Optional[Tuple[Atoms, Levels]] = None
        if self.tabulated:
            # Where elements matter, tables are made for those at hand; these two stand for the error.
            self._tables_for((0,) if not self._species_matter else (0, mace.embedding.shape[0] - 1))

    def _apply(self, fn: Any, recurse: bool = True) -> "KernelMACE":
        """Another dtype or device makes tables and blocks anew.

        Raises:
            InputError: a device without such kernels.
        """
        self.definition._apply(fn, recurse)
        weight, built = self.definition.embedding, self.layers[0].coefficients
        lacking = kernels.missing(weight.device)
        if lacking:
            raise InputError(f"no kernels on {weight.device}, {lacking}; move what without_kernels() gives")
        if weight.dtype != built.dtype or weight.device != built.device:
            self._build()
        return self

    def load_state_dict(self, *arguments: Any, **options: Any) -> Any:
        """As torch's; what was derived from the old weights is made anew."""
        found = super().load_state_dict(*arguments, **options)
        self._build()
        return found

    # --- forms -------------------------------------------------------------------------------------------------------

    def with_tables(self) -> Potential:
        """See `Potential.with_tables`."""
        return self if self.tabulated else KernelMACE(self.definition, True)

    def with_exact_radial(self) -> Potential:
        """See `Potential.with_exact_radial`."""
        return self.definition

    def without_kernels(self) -> Potential:
        """See `Potential.without_kernels`."""
        plain = self.definition.with_tables() if self.tabulated else self.definition
        plain.head, plain.origin = self.head, self.origin
        return plain

    # --- evaluation --------------------------------------------------------------------------------------------------

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
        """See `Potential.local`; where a gradient is wanted it is the definition that runs."""
        arguments = (numbers, pairs, vectors, n_owned, system_index, total_charge, total_spin, head)
        if torch.is_grad_enabled() and vectors.requires_grad:
            return self.definition.local(*arguments)
        with torch.no_grad():
            return self._evaluate(*arguments, gradient=False)

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
        with torch.no_grad():
            return self._evaluate(
                numbers, pairs, vectors, n_owned, system_index, total_charge, total_spin, head, gradient=True
            )

    def _evaluate(
        self,
        numbers: Tensor,
        pairs: Tensor,
        vectors: Tensor,
        n_owned: int,
        system_index: Tensor,
        total_charge: Tensor,
        total_spin: Tensor,
        head: Tensor,
        gradient: bool,
    ) -> Dict[str, Tensor]:
        mace = self.definition
        atoms = self._sorted(numbers, n_owned)
        vec, r, receiver, sender, first, origin = ops.graph(pairs, vectors, atoms.place, n_owned, float(mace.cutoff))
        table, l_max = mace.harmonics.table, mace.harmonics.l_max
        harmonics = ops.harmonics(vec, r, self.left, self.right, table, l_max)
        tables = self._tables_for(atoms.present) if self.tabulated else None
        table_kind = receiver.new_empty(0)
        receiving = sending = r.new_empty(0, dtype=torch.int64)
        if self._species_matter or mace.has_repulsion or not self.tabulated:
            receiving, sending = atoms.species[receiver], atoms.species[sender]
        if tables is not None and self._species_matter:
            table_kind = tables.kind_of[receiving, sending]
        sender_kind = atoms.kind.index_select(0, sender)
        graph = Graph(r, receiver, sender, first, harmonics, sender_kind, table_kind)
        scalars = self._pair_scalars(tables, graph, receiving, sending, atoms.n, gradient)
        radial = [self._layer_radial(t, tables, scalars) for t in range(len(self.layers))]

        levels = self._levels(atoms, system_index, head)
        atom_head, scale, start = levels.atom_head, levels.scale, levels.embedding
        outside = torch.zeros_like(scale)
        if mace.has_state:
            sorted_index = system_index.clone()
            sorted_index[: atoms.n] = system_index[atoms.order]
            start = start + mace.state(total_charge, total_spin)[sorted_index]
            if mace.reads_state:
                outside = mace.state_readout(start[: atoms.n], atom_head)
        energy = torch.zeros_like(scale) if scalars.repulsion is None else scalars.repulsion.detach()
        features = [start[: atoms.n].unsqueeze(0)]
        sent: List[Optional[Tensor]] = []
        exchanged: List[Any] = []
        saved: List[Any] = []
        slopes: List[Tensor] = []
        for t, layer in enumerate(self.layers):
            out, tape = self._send(layer, start if t == 0 else features[t], radial[t], atoms)
            sent.append(out)
            exchanged.append(tape)
            new, kept = layer(features[t], out, radial[t], graph, atoms, scalars.densities.get(t))
            features.append(new)
            saved.append(kept if gradient else None)
            del kept  # the adjoint lets go of it when it is used
            readout: Any = mace.readouts[t]
            read, slope = readout.with_slope(new[0], atom_head, scale)
            energy = energy + read
            slopes.append(slope)
        energy = torch.addcmul(levels.shift, scale, energy) + outside
        place = atoms.place[: atoms.n].long()
        result = {
            "atom_energy": energy[place],
            "features": torch.cat([f[0] for f in features[1:]], dim=1)[place],
        }
        if gradient:
            grad = self._adjoint(features, sent, exchanged, saved, slopes, radial, graph, atoms, scalars, scale, vec)
            result["pair_gradient"] = vectors.new_zeros(vectors.shape).index_copy_(0, origin, grad)
        return result

    def _send(
        self, layer: KernelLayer, features: Tensor, radial: LayerRadial, atoms: Atoms
    ) -> Tuple[Optional[Tensor], Any]:
        """What neighbours see of all atoms, ((edge_l+1)^2, N, k); and the tape of the exchange, if any."""
        if layer.t == 0:  # no exchange: ghosts know their own species
            return (None if layer.by_species else layer.send(features.unsqueeze(0), layer.weights(radial, atoms))), None
        own = layer.send(features, layer.weights(radial, atoms))
        n_atoms = atoms.place.shape[0]
        if n_atoms == atoms.n:
            return own, None
        place = atoms.place.long()
        rows = own.transpose(0, 1).flatten(1)[place[: atoms.n]]  # engines know atoms in their own order
        leaf = torch.cat([rows, rows.new_zeros(n_atoms - atoms.n, rows.shape[1])]).requires_grad_(True)
        with torch.enable_grad():
            filled = self.exchange(leaf, atoms.n)
        by_place = torch.empty_like(filled).index_copy_(0, place, filled.detach())
        sent = by_place.view(n_atoms, own.shape[0], own.shape[2]).transpose(0, 1).contiguous()
        return sent, (leaf, filled)

    def _send_back(self, grad: Tensor, tape: Any, atoms: Atoms) -> Tensor:
        """Cotangent of what the owned atoms sent, from that of what all atoms were seen to send."""
        if tape is None:
            return grad
        leaf, filled = tape
        rows = grad.transpose(0, 1).flatten(1)[atoms.place.long()]
        back = pull_back([filled], [leaf], [rows])[0][atoms.order]
        return back.view(atoms.n, grad.shape[0], grad.shape[2]).transpose(0, 1).contiguous()

    def _adjoint(
        self,
        features: List[Tensor],
        sent: List[Optional[Tensor]],
        exchanged: List[Any],
        saved: List[Any],
        slopes: List[Tensor],
        radial: List[LayerRadial],
        graph: Graph,
        atoms: Atoms,
        scalars: PairScalars,
        scale: Tensor,
        vec: Tensor,
    ) -> Tensor:
        """(P, 3) dE/d(vectors)."""
        gradients = Gradients(graph)
        grad = torch.zeros_like(features[-1])
        for t in range(len(self.layers) - 1, -1, -1):
            layer = self.layers[t]
            grad[0] += slopes[t]
            grad, grad_sent = layer.backward(
                grad, saved.pop(), features[t], sent[t], radial[t], graph, atoms, gradients
            )
            if t > 0 and grad_sent is not None:
                grad_sent = self._send_back(grad_sent, exchanged[t], atoms)
                up = layer.weights(radial[t], atoms).up_back
                grad = ops.linear(grad_sent, up, layer.no_group, grad, grad.shape[0], grad.shape[2])
        outputs, cotangents = [], []
        if scalars.repulsion is not None:
            outputs.append(scalars.repulsion)
            cotangents.append(scale)
        for t, rho in scalars.densities.items():
            outputs.append(rho)
            cotangents.append(gradients.density[t])
        for t, columns in scalars.columns.items():
            outputs.append(columns)
            cotangents.append(gradients.columns[t])
        if outputs and graph.r.shape[0]:
            along = pull_back(outputs, [scalars.r], cotangents)[0].squeeze(1)
            gradients.r = along if gradients.r is None else gradients.r + along
        harmonics = self.definition.harmonics
        along_r = torch.zeros_like(graph.r) if gradients.r is None else gradients.r
        return ops.harmonics_backward(
            vec, graph.r, self.left, self.right, harmonics.table, harmonics.l_max, gradients.harmonics, along_r
        )

    # --- parts -------------------------------------------------------------------------------------------------------

    def _sorted(self, numbers: Tensor, n_owned: int) -> Atoms:
        """Atoms by species; kept while numbers do not change.

        Raises:
            InputError: an element that the model does not know.
        """
        known = self._known
        if known is not None and known[1].n == n_owned and known[0].equals(numbers):
            return known[1]
        species_of = self.definition.species_of
        species = species_of[torch.clamp(numbers, max=species_of.shape[0] - 1)]
        if bool(((species < 0) | (numbers >= species_of.shape[0])).any()):
            raise InputError("an atom is of an element that the model does not know; see Spec.species")
        atoms = sort_atoms(species, n_owned)
        self._known = (Kept(numbers), atoms)
        return atoms

    def _levels(self, atoms: Atoms, system_index: Tensor, head: Tensor) -> Levels:
        """Kept while atoms, structures and levels of theory do not change."""
        known = self._known_levels
        if known is not None and known[0] is atoms:
            levels = known[1]
            if levels.system_index.equals(system_index) and levels.head.equals(head):
                return levels
        mace = self.definition
        atom_head = head[system_index[atoms.order]]
        levels = Levels(
            Kept(system_index), Kept(head), atom_head, mace.scale[atom_head], mace.shift[atom_head],
            mace.embedding[atoms.species],
        )  # fmt: skip
        self._known_levels = (atoms, levels)
        return levels

    def _tables_for(self, present: Tuple[int, ...]) -> Tables:
        key = present if self._species_matter else ()
        made = self._tables.get(key)
        if made is None:
            made = to_device(make_tables(self.definition, present), self.definition.embedding.device)
            self._tables = {key: made}
            self.table_error = made.slope_error
            self.table_report = {
                "radial": "quintic splines",
                "slope_error": made.slope_error,
                "value_error": made.value_error,
                "knots": made.per_kind - 1,
            }
        return made

    def _pair_scalars(
        self, tables: Optional[Tables], graph: Graph, receiving: Tensor, sending: Tensor, n: int, gradient: bool
    ) -> PairScalars:
        mace = self.definition
        repulsion: Optional[Tensor] = None
        densities: Dict[int, Tensor] = {}
        columns: Dict[int, Tensor] = {}
        with torch.set_grad_enabled(gradient):
            r = graph.r.unsqueeze(1).requires_grad_(gradient)

            def summed(values: Tensor) -> Tensor:
                return values.new_zeros(n).index_add(0, graph.receiver, values)

            if mace.has_repulsion:
                repulsion = summed(mace.repulsion(r, receiving, sending))
            dense = [layer.t for layer in self.layers if layer.has_density]
            if tables is None:
                for t, made in enumerate(mace.radial(r, receiving, sending)):
                    b = self.layers[t].source.messenger.n_radial
                    columns[t] = made[:, :b].contiguous()
                    if t in dense:
                        densities[t] = summed(made[:, b])
            elif tables.densities is not None:
                for t, made in zip(dense, tables.densities(r, receiving, sending), strict=True):
                    densities[t] = summed(made.squeeze(1))
        return PairScalars(r, repulsion, densities, columns)

    def _layer_radial(self, t: int, tables: Optional[Tables], scalars: PairScalars) -> LayerRadial:
        weight: Tensor = self.layers[t].source.messenger.radial_weight
        if tables is None:
            return LayerRadial(weight.new_empty(0), scalars.columns[t].detach(), weight, 1.0, 2)
        table, reduced = tables.layers[t]
        return LayerRadial(table, weight.new_empty(0), reduced, tables.step, tables.per_kind)
