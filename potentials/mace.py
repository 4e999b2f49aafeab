"""MACE: higher-order equivariant message passing (Batatia et al., NeurIPS 2022, arXiv 2206.07697).

Our own implementation in plain torch, in factorised form: messages of the first layer through the neighbour density,
Clebsch-Gordan tensors contracted with channel-free harmonics, the product over its few non-zero monomials, and every
normalisation inside the weights. Public upstream checkpoints convert into it exactly (mdplug.potentials.convert.mace).
"""

import copy
import dataclasses
import math
from typing import Any, Dict, Final, List, Sequence, Tuple

import torch
from torch import Tensor, nn

from mdplug.errors import InputError
from mdplug.potential import Potential
from mdplug.potentials.blocks import kernel_training
from mdplug.potentials.blocks.convolution import build_graph, neighbour_sum
from mdplug.potentials.blocks.harmonics import SphericalHarmonics
from mdplug.potentials.blocks.interaction import KINDS, GatedMessenger, Layer, Messenger
from mdplug.potentials.blocks.radial import Radial
from mdplug.potentials.blocks.radial_nets import PlainNet, SpeciesNet
from mdplug.potentials.blocks.readout import GatedReadout, LinearReadout, NoReadout, StateEmbedding
from mdplug.potentials.blocks.repulsion import Repulsion
from mdplug.potentials.blocks.tables import tabulate
from mdplug.spec import Spec

CHUNK = 64  # atoms per chunk of the product: its monomials then stay in a core's cache
TRAINING_CHUNK = 4096  # where autograd keeps everything anyway, fewer and larger pieces are faster

DEFAULTS: Dict[str, Any] = {
    "channels": 64,  # K, of every irrep
    "l_hidden": 0,  # highest degree of the features between layers
    "l_max": 3,  # of the spherical harmonics
    "kinds": ["R", "R"],  # of each layer, see blocks/interaction.py
    "correlation": [3, 3],  # highest power of each layer's product
    "neighbours": [1.0, 1.0],  # mean number of neighbours by which A and R layers were divided
    "edge_channels": None,  # k sent to neighbours; None: as channels
    "edge_l": None,  # highest degree sent; None: as l_hidden
    "edge_first": False,  # the first layer sends edge_channels, too
    "agnostic": False,  # products without weights per element
    "keep_last": False,  # the last layer keeps its l > 0 features
    "repulsion": False,  # screened nuclear repulsion inside the scaled sum
    "radial": {
        "basis": "bessel",
        "n_basis": 8,
        "p": 5,
        "transform": "none",
        "apply_cutoff": True,  # the cutoff multiplies the basis; else what comes out of the net
        "widths": [64, 64, 64],
        # No gradient through the basis: upstream's chebyshev models were trained so; forces are then not -dE/dx.
        "detached": False,
    },
    "readout": {"hidden": 16, "gate": "silu", "bias": False, "last_only": False},
    "embedding": [],  # of total charge and spin, see StateEmbedding
    "embedding_readout": False,
}


def complete_config(config: Dict[str, Any]) -> Dict[str, Any]:
    """The config with defaults filled in.

    Raises:
        InputError: an unknown key, an unknown kind of layer, or lists that do not fit the number of layers.
    """
    full = copy.deepcopy(DEFAULTS)
    for key, value in config.items():
        if key not in full:
            raise InputError(f"unknown MACE option {key!r}; known: {', '.join(full)}")
        if isinstance(full[key], dict):
            for inner in value:
                if inner not in full[key]:
                    raise InputError(f"unknown MACE option {key}.{inner}; known: {', '.join(full[key])}")
            full[key].update(value)
        else:
            full[key] = value
    for kind in full["kinds"]:
        if kind not in KINDS:
            raise InputError(f"unknown MACE layer {kind!r}; known: {', '.join(KINDS)}")
    for key in ("correlation", "neighbours"):
        if len(full[key]) != len(full["kinds"]):
            raise InputError(f"MACE option {key} needs one value per layer ({len(full['kinds'])})")
    if len(full["kinds"]) == 1 and full["readout"]["last_only"]:
        raise InputError("MACE with one layer and readout.last_only has no readout at all")
    full["edge_channels"] = full["edge_channels"] or full["channels"]
    full["edge_l"] = full["l_hidden"] if full["edge_l"] is None else min(full["edge_l"], full["l_hidden"])
    return full


