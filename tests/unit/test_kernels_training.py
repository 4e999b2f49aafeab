"""Derivatives of the native operators, of first and second order; and training of MACE on them against plain torch."""

import pytest
import torch
from ase.build import bulk
from contract import check, liquid
from kernel_cases import scene
from mace_models import CONTRACT, FURTHER, box, build
from torch.autograd import gradcheck, gradgradcheck

from mdplug import kernels
from mdplug.deployed import evaluate
from mdplug.errors import MdplugError
from mdplug.kernels import autograd
from mdplug.potentials.blocks import kernel_training
from mdplug.potentials.blocks.contraction import SymmetricContraction, sparse_polynomial
from mdplug.potentials.blocks.convolution import paths
from mdplug.potentials.blocks.kernel_graph import coupling
from mdplug.potentials.blocks.kernel_weights import packed
from mdplug.potentials.blocks.knots import LANES, in_blocks
from mdplug.system import AtomicSystem

pytestmark = pytest.mark.skipif(not kernels.available(), reason="the native library is not there")
ops = torch.ops.mdplug
NONE, ANY = torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.int32)
# Atoms, most neighbours, channels, degree sent, of the harmonics: no atoms, no pairs, odd widths, an isolated atom.
SHAPES = [(0, 3, 2, 1, 1), (1, 0, 3, 0, 2), (3, 3, 3, 1, 2), (4, 3, 9, 0, 2), (3, 2, 2, 2, 3)]


@pytest.fixture(autouse=True)
def registered():
    autograd.register()


def leaves(*tensors):
    return tuple(t.clone().requires_grad_(True) for t in tensors)


def harmonics_case(n, degree, l_max):
    vectors, r, _, _, _, tables, g = scene(n, degree, torch.float64, l_max=l_max)
    return (vectors, r, *tables, l_max), g


def density_case(n, degree, b, kinds, tabulated=False):
    _, r, _, first, y, _, g = scene(n, degree, torch.float64, l_max=2)
    species = torch.randint(0, kinds, (len(r),), generator=g).to(torch.int32)
    values = torch.randn(len(r), b, generator=g, dtype=torch.float64)
    table = torch.randn(9, 3, b, generator=g, dtype=torch.float64) if tabulated else NONE
    return (y, table, values, r, ANY, species, first, kinds, 0, n, 0.1, 0.5, 9), g


