"""Spherical harmonics of pairs: monomials of the unit vector and the sparse table, written out; a lane holds a pair."""

from typing import Any

import torch
from torch import Tensor

from mdplug.kernels.memo import memo
from mdplug.kernels.triton.source import compiled, contiguous, launch

BLOCK, WARPS = 128, 4

START = """
    e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = e < n
    inverse = 1.0 / tl.load(r + e, inside, 1.0)
    u0 = -tl.load(vectors + 3 * e, inside, 0.0) * inverse
    u1 = -tl.load(vectors + 3 * e + 1, inside, 0.0) * inverse
    u2 = -tl.load(vectors + 3 * e + 2, inside, 0.0) * inverse
    x0 = tl.full((BLOCK,), 1.0, u0.dtype)
    x1, x2, x3 = u0, u1, u2
"""


def _terms(table: list[list[float]]) -> list[tuple[int, int, float]]:
    return [(j, c, value) for j, row in enumerate(table) for c, value in enumerate(row) if value != 0]


def _forward(left: list[int], right: list[int], table: list[list[float]]) -> Any:
    m = len(table[0])
    text = f"@triton.jit(do_not_specialize=['n'])\ndef harmonics(vectors, r, out, n, BLOCK: tl.constexpr):{START}"
    text += "".join(f"    x{j + 4} = x{a} * u{b}\n" for j, (a, b) in enumerate(zip(left, right, strict=True)))
    terms = _terms(table)
    for c in range(m):
        total = " + ".join(f"x{j} * {value!r}" for j, at, value in terms if at == c) or "x0 * 0.0"
        text += f"    tl.store(out + e * {m} + {c}, {total}, inside)\n"
    return compiled("harmonics", text)


def _backward(left: list[int], right: list[int], table: list[list[float]]) -> Any:
    m, n_monomials = len(table[0]), len(table)
    text = "@triton.jit(do_not_specialize=['n'])\n"
    text += f"def harmonics_backward(vectors, r, grad, grad_r, out, n, BLOCK: tl.constexpr):{START}"
    text += "".join(f"    x{j + 4} = x{a} * u{b}\n" for j, (a, b) in enumerate(zip(left, right, strict=True)))
    text += "".join(f"    g{c} = tl.load(grad + e * {m} + {c}, inside, 0.0)\n" for c in range(m))
    terms = _terms(table)
    for j in range(n_monomials):
        total = " + ".join(f"g{c} * {value!r}" for at, c, value in terms if at == j) or "x0 * 0.0"
        text += f"    d{j} = {total}\n"
    text += "".join(f"    du{a} = x0 * 0.0\n" for a in range(3))
    for j in range(n_monomials - 1, 3, -1):  # products, last one first
        a, b = left[j - 4], right[j - 4]
        text += f"    du{b} += d{j} * x{a}\n    d{a} += d{j} * u{b}\n"
    if n_monomials > 1:
        text += "    du0 += d1\n    du1 += d2\n    du2 += d3\n"
    text += "    along = u0 * du0 + u1 * du1 + u2 * du2\n    gr = tl.load(grad_r + e, inside, 0.0)\n"
    for a in range(3):
        text += f"    tl.store(out + 3 * e + {a}, -(du{a} - u{a} * along) * inverse - u{a} * gr, inside)\n"
    return compiled("harmonics_backward", text)


def _kernel(make: Any, left: Tensor, right: Tensor, table: Tensor) -> Any:
    return memo.get((left, right, table), make, lambda: make(left.tolist(), right.tolist(), table.tolist()))


def harmonics(vectors: Tensor, r: Tensor, left: Tensor, right: Tensor, table: Tensor, l_max: int) -> Tensor:
    """See reference.harmonics."""
    contiguous(r.dtype, vectors=vectors, r=r, table=table)
    n = r.shape[0]
    out = r.new_empty(n, (l_max + 1) ** 2)
    kernel = _kernel(_forward, left, right, table)
    launch(kernel, (-(-n // BLOCK),), (vectors, r, out, n), {"BLOCK": BLOCK}, WARPS)
    return out


def harmonics_backward(
    vectors: Tensor, r: Tensor, left: Tensor, right: Tensor, table: Tensor, l_max: int, grad: Tensor, grad_r: Tensor
) -> Tensor:
    """(E, 3) cotangent of the vectors, from those of the harmonics (E, (l_max+1)^2) and of r (E,)."""
    contiguous(r.dtype, vectors=vectors, r=r, table=table, grad=grad, grad_r=grad_r)
    n = r.shape[0]
    out = torch.empty_like(vectors)
    kernel = _kernel(_backward, left, right, table)
    launch(kernel, (-(-n // BLOCK),), (vectors, r, grad, grad_r, out, n), {"BLOCK": BLOCK}, WARPS)
    return out
