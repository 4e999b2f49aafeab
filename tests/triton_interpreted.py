"""The Triton operators in Triton's interpreter, on CPU tensors; test_kernels_triton.py runs this in its own process.

An interpreted operation takes tens of microseconds whatever its size, so the scenes have few pairs.
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from contract import liquid
from kernel_cases import (
    CONVOLUTION,
    DENSITY,
    DTYPES,
    GRAPH,
    HARMONICS,
    POLYNOMIAL,
    PRODUCT,
    check_convolution,
    check_density,
    check_graph,
    check_harmonics,
    check_linear,
    check_polynomial,
    check_product,
)
from mace_models import CONTRACT, FURTHER, build

from mdplug import kernels
from mdplug.deployed import totals
from mdplug.kernels.triton import operators
from mdplug.pairs import pairs, translations, within
from mdplug.potentials import mace_kernels
from mdplug.potentials.blocks import kernel_layer
from mdplug.system import AtomicSystem, batch

MANY_PAIRS = 60  # atoms times most neighbours; from here on a case takes up to a minute
OPS = SimpleNamespace(**operators())
dtypes = pytest.mark.parametrize("dtype", DTYPES)
tables = pytest.mark.parametrize("tabulated", [True, False])


def sized(cases, *more):
    """The cases, those of many pairs marked slow, and some more."""
    many = [pytest.param(c, marks=pytest.mark.slow) if c[0] * c[1] >= MANY_PAIRS else c for c in cases]
    return pytest.mark.parametrize("case", [*many, *more])


@dtypes
@pytest.mark.parametrize("case", GRAPH)
def test_graph(case, dtype):
    check_graph(OPS, *case, dtype)


@dtypes
@pytest.mark.parametrize("l_max", HARMONICS)
def test_harmonics(dtype, l_max):
    check_harmonics(OPS, dtype, l_max)


@dtypes
@tables
@sized(DENSITY, (4, 6, 24, 7))
def test_density(dtype, tabulated, case):
    check_density(OPS, dtype, tabulated, *case)


@dtypes
@tables
@sized(CONVOLUTION, (4, 5, 32, 0, 3), (4, 3, 33, 1, 2), (3, 3, 17, 2, 3))
def test_convolution(dtype, tabulated, case):
    check_convolution(OPS, dtype, tabulated, *case)


@dtypes
@pytest.mark.parametrize("case", POLYNOMIAL)
def test_polynomial(dtype, case):
    check_polynomial(OPS, dtype, *case)


@dtypes
@pytest.mark.parametrize("case", PRODUCT)
def test_product(dtype, case):
    check_product(OPS, dtype, *case)


@dtypes
def test_linear(dtype):
    check_linear(OPS, dtype)


def crowd(n, edge, pbc=True, seed=0):
    rng = np.random.default_rng(seed)
    cell = edge * (np.eye(3) + 0.2 * rng.standard_normal((3, 3)))
    return AtomicSystem.from_arrays(rng.integers(1, 9, n), rng.random((n, 3)) @ cell, cell, pbc)


CROWDS = {
    "one atom": lambda: crowd(1, 30.0),
    "one atom and its images": lambda: crowd(1, 2.3),
    "slab": lambda: crowd(30, 8.0, (True, False, True)),
    "several": lambda: batch([crowd(9, 6.0), crowd(1, 40.0, seed=2), crowd(40, 7.0, False, 3), crowd(4, 3.0, seed=4)]),
}
crowds = pytest.mark.parametrize("name", list(CROWDS))


@crowds
def test_pair_list(name, monkeypatch):
    """As torch's own operators have it, to the last bit; lists that do not hold and overlaps as well."""
    system = CROWDS[name]()
    loose = pairs(system, 5.0)
    rng = np.random.default_rng(7)
    x = system.positions + torch.from_numpy(rng.normal(0, 0.02, (system.n_atoms, 3)))
    of = (loose.index, loose.shifts, translations(system, loose.index, loose.shifts))
    monkeypatch.setattr(kernels, "serves", lambda _: False)
    wanted = within(system.with_(positions=x), system, *of, 4.0, 0.5)
    got = OPS.pair_list(x, system.positions, *of, 4.0, 1e-6, 0.5)
    for one, other in zip(got[:3], (wanted.index, wanted.shifts, wanted.vectors), strict=True):
        assert torch.equal(one, other)
    assert got[3:] == (-1, 1)
    x[0, 1] += 0.6
    *empty, overlap, holds = OPS.pair_list(x, system.positions, *of, 4.0, 1e-6, 0.5)
    assert (overlap, holds) == (-1, 0)
    assert [tuple(one.shape) for one in empty] == [(2, 0), (0, 3), (0, 3)]
    if loose.n_pairs and system.n_atoms > 1:
        e = int((loose.distances == loose.distances.min()).nonzero()[0])
        x = system.positions.clone()
        x[loose.index[0, e]] += loose.vectors[e] * (1 - 1e-9)
        *_, overlap, holds = OPS.pair_list(x, system.positions, *of, 4.0, 1e-6, math.inf)
        assert holds
        assert set(loose.index[:, overlap].tolist()) == set(loose.index[:, e].tolist())


