"""Errors that a user can mend: one line that names the thing and the mend."""

import importlib
from types import ModuleType


class MdplugError(Exception):
    """Base of every error mdplug raises on purpose."""


class InputError(MdplugError, ValueError):
    """A structure, number or option that cannot be right."""


class ModelFileError(MdplugError):
    """A model file that is truncated, foreign, of a newer contract, or refused."""


class MissingExtraError(MdplugError, ImportError):
    """An optional package is not installed."""


class RunFolderError(MdplugError):
    """A run folder that belongs to another run, or cannot be written."""


class SimulationError(MdplugError):
    """A simulation that left the physical world: NaN, huge forces, lost atoms, too small a box."""


def require(module: str, *, extra: str) -> ModuleType:
    """Import an optional package.

    Raises:
        MissingExtraError: naming the extra that brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{module} cannot be imported ({error}); install it with: pip install 'mdplug[{extra}]'"
        ) from error
