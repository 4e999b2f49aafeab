"""Potentials on a CUDA device that is pretended (see pretend_cuda.py); test_kernels_triton.py runs this by itself.

The whole way of a user: `load(..., device="cuda:0")`, ASE's calculator, steps of MD; results are those of the CPU.
"""

import re

import numpy as np
import pytest
import torch
from contract import liquid
from mace_models import CONTRACT, FURTHER, build
from pretend_cuda import DEVICE, OnDevice, held, pretended_cuda

import mdplug
from mdplug import kernels
from mdplug.deployed import evaluate
from mdplug.errors import InputError
from mdplug.kernels import schemas
from mdplug.kernels import triton as backend
from mdplug.pairs import pairs
from mdplug.potentials.blocks import kernel_layer
from mdplug.potentials.mace import MACE
from mdplug.potentials.mace_kernels import KernelMACE
from mdplug.potentials.members import SharedMembers
from mdplug.potentials.pair import LennardJones
from mdplug.system import AtomicSystem, batch
from mdplug.uncertainty import uncertainty

A_STEP = [  # what the host waits for in a step: all of it before the model runs, or after
    "positions go to the device", "they are finite", "candidates inside the cutoff", "pairs of the model",
    "energy", "energies", "forces", "virial",
]  # fmt: skip
SMALL = {"kinds": ["A", "R"], "l_hidden": 1, "l_max": 2, "correlation": [2, 2], "repulsion": True}
slow = pytest.mark.slow


def small(seed=3):
    return liquid([1, 8], n=3, edge=4.1, seed=seed)


def close(got, wanted, tolerance=1e-10):
    got, wanted = (np.asarray(x) for x in (got, wanted))
    np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * max(1.0, np.abs(wanted).max()))


def trajectory(model, after=lambda: None):
    """Energy, energies, forces and stress of some steps, small ones, in one list of pairs."""
    atoms, found = small(), []
    atoms.calc = mdplug.Calculator(model)
    for step in range(2):
        atoms.positions += 0.02 * np.sin(np.arange(9) + step).reshape(3, 3)
        after()
        found.append([atoms.get_potential_energy(), atoms.get_potential_energies(), atoms.get_forces()])
        found[-1].append(atoms.get_stress())
    return found


@pytest.mark.parametrize(
    ("name", "radial"),
    [
        ("small", "exact"),
        pytest.param("residual", "tables", marks=slow),
        pytest.param("density, agnesi", "tables", marks=slow),
        pytest.param("nonlinear", "exact", marks=slow),
        pytest.param("state", "exact", marks=slow),
    ],
)
def test_steps(name, radial, tmp_path, monkeypatch):
    """Float64: equal to the CPU's, on operators from first to last, the host waiting for no layer."""
    path = mdplug.save(build({**CONTRACT, **FURTHER, "small": SMALL}[name]), tmp_path / "m.safetensors")
    wanted = trajectory(mdplug.load(path, dtype="float64", radial=radial))
    with pretended_cuda(monkeypatch) as device:
        model = mdplug.load(path, device="cuda:0", dtype="float64", radial=radial)
        assert isinstance(model, KernelMACE)
        assert model.tabulated is (radial == "tables")
        assert next(model.parameters()).device == DEVICE
        got = trajectory(model, device.waits.clear)
    for step, same in zip(got, wanted, strict=True):
        for one, other in zip(step, same, strict=True):
            close(one, other)
    states = [wait for wait in device.waits if "readout.py" in wait]  # charge and spin are looked at at every step
    assert len(device.waits) - len(states) == len(A_STEP), "\n".join(device.waits)
    assert [wait for wait in device.waits if "potentials" in wait] == states
    assert len(states) <= 2
    unused = set(schemas.SCHEMAS) - set(device.ran) - {"polynomial", "polynomial_backward", "sum_atoms"}
    if name == "state":  # charge and spin: elements alone do not say what neighbours send
        unused -= {"density", "density_backward"}
    if name == "nonlinear":  # gates between the messages and the polynomial
        unused -= {"density", "density_backward", "product", "product_backward"}
    assert not unused


@slow
@pytest.mark.parametrize("at_a_time", [kernel_layer.AT_A_TIME, 200])
def test_several_structures_and_parts(at_a_time, monkeypatch):
    """A batch; with radial functions of some atoms at a time; energies alone; moved from the CPU, and back."""
    monkeypatch.setattr(kernel_layer, "AT_A_TIME", at_a_time)
    model = build(SMALL).eval()
    system = batch([AtomicSystem.from_ase(small(seed)) for seed in (3, 4)])
    wanted = evaluate(model, system)
    with pretended_cuda(monkeypatch):
        fast = KernelMACE(model, False).to(DEVICE)
        there = system.to(DEVICE)
        for _ in range(2):
            got = evaluate(fast, there)
            for what in ("energy", "forces", "virial"):
                close(getattr(got, what).cpu(), getattr(wanted, what))
        close(evaluate(fast, there, forces=False).energy.cpu(), wanted.energy)
        close(evaluate(fast.to("cpu"), system).forces, wanted.forces)