@dtypes
@crowds
@pytest.mark.parametrize("shuffled", [False, True])
def test_sums(name, shuffled, dtype, monkeypatch):
    system = CROWDS[name]()
    found = pairs(system, 4.0)
    g = torch.Generator().manual_seed(3)
    order = torch.randperm(found.n_pairs, generator=g) if shuffled else torch.arange(found.n_pairs)
    index, r = found.index[:, order].contiguous(), found.vectors[order]
    gradient = torch.randn(r.shape, generator=g, dtype=torch.float64).to(dtype)
    atom_energy = torch.randn(system.n_atoms, generator=g, dtype=torch.float64).to(dtype)
    of = (r, gradient, index, atom_energy, system.system_index)
    monkeypatch.setattr(kernels, "serves", lambda _: False)
    wanted = totals(*of, system.positions, system.cell)
    got = dict(zip(("energy", "forces", "virial"), OPS.sum_pairs(*of, system.n_systems), strict=True))
    for key in got:
        assert got[key].dtype == torch.float64
        scale = max(1.0, float(wanted[key].abs().max()))
        torch.testing.assert_close(got[key], wanted[key], atol=1e-13 * scale, rtol=0)
    torch.testing.assert_close(OPS.sum_atoms(*of[3:], system.n_systems), got["energy"], atol=0, rtol=0)


def test_what_is_made_of_tensors_follows_them():
    """Kernels are made anew when the lists that they were made of change."""
    vectors = torch.randn(3, 3, dtype=torch.float64)
    left, right = torch.tensor([1], dtype=torch.int32), torch.tensor([0], dtype=torch.int32)
    table = torch.eye(5, 9, dtype=torch.float64)
    for axis in range(3):
        right[0] = axis
        y = OPS.harmonics(vectors, vectors.norm(dim=1), left, right, table, 2)
        unit = -vectors / vectors.norm(dim=1, keepdim=True)
        torch.testing.assert_close(y[:, 4], unit[:, 0] * unit[:, axis])


def test_wrong_arguments_are_refused():
    with pytest.raises(RuntimeError, match="dtype"):
        OPS.polynomial(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1, 16).double(), *[torch.zeros(1)] * 4)


@pytest.mark.parametrize(
    ("name", "tables"),
    [
        ("residual", False),
        ("residual", True),
        pytest.param("density", True, marks=pytest.mark.slow),
        pytest.param("nonlinear", False, marks=pytest.mark.slow),
        pytest.param("three layers, l 2", False, marks=pytest.mark.slow),
    ],
)
def test_mace(name, tables, monkeypatch):
    """A whole model, its operators swapped: energies and pair gradients of MACE in plain torch, float64."""
    if tables and not kernels.available():
        pytest.skip("tables are compared with the native operators on the same tables")
    model = build({**CONTRACT, **FURTHER}[name]).eval()  # training credits the slope of a pair and its reverse to one
    fast = mace_kernels.KernelMACE(model, tables)
    system = AtomicSystem.from_ase(liquid([1, 8], n=3, edge=4.1, seed=3))
    near = pairs(system, model.cutoff)
    zero = torch.zeros(1, dtype=torch.int64)
    vectors = torch.as_tensor(near.vectors, dtype=torch.float64)
    head = (torch.as_tensor(system.numbers, dtype=torch.int64), torch.as_tensor(near.index))
    rest = (3, torch.zeros(3, dtype=torch.int64), zero.double(), zero.double() + 1, zero)
    if tables:
        wanted = fast.local_with_gradient(*head, vectors, *rest)
    else:
        leaf = vectors.clone().requires_grad_(True)
        out = model.local(*head, leaf, *rest)
        wanted = {what: tensor.detach() for what, tensor in out.items()}
        wanted["pair_gradient"] = torch.autograd.grad(out["atom_energy"].sum(), leaf)[0]
    for module in (mace_kernels, kernel_layer):
        monkeypatch.setattr(module, "ops", OPS)
    got = fast.local_with_gradient(*head, vectors, *rest)
    for what in ("atom_energy", "pair_gradient", "features"):
        scale = max(1.0, float(wanted[what].abs().max()))
        torch.testing.assert_close(got[what], wanted[what], atol=1e-10 * scale, rtol=0)
