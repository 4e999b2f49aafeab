"""Cases that every form of the operators of mdplug.kernels must meet, against their definition in plain torch.

`ops` has the operators as attributes: torch.ops.mdplug, or functions of the same signatures.
"""

from typing import Any

import torch
from torch import Tensor

from mdplug.kernels import reference
from mdplug.potentials.blocks.contraction import SymmetricContraction, sparse_polynomial
from mdplug.potentials.blocks.convolution import paths
from mdplug.potentials.blocks.harmonics import SphericalHarmonics
from mdplug.potentials.blocks.kernel_graph import coupling
from mdplug.potentials.blocks.kernel_weights import packed
from mdplug.potentials.blocks.knots import LANES, in_blocks

TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12}
DTYPES = [torch.float32, torch.float64]
HARMONICS = [0, 1, 2, 3, 4]  # l_max
DENSITY = [(0, 3, 8, 1), (1, 0, 8, 2), (3, 5, 5, 1), (40, 30, 24, 89)]  # atoms, neighbours, features, kinds
CONVOLUTION = [  # atoms, neighbours, channels, l_in, l_max
    (0, 3, 8, 1, 2), (1, 0, 4, 0, 3), (3, 6, 5, 1, 3), (21, 9, 32, 0, 3), (9, 7, 17, 2, 3), (70, 9, 33, 1, 2),
]  # fmt: skip
POLYNOMIAL = [(0, 3, 5, 0), (1, 3, 16, 1), (2, 2, 17, 9), (0, 1, 3, 4)]  # l_out, degree, channels, atoms
PRODUCT = [  # l_out, degree, channels, channels out, atoms, groups, density
    (0, 3, 5, 5, 0, 1, False), (1, 3, 16, 9, 1, 1, True), (1, 2, 17, 17, 31, 3, False), (2, 2, 33, 24, 14, 2, True),
]  # fmt: skip
GRAPH = [(0, 0, 0), (1, 0, 0), (5, 2, 30), (9, 0, 200)]  # owned atoms, ghosts, pairs


def close(got: Tensor, wanted: Tensor) -> None:
    """Equal within the rounding of the dtype, on the scale of the largest number."""
    scale = max(float(wanted.abs().max()), 1e-3) if wanted.numel() else 1.0
    torch.testing.assert_close(got, wanted, atol=TOLERANCE[wanted.dtype] * scale, rtol=0)


def scene(n, degree, dtype, seed=0, ghosts=0, l_max=3):
    """Random pairs by receiver: some atoms have none. Returns vectors, r, sender, first, harmonics."""
    g = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, degree + 1, (n,), generator=g)
    if n > 2:
        counts[1] = 0  # an isolated atom
    first = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).to(torch.int32)
    e = int(first[-1])
    sender = torch.randint(0, max(n + ghosts, 1), (e,), generator=g).to(torch.int32)
    vectors = torch.randn(e, 3, generator=g, dtype=torch.float64)
    vectors = (vectors * (0.2 + 3 * torch.rand(e, 1, generator=g)) / vectors.norm(dim=1, keepdim=True)).to(dtype)
    r = vectors.norm(dim=1)
    module = SphericalHarmonics(l_max, dtype)
    left, right = module.products()
    y = reference.harmonics(vectors, r, left, right, module.table, l_max)
    return vectors, r, sender, first, y, (left, right, module.table), g


def ranges(n):
    """Receivers begin..end: all of them, and some in the middle."""
    return [(0, n), (1, n - 1)] if n > 2 else [(0, n)]


