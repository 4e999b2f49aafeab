"""Radial functions of each layer as cubic splines in the form that the kernels interpolate: values and slopes at knots.

A layer of which the neighbour density suffices has a table of few features (the singular vectors of its radial net); any
other has a table of all its functions, channel by channel. Where a net sees the elements, there is a table for each pair
of the elements at hand.
"""

import copy
from typing import Any, Dict, List, NamedTuple, Tuple

import torch
from torch import Tensor

from mdplug.potentials.blocks.radial import NoTransform, PlainNet
from mdplug.potentials.blocks.tables import (
    ERROR_FROM,
    FIRST_KNOT,
    MAX_KNOTS,
    SplineRadial,
    hermite,
    reduce_features,
    sample,
)

LANES = {torch.float32: 16, torch.float64: 8}  # channels of 64 bytes


class LayerTable(NamedTuple):
    """Table of one layer.

    Attributes:
        table: (rows, 2, b) of features, or (blocks, rows, P, 2, C) of the functions themselves.
        weight: (b, P, k) from features to functions; empty for the second form.
    """

    table: Tensor
    weight: Tensor


class Tables(NamedTuple):
    """Tables of all layers for some elements.

    Attributes:
        layers: see `LayerTable`. kind_of: (S, S) int32, table of each pair of species. step: A. per_kind: knots of each.
        densities: SplineRadial of the density columns of the layers that have one.
        slope_error, value_error: relative rms errors, worst layer.
    """

    layers: List[LayerTable]
    kind_of: Tensor
    step: float
    per_kind: int
    densities: SplineRadial | None
    slope_error: float
    value_error: float


def block_channels(k: int, l_in: int, dtype: torch.dtype) -> int:
    """Channels that a kernel treats at a time: two lines of cache where features are scalars and fill them."""
    lanes = LANES[dtype]
    return 2 * lanes if l_in == 0 and k % (2 * lanes) == 0 else lanes


def depends_on_species(radial: Any) -> bool:
    """Whether radial functions differ between pairs of elements."""
    return not (all(isinstance(net, PlainNet) for net in radial.nets) and isinstance(radial.transform, NoTransform))


def make_tables(model: Any, species: Tuple[int, ...], tolerance: float = 1e-5) -> Tables:
    """Tables of a MACE for the pairs among `species` (indices), with as many knots as the tolerance needs.

    Args:
        model: the MACE, its radial functions exact. tolerance: on the relative rms error of the slopes.
    """
    exact = copy.deepcopy(model.radial).double().cpu()
    messengers = [layer.messenger for layer in model.layers]
    dtype, n_species = messengers[0].radial_weight.dtype, model.embedding.shape[0]
    weights = [m.radial_weight.detach().double().cpu() for m in messengers]
    n_features = [len(w) for w in weights]
    kind_of = torch.zeros(n_species, n_species, dtype=torch.int32)
    chosen: List[Tuple[int, int]] = [(0, 0)]
    if depends_on_species(exact):
        chosen = [(a, b) for a in species for b in species]
        for kind, (a, b) in enumerate(chosen):
            kind_of[a, b] = kind
    fine = torch.linspace(ERROR_FROM, model.cutoff, 2000, dtype=torch.float64)
    values, slopes = sample(exact, fine, chosen, n_features)
    knots = 128
    while True:
        step = (model.cutoff - FIRST_KNOT) / knots
        grid = FIRST_KNOT + step * torch.arange(knots + 1, dtype=torch.float64)
        at, slope_at = sample(exact, grid, chosen, n_features)
        errors = [
            _error(fine, step, at[t], slope_at[t], values[t], slopes[t], weights[t].flatten(1))
            for t in range(len(weights))
        ]
        slope_error, value_error = max(e[0] for e in errors), max(e[1] for e in errors)
        if slope_error < tolerance or knots >= MAX_KNOTS:
            break
        knots *= 2
    layers, extra, extra_slopes = [], [], []
    for t, weight in enumerate(weights):
        b = n_features[t]
        of_layer = torch.stack([at[t], slope_at[t] * step], dim=2)  # (kinds, knots + 1, 2, columns)
        if of_layer.shape[3] > b:
            extra.append(at[t][..., b:])
            extra_slopes.append(slope_at[t][..., b:])
        features = of_layer[..., :b].flatten(0, 1)
        if messengers[t].by_species:
            onto, reduced = reduce_features(values[t][..., :b], slopes[t][..., :b], weight.flatten(1), tolerance / 3, 8)
            new = reduced.view(-1, *weight.shape[1:])
            layers.append(LayerTable((features @ onto).to(dtype).contiguous(), new.to(dtype)))
        else:
            block = block_channels(weight.shape[2], messengers[t].messages.l_in, dtype)
            functions = torch.einsum("rsb,bpk->rpsk", features, weight).to(dtype)
            layers.append(LayerTable(_blocks(functions, block), weight.new_zeros(0, dtype=dtype)))
    densities = None
    if extra:
        coefficients = hermite(torch.cat(extra, dim=2), torch.cat(extra_slopes, dim=2), step).to(dtype)
        densities = SplineRadial(coefficients, kind_of.long(), FIRST_KNOT, step, knots, [1] * len(extra))
    return Tables(layers, kind_of, step, knots + 1, densities, slope_error, value_error)


def _blocks(functions: Tensor, block: int) -> Tensor:
    """(rows, P, 2, k) -> (blocks, rows, P, 2, C), channels padded with zeros."""
    rows, n_paths, two, k = functions.shape
    n_blocks = -(-k // block)
    padded = torch.nn.functional.pad(functions, (0, n_blocks * block - k))
    return padded.view(rows, n_paths, two, n_blocks, block).permute(3, 0, 1, 2, 4).contiguous()


def _error(
    r: Tensor, step: float, at: Tensor, slope_at: Tensor, values: Tensor, slopes: Tensor, weight: Tensor
) -> Tuple[float, float]:
    """Relative rms error of slope and value of the functions that reach the messages (and of a density column)."""
    columns = at.shape[2]
    kinds, intervals = at.shape[0], at.shape[1] - 1
    spline = SplineRadial(
        hermite(at, slope_at, step), torch.zeros(1, 1, dtype=torch.int64), FIRST_KNOT, step, intervals, [columns]
    )
    worst = [0.0, 0.0]
    for kind in range(kinds):
        got, got_slope = spline.values_and_slopes(r, kind)
        for number, (have, want) in enumerate(((got_slope, slopes[kind]), (got, values[kind]))):
            b = weight.shape[0]
            pairs: Dict[str, Tuple[Tensor, Tensor]] = {"functions": (have[:, :b] @ weight, want[:, :b] @ weight)}
            if columns > b:
                pairs["density"] = (have[:, b:], want[:, b:])
            for one, other in pairs.values():
                worst[number] = max(worst[number], float((one - other).norm() / other.norm().clamp_min(1e-30)))
    return worst[0], worst[1]
