"""Native operators against their definition in plain torch, over fuzzed shapes; and MACE on them against MACE."""

import dataclasses

import numpy as np
import pytest
import torch
from contract import check, liquid
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
from mace_models import CONTRACT, FURTHER, box, build
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import mdplug
from mdplug import kernels
from mdplug.compose import Ensemble, Sum
from mdplug.deployed import Deployed, evaluate
from mdplug.pairs import pairs
from mdplug.potentials.mace_kernels import KernelMACE
from mdplug.potentials.pair import ZBL
from mdplug.system import AtomicSystem

native = pytest.mark.skipif(not kernels.available(), reason="the native library is not there")
dtypes = pytest.mark.parametrize("dtype", DTYPES)
tables = pytest.mark.parametrize("tabulated", [True, False])


@native
@dtypes
@pytest.mark.parametrize("case", GRAPH)
def test_graph(case, dtype):
    check_graph(torch.ops.mdplug, *case, dtype)


@native
@dtypes
@pytest.mark.parametrize("l_max", HARMONICS)
def test_harmonics(dtype, l_max):
    check_harmonics(torch.ops.mdplug, dtype, l_max)


@native
@dtypes
@tables
@pytest.mark.parametrize("case", DENSITY)
def test_density(dtype, tabulated, case):
    check_density(torch.ops.mdplug, dtype, tabulated, *case)


@native
@dtypes
@tables
@pytest.mark.parametrize("case", CONVOLUTION)
def test_convolution(dtype, tabulated, case):
    ops = torch.ops.mdplug
    arguments, grad = check_convolution(ops, dtype, tabulated, *case)
    wanted = (ops.convolution(*arguments), *ops.convolution_backward(*arguments, grad))
    threads = torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            got = (ops.convolution(*arguments), *ops.convolution_backward(*arguments, grad))
            assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    finally:
        torch.set_num_threads(threads)


@native
@dtypes
@pytest.mark.parametrize("case", POLYNOMIAL)
def test_polynomial(dtype, case):
    check_polynomial(torch.ops.mdplug, dtype, *case)


@native
@dtypes
@pytest.mark.parametrize("case", PRODUCT)
def test_product(dtype, case):
    check_product(torch.ops.mdplug, dtype, *case)


@native
@dtypes
def test_linear(dtype):
    check_linear(torch.ops.mdplug, dtype)


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
@pytest.mark.parametrize("kind", [Sum, Ensemble])
def test_compositions_run_on_the_kernels(kind, tmp_path):
    """With a part that has no written adjoint, and one of another cutoff."""
    parts = [build({"l_hidden": 1}), build({}, cutoff=3.1), ZBL.new(2.0, 1.0)]
    plain = kind.of(parts)
    fast = plain.with_kernels(False)
    assert fast.has_written_adjoint
    assert not plain.has_written_adjoint
    wanted, got = evaluate(plain, box()), evaluate(fast, box())
    for what in ("energy", "forces", "virial"):
        torch.testing.assert_close(getattr(got, what), getattr(wanted, what), atol=1e-10, rtol=1e-11)
    assert got.extras.keys() == wanted.extras.keys()
    assert type(fast.without_kernels().parts[0]) is type(parts[0])
    loaded = mdplug.load(mdplug.save(plain, tmp_path / "m.safetensors"), dtype="float64")
    assert loaded.has_written_adjoint
    torch.testing.assert_close(evaluate(loaded, box()).forces, wanted.forces, atol=1e-10, rtol=0)


class Held(TorchDispatchMode):
    """Most bytes that tensors made inside have held at a time."""

    def __init__(self):
        super().__init__()
        self.known, self.most = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_flatten(out)[0]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.known[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.known = {key: value for key, value in self.known.items() if not value[0].expired()}
        self.most = max(self.most, sum(nbytes for _, nbytes in self.known.values()))
        return out


@native
@pytest.mark.parametrize("kinds", [["A", "R"], ["A", "R", "R", "R"]])
def test_memory(kinds):
    """A layer keeps what its polynomial took, (l_max + 1)^2 numbers a channel and atom, till its adjoint has run.

    Messages, as many, and their cotangents come on top for one layer at a time; pairs hold next to nothing here.
    """
    options = {"kinds": kinds, "channels": 64, "neighbours": [1.0] * len(kinds), "correlation": [3] * len(kinds)}
    model, n = KernelMACE(build(options), True), 300
    edge = 200.0  # A
    x = np.random.default_rng(0).random((n, 3)) * edge
    system = AtomicSystem.from_arrays([1, 8] * (n // 2), x, np.eye(3) * edge, True)
    evaluate(model, system)
    with Held() as held:
        evaluate(model, system)
    one = 16 * 64 * n * 8
    assert len(kinds) * one < held.most < (len(kinds) + 2.5) * one  # half of one: features of all layers, twice


@native
@pytest.mark.parametrize("name", ["density", "nonlinear", "three layers, l 2"])
def test_cotangents_of_any_output(name):
    """As often as wanted from one forward pass; truth is autograd through the definition."""
    model = build({**CONTRACT, **FURTHER}[name]).eval()  # training credits the slope of a pair and its reverse to one
    system = box()
    near = pairs(system, model.cutoff)
    rest = (len(system.numbers), system.system_index, system.total_charge, system.total_spin, system.head)
    vectors = near.vectors.clone().requires_grad_(True)
    out = model.local(system.numbers, near.index, vectors, *rest)
    got, pull = KernelMACE(model, False).local_with_pull(system.numbers, near.index, near.vectors, *rest)
    generator = torch.Generator().manual_seed(5)
    for keys in (["atom_energy"], ["features"], ["atom_energy", "features"]):
        cotangents = {k: torch.randn(got[k].shape, generator=generator, dtype=torch.float64) for k in keys}
        products = [(out[k] * c).sum() for k, c in cotangents.items()]
        (wanted,) = torch.autograd.grad(products, [vectors], retain_graph=True)
        scale = max(1.0, float(wanted.abs().max()))
        torch.testing.assert_close(pull(cotangents), wanted, atol=1e-11 * scale, rtol=0)


@native
def test_new_weights_take_effect():
    model, other = build({"l_hidden": 1}), build({"l_hidden": 1})
    for parameter in other.parameters():
        parameter.data.mul_(1.1)
    fast, system = KernelMACE(model, False), box()
    evaluate(fast, system)
    fast.load_state_dict(KernelMACE(other, False).state_dict())
    assert torch.allclose(evaluate(fast, system).forces, evaluate(other, system).forces, atol=1e-11, rtol=0)


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
    monkeypatch.setattr("mdplug.kernels.available", lambda device: False)
    model = build({}, dtype="float32")
    assert type(model.with_kernels(True)).__name__ == "MACE"
    assert not Deployed(model.with_kernels(True)).written
