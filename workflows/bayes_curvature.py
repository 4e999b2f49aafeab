"""The shape of a function about a place, from differences of its gradient: it gives chains their masses and steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

FEW = 64  # numbers up to which the whole Hessian is measured
FARTHEST = 5.0  # standard deviations that a place may seem to be from equilibrium; beyond it is taken as stiffer
NEWTON_STEPS = 30
POWER_STEPS = 12  # of the iteration that finds the stiffest direction; a third of it at further places
PROBES = 8  # random directions that measure the rows of the Hessian

Function = Callable[[Tensor], tuple[float, Tensor]]  # place (P,) -> U, its gradient (P,)


def times(root: Tensor, x: Tensor) -> Tensor:
    """R x, of a diagonal (P,) or a whole (P, P) R."""
    return root * x if root.dim() == 1 else root @ x


def times_transposed(root: Tensor, x: Tensor) -> Tensor:
    """R^T x."""
    return root * x if root.dim() == 1 else root.t() @ x


@dataclass(frozen=True)
class Local:
    """A function about a place.

    Attributes:
        function: U. place: (P,). value, gradient: there. length: of differences that its arithmetic resolves.
    """

    function: Function
    place: Tensor
    value: float
    gradient: Tensor
    length: float

    @classmethod
    def at(cls, function: Function, place: Tensor, length: float) -> Local:
        """Evaluate once."""
        return cls(function, place, *function(place), length)

    def product(self, direction: Tensor, length: float) -> Tensor:
        """Hessian times a direction (P,), by a difference of gradients over a length."""
        d = direction * (length / direction.norm())
        there = self.function(self.place + d)[1]
        if len(d) > FEW:
            return (there - self.gradient) * (direction.norm() / length)
        # A stiff direction would spoil a soft one by its third derivative.
        return (there - self.function(self.place - d)[1]) * (0.5 * direction.norm() / length)

    def hessian(self) -> Tensor:
        """(P, P), a row at a time."""
        unit = torch.eye(len(self.place), dtype=self.place.dtype)
        rows = torch.stack([self.product(one, self.length) for one in unit])
        return 0.5 * (rows + rows.t())

    def row_squares(self, generator: torch.Generator) -> Tensor:
        """(P,) the diagonal of H^2: the squares of the lengths of the Hessian's rows, from random directions."""
        n = len(self.place)
        total = torch.zeros_like(self.place)
        for _ in range(PROBES):
            z = torch.randn(n, generator=generator, dtype=self.place.dtype).sign()
            total += self.product(z, self.length * n**0.5).square() / PROBES
        return total

    def measured(self, generator: torch.Generator) -> Tensor:
        """The Hessian where there are few numbers, else `row_squares`."""
        return self.hessian() if len(self.place) <= FEW else self.row_squares(generator)


def minimum(local: Local, temperature: float, softest: float) -> Tensor:
    """Where Newton's steps with |H|, halved while they lead up, come within a standard deviation of a minimum.

    Args:
        temperature: of the standard deviation. softest: least curvature.
    """
    for _ in range(NEWTON_STEPS):
        values, vectors = torch.linalg.eigh(local.hessian())
        pull = vectors.t() @ local.gradient
        stiff = values.abs().clamp_min(softest)
        if bool((pull.square() <= temperature * stiff).all()):
            break
        move = vectors @ (pull / stiff)
        trials = (Local.at(local.function, local.place - move * 0.5**k, local.length) for k in range(12))
        better = next((trial for trial in trials if trial.value < local.value), None)
        if better is None:
            break
        local = better
    return local.place


def root_of(measured: list[Tensor], gradient: Tensor, temperature: float, softest: Tensor) -> Tensor:
    """R with R R^T near the inverse of the mean curvature; (P, P) or (P,).

    Args:
        measured: what `Local.measured` gave at some places. gradient: (P,) at the last: a direction that it drives by
            more than `FARTHEST` standard deviations is not in equilibrium, and its curvature is not believed.
        temperature: of those. softest: (P,) curvature that is there at least.
    """
    most = FARTHEST**2 * temperature
    if measured[0].dim() == 1:
        size = torch.stack(measured).mean(dim=0).sqrt() + softest
        return torch.maximum(size, gradient.square() / most).rsqrt()
    values, vectors = torch.linalg.eigh(torch.stack(measured))
    mean = ((vectors * values.abs().unsqueeze(1)) @ vectors.transpose(1, 2)).mean(dim=0)
    values, vectors = torch.linalg.eigh(mean)
    stiff = torch.maximum(values, softest.min())
    return vectors * torch.maximum(stiff, (vectors.t() @ gradient).square() / most).rsqrt()


def stiffest(locals_: list[Local], root: Tensor, direction: Tensor) -> tuple[float, Tensor]:
    """Largest curvature |R^T H R| of some places, by power iteration from a direction, and the direction found."""
    most, x = 0.0, direction / direction.norm()
    for k, local in enumerate(locals_):
        size = 0.0
        for _ in range(POWER_STEPS if k == 0 else POWER_STEPS // 3):
            y = times_transposed(root, local.product(times(root, x), local.length))
            size = float(y.norm())
            x = y / y.norm()
        most = max(most, size) if size == size else size  # a NaN must not be lost in a maximum
    return most, x
