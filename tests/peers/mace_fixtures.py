"""The stored checkpoints: upstream's own pickles, with weights by the golden rule. mace-torch is not needed."""

import zipfile
from functools import cache
from pathlib import Path

import numpy as np
import torch
from peers.mace_zoo import filled

from mdplug.potentials.convert.pickle_machine import Inert
from mdplug.potentials.convert.pickle_reader import read_module

FOLDER = Path(__file__).parents[1] / "fixtures" / "mace"


def checkpoint(tag: str, folder: Path) -> Inert:
    """The stored module of a zoo model, with weights, as `read_module` gives it.

    Args:
        tag: of the zoo. folder: to unpack into.
    """
    with zipfile.ZipFile(FOLDER / "skeletons.zip") as stored:
        root = read_module(stored.extract(f"{tag}.model", folder))
    waiting = [("", root)]
    while waiting:
        prefix, module = waiting.pop()
        parameters = module.children("_parameters")
        for key, value in parameters.items():
            if isinstance(value, torch.Tensor) and value.numel():
                parameters[key] = torch.from_numpy(filled(f"{prefix}{key}", tuple(value.shape)))
        for key, child in module.children("_modules").items():
            if isinstance(child, Inert):
                waiting.append((f"{prefix}{key}.", child))
    return root


@cache
def _references() -> dict[str, np.ndarray]:
    with np.load(FOLDER / "references.npz") as rows:
        return {key: rows[key] for key in rows.files}


def expected(tag: str, case: str) -> dict[str, np.ndarray]:
    """mace-torch's results for a structure."""
    return {key.split("/")[2]: value for key, value in _references().items() if key.startswith(f"{tag}/{case}/")}
