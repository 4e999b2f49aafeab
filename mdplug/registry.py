"""Names -> architectures and shipped models. Listing imports nothing heavy.

Third parties add architectures through the entry point group `mdplug.potentials` (name -> "module:Class").
"""

from importlib import import_module, resources
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from mdplug.errors import InputError, ModelFileError

ARCHITECTURES: dict[str, str] = {
    "lj": "mdplug.potentials.pair:LennardJones",
    "morse": "mdplug.potentials.pair:Morse",
    "zbl": "mdplug.potentials.pair:ZBL",
    "stillinger-weber": "mdplug.potentials.stillinger_weber:StillingerWeber",
    "mace": "mdplug.potentials.mace:MACE",
    "sum": "mdplug.compose:Sum",
    "ensemble": "mdplug.compose:Ensemble",
    "biased": "mdplug.biased:Biased",
    "members": "mdplug.potentials.members:SharedMembers",
}
SHIPPED: tuple[str, ...] = ("electrolyte",)


def architectures() -> dict[str, str]:
    """{name: "module:Class"} of every architecture known here, entry points included."""
    found = dict(ARCHITECTURES)
    for entry in entry_points(group="mdplug.potentials"):
        found.setdefault(entry.name, entry.value)
    return found


def architecture(path: str, where: str) -> Any:
    """The class behind "module:Class", if it is a registered one.

    Only registered classes are imported: a model file must not be able to name arbitrary code.

    Raises:
        ModelFileError: not registered, or not importable.
    """
    if path not in architectures().values():
        raise ModelFileError(
            f"{where} needs the architecture {path!r}, which is not installed; install the package that provides it "
            "(entry point group mdplug.potentials)"
        )
    module, _, name = path.partition(":")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ModelFileError(f"{where} needs {path!r}, which this mdplug does not have; upgrade mdplug") from error


def resolve(name: str | Path) -> Path:
    """The file behind a model name or path.

    Raises:
        InputError: neither a file nor the name of a shipped model.
    """
    path = Path(name)
    if path.exists():
        return path
    if str(name) in SHIPPED:
        with resources.as_file(resources.files("mdplug.data") / f"{name}.safetensors") as shipped:
            if shipped.exists():
                return shipped
    raise InputError(f"no model file {str(name)!r}; give a path or one of the shipped models: {' '.join(SHIPPED)}")
