"""Upstream MACE checkpoint -> our MACE, exactly; all normalisations move into the weights.

Upstream's factors (1/sqrt(fan-in), activation constants, 1/sqrt(S), mean number of neighbours) are multiplied in
float64, so that the converted model in float64 gives upstream's numbers to rounding.
"""

import datetime
import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mdplug.errors import InputError, MdplugError, ModelFileError
from mdplug.potentials.blocks.activations import ACTIVATION_NORM
from mdplug.potentials.blocks.contraction import symmetric_basis
from mdplug.potentials.blocks.convolution import paths
from mdplug.potentials.convert.checkpoint import Checkpoint
from mdplug.potentials.convert.licences import UNKNOWN_LICENCE, licence_of
from mdplug.potentials.convert.pickle_machine import Inert
from mdplug.potentials.convert.pickle_reader import read_module
from mdplug.potentials.mace import MACE, describe

CITE = ("Batatia et al., MACE: Higher order equivariant message passing, NeurIPS 2022, arXiv:2206.07697",)


def convert(path: str | Path, head: str | None = None, elements: Sequence[str | int] | None = None) -> MACE:
    """Our potential from an upstream `.model` file. Nothing of the file is run; mace-torch is not needed.

    Args:
        path: the file.
        head: keep this level of theory only; None: all of them.
        elements: symbols or atomic numbers to keep (exact: the others are dropped); None: all.

    Returns:
        MACE with float64 weights; `spec.dtype` says in which dtype it was trained.

    Raises:
        ModelFileError: not such a file, or a kind of model that mdplug does not have.
        InputError: a head or element that the model does not have.
    """
    path = Path(path)
    root = read_module(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    origin = {"source_file": path.name, "source_sha256": digest}
    return convert_module(root, path.name, head, elements, licence=licence_of(path.name, digest), origin=origin)


def convert_module(
    root: Inert,
    where: str,
    head: str | None = None,
    elements: Sequence[str | int] | None = None,
    *,
    licence: str = UNKNOWN_LICENCE,
    origin: dict[str, Any] | None = None,
) -> MACE:
    """Our potential from a module that `read_module` read; arguments and errors as in `convert`.

    Args:
        root: the module. where: its name, for messages and the Spec. licence: of the weights.
        origin: further entries of the Spec's provenance.
    """
    try:
        source = Checkpoint(root, where)
        rows, columns = _chosen_elements(source, elements), _chosen_heads(source, head)
        weights = _Weights(source, rows, columns)
        state = weights.state()
    except MdplugError:
        raise
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError) as error:
        detail = " ".join(str(error).split())
        raise ModelFileError(f"{where}: is damaged ({detail}); download or copy it again") from error
    species = tuple(source.species[row] for row in rows)
    heads = tuple(source.heads[column] for column in columns)
    energies = weights.reference_energies(species, heads)
    source.refuse_leftovers()
    provenance = {
        **(origin or {}),
        "source_class": root.class_name,
        "source_layers": source.layers,
        "source_heads": list(source.heads),
        "source_elements": list(source.species),
        "converted": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "remarks": source.remarks,
    }
    spec = describe(
        Path(where).stem,
        source.settings,
        source.cutoff,
        species,
        heads=heads,
        dtype=source.dtype,
        conservative=not source.settings["radial"]["detached"],
        atomic_energies=energies,
        licence=licence,
        cite=CITE,
        provenance=provenance,
    )
    model = MACE(spec).to(torch.float64)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        detail = " ".join(str(error).split())
        raise ModelFileError(
            f"{where}: its weights do not fit its hyper-parameters ({detail}); use mace-torch"
        ) from error
    if len(heads) == 1:
        model.head = 0
    return model


def _chosen_heads(source: Checkpoint, head: str | None) -> list[int]:
    if head is None:
        return list(range(len(source.heads)))
    if head not in source.heads:
        raise InputError(f"{source.where} has no head {head!r}; it has: {', '.join(source.heads)}")
    return [source.heads.index(head)]


