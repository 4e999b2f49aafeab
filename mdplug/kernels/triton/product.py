"""Operators `linear`, `product` and its adjoint on a device: torch's matrix products around the polynomial's kernels.

What they compute is said in ../product.py. Lists and unpacked matrices are read once for the same tensors, so that
nothing waits for the device; atoms of one group follow one another, and a matrix product takes them in place.
"""

from itertools import pairwise

import torch
from torch import Tensor

from mdplug.kernels.memo import memo
from mdplug.kernels.product import unpacked
from mdplug.kernels.triton import polynomial

Rows = list[slice | Tensor]


def _rows(group: Tensor, groups: int) -> Rows:
    """The atoms of each group."""
    if not group.numel():
        return [slice(None)]

    def read() -> Rows:
        host = group.cpu()
        if bool((host[1:] >= host[:-1]).all()):
            marks = torch.searchsorted(host, torch.arange(groups + 1, dtype=host.dtype)).tolist()
            return [slice(a, b) for a, b in pairwise(marks)]
        return [(host == g).nonzero().squeeze(1).to(group.device) for g in range(groups)]

    return memo.get((group,), groups, read)


def _multiply(inputs: list[Tensor], matrices: list[list[Tensor]], rows: Rows, outputs: list[Tensor], add: bool) -> None:
    """For each irrep, (2l+1, n, a) times the matrix (a, b) of each atom's group, into (2l+1, n, b)."""
    for ell, (x, out) in enumerate(zip(inputs, outputs, strict=True)):
        for of, at in zip(matrices, rows, strict=True):
            matrix = of[ell].expand(x.shape[0], -1, -1)
            if isinstance(at, slice):
                out[:, at].baddbmm_(x[:, at], matrix, beta=int(add))
            else:
                part = torch.bmm(x[:, at], matrix)
                out[:, at] = out[:, at] + part if add else part


def _irreps(features: Tensor, count: int) -> list[Tensor]:
    """((l_max+1)^2, ...) -> (2l+1, ...) for each l of `count`."""
    return [features[ell * ell : (ell + 1) ** 2] for ell in range(count)]


def _of_groups(weight: Tensor, columns: int) -> list[list[Tensor]]:
    """([groups,] irreps, blocks, k, C) -> the matrices (k, columns) of each group and irrep."""

    def read() -> list[list[Tensor]]:
        flat = unpacked(weight, columns).contiguous()
        return [list(one) for one in (flat.unsqueeze(0) if flat.dim() == 3 else flat)]

    return memo.get((weight,), columns, read)


def linear(features: Tensor, weight: Tensor, group: Tensor, base: Tensor, components: int, k_out: int) -> Tensor:
    """See mdplug.kernels.product.linear."""
    out = base.clone() if base.numel() else features.new_zeros(components, features.shape[1], k_out)
    matrices = _of_groups(weight, k_out)
    most = min(components, features.shape[0], len(matrices[0]) ** 2)
    count = next(ell for ell in range(most + 1) if ell * ell >= most)
    inputs, outputs = (_irreps(x[:most], count) for x in (features, out))
    _multiply(inputs, matrices, _rows(group, len(matrices)), outputs, add=True)
    return out


def _flat_irreps(flat: Tensor, rows: list[int], n: int) -> list[Tensor]:
    """Messages, flat -> for each l (2l+1, n, rows)."""
    parts = torch.split(flat, [(2 * ell + 1) * n * row for ell, row in enumerate(rows)])
    return [part.view(2 * ell + 1, n, rows[ell]) for ell, part in enumerate(parts)]


def _matrices(weights: Tensor, shapes: list[tuple[int, int]], width: int) -> list[list[Tensor]]:
    """The matrices of each group and irrep, (inner, columns); width: columns of a block."""

    def read() -> list[list[Tensor]]:
        sizes = [inner * (-(-columns // width) * width) for inner, columns in shapes]
        return [
            [
                unpacked(part.view(-1, inner, width), columns).contiguous()
                for part, (inner, columns) in zip(torch.split(group, sizes), shapes, strict=True)
            ]
            for group in weights.view(-1, sum(sizes))
        ]

    return memo.get((weights,), (*shapes, width), read)


def _heights(rows: Tensor) -> list[int]:
    return memo.get((rows,), "heights", rows.tolist)


def product(
    messages: Tensor, weights: Tensor, rows: Tensor, group: Tensor, norm: Tensor, coefficients: Tensor, kind: Tensor,
    nodes: Tensor, term: Tensor, starts: Tensor, mix: Tensor, n: int, k: int, k_out: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See mdplug.kernels.product.product."""
    heights = _heights(rows)
    matrices = _matrices(weights, [(row, k) for row in heights], mix.shape[-1])
    mixed = messages.new_empty(len(heights) ** 2, n, k)
    of = _rows(group, len(matrices))
    _multiply(_flat_irreps(messages, heights, n), matrices, of, _irreps(mixed, len(heights)), add=False)
    if norm.numel():
        mixed *= norm.view(1, -1, 1)
    kinds = kind if kind.numel() else kind.new_zeros(n)
    found = polynomial.polynomial(mixed, coefficients, kinds, nodes, term, starts)
    out = found.new_empty(len(found), n, k_out)
    after = _of_groups(mix, k_out)
    count = len(after[0])
    _multiply(_irreps(found, count), after, [slice(None)], _irreps(out, count), add=False)
    return out, mixed


def product_backward(
    grad: Tensor, mixed: Tensor, weights: Tensor, rows: Tensor, group: Tensor, norm: Tensor, coefficients: Tensor,
    kind: Tensor, nodes: Tensor, term: Tensor, starts: Tensor, mix: Tensor, n: int, k: int, k_out: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See mdplug.kernels.product.product_backward."""
    heights = _heights(rows)
    before = _of_groups(mix, k)
    count = len(before[0])
    d_product = grad.new_empty(len(grad), n, k)
    _multiply(_irreps(grad, count), before, [slice(None)], _irreps(d_product, count), add=False)
    kinds = kind if kind.numel() else kind.new_zeros(n)
    d_mixed = polynomial.polynomial_backward(mixed, coefficients, kinds, nodes, term, starts, d_product)
    d_density = norm
    if norm.numel():
        d_density = -(d_mixed * mixed).sum(dim=(0, 2)) * norm
        d_mixed *= norm.view(1, -1, 1)
    matrices = _matrices(weights, [(k, row) for row in heights], mix.shape[-1])
    d_messages = grad.new_empty(sum((2 * ell + 1) * n * row for ell, row in enumerate(heights)))
    of = _rows(group, len(matrices))
    _multiply(_irreps(d_mixed, len(heights)), matrices, of, _flat_irreps(d_messages, heights, n), add=False)
    return d_messages, d_density
