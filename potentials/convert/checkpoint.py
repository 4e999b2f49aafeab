"""What an upstream MACE checkpoint is: its tensors, and its hyper-parameters inferred from their shapes.

Shapes come first because attributes are missing in older files and wrong in some; an attribute that disagrees is
reported as a remark, and the shape is believed. Kinds of model that mdplug does not have are refused by name.
"""

import math
import re
from typing import Any

import torch

from mdplug.errors import ModelFileError
from mdplug.potentials.blocks.activations import ACTIVATION_NORM
from mdplug.potentials.blocks.contraction import symmetric_basis
from mdplug.potentials.blocks.convolution import paths
from mdplug.potentials.convert.irreps import irreps
from mdplug.potentials.convert.pickle_machine import Inert, Named
from mdplug.potentials.convert.pickle_reader import tensors

MODELS = ("MACE", "ScaleShiftMACE")
KIND_OF_CLASS = {
    "RealAgnosticInteractionBlock": "A",
    "RealAgnosticResidualInteractionBlock": "R",
    "RealAgnosticDensityInteractionBlock": "D",
    "RealAgnosticDensityResidualInteractionBlock": "DR",
    "RealAgnosticResidualNonLinearInteractionBlock": "NL",
}
REFUSED_MODELS = {
    "MACELES": "has latent Ewald charges (package les)",
    "PolarMACE": "is a POLAR model (package graph_longrange)",
    "AtomicDielectricMACE": "is an MDP model of dipoles and polarizabilities, without an energy",
    "AtomicDipolesMACE": "is a dipole model, without an energy",
    "EnergyDipolesMACE": "is an energy-and-dipole model",
}
REFUSED_KEYS = {
    "les": "MACELES",
    "les_readouts": "MACELES",
    "field_": "POLAR",
    "lr_source_maps": "POLAR",
    "layer_feature_mixer": "POLAR",
    "fukui_source_map": "POLAR",
}
# Tensors that carry nothing that is not known otherwise.
_IGNORED = re.compile(
    r"(^|\.)(output_mask|num_interactions|U_matrix_\d|weights_\w+_zeroed)$|^r_max$|_fn\.r_max$"
    r"|\.(graph_opt_main|contractions_weighting|contractions_features|conv_tp|equivariant_nonlin|non_linearity|reshape)\."
    r"|^spherical_harmonics\.|_compiled_main"
)
_GATES = {
    "torch.nn.functional.silu": "silu",
    "torch.tanh": "tanh",
    "torch.nn.functional.tanh": "tanh",
    "torch.abs": "abs",
}
_ONLY = "; mdplug converts energy models of class MACE and ScaleShiftMACE, use mace-torch for this one"


