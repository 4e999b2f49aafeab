"""Triton operators: in the interpreter and compiled, each in a process of its own; registration; on a device if any.

TRITON_INTERPRET has to be set before Triton is first imported, and holds for a whole process.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
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
from mace_models import CONTRACT, box, build

import mdplug
from mdplug import kernels
from mdplug.deployed import evaluate
from mdplug.kernels import schemas
from mdplug.kernels import triton as backend
from mdplug.potentials.mace_kernels import KernelMACE

TESTS = Path(__file__).parents[1]
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed (extra dev, Linux)")
dtypes = pytest.mark.parametrize("dtype", DTYPES)


def in_process(script: str, tmp_path: Path, *options: str, **environment: str) -> None:
    """pytest on tests/`script`, in another process."""
    environment = {"TRITON_CACHE_DIR": str(tmp_path), **environment}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / script), *options]
    done = subprocess.run(command, cwd=TESTS.parent, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_triton
@pytest.mark.parametrize("which", ["not convolution and not mace", "convolution", "mace"])
def test_interpreted(which, tmp_path):
    in_process("triton_interpreted.py", tmp_path, "-k", which, TRITON_INTERPRET="1")


@needs_triton
def test_on_a_pretended_device(tmp_path):
    in_process("triton_on_device.py", tmp_path, TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("which", ["steps", "not steps"])
def test_on_a_pretended_device_at_length(which, tmp_path):
    in_process("triton_on_device.py", tmp_path, "-m", "slow", "-k", which, TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("which", ["density", "convolution and dtype0", "convolution and dtype1", "mace"])
def test_interpreted_at_length(which, tmp_path):
    in_process("triton_interpreted.py", tmp_path, "-m", "slow", "-k", f"test_{which}", TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_compiled(which, tmp_path):
    in_process("triton_compiled.py", tmp_path, "-m", which, TRITON_INTERPRET="0")


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


REGISTERED = """
import torch
from mdplug import kernels
from mdplug.kernels import schemas, triton
{before}
triton.register()
triton.register()
for name in schemas.SCHEMAS:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"mdplug::{{name}}", "CUDA"), name
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"mdplug::{{name}}", "CPU") == {native}, name
"""


@needs_triton
@pytest.mark.skipif(not kernels.available(), reason="the native library is not there")
def test_registered_beside_the_native_operators():
    run(REGISTERED.format(before="", native=True))


@needs_triton
def test_registered_without_the_native_library():
    run(REGISTERED.format(before="kernels.LIBRARY = 'none.so'", native=False))


@pytest.mark.skipif(not kernels.available(), reason="the native library is not there")
def test_schemas_are_those_of_the_native_library():
    for name, schema in schemas.SCHEMAS.items():
        assert str(getattr(torch.ops.mdplug, name).default._schema) == f"mdplug::{name}{schema}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_so_and_imports_nothing():
    run(
        "import sys; from mdplug.kernels import triton; assert 'CUDA' in triton.why_not();"
        "assert 'triton' not in sys.modules"
    )


@pytest.mark.gpu
@needs_triton
class TestOnADevice:
    """The cases of the CPU, arguments moved to the device and results back."""

    @pytest.fixture(scope="class")
    def ops(self):
        assert backend.available(), backend.why_not()

        def moved(operator):
            def call(*arguments):
                out = operator(*(a.cuda() if isinstance(a, torch.Tensor) else a for a in arguments))
                return out.cpu() if isinstance(out, torch.Tensor) else tuple(one.cpu() for one in out)

            return call

        return SimpleNamespace(**{name: moved(getattr(torch.ops.mdplug, name)) for name in schemas.SCHEMAS})

    @dtypes
    def test_all(self, ops, dtype):
        for case in GRAPH:
            check_graph(ops, *case, dtype)
        for l_max in HARMONICS:
            check_harmonics(ops, dtype, l_max)
        for tabulated in (True, False):
            for case in DENSITY:
                check_density(ops, dtype, tabulated, *case)
            for case in CONVOLUTION:
                check_convolution(ops, dtype, tabulated, *case)
        for case in POLYNOMIAL:
            check_polynomial(ops, dtype, *case)
        for case in PRODUCT:
            check_product(ops, dtype, *case)
        check_linear(ops, dtype)

    @pytest.mark.parametrize("name", list(CONTRACT))
    def test_models(self, ops, name, tmp_path):
        path = mdplug.save(build(CONTRACT[name]), tmp_path / "m.safetensors")
        system = box(charge=1, spin=2)
        for dtype, tolerance in (("float64", 1e-10), ("float32", 1e-4)):
            wanted = evaluate(mdplug.load(path, dtype=dtype), system)
            there = mdplug.load(path, device="cuda", dtype=dtype)
            assert isinstance(there, KernelMACE)
            got = evaluate(there, system.to("cuda"))
            for what in ("energy", "forces", "virial"):
                other = getattr(wanted, what)
                scale = tolerance * max(1.0, float(other.abs().max()))
                torch.testing.assert_close(getattr(got, what).cpu(), other, atol=scale, rtol=0)
