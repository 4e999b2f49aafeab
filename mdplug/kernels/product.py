"""Operators `linear`, `product` and its adjoint in plain torch, around any form of the polynomial."""

from collections.abc import Callable

import torch
from torch import Tensor


def unpacked(weight: Tensor, columns: int) -> Tensor:
    """(..., blocks, k, C) -> (..., k, columns): blocks of columns side by side, padding off."""
    return weight.transpose(-3, -2).flatten(-2)[..., :columns]


def components_of(matrices: Tensor) -> Tensor:
    """(irreps, ...) -> ((l_max+1)^2, ...): the matrix of each component."""
    degrees = torch.arange(matrices.shape[0], device=matrices.device)
    return matrices[torch.repeat_interleave(degrees, 2 * degrees + 1)]


def linear(features: Tensor, weight: Tensor, group: Tensor, base: Tensor, components: int, k_out: int) -> Tensor:
    """(components, n, k_out): base plus features (M, n, k) times a matrix per irrep, as far as both go.

    Args:
        weight: ([groups,] irreps, blocks, k, C). group: (n,) int32 or empty: one set. base: as the result, or empty.
    """
    n = features.shape[1]
    out = base.clone() if base.numel() else features.new_zeros(components, n, k_out)
    matrices = unpacked(weight, k_out)
    if matrices.dim() == 3:
        matrices = matrices.unsqueeze(0)
    most = min(components, features.shape[0], matrices.shape[1] ** 2)
    for g in range(matrices.shape[0]):
        rows = (group == g).nonzero().squeeze(1) if group.numel() else torch.arange(n, device=features.device)
        part = torch.matmul(features[:most, rows], components_of(matrices[g])[:most])
        out[:most] = out[:most].index_add(1, rows, part)
    return out


def _by_irrep(flat: Tensor, rows: list[int], n: int) -> list[Tensor]:
    """Messages, flat -> for each l (2l+1, n, rows)."""
    parts = torch.split(flat, [(2 * ell + 1) * n * row for ell, row in enumerate(rows)])
    return [part.view(2 * ell + 1, n, rows[ell]) for ell, part in enumerate(parts)]


def _matrices(flat: Tensor, shapes: list[tuple[int, int]], width: int) -> list[list[Tensor]]:
    """The matrices of each group and irrep, (inner, columns); width: columns of a block."""
    sizes = [inner * (-(-columns // width) * width) for inner, columns in shapes]
    groups = flat.view(-1, sum(sizes)) if sum(sizes) else flat.view(1, 0)
    return [
        [
            unpacked(part.view(-1, inner, width), columns)
            for part, (inner, columns) in zip(torch.split(group, sizes), shapes, strict=True)
        ]
        for group in groups
    ]


def _apply(inputs: list[Tensor], matrices: list[list[Tensor]], group: Tensor) -> list[Tensor]:
    if not group.numel():
        return [torch.matmul(x, w) for x, w in zip(inputs, matrices[0], strict=True)]
    chosen = [[(group == g).to(x.dtype).view(1, -1, 1) for g in range(len(matrices))] for x in inputs]
    return [
        sum(mask * torch.matmul(x, of[ell]) for mask, of in zip(chosen[ell], matrices, strict=True))  # type: ignore[misc]
        for ell, x in enumerate(inputs)
    ]


def product(
    polynomial: Callable[..., Tensor],
    messages: Tensor,
    weights: Tensor,
    rows: Tensor,
    group: Tensor,
    norm: Tensor,
    coefficients: Tensor,
    kind: Tensor,
    nodes: Tensor,
    term: Tensor,
    starts: Tensor,
    mix: Tensor,
    n: int,
    k: int,
    k_out: int,
) -> tuple[Tensor, Tensor]:
    """New features ((L+1)^2, n, k_out), and what the polynomial took ((l_max+1)^2, n, k).

    Args:
        messages: for each l (2l+1, n, rows[l]), flat. weights: for each group and l (rows[l], k), packed, flat.
        rows: (l_max + 1,) int32. group: (n,) int32 or empty: one set. norm: (n,) factor of the messages, or empty.
        coefficients, nodes, term, starts: of the polynomial. kind: (n,) int32 or empty. mix: (L+1, ...) packed.
    """
    heights = rows.tolist()
    matrices = _matrices(weights, [(row, k) for row in heights], mix.shape[-1])
    mixed = torch.cat(_apply(_by_irrep(messages, heights, n), matrices, group))
    if norm.numel():
        mixed = mixed * norm.view(1, -1, 1)
    kinds = kind if kind.numel() else rows.new_zeros(n)
    out = polynomial(mixed.contiguous(), coefficients, kinds, nodes, term, starts)
    return torch.matmul(out, components_of(unpacked(mix, k_out))), mixed


def product_backward(
    polynomial_backward: Callable[..., Tensor],
    grad: Tensor,
    mixed: Tensor,
    weights: Tensor,
    rows: Tensor,
    group: Tensor,
    norm: Tensor,
    coefficients: Tensor,
    kind: Tensor,
    nodes: Tensor,
    term: Tensor,
    starts: Tensor,
    mix: Tensor,
    n: int,
    k: int,
    k_out: int,
) -> tuple[Tensor, Tensor]:
    """Cotangents of the messages, and of the density rho of norm = 1 / (rho + 1); matrices come transposed."""
    heights = rows.tolist()
    kinds = kind if kind.numel() else rows.new_zeros(n)
    d_product = torch.matmul(grad, components_of(unpacked(mix, k))).contiguous()
    d_mixed = polynomial_backward(mixed, coefficients, kinds, nodes, term, starts, d_product)
    d_density = norm
    if norm.numel():
        d_density = -(d_mixed * mixed).sum(dim=(0, 2)) * norm
        d_mixed = d_mixed * norm.view(1, -1, 1)
    matrices = _matrices(weights, [(k, row) for row in heights], mix.shape[-1])
    by_irrep = [d_mixed[ell * ell : (ell + 1) ** 2] for ell in range(len(heights))]
    return torch.cat([part.flatten() for part in _apply(by_irrep, matrices, group)]), d_density