def test_ghosts(monkeypatch):
    """An owner of two of three atoms: features of the third come by the exchange."""
    model = build(SMALL).eval()
    system = AtomicSystem.from_ase(small())
    found = pairs(system, model.cutoff)
    own = found.index[0] < 2
    zero = torch.zeros(1, dtype=torch.int64)
    arguments = [
        system.numbers, found.index[:, own], found.vectors[own], 2, torch.zeros(3, dtype=torch.int64), zero.double(),
        zero.double() + 1, zero,
    ]  # fmt: skip
    leaf = arguments[2].clone().requires_grad_(True)
    wanted = model.local(*arguments[:2], leaf, *arguments[3:])
    gradient = torch.autograd.grad(wanted["atom_energy"].sum(), leaf)[0]
    with pretended_cuda(monkeypatch):
        fast = KernelMACE(model, False).to(DEVICE)
        there = [one.to(DEVICE) if isinstance(one, torch.Tensor) else one for one in arguments]
        got = fast.local_with_gradient(*there)
    close(held(got["atom_energy"]), wanted["atom_energy"].detach())
    close(held(got["pair_gradient"]), gradient)


@slow
def test_members_on_one_body(tmp_path, monkeypatch):
    """Loaded onto the device: energies, forces, and the members' disagreement, whose pulls share one forward pass."""
    body, system = build(SMALL), AtomicSystem.from_ase(small())
    found = pairs(system, body.cutoff)
    model = SharedMembers.of(body, 3, evaluate(body, system).extras["features"].shape[1])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model.weight.copy_(torch.randn(model.weight.shape, generator=generator, dtype=torch.float64))
    path = mdplug.save(model, tmp_path / "m.safetensors")
    here = mdplug.load(path, dtype="float64")
    wanted = [evaluate(here, system).forces, uncertainty(here, system, found).forces]
    assert wanted[1].min() > 1e-4
    with pretended_cuda(monkeypatch):
        there, on_device = mdplug.load(path, device="cuda:0", dtype="float64"), system.to(DEVICE)
        assert isinstance(there.parts[0], KernelMACE)
        got = evaluate(there, on_device).forces, uncertainty(there, on_device, pairs(on_device, there.cutoff)).forces
        got = [one.cpu() for one in got]
    for one, other in zip(got, wanted, strict=True):
        close(one, other)


@pytest.mark.parametrize("tables", [False, True])
def test_without_triton_it_is_plain_torch(tables, tmp_path, monkeypatch):
    """The definition runs on a device too; it has no need of the operators."""
    path = mdplug.save(build(CONTRACT["residual"]), tmp_path / "m.safetensors")
    lj = LennardJones.new(0.01, 2.2, 3.5)
    radial = "tables" if tables else "exact"
    plain = [mdplug.load(path, dtype="float64", radial=radial).without_kernels(), lj]
    wanted = [trajectory(model) for model in plain]
    monkeypatch.setattr(backend, "find_spec", lambda _: None)
    for cached in (backend.why_not, kernels.why_not):
        cached.cache_clear()
    with pretended_cuda(monkeypatch) as device:
        with pytest.warns(UserWarning, match="plain torch.*triton is not installed"):
            model = mdplug.load(path, device="cuda:0", dtype="float64", radial=radial)
        assert type(model) is MACE
        with pytest.raises(InputError, match=r"no kernels on cuda:0, triton is not installed; move what without_"):
            KernelMACE(build({}), False).to(DEVICE)
        got = [trajectory(one) for one in (model, lj.to(DEVICE))]
        assert not device.ran
    for cached in (backend.why_not, kernels.why_not):
        cached.cache_clear()
    for all_steps, same in zip(got, wanted, strict=True):
        for step, other in zip(all_steps, same, strict=True):
            for one, two in zip(step, other, strict=True):
                close(one, two)


def test_the_pretended_device_is_strict(monkeypatch):
    """Operands on two devices are refused; what a device would wait for is noted."""
    with pretended_cuda(monkeypatch) as device:
        here, there = torch.arange(6.0), torch.arange(6.0, device="cuda:0")
        with pytest.raises(RuntimeError, match="operands on two devices"):
            here + there
        with pytest.raises(RuntimeError, match="operands on two devices"):
            there.index_select(0, torch.tensor([1]))
        device.waits.clear()
        assert isinstance(there * 2.0 + there[2:3], OnDevice)
        assert not device.waits
        waiting = [
            lambda: float(there[1]), lambda: bool((there > 2).any()), lambda: there.tolist(), lambda: there.cpu(),
            lambda: there[there > 1], lambda: (there > 1).nonzero(), lambda: torch.equal(there, there + 1),
            lambda: there[[1, 2]], lambda: here.to(DEVICE), lambda: torch.unique(there),
            lambda: torch.repeat_interleave(there, there.long()),
        ]  # fmt: skip
        for number, wait in enumerate(waiting):
            device.waits.clear()
            wait()
            assert device.waits, number
        assert re.search("elsewhere", device.waits[0])
