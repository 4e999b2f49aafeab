"""Radial functions of each layer as quintic splines, in the form that the kernels interpolate.

A layer of which the neighbour density suffices has a table of few features (the singular vectors of its radial net);
any other has a table of all its functions, channel by channel. Where a net sees the elements, there is a table for each
pair of the elements at hand.
"""

import copy
from typing import Any, List, NamedTuple, Tuple

import torch
from torch import Tensor

from mdplug.kernels.spline import quintic
from mdplug.potentials.blocks.radial import NoTransform
from mdplug.potentials.blocks.radial_nets import PlainNet
from mdplug.potentials.blocks.tables import (
    ERROR_FROM,
    FIRST_KNOT,
    MAX_KNOTS,
    cubic,
    hermite,
    reduce_features,
    sample,
)

FINE = 1000  # points at which errors are taken
LANES = {torch.float32: 16, torch.float64: 8}  # channels of 64 bytes


class LayerTable(NamedTuple):
    """Table of one layer.

    Attributes:
        table: (rows, 3, b) of features, or (blocks, rows, P, 3, C) of the functions themselves.
        weight: (b, P, k) from features to functions; empty for the second form.
    """

    table: Tensor
    weight: Tensor


class Columns(NamedTuple):
    """Density columns of the layers that have one, as cubic splines; arguments of `cubic`."""

    coefficients: Tensor
    step: float
    n_intervals: int


class Tables(NamedTuple):
    """Tables of all layers for some elements.

    Attributes:
        layers: see `LayerTable`. kind_of: (S, S) int32, table of each pair of species. step: A.
        per_kind: knots of each table.
        densities: empty where no layer has one.
        slope_error, value_error: relative rms errors, worst layer.
    """

    layers: List[LayerTable]
    kind_of: Tensor
    step: float
    per_kind: int
    densities: Columns
    slope_error: float
    value_error: float


def block_channels(k: int, dtype: torch.dtype) -> int:
    """Channels that a kernel treats at a time: two lines of cache where they fill them."""
    lanes = LANES[dtype]
    return 2 * lanes if k % (2 * lanes) == 0 else lanes


def depends_on_species(radial: Any) -> bool:
    """Whether radial functions differ between pairs of elements."""
    return not (all(isinstance(net, PlainNet) for net in radial.nets) and isinstance(radial.transform, NoTransform))


def sampled(radial: Any, r: Tensor, kinds: List[Tuple[int, int]]) -> List[Tensor]:
    """Columns of each layer and their derivatives, (kinds, points, 2, columns), float64; see `derivatives`."""
    found = sample(radial, r, kinds, len(radial.nets))
    return [torch.stack(both, dim=2) for both in zip(*found, strict=True)]


def derivatives(radial: Any, r: Tensor, kinds: List[Tuple[int, int]]) -> List[Tensor]:
    """Columns of each layer with their first and second derivatives, (kinds, points, 3, columns), float64.

    Args:
        radial: exact, in float64. r: (points,) A. kinds: species of receiver and sender, a table each.
    """
    small = 1e-4  # A; central differences of exact slopes are good to 1e-8, and robust for any net
    out = []
    for both in sampled(radial, torch.cat([r, r - small, r + small]), kinds):
        here, before, after = both.chunk(3, dim=1)
        out.append(torch.cat([here, (after[:, :, 1:] - before[:, :, 1:]) / (2 * small)], dim=2))
    return out


def halved(radial: Any, at: List[Tensor], step: float, kinds: List[Tuple[int, int]]) -> List[Tensor]:
    """`derivatives` on the knots of `at` and those between them, which lie at odd multiples of `step` (A)."""
    odd = FIRST_KNOT + step * torch.arange(1, 2 * (at[0].shape[1] - 1), 2, dtype=torch.float64)
    out = []
    for old, new in zip(at, derivatives(radial, odd, kinds), strict=True):
        both = torch.stack([old[:, :-1], new], dim=2).flatten(1, 2)
        out.append(torch.cat([both, old[:, -1:]], dim=1))
    return out


def make_tables(model: Any, species: Tuple[int, ...], tolerance: float = 1e-5) -> Tables:
    """Tables of a MACE for the pairs among `species` (indices), with as many knots as the tolerance needs.

    Args:
        model: the MACE, its radial functions exact. tolerance: on the relative rms error of the slopes.
    """
    exact = copy.deepcopy(model.radial).double().cpu()
    messengers = [layer.messenger for layer in model.layers]
    dtype, n_species = messengers[0].radial_weight.dtype, model.embedding.shape[0]
    weights = [m.radial_weight.detach().double().cpu() for m in messengers]
    kind_of = torch.zeros(n_species, n_species, dtype=torch.int32)
    kinds: List[Tuple[int, int]] = [(0, 0)]
    if depends_on_species(exact):
        kinds = [(a, b) for a in species for b in species]
        for kind, (a, b) in enumerate(kinds):
            kind_of[a, b] = kind
    fine = torch.linspace(ERROR_FROM, model.cutoff, FINE, dtype=torch.float64)
    truth = sampled(exact, fine, kinds)
    # What the columns become in the messages, in few numbers: same norms, far fewer columns to compare.
    triangles = [torch.linalg.qr(w.flatten(1).t()).R.t() for w in weights]
    intervals = 32
    step = (model.cutoff - FIRST_KNOT) / intervals
    at = derivatives(exact, FIRST_KNOT + step * torch.arange(intervals + 1, dtype=torch.float64), kinds)
    while True:
        scaled = [a * torch.tensor([1.0, step, step * step], dtype=torch.float64).view(1, 1, 3, 1) for a in at]
        errors = [_errors(fine, step, s, t, w) for s, t, w in zip(scaled, truth, triangles, strict=True)]
        slope_error, value_error = max(e[0] for e in errors), max(e[1] for e in errors)
        if slope_error < tolerance or intervals >= MAX_KNOTS:
            break
        intervals *= 2
        step = (model.cutoff - FIRST_KNOT) / intervals
        at = halved(exact, at, step, kinds)
    layers, extra = [], []
    for t, (weight, messenger) in enumerate(zip(weights, messengers, strict=True)):
        b = len(weight)
        if at[t].shape[3] > b:
            extra.append(at[t][..., b:])
        features = scaled[t][..., :b].flatten(0, 1)  # (rows, 3, b)
        if messenger.by_species:
            flat = truth[t][..., :b]
            onto, reduced = reduce_features(flat[:, :, 0], flat[:, :, 1], weight.flatten(1), tolerance / 3, 8)
            new = reduced.view(-1, *weight.shape[1:])
            layers.append(LayerTable((features @ onto).to(dtype).contiguous(), new.to(dtype)))
        else:
            block = block_channels(weight.shape[2], dtype)
            functions = (features @ weight.flatten(1)).view(*features.shape[:2], *weight.shape[1:]).to(dtype)
            layers.append(LayerTable(_function_blocks(functions, block), weight.new_zeros(0, 1, 1, dtype=dtype)))
    densities = Columns(kind_of.new_zeros(0), 1.0, 1)
    if extra:
        densities = _density_spline(exact, model.cutoff, kinds, tolerance, dtype)
    return Tables(layers, kind_of, step, intervals + 1, densities, slope_error, value_error)


