"""Native operators against their definition in plain torch, over fuzzed shapes; and MACE on them against MACE."""

import dataclasses

import numpy as np
import pytest
import torch
from contract import check, liquid
from kernel_scene import scene
from mace_models import CONTRACT, FURTHER, box, build

import mdplug
from mdplug import kernels
from mdplug.deployed import Deployed, evaluate
from mdplug.kernels import reference
from mdplug.pairs import pairs
from mdplug.potentials.blocks.contraction import SymmetricContraction, sparse_polynomial
from mdplug.potentials.blocks.convolution import paths
from mdplug.potentials.blocks.kernel_graph import coupling
from mdplug.potentials.blocks.knots import LANES, in_blocks
from mdplug.potentials.mace_kernels import KernelMACE
from mdplug.system import AtomicSystem

native = pytest.mark.skipif(not kernels.available(), reason="the native library is not there")
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12}


def close(got, wanted):
    scale = max(float(wanted.abs().max()), 1e-3) if wanted.numel() else 1.0
    torch.testing.assert_close(got, wanted, atol=TOLERANCE[wanted.dtype] * scale, rtol=0)


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("l_max", [0, 1, 2, 3, 4])
def test_harmonics(dtype, l_max):
    for n in (0, 1, 7, 40):
        vectors, r, _, _, y, tables, g = scene(n, 9, dtype, l_max=l_max)
        arguments = (vectors, r, *tables, l_max)
        close(y, reference.harmonics(*arguments))
        grad, grad_r = torch.randn(y.shape, generator=g).to(dtype), torch.randn(len(r), generator=g).to(dtype)

        def whole(v, arguments=arguments, grad=grad, grad_r=grad_r):
            r = v.norm(dim=1)
            return (reference.harmonics(v, r, *arguments[2:]) * grad).sum() + (r * grad_r).sum()

        wanted = torch.autograd.functional.jacobian(whole, vectors.double()) if dtype == torch.float64 else None
        got = torch.ops.mdplug.harmonics_backward(*arguments, grad, grad_r)
        if wanted is not None:
            close(got, wanted)
        assert got.shape == vectors.shape


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tabulated", [True, False])
@pytest.mark.parametrize(("n", "degree", "b", "kinds"), [(0, 3, 8, 1), (1, 0, 8, 2), (3, 5, 5, 1), (40, 30, 24, 89)])
def test_density(dtype, tabulated, n, degree, b, kinds):
    _, r, _, first, y, _, g = scene(n, degree, dtype)
    e, knots, table_kinds = len(r), 17, 2
    table = torch.randn(table_kinds * knots, 3, b, generator=g).to(dtype) if tabulated else torch.zeros(0, dtype=dtype)
    values = torch.zeros(0, dtype=dtype) if tabulated else torch.randn(e, b, generator=g).to(dtype)
    kind = torch.randint(0, table_kinds, (e,), generator=g).to(torch.int32)
    species = torch.randint(0, kinds, (e,), generator=g).to(torch.int32)
    arguments = (y, table, values, r, kind, species, first, kinds, 0, n, 0.1, 0.2, knots)
    got = torch.ops.mdplug.density(*arguments)
    close(got, reference.density(*arguments))
    grad = torch.randn(got.shape, generator=g).to(dtype)
    wanted = reference.adjoint(reference.density, arguments, grad, (0, 3 if tabulated else 2))
    for one, other in zip(torch.ops.mdplug.density_backward(*arguments, grad), wanted, strict=True):
        close(one, other)


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tabulated", [True, False])
@pytest.mark.parametrize(
    ("n", "degree", "k", "l_in", "l_max"),
    [(0, 3, 8, 1, 2), (1, 0, 4, 0, 3), (3, 6, 5, 1, 3), (21, 9, 32, 0, 3), (9, 7, 17, 2, 3), (70, 9, 33, 1, 2)],
)
def test_convolution(dtype, tabulated, n, degree, k, l_in, l_max):
    ghosts = 2
    _, r, sender, first, y, _, g = scene(n, degree, dtype, ghosts=ghosts, l_max=l_max)
    e, knots = len(r), 17
    of = paths(l_in, l_max)
    index, value = coupling(of)
    block = LANES[dtype] * (2 if k % (2 * LANES[dtype]) == 0 else 1)
    sent = torch.randn((l_in + 1) ** 2, n + ghosts, k, generator=g).to(dtype)
    table = values = torch.zeros(0, dtype=dtype)
    if tabulated:
        flat = torch.randn(2 * knots, len(of) * 3, k, generator=g).to(dtype)
        shape = (-1, 2 * knots, len(of), 3, block)
        table = in_blocks(flat, block).transpose(0, 1).reshape(shape).contiguous()
    else:
        rows = max(e // 2, 1)  # some pairs share one
        values = in_blocks(torch.randn(rows, len(of), k, generator=g).to(dtype), block)
    kind = torch.randint(0, 2 if tabulated else rows, (e,), generator=g).to(torch.int32)
    arguments = (
        sent, y, table, values, r, kind, sender, first, torch.tensor(of, dtype=torch.int32), torch.from_numpy(index),
        torch.from_numpy(value), 0, n, 0.1, 0.2, knots,
    )  # fmt: skip
    got = torch.ops.mdplug.convolution(*arguments)
    close(got, reference.convolution(*arguments))
    grad = torch.randn(got.shape, generator=g).to(dtype)
    wanted = reference.adjoint(reference.convolution, arguments, grad, (0, 1, 4 if tabulated else 3))
    native_adjoint = torch.ops.mdplug.convolution_backward(*arguments, grad)
    for one, other in zip(native_adjoint, wanted, strict=True):
        close(one, other)
    threads = torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            assert torch.equal(torch.ops.mdplug.convolution(*arguments), got)
            again = torch.ops.mdplug.convolution_backward(*arguments, grad)
            assert all(torch.equal(a, b) for a, b in zip(again, native_adjoint, strict=True))
    finally:
        torch.set_num_threads(threads)


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("l_out", "degree", "k", "n"), [(0, 3, 5, 0), (1, 3, 16, 1), (2, 2, 17, 9), (0, 1, 3, 4)])
def test_polynomial(dtype, l_out, degree, k, n):
    g = torch.Generator().manual_seed(1)
    module = SymmetricContraction(2, l_out, degree, 89, k, torch.float64)
    for parameter in module.parameters():
        parameter.data.normal_(generator=g)
    nodes, term, starts, coefficients = sparse_polynomial(module)
    kind = torch.sort(torch.randint(0, 89, (n,), generator=g)).values
    inputs = torch.randn(9, n, k, generator=g).to(dtype)
    arguments = (
        inputs, in_blocks(coefficients.detach().to(dtype), LANES[dtype]), kind.to(torch.int32), nodes, term, starts,
    )  # fmt: skip
    got = torch.ops.mdplug.polynomial(*arguments)
    close(got, reference.polynomial(*arguments))
    grad = torch.randn(got.shape, generator=g).to(dtype)
    (wanted,) = reference.adjoint(reference.polynomial, arguments, grad, (0,))
    close(torch.ops.mdplug.polynomial_backward(*arguments, grad), wanted)
    if n:  # the definition of the definition: the dense form that training uses
        sizes = torch.bincount(kind, minlength=89)
        present = torch.nonzero(sizes).squeeze(1)
        dense = module(inputs.double(), present, sizes[present].tolist(), list(range(len(present))))
        close(got, dense.detach().to(dtype))