def describe(name: str, config: Dict[str, Any], cutoff: float, species: Tuple[int, ...], **rest: Any) -> Spec:
    """The Spec of a MACE model; `rest` are further fields of it."""
    full = complete_config(config)
    layers = len(full["kinds"])
    width = full["edge_channels"] * (full["edge_l"] + 1) ** 2 if layers > 1 else 0
    return Spec(
        name=name,
        architecture="mdplug.potentials.mace:MACE",
        config=full,
        cutoff=cutoff,
        layers=layers,
        exchange_width=width,
        species=tuple(species),
        outputs=("atom_energy", "features"),
        **rest,
    )


def _make_layer(config: Dict[str, Any], t: int, n_species: int, dtype: torch.dtype) -> Tuple[nn.Module, nn.Module]:
    """Radial net and layer number t."""
    kind, channels, l_max, radial = config["kinds"][t], config["channels"], config["l_max"], config["radial"]
    first, last = t == 0, t == len(config["kinds"]) - 1
    keeps = not last or (config["keep_last"] and not first)
    l_in, l_out = 0 if first else config["l_hidden"], config["l_hidden"] if keeps else 0
    edge_l = 0 if first else config["edge_l"]
    k = channels if first and not config["edge_first"] else config["edge_channels"]
    if kind == "NL":  # its element tables have a column per scalar input of the layer
        net: Any = SpeciesNet(radial["n_basis"], n_species, channels, radial["widths"], dtype)
        messenger: nn.Module = GatedMessenger(edge_l, l_max, channels, k, net.n_features, dtype)
    else:
        net = PlainNet(radial["n_basis"], radial["widths"], "D" in kind, dtype)
        by_species = first and not config["embedding"]  # else sender features depend on the structure's charge, too
        neighbours = float(config["neighbours"][t])
        messenger = Messenger(
            kind, edge_l, l_max, channels, k, n_species, net.n_features, by_species, neighbours, dtype
        )
    degree, agnostic = config["correlation"][t], config["agnostic"]
    layer = Layer(messenger, kind, l_in, l_out, edge_l, l_max, degree, channels, k, n_species, agnostic, dtype)
    return net, layer


def _make_readout(config: Dict[str, Any], t: int, n_heads: int, dtype: torch.dtype) -> nn.Module:
    """Readout of layer t: a hidden layer after the last of several, a linear map elsewhere."""
    readout, channels, n_layers = config["readout"], config["channels"], len(config["kinds"])
    if t == n_layers - 1 and n_layers > 1:
        return GatedReadout(channels, readout["hidden"], n_heads, readout["gate"], readout["bias"], dtype)
    return NoReadout() if readout["last_only"] else LinearReadout(channels, n_heads, dtype)