def to_device(tables: Tables, device: torch.device) -> Tables:
    """The same tables where the atoms are."""
    layers = [LayerTable(*[tensor.to(device) for tensor in layer]) for layer in tables.layers]
    densities = tables.densities._replace(coefficients=tables.densities.coefficients.to(device))
    return tables._replace(layers=layers, kind_of=tables.kind_of.to(device), densities=densities)


def in_blocks(values: Tensor, block: int) -> Tensor:
    """(A, B, k) -> (A, blocks, B, C) channels in blocks of C, padded with zeros."""
    n_blocks = -(-values.shape[2] // block)
    padded = torch.nn.functional.pad(values, (0, n_blocks * block - values.shape[2]))
    return padded.view(*values.shape[:2], n_blocks, block).transpose(1, 2).contiguous()


def radial_values(columns: Tensor, weight: Tensor) -> Tensor:
    """Functions of pairs, (E, blocks, P, C), from columns (E, b) and weight (b, blocks, P, C), which is `in_blocks`."""
    shape = weight.shape
    return torch.mm(columns, weight.flatten(1)).view(-1, shape[1], shape[2], shape[3])


def _function_blocks(functions: Tensor, block: int) -> Tensor:
    """(rows, 3, P, k) -> (blocks, rows, P, 3, C)."""
    rows, three, n_paths, _ = functions.shape
    parts = in_blocks(functions.transpose(1, 2).flatten(1, 2), block)  # (rows, blocks, P * 3, C)
    return parts.transpose(0, 1).reshape(-1, rows, n_paths, three, block).contiguous()


def _density_spline(
    exact: Any, cutoff: float, kinds: List[Tuple[int, int]], tolerance: float, dtype: torch.dtype
) -> Columns:
    """The density columns (the last of the layers that have one), as cubic splines."""
    intervals = 128
    fine = torch.linspace(ERROR_FROM, cutoff, FINE, dtype=torch.float64)

    def last(r: Tensor) -> Tensor:
        found = sampled(exact, r, kinds)
        return torch.cat([f[..., -1:] for f, net in zip(found, exact.nets, strict=True) if net.has_density], dim=3)

    truth = last(fine)[:, :, 1].flatten(0, 1)
    everywhere = fine.repeat(len(kinds)).unsqueeze(1)
    kind = torch.arange(len(kinds)).repeat_interleave(FINE)
    while True:
        step = (cutoff - FIRST_KNOT) / intervals
        at = last(FIRST_KNOT + step * torch.arange(intervals + 1, dtype=torch.float64))
        coefficients = hermite(at[:, :, 0], at[:, :, 1], step)
        slopes = cubic(coefficients, kind, everywhere, FIRST_KNOT, step, intervals)[1]
        error = float((slopes - truth).norm() / truth.norm().clamp_min(1e-30))
        if error < tolerance or intervals >= MAX_KNOTS:
            return Columns(coefficients.to(dtype), step, intervals)
        intervals *= 2


def _errors(r: Tensor, step: float, scaled: Tensor, truth: Tensor, weight: Tensor) -> Tuple[float, float]:
    """Relative rms error of slope and value of the functions that reach the messages.

    Args:
        scaled: (kinds, knots, 3, columns) numbers at the knots. truth: (kinds, points, 2, columns). weight: (b, any).
    """
    x = (r - FIRST_KNOT) / step
    index = x.floor().clamp(0, scaled.shape[1] - 2).long()
    value, slope = quintic(x - index, step)
    low, high = scaled[:, index, :, : len(weight)], scaled[:, index + 1, :, : len(weight)]
    out = []
    for number, basis in ((1, slope), (0, value)):
        got = torch.einsum("no,knoc->knc", basis[:, :3], low) + torch.einsum("no,knoc->knc", basis[:, 3:], high)
        wanted = truth[:, :, number, : len(weight)] @ weight
        missed = (got @ weight - wanted).norm(dim=(1, 2)) / wanted.norm(dim=(1, 2)).clamp_min(1e-30)
        out.append(float(missed.max()))
    return out[0], out[1]
