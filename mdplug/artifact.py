"""Model files.

The model file is safetensors with the Spec in its metadata: weights and JSON, no code, safe to share. `export` writes
TorchScript with the same Spec; `load` takes either. This is the only file of the core that names torch.jit.
"""

import json
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mdplug import kernels
from mdplug.errors import InputError, ModelFileError
from mdplug.potential import Model, Potential
from mdplug.registry import architecture, resolve
from mdplug.spec import Spec

SPEC_KEY = "mdplug.spec"  # metadata key (safetensors) and extra file (TorchScript)
TARGET_KEY = "mdplug.target"  # extra file (TorchScript): what `export` made it for; absent in the first: portable


@contextmanager
def quiet_torchscript() -> Iterator[None]:
    """Without torch's notices that TorchScript is deprecated: a supported export here, and nothing a user can mend."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(torch.jit|TorchScript).*", category=DeprecationWarning)
        yield


class Exported(Model):
    """A TorchScript file: the same call as `Deployed`, with its Spec.

    Attributes:
        script: the compiled module.
        target: what `export` made it for, "portable" or "native".
    """

    def __init__(self, script: torch.jit.ScriptModule, spec: Spec, target: str):
        super().__init__(spec)
        self.script, self.target = script, target

    def forward(self, *arguments: Any) -> dict[str, torch.Tensor]:
        """As `Deployed.forward`."""
        return self.script(*arguments)


def save(potential: Potential, path: str | Path) -> Path:
    """Write a model file, atomically.

    Args:
        potential: any Potential that `from_spec` rebuilds.
        path: by habit NAME.safetensors.
    """
    from safetensors.torch import save as to_bytes

    potential = potential.with_exact_radial()  # tables are made at load
    tensors = {key: value.detach().cpu().contiguous() for key, value in potential.state_dict().items()}
    if not tensors:  # safetensors needs one
        tensors = {"_empty": torch.zeros(1)}
    target = Path(path)
    temporary = target.with_name(target.name + ".part")
    temporary.write_bytes(to_bytes(tensors, metadata={SPEC_KEY: potential.spec.to_json()}))
    return temporary.replace(target)


def load(
    model: str | Path,
    device: torch.device | str = "cpu",
    dtype: str | None = None,
    head: str | None = None,
    radial: str | None = None,
) -> Model:
    """A potential from a model file or by the name of a shipped one, ready to evaluate.

    Args:
        model: path, or a name ("electrolyte").
        device: "cpu", "cuda", ...
        dtype: "float32" or "float64"; None: as trained.
        head: level of theory, by name; may be left out where there is one.
        radial: "exact" or "tables"; None: exact in float64, tables in float32 (where an architecture has them).

    Raises:
        InputError: no such model, head or dtype.
        ModelFileError: truncated, foreign, of a newer contract, or made for native operators that are not here.
    """
    path = resolve(model)
    if dtype not in (None, "float32", "float64"):
        raise InputError(f"dtype must be float32 or float64, got {dtype!r}")
    if radial not in (None, "exact", "tables"):
        raise InputError(f"radial must be exact or tables, got {radial!r}")
    try:
        target = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"unknown device {device!r}; use cpu or cuda") from error
    if target.type == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda asked for, but torch sees no CUDA device; use device='cpu'")
    if not path.is_file():
        raise ModelFileError(f"{path} is not a file; give a model file")
    origin = {"path": str(path.resolve()), "device": str(target), "dtype": dtype, "head": head, "radial": radial}
    if zipfile.is_zipfile(path):
        exported = _load_torchscript(path, target)
        _choose_head(exported, head, path)
        if radial is not None or (dtype is not None and dtype != exported.spec.dtype):
            raise InputError(
                f"{path}: dtype and radial were fixed when it was exported ({exported.spec.dtype}); "
                "load the safetensors file to choose"
            )
        exported.origin = origin
        return exported.to(target).eval()
    potential = _load_safetensors(path)
    _choose_head(potential, head, path)
    width = dtype or potential.spec.dtype
    potential = potential.to(device=target, dtype=getattr(torch, width))
    tables = (radial or ("tables" if width == "float32" else "exact")) == "tables"
    potential = potential.with_kernels(tables)
    potential.origin = origin
    return potential.eval().requires_grad_(False)


def _choose_head(potential: Model, head: str | None, path: Path) -> None:
    heads = potential.spec.heads
    if head is None:
        if len(heads) > 1:
            raise InputError(f"{path} has several levels of theory; name one with head=: {', '.join(heads)}")
        head = heads[0]
    if head not in heads:
        raise InputError(f"{path} has no head {head!r}; it has: {', '.join(heads)}")
    potential.head = heads.index(head)


def read_spec(model: str | Path) -> Spec:
    """The Spec of a model file, without loading its weights."""
    path = resolve(model)
    if zipfile.is_zipfile(path):
        return _torchscript_spec(path)[0]
    return _safetensors_spec(path)


def _safetensors_spec(path: Path) -> Spec:
    with path.open("rb") as file:
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or length > 100_000_000:
            raise ModelFileError(f"{path} is not a model file (neither safetensors nor TorchScript); {_mend(path)}")
        header = file.read(length)
    if len(header) < length:
        raise ModelFileError(f"{path} is truncated; get the file again")
    try:
        metadata = json.loads(header).get("__metadata__", {})
    except (ValueError, AttributeError) as error:
        raise ModelFileError(f"{path} is not a model file (its header is not JSON); {_mend(path)}") from error
    if SPEC_KEY not in metadata:
        raise ModelFileError(f"{path} is a safetensors file without an mdplug description; convert it first")
    return Spec.from_json(metadata[SPEC_KEY], str(path))


def _mend(path: Path) -> str:
    return f"an upstream checkpoint is read by: mdplug convert {path} -o MINE.safetensors"


def _load_safetensors(path: Path) -> Potential:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    spec = _safetensors_spec(path)
    try:
        tensors = load_file(path)
    except (SafetensorError, ValueError, OSError) as error:
        raise ModelFileError(f"{path} is truncated or damaged ({error}); get the file again") from error
    tensors.pop("_empty", None)
    potential = architecture(spec.architecture, str(path)).from_spec(spec)
    # Weights are kept in the dtype of the file: a module made in another would round them.
    for tensor in tensors.values():
        if tensor.is_floating_point():
            potential = potential.to(tensor.dtype)
            break
    try:
        potential.load_state_dict(tensors)
    except RuntimeError as error:
        detail = " ".join(str(error).split())
        raise ModelFileError(f"{path}: weights do not fit its architecture ({detail}); convert it again") from error
    return potential


def _torchscript_spec(path: Path) -> tuple[Spec, str]:
    """The Spec, and the target it was exported for."""
    try:
        with zipfile.ZipFile(path) as archive:
            extra = {n.rpartition("/extra/")[2]: n for n in archive.namelist() if "/extra/" in n}
            if SPEC_KEY not in extra:
                code = any("/code/" in n for n in archive.namelist())
                kind = "TorchScript of another program" if code else "a torch checkpoint"
                raise ModelFileError(f"{path} is {kind}, not an mdplug model; {_mend(path)}")
            target = archive.read(extra[TARGET_KEY]).decode() if TARGET_KEY in extra else "portable"
            return Spec.from_json(archive.read(extra[SPEC_KEY]).decode(), str(path)), target
    except (zipfile.BadZipFile, EOFError, KeyError, OSError, UnicodeDecodeError) as error:
        raise ModelFileError(f"{path} is truncated or damaged ({error}); get the file again") from error


def _load_torchscript(path: Path, device: torch.device) -> Exported:
    spec, target = _torchscript_spec(path)
    if target == "native":
        portable = "use a file of: mdplug export --for portable"
        if device.type != "cpu":
            raise InputError(f"{path} was exported for the native operators, which run on the CPU alone; {portable}")
        reason = kernels.load()
        if reason:
            raise ModelFileError(f"{path} needs mdplug's native operators ({reason}); {portable}")
    try:
        with quiet_torchscript():
            script = torch.jit.load(str(path), map_location="cpu")
    except RuntimeError as error:
        raise ModelFileError(f"{path} does not load ({str(error).splitlines()[0]}); export it again") from error
    return Exported(script, spec, target)


def save_torchscript(exported: Exported, path: str | Path) -> Path:
    """Write what `export` builds, with its Spec, atomically."""
    file = Path(path)
    temporary = file.with_name(file.name + ".part")
    extra = {SPEC_KEY: exported.spec.to_json().encode(), TARGET_KEY: exported.target.encode()}
    with quiet_torchscript():
        torch.jit.save(exported.script, str(temporary), _extra_files=extra)
    return temporary.replace(file)
