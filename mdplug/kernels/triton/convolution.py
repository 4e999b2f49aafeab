"""Messages of the later layers and their adjoint: by receiver forwards, by sender backwards; no atomics.

Each pair's Clebsch-Gordan terms go straight to the messages, 2 l3 + 1 sums a path: fewer registers than the outer
products (2 l1 + 1)(2 l2 + 1) that the CPU keeps in its cache.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mdplug.kernels.memo import memo
from mdplug.kernels.triton import convolution_source as text
from mdplug.kernels.triton.graph import by_sender, pairs_of
from mdplug.kernels.triton.source import channel_block, compiled, contiguous, launch

# Of one program, which is one warp. To be tuned on a device.
CHANNELS = {torch.float32: 64, torch.float64: 32}
CHANNELS_BACKWARD = {torch.float32: 64, torch.float64: 32}
MESSAGES = 48  # sums of one kernel, each 1 or 2 registers wide for each 32 channels


def _terms(paths: list[list[int]], coupling: list[list[int]], coefficient: list[float]) -> tuple:
    """The terms of each path."""
    found: list[list[text.Term]] = []
    outer = out = 0
    for l1, l2, l3 in paths:
        size, width = (2 * l1 + 1) * (2 * l2 + 1), 2 * l2 + 1
        found.append(
            [
                text.Term((q - outer) // width, (q - outer) % width, o - out, c)
                for (q, o), c in zip(coupling, coefficient, strict=True)
                if outer <= q < outer + size
            ]
        )
        outer, out = outer + size, out + 2 * l3 + 1
    return tuple(tuple(terms) for terms in found)


@cache
def _forward_kernels(shape: text.Shape) -> list[Any]:
    return [compiled("convolution", text.forward(shape, part)) for part in text.split(shape, MESSAGES)]


@cache
def _backward_kernels(shape: text.Shape) -> list[Any]:
    return [compiled("convolution_backward", text.backward(shape))]


def _kernels(
    make: Callable[[text.Shape], list[Any]], most: int, sent: Tensor, harmonics: Tensor, table: Tensor, kind: Tensor,
    paths: Tensor, coupling: Tensor, coefficient: Tensor, knots: tuple[float, float, int],
) -> tuple[list[Any], int]:  # fmt: skip
    """The kernels for these arguments, and their blocks of channels."""
    k = sent.shape[2]
    block = channel_block(k, most)
    width = table.shape[-1] if table.numel() else 0
    key = (make, k, block, harmonics.shape[1], width, kind.numel() > 0, knots)

    def made() -> list[Any]:
        of = paths.tolist()
        terms = _terms(of, coupling.tolist(), coefficient.tolist())
        return make(text.Shape(tuple(tuple(p) for p in of), terms, k, block, harmonics.shape[1], width, key[5], *knots))

    return memo.get((paths, coupling, coefficient), key, made), -(-k // block)


def _check(sent: Tensor, harmonics: Tensor, table: Tensor, values: Tensor, r: Tensor, *indices: Tensor) -> None:
    contiguous(sent.dtype, sent=sent, harmonics=harmonics, table=table, values=values, r=r)
    for name, tensor in zip(("kind", "sender", "first"), indices, strict=True):
        contiguous(torch.int32, **{name: tensor})


def _by_pair(
    table: Tensor, values: Tensor, r: Tensor, kind: Tensor, first: Tensor, begin: int, end: int, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Values (rows, blocks, P, C), whose rows pairs may share, as (pairs, P, k); no kinds; the row of each pair."""
    if table.numel():
        return values, kind, kind
    pairs = pairs_of(first, begin, end, r)
    start = 0 if begin == 0 or not kind.numel() else int(first[begin])
    row = kind[start : start + pairs].long() if kind.numel() else torch.arange(pairs, device=values.device)
    return values.transpose(1, 2).flatten(2)[row, :, :k].contiguous(), kind[:0], row


def convolution(
    sent: Tensor, harmonics: Tensor, table: Tensor, values: Tensor, r: Tensor, kind: Tensor, sender: Tensor,
    first: Tensor, paths: Tensor, coupling: Tensor, coefficient: Tensor, begin: int, end: int, first_knot: float,
    step: float, per_kind: int,
) -> Tensor:  # fmt: skip
    """See reference.convolution."""
    values, kind, _ = _by_pair(table, values, r, kind, first, begin, end, sent.shape[2])
    _check(sent, harmonics, table, values, r, kind, sender, first)
    kernels, blocks = _kernels(
        _forward_kernels, CHANNELS[sent.dtype], sent, harmonics, table, kind, paths, coupling, coefficient,
        (first_knot, step, per_kind),
    )  # fmt: skip
    n = end - begin
    components = memo.get((paths,), "components", lambda: sum(2 * p[2] + 1 for p in paths.tolist()))
    out = sent.new_empty(components * n * sent.shape[2])
    rows = table.shape[1] if table.numel() else 0
    arguments = (sent, harmonics, table, values, r, kind, sender, first, out, begin, n, sent.shape[1], rows)
    for kernel in kernels:
        launch(kernel, (n, blocks), arguments, {})
    return out


def convolution_backward(
    sent: Tensor, harmonics: Tensor, table: Tensor, values: Tensor, r: Tensor, kind: Tensor, sender: Tensor,
    first: Tensor, paths: Tensor, coupling: Tensor, coefficient: Tensor, begin: int, end: int, first_knot: float,
    step: float, per_kind: int, grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Cotangents of `sent`, of the harmonics (pairs, M), and of r (pairs,) or of the values, in their layout."""
    shape = values.shape
    values, kind, row = _by_pair(table, values, r, kind, first, begin, end, sent.shape[2])
    _check(sent, harmonics, table, values, r, kind, sender, first)
    contiguous(sent.dtype, grad=grad)
    (kernel,), blocks = _kernels(
        _backward_kernels, CHANNELS_BACKWARD[sent.dtype], sent, harmonics, table, kind, paths, coupling, coefficient,
        (first_knot, step, per_kind),
    )  # fmt: skip
    n_senders, k = sent.shape[1:]
    pairs = pairs_of(first, begin, end, r)
    of = memo.get((sender, first), (begin, end), lambda: by_sender(sender, first, begin, end, pairs, n_senders))
    dh, dy = torch.empty_like(sent), sent.new_empty(blocks, pairs, harmonics.shape[1])
    dr = sent.new_empty((blocks, pairs) if table.numel() else (pairs, paths.shape[0], k))
    rows = table.shape[1] if table.numel() else 0
    arguments = (sent, harmonics, table, values, r, kind, first, *of, grad, dh, dy, dr)
    launch(kernel, (n_senders, blocks), (*arguments, begin, end - begin, n_senders, rows, pairs), {})
    d_harmonics = dy[0] if blocks == 1 else dy.sum(dim=0)
    if table.numel():
        return dh, d_harmonics, dr[0] if blocks == 1 else dr.sum(dim=0)
    n_blocks, n_paths, width = shape[1:]
    dr = torch.nn.functional.pad(dr, (0, n_blocks * width - k)).view(pairs, n_paths, n_blocks, width).transpose(1, 2)
    return dh, d_harmonics, values.new_zeros(shape).index_add(0, row, dr)
