"""Random-weight MACE checkpoints of every kind, with reference results from mace-torch.

mace-torch changes global state when it is imported, so this file is run as a program (`python mace_zoo.py --seed 1
FOLDER TAG...`); importing it imports neither `mace` nor `e3nn`. For every tag it writes `TAG.model` (what
`torch.save(model)` gives) and `TAG.npz` (energy, forces, stress, per-atom energy). The weights are made sharp: nothing
that matters for the result is left at zero, one or an equal value for every element.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np

NUMBERS = (1, 8, 11)
R_MAX = 4.5
REFERENCE_E0_EV = (-13.6, -2041.8, -7.2)

PLAIN = "RealAgnosticInteractionBlock"
RESIDUAL = "RealAgnosticResidualInteractionBlock"
DENSITY = "RealAgnosticDensityInteractionBlock"
DENSITY_RESIDUAL = "RealAgnosticDensityResidualInteractionBlock"
ATTENTION = "RealAgnosticAttResidualInteractionBlock"
NONLINEAR = "RealAgnosticResidualNonLinearInteractionBlock"

L0, L1, L2 = "8x0e", "8x0e+8x1o", "8x0e+8x1o+8x2e"
SPIN_AND_CHARGE = {
    "total_spin": {"type": "categorical", "per": "graph", "num_classes": 101, "offset": 0, "emb_dim": 8},
    "total_charge": {"type": "categorical", "per": "graph", "num_classes": 201, "offset": 100, "emb_dim": 8},
}
AGNESI_ZBL = {"pair_repulsion": True, "distance_transform": "Agnesi"}

# tag -> what differs from the base model (two residual layers, 8x0e+8x1o, one head)
VARIANTS: dict[str, dict] = {
    "mp0": {},
    "mp0-L0": {"hidden_irreps": L0},
    "mp0-L2": {"hidden_irreps": L2},
    "off23": {"first": PLAIN},
    "off23-L2": {"first": PLAIN, "hidden_irreps": L2},
    "mp0b": {"first": PLAIN, **AGNESI_ZBL},
    "density": {"first": DENSITY, "rest": DENSITY_RESIDUAL, **AGNESI_ZBL},
    "mh1": {
        "first": NONLINEAR,
        "rest": NONLINEAR,
        "edge_irreps": "4x0e+4x1o",
        "use_edge_irreps_first": True,
        "apply_cutoff": False,
        "use_agnostic_product": True,
        "heads": ["a", "b", "c"],
        **AGNESI_ZBL,
    },
    "omol": {
        "first": NONLINEAR,
        "rest": NONLINEAR,
        "num_interactions": 3,
        "correlation": 2,
        "hidden_irreps": L2,
        "edge_irreps": "4x0e+4x1o+4x2e",
        "apply_cutoff": False,
        "embedding_specs": SPIN_AND_CHARGE,
    },
    "emb-readout": {"embedding_specs": SPIN_AND_CHARGE, "use_embedding_readout": True},
    "soft+gauss": {"radial_type": "gaussian", "distance_transform": "Soft"},
    "cheb+agnesi": {"radial_type": "chebyshev", "distance_transform": "Agnesi"},
    "multihead": {"heads": ["pt_head", "ft"]},
    "residual-3-heads": {"heads": ["x", "y", "z"], "hidden_irreps": L0},
    "one-layer": {"first": PLAIN, "num_interactions": 1},
    "three-layer": {"num_interactions": 3},
    "keep-last": {"keep_last_layer_irreps": True},
    "corr2": {"correlation": 2},
    "mixed-corr": {"correlation": [3, 2]},
    "corr4-l2": {"correlation": 4, "max_ell": 2, "hidden_irreps": L0},
    "last-readout": {"use_last_readout_only": True},
    "bias-readout": {"readout_cls": "NonLinearBiasReadoutBlock", "heads": ["one", "two"]},
    "lmax1": {"max_ell": 1},
    "lmax1-L2": {"max_ell": 1, "hidden_irreps": L2},
    "tanh-gate": {"gate": "tanh"},
    "mlp32": {"MLP_irreps": "32x0e"},
    "radial-16": {"radial_MLP": [16, 16]},
    "plain-class": {"class": "MACE"},
    # refused by name
    "att": {"rest": ATTENTION},
    "so3": {"use_so3": True, "hidden_irreps": "8x0e+8x1e", "max_ell": 2},
    "pseudo": {"hidden_irreps": "8x0e+8x0o+8x1o+8x1e", "max_ell": 2},
}
WHOLE = (
    "mp0",
    "mh1",
    "omol",
)  # stored with everything e3nn pickles; the others without its compiled code, to stay small
REFUSED = ("att", "so3", "pseudo")
PARITY = tuple(tag for tag in VARIANTS if tag not in REFUSED)


def structures() -> dict[str, dict]:
    """A molecule, a periodic liquid, a triclinic crystal and a cell smaller than the cutoff."""
    rng = np.random.default_rng(7)
    water = np.array([[0.0, 0.0, 0.0], [0.96, 0.0, 0.0], [-0.24, 0.93, 0.1]])

    def turned(at: np.ndarray) -> np.ndarray:
        q, r = np.linalg.qr(rng.normal(size=(3, 3)))
        return water @ (q * np.sign(np.diag(r))) + at

    box = 9.4
    sites = np.array([[i, j, k] for i in range(3) for j in range(3) for k in range(2)], float)
    sites = (sites + 0.5) * np.array([box / 3, box / 3, box / 2]) + rng.normal(scale=0.12, size=(18, 3))
    liquid = [turned(site) for site in sites[:15]]
    out = {
        "molecule": {
            "numbers": [11, 8, 1, 1, 8, 1, 1, 8, 1, 1],
            "positions": np.concatenate(
                [[[1.5, 1.2, 1.9]], water, turned(np.array([3.3, 2.5, 0.4])), turned(np.array([0.3, 3.4, 3.0]))]
            ),
            "cell": np.zeros((3, 3)),
            "pbc": False,
        },
        "liquid": {
            "numbers": [8, 1, 1] * 15 + [11, 11, 8],
            "positions": np.concatenate([*liquid, sites[15:]]),
            "cell": np.diag([box, box, box]),
            "pbc": True,
        },
        "crystal": {
            "numbers": [11, 8, 1, 11, 8, 1, 8, 1],
            "positions": np.array(
                [
                    *([0.1, 0.0, 0.2], [2.2, 0.3, 0.1], [2.9, 0.9, -0.2], [1.2, 2.7, 2.3]),
                    *([3.3, 2.6, 2.5], [4.0, 3.1, 2.9], [1.0, 0.8, 3.6], [1.1, 1.7, 4.0]),
                ]
            ),
            "cell": np.array([[4.9, 0.0, 0.0], [0.9, 4.6, 0.0], [-1.1, 0.7, 5.2]]),
            "pbc": True,
        },
        "small": {
            "numbers": [11, 8, 1],
            "positions": np.array([[0.0, 0.1, 0.0], [1.7, 1.5, 1.1], [2.1, 1.9, 1.9]]),
            "cell": np.array([[3.3, 0.0, 0.0], [0.5, 3.1, 0.0], [-0.4, 0.6, 3.6]]),
            "pbc": True,
        },
    }
    for one in out.values():
        one.update(charge=-2.0, spin=3.0)
    return out


def golden_cluster() -> dict:
    """The NaOH2 cluster of the golden numbers."""
    positions = np.array([[1.5, 1.2, 1.9], [0.0, 0.0, 0.0], [0.96, 0.0, 0.0], [-0.24, 0.93, 0.1]])
    cluster = {"numbers": [11, 8, 1, 1], "positions": positions, "cell": np.zeros((3, 3)), "pbc": False}
    return {**cluster, "charge": -2.0, "spin": 3.0}


def congruential(name: str, count: int) -> np.ndarray:
    """Numbers of unit variance that depend on the parameter's name only: x <- 1664525 x + 1013904223 mod 2^32."""
    x = zlib.crc32(name.encode())
    out = np.empty(count)
    for i in range(count):
        x = (1664525 * x + 1013904223) % 2**32
        out[i] = x
    return np.sqrt(3.0) * (2.0 * out / 2**32 - 1.0)


