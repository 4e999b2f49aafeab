"""Radial functions as cubic Hermite splines: the last hidden features of all nets, reduced to their rank, in one table.

What reaches the messages is R(r) = features(r) x last radial layer. Its singular vectors, taken over values and slopes,
give the fewest features that keep R; these are tabulated on equal steps of r, with the cutoff inside. Where a net sees
the elements (a distance transform, or kind NL), there is a table per pair of elements.
"""

import copy
import math
from typing import Dict, List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor, nn

from mdplug.potentials.blocks.radial import NoTransform, Radial
from mdplug.potentials.blocks.radial_nets import PlainNet

FIRST_KNOT = 0.1  # A; the first polynomial is continued below
ERROR_FROM = 0.5  # A; errors are stated from here to the cutoff
MAX_KNOTS = 8192
MAX_BYTES = 64 * 2**20  # of float32 tables; above, the exact net stays


class Tables(NamedTuple):
    """Result of `tabulate`.

    Attributes:
        radial: drop-in for Radial. weights: per layer, the new last radial layer.
        slope_error, value_error: relative rms error of the tabulated R'(r) and R(r), worst layer.
        knots: intervals of the table. ranks: features per layer.
    """

    radial: nn.Module
    weights: List[Tensor]
    slope_error: float
    value_error: float
    knots: int
    ranks: List[int]


class SplineRadial(nn.Module):
    """Columns of each layer by interpolation.

    Args:
        coefficients: (kinds * intervals, 4 * C) of 1, s, s^2, s^3 with s in 0..1 inside an interval.
        kind_of: (S, S) int64, table of each (receiver, sender) pair of species.
        step: A. n_intervals: per kind. sizes: columns of each layer.
    """

    coefficients: Tensor
    kind_of: Tensor

    def __init__(
        self, coefficients: Tensor, kind_of: Tensor, first: float, step: float, n_intervals: int, sizes: List[int]
    ):
        super().__init__()
        self.register_buffer("coefficients", coefficients)
        self.register_buffer("kind_of", kind_of)
        self.first, self.step, self.n_intervals, self.sizes = first, step, n_intervals, sizes
        self.several = int(kind_of.max()) > 0

    def forward(self, r: Tensor, receiver: Tensor, sender: Tensor) -> List[Tensor]:
        """As `Radial.forward`."""
        x = (r - self.first) / self.step
        interval = torch.clamp(x.detach().floor(), 0, self.n_intervals - 1)
        s = x - interval
        row = interval.squeeze(1).to(torch.int64)
        if self.several:
            row = row + self.n_intervals * self.kind_of[receiver, sender]
        c0, c1, c2, c3 = self.coefficients.index_select(0, row).chunk(4, dim=1)
        columns = torch.addcmul(c0, s, torch.addcmul(c1, s, torch.addcmul(c2, s, c3)))
        return list(torch.split(columns, self.sizes, dim=1))

    def with_slopes(self, r: Tensor, receiver: Tensor, sender: Tensor) -> Tuple[List[Tensor], List[Tensor]]:
        """As `Radial.with_slopes`."""
        kind = self.kind_of[receiver, sender] if self.several else receiver[:0]
        values, slopes = cubic(self.coefficients, kind, r, self.first, self.step, self.n_intervals)
        return list(torch.split(values, self.sizes, dim=1)), list(torch.split(slopes, self.sizes, dim=1))


def cubic(
    coefficients: Tensor, kind: Tensor, r: Tensor, first: float, step: float, n_intervals: int
) -> Tuple[Tensor, Tensor]:
    """All columns of a cubic table at distances r (E, 1) A, and their slopes; (E, C) each, without a tape.

    Args:
        kind: (E,) int64, or empty: there is one table. The rest as in `SplineRadial`.
    """
    x = (r - first) / step
    interval = torch.clamp(x.floor(), 0, n_intervals - 1)
    s = x - interval
    row = interval.squeeze(1).to(torch.int64)
    if kind.shape[0] > 0:
        row = row + n_intervals * kind
    c0, c1, c2, c3 = coefficients.index_select(0, row).chunk(4, dim=1)
    return c0 + s * (c1 + s * (c2 + s * c3)), (c1 + s * (2.0 * c2 + 3.0 * s * c3)) / step


def sample(
    radial: Radial | SplineRadial, r: Tensor, pairs: List[Tuple[int, int]], n_layers: int
) -> Tuple[List[Tensor], List[Tensor]]:
    """Per layer, columns and their slopes, (kinds, points, C), in float64."""
    found = []
    with torch.no_grad():
        for receiver, sender in pairs:
            a, b = (torch.full((len(r),), z, dtype=torch.int64) for z in (receiver, sender))
            found.append(radial.with_slopes(r.unsqueeze(1), a, b))
    values, slopes = ([torch.stack([one[k][t] for one in found]) for t in range(n_layers)] for k in (0, 1))
    return values, slopes


def reduce_features(
    values: Tensor, slopes: Tensor, weight: Tensor, tolerance: float, multiple: int = 4
) -> Tuple[Tensor, Tensor]:
    """Projection (b, rank) of the features and the weight (rank, P * k) that goes with it."""
    right, left = torch.linalg.qr(weight.t())  # weight = left^T right^T
    v, d = (x.flatten(0, 1) @ left.t() for x in (values, slopes))
    gram = v.t() @ v / v.square().sum().clamp_min(1e-30) + d.t() @ d / d.square().sum().clamp_min(1e-30)
    squares, vectors = torch.linalg.eigh(gram)  # ascending; tolerances far above sqrt(1e-16) keep this safe
    tail = squares.clamp_min(0.0).cumsum(0).flip(0).sqrt()  # what is missed with 0, 1, 2... features
    vectors = vectors.flip(1)
    rank = int((tail > tolerance).sum())
    rank = min(max(multiple * math.ceil(rank / multiple), multiple), vectors.shape[1])
    basis = vectors[:, :rank]
    return left.t() @ basis, basis.t() @ right.t()