def check_graph(ops: Any, n_owned: int, ghosts: int, count: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    n = n_owned + ghosts
    pairs = torch.stack([torch.randint(0, max(m, 1), (count,), generator=g) for m in (n_owned, n)])
    vectors = torch.randn(count, 3, generator=g).to(dtype)
    place = torch.cat([torch.randperm(n_owned, generator=g), torch.arange(n_owned, n)]).to(torch.int32)
    cutoff = 1.5
    kept = [e for e in range(count) if float(vectors[e].norm()) < cutoff]
    kept.sort(key=lambda e: int(place[pairs[0, e]]))
    origin = torch.tensor(kept, dtype=torch.int64)
    receiver = place[pairs[0, origin]]
    first = torch.tensor([int((receiver < i).sum()) for i in range(n_owned + 1)], dtype=torch.int32)
    got = ops.graph(pairs, vectors, place, n_owned, cutoff)
    close(got[1], vectors[origin].norm(dim=1))
    exact = (vectors[origin], got[1], receiver, place[pairs[1, origin]], first, origin)
    for one, other in zip(got, exact, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def check_harmonics(ops: Any, dtype: torch.dtype, l_max: int) -> None:
    for n in (0, 1, 7, 40):
        vectors, r, _, _, y, tables, g = scene(n, 9, dtype, l_max=l_max)
        arguments = (vectors, r, *tables, l_max)
        close(ops.harmonics(*arguments), y)
        grad, grad_r = torch.randn(y.shape, generator=g).to(dtype), torch.randn(len(r), generator=g).to(dtype)

        def whole(v, arguments=arguments, grad=grad, grad_r=grad_r):
            r = v.norm(dim=1)
            return (reference.harmonics(v, r, *arguments[2:]) * grad).sum() + (r * grad_r).sum()

        wanted = torch.autograd.functional.jacobian(whole, vectors.double()) if dtype == torch.float64 else None
        got = ops.harmonics_backward(*arguments, grad, grad_r)
        if wanted is not None:
            close(got, wanted)
        assert got.shape == vectors.shape


def check_density(ops: Any, dtype: torch.dtype, tabulated: bool, n: int, degree: int, b: int, kinds: int) -> None:
    _, r, _, first, y, _, g = scene(n, degree, dtype)
    e, knots, table_kinds = len(r), 17, 2
    table = torch.randn(table_kinds * knots, 3, b, generator=g).to(dtype) if tabulated else torch.zeros(0, dtype=dtype)
    all_values = torch.zeros(0, dtype=dtype) if tabulated else torch.randn(e, b, generator=g).to(dtype)
    kind = torch.randint(0, table_kinds, (e,), generator=g).to(torch.int32)
    species = torch.randint(0, kinds, (e,), generator=g).to(torch.int32)
    for begin, end in ranges(n):
        own = slice(int(first[begin]), int(first[end]))
        values = all_values if tabulated else all_values[own]
        arguments = (y, table, values, r, kind, species, first, kinds, begin, end, 0.1, 0.2, knots)
        got = ops.density(*arguments)
        close(got, reference.density(*arguments))
        grad = torch.randn(got.shape, generator=g).to(dtype)
        dy, dr = reference.adjoint(reference.density, arguments, grad, (0, 3 if tabulated else 2))
        got_dy, got_dr = ops.density_backward(*arguments, grad)
        close(got_dy, dy[own])
        close(got_dr, dr[own] if tabulated else dr)


def check_convolution(
    ops: Any, dtype: torch.dtype, tabulated: bool, n: int, degree: int, k: int, l_in: int, l_max: int
) -> tuple[tuple, Tensor]:
    """Returns the arguments for all receivers, and a cotangent."""
    ghosts = 2
    _, r, sender, first, y, _, g = scene(n, degree, dtype, ghosts=ghosts, l_max=l_max)
    e, knots = len(r), 17
    of = paths(l_in, l_max)
    index, value = coupling(of)
    block = LANES[dtype] * (2 if k % (2 * LANES[dtype]) == 0 else 1)
    sent = torch.randn((l_in + 1) ** 2, n + ghosts, k, generator=g).to(dtype)
    table = values = torch.zeros(0, dtype=dtype)
    rows = 2 if tabulated else max(e // 2, 1)  # some pairs share a row of values
    if tabulated:
        flat = torch.randn(2 * knots, len(of) * 3, k, generator=g).to(dtype)
        shape = (-1, 2 * knots, len(of), 3, block)
        table = in_blocks(flat, block).transpose(0, 1).reshape(shape).contiguous()
    else:
        values = in_blocks(torch.randn(rows, len(of), k, generator=g).to(dtype), block)
    kind = torch.randint(0, rows, (e,), generator=g).to(torch.int32)
    structure = (torch.tensor(of, dtype=torch.int32), torch.from_numpy(index), torch.from_numpy(value))
    whole: list[tuple[tuple, Tensor]] = []
    for begin, end in ranges(n):
        own = slice(int(first[begin]), int(first[end]))
        arguments = (sent, y, table, values, r, kind, sender, first, *structure, begin, end, 0.1, 0.2, knots)
        got = ops.convolution(*arguments)
        close(got, reference.convolution(*arguments))
        grad = torch.randn(got.shape, generator=g).to(dtype)
        dh, dy, dr = reference.adjoint(reference.convolution, arguments, grad, (0, 1, 4 if tabulated else 3))
        got_dh, got_dy, got_dr = ops.convolution_backward(*arguments, grad)
        close(got_dh, dh)
        close(got_dy, dy[own])
        close(got_dr, dr[own] if tabulated else dr)
        whole.append((arguments, grad))
    return whole[0]


def check_polynomial(ops: Any, dtype: torch.dtype, l_out: int, degree: int, k: int, n: int) -> None:
    g = torch.Generator().manual_seed(1)
    module = SymmetricContraction(2, l_out, degree, 89, k, torch.float64)
    for parameter in module.parameters():
        parameter.data.normal_(generator=g)
    nodes, term, starts, coefficients = sparse_polynomial(module)
    kind = torch.sort(torch.randint(0, 89, (n,), generator=g)).values
    inputs = torch.randn(9, n, k, generator=g).to(dtype)
    arguments = (
        inputs, in_blocks(coefficients.detach().to(dtype), LANES[dtype]), kind.to(torch.int32), nodes,
        term, starts,
    )  # fmt: skip
    got = ops.polynomial(*arguments)
    close(got, reference.polynomial(*arguments))
    grad = torch.randn(got.shape, generator=g).to(dtype)
    (wanted,) = reference.adjoint(reference.polynomial, arguments, grad, (0,))
    close(ops.polynomial_backward(*arguments, grad), wanted)
    if n:  # the definition of the definition: the dense form that training uses
        sizes = torch.bincount(kind, minlength=89)
        present = torch.nonzero(sizes).squeeze(1)
        dense = module(inputs.double(), present, sizes[present].tolist(), list(range(len(present))))
        close(got, dense.detach().to(dtype))


def check_product(
    ops: Any, dtype: torch.dtype, l_out: int, degree: int, k: int, k_out: int, n: int, groups: int, density: bool
) -> None:
    g = torch.Generator().manual_seed(2)
    module = SymmetricContraction(2, l_out, degree, 3, k, torch.float64)
    for parameter in module.parameters():
        parameter.data.normal_(generator=g)
    nodes, term, starts, coefficients = sparse_polynomial(module)
    rows = [3, k + 2, 17]
    matrices = [[torch.randn(row, k, generator=g).to(dtype) / k for row in rows] for _ in range(groups)]
    mix = torch.randn(l_out + 1, k, k_out, generator=g).to(dtype) / k
    group = torch.sort(torch.randint(0, groups, (n,), generator=g)).values.to(torch.int32)
    if groups == 1:
        group = group[:0]
    norm = torch.rand(n if density else 0, generator=g).to(dtype)
    messages = torch.randn(sum((2 * ell + 1) * n * row for ell, row in enumerate(rows)), generator=g).to(dtype)
    kind = torch.randint(0, 3, (n,), generator=g).to(torch.int32)

    blocks = in_blocks(coefficients.detach().to(dtype), LANES[dtype])

    def arguments(back: bool) -> tuple:
        flat = torch.cat([packed(m.t() if back else m).flatten() for of in matrices for m in of])
        return (
            flat, torch.tensor(rows, dtype=torch.int32), group, norm, blocks, kind, nodes, term, starts,
            packed(mix.transpose(1, 2) if back else mix), n, k, k_out,
        )  # fmt: skip

    out, mixed = ops.product(messages, *arguments(False))
    wanted = reference.product(messages, *arguments(False))
    close(out, wanted[0])
    close(mixed, wanted[1])
    grad = torch.randn(out.shape, generator=g).to(dtype)
    (d_messages,) = reference.adjoint(lambda *a: reference.product(*a)[0], (messages, *arguments(False)), grad, (0,))
    got, d_density = ops.product_backward(grad, mixed, *arguments(True))
    close(got, d_messages)
    if density:  # norm = 1 / (rho + 1)
        (d_norm,) = reference.adjoint(lambda *a: reference.product(*a)[0], (messages, *arguments(False)), grad, (4,))
        close(d_density, -d_norm * norm * norm)


def check_linear(ops: Any, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(3)
    for n, k, k_out, l_in, l_weight, components, groups, based in [
        (0, 4, 4, 1, 1, 4, 1, False), (1, 5, 17, 0, 0, 4, 1, True), (29, 16, 8, 2, 1, 9, 3, True),
        (13, 33, 32, 1, 1, 1, 2, False),
    ]:  # fmt: skip
        features = torch.randn((l_in + 1) ** 2, n, k, generator=g).to(dtype)
        weight = packed(torch.randn(groups, l_weight + 1, k, k_out, generator=g).to(dtype))
        group = torch.sort(torch.randint(0, groups, (n,), generator=g)).values.to(torch.int32)
        base = torch.randn(components if based else 0, n, k_out, generator=g).to(dtype)
        arguments = (features, weight, group if groups > 1 else group[:0], base, components, k_out)
        close(ops.linear(*arguments), reference.linear(*arguments))
