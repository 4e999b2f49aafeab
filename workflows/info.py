"""What a model file holds, without loading its weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from mdplug.registry import resolve
from mdplug.spec import Spec
from mdplug.workflows._common import Config as BaseConfig
from mdplug.workflows._common import Progress, sha256, silent


class Config(BaseConfig):
    """Options of `mdplug info`."""

    model: str = Field(description="model file, or the name of a shipped one (electrolyte)")
    as_json: bool = Field(False, description="the whole record as JSON")


@dataclass
class Result:
    """A model file's record; prints as a table.

    Attributes:
        path: the file. size_MB: its size. sha256: its hash. spec: what it holds.
    """

    path: Path
    size_MB: float
    sha256: str
    spec: Spec
    as_json: bool = False

    def __str__(self) -> str:
        return self.spec.to_json() if self.as_json else "\n".join(f"{key:<18}{value}" for key, value in self.rows())

    def rows(self) -> list[tuple[str, str]]:
        """(what, value) lines, units in the names."""
        from ase.data import chemical_symbols

        spec = self.spec
        symbols = [chemical_symbols[z] for z in spec.species]
        known = " ".join(symbols) if symbols else "any"
        rows = [
            ("name", spec.name),
            ("file", f"{self.path} ({self.size_MB:.2f} MB)"),
            ("sha256", self.sha256),
            ("architecture", spec.architecture),
            ("cutoff_A", f"{spec.cutoff:g}"),
            ("layers", f"{spec.layers} (sees {spec.layers * spec.cutoff:g} A far)"),
            ("elements", f"{known} ({len(symbols)})" if symbols else known),
            ("dtype", spec.dtype),
            ("outputs", " ".join(spec.outputs)),
            ("conservative", "yes" if spec.conservative else "no: forces are not -dE/dx"),
            ("long range", "yes" if spec.long_range else "no"),
            ("licence", spec.licence),
        ]
        for head in spec.heads:
            rows.append(("head", f"{head}: {spec.level_of_theory.get(head, 'level of theory not stated')}"))
            energies = spec.atomic_energies.get(head, {})
            if energies:
                shown = ", ".join(f"{symbol} {value:.4f}" for symbol, value in list(energies.items())[:12])
                more = f" and {len(energies) - 12} more" if len(energies) > 12 else ""
                rows.append(("atomic E_eV", shown + more))
        rows += [("cite", text) for text in spec.cite]
        rows += [(f"from: {key}"[:17], _short(value)) for key, value in spec.provenance.items()]
        if spec.calibration:
            rows.append(("calibration", _short(spec.calibration)))
        rows.append(("config", _short(spec.config)))
        return rows


def _short(value: object, width: int = 300) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= width else text[: width - 3] + "..."


def run(config: Config, *, progress: Progress = silent) -> Result:
    """Read the record.

    Raises:
        InputError: no such file. ModelFileError: not a model file.
    """
    from mdplug.artifact import read_spec

    path = resolve(config.model)
    return Result(path, path.stat().st_size / 1e6, sha256(path), read_spec(path), config.as_json)