class Checkpoint:
    """An upstream module, read inertly.

    Attributes:
        where: file name, for messages.
        tensors: every parameter and buffer by its dotted name.
        settings: options of `mdplug.potentials.mace` that rebuild it.
        layers: class names of the interactions.
        species: atomic numbers in the file's order. heads: names. cutoff: A.
        dtype: of the weights, "float32" or "float64".
        remarks: what was odd about the file.
    """

    def __init__(self, root: Inert, where: str):
        self.root, self.where = root, where
        self.remarks: list[str] = []
        self.tensors = tensors(root)
        self._parameters = set(tensors(root, ("_parameters",)))
        self._taken: set[str] = set()
        self._refuse_other_models()
        self.species = tuple(int(z) for z in self.take("atomic_numbers"))
        self.cutoff = float(self.take("r_max"))
        embedding = self.peek("node_embedding.linear.weight")
        self.dtype = str(embedding.dtype).removeprefix("torch.")
        if self.dtype not in ("float32", "float64"):
            raise self.wrong(f"holds weights in {self.dtype}; save it in float32 or float64")
        self.channels = self._ratio(embedding.numel(), len(self.species), "node_embedding.linear.weight")
        self.n_layers = len(self._module("interactions").children("_modules"))
        self.layers = [block.short_name for block in self._module("interactions").children("_modules").values()]
        self.l_max = 0
        self.heads: tuple[str, ...] = ()
        self.settings = self._infer()

    # Access

    def wrong(self, what: str) -> ModelFileError:
        """The error that this file gives."""
        return ModelFileError(f"{self.where}: {what}")

    def has(self, name: str) -> bool:
        """Whether the file has a tensor of this name that is not empty."""
        return name in self.tensors and self.tensors[name].numel() > 0

    def peek(self, name: str) -> torch.Tensor:
        """A tensor, as it is in the file. Raises ModelFileError where it is missing."""
        if name not in self.tensors:
            raise self.wrong(f"lacks {name}, so it is no MACE energy model that mdplug knows; use mace-torch for it")
        return self.tensors[name]

    def take(self, name: str, *shape: int) -> torch.Tensor:
        """A tensor in float64 (if real) that is now accounted for, in a shape if one is given."""
        self._taken.add(name)
        value = self.peek(name)
        value = value.to(torch.float64) if value.is_floating_point() else value
        if not shape:
            return value
        if value.numel() != math.prod(shape):
            raise self.wrong(f"{name} has {value.numel()} numbers where {'x'.join(map(str, shape))} were expected")
        return value.reshape(shape)

    def refuse_leftovers(self) -> None:
        """Refuse a file that holds anything nobody took: the result would be another model."""
        owners = {name.rsplit(".", 1)[0] for name in self._taken if name.endswith(".weight")}
        for name, value in self.tensors.items():
            if name in self._taken or not value.numel() or _IGNORED.search(name):
                continue
            of_linear = name not in self._parameters and any(name.startswith(f"{owner}.") for owner in owners)
            if not of_linear:
                raise self.wrong(f"holds {name} {tuple(value.shape)}, which mdplug does not know{_ONLY}")

    # Inference

    def _module(self, path: str) -> Inert:
        found = self.root.module(path)
        if found is None:
            raise self.wrong(f"lacks {path}, so it is no MACE energy model that mdplug knows; use mace-torch for it")
        return found

    def _attribute(self, path: str, name: str, default: Any = None) -> Any:
        module = self._module(path) if path else self.root
        return module.attributes.get(name, default)

    def _ratio(self, numel: int, by: int, name: str) -> int:
        if by <= 0 or numel % by or numel == 0:
            raise self.wrong(f"{name} has {numel} numbers, no multiple of {by}; the file is damaged")
        return numel // by

    def _refuse_other_models(self) -> None:
        name = self.root.short_name
        if name in REFUSED_MODELS:
            raise self.wrong(f"{name} {REFUSED_MODELS[name]}{_ONLY}")
        for key in self.tensors:
            for prefix, kind in REFUSED_KEYS.items():
                if key.split(".")[0] == prefix or (prefix.endswith("_") and key.startswith(prefix)):
                    raise self.wrong(f"holds {key}, which makes it a {kind} model{_ONLY}")
        if name not in MODELS:
            raise self.wrong(f"is a {self.root.class_name}{_ONLY}")
        if self._attribute("", "use_so3", False):
            raise self.wrong(f"is an SO(3) model (use_so3), which mdplug does not have{_ONLY}")
        for t, block in self._module("interactions").children("_modules").items():
            if block.short_name not in KIND_OF_CLASS:
                what = "attention" if "Att" in block.short_name else "an interaction"
                raise self.wrong(
                    f"interactions.{t} is {what} of class {block.short_name}, which mdplug does not have{_ONLY}"
                )
            self._refuse_other_irreps(block)

    def _refuse_other_irreps(self, block: Inert) -> None:
        for key in ("hidden_irreps", "edge_irreps", "target_irreps", "edge_attrs_irreps"):
            found = irreps(block.attributes.get(key))
            if any(parity != (-1) ** degree for _, degree, parity in found):
                raise self.wrong(
                    f"has pseudo-scalars or other unnatural parities ({key}), which mdplug does not have{_ONLY}"
                )
            degrees = [degree for _, degree, _ in found]
            if degrees != list(range(len(found))) or len({multiplicity for multiplicity, _, _ in found}) > 1:
                raise self.wrong(
                    f"its {key} are not as many of each degree 0, 1, ..., which mdplug does not have{_ONLY}"
                )

    def _infer(self) -> dict[str, Any]:
        blocks = self._module("interactions").children("_modules")
        kinds = [KIND_OF_CLASS[blocks[str(t)].short_name] for t in range(self.n_layers)]
        for t, kind in enumerate(kinds):
            has_net, has_density = (
                self.has(f"interactions.{t}.alpha"),
                self.has(f"interactions.{t}.density_fn.layer0.weight"),
            )
            if has_net != (kind == "NL") or has_density != ("D" in kind):
                raise self.wrong(
                    f"interactions.{t} is of class {blocks[str(t)].short_name} but holds the tensors of another"
                )
        self._last_net = [self._last_radial(t) for t in range(self.n_layers)]
        edge_first = self._ratio(self.peek("interactions.0.linear_up.weight").numel(), self.channels, "linear_up")
        self.l_max = self._ratio(self._last_net[0][1], edge_first, "the last radial layer") - 1
        l_hidden = self._outputs(0) if self.n_layers > 1 else 0
        edge_l, edge_channels = self._edges(l_hidden, edge_first)
        if self.n_layers > 1 and edge_channels != edge_first and edge_first != self.channels:
            raise self.wrong(
                f"its layers send {edge_first} and {edge_channels} channels, which mdplug does not have{_ONLY}"
            )
        agnostic = self._product_rows(0) == 1 and len(self.species) > 1
        flag = bool(self._attribute("", "use_agnostic_product", False))
        if flag != agnostic and len(self.species) > 1:
            self.remarks.append(
                f"use_agnostic_product says {flag}, the weights say {agnostic}; the weights were believed"
            )
        first = edge_first != self.channels
        if first != bool(self._attribute("", "use_edge_irreps_first", False)) and edge_channels != self.channels:
            self.remarks.append(
                f"use_edge_irreps_first disagrees with the weights, which say {first}; they were believed"
            )
        readout = self._readout()
        embedding = self._embedding()
        return {
            "channels": self.channels,
            "l_hidden": l_hidden,
            "l_max": self.l_max,
            "kinds": kinds,
            "correlation": [self._degree(t, l_hidden) for t in range(self.n_layers)],
            "neighbours": [self._neighbours(t, kind) for t, kind in enumerate(kinds)],
            "edge_channels": edge_channels,
            "edge_l": edge_l,
            "edge_first": first,
            "agnostic": agnostic,
            "keep_last": self.n_layers > 1 and self._outputs(self.n_layers - 1) > 0,
            "repulsion": self.has("pair_repulsion_fn.c"),
            "radial": self._radial(kinds[0]),
            "readout": readout,
            "embedding": embedding,
            "embedding_readout": self.has("embedding_readout.linear.weight"),
        }

    def _last_radial(self, t: int) -> tuple[str, int, list[int]]:
        """Name of the last radial layer's weight, its outputs, and the hidden widths."""
        base = f"interactions.{t}.conv_tp_weights"
        if self.has(f"{base}.layer0.weight"):
            count = sum(1 for k in range(64) if self.has(f"{base}.layer{k}.weight"))
            shapes = [tuple(self.peek(f"{base}.layer{k}.weight").shape) for k in range(count)]
            return f"{base}.layer{count - 1}.weight", shapes[-1][1], [shape[1] for shape in shapes[:-1]]
        places = [k for k in range(0, 192, 3) if self.has(f"{base}.net.{k}.weight")]
        if not places:
            raise self.wrong(f"lacks {base}, so it is no MACE energy model that mdplug knows; use mace-torch for it")
        shapes = [tuple(self.peek(f"{base}.net.{k}.weight").shape) for k in places]
        return f"{base}.net.{places[-1]}.weight", shapes[-1][0], [shape[0] for shape in shapes[:-1]]

    def _outputs(self, t: int) -> int:
        """Highest degree that layer t hands on: from its linear map, one channels x channels matrix per irrep."""
        name = f"products.{t}.linear.weight"
        return self._ratio(self.peek(name).numel(), self.channels**2, name) - 1

    def _edges(self, l_hidden: int, edge_first: int) -> tuple[int, int]:
        if self.n_layers == 1:
            return 0, edge_first
        numel, width = self.peek("interactions.1.linear_up.weight").numel(), self._last_net[1][1]
        for edge_l in range(l_hidden, -1, -1):
            each = self.channels * (edge_l + 1)
            if numel % each == 0 and len(paths(edge_l, self.l_max)) * (numel // each) == width:
                return edge_l, numel // each
        raise self.wrong(
            f"interactions.1 sends irreps that mdplug does not have (edge irreps beyond the hidden ones?){_ONLY}"
        )

    def _product_rows(self, t: int) -> int:
        base = f"products.{t}.symmetric_contractions"
        name = f"{base}.weight" if self.has(f"{base}.weight") else f"{base}.contractions.0.weights_max"
        return self.peek(name).shape[0]

    def couplings(self, l_out: int, degree: int) -> int:
        """How many ways there are to couple `degree` features to l_out: columns of U."""
        return symmetric_basis(self.l_max, l_out, degree)[1].shape[1]

    def _degree(self, t: int, l_hidden: int) -> int:
        base = f"products.{t}.symmetric_contractions"
        if not self.has(f"{base}.weight"):
            return 1 + sum(1 for q in range(8) if f"{base}.contractions.0.weights.{q}" in self.tensors)
        total = self.peek(f"{base}.weight").shape[1]
        for degree in range(1, 5):
            powers = range(1, degree + 1)
            full = sum(self.couplings(l_out, nu) for l_out in range(self._outputs(t) + 1) for nu in powers)
            if full == total:
                return degree
            if full > total:
                break
        raise self.wrong(
            f"{base}.weight has {total} couplings, those of cuEquivariance's reduced basis, which is not in the file; "
            "convert it with mace-torch to the e3nn layout first (mace.cli.convert_cueq_e3nn)"
        )

    def _neighbours(self, t: int, kind: str) -> float:
        value = self._attribute(f"interactions.{t}", "avg_num_neighbors")
        if kind not in ("A", "R"):
            return 1.0
        if not isinstance(value, int | float | torch.Tensor):
            raise self.wrong(
                f"interactions.{t} lacks avg_num_neighbors, without which its weights mean nothing; save it again"
            )
        return float(value)

    def _radial(self, kind: str) -> dict[str, Any]:
        functions = {"bessel_weights": "bessel", "gaussian_weights": "gaussian", "n": "chebyshev"}
        found = [key for key in functions if self.has(f"radial_embedding.bessel_fn.{key}")]
        if len(found) != 1:
            raise self.wrong(f"has a radial basis that mdplug does not have{_ONLY}")
        transform = "none"
        if self.has("radial_embedding.distance_transform.covalent_radii"):
            transform = "soft" if self.has("radial_embedding.distance_transform.alpha") else "agnesi"
        p = int(self.take("radial_embedding.cutoff_fn.p"))
        if self.has("pair_repulsion_fn.p") and int(self.take("pair_repulsion_fn.p")) != p:
            raise self.wrong(f"its repulsion has another cutoff exponent than the model{_ONLY}")
        if any(widths != self._last_net[0][2] for _, _, widths in self._last_net):
            raise self.wrong(f"its layers have radial nets of different widths{_ONLY}")
        if kind != "NL":
            act = self.root.module("interactions.0.conv_tp_weights.layer0.act")
            self._check_constant("interactions.0.conv_tp_weights.layer0.act", act, "silu")
        return {
            "basis": functions[found[0]],
            "n_basis": self.peek(f"radial_embedding.bessel_fn.{found[0]}").numel(),
            "p": p,
            "transform": transform,
            "apply_cutoff": bool(self._attribute("radial_embedding", "apply_cutoff", True)),
            "widths": self._last_net[0][2],
            "detached": self._detached(functions[found[0]]),
        }

    def _detached(self, basis: str) -> bool:
        """Whether the basis carries no gradient upstream: torch's Chebyshev polynomials have none."""
        if basis == "chebyshev":
            self.remarks.append("Chebyshev basis: as in mace-torch, forces leave its slope out and are not -dE/dx")
        return basis == "chebyshev"

    def _check_constant(self, path: str, module: Inert | None, gate: str) -> None:
        constant = None if module is None else module.attributes.get("cst")
        if isinstance(constant, float) and abs(constant - ACTIVATION_NORM[gate]) > 1e-6:
            raise self.wrong(f"{path} is normalised by {constant}, not as {gate} ({ACTIVATION_NORM[gate]}){_ONLY}")

    def _readout(self) -> dict[str, Any]:
        names = sorted(self._module("readouts").children("_modules"), key=int)
        last, last_only = names[-1], len(names) == 1 and self.n_layers > 1
        if len(names) not in (1, self.n_layers):
            raise self.wrong(f"has {len(names)} readouts for {self.n_layers} layers{_ONLY}")
        base = f"readouts.{last}"
        settings: dict[str, Any] = {"hidden": 1, "gate": "silu", "bias": False, "last_only": last_only}
        if self.n_layers == 1:
            count = self._ratio(self.peek(f"{base}.linear.weight").numel(), self.channels, f"{base}.linear.weight")
        else:
            wide = self._ratio(self.peek(f"{base}.linear_1.weight").numel(), self.channels, f"{base}.linear_1.weight")
            count = self._ratio(self.peek(f"{base}.linear_2.weight").numel(), wide, f"{base}.linear_2.weight")
            settings["hidden"] = self._ratio(wide, count, f"{base}.linear_1.weight")
            settings["bias"] = self.has(f"{base}.linear_mid.weight")
            act = self.root.module(f"{base}.non_linearity.acts.0")
            name = act.attributes.get("f") if act is not None else None
            if isinstance(name, Named) and name.name not in _GATES:
                raise self.wrong(f"{base} has the gate {name.name}, which mdplug does not have{_ONLY}")
            if isinstance(name, Named):
                settings["gate"] = _GATES[name.name]
            else:
                self.remarks.append(f"{base} does not name its gate; silu was taken")
            self._check_constant(f"{base}.non_linearity.acts.0", act, settings["gate"])
        named = self._attribute("", "heads", None)
        self.heads = tuple(str(h) for h in named) if named else ("Default",)
        if len(self.heads) != count:
            numbered = tuple(f"head{h}" for h in range(count))
            self.remarks.append(
                f"heads are named {', '.join(self.heads)} but the weights have {count}; they are numbered"
            )
            self.heads = numbered
        return settings

    def _embedding(self) -> list[dict[str, Any]]:
        if self.root.module("joint_embedding") is None:
            return []
        specs = self._attribute("", "embedding_specs") or self._attribute("joint_embedding", "specs")
        if not isinstance(specs, dict):
            raise self.wrong(
                "has a joint_embedding but no embedding_specs, so that its inputs are unknown; save it again"
            )
        records: list[dict[str, Any]] = []
        for name, spec in specs.items():
            if name not in ("total_charge", "total_spin") or spec.get("per") != "graph":
                raise self.wrong(
                    f"embeds {name!r}, where mdplug knows total_charge and total_spin of a structure{_ONLY}"
                )
            base = f"joint_embedding.embedders.{name}"
            if spec.get("type") == "categorical":
                classes, width = self.peek(f"{base}.weight").shape
                record = {"kind": "categorical", "classes": classes, "offset": int(spec.get("offset", 0))}
            else:
                width = self.peek(f"{base}.2.weight").shape[0]
                record = {"kind": "continuous", "bias": self.has(f"{base}.0.bias")}
            records.append({"name": name, "width": width, **record})
        return records