class MACE(Potential):
    """A MACE energy model; build it with `from_spec(describe(...))`, then load weights or `initialise` it.

    "features" (n_owned, layers * K) are the scalar features of all layers.
    """

    has_state: Final[bool]
    has_repulsion: Final[bool]
    reads_state: Final[bool]
    species_of: Tensor
    scale: Tensor
    shift: Tensor

    def __init__(self, spec: Spec):
        super().__init__(spec)
        from ase.data import covalent_radii

        if not spec.species:
            raise InputError(f"MACE {spec.name!r} needs a list of species")
        self.chunk, self.training_chunk = CHUNK, TRAINING_CHUNK
        self.tabulated = False
        self.table_error = 0.0
        self.table_report: Dict[str, Any] = {}
        config = complete_config(spec.config)
        dtype = getattr(torch, spec.dtype)
        n_species, n_heads, n_layers = len(spec.species), len(spec.heads), len(config["kinds"])
        channels = config["channels"]
        radii = [float(covalent_radii[z]) for z in spec.species]
        table = torch.full((max(spec.species) + 1,), -1, dtype=torch.int64)
        table[torch.tensor(spec.species)] = torch.arange(n_species)
        self.register_buffer("species_of", table, persistent=False)
        self.harmonics = SphericalHarmonics(config["l_max"], dtype)
        self.embedding = nn.Parameter(torch.zeros(n_species, channels, dtype=dtype))
        self.has_state, self.reads_state = bool(config["embedding"]), bool(config["embedding_readout"])
        self.state = StateEmbedding(config["embedding"], channels, dtype) if self.has_state else nn.Identity()
        self.state_readout = LinearReadout(channels, n_heads, dtype) if self.reads_state else nn.Identity()
        self.has_repulsion = bool(config["repulsion"])
        p = config["radial"]["p"]
        self.repulsion = Repulsion(spec.species, radii, p, dtype) if self.has_repulsion else nn.Identity()
        nets: List[nn.Module] = []
        layers: List[nn.Module] = []
        readouts: List[nn.Module] = []
        for t in range(n_layers):
            net, layer = _make_layer(config, t, n_species, dtype)
            nets.append(net)
            layers.append(layer)
            readouts.append(_make_readout(config, t, n_heads, dtype))
        self.radial: Any = Radial(config["radial"], spec.cutoff, radii, nets, dtype)
        self.layers = nn.ModuleList(layers)
        self.readouts = nn.ModuleList(readouts)
        self.register_buffer("scale", torch.ones(n_heads, dtype=dtype))
        self.register_buffer("shift", torch.zeros(n_heads, dtype=dtype))

    @classmethod
    def untrained(cls, spec: Spec, statistics: Dict[str, float], generator: torch.Generator) -> "MACE":
        """See `Potential.untrained`; of `spec`, fields that follow from its config are filled in."""
        n_layers = len(spec.config.get("kinds", DEFAULTS["kinds"]))
        config = {"neighbours": [statistics["mean_neighbours"]] * n_layers, **spec.config}
        derived = describe(spec.name, config, spec.cutoff, spec.species)
        fields = ("config", "layers", "exchange_width", "outputs")
        model = cls(dataclasses.replace(spec, **{name: getattr(derived, name) for name in fields}))
        model.initialise(generator)
        model.scale.fill_(statistics["rms_force"])
        model.shift.fill_(statistics["mean_interaction_energy"])
        return model

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
        """See `Potential.local`.

        Raises:
            InputError: an element, total charge or spin that the model does not know.
        """
        species = self.species_of[torch.clamp(numbers, max=self.species_of.shape[0] - 1)]
        if bool(((species < 0) | (numbers >= self.species_of.shape[0])).any()):
            raise InputError("an atom is of an element that the model does not know; see Spec.species")
        if not torch.jit.is_scripting():  # noqa: SIM102  (a constant: TorchScript drops the block)
            if self.training and kernel_training.usable(self, vectors):
                return kernel_training.local(
                    self, species, pairs, vectors, n_owned, system_index, total_charge, total_spin, head
                )
        receiver, sender = pairs[0], pairs[1]
        r = torch.linalg.vector_norm(vectors, dim=1)
        keep = r < self.cutoff
        if not bool(keep.all()):
            inside = keep.nonzero().squeeze(1)
            receiver, sender, r, vectors = receiver[inside], sender[inside], r[inside], vectors[inside]
        if bool((receiver[1:] < receiver[:-1]).any()):
            by_receiver = torch.argsort(receiver, stable=True)
            receiver, sender = receiver[by_receiver], sender[by_receiver]
            r, vectors = r[by_receiver], vectors[by_receiver]
        r = r.unsqueeze(1)
        harmonics = self.harmonics(-vectors / r)  # upstream's vectors point at the receiver
        chunk = self.training_chunk if self.training else self.chunk
        graph = build_graph(harmonics, receiver, sender, species, n_owned, chunk)
        receiving, sending = species[receiver], species[sender]
        columns = self.radial(r, receiving, sending)
        atom_head = head[system_index[graph.order]]

        energy = torch.zeros_like(self.shift[atom_head])
        if self.has_repulsion:
            energy = neighbour_sum(self.repulsion(r, receiving, sending), graph)
        start = self.embedding[species]  # (N, K)
        outside = torch.zeros_like(energy)  # what scale does not multiply
        if self.has_state:
            start = start + self.state(total_charge, total_spin)[system_index]
            if self.reads_state:
                outside = self.state_readout(start[graph.order], atom_head)
        features = start[graph.order].unsqueeze(0)
        table = self.embedding[graph.present]
        scalars: List[Tensor] = []
        for t, (layer, readout) in enumerate(zip(self.layers, self.readouts)):  # noqa: B905
            if t == 0:  # no exchange: ghosts know their own species
                sent = layer.send(start.unsqueeze(0)).transpose(0, 1)  # type: ignore[operator]
                table = layer.send(table.unsqueeze(0)).squeeze(0)  # type: ignore[operator]
                own = sent[graph.order].transpose(0, 1)
            else:
                own = layer.send(features)  # type: ignore[operator]
                sent = own.transpose(0, 1)[graph.place]
                if numbers.shape[0] > n_owned:
                    ghosts = sent.new_zeros(numbers.shape[0] - n_owned, sent.shape[1], sent.shape[2])
                    sent = torch.cat([sent, ghosts], dim=0)
                sent = self.exchange(sent.flatten(1), n_owned).view(sent.shape)
            features = layer(features, sent, table, own, columns[t], harmonics, graph)
            scalars.append(features[0])
            energy = energy + readout(features[0], atom_head)
        energy = self.scale[atom_head] * energy + self.shift[atom_head] + outside
        return {
            "atom_energy": energy[graph.place],
            "features": torch.cat(scalars, dim=1)[graph.place],
        }

    @torch.jit.unused
    def with_tables(self, tolerance: float = 1e-5) -> "MACE":
        """A copy for inference: radial functions as splines, couplings summed into the product weights.

        Models whose radial functions depend on both elements get a table per pair of elements; with so many elements
        that these would fill 64 MiB, the exact nets stay (and `table_error` is 0).

        Args:
            tolerance: relative rms error allowed in the slopes of the radial functions, which forces follow.

        Returns:
            the copy; its `table_error` is the error reached and `table_report` says more.
        """
        if self.tabulated or self.radial.detached:
            return self
        fast = copy.deepcopy(self).requires_grad_(False)
        layers: Any = fast.layers
        for layer in layers:
            layer.product.fold()
        fast.tabulated = True
        weights = [layer.messenger.radial_weight for layer in layers]
        tables = tabulate(self.radial, weights, self.cutoff, self.embedding.shape[0], tolerance)
        if tables is None:
            fast.table_report = {"radial": "exact: too many pairs of elements for tables"}
            return fast
        fast.radial = tables.radial
        for layer, weight in zip(layers, tables.weights, strict=True):
            layer.messenger.radial_weight = nn.Parameter(weight, requires_grad=False)
            layer.messenger.n_radial = weight.shape[0]
        fast.table_error = tables.slope_error
        fast.table_report = {
            "radial": "cubic splines",
            "slope_error": tables.slope_error,
            "value_error": tables.value_error,
            "knots": tables.knots,
            "ranks": tables.ranks,
        }
        return fast

    @torch.jit.unused
    def with_kernels(self, tables: bool) -> Potential:
        """See `Potential.with_kernels`."""
        from mdplug.kernels import available

        if self.tabulated or self.radial.detached or not available(self.embedding.device.type):
            return self.with_tables() if tables else self
        from mdplug.potentials.mace_kernels import KernelMACE

        return KernelMACE(self, tables)

    @torch.jit.unused
    def for_species(self, species: Sequence[int]) -> Potential:
        """See `Potential.for_species`."""
        from mdplug.potentials.narrow import narrowed

        return narrowed(self.with_exact_radial(), species)

    @torch.jit.unused
    def with_exact_radial(self) -> "MACE":
        """See `Potential.with_exact_radial`."""
        if self.tabulated:
            raise InputError("this model holds radial tables, not the nets behind them; load it with radial='exact'")
        return self

    @torch.jit.unused
    def scales(self) -> Dict[str, Any]:
        """{parameter: factor} between a weight of unit variance and the weight stored; absent: 1.

        Training with Adam at a learning rate of scale x rate per parameter follows the path of the unfolded weights.
        """
        out: Dict[str, Any] = {"embedding": 1.0 / math.sqrt(self.embedding.shape[0])}
        if self.reads_state:
            out["state_readout.weight"] = 1.0 / math.sqrt(self.embedding.shape[1])
        parts: Any = {"layers": self.layers, "readouts": self.readouts, "radial.nets": self.radial.nets}
        for name, modules in parts.items():
            for t, module in enumerate(modules):
                out.update({f"{name}.{t}.{key}": value for key, value in module.scales().items()})
        return out

    @torch.jit.unused
    def initialise(self, generator: torch.Generator) -> "MACE":
        """Random weights, as upstream starts: unit variance behind every normalisation; biases zero.

        Args:
            generator: seeded, of the model's device.
        """
        for name, scale in self.scales().items():
            if not name.startswith("radial.nets."):
                parameter = self.get_parameter(name)
                factor = torch.as_tensor(scale, dtype=parameter.dtype, device=parameter.device)
                parameter.data.normal_(0.0, 1.0, generator=generator).mul_(factor)
        nets: Any = self.radial.nets
        for net in nets:
            net.initialise(generator)
        if self.has_state:
            state: Any = self.state
            state.initialise(generator)
        layers: Any = self.layers
        for layer in layers:
            for output in layer.product.outputs:
                for power in output.powers:
                    power.weight.data.normal_(0.0, 1.0 / max(power.weight.shape[1], 1), generator=generator)
            if isinstance(layer.messenger, GatedMessenger):
                layer.messenger.alpha.data.fill_(20.0)
                layer.messenger.beta.data.zero_()
        return self
