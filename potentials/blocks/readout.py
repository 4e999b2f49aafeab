"""Energies from scalar features, per level of theory; and features from total charge and spin."""

import math
from typing import Any, Dict, Final, List, Tuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from mdplug.errors import InputError
from mdplug.potentials.blocks.activations import ACTIVATION_NORM, activate, activate_slope


class NoReadout(nn.Module):
    """A layer whose features are not read."""

    def forward(self, scalars: Tensor, head: Tensor) -> Tensor:
        """(n, K), (n,) -> (n,) zeros."""
        return scalars.new_zeros(scalars.shape[0])

    def with_slope(self, scalars: Tensor, head: Tensor, weight: Tensor) -> Tuple[Tensor, Tensor]:
        """Energies, and d(sum of weight x energy)/d(scalars)."""
        return self(scalars, head), torch.zeros_like(scalars)

    @torch.jit.unused
    def scales(self) -> Dict[str, float]:
        """Nothing to scale."""
        return {}


class LinearReadout(nn.Module):
    """(n, K) -> (n,): a column per head."""

    def __init__(self, channels: int, n_heads: int, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, n_heads, dtype=dtype))

    def forward(self, scalars: Tensor, head: Tensor) -> Tensor:
        """Energies of the head each atom belongs to.

        Args:
            scalars: (n, K). head: (n,) int64.
        """
        return torch.mm(scalars, self.weight).gather(1, head.unsqueeze(1)).squeeze(1)

    def with_slope(self, scalars: Tensor, head: Tensor, weight: Tensor) -> Tuple[Tensor, Tensor]:
        """Energies (n,), and d(sum of weight x energy)/d(scalars) (n, K); weight: (n,)."""
        return self(scalars, head), weight.unsqueeze(1) * self.weight.t().index_select(0, head)

    @torch.jit.unused
    def scales(self) -> Dict[str, float]:
        """Factor between a weight of unit variance and the weight stored here."""
        return {"weight": 1.0 / math.sqrt(self.weight.shape[0])}


class GatedReadout(nn.Module):
    """(n, K) -> (n,): one hidden layer per head, two with `bias`.

    Args:
        gate: name of the activation. hidden: its width per head. bias: a second hidden layer, and biases.
    """

    gate: Final[str]
    bias: Final[bool]

    def __init__(self, channels: int, hidden: int, n_heads: int, gate: str, bias: bool, dtype: torch.dtype):
        super().__init__()
        if gate not in ACTIVATION_NORM:
            raise InputError(f"readout gate {gate!r} is not known; use one of {', '.join(ACTIVATION_NORM)}")
        self.gate, self.bias = gate, bias
        self.first = nn.Parameter(torch.zeros(n_heads, channels, hidden, dtype=dtype))
        n_middle = n_heads if bias else 0
        self.middle = nn.Parameter(torch.zeros(n_middle, hidden, hidden, dtype=dtype))
        self.middle_bias = nn.Parameter(torch.zeros(n_middle, hidden, dtype=dtype))
        self.last = nn.Parameter(torch.zeros(n_heads, hidden, dtype=dtype))
        self.last_bias = nn.Parameter(torch.zeros(n_middle, dtype=dtype))

    def forward(self, scalars: Tensor, head: Tensor) -> Tensor:
        """Energies of the head each atom belongs to; arguments as in `LinearReadout.forward`."""
        x = activate(torch.matmul(scalars, self.first), self.gate)  # (H, n, hidden)
        if self.bias:
            x = activate(torch.baddbmm(self.middle_bias.unsqueeze(1), x, self.middle), self.gate)
        energy = torch.bmm(x, self.last.unsqueeze(2)).squeeze(2)
        if self.bias:
            energy = energy + self.last_bias.unsqueeze(1)
        return energy.gather(0, head.unsqueeze(0)).squeeze(0)

    def with_slope(self, scalars: Tensor, head: Tensor, weight: Tensor) -> Tuple[Tensor, Tensor]:
        """As `LinearReadout.with_slope`."""
        first = torch.matmul(scalars, self.first)
        x = activate(first, self.gate)
        middle = first
        if self.bias:
            middle = torch.baddbmm(self.middle_bias.unsqueeze(1), x, self.middle)
            x = activate(middle, self.gate)
        energy = torch.bmm(x, self.last.unsqueeze(2)).squeeze(2)
        own = weight.unsqueeze(0)  # (H, n): of other heads than an atom's, nothing
        if self.bias:
            energy = energy + self.last_bias.unsqueeze(1)
        if len(self.first) > 1:
            own = torch.zeros_like(energy).scatter_(0, head.unsqueeze(0), own)
        slope = own.unsqueeze(2) * self.last.unsqueeze(1) * activate_slope(middle, self.gate)
        if self.bias:
            slope = torch.bmm(slope, self.middle.transpose(1, 2)) * activate_slope(first, self.gate)
        back = torch.bmm(slope, self.first.transpose(1, 2)).sum(0)
        return energy.gather(0, head.unsqueeze(0)).squeeze(0), back

    @torch.jit.unused
    def scales(self) -> Dict[str, float]:
        """Factor between a weight of unit variance and the weight stored here; absent: 1."""
        n_heads, channels, hidden = self.first.shape
        after = ACTIVATION_NORM[self.gate] / math.sqrt(hidden * n_heads)
        return {"first": 1.0 / math.sqrt(channels), "middle": after, "last": after}


