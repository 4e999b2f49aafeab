"""A potential as openmmtorch's TorchForce: no Python in the loop, in the one environment where it works.

The openmmtorch 1.5 wheel is built against torch 2.9 and OpenMM 8.4-8.5. With another torch it throws at the first
evaluation, with OpenMM 8.6 XML, deepcopy and CustomCVForce end the process: so other pairs are refused.
"""

from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from openmm import app

from mdplug.engines.openmm.plug import PREFIX, chosen_atoms, is_periodic
from mdplug.engines.openmm.source import model_of
from mdplug.errors import MdplugError, require
from mdplug.export import for_torchforce
from mdplug.potential import Model

NAME = PREFIX + "torchforce"


def versions_that_work(torch_version: str, openmm_version: str) -> str | None:
    """Why TorchForce cannot be used with these versions; None if it can."""
    numbers = [tuple(int(part) for part in text.split(".")[:2]) for text in (torch_version, openmm_version)]
    if numbers[0] == (2, 9) and (8, 4) <= numbers[1] <= (8, 5):
        return None
    reason = "crashes on XML, deepcopy and CustomCVForce" if numbers[1] > (8, 5) else "is built against another ABI"
    return (
        f"TorchForce works with torch 2.9.x and OpenMM 8.4-8.5.x only; with torch {torch_version} and OpenMM "
        f"{openmm_version} it {reason}. Use mdplug.force (PythonForce), or an environment with: "
        "pip install 'mdplug[torchforce]'"
    )


def torch_force(
    topology: app.Topology,
    potential: Model | str | Path,
    *,
    atoms: Iterable[int] | None = None,
    charge: float = 0.0,
    spin: float = 1.0,
    periodic: bool | str = "auto",
) -> Any:
    """A potential as an openmmtorch.TorchForce; arguments as `mdplug.force`.

    The compiled model with its pair list travels inside the force (XML, deepcopy). No guard, no memo: a model that
    fails gives OpenMM's own exception.

    Raises:
        InputError: as `mdplug.force`.
        MissingExtraError: openmmtorch is not installed.
        MdplugError: versions of torch and OpenMM that TorchForce does not work with.
    """
    reason = versions_that_work(torch.__version__, version("openmm"))
    if reason is not None:
        raise MdplugError(reason)
    module = require("openmmtorch", extra="torchforce")
    model, _ = model_of(potential)
    chosen, numbers = chosen_atoms(topology, atoms, model.spec)
    script = for_torchforce(model, numbers, atoms=chosen, charge=charge, spin=spin)
    force = module.TorchForce(script)
    force.setName(NAME)
    force.setOutputsForces(True)
    force.setUsesPeriodicBoundaryConditions(is_periodic(topology, periodic))
    return force
