"""Append-only label files with a ledger: what is finished survives kill -9, what is half written is cut off."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ase import Atoms
from ase.io import write

from mdplug.workflows._common import disk_errors, replacing


@dataclass
class Outcome:
    """What came of one unit of work.

    Attributes:
        id: of the unit.
        labelled: structures with labels.
        failed: structures without, the reason in ``info["error"]``.
        left_out: structures whose force was over the limit.
    """

    id: str
    labelled: list[Atoms] = field(default_factory=list)
    failed: list[Atoms] = field(default_factory=list)
    left_out: int = 0


class Journal:
    """Append-only files of a run: labels and failures, and a ledger that says how far each is whole.

    A unit of work is written, flushed to the disk, and only then entered in the ledger with the ends of both files; on
    opening, whatever lies beyond the last whole ledger line is cut off.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.done: dict[str, dict[str, Any]] = {}
        self.ends = {"labels": 0, "failed": 0}
        whole = 0
        ledger = folder / "ledger.jsonl"
        with disk_errors(folder):
            if ledger.exists():
                for line in ledger.read_bytes().splitlines(keepends=True):
                    if not line.endswith(b"\n"):
                        break
                    entry = json.loads(line)
                    self.done[entry["id"]] = entry | {"begin": dict(self.ends)}
                    self.ends = dict(entry["ends"])
                    whole += len(line)
            self.files = {name: self._open(folder / f"{name}.partial.extxyz", end) for name, end in self.ends.items()}
            self.ledger = self._open(ledger, whole)

    @staticmethod
    def _open(path: Path, end: int) -> io.BufferedRandom:
        path.touch()
        handle = path.open("r+b")
        handle.truncate(end)
        handle.seek(end)
        return handle

    def add(self, outcome: Outcome) -> None:
        """Write one finished unit."""
        begin = dict(self.ends)
        for name, frames in (("labels", outcome.labelled), ("failed", outcome.failed)):
            if frames:
                self.files[name].write(as_extxyz(frames))
                self.files[name].flush()
                os.fsync(self.files[name].fileno())
                self.ends[name] = self.files[name].tell()
        counts = {"labelled": len(outcome.labelled), "failed": len(outcome.failed), "left_out": outcome.left_out}
        entry = {"id": outcome.id, "ends": dict(self.ends)} | counts
        self.ledger.write(json.dumps(entry).encode() + b"\n")
        self.ledger.flush()
        os.fsync(self.ledger.fileno())
        self.done[outcome.id] = entry | {"begin": begin}

    def finish(self, order: list[str]) -> None:
        """Write labels.extxyz and failed.extxyz in the order of the units."""
        for name, file in self.files.items():
            with replacing(self.folder / f"{name}.extxyz") as temporary, temporary.open("wb") as out:
                for unit in order:
                    entry = self.done[unit]
                    file.seek(entry["begin"][name])
                    out.write(file.read(entry["ends"][name] - entry["begin"][name]))

    def close(self) -> None:
        """Close all files."""
        for handle in (*self.files.values(), self.ledger):
            handle.close()

    def total(self, key: str, units: Iterable[str]) -> int:
        """Sum of ``labelled``, ``failed`` or ``left_out`` over those of the units that are done."""
        return sum(self.done[unit][key] for unit in units if unit in self.done)


def as_extxyz(frames: list[Atoms]) -> bytes:
    """Frames as extended XYZ text."""
    text = io.StringIO()
    write(text, frames, format="extxyz", write_results=False)
    return text.getvalue().encode()
