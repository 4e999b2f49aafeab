"""The Triton operators compiled for a device that need not be there; test_kernels_triton.py runs this by itself.

Launches are caught: each kernel is compiled with the types of its arguments, by Triton and ptxas, for compute
capability 9.0. Nothing runs; what is asserted is that registers suffice.
"""

import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
from kernel_cases import DTYPES, scene
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mdplug.kernels.triton import convolution, density, harmonics, operators, pair_list, polynomial
from mdplug.kernels.triton.source import OPTIONS
from mdplug.potentials.blocks.contraction import SymmetricContraction, sparse_polynomial
from mdplug.potentials.blocks.convolution import paths
from mdplug.potentials.blocks.kernel_graph import coupling
from mdplug.potentials.blocks.knots import LANES, in_blocks

OPS = SimpleNamespace(**operators())
TYPES = {torch.float32: "*fp32", torch.float64: "*fp64", torch.int32: "*i32", torch.int64: "*i64"}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
dtypes = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture
def used(monkeypatch, tmp_path):
    """[(kernel, registers, bytes spilt)] of what is launched in a test."""
    found = []

    def compile_only(kernel, grid, arguments, constants, warps=1):
        names = kernel.arg_names
        kinds = [TYPES[a.dtype] if isinstance(a, torch.Tensor) else "i32" for a in arguments]
        signature = dict(zip(names, kinds, strict=False)) | dict.fromkeys(constants, "constexpr")
        aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(kinds) if kind != "i32"}
        fixed = {(names.index(name),): value for name, value in constants.items()}
        source = ASTSource(kernel, signature, fixed, aligned)
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, **OPTIONS})
        cubin = tmp_path / "kernel.cubin"
        cubin.write_bytes(made.asm["cubin"])
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True)
        registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout).groups()
        found.append((kernel.__name__, int(registers), int(stack)))
        print(*found[-1])

    for module in (convolution, density, harmonics, pair_list, polynomial):
        monkeypatch.setattr(module, "launch", compile_only)
    return found


@dtypes
def test_first_layer(dtype, used):
    vectors, r, _, first, y, tables, _ = scene(3, 4, dtype)
    OPS.harmonics(vectors, r, *tables, 3)
    OPS.harmonics_backward(vectors, r, *tables, 3, y, r)
    none, zero = r[:0], torch.zeros(len(r), dtype=torch.int32)
    for table, values in ((torch.zeros(34, 3, 12, dtype=dtype), none), (none, torch.zeros(len(r), 8, dtype=dtype))):
        arguments = (y, table, values, r, zero, zero, first, 3, 0, 3, 0.1, 0.2, 17)
        OPS.density_backward(*arguments, OPS.density(*arguments))
    assert not [one for one in used if one[2]]


@dtypes
@pytest.mark.parametrize(("l_in", "k"), [(0, 96), pytest.param(1, 128, marks=pytest.mark.slow)])
def test_convolution(dtype, l_in, k, used):
    _, r, sender, first, y, _, _ = scene(3, 4, dtype, ghosts=2)
    of, block = paths(l_in, 3), 2 * LANES[dtype]
    index, value = coupling(of)
    structure = (torch.tensor(of, dtype=torch.int32), torch.from_numpy(index), torch.from_numpy(value))
    sent = torch.zeros((l_in + 1) ** 2, 5, k, dtype=dtype)
    table = torch.zeros(k // block, 34, len(of), 3, block, dtype=dtype)
    kind = torch.zeros(len(r), dtype=torch.int32)
    for radial in ((table, r[:0]), (r[:0], torch.zeros(len(r), k // block, len(of), block, dtype=dtype))):
        arguments = (sent, y, *radial, r, kind, sender, first, *structure, 0, 3, 0.1, 0.2, 17)
        OPS.convolution_backward(*arguments, OPS.convolution(*arguments))
    assert not [one for one in used if one[2]]


@dtypes
@pytest.mark.parametrize("l_out", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_polynomial(dtype, l_out, used):
    module = SymmetricContraction(3, l_out, 3, 2, 128, torch.float64)
    nodes, term, starts, coefficients = sparse_polynomial(module)
    arguments = (
        torch.zeros(16, 4, 128, dtype=dtype), in_blocks(coefficients.detach().to(dtype), LANES[dtype]),
        torch.zeros(4, dtype=torch.int32), nodes, term, starts,
    )  # fmt: skip
    OPS.polynomial_backward(*arguments, OPS.polynomial(*arguments))
    assert not [one for one in used if one[2]]


@dtypes
def test_sums(dtype, used):
    pairs, system = torch.zeros(2, 5, dtype=torch.int64), torch.tensor([0, 0, 1])
    vectors = torch.zeros(5, 3, dtype=torch.float64)
    OPS.sum_pairs(vectors, vectors.to(dtype), pairs, torch.zeros(3, dtype=dtype), system, 2)
    assert len(used) == 3
    assert not [one for one in used if one[2]]
