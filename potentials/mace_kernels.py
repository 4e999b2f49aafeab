"""MACE on the operators of mdplug.kernels, with its adjoint written out: energies and forces without a tape.

The same function as `MACE` with the same weights. Atoms are sorted by element, so that everything that depends on it is
a matrix product on a block of rows; pairs are sorted by receiver. The fixed form compiles in TorchScript.
"""

import copy
from typing import Any, Dict, Final, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from mdplug import kernels
from mdplug.errors import InputError
from mdplug.potential import Potential
from mdplug.potentials.blocks.kernel_graph import Atoms, Graph, Kept, LayerRadial, Levels, sort_atoms
from mdplug.potentials.blocks.kernel_layer import KernelLayer, Tape
from mdplug.potentials.blocks.kernel_pairs import PairFunctions
from mdplug.potentials.blocks.kernel_weights import Made, Maker, no_tables, report
from mdplug.potentials.blocks.pull_back import pull_back
from mdplug.potentials.mace import MACE
from mdplug.potentials.narrow import narrowed

ops: Any = torch.ops.mdplug
MOST_SPECIES = 10  # whose matrices and tables a file holds


class KernelMACE(Potential):
    """A MACE for inference, on the CPU or a CUDA device (see mdplug/kernels/README.md).

    Args:
        mace: the definition, radial functions exact; it stays inside, for gradients of higher order.
        tables: radial functions as quintic splines; False: exact.
        fixed: the form that compiles: all is made once, for all elements; else for the elements at hand.

    Raises:
        InputError: fixed, and too many elements.
    """

    has_written_adjoint = True
    tabulated: Final[bool]
    made: Optional[Made]

    def __init__(self, mace: MACE, tables: bool, fixed: bool = False):
        super().__init__(mace.spec)
        self.head = mace.head
        self.definition = copy.deepcopy(mace).requires_grad_(False).eval()
        self.tabulated, self.fixed = tables, fixed
        left, right = self.definition.harmonics.products()
        self.register_buffer("left", left.cpu(), persistent=False)
        self.register_buffer("right", right.cpu(), persistent=False)
        self._build()

    def _build(self) -> None:
        """Everything that is derived from the definition and its dtype."""
        mace = self.definition
        self.layers: Any = nn.ModuleList([KernelLayer(mace, t) for t in range(len(mace.layers))])
        self.pair_functions = PairFunctions(mace, self.tabulated)
        self.table_error, self.table_report = 0.0, report(no_tables(mace))
        self.made = None
        self._maker = Maker(mace, self.tabulated)
        self._known: Optional[Tuple[Kept, Atoms]] = None  # one attribute: threads share this module
        self._known_levels: Optional[Tuple[Atoms, Kept, Kept, Levels]] = None
        n_species = mace.embedding.shape[0]
        if self.fixed:
            if n_species > MOST_SPECIES:
                raise InputError(
                    f"{self.spec.name!r} knows {n_species} elements, and a file on the native operators holds at most "
                    f"{MOST_SPECIES}; name those of your system with --species"
                )
            self._made_for(torch.arange(n_species))
        elif self.tabulated:
            # Where elements matter, tables are made for those at hand; these two stand for the error.
            tables = self._maker.tables(tuple(sorted({0, n_species - 1})))
            self.table_error, self.table_report = tables.slope_error, report(tables)

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

    def native(self) -> Potential:
        """See `Potential.native`."""
        return self._like(self.definition, fixed=True)

    def for_species(self, species: Sequence[int]) -> Potential:
        """See `Potential.for_species`."""
        return self._like(narrowed(self.definition, species), self.fixed)

    def _like(self, definition: MACE, fixed: bool) -> Potential:
        made = KernelMACE(definition, self.tabulated, fixed)
        made.head, made.origin = self.head, self.origin
        return made

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
        if torch.is_grad_enabled() and vectors.requires_grad:
            out = self.definition.local(numbers, pairs, vectors, n_owned, system_index, total_charge, total_spin, head)
        else:  # nothing returns from within: TorchScript cannot
            with torch.no_grad():
                out = self._evaluate(
                    numbers, pairs, vectors, n_owned, system_index, total_charge, total_spin, head, False
                )[0]
        return out

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
            out, tape = self._evaluate(
                numbers, pairs, vectors, n_owned, system_index, total_charge, total_spin, head, True
            )
            out["pair_gradient"] = self._pull(tape, vectors, torch.jit.annotate(Dict[str, Tensor], {}), False)
        return out

    @torch.jit.unused
    def local_with_pull(self, *arguments: Any) -> Tuple[Any, Any]:
        """`local`, and the function from cotangents of its outputs to that of the vectors (E, 3), called at will."""
        evaluate: Any = self._evaluate
        with torch.no_grad():
            result, tape = evaluate(*arguments, True)

        def pull(cotangents: Dict[str, Tensor]) -> Tensor:
            with torch.no_grad():
                return self._pull(tape, arguments[2], cotangents, True)

        return result, pull

    def _pull(self, tape: Tape, vectors: Tensor, cotangents: Dict[str, Tensor], keep: bool) -> Tensor:
        """(E, 3) cotangent of the vectors; without any given, the gradient of the sum of atom energies."""
        return torch.zeros_like(vectors).index_copy_(0, tape.origin, self._adjoint(tape, cotangents, keep))

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
    ) -> Tuple[Dict[str, Tensor], Tape]:
        mace = self.definition
        atoms = self._atoms(numbers, n_owned)
        made = self._made(atoms)
        vec, r, receiver, sender, first, origin = ops.graph(
            pairs.contiguous(), vectors, atoms.place, n_owned, float(mace.cutoff)
        )
        table, l_max = mace.harmonics.table, mace.harmonics.l_max
        harmonics = ops.harmonics(vec, r, self.left, self.right, table, l_max)
        receiving = sending = atoms.order[:0]
        table_kind = receiver[:0]
        pair_functions = self.pair_functions
        if pair_functions.species_matter:
            receiving, sending = atoms.species[receiver], atoms.species[sender]
        if self.tabulated and pair_functions.kinds_matter:
            table_kind = made.tables.kind_of[receiving, sending]
        graph = Graph(r, receiver, sender, first, harmonics, atoms.kind.index_select(0, sender), table_kind)
        scalars = pair_functions(made.tables, r, receiver, receiving, sending, table_kind, n_owned, gradient)

        levels = self._levels(atoms, system_index, head)
        atom_head, scale, start = levels.atom_head, levels.scale, levels.embedding
        outside = torch.zeros_like(scale)
        if mace.has_state:
            sorted_index = torch.cat([system_index[atoms.order], system_index[n_owned:]])
            start = start + mace.state(total_charge, total_spin)[sorted_index]
            if mace.reads_state:
                outside = mace.state_readout(start[:n_owned], atom_head)
        energy = scalars.repulsion if mace.has_repulsion else torch.zeros_like(scale)
        tape = Tape(
            [start[:n_owned].unsqueeze(0)], [], [], [], [], made.weights, [], graph, atoms, scalars, scale, vec, origin
        )
        features, tables = tape.features, made.tables
        for t, (layer, readout) in enumerate(zip(self.layers, mace.readouts)):  # noqa: B905
            weights = made.weights[t]
            radial = LayerRadial(
                tables.layers[t].table, scalars.columns[t], weights.radial, tables.step, tables.per_kind
            )
            sent, exchanged = start[:0], torch.jit.annotate(List[Tensor], [])
            if layer.first_layer:  # no exchange: ghosts know their own species
                if not layer.by_species:
                    sent = layer.send(start.unsqueeze(0), weights)
            else:
                sent = layer.send(features[t], weights)
                if atoms.place.shape[0] > n_owned:
                    sent, exchanged = self._over_borders(sent, atoms)
            new, saved = layer(features[t], sent, weights, radial, graph, atoms, scalars.densities[t])
            read, slope = readout.with_slope(new[0], atom_head, scale)  # type: ignore[operator]
            energy = energy + read
            features.append(new)
            if gradient:
                tape.sent.append(sent)
                tape.exchanged.append(exchanged)
                tape.saved.append(saved)
                tape.slopes.append(slope)
                tape.radial.append(radial)
            del saved  # the tape lets go of it when it is used
        energy = torch.addcmul(levels.shift, scale, energy) + outside
        place = atoms.place[:n_owned].long()
        scalars_of_all = torch.cat([f[0] for f in features[1:]], dim=1)[place]
        return {"atom_energy": energy[place], "features": scalars_of_all}, tape

    def _adjoint(self, tape: Tape, cotangents: Dict[str, Tensor], keep: bool) -> Tensor:
        """(P, 3) cotangent of the vectors.

        Args:
            cotangents: of "atom_energy" and "features"; none at all: ones for the energies.
            keep: the tape is needed again.
        """
        graph, atoms, scalars = tape.graph, tape.atoms, tape.scalars
        scale, slopes = tape.scale, tape.slopes
        if len(cotangents) > 0:  # by atom, in sorted order
            weight = torch.zeros_like(scale)
            if "atom_energy" in cotangents:
                weight = cotangents["atom_energy"][atoms.order]
            scale, slopes = weight * scale, [weight.unsqueeze(1) * slope for slope in slopes]
            if "features" in cotangents:
                parts = cotangents["features"][atoms.order].chunk(len(slopes), dim=1)
                slopes = [slope + parts[t] for t, slope in enumerate(slopes)]
        along_r = torch.zeros_like(graph.r)
        if self.definition.has_repulsion:
            along_r = scale[graph.receiver] * scalars.repulsion_slope
        along_harmonics = graph.harmonics[:0]
        grad = torch.zeros_like(tape.features[-1])
        for t in range(len(slopes) - 1, -1, -1):
            for k, layer in enumerate(self.layers):  # TorchScript picks no module by a number
                if k == t:
                    grad[0] += slopes[t]
                    weights = tape.weights[t]
                    back = layer.backward(
                        grad, tape.saved[t] if keep else tape.saved.pop(), tape.features[t], tape.sent[t], weights,
                        tape.radial[t], graph, atoms,
                    )  # fmt: skip
                    grad = back.features
                    if not layer.first_layer:
                        grad_sent = back.sent
                        if len(tape.exchanged[t]) > 0:
                            grad_sent = self._back_over_borders(grad_sent, tape.exchanged[t], atoms)
                        grad = layer.send_back(grad_sent, weights, grad)
                    if t == len(slopes) - 1:
                        along_harmonics = back.harmonics
                    else:
                        along_harmonics += back.harmonics
                    if self.tabulated:
                        along_r += back.radial
                    else:
                        along_r += (back.radial * scalars.column_slopes[t]).sum(1)
                    if layer.has_density:
                        along_r += back.rho[graph.receiver] * scalars.density_slopes[t]
        harmonics = self.definition.harmonics
        return ops.harmonics_backward(
            tape.vec, graph.r, self.left, self.right, harmonics.table, harmonics.l_max, along_harmonics, along_r
        )

    # --- parts -------------------------------------------------------------------------------------------------------

    def _species(self, numbers: Tensor) -> Tensor:
        """(N,) int64 places in the Spec's list.

        Raises:
            InputError: an element that the model does not know.
        """
        species_of = self.definition.species_of
        species = species_of[torch.clamp(numbers, max=species_of.shape[0] - 1)]
        if bool(((species < 0) | (numbers >= species_of.shape[0])).any()):
            raise InputError("an atom is of an element that the model does not know; see Spec.species")
        return species

    def _atoms(self, numbers: Tensor, n_owned: int) -> Atoms:
        if torch.jit.is_scripting():
            made = self.made
            assert made is not None
            return sort_atoms(self._species(numbers), n_owned, made.present)
        else:  # noqa: RET505  (TorchScript drops the branch)
            return self._kept_atoms(numbers, n_owned)

    @torch.jit.unused
    def _kept_atoms(self, numbers: Tensor, n_owned: int) -> Atoms:
        """Atoms by species; kept while numbers do not change."""
        known = self._known
        if known is not None and known[1].n == n_owned and known[0].equals(numbers):
            return known[1]
        present = self.made.present if self.fixed and self.made is not None else None
        atoms = sort_atoms(self._species(numbers), n_owned, present)
        self._known = (Kept(numbers), atoms)
        return atoms

    def _levels(self, atoms: Atoms, system_index: Tensor, head: Tensor) -> Levels:
        if torch.jit.is_scripting():
            return self._new_levels(atoms, system_index, head)
        else:  # noqa: RET505  (TorchScript drops the branch)
            return self._kept_levels(atoms, system_index, head)

    def _new_levels(self, atoms: Atoms, system_index: Tensor, head: Tensor) -> Levels:
        mace = self.definition
        atom_head = head[system_index[atoms.order]]
        return Levels(atom_head, mace.scale[atom_head], mace.shift[atom_head], mace.embedding[atoms.species])

    @torch.jit.unused
    def _kept_levels(self, atoms: Atoms, system_index: Tensor, head: Tensor) -> Levels:
        """Kept while atoms, structures and levels of theory do not change."""
        known = self._known_levels
        if known is not None and known[0] is atoms:
            _, same_index, same_head, levels = known
            if same_index.equals(system_index) and same_head.equals(head):
                return levels
        levels = self._new_levels(atoms, system_index, head)
        self._known_levels = (atoms, Kept(system_index), Kept(head), levels)
        return levels

    def _made(self, atoms: Atoms) -> Made:
        made = self.made
        if torch.jit.is_scripting():
            assert made is not None
            return made
        else:  # noqa: RET505  (TorchScript drops the branch)
            return self._made_for(atoms.present)

    @torch.jit.unused
    def _made_for(self, present: Tensor) -> Made:
        """Made once for the elements at hand."""
        made = self.made
        if made is None or not torch.equal(made.present, present):
            made = self.made = self._maker.make(present)
            self.table_error, self.table_report = made.tables.slope_error, report(made.tables)
        return made

    @torch.jit.unused
    def _over_borders(self, own: Tensor, atoms: Atoms) -> Tuple[Tensor, List[Tensor]]:
        """What neighbours see of all atoms, ((edge_l+1)^2, N, k), from that of the owned; tape of the exchange."""
        n_atoms, place = atoms.place.shape[0], atoms.place.long()
        rows = own.transpose(0, 1).flatten(1)[place[: atoms.n]]  # engines know atoms in their own order
        leaf = torch.cat([rows, rows.new_zeros(n_atoms - atoms.n, rows.shape[1])]).requires_grad_(True)
        with torch.enable_grad():
            filled = self.exchange(leaf, atoms.n)
        by_place = torch.empty_like(filled).index_copy_(0, place, filled.detach())
        sent = by_place.view(n_atoms, own.shape[0], own.shape[2]).transpose(0, 1).contiguous()
        return sent, [leaf, filled]

    @torch.jit.unused
    def _back_over_borders(self, grad: Tensor, tape: List[Tensor], atoms: Atoms) -> Tensor:
        """Cotangent of what the owned atoms sent, from that of what all atoms were seen to send."""
        rows = grad.transpose(0, 1).flatten(1)[atoms.place.long()]
        back = pull_back([tape[1]], [tape[0]], [rows])[0][atoms.order]
        return back.view(atoms.n, grad.shape[0], grad.shape[2]).transpose(0, 1).contiguous()
