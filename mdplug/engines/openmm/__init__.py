"""OpenMM: a potential as an openmm.PythonForce or TorchForce, and systems made of it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mdplug.engines.openmm.errors import errors_of as errors_of
    from mdplug.engines.openmm.plug import Plug as Plug
    from mdplug.engines.openmm.plug import force as force
    from mdplug.engines.openmm.plug import plug_of as plug_of
    from mdplug.engines.openmm.plug import plugs_of as plugs_of
    from mdplug.engines.openmm.pressure import pressure_tensor_bar as pressure_tensor_bar
    from mdplug.engines.openmm.system import Simulation as Simulation
    from mdplug.engines.openmm.system import check_ensemble as check_ensemble
    from mdplug.engines.openmm.system import create_system as create_system

# Looked up when used: openmm-ml imports this package, for its entry point, whenever it is imported itself.
_WHERE = {
    "Plug": "plug",
    "Simulation": "system",
    "check_ensemble": "system",
    "create_system": "system",
    "errors_of": "errors",
    "force": "plug",
    "plug_of": "plug",
    "plugs_of": "plug",
    "pressure_tensor_bar": "pressure",
}
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


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
