"""The Triton operators in Triton's interpreter, on CPU tensors; test_kernels_triton.py runs this in its own process.

An interpreted operation takes tens of microseconds whatever its size, so the scenes have few pairs.
"""

from types import SimpleNamespace

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
from mdplug.kernels.triton import operators
from mdplug.pairs import pairs
from mdplug.potentials import mace_kernels
from mdplug.potentials.blocks import kernel_layer
from mdplug.system import AtomicSystem

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