def _chosen_elements(source: Checkpoint, elements: Sequence[str | int] | None) -> list[int]:
    from ase.data import atomic_numbers, chemical_symbols

    if elements is None:
        return list(range(len(source.species)))
    wanted = set()
    for element in elements:
        number = atomic_numbers.get(element) if isinstance(element, str) else element
        if number not in source.species:
            known = " ".join(chemical_symbols[z] for z in source.species)
            raise InputError(f"{source.where} does not know the element {element!r}; it knows: {known}")
        wanted.add(number)
    if not wanted:
        raise InputError("elements is empty; name at least one, or leave it out to keep all")
    return [row for row, z in enumerate(source.species) if z in wanted]


class _Weights:
    """The state dict of our MACE, taken from a checkpoint.

    Args:
        source: the checkpoint. rows: species to keep. columns: heads to keep.
    """

    def __init__(self, source: Checkpoint, rows: list[int], columns: list[int]):
        self.source, self.config = source, source.settings
        self.rows, self.columns = torch.tensor(rows), torch.tensor(columns)
        self.n_species, self.n_heads = len(source.species), len(source.heads)
        self.k, self.l_max = source.channels, source.l_max
        self.out: dict[str, Tensor] = {}

    def state(self) -> dict[str, Tensor]:
        """Every entry, in float64."""
        take, k = self.source.take, self.k
        embedding = take("node_embedding.linear.weight", self.n_species, k) / math.sqrt(self.n_species)
        self.out["embedding"] = embedding[self.rows]
        self._state_embedding()
        self._radial()
        for t, kind in enumerate(self.config["kinds"]):
            self._layer(t, kind)
            self._product(t)
        self._readouts()
        for name in ("scale", "shift"):
            key = f"scale_shift.{name}"
            value = take(key) if self.source.has(key) else torch.full((), float(name == "scale"), dtype=torch.float64)
            self.out[name] = value.reshape(-1).expand(self.n_heads)[self.columns]
        return {key: value.contiguous().clone() for key, value in self.out.items()}

    def reference_energies(self, species: Sequence[int], heads: Sequence[str]) -> dict[str, dict[str, float]]:
        """{head: {symbol: eV}}."""
        from ase.data import chemical_symbols

        table = self.source.take("atomic_energies_fn.atomic_energies")
        table = table.reshape(-1, self.n_species).expand(self.n_heads, -1)[self.columns][:, self.rows]
        symbols = [chemical_symbols[z] for z in species]
        return {head: dict(zip(symbols, row.tolist(), strict=True)) for head, row in zip(heads, table, strict=True)}

    def _state_embedding(self) -> None:
        take, records = self.source.take, self.config["embedding"]
        if not records:
            return
        for n, record in enumerate(records):
            base = f"joint_embedding.embedders.{record['name']}"
            if record["kind"] == "categorical":
                self.out[f"state.inputs.{n}.table"] = take(f"{base}.weight")
                continue
            for ours, theirs in (("first", "0"), ("second", "2")):
                self.out[f"state.inputs.{n}.{ours}.weight"] = take(f"{base}.{theirs}.weight")
                if record["bias"]:
                    self.out[f"state.inputs.{n}.{ours}.bias"] = take(f"{base}.{theirs}.bias")
        self.out["state.project"] = take("joint_embedding.project.0.weight").t()
        if self.config["embedding_readout"]:
            weight = take("embedding_readout.linear.weight", self.k, self.n_heads) / math.sqrt(self.k)
            self.out["state_readout.weight"] = weight[:, self.columns]

    def _radial(self) -> None:
        take, config = self.source.take, self.config["radial"]
        base, numbers = "radial_embedding", torch.tensor(self.source.species)[self.rows]
        if config["basis"] == "bessel":
            self.out["radial.basis.frequencies"] = take(f"{base}.bessel_fn.bessel_weights").reshape(-1)
            self.out["radial.basis.prefactor"] = take(f"{base}.bessel_fn.prefactor")
        elif config["basis"] == "gaussian":
            self.out["radial.basis.centres"] = take(f"{base}.bessel_fn.gaussian_weights").reshape(-1)
            step = self.source.cutoff / (config["n_basis"] - 1)
            self.out["radial.basis.width"] = torch.tensor(step, dtype=torch.float64)
        else:
            take(f"{base}.bessel_fn.n")
        if config["transform"] != "none":
            for key in ("alpha",) if config["transform"] == "soft" else ("a", "q", "p"):
                self.out[f"radial.transform.{key}"] = take(f"{base}.distance_transform.{key}")
            self.out["radial.transform.radii"] = take(f"{base}.distance_transform.covalent_radii")[numbers]
        if self.config["repulsion"]:
            names = {"coefficients": "c", "exponent": "a_exp", "prefactor": "a_prefactor"}
            for ours, theirs in names.items():
                self.out[f"repulsion.{ours}"] = take(f"pair_repulsion_fn.{theirs}")
            self.out["repulsion.radii"] = take("pair_repulsion_fn.covalent_radii")[numbers]

    def _layer(self, t: int, kind: str) -> None:
        config, take, base = self.config, self.source.take, f"interactions.{t}"
        n_species, channels = self.n_species, self.k
        edge_l = 0 if t == 0 else config["edge_l"]
        k = config["edge_channels"] if t > 0 or config["edge_first"] else channels
        up = take(f"{base}.linear_up.weight", edge_l + 1, channels, k)
        self.out[f"layers.{t}.up"] = up / math.sqrt(channels)
        if kind == "NL":
            self._gated(t, edge_l, k)
        else:
            self._plain(t, kind, edge_l, k)
        l_in, l_out = (0 if t == 0 else config["l_hidden"]), self._l_out(t)
        if kind == "NL":
            n_common = min(l_in, l_out) + 1
            skip = take(f"{base}.skip_tp.weight", n_common, channels, channels)
            self.out[f"layers.{t}.skip"] = skip / math.sqrt(channels)
            return
        empty = torch.zeros(0, len(self.rows), channels, channels, dtype=torch.float64)
        of_layer, of_messenger = f"layers.{t}.skip", f"layers.{t}.messenger.skip"
        target, other = (of_layer, of_messenger) if "R" in kind else (of_messenger, of_layer)
        n_blocks = min(l_in, l_out) + 1 if "R" in kind else self.l_max + 1
        self.out[other] = empty
        skip = take(f"{base}.skip_tp.weight", n_blocks, channels, n_species, channels).transpose(1, 2)
        self.out[target] = skip[:, self.rows] / math.sqrt(channels * n_species)

    def _l_out(self, t: int) -> int:
        last = t == len(self.config["kinds"]) - 1
        return self.config["l_hidden"] if not last or self.config["keep_last"] else 0

    def _plain(self, t: int, kind: str, edge_l: int, k: int) -> None:
        take, base, ours = self.source.take, f"interactions.{t}", f"layers.{t}.messenger"
        found = paths(edge_l, self.l_max)
        count = len(self.config["radial"]["widths"])
        for n in range(count + 1):
            weight = take(f"{base}.conv_tp_weights.layer{n}.weight")
            carried = 1.0 if n == 0 else ACTIVATION_NORM["silu"]
            weight = weight * (carried / math.sqrt(weight.shape[0]))
            if n < count:
                self.out[f"radial.nets.{t}.hidden.{n}.weight"] = weight
            else:
                self.out[f"{ours}.radial_weight"] = weight.reshape(weight.shape[0], len(found), k)
        linear = take(f"{base}.linear.weight", len(found), k, self.k) * self._fan_in(found, k)
        self.out[f"{ours}.linear"] = linear if "D" in kind else linear / self.config["neighbours"][t]
        n_basis = self.config["radial"]["n_basis"]
        density = torch.zeros(0, dtype=torch.float64)
        if "D" in kind:
            density = take(f"{base}.density_fn.layer0.weight", n_basis) / math.sqrt(n_basis)
        self.out[f"radial.nets.{t}.density"] = density

    @staticmethod
    def _fan_in(found: list[tuple[int, int, int]], k: int) -> Tensor:
        """1/sqrt(inputs of the output irrep), per path."""
        count = [sum(1 for path in found if path[2] == l3) for _, _, l3 in found]
        return torch.tensor([1.0 / math.sqrt(n * k) for n in count], dtype=torch.float64).view(-1, 1, 1)

    def _gated(self, t: int, edge_l: int, k: int) -> None:
        take, base, ours, channels = self.source.take, f"interactions.{t}", f"layers.{t}.messenger", self.k
        found, net = paths(edge_l, self.l_max), f"radial.nets.{t}"
        for name in ("source", "target"):
            table = take(f"{base}.{name}_embedding.weight", self.n_species, channels) / math.sqrt(self.n_species)
            self.out[f"{net}.{name}"] = table[self.rows]
        last = 3 * len(self.config["radial"]["widths"])
        for n in [n for n in range(last) if n % 3 < 2]:
            target = f"{net}.first" if n == 0 else f"{net}.rest.{n - 1}"
            for part in ("weight", "bias"):
                self.out[f"{target}.{part}"] = take(f"{base}.conv_tp_weights.net.{n}.{part}")
        for target, n in (("density_first", 0), ("density_norm", 1), ("density_last", 3)):
            for part in ("weight", "bias"):
                self.out[f"{net}.{target}.{part}"] = take(f"{base}.density_fn.net.{n}.{part}")
        weight, bias = (take(f"{base}.conv_tp_weights.net.{last}.{part}") for part in ("weight", "bias"))
        whole = torch.cat([weight.t(), bias.unsqueeze(0)])
        self.out[f"{ours}.radial_weight"] = whole.reshape(whole.shape[0], len(found), k)
        wide = channels * (1 + self.l_max)  # features and gates
        widths = [wide if path[2] == 0 else channels for path in found]
        pieces = torch.split(take(f"{base}.linear_1.weight", k * sum(widths)), [k * w for w in widths])
        blocks = [
            piece.reshape(k, -1) * scale for piece, scale in zip(pieces, self._fan_in(found, k)[:, 0], strict=True)
        ]
        self.out[f"{ours}.linear"] = torch.stack([block[:, :channels] for block in blocks])
        self.out[f"{ours}.gate_linear"] = torch.stack([b[:, channels:] for b in blocks if b.shape[1] == wide])
        widths = [wide] + [channels] * min(edge_l, self.l_max)
        pieces = torch.split(take(f"{base}.linear_res.weight", k * sum(widths)), [k * w for w in widths])
        blocks = [piece.reshape(k, -1) / math.sqrt(k) for piece in pieces]
        self.out[f"{ours}.residual"] = torch.stack([block[:, :channels] for block in blocks])
        self.out[f"{ours}.gate_residual"] = blocks[0][:, channels:]
        gates = [ACTIVATION_NORM["silu"]] + [ACTIVATION_NORM["sigmoid"]] * self.l_max
        mixer = take(f"{base}.linear_2.weight", self.l_max + 1, channels, channels) / math.sqrt(channels)
        self.out[f"{ours}.mixer"] = mixer * torch.tensor(gates, dtype=torch.float64).view(-1, 1, 1)
        for name in ("alpha", "beta"):
            self.out[f"{ours}.{name}"] = take(f"{base}.{name}", 1)

    def _product(self, t: int) -> None:
        take, base, l_last, degree = self.source.take, f"products.{t}", self._l_out(t), self.config["correlation"][t]
        mix = take(f"{base}.linear.weight", l_last + 1, self.k, self.k)
        self.out[f"layers.{t}.mix"] = mix / math.sqrt(self.k)
        rows = torch.zeros(1, dtype=torch.int64) if self.config["agnostic"] else self.rows
        whole = f"{base}.symmetric_contractions.weight"
        start = 0
        for l_out in range(l_last + 1):
            for nu in range(degree, 0, -1):
                count = self.source.couplings(l_out, nu)
                if self.source.has(whole):  # cuEquivariance: all outputs and degrees in one
                    weight = take(whole)[:, start : start + count]
                    start += count
                else:
                    contraction = f"{base}.symmetric_contractions.contractions.{l_out}"
                    place = "weights_max" if nu == degree else f"weights.{degree - 1 - nu}"
                    weight = self._in_our_basis(
                        f"{contraction}.U_matrix_{nu}", l_out, nu, take(f"{contraction}.{place}")
                    )
                self.out[f"layers.{t}.product.outputs.{l_out}.powers.{nu - 1}.weight"] = weight[rows]

    def _in_our_basis(self, name: str, l_out: int, nu: int, weight: Tensor) -> Tensor:
        """Weights for our couplings; those of the file are compared with ours, and where they differ, changed over."""
        index, basis, sizes = symmetric_basis(self.l_max, l_out, nu)
        if basis.shape[1] == 0:  # out of reach; upstream keeps one column that multiplies zeros
            return weight[:, :0]
        if not self.source.has(name):
            if weight.shape[1] != basis.shape[1]:
                raise self.source.wrong(
                    f"has {weight.shape[1]} couplings where the full basis has {basis.shape[1]}, and lacks {name}; "
                    f"convert it with mace-torch to the full e3nn basis first"
                )
            return weight
        theirs = _on_monomials(self.source.take(name).numpy(), index, sizes, 2 * l_out + 1)
        tolerance = 1e-10 if self.source.tensors[name].dtype == torch.float64 else 1e-5
        if theirs.shape == basis.shape and np.abs(theirs - basis).max(initial=0.0) < tolerance * np.abs(basis).max():
            return weight
        change, *_ = np.linalg.lstsq(basis, theirs, rcond=None)
        if np.abs(basis @ change - theirs).max(initial=0.0) > tolerance * np.abs(basis).max():
            raise self.source.wrong(f"{name} holds couplings that are not those of MACE; the file is damaged")
        self.source.remarks.append(f"{name} is another basis than ours; its weights were changed over")
        return torch.einsum("pq,sqk->spk", torch.from_numpy(change), weight)

    def _readouts(self) -> None:
        take, k, heads = self.source.take, self.k, self.n_heads
        settings, n_layers = self.config["readout"], len(self.config["kinds"])
        linear = [] if settings["last_only"] else list(range(max(n_layers - 1, 1)))
        for t in linear:
            weight = take(f"readouts.{t}.linear.weight", k, heads) / math.sqrt(k)
            self.out[f"readouts.{t}.weight"] = weight[:, self.columns]
        if n_layers == 1:
            return
        theirs, ours = f"readouts.{0 if settings['last_only'] else n_layers - 1}", f"readouts.{n_layers - 1}"
        hidden = settings["hidden"]
        after = ACTIVATION_NORM[settings["gate"]] / math.sqrt(hidden * heads)
        own = torch.arange(heads)
        first = take(f"{theirs}.linear_1.weight", k, heads, hidden).transpose(0, 1) / math.sqrt(k)
        last = take(f"{theirs}.linear_2.weight", heads, hidden, heads)[own, :, own] * after
        self.out[f"{ours}.first"], self.out[f"{ours}.last"] = first[self.columns], last[self.columns]
        middle = torch.zeros(0, hidden, hidden, dtype=torch.float64)
        middle_bias, last_bias = torch.zeros(0, hidden, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
        if settings["bias"]:
            middle = take(f"{theirs}.linear_mid.weight", heads, hidden, heads, hidden)[own, :, own] * after
            middle_bias = take(f"{theirs}.linear_mid.bias", heads, hidden)[self.columns]
            last_bias = take(f"{theirs}.linear_2.bias", heads)[self.columns]
        self.out[f"{ours}.middle"] = middle[self.columns] if settings["bias"] else middle
        self.out[f"{ours}.middle_bias"], self.out[f"{ours}.last_bias"] = middle_bias, last_bias


def _on_monomials(u: np.ndarray, index: np.ndarray, sizes: Sequence[int], components: int) -> np.ndarray:
    """(terms, P): a dense coupling tensor summed over permutations, on the monomials of `symmetric_basis`."""
    degree, columns = index.shape[0], u.shape[-1]
    u = u.reshape(components, *u.shape[-1 - degree :])
    shape = u.shape[1:-1]
    sorted_index = np.sort(np.indices(shape).reshape(degree, -1), axis=0)
    flat = np.ravel_multi_index(tuple(sorted_index), shape)
    wanted = np.ravel_multi_index(tuple(index), shape)
    parts, start = [], 0
    for m, size in enumerate(sizes):
        summed = np.stack(
            [np.bincount(flat, weights=u[m, ..., p].ravel(), minlength=math.prod(shape)) for p in range(columns)],
            axis=1,
        )
        parts.append(summed[wanted[start : start + size]])
        start += size
    return np.concatenate(parts)