def filled(name: str, shape: tuple[int, ...], seed: int | None = None) -> np.ndarray:
    """Sharp weights of a parameter: the golden rule without a seed, normally distributed with one."""
    count = int(np.prod(shape)) if shape else 1
    if seed is None:
        u = congruential(name, count)
    else:
        u = np.random.default_rng([seed, zlib.crc32(name.encode())]).normal(size=count)
    u = u.reshape(shape)
    if name.endswith("alpha"):
        return np.full(shape, 20.0)
    if name.endswith("beta"):
        return np.full(shape, 0.7)
    if ".symmetric_contractions." in name:
        return u / shape[1]
    if (".net." in name and len(shape) == 2) or "project.0" in name:
        return u / np.sqrt(shape[1])
    if ".net." in name and name.endswith("weight"):
        return 1.0 + 0.1 * u
    if name.endswith("bias"):
        return 0.1 * u
    return u


def build(tag: str, seed: int | None):
    """The upstream module of a variant, float64, with sharp weights. Needs mace-torch."""
    import mace  # noqa: F401  (has to come before e3nn)
    import torch
    from e3nn import o3
    from mace import modules

    torch.set_default_dtype(torch.float64)
    delta = copy.deepcopy(VARIANTS[tag])
    gates = {"silu": torch.nn.functional.silu, "tanh": torch.tanh}
    gate = gates[delta.pop("gate", "silu")]
    name = delta.pop("class", "ScaleShiftMACE")
    first, rest = delta.pop("first", RESIDUAL), delta.pop("rest", RESIDUAL)
    for key in ("hidden_irreps", "MLP_irreps", "edge_irreps"):
        if key in delta:
            delta[key] = o3.Irreps(delta[key])
    if "readout_cls" in delta:
        delta["readout_cls"] = getattr(modules.blocks, delta["readout_cls"])
    settings = {
        "r_max": R_MAX,
        "num_bessel": 8,
        "num_polynomial_cutoff": 5,
        "max_ell": 3,
        "interaction_cls": getattr(modules.blocks, rest),
        "interaction_cls_first": getattr(modules.blocks, first),
        "num_interactions": 2,
        "num_elements": len(NUMBERS),
        "hidden_irreps": o3.Irreps(L1),
        "MLP_irreps": o3.Irreps("16x0e"),
        "avg_num_neighbors": 17.3,
        "atomic_numbers": list(NUMBERS),
        "correlation": 3,
        "gate": gate,
        "heads": ["Default"],
        "edge_irreps": None,
        "use_reduced_cg": False,
        **delta,
    }
    heads = len(settings["heads"])
    e0 = np.array([np.array(REFERENCE_E0_EV) + h for h in range(heads)])
    settings["atomic_energies"] = e0 if heads > 1 else e0[0]
    if name == "ScaleShiftMACE":
        settings["atomic_inter_scale"] = [1.3 + h for h in range(heads)] if heads > 1 else 1.3
        settings["atomic_inter_shift"] = [0.1 * h for h in range(heads)] if heads > 1 else 0.1
    model = getattr(modules, name)(**settings)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.numel():
                parameter.copy_(torch.from_numpy(filled(key, tuple(parameter.shape), seed)))
    return model


