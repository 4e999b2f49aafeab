"""OpenMM: a potential as an openmm.PythonForce or TorchForce, and systems made of it."""

from mdplug.engines.openmm.force import Plug, force, plug_of, plugs_of
from mdplug.engines.openmm.guard import errors_of
from mdplug.engines.openmm.pressure import pressure_tensor_bar
from mdplug.engines.openmm.system import Simulation, check_ensemble, create_system

__all__ = [
    "Plug",
    "Simulation",
    "check_ensemble",
    "create_system",
    "errors_of",
    "force",
    "plug_of",
    "plugs_of",
    "pressure_tensor_bar",
]