def hermite(values: Tensor, slopes: Tensor, step: float) -> Tensor:
    """(kinds, knots, C) values and slopes -> (kinds * intervals, 4 C) coefficients."""
    y0, y1 = values[:, :-1], values[:, 1:]
    d0, d1 = slopes[:, :-1] * step, slopes[:, 1:] * step
    rows = torch.cat([y0, d0, 3 * (y1 - y0) - 2 * d0 - d1, 2 * (y0 - y1) + d0 + d1], dim=2)
    return rows.flatten(0, 1)


def tabulate(
    radial: Radial, weights: List[Tensor], cutoff: float, n_species: int, tolerance: float
) -> Optional[Tables]:
    """Tables of all layers, with as many knots as the tolerance on the slope needs.

    Args:
        radial: exact. weights: per layer (b, P, k), the last radial layer. cutoff: A.
        n_species: S. tolerance: on the relative rms error of the slope.

    Returns:
        None where the tables would be too large (many elements): keep the exact net.
    """
    exact = copy.deepcopy(radial).double().cpu()
    layers = [w.detach().double().cpu().flatten(1) for w in weights]
    n_features = [w.shape[0] for w in layers]
    ordered = not all(isinstance(net, PlainNet) for net in exact.nets)
    kind_of = torch.zeros(n_species, n_species, dtype=torch.int64)
    pairs: List[Tuple[int, int]] = [(0, 0)]
    if ordered or not isinstance(exact.transform, NoTransform):
        pairs = [(a, b) for a in range(n_species) for b in range(n_species) if ordered or a <= b]
        for kind, (a, b) in enumerate(pairs):
            kind_of[a, b] = kind
            if not ordered:
                kind_of[b, a] = kind
    n_columns = sum(n_features) + len(n_features)
    if len(pairs) * 256 * 4 * n_columns * 4 > MAX_BYTES:
        return None
    span = cutoff - FIRST_KNOT
    fine = torch.linspace(ERROR_FROM, cutoff, 2000, dtype=torch.float64)
    fine_values, fine_slopes = sample(exact, fine, pairs, len(layers))
    projections: List[Tensor] = []
    new_weights: List[Tensor] = []
    for t, weight in enumerate(layers):
        b = n_features[t]
        onto, reduced = reduce_features(fine_values[t][..., :b], fine_slopes[t][..., :b], weight, tolerance / 3)
        extra = fine_values[t].shape[2] - b  # the density column stays itself
        projections.append(torch.block_diag(onto, torch.eye(extra, dtype=onto.dtype)))
        new_weights.append(reduced)
    knots = 128
    while True:
        step = span / knots
        grid = FIRST_KNOT + step * torch.arange(knots + 1, dtype=torch.float64)
        at, slope_at = sample(exact, grid, pairs, len(layers))
        coefficients = hermite(
            torch.cat([v @ p for v, p in zip(at, projections, strict=True)], dim=2),
            torch.cat([d @ p for d, p in zip(slope_at, projections, strict=True)], dim=2),
            step,
        )
        sizes = [p.shape[1] for p in projections]
        spline = SplineRadial(coefficients, kind_of, FIRST_KNOT, step, knots, sizes)
        value_error, slope_error = _errors(spline, fine, pairs, fine_values, fine_slopes, layers, new_weights)
        too_large = 2 * coefficients.numel() * 4 > MAX_BYTES
        if slope_error < tolerance or knots >= MAX_KNOTS or too_large:
            break
        knots *= 2
    dtype, device = weights[0].dtype, weights[0].device
    shaped = [
        w.view(-1, *old.shape[1:]).to(dtype=dtype, device=device) for w, old in zip(new_weights, weights, strict=True)
    ]
    spline = spline.to(device)
    spline.coefficients = spline.coefficients.to(dtype)
    return Tables(spline, shaped, slope_error, value_error, knots, [w.shape[0] for w in new_weights])


def _errors(
    spline: SplineRadial,
    r: Tensor,
    pairs: List[Tuple[int, int]],
    values: List[Tensor],
    slopes: List[Tensor],
    weights: List[Tensor],
    reduced: List[Tensor],
) -> Tuple[float, float]:
    """Relative rms errors of value and slope of the functions that reach the messages; the worst layer."""
    got, got_slopes = sample(spline, r, pairs, len(weights))
    errors: Dict[str, List[float]] = {"value": [], "slope": []}
    for t, weight in enumerate(weights):
        b, rank = weight.shape[0], reduced[t].shape[0]
        for key, exact, table in (("value", values[t], got[t]), ("slope", slopes[t], got_slopes[t])):
            wanted = exact[..., :b] @ weight
            missed = table[..., :rank] @ reduced[t] - wanted
            errors[key].append(float(missed.norm() / wanted.norm().clamp_min(1e-30)))
            if exact.shape[2] > b:
                missed = table[..., rank:] - exact[..., b:]
                errors[key].append(float(missed.norm() / exact[..., b:].norm().clamp_min(1e-30)))
    return max(errors["value"]), max(errors["slope"])
