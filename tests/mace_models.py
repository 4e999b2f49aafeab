"""Small MACE models of every kind, with random weights, and a box for them."""

import torch
from contract import liquid

from mdplug.potentials.mace import MACE, describe
from mdplug.system import AtomicSystem

CHARGE = {"name": "total_charge", "kind": "categorical", "classes": 9, "offset": 4, "width": 8}
SPIN = {"name": "total_spin", "kind": "continuous", "width": 5}
CONTRACT = {
    "residual": {"kinds": ["A", "R"], "l_hidden": 1, "repulsion": True},
    "density": {"kinds": ["D", "DR"], "l_hidden": 1, "repulsion": True},
    "nonlinear": {
        "kinds": ["NL", "NL"],
        "l_hidden": 1,
        "edge_channels": 3,
        "edge_first": True,
        "agnostic": True,
        "radial": {"transform": "agnesi", "apply_cutoff": False},
    },
    "state": {"embedding": [CHARGE, SPIN], "embedding_readout": True},
}
FURTHER = {
    "density, agnesi": {"kinds": ["D", "DR"], "l_hidden": 1, "radial": {"transform": "agnesi"}},
    "one layer": {"kinds": ["A"], "correlation": [3], "neighbours": [5.0]},
    "three layers, l 2": {"kinds": ["R"] * 3, "correlation": [3, 2, 1], "neighbours": [5.0] * 3, "l_hidden": 2},
    "keep last": {"l_hidden": 1, "keep_last": True},
    "last readout only": {"readout": {"last_only": True}},
    "biased tanh readout": {"readout": {"bias": True, "gate": "tanh", "hidden": 8}},
    "chebyshev": {"radial": {"basis": "chebyshev", "transform": "agnesi"}},
    "soft gaussians": {"radial": {"basis": "gaussian", "transform": "soft", "widths": [12, 20]}},
    "degree 4": {"l_max": 2, "correlation": [4, 4]},
}


def build(options, dtype="float64", cutoff=3.5, species=(1, 8), heads=("default",), seed=0):
    config = {"channels": 4, "neighbours": [5.0, 5.0], **options}
    spec = describe("test", config, cutoff, species, heads=heads, dtype=dtype)
    model = MACE.from_spec(spec).initialise(torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed + 1)
    for parameter in model.parameters():  # no weight stays zero, or a wrong use of it would pass
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    model.scale.fill_(1.3)
    model.shift.fill_(0.2)
    return model


def box(seed=0, **info):
    atoms = liquid([1, 8], n=20, edge=7.5, seed=seed)
    atoms.info.update(info)
    return AtomicSystem.from_ase(atoms)