def reference(model, case: dict, head: str) -> dict[str, np.ndarray]:
    """Energy, forces, stress and per-atom interaction energy of mace-torch's ASE calculator."""
    import ase
    from mace.calculators import MACECalculator

    calculator = MACECalculator(models=[model], device="cpu", default_dtype="float64", head=head)
    atoms = ase.Atoms(case["numbers"], case["positions"], cell=case["cell"], pbc=case["pbc"])
    atoms.info.update(charge=case["charge"], spin=case["spin"])
    atoms.calc = calculator
    out = {
        "energy": atoms.get_potential_energy(),
        "forces": atoms.get_forces(),
        "node_energy": calculator.results["node_energy"],
    }
    if np.any(case["pbc"]):
        out["stress"] = atoms.get_stress(voigt=False)
    return {key: np.asarray(value) for key, value in out.items()}


def write(tag: str, folder: Path, seed: int | None) -> None:
    """`TAG.model` and `TAG.npz` in a folder."""
    import torch

    model = build(tag, seed)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(model, folder / f"{tag}.model")
    rows: dict[str, np.ndarray] = {"heads": np.array(model.heads)}
    cases = structures() if seed is not None else {**structures(), "golden": golden_cluster()}
    for case, structure in ({} if tag in REFUSED else cases).items():
        for key, value in reference(model, structure, model.heads[-1]).items():
            rows[f"{case}/{key}"] = value
    partial = folder / f"{tag}.partial.npz"
    np.savez_compressed(partial, **rows)
    partial.replace(folder / f"{tag}.npz")


def write_skeletons(folder: Path, tags: list[str]) -> None:
    """The stored fixtures: `skeletons.zip` (upstream pickles, U dropped, weights zero) and `references.npz`."""
    import io

    import mace
    import torch

    rows: dict[str, np.ndarray] = {}
    partial = folder / "skeletons.partial"
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for tag in tags:
            model = build(tag, None)
            cases = {} if tag in REFUSED else {**structures(), "golden": golden_cluster()}
            for case, structure in cases.items():
                for key, value in reference(model, structure, model.heads[-1]).items():
                    rows[f"{tag}/{case}/{key}"] = value
            contractions = [m for m in model.modules() if type(m).__name__ == "Contraction"]
            for module in contractions:
                for key in [k for k in module._buffers if str(k).startswith("U_matrix")]:
                    del module._buffers[key]
            generated = [] if tag in WHOLE else [m for m in model.modules() if hasattr(m, "__codegen__")]
            for module in generated:
                for key in list(module.__codegen__):
                    del module._modules[key]
                module.__codegen__.clear()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.zero_()
            buffer = io.BytesIO()
            torch.save(model, buffer)
            entry = zipfile.ZipInfo(f"{tag}.model", date_time=(2026, 1, 1, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, buffer.getvalue())
    partial.replace(folder / "skeletons.zip")
    np.savez_compressed(folder / "references.npz", **rows)
    provenance = {
        "made by": "python tests/peers/mace_zoo.py --skeletons tests/fixtures/mace",
        "what": "modules of mace-torch pickled without weights and U; the weights follow from their names (filled)",
        "licence": "MIT, as mace-torch; no pretrained weights",
        "mace-torch": mace.__version__,
        "torch": torch.__version__,
        "tags": tags,
    }
    (folder / "provenance.json").write_text(json.dumps(provenance, indent=1) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("tags", nargs="*")
    parser.add_argument("--seed", type=int, default=None, help="normal random weights; the golden rule without it")
    parser.add_argument("--skeletons", action="store_true", help="write the fixtures of tests/fixtures/mace")
    options = parser.parse_args()
    tags = options.tags or list(VARIANTS)
    if options.skeletons:
        write_skeletons(options.folder, tags)
        return
    for tag in tags:
        write(tag, options.folder, options.seed)
        sys.stdout.write(f"{tag}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
