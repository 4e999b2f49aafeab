"""Files of the watch on an MD run that only grow, and can be cut back to a checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mdplug.workflows._common import disk_errors
from mdplug.workflows.md_files import AppendFile


class LaterFile:
    """A text file that is there once something has been written.

    Args:
        path: the file. size: bytes to keep; 0 removes it.
    """

    def __init__(self, path: Path, size: int):
        self.path, self.size = path, size
        self._file = AppendFile(path, size) if size else None
        if not size:
            with disk_errors(path):
                path.unlink(missing_ok=True)

    def append(self, text: str) -> None:
        """Add text at the end."""
        if self._file is None:
            self._file = AppendFile(self.path, 0)
        data = text.encode()
        self._file.append(data)
        self.size += len(data)

    def sync(self) -> int:
        """Everything on disk; the size."""
        return 0 if self._file is None else self._file.sync()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


class Rows:
    """(rows, width) float32 as a .npy file that `numpy.load` takes at any time, also while it grows.

    Args:
        path: the file. width: numbers in a row. size: bytes to keep. rows: in them.
    """

    HEADER = 128  # numpy pads to a multiple of 64; so much holds any shape

    def __init__(self, path: Path, width: int, size: int, rows: int):
        self.width, self.rows = width, rows
        self._file = AppendFile(path, size)
        if size:
            self._count()
        else:
            self._file.append(self._header())

    def _header(self) -> bytes:
        text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({self.rows}, {self.width}), }}"
        length = self.HEADER - 10
        return b"\x93NUMPY\x01\x00" + length.to_bytes(2, "little") + text.ljust(length - 1).encode() + b"\n"

    def _count(self) -> None:
        self._file.overwrite(0, self._header())

    def write(self, row: np.ndarray) -> None:
        """Append a row."""
        self._file.append(np.asarray(row, dtype="<f4").tobytes())
        self.rows += 1
        self._count()

    def mark(self) -> dict[str, int]:
        """Size and rows, all on disk."""
        return {"size": self._file.sync(), "rows": self.rows}

    def close(self) -> None:
        """Close the file."""
        self._file.close()
