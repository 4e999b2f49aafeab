"""What every task shares: configs, run folders, signals, progress, provenance."""

from __future__ import annotations

import contextlib
import csv
import difflib
import fcntl
import hashlib
import io
import json
import os
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

import mdplug
from mdplug.errors import InputError, MdplugError, RunFolderError

if TYPE_CHECKING:
    from ase import Atoms

C = TypeVar("C", bound=BaseModel)

Progress = Callable[[int, int, str], None]
"""Called with (done, total, what is going on)."""


def silent(done: int, total: int, text: str) -> None:
    """No progress shown."""


class Config(BaseModel):
    """Options of a task: from YAML, the command line or Python alike; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", validate_default=True)

    @classmethod
    def read(cls, file: Path | None = None, given: Mapping[str, Any] | None = None) -> Self:
        """See `read_config`."""
        return read_config(cls, file, given or {})

    def to_yaml(self) -> str:
        """The config as YAML that `read` takes."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def read_config(kind: type[C], file: Path | None, given: Mapping[str, Any]) -> C:
    """A config from a YAML file and given values; given values win.

    Raises:
        InputError: naming the file and the option.
    """
    values: dict[str, Any] = {}
    if file is not None:
        try:
            values = yaml.safe_load(file.read_text()) or {}
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"config {file} cannot be read ({getattr(error, 'strerror', error)})") from error
        except yaml.YAMLError as error:
            raise InputError(f"config {file} is not YAML: {' '.join(str(error).split())}") from error
        if not isinstance(values, dict):
            raise InputError(f"config {file} must hold 'key: value' lines, got {type(values).__name__}")
    try:
        return kind.model_validate(values | dict(given))
    except ValidationError as error:
        raise InputError(_explain(error, kind, file)) from error


def _explain(error: ValidationError, kind: type[BaseModel], file: Path | None) -> str:
    # An unknown option comes first: it is often the missing one, misspelt.
    first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    key = ".".join(str(part) for part in first["loc"])
    where = f"config {file}: " if file else ""
    if first["type"] == "extra_forbidden":
        close = difflib.get_close_matches(key, kind.model_fields, n=1)
        mend = f"did you mean {close[0]}?" if close else f"known: {', '.join(kind.model_fields)}"
        return f"{where}unknown option {key!r}; {mend}"
    if first["type"] == "missing":
        return f"{where}option {key!r} is missing; give it"
    message = first["msg"].removeprefix("Value error, ")
    value = f", got {first['input']!r}" if key and not isinstance(first["input"], dict) else ""
    return f"{where}{key + ': ' if key else ''}{message}{value}"


class ModelConfig(Config):
    """Options of every task that runs a potential."""

    model: str = Field(description="model file, or the name of a shipped one (electrolyte)")
    device: str = Field("cpu", description="cpu or cuda")
    dtype: Literal["float32", "float64"] | None = Field(None, description="width of the model; default: as trained")
    head: str | None = Field(None, description="level of theory, where the model has several")
    charge: float | None = Field(None, description="total charge in e; default: that of the file, else 0")
    spin: float | None = Field(None, ge=1, description="multiplicity 2S+1; default: that of the file, else 1")
    threads: int | None = Field(None, ge=1, description="CPU threads; default: torch's own choice")

    def load_model(self) -> Any:
        """The potential these options name."""
        return mdplug.load(self.model, device=self.device, dtype=self.dtype, head=self.head)

    def prepared(self, atoms: Atoms) -> Atoms:
        """A copy with charge and spin settled: options win over the file."""
        from ase import Atoms as AseAtoms

        copy: AseAtoms = atoms.copy()
        for key, default in (("charge", 0.0), ("spin", 1.0)):
            given = getattr(self, key)
            copy.info[key] = float(copy.info.get(key, default) if given is None else given)
        return copy


@contextlib.contextmanager
def torch_threads(number: int | None) -> Iterator[int]:
    """Run with so many torch threads; the setting is put back afterwards."""
    import torch

    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


class Stopped(MdplugError):
    """A signal ended a task in good order; the same command goes on.

    Attributes:
        exit_code: 130 after Ctrl-C, else 75, which batch systems take as "try again".
    """

    def __init__(self, number: int, message: str):
        super().__init__(message)
        self.exit_code = 130 if number == signal.SIGINT else 75


class Caught:
    """The first signal that asked the task to stop, if any."""

    number: int | None = None

    @property
    def name(self) -> str:
        """As in SIGTERM."""
        return "" if self.number is None else signal.Signals(self.number).name

    def __call__(self, number: int, frame: Any) -> None:
        if self.number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = number


