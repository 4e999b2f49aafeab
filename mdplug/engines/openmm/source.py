"""Where a force's potential comes from, so that a pickle (XML, deepcopy) can say it again.

A potential read from a file is said by path, sha256 and load options; one built in memory travels as itself.
"""

import hashlib
import threading
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from mdplug.artifact import load
from mdplug.errors import InputError, ModelFileError
from mdplug.potential import Model
from mdplug.registry import resolve


@dataclass(frozen=True)
class ModelFile:
    """A model file with the options it is loaded with.

    Attributes:
        path: absolute.
        sha256: of its bytes.
        options: arguments of `mdplug.load`, sorted.
    """

    path: str
    sha256: str
    options: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, model: str | Path, **options: Any) -> "ModelFile":
        """Describe a file (a path or the name of a shipped model)."""
        path = resolve(model).resolve()
        return cls(str(path), _sha256(str(path), path.stat().st_mtime_ns), tuple(sorted(options.items())))


@lru_cache(maxsize=32)
def _sha256(path: str, changed: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# Copies of a force in one process share their weights.
_loaded: dict[ModelFile, Model] = {}
_loading = threading.Lock()


def open_model(file: ModelFile) -> Model:
    """The potential of a model file, loaded once in a process.

    Raises:
        ModelFileError: the file is gone, or is not the one that was described.
    """
    with _loading:
        if file not in _loaded:
            path = Path(file.path)
            if not path.is_file():
                raise ModelFileError(f"{path} is gone; put the model file back, or build the system again")
            found = _sha256(file.path, path.stat().st_mtime_ns)
            if found != file.sha256:
                raise ModelFileError(
                    f"{path} has changed since this system was written (sha256 {found[:12]}, then "
                    f"{file.sha256[:12]}); put that model file back, or build the system again"
                )
            _loaded[file] = load(path, **dict(file.options))
        return _loaded[file]


def model_of(potential: Model | str | Path) -> tuple[Model, ModelFile | None]:
    """A potential as it is now and, if it is what a file holds, that file.

    Raises:
        InputError: neither a potential nor a path.
    """
    if isinstance(potential, str | Path):
        file = ModelFile.of(potential)
        return open_model(file), file
    if not isinstance(potential, Model):
        raise InputError(
            f"potential must be a Potential or a model file, got {type(potential).__name__}; use mdplug.load"
        )
    if potential.origin is None or not Path(potential.origin["path"]).is_file():
        return potential, None
    options = {key: value for key, value in potential.origin.items() if key != "path"}
    file = ModelFile.of(potential.origin["path"], **options)
    stored = open_model(file)
    # Weights may have been changed, or the file, since it was loaded.
    return (stored, file) if _same(stored, potential) else (potential, None)


def _same(one: Model, other: Model) -> bool:
    mine, its = one.state_dict(), other.state_dict()
    if type(one) is not type(other) or one.head != other.head or mine.keys() != its.keys():
        return False
    return all(
        a.dtype == its[key].dtype and a.device == its[key].device and torch.equal(a, its[key])
        for key, a in mine.items()
    )