@native
@pytest.mark.parametrize("name", [*CONTRACT, *FURTHER])
@pytest.mark.parametrize("tables", [False, True])
def test_mace_on_kernels_is_mace(name, tables):
    model = build({**CONTRACT, **FURTHER}[name])
    fast = KernelMACE(model, tables)
    for system in (box(charge=1, spin=2), AtomicSystem.from_ase(liquid([1, 8], n=3, edge=4.1, seed=3))):
        wanted, got = evaluate(model, system), evaluate(fast, system)
        scale = (1e-5 if tables else 1e-11) * max(1.0, float(wanted.forces.abs().max()))
        assert torch.allclose(got.energy, wanted.energy, atol=scale, rtol=0)
        assert torch.allclose(got.forces, wanted.forces, atol=scale, rtol=0)
        assert torch.allclose(got.virial, wanted.virial, atol=30 * scale, rtol=0)
        assert torch.allclose(got.extras["features"], wanted.extras["features"], atol=30 * scale, rtol=0)
        assert torch.equal(evaluate(fast, system, forces=False).energy, got.energy)


@native
@pytest.mark.parametrize("name", ["residual", "nonlinear", "density"])
def test_contract_on_kernels(name, tmp_path):
    check(KernelMACE(build(CONTRACT[name]), False), [1, 8], tmp_path)


@native
def test_float32_tables_of_many_elements():
    """Tables are made for the elements at hand, and made anew for others."""
    species = tuple(range(1, 90))
    model = build({"kinds": ["A", "R"], "radial": {"transform": "agnesi"}}, species=species)
    fast = model.float().with_kernels(True)
    assert isinstance(fast, KernelMACE)
    exact = model.double()
    for kinds in ([1, 8], [3, 26, 79]):
        system = AtomicSystem.from_ase(liquid(kinds, n=16, edge=7.5, min_distance=1.9))
        wanted, got = evaluate(exact, system), evaluate(fast, system)
        assert 0 < fast.table_error < 1e-5
        assert float((got.forces - wanted.forces).abs().max()) < 1e-4 * max(1.0, float(wanted.forces.abs().max()))


@native
def test_load_takes_the_kernels(tmp_path):
    model = build({"l_hidden": 1})
    path = mdplug.save(model, tmp_path / "m.safetensors")
    for dtype, tables in (("float32", True), ("float64", False)):
        loaded = mdplug.load(path, dtype=dtype)
        assert isinstance(loaded, KernelMACE)
        assert loaded.tabulated is tables
        assert not isinstance(loaded.without_kernels(), KernelMACE)
    again = mdplug.load(mdplug.save(loaded, tmp_path / "again.safetensors"), dtype="float64")
    system = box()
    assert torch.equal(evaluate(again, system).forces, evaluate(loaded, system).forces)


@native
def test_order_of_pairs_and_skin_do_not_matter():
    model = KernelMACE(build({"l_hidden": 1}), False)
    system = box()
    tight, loose = pairs(system, model.cutoff), pairs(system, model.cutoff + 1.0)
    order = torch.randperm(loose.n_pairs, generator=torch.Generator().manual_seed(0))
    shuffled = dataclasses.replace(
        loose, index=loose.index[:, order], shifts=loose.shifts[order], vectors=loose.vectors[order]
    )
    wanted = evaluate(model, system, tight)
    assert torch.equal(evaluate(model, system, loose).forces, wanted.forces)
    np.testing.assert_allclose(evaluate(model, system, shuffled).forces, wanted.forces, atol=1e-12)


@native
def test_wrong_arguments_are_refused():
    with pytest.raises(RuntimeError, match="dtype"):
        torch.ops.mdplug.polynomial(torch.zeros(1, 1, 1), *[torch.zeros(1)] * 5)


def test_without_the_library_everything_runs_in_plain_torch(monkeypatch):
    monkeypatch.setattr("mdplug.kernels.available", lambda: False)
    model = build({}, dtype="float32")
    assert type(model.with_kernels(True)).__name__ == "MACE"
    assert not Deployed(model.with_kernels(True)).written