class Table(nn.Module):
    """A row per integer value."""

    offset: Final[int]
    name: Final[str]

    def __init__(self, name: str, classes: int, offset: int, width: int, dtype: torch.dtype):
        super().__init__()
        self.name, self.offset, self.classes = name, offset, classes
        self.table = nn.Parameter(torch.zeros(classes, width, dtype=dtype))

    def forward(self, values: Tensor) -> Tensor:
        """(S,) -> (S, width).

        Raises:
            InputError: a value outside the table.
        """
        row = torch.round(values).to(torch.int64) + self.offset
        if bool(((row < 0) | (row >= self.classes)).any()):
            raise InputError(
                f"{self.name} of a structure lies outside the model's range "
                f"{-self.offset} to {self.classes - 1 - self.offset}; correct it or use another model"
            )
        return self.table.index_select(0, row)


class Perceptron(nn.Module):
    """Two linear layers on a continuous value."""

    def __init__(self, width: int, bias: bool, dtype: torch.dtype):
        super().__init__()
        self.first = nn.Linear(1, width, bias=bias, dtype=dtype)
        self.second = nn.Linear(width, width, bias=bias, dtype=dtype)

    def forward(self, values: Tensor) -> Tensor:
        """(S,) -> (S, width)."""
        return self.second(functional.silu(self.first(values.unsqueeze(1))))


class StateEmbedding(nn.Module):
    """Total charge and total spin of a structure -> features added to each of its atoms.

    Args:
        inputs: records {"name": "total_charge" | "total_spin", "kind": "categorical" | "continuous", "width": int,
            "classes": int, "offset": int (categorical), "bias": bool (continuous)}.
    """

    uses_spin: List[bool]

    def __init__(self, inputs: List[Dict[str, Any]], channels: int, dtype: torch.dtype):
        super().__init__()
        self.uses_spin = []
        parts: List[nn.Module] = []
        for record in inputs:
            if record["name"] not in ("total_charge", "total_spin"):
                raise InputError(f"embedding of {record['name']!r} is not supported; only total_charge and total_spin")
            self.uses_spin.append(record["name"] == "total_spin")
            if record["kind"] == "categorical":
                parts.append(Table(record["name"], record["classes"], record.get("offset", 0), record["width"], dtype))
            else:
                parts.append(Perceptron(record["width"], record.get("bias", True), dtype))
        self.inputs = nn.ModuleList(parts)
        self.project = nn.Parameter(torch.zeros(sum(r["width"] for r in inputs), channels, dtype=dtype))

    def forward(self, total_charge: Tensor, total_spin: Tensor) -> Tensor:
        """(S,), (S,) -> (S, K)."""
        rows: List[Tensor] = []
        for k, part in enumerate(self.inputs):
            rows.append(part(total_spin if self.uses_spin[k] else total_charge))
        return functional.silu(torch.mm(torch.cat(rows, dim=1), self.project))

    @torch.jit.unused
    def initialise(self, generator: torch.Generator) -> None:
        """Random weights: normal tables, uniform +-1/sqrt(fan-in) elsewhere."""
        for part in self.inputs:
            for name, parameter in part.named_parameters():
                if name == "table":
                    parameter.data.normal_(0.0, 1.0, generator=generator)
                else:
                    linear: Any = part.get_submodule(name.split(".")[0])
                    bound = 1.0 / math.sqrt(linear.in_features)
                    parameter.data.uniform_(-bound, bound, generator=generator)
        bound = 1.0 / math.sqrt(self.project.shape[0])
        self.project.data.uniform_(-bound, bound, generator=generator)
