"""mdplug: machine-learned interatomic potentials inside OpenMM and ASE.

A potential is one function of a state; everything else carries states to it or reads results from it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mdplug.artifact import load as load
    from mdplug.artifact import save as save
    from mdplug.deployed import evaluate as evaluate
    from mdplug.engines.ase import Calculator as Calculator
    from mdplug.engines.openmm import create_system as create_system
    from mdplug.engines.openmm import force as force
    from mdplug.system import AtomicSystem as AtomicSystem

# torch and OpenMM take seconds to import: names are looked up when they are used.
_WHERE = {
    "AtomicSystem": "mdplug.system",
    "Calculator": "mdplug.engines.ase",
    "create_system": "mdplug.engines.openmm",
    "evaluate": "mdplug.deployed",
    "force": "mdplug.engines.openmm",
    "load": "mdplug.artifact",
    "save": "mdplug.artifact",
}
__all__ = ["AtomicSystem", "Calculator", "__version__", "create_system", "evaluate", "force", "load", "save"]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module 'mdplug' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
