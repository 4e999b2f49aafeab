"""The neighbour density of the first layer and its adjoint: one program for each receiver and kind of sender."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mdplug.kernels.triton.graph import pairs_of
from mdplug.kernels.triton.radial import knot
from mdplug.kernels.triton.source import contiguous, launch


@triton.jit(do_not_specialize=["begin", "n"])
def _density(
    harmonics, table, values, r, kind, species, first, out, begin, n,
    M: tl.constexpr, B: tl.constexpr, KINDS: tl.constexpr, TABULATED: tl.constexpr, HAS_KIND: tl.constexpr,
    FIRST: tl.constexpr, INVERSE: tl.constexpr, PER_KIND: tl.constexpr, MP: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    i, z = tl.program_id(0).to(tl.int64), tl.program_id(1)
    m, c = tl.arange(0, MP), tl.arange(0, BP)
    e0 = tl.load(first + begin)
    sums = tl.zeros((MP, BP), out.dtype.element_ty)
    start, stop = tl.load(first + begin + i).to(tl.int64), tl.load(first + begin + i + 1).to(tl.int64)
    for e in range(start, stop):
        if tl.load(species + e) == z:
            y = tl.load(harmonics + e * M + m, m < M, 0.0)
            if TABULATED:
                row, v0, v1, v2, v3, v4, v5, _0, _1, _2, _3, _4, _5 = knot(tl.load(r + e), FIRST, INVERSE, PER_KIND)
                if HAS_KIND:
                    row += tl.load(kind + e) * PER_KIND
                at = table + row.to(tl.int64) * (3 * B) + c
                phi = v0 * tl.load(at, c < B, 0.0) + v1 * tl.load(at + B, c < B, 0.0)
                phi += v2 * tl.load(at + 2 * B, c < B, 0.0) + v3 * tl.load(at + 3 * B, c < B, 0.0)
                phi += v4 * tl.load(at + 4 * B, c < B, 0.0) + v5 * tl.load(at + 5 * B, c < B, 0.0)
            else:
                phi = tl.load(values + (e - e0) * B + c, c < B, 0.0)
            sums += y[:, None] * phi[None, :]
    to = out + (m[:, None] * n + i) * (KINDS * B) + z * B + c[None, :]
    tl.store(to, sums, (m[:, None] < M) & (c[None, :] < B))


@triton.jit(do_not_specialize=["begin", "n"])
def _density_backward(
    harmonics, table, values, r, kind, species, first, grad, dy, dr, begin, n,
    M: tl.constexpr, B: tl.constexpr, KINDS: tl.constexpr, TABULATED: tl.constexpr, HAS_KIND: tl.constexpr,
    FIRST: tl.constexpr, INVERSE: tl.constexpr, PER_KIND: tl.constexpr, MP: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    i, z = tl.program_id(0).to(tl.int64), tl.program_id(1)
    m, c = tl.arange(0, MP), tl.arange(0, BP)
    e0 = tl.load(first + begin)
    of_kind = grad + (m[:, None] * n + i) * (KINDS * B) + z * B + c[None, :]
    g = tl.load(of_kind, (m[:, None] < M) & (c[None, :] < B), 0.0)
    start, stop = tl.load(first + begin + i).to(tl.int64), tl.load(first + begin + i + 1).to(tl.int64)
    for e in range(start, stop):
        if tl.load(species + e) == z:
            y = tl.load(harmonics + e * M + m, m < M, 0.0)
            back = tl.sum(g * y[:, None], axis=0)
            if TABULATED:
                row, v0, v1, v2, v3, v4, v5, d0, d1, d2, d3, d4, d5 = knot(tl.load(r + e), FIRST, INVERSE, PER_KIND)
                if HAS_KIND:
                    row += tl.load(kind + e) * PER_KIND
                at = table + row.to(tl.int64) * (3 * B) + c
                t0, t1, t2 = tl.load(at, c < B, 0.0), tl.load(at + B, c < B, 0.0), tl.load(at + 2 * B, c < B, 0.0)
                at += 3 * B
                t3, t4, t5 = tl.load(at, c < B, 0.0), tl.load(at + B, c < B, 0.0), tl.load(at + 2 * B, c < B, 0.0)
                phi = v0 * t0 + v1 * t1 + v2 * t2 + v3 * t3 + v4 * t4 + v5 * t5
                slope = d0 * t0 + d1 * t1 + d2 * t2 + d3 * t3 + d4 * t4 + d5 * t5
                tl.store(dr + (e - e0), tl.sum(slope * back, axis=0))
            else:
                phi = tl.load(values + (e - e0) * B + c, c < B, 0.0)
                tl.store(dr + (e - e0) * B + c, back, c < B)
            tl.store(dy + (e - e0) * M + m, tl.sum(g * phi[None, :], axis=1), m < M)


def _constants(m: int, b: int, kinds: int, table: Tensor, kind: Tensor, knots: tuple) -> dict[str, Any]:
    first_knot, step, per_kind = knots
    return {
        "M": m,
        "B": b,
        "KINDS": kinds,
        "TABULATED": table.numel() > 0,
        "HAS_KIND": kind.numel() > 0,
        "FIRST": first_knot,
        "INVERSE": 1.0 / step,
        "PER_KIND": per_kind,
        "MP": triton.next_power_of_2(m),
        "BP": triton.next_power_of_2(b),
    }


def density(
    harmonics: Tensor, table: Tensor, values: Tensor, r: Tensor, kind: Tensor, species: Tensor, first: Tensor,
    kinds: int, begin: int, end: int, first_knot: float, step: float, per_kind: int,
) -> Tensor:  # fmt: skip
    """See reference.density."""
    contiguous(harmonics.dtype, harmonics=harmonics, table=table, values=values, r=r)
    contiguous(torch.int32, kind=kind, species=species, first=first)
    m, n = harmonics.shape[1], end - begin
    b = table.shape[-1] if table.numel() else values.shape[-1]
    out = harmonics.new_empty(m, n, kinds * b)
    constants = _constants(m, b, kinds, table, kind, (first_knot, step, per_kind))
    arguments = (harmonics, table, values, r, kind, species, first, out, begin, n)
    launch(_density, (n, kinds), arguments, constants)
    return out


def density_backward(
    harmonics: Tensor, table: Tensor, values: Tensor, r: Tensor, kind: Tensor, species: Tensor, first: Tensor,
    kinds: int, begin: int, end: int, first_knot: float, step: float, per_kind: int, grad: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Cotangents of the harmonics (pairs, M), and of r (pairs,) or of the values (pairs, b)."""
    contiguous(harmonics.dtype, harmonics=harmonics, table=table, values=values, r=r, grad=grad)
    contiguous(torch.int32, kind=kind, species=species, first=first)
    m, n, pairs = harmonics.shape[1], end - begin, pairs_of(first, begin, end, r)
    b = table.shape[-1] if table.numel() else values.shape[-1]
    dy, dr = harmonics.new_empty(pairs, m), harmonics.new_empty(pairs if table.numel() else (pairs, b))
    constants = _constants(m, b, kinds, table, kind, (first_knot, step, per_kind))
    arguments = (harmonics, table, values, r, kind, species, first, grad, dy, dr, begin, n)
    launch(_density_backward, (n, kinds), arguments, constants)
    return dy, dr
