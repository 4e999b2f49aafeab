"""Spec: what a model is, as JSON inside its file, beside the weights."""

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from mdplug.errors import ModelFileError

CONTRACT = 1


@dataclass(frozen=True)
class Spec:
    """Everything an engine asks of a potential without running it.

    Attributes:
        name: short name.
        architecture: "module:Class" of the Potential.
        config: hyper-parameters, JSON; with the weights they rebuild the module.
        cutoff: A, the largest any term needs.
        layers: message-passing layers (1: energies depend on neighbours only).
        exchange_width: numbers per atom that cross a domain border between layers.
        species: atomic numbers the model knows; empty: any.
        dtype: "float32" or "float64", as trained.
        outputs: keys that `local` returns.
        heads: names of the levels of theory.
        level_of_theory: {head: text}.
        conservative: forces are exactly -dE/dx.
        long_range: `far` adds energy; such a model cannot be domain-decomposed.
        atomic_energies: {head: {symbol: eV}}, reference energies outside the interaction energy.
        calibration: uncertainty calibration, if any.
        licence: of the weights.
        cite: what to cite.
        provenance: where the weights come from (hashes, dates, commands).
        contract: version of this record.
    """

    name: str
    architecture: str
    config: dict[str, Any]
    cutoff: float
    layers: int = 1
    exchange_width: int = 0
    species: tuple[int, ...] = ()
    dtype: str = "float64"
    outputs: tuple[str, ...] = ("atom_energy",)
    heads: tuple[str, ...] = ("default",)
    level_of_theory: dict[str, str] = field(default_factory=dict)
    conservative: bool = True
    long_range: bool = False
    atomic_energies: dict[str, dict[str, float]] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    licence: str = "unknown"
    cite: tuple[str, ...] = ()
    provenance: dict[str, Any] = field(default_factory=dict)
    contract: int = CONTRACT

    def to_json(self) -> str:
        """The record as one line of JSON."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str, where: str) -> "Spec":
        """Read the record back.

        Args:
            text: JSON.
            where: the file, for messages.

        Raises:
            ModelFileError: not JSON, a newer contract, an unknown or a missing key.
        """
        try:
            record = json.loads(text)
        except ValueError as error:
            raise ModelFileError(f"{where}: its description is not JSON ({error}); get the file again") from error
        if not isinstance(record, dict):
            raise ModelFileError(f"{where}: its description is not a record; get the file again")
        contract = record.get("contract")
        if isinstance(contract, int) and contract > CONTRACT:
            raise ModelFileError(
                f"{where} follows contract {contract}, this mdplug knows up to {CONTRACT}; upgrade mdplug"
            )
        known = {f.name for f in fields(cls)}
        for kind, keys in (("unknown", set(record) - known), ("missing", known - set(record))):
            if keys:
                raise ModelFileError(f"{where}: {kind} key {sorted(keys)[0]!r} in its description; convert it again")
        for name in ("species", "outputs", "heads", "cite"):
            record[name] = tuple(record[name])
        return cls(**record)
