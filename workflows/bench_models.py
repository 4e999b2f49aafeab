"""Random-weight MACE checkpoints to time: each kind that is in use, in the sizes in use.

mace-torch changes global state when it is imported, so `build` belongs in a process of its own (bench_peers starts it).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

# name -> (what it is, what differs from BASE). Irreps lie between the layers; cutoffs in A.
RANDOM: dict[str, tuple[str, dict[str, Any]]] = {
    "l0": ("96 channels, L=0, 4.5 A", {"hidden_irreps": "96x0e", "r_max": 4.5, "avg_num_neighbors": 40.0}),
    "l1": ("128 channels, L=1, 5 A", {}),
    "l2": ("128 channels, L=2, 5 A", {"hidden_irreps": "128x0e+128x1o+128x2e"}),
    "heads": (
        "128 channels, L=1, 5 A, density layers, Agnesi, two heads",
        {
            "interaction_cls_first": "RealAgnosticDensityInteractionBlock",
            "interaction_cls": "RealAgnosticDensityResidualInteractionBlock",
            "distance_transform": "Agnesi",
            "heads": ["default", "other"],
        },
    ),
    "elements89": (
        "128 channels, L=1, 6 A, 89 elements, Agnesi, as MACE-MP-0",
        {
            "r_max": 6.0,
            "avg_num_neighbors": 90.0,
            "interaction_cls_first": "RealAgnosticResidualInteractionBlock",
            "distance_transform": "Agnesi",
            "atomic_numbers": list(range(1, 90)),
        },
    ),
    "charge": (
        "128 channels, L=1, 5 A, embeddings of charge and spin",
        {
            "embedding_specs": {
                "total_spin": {"type": "categorical", "per": "graph", "num_classes": 101, "offset": 0, "emb_dim": 16},
                "total_charge": {
                    "type": "categorical", "per": "graph", "num_classes": 201, "offset": 100, "emb_dim": 16,
                },
            },
        },
    ),
}  # fmt: skip
BASE: dict[str, Any] = {
    "r_max": 5.0,
    "num_bessel": 8,
    "num_polynomial_cutoff": 5,
    "max_ell": 3,
    "interaction_cls": "RealAgnosticResidualInteractionBlock",
    "interaction_cls_first": "RealAgnosticInteractionBlock",
    "num_interactions": 2,
    "hidden_irreps": "128x0e+128x1o",
    "MLP_irreps": "16x0e",
    "avg_num_neighbors": 54.0,
    "atomic_numbers": [1, 8],
    "correlation": 3,
    "heads": ["Default"],
}
E0_EV = {1: -13.6, 8: -432.6}  # of the elements of water; the others' do not matter here


def describe() -> str:
    """One clause for each model."""
    return "; ".join(f"{name}: {what}" for name, (what, _) in RANDOM.items())


def build(name: str, seed: int, frame: Any, path: Path) -> None:
    """Write an upstream checkpoint with random weights, scaled to a force of 1 eV/A (rms) in a frame.

    Args:
        name: of `RANDOM`. seed: of the weights. frame: ase.Atoms. path: file to write.
    """
    import mace  # noqa: F401  (before e3nn)
    import torch
    from e3nn import o3
    from mace import modules
    from mace.calculators import MACECalculator

    torch.set_default_dtype(torch.float64)
    torch.manual_seed(seed)
    settings = {**BASE, **RANDOM[name][1]}
    for key in ("interaction_cls", "interaction_cls_first"):
        settings[key] = getattr(modules.blocks, settings[key])
    for key in ("hidden_irreps", "MLP_irreps"):
        settings[key] = o3.Irreps(settings[key])
    elements, heads = settings["atomic_numbers"], settings["heads"]
    energies = np.array([[E0_EV.get(z, 0.0) for z in elements]] * len(heads))
    many = len(heads) > 1
    scale: Any = [1.0] * len(heads) if many else 1.0
    shift: Any = [0.0] * len(heads) if many else 0.0
    model = modules.ScaleShiftMACE(
        **settings,
        num_elements=len(elements),
        gate=torch.nn.functional.silu,
        atomic_energies=energies if many else energies[0],
        atomic_inter_scale=scale,
        atomic_inter_shift=shift,
    )
    atoms = frame.copy()
    atoms.calc = MACECalculator(models=[model], device="cpu", default_dtype="float64")
    rms = float(np.sqrt((atoms.get_forces() ** 2).mean()))
    stored: Any = model.scale_shift.scale
    stored.fill_(float(f"{1.0 / rms:.3g}"))  # rounded: the same file on every machine
    torch.save(model, path)
