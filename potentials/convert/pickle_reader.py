"""An inert reader of modules written by `torch.save`: the zip archive, its records, and what else a file may be."""

import zipfile
from pathlib import Path
from typing import Any

import torch

from mdplug.errors import ModelFileError
from mdplug.potentials.convert.pickle_machine import Inert, Machine

_LEGACY_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
_MAX_PICKLE_BYTES = 1 << 28


def tensors(root: Inert, kinds: tuple[str, ...] = ("_parameters", "_buffers")) -> dict[str, torch.Tensor]:
    """Parameters and buffers of a module by their dotted names."""
    out: dict[str, torch.Tensor] = {}
    waiting: list[tuple[str, Inert]] = [("", root)]
    seen: set[int] = set()
    while waiting:
        prefix, module = waiting.pop(0)
        if id(module) in seen:
            continue
        seen.add(id(module))
        for kind in kinds:
            for key, value in module.children(kind).items():
                if isinstance(value, torch.Tensor):
                    out[f"{prefix}{key}"] = value
        for key, value in module.children("_modules").items():
            if isinstance(value, Inert):
                waiting.append((f"{prefix}{key}.", value))
    return out


def read_module(path: str | Path) -> Inert:
    """The module in a `torch.save` file, without running anything of the file.

    Raises:
        ModelFileError: not a `torch.save` file, truncated, TorchScript, weights without a module, foreign code, or
            sizes that do not fit the file.
    """
    path = Path(path)
    root = read_object(path)
    if isinstance(root, Inert) and root.children("_modules"):
        return root
    if isinstance(root, dict):
        raise ModelFileError(
            f"{path.name}: holds weights without a module ({', '.join(map(str, list(root)[:3]))}, ...), so the "
            "hyper-parameters are missing; give the NAME.model file that training wrote beside it"
        )
    kind = root.class_name if isinstance(root, Inert) else type(root).__name__
    raise ModelFileError(f"{path.name}: holds a {kind}, not a torch module; give the .model file of a MACE training")


def read_object(path: str | Path) -> Any:
    """Whatever `torch.save` wrote, as numbers, text, containers, tensors and `Inert` records. Raises ModelFileError."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            start = file.read(len(_LEGACY_MAGIC))
            _refuse_other_kinds(path, start)
            with zipfile.ZipFile(file) as archive:
                return _read_archive(path.name, archive)
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read ({error.strerror or error}); check the path") from None
    except zipfile.BadZipFile as error:
        raise ModelFileError(f"{path.name}: is truncated or damaged ({error}); download or copy it again") from None
    except (EOFError, IndexError, KeyError, TypeError, ValueError, AttributeError, OverflowError, MemoryError) as error:
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise ModelFileError(f"{path.name}: is damaged ({reason}); download or copy it again") from None
    except (RuntimeError, NotImplementedError) as error:  # zipfile: encrypted, unknown compression
        raise ModelFileError(f"{path.name}: is not as torch.save writes it ({error}); save it again") from None


def _refuse_other_kinds(path: Path, start: bytes) -> None:
    if start.startswith(b"PK\x03\x04"):
        return
    if not start:
        raise ModelFileError(f"{path.name}: is empty; download or copy it again")
    if start == _LEGACY_MAGIC:
        raise ModelFileError(
            f"{path.name}: is in torch's layout from before 1.6; load it where it was written and torch.save it again"
        )
    if start[:1] == b"\x80":
        raise ModelFileError(f"{path.name}: is a bare pickle, not a torch.save file; torch.save the module")
    raise ModelFileError(
        f"{path.name}: is not a torch.save file (no zip archive); give the .model file of a MACE training"
    )


def _read_archive(name: str, archive: zipfile.ZipFile) -> Any:
    records = {record.filename: record for record in archive.infolist()}
    pickles = [key for key in records if key == "data.pkl" or (key.endswith("/data.pkl") and key.count("/") == 1)]
    if any(key.rsplit("/", 1)[-1] == "constants.pkl" for key in records):
        raise ModelFileError(
            f"{name}: is a TorchScript archive (compiled); give the .model file that it was compiled from"
        )
    if len(pickles) != 1:
        raise ModelFileError(f"{name}: is a zip archive but no torch.save file (no data.pkl); give a .model file")
    folder = pickles[0][: -len("data.pkl")]
    for record in records.values():
        if record.compress_type != zipfile.ZIP_STORED or record.flag_bits & 0x1:
            raise ModelFileError(f"{name}: {record.filename} is compressed, which torch.save never does; save it again")
    order = f"{folder}byteorder"
    if order in records and archive.read(order).strip() != b"little":
        raise ModelFileError(f"{name}: was written on a big-endian machine; save it again on a little-endian one")
    if records[pickles[0]].file_size > _MAX_PICKLE_BYTES:
        raise ModelFileError(f"{name}: its pickle is over {_MAX_PICKLE_BYTES >> 20} MiB, which no MACE checkpoint is")

    def storage(key: str) -> bytes:
        record = records.get(f"{folder}data/{key}")
        if record is None:
            raise ModelFileError(f"{name}: record data/{key} is missing; download or copy the file again")
        return archive.read(record)

    return Machine(name, storage).run(archive.read(pickles[0]))