@contextlib.contextmanager
def catch_signals() -> Iterator[Caught]:
    """Note SIGINT, SIGTERM and SIGUSR1 instead of dying of them; a second Ctrl-C interrupts at once."""
    caught = Caught()
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before = {n: signal.signal(n, caught) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- files -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a failing disk into one line.

    Raises:
        RunFolderError: naming the path and the reason (read-only, full, too large, ...).
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise RunFolderError(
            f"cannot write {path}: {reason}; make room or choose another folder, then run the same command again"
        ) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well, atomically."""
    temporary = path.with_name(f".part-{os.getpid()}-{path.name}")
    try:
        with disk_errors(path):
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path, data: str | bytes) -> None:
    """Write a whole file or leave the old one."""
    with replacing(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def table_text(rows: list[dict[str, Any]]) -> str:
    """Rows as CSV; a column for every key that any row has."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def sha256(path: Path) -> str:
    """Hash of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class RunFolder:
    """The folder of one run: refuses that of another, knows whether it continues.

    Holds config.yaml (the merged config), run.json (task and hashes of the inputs) and, at the end, summary.yaml.

    Args:
        path: made where it is missing.
        task: name of the task.
        config: merged options.
        inputs: files the run depends on.
        may_change: options that may differ when a run continues.

    Attributes:
        continues: the folder holds an earlier part of this run.

    Raises:
        RunFolderError: the folder belongs to another run, is in use, or cannot be written.
    """

    def __init__(
        self,
        path: Path,
        task: str,
        config: Config,
        *,
        inputs: Sequence[Path] = (),
        may_change: Sequence[str] = (),
    ):
        self.path, self.task, self.config = Path(path), task, config
        self.hashes = {str(one): sha256(one) for one in inputs}
        self._started = time.time()
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        self.continues = (self.path / "run.json").exists()
        if self.continues:
            self._same_run(may_change)
        elif any(not one.name.startswith(".") for one in self.path.iterdir()):
            raise RunFolderError(
                f"{self.path} is not empty and holds no mdplug run; choose another folder with --output"
            )
        with disk_errors(self.path):
            # The kernel drops the lock with the process, however that ends.
            self._lock = (self.path / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise RunFolderError(f"{self.path} is in use by another process; wait for it or choose another") from error
        write_atomic(self.path / "config.yaml", config.to_yaml())
        if not self.continues:
            write_atomic(self.path / "run.json", json.dumps({"task": task, "inputs": self.hashes}, indent=1))

    def _same_run(self, may_change: Sequence[str]) -> None:
        try:
            record = json.loads((self.path / "run.json").read_text())
            before = yaml.safe_load((self.path / "config.yaml").read_text())
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise RunFolderError(f"{self.path} holds a damaged run ({error}); choose another folder") from error
        mend = "choose another folder with --output, or remove this one"
        if record["task"] != self.task:
            raise RunFolderError(f"{self.path} holds a run of 'mdplug {record['task']}'; {mend}")
        now = json.loads(self.config.model_dump_json())
        for key in sorted(set(now) | set(before)):
            if key not in (*may_change, "output") and now.get(key) != before.get(key):
                raise RunFolderError(
                    f"{self.path} holds another run: {key} was {before.get(key)!r}, now {now.get(key)!r}; {mend}"
                )
        for name, digest in self.hashes.items():
            if record["inputs"].get(name) != digest:
                raise RunFolderError(f"{self.path} holds another run: {name} has changed since; {mend}")

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def summary(self, **results: Any) -> Path:
        """Write summary.yaml: where the numbers come from, and the numbers."""
        record = {
            "task": self.task,
            **provenance(),
            "started_utc": datetime.fromtimestamp(self._started, UTC).isoformat(timespec="seconds"),
            "wall_s": round(time.time() - self._started, 3),
            "inputs_sha256": self.hashes,
            "config": json.loads(self.config.model_dump_json()),
            "results": json.loads(json.dumps(results, default=str)),
        }
        write_atomic(self / "summary.yaml", yaml.safe_dump(record, sort_keys=False, allow_unicode=True))
        return self / "summary.yaml"

    def close(self) -> None:
        """Let another process have the folder."""
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def provenance() -> dict[str, Any]:
    """Versions, machine and command."""
    versions = {"mdplug": mdplug.__version__, "python": platform.python_version()}
    for name in ("torch", "openmm", "ase", "numpy", "mdtraj", "pymatgen"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "versions": versions,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


# --- progress --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def live(title: str, every_s: float = 30.0) -> Iterator[Progress]:
    """Progress on stderr: a bar with the time left on a terminal, a line now and then in a log file."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(title, every_s)
        return
    columns = (
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    )
    with Bars(*columns, console=console) as bars:
        bar = bars.add_task(title, total=None, text="")
        yield lambda done, total, text: bars.update(bar, completed=done, total=total, text=text)


class _Lines:
    def __init__(self, title: str, every_s: float):
        self.title, self.every_s, self.last, self.said = title, every_s, 0.0, ""

    def __call__(self, done: int, total: int, text: str) -> None:
        now = time.monotonic()
        if now - self.last >= self.every_s or (done >= total and text != self.said):
            self.last, self.said = now, text
            sys.stderr.write(f"{self.title} {done}/{total} {text}\n")
            sys.stderr.flush()


def short_name(path: str, paths: Iterable[str]) -> str:
    """A file's name, with its folder where another file of these has the same name."""
    one = Path(path)
    return one.name if sum(Path(p).name == one.name for p in paths) == 1 else f"{one.parent.name}/{one.name}"
