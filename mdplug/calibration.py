"""Calibrated uncertainties: a monotone map that travels in the model file and that engines apply at every step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mdplug.errors import InputError
from mdplug.uncertainty_statistics import ErrorLaw

SMALLEST = 1e-12  # below it a logarithm says nothing
HIGHEST_NUMBER = 118


@dataclass(frozen=True)
class Term:
    """One factor (column + floor)^power of the calibrated sigma."""

    column: str
    power: float
    floor: float = 0.0


@dataclass(frozen=True)
class Conformal:
    """An interval factor x sigma from scores of exchangeable units.

    Attributes:
        target: "atom": one of a new unit, drawn at random; "unit": all of a new unit at once.
        level: probability that the interval holds the error. factor: half width in units of the calibrated sigma.
        units, points, n_effective: units, values in them, and how many independent values they are worth.
        coverage_sd: standard deviation of the true coverage over repeated calibrations.
        exact: at least the level on average over calibrations in finite samples, if the units are exchangeable.
    """

    target: str
    level: float
    factor: float
    units: int
    points: int
    n_effective: float
    coverage_sd: float
    exact: bool


@dataclass(frozen=True)
class Calibration:
    """sigma calibrated = exp(table(offset + sum of power ln(column + floor) + element offset)).

    The table is piecewise linear in logarithms and does not fall. Above its last knot it goes on with slope one, so
    that an unknown structure is not given the largest error ever seen; below the first it is constant. An element that
    it does not know gets the largest offset.

    Attributes:
        kind: "scale", "isotonic" or "environment".
        quantity: what sigma is of, with its unit, as "forces_eV_A".
        terms, offset, elements: of the linear part; elements: {atomic number: offset}, empty: none.
        knots, values: (T,) of the table, may be empty.
        law: of |error| over the calibrated sigma.
        conformal: intervals from held-out units, in units of the calibrated sigma.
        facts: how it was found: numbers and text, JSON.
    """

    kind: str
    quantity: str
    terms: tuple[Term, ...]
    offset: float = 0.0
    elements: dict[int, float] = field(default_factory=dict)
    knots: tuple[float, ...] = ()
    values: tuple[float, ...] = ()
    law: ErrorLaw = field(default_factory=ErrorLaw)
    conformal: tuple[Conformal, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    _tensors: dict[Any, tuple[Tensor, ...]] = field(default_factory=dict, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        x, y = np.array(self.knots), np.array(self.values)
        if len(x) != len(y) or (np.diff(x) <= 0).any() or (np.diff(y) < 0).any():
            raise InputError("a calibration table needs rising knots and values that do not fall")
        if not all(1 <= z <= HIGHEST_NUMBER for z in self.elements):
            raise InputError(f"calibration for the atomic numbers {sorted(self.elements)}; they lie in 1..118")

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the arguments of a call; "number" is the atomic number."""
        return (*(t.column for t in self.terms), *(("number",) if self.elements else ()))

    def __call__(self, **columns: Any) -> Any:
        """Calibrated sigma.

        Args:
            columns: (N,) each, tensors on one device or numpy arrays: those of `columns`; others are ignored.

        Returns:
            (N,) in the unit of sigma, of the kind that came in; differentiable with respect to every real column.

        Raises:
            InputError: a column is missing.
        """
        missing = [name for name in self.columns if name not in columns]
        if missing:
            raise InputError(f"this calibration needs the column {missing[0]!r}; it was fitted with {self.columns}")
        if isinstance(columns["sigma"], Tensor):
            return self._evaluate(columns)
        given = {name: np.ascontiguousarray(columns[name]) for name in self.columns}
        return self._evaluate({name: torch.as_tensor(one) for name, one in given.items()}).numpy()

    def _evaluate(self, columns: Mapping[str, Tensor]) -> Tensor:
        knots, intercepts, slopes, offsets = self._prepared(columns["sigma"])
        x = torch.full_like(columns["sigma"], self.offset)
        for term in self.terms:
            column = columns[term.column]
            floored = column + term.floor if term.floor else column
            x = torch.add(x, floored.clamp_min(SMALLEST).log(), alpha=term.power)
        if self.elements:
            x = x + offsets[columns["number"].long()]
        if len(knots):
            piece = torch.bucketize(x.detach(), knots)
            x = torch.addcmul(intercepts[piece], slopes[piece], x)
        return x.exp()

    def _prepared(self, like: Tensor) -> tuple[Tensor, ...]:
        """(T,) knots; (T + 1,) intercepts and slopes of the pieces below, between and above them; (119,) offsets."""
        key = (like.device, like.dtype)
        if key not in self._tensors:
            x, y = np.array(self.knots), np.array(self.values)
            slopes = np.array([0.0, *(np.diff(y) / np.diff(x)), 1.0])
            intercepts = np.array([*y[:1], *(y - slopes[1:] * x)]) if len(x) else slopes
            offsets = np.full(HIGHEST_NUMBER + 1, max(self.elements.values(), default=0.0))
            for z, offset in self.elements.items():
                offsets[z] = offset
            arrays = (x, intercepts, slopes, offsets)
            self._tensors[key] = tuple(torch.tensor(a, dtype=like.dtype, device=like.device) for a in arrays)
        return self._tensors[key]

    def factor(self, level: float, target: str = "atom") -> tuple[float, str]:
        """Half width of an interval in units of the calibrated sigma, and where it is from: "conformal" or "law".

        Raises:
            InputError: an interval for a whole unit that was not calibrated.
        """
        for one in self.conformal:
            if one.target == target and math.isclose(one.level, level):
                return one.factor, "conformal"
        if target != "atom":
            raise InputError(f"no {level:g} interval for {target!r} in this calibration; calibrate with that level")
        return float(self.law.quantile(level)), "law"

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON; what is infinite is null."""
        return {
            **{name: getattr(self, name) for name in ("kind", "quantity", "offset")},
            "terms": [dict(vars(t)) for t in self.terms],
            "elements": {str(z): value for z, value in self.elements.items()},
            "knots": list(self.knots),
            "values": list(self.values),
            "law": {**vars(self.law), "degrees": _finite(self.law.degrees)},
            "conformal": [{**vars(c), "factor": _finite(c.factor)} for c in self.conformal],
            "facts": dict(self.facts),
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Calibration:
        """From `to_dict`.

        Raises:
            InputError: a key is missing, unknown or of the wrong kind.
        """
        try:
            given = dict(record)
            law = given.pop("law")
            return cls(
                terms=tuple(Term(**t) for t in given.pop("terms")),
                elements={int(z): float(value) for z, value in given.pop("elements").items()},
                knots=tuple(given.pop("knots")),
                values=tuple(given.pop("values")),
                law=ErrorLaw(**{**law, "degrees": _infinite(law["degrees"])}),
                conformal=tuple(
                    Conformal(**{**one, "factor": _infinite(one["factor"])}) for one in given.pop("conformal")
                ),
                **given,
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"not the record of a calibration ({error}); calibrate the model again") from error


def _finite(value: float) -> float | None:
    return None if math.isinf(value) else value


def _infinite(value: float | None) -> float:
    return math.inf if value is None else value
