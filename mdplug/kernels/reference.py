"""What the operators compute, in plain differentiable torch: the definition that every other form is tested against.

Signatures are those of torch.ops.mdplug; `adjoint` gives the backward operators of any of them.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from mdplug.kernels import product as around
from mdplug.kernels.product import linear as linear
from mdplug.kernels.spline import quintic


def radial(table: Tensor, values: Tensor, r: Tensor, kind: Tensor, first: float, step: float, per_kind: int) -> Tensor:
    """Radial functions of pairs: (E, b) or (E, P, channels), from a table or as given.

    Args:
        table: (rows, 3, b) or (blocks, rows, P, 3, C); empty: `values`, (E, b) or (rows, blocks, P, C), are given.
        r: (E,) A. kind: (E,) int32 which table, or which row of the values (pairs may share one); or empty.
        first, step: A, of the knots. per_kind: knots of each table.
    """
    if table.numel() == 0:
        if values.dim() == 2:
            return values
        rows = values.transpose(1, 2).flatten(2)
        return rows[kind.long()] if kind.numel() else rows[: len(r)]
    x = (r - first) / step
    index = x.detach().floor().clamp(0, per_kind - 2)
    weights, _ = quintic(x - index, step)
    row = index.long() + (kind.long() * per_kind if kind.numel() else 0)
    if table.dim() == 3:
        both = torch.cat([table[row], table[row + 1]], dim=1)  # (E, 6, b)
        return torch.einsum("eo,eob->eb", weights, both)
    both = torch.cat([table[:, row], table[:, row + 1]], dim=3)  # (blocks, E, P, 6, C)
    return torch.einsum("eo,nepoc->epnc", weights, both).flatten(2)


def receivers(first: Tensor, begin: int, end: int) -> tuple[slice, Tensor]:
    """Pairs of receivers begin..end, and the receiver of each, from 0."""
    counts = (first[begin + 1 : end + 1] - first[begin:end]).long()
    return slice(int(first[begin]), int(first[end])), torch.repeat_interleave(torch.arange(end - begin), counts)


def harmonics(vectors: Tensor, r: Tensor, left: Tensor, right: Tensor, table: Tensor, l_max: int) -> Tensor:
    """(E, (l_max+1)^2) real spherical harmonics of -vectors/r: monomials of rising degree times `table`."""
    unit = -vectors / r.unsqueeze(1)
    columns = [torch.ones_like(r), *unit.unbind(1)][: len(table)]
    for a, b in zip(left.tolist(), right.tolist(), strict=True):
        columns.append(columns[a] * unit[:, b])
    return torch.stack(columns, dim=1) @ table


def density(
    harmonics: Tensor,
    table: Tensor,
    values: Tensor,
    r: Tensor,
    kind: Tensor,
    species: Tensor,
    first: Tensor,
    kinds: int,
    begin: int,
    end: int,
    first_knot: float,
    step: float,
    per_kind: int,
) -> Tensor:
    """(M, n, kinds * b): sum over neighbours of each kind of phi_b(r) Y_m."""
    own, receiver = receivers(first, begin, end)
    r, kind = r[own], kind[own] if kind.numel() else kind
    phi = radial(table, values, r, kind, first_knot, step, per_kind)
    spread = torch.nn.functional.one_hot(species[own].long(), kinds).to(phi.dtype)
    pairs = torch.einsum("em,ez,eb->emzb", harmonics[own], spread, phi).flatten(2)
    return pairs.new_zeros(end - begin, *pairs.shape[1:]).index_add(0, receiver, pairs).transpose(0, 1)


def convolution(
    sent: Tensor,
    harmonics: Tensor,
    table: Tensor,
    values: Tensor,
    r: Tensor,
    kind: Tensor,
    sender: Tensor,
    first: Tensor,
    paths: Tensor,
    coupling: Tensor,
    coefficient: Tensor,
    begin: int,
    end: int,
    first_knot: float,
    step: float,
    per_kind: int,
) -> Tensor:
    """Messages of receivers begin..end: for each l3 (2 l3 + 1, n, paths to it, k), one after another, flat."""
    own, receiver = receivers(first, begin, end)
    n, k = end - begin, sent.shape[2]
    r, kind = r[own], kind[own] if kind.numel() else kind
    functions = radial(table, values, r, kind, first_knot, step, per_kind)[..., :k]
    h, y = sent[:, sender[own].long()], harmonics[own]
    parts: dict[int, list[Tensor]] = {}
    outer = out = 0
    for p, (l1, l2, l3) in enumerate(paths.tolist()):
        m1, m2, m3 = 2 * l1 + 1, 2 * l2 + 1, 2 * l3 + 1
        tensor = torch.zeros(m1 * m2, m3, dtype=sent.dtype)
        for (q, o), c in zip(coupling.tolist(), coefficient.tolist(), strict=True):
            if outer <= q < outer + m1 * m2:
                tensor[q - outer, o - out] = c
        outer, out = outer + m1 * m2, out + m3
        features, angles = h[l1 * l1 : (l1 + 1) ** 2], y[:, l2 * l2 : (l2 + 1) ** 2]
        message = torch.einsum("ek,aek,eb,abc->cek", functions[:, p], features, angles, tensor.view(m1, m2, m3))
        parts.setdefault(l3, []).append(message.new_zeros(m3, n, k).index_add(1, receiver, message))
    return torch.cat([torch.stack(parts[l3], dim=2).flatten() for l3 in sorted(parts)])


def polynomial(
    inputs: Tensor, coefficients: Tensor, kind: Tensor, nodes: Tensor, term: Tensor, starts: Tensor
) -> Tensor:
    """(outputs, n, k): sums of coefficients (kinds, blocks, terms, C) times products of inputs (M, n, k)."""
    entries = list(inputs.unbind(0))
    for a, b in nodes.tolist():
        entries.append(entries[a] * entries[b])
    weight = coefficients.transpose(1, 2).flatten(2)[kind.long(), :, : inputs.shape[2]]  # (n, terms, k)
    sums = torch.zeros(len(starts) - 1, *inputs.shape[1:], dtype=inputs.dtype)
    for o, (a, b) in enumerate(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)):
        for t in range(a, b):
            sums[o] = sums[o] + weight[:, t] * entries[int(term[t])]
    return sums


product = partial(around.product, polynomial)


def adjoint(operator: Callable[..., Tensor], arguments: tuple, grad: Tensor, wanted: tuple[int, ...]) -> list[Tensor]:
    """Cotangents of the arguments at places `wanted`, for the cotangent `grad` of the result."""
    leaves = {i: arguments[i].detach().clone().requires_grad_(True) for i in wanted}
    result = operator(*(leaves.get(i, a) for i, a in enumerate(arguments)))
    found = torch.autograd.grad(result, list(leaves.values()), grad, allow_unused=True, materialize_grads=True)
    return list(found)