def convolution_case(n, degree, k, l_in, l_max, tabulated=False):
    _, r, sender, first, y, _, g = scene(n, degree, torch.float64, ghosts=1, l_max=l_max)
    of = paths(l_in, l_max)
    index, value = coupling(of)
    sent = torch.randn((l_in + 1) ** 2, n + 1, k, generator=g, dtype=torch.float64)
    rows = max(len(r) // 2, 1)
    values = in_blocks(torch.randn(rows, len(of), k, generator=g, dtype=torch.float64), 8)
    row = torch.randint(0, rows, (len(r),), generator=g).to(torch.int32)
    table = torch.randn(-(-k // 8), 9, len(of), 3, 8, generator=g, dtype=torch.float64) if tabulated else NONE
    return (
        sent, y, table, values, r, ANY if tabulated else row, sender, first, torch.tensor(of, dtype=torch.int32),
        torch.from_numpy(index), torch.from_numpy(value), 0, n, 0.1, 0.5, 9,
    ), g  # fmt: skip


def polynomial_case(n, l_out, degree, k, kinds):
    g = torch.Generator().manual_seed(n)
    module = SymmetricContraction(1, l_out, degree, kinds, k, torch.float64)
    for parameter in module.parameters():
        parameter.data.normal_(generator=g)
    nodes, term, starts, coefficients = sparse_polynomial(module)
    kind = torch.sort(torch.randint(0, kinds, (n,), generator=g)).values.to(torch.int32)
    inputs = torch.randn(4, n, k, generator=g, dtype=torch.float64)
    return (inputs, in_blocks(coefficients.detach(), LANES[torch.float64]), kind, nodes, term, starts), g


def like(tensor, g):
    return torch.randn(tensor.shape, generator=g, dtype=torch.float64)


@pytest.mark.parametrize(("n", "degree", "l_max"), [(1, 0, 1), (3, 3, 0), (4, 3, 3)])
def test_harmonics(n, degree, l_max):
    (vectors, _, *rest), _ = harmonics_case(n, degree, l_max)

    def of(v):  # r is |v| and has no gradient of its own
        return ops.harmonics(v, v.detach().norm(dim=1), *rest)

    assert gradcheck(of, leaves(vectors))
    assert gradgradcheck(of, leaves(vectors))


@pytest.mark.parametrize(("n", "degree", "b", "kinds"), [(0, 3, 4, 1), (1, 0, 3, 2), (4, 3, 5, 3)])
def test_density(n, degree, b, kinds):
    (y, table, values, *rest), _ = density_case(n, degree, b, kinds)
    assert gradcheck(lambda y, v: ops.density(y, table, v, *rest), leaves(y, values))
    assert gradgradcheck(lambda y, v: ops.density(y, table, v, *rest), leaves(y, values))


@pytest.mark.parametrize("shape", SHAPES)
def test_convolution(shape):
    (sent, y, table, values, *rest), _ = convolution_case(*shape)

    def of(s, y, v):
        return ops.convolution(s, y, table, v, *rest)

    assert gradcheck(of, leaves(sent, y, values), fast_mode=True)
    assert gradgradcheck(of, leaves(sent, y, values), fast_mode=True)


@pytest.mark.parametrize("case", [density_case(5, 4, 3, 2), convolution_case(5, 4, 3, 1, 2)])
def test_some_receivers(case):
    """Receivers from..to give what they give among all, and so do their derivatives."""
    arguments, _ = case
    name, n = ("density", 9) if len(arguments) == 13 else ("convolution", 12)
    values, first = (2, arguments[6]) if name == "density" else (3, arguments[7])
    linear = [0, values] if name == "density" else [0, 1, values]
    begin, end = 2, 4
    some = [*arguments[: n - 1], begin, end, *arguments[n + 1 :]]
    if name == "density":  # values are those of the call's pairs
        some[values] = arguments[values][int(first[begin]) : int(first[end])]

    def of(*given):
        full = list(some)
        for place, x in zip(linear, given, strict=True):
            full[place] = x
        return getattr(ops, name)(*full)

    assert gradcheck(of, leaves(*(some[i] for i in linear)), fast_mode=True)
    assert gradgradcheck(of, leaves(*(some[i] for i in linear)), fast_mode=True)


@pytest.mark.parametrize(("n", "l_out", "degree", "k", "kinds"), [(0, 0, 3, 5, 1), (1, 1, 3, 3, 2), (3, 1, 2, 9, 2)])
def test_polynomial(n, l_out, degree, k, kinds):
    (x, c, *rest), g = polynomial_case(n, l_out, degree, k, kinds)
    grad = like(ops.polynomial(x, c, *rest), g)
    assert gradcheck(lambda x, c: ops.polynomial(x, c, *rest), leaves(x, c), fast_mode=True)
    assert gradgradcheck(lambda x, c: ops.polynomial(x, c, *rest), leaves(x, c), fast_mode=True)
    assert gradcheck(lambda x, c, g: ops.polynomial_backward(x, c, *rest, g), leaves(x, c, grad), fast_mode=True)


@pytest.mark.parametrize("tabulated", [False, True])
def test_operators_keep_torchs_rules(tabulated):
    """Schemas, shapes without data, and registration of derivatives, of every operator."""
    (v, r, left, right, table, l_max), g = harmonics_case(3, 3, 2)
    pairs = torch.tensor([[0, 0, 1, 2], [1, 2, 0, 0]])
    density, _ = density_case(4, 3, 5, 3, tabulated)
    convolution, _ = convolution_case(4, 3, 3, 1, 2, tabulated)
    polynomial, _ = polynomial_case(3, 1, 2, 9, 2)
    x, c, *structure = polynomial
    of_density, of_convolution = like(ops.density(*density), g), like(ops.convolution(*convolution), g)
    of_polynomial, of_harmonics = like(ops.polynomial(*polynomial), g), torch.randn(len(r), 9, dtype=torch.float64)
    place = torch.arange(3, dtype=torch.int32)
    calls = {
        "graph": (pairs, torch.randn(4, 3, dtype=torch.float64), place, 3, 1.5),
        "harmonics": (v, r, left, right, table, l_max),
        "harmonics_backward": (v, r, left, right, table, l_max, of_harmonics, like(r, g)),
        "harmonics_tangent": (v, r, left, right, table, l_max, like(v, g)),
        "density": density,
        "density_backward": (*density, of_density),
        "convolution": convolution,
        "convolution_backward": (*convolution, of_convolution),
        "polynomial": polynomial,
        "polynomial_backward": (*polynomial, of_polynomial),
        "polynomial_coefficients": (x, *structure, of_polynomial, len(c)),
        "polynomial_second": (*polynomial, of_polynomial, like(x, g)),
    }
    none, x64 = torch.zeros(0, dtype=torch.int32), torch.randn(3, 3, dtype=torch.float64, generator=g)
    cell = 9.0 * torch.eye(3, dtype=torch.float64)
    n, k = x.shape[1:]
    square = packed(torch.randn(2, k, k, dtype=torch.float64, generator=g))
    product = (
        square.flatten(), torch.full((2,), k, dtype=torch.int32), none,
        torch.rand(n, dtype=torch.float64, generator=g), c, polynomial[2], *structure[1:], square, n, k, k,
    )  # fmt: skip
    energies, zero = torch.randn(3, dtype=torch.float64, generator=g), torch.zeros(3, dtype=torch.int64)
    calls |= {
        "product": (torch.randn(4 * n * k, dtype=torch.float64, generator=g), *product),
        "product_backward": (like(ops.polynomial(*polynomial), g), x, *product),
        "linear": (x, square, none, x[:0], 4, k),
        "cell_list": (x64, cell, torch.linalg.inv(cell).contiguous(), 7, 3.0),
        "sum_atoms": (energies, zero, 1),
        "sum_pairs": (torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3).double(), pairs, energies, zero, 1),
    }
    if not tabulated:
        sent, y, _, values = convolution[:4]
        calls["convolution_second"] = (*convolution, of_convolution, like(sent, g), like(y, g), like(values, g))
    assert set(calls) >= set(autograd.OPERATORS) - {"convolution_second"}
    for name, arguments in calls.items():
        torch.library.opcheck(getattr(ops, name).default, arguments)


def test_what_has_no_derivative_says_so():
    y, *rest = density_case(4, 3, 5, 3, tabulated=True)[0]
    (y,) = leaves(y)
    (slope,) = torch.autograd.grad(ops.density(y, *rest).square().sum(), y, create_graph=True)
    with pytest.raises(MdplugError, match="tables"):
        slope.sum().backward()
    sent, *rest = convolution_case(4, 3, 3, 1, 2, tabulated=True)[0]
    sent, y = leaves(sent, rest[0])
    (slope,) = torch.autograd.grad(ops.convolution(sent, y, *rest[1:]).sum(), sent, create_graph=True)
    with pytest.raises(MdplugError, match="tables"):
        slope.sum().backward()
    (x, *rest), _ = polynomial_case(3, 1, 3, 3, 2)
    (x,) = leaves(x)
    (slope,) = torch.autograd.grad(ops.polynomial(x, *rest).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(slope.square().sum(), x, create_graph=True)
    with pytest.raises(MdplugError, match="second derivatives only"):
        second.sum().backward()


# --- MACE ------------------------------------------------------------------------------------------------------------


def gradients(model, system):
    """Loss on energies, forces and virials, its gradient by every weight, and what was predicted."""
    out = evaluate(model, system, create_graph=True)
    aim = torch.randn(out.forces.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    loss = out.energy.square().sum() + (out.forces - aim).square().sum() + 0.01 * out.virial.square().sum()
    names, weights = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
    return loss.detach(), dict(zip(names, grads, strict=True)), out


SYSTEMS = {
    "liquid": lambda: box(charge=1, spin=2),
    "cell below the cutoff": lambda: AtomicSystem.from_ase(liquid([1, 8], n=3, edge=4.1, seed=3)),
    "crystal": lambda: AtomicSystem.from_ase(bulk("OH", "rocksalt", a=3.6)),  # many pairs of one length
    "atom": lambda: AtomicSystem.from_ase(liquid([8], n=1, edge=20.0)),
}


@pytest.mark.parametrize("name", [*CONTRACT, *FURTHER])
def test_training_on_kernels_is_training(name, monkeypatch):
    model = build({**CONTRACT, **FURTHER}[name]).train()
    for made in SYSTEMS.values():
        system = made()
        with monkeypatch.context() as patch:
            patch.setattr(kernel_training, "usable", lambda *_: False)
            loss, wanted, plain = gradients(model, system)
        on_kernels, got, out = gradients(model, system)
        assert abs(on_kernels - loss) < 1e-11 * abs(loss)
        stiff = 1e-11 * max(1.0, float(plain.virial.detach().abs().max()))  # forces of a crystal cancel
        assert torch.allclose(out.forces, plain.forces, rtol=0, atol=stiff)
        assert torch.allclose(out.virial, plain.virial, rtol=0, atol=stiff)
        whole = max(float(g.abs().max()) for g in wanted.values() if g.numel())
        for key, grad in wanted.items():
            scale = max(float(grad.abs().max()), 1e-3 * whole) if grad.numel() else 1.0
            assert torch.allclose(got[key], grad, rtol=0, atol=1e-9 * scale), key


def test_channels_some_at_a_time(monkeypatch):
    model = build({"l_hidden": 1, "channels": 20}).train()
    _, wanted, _ = gradients(model, box())
    monkeypatch.setattr(kernel_training, "AT_A_TIME", 1)
    _, got, _ = gradients(model, box())
    for key, grad in wanted.items():
        assert float((got[key] - grad).norm()) <= 1e-11 * float(grad.norm()), key


def test_float32_follows_float64():
    model = build({"l_hidden": 1}).train()
    _, wanted, _ = gradients(model, box())
    _, got, _ = gradients(model.float(), box())
    for key, grad in wanted.items():
        assert float((got[key] - grad).norm()) <= 1e-4 * float(grad.norm()), key


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_threads_do_not_matter(dtype):
    model = build({"l_hidden": 1, "channels": 24}, dtype=dtype).train()
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            graph = kernel_training.build_graph(model, *_scene(model))
            sent = torch.randn(4, graph.atoms.n, 24, generator=torch.Generator().manual_seed(0), dtype=graph.none.dtype)
            sent.requires_grad_(True)
            messenger = model.layers[1].messenger
            columns = model.radial(graph.r.unsqueeze(1), graph.receiving, graph.sending)[1].detach()
            columns.requires_grad_(True)
            messages = kernel_training.convolve(messenger.messages, sent, columns, messenger.radial_weight, graph)
            product = kernel_training.contract(
                model.layers[1].product, torch.cat([m[..., :24] for m in messages]), graph
            )
            slopes = torch.autograd.grad(product.sum(), (sent, columns), create_graph=True)
            weights = [messenger.radial_weight, *model.layers[1].product.parameters()]
            last = torch.autograd.grad(sum(s.square().sum() for s in slopes), weights)
            found.append([product.detach(), *(s.detach() for s in slopes), *last])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def _scene(model):
    from mdplug.pairs import pairs

    system = box()
    index = pairs(system, model.cutoff)
    vectors = system.positions[index.index[1]] - system.positions[index.index[0]]
    vectors = vectors + index.shifts.to(torch.float64) @ system.cell[0]
    vectors = vectors.to(model.embedding.dtype).requires_grad_(True)
    return model.species_of[system.numbers], index.index, vectors, len(system.numbers)


def test_contract_while_training(tmp_path):
    check(build(CONTRACT["residual"]).train(), [1, 8], tmp_path)


def test_a_pair_and_its_reverse_share_their_radial_functions():
    model = build({"kinds": ["A", "R"]}).train()
    species, index, vectors, n = _scene(model)
    graph = kernel_training.build_graph(model, species, index, vectors, n)
    assert 2 * len(graph.r) == len(graph.row)
    plain = vectors.detach().norm(dim=1)
    assert torch.allclose(torch.sort(graph.r[graph.row.long()])[0], torch.sort(plain[plain < model.cutoff])[0])
