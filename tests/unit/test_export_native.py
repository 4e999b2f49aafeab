"""Files on the native operators: equal to the eager form, without a tape, and clear where the operators are missing."""

import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from contract import liquid
from mace_models import CONTRACT, FURTHER, box, build
from torch_alone import with_torch_alone

import mdplug
from mdplug import kernels
from mdplug.artifact import read_spec
from mdplug.cli import main
from mdplug.compose import Ensemble, Sum
from mdplug.deployed import Deployed, call, evaluate
from mdplug.errors import InputError, ModelFileError
from mdplug.export import export, for_torchforce, native
from mdplug.pairs import pairs
from mdplug.potentials.mace_kernels import MOST_SPECIES, KernelMACE
from mdplug.potentials.pair import ZBL, LennardJones
from mdplug.system import AtomicSystem, batch
from mdplug.units import KJ_MOL_PER_EV, NM
from mdplug.workflows.export import Config, run

MODELS = {**CONTRACT, **FURTHER}
built = pytest.mark.skipif(not kernels.available(), reason="the native library is not there")


def systems():
    """A liquid, several structures at once, a cell below the cutoff, one atom; charge and spin set."""
    tiny = AtomicSystem.from_ase(liquid([1, 8], n=3, edge=4.1, seed=3))
    alone = AtomicSystem.from_ase(liquid([8], n=1, pbc=False))
    return [box(charge=1, spin=2), batch([box(seed=2, charge=-1, spin=1), tiny]), tiny, alone]


def same(got, wanted, tolerance):
    scale = tolerance * max(1.0, float(wanted.forces.abs().max()))
    torch.testing.assert_close(got.forces, wanted.forces, atol=scale, rtol=0)
    torch.testing.assert_close(got.energy, wanted.energy, atol=20 * scale, rtol=0)
    torch.testing.assert_close(got.virial, wanted.virial, atol=20 * scale, rtol=0)
    assert got.extras.keys() == wanted.extras.keys()
    for key, value in wanted.extras.items():
        torch.testing.assert_close(got.extras[key], value, atol=20 * scale, rtol=20 * tolerance)


@built
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, "float64") for name in MODELS]
    + [(name, "float32") for name in (*CONTRACT, "density, agnesi", "three layers, l 2", "degree 4")],
)
def test_file_is_the_eager_form(name, dtype, tmp_path):
    """Exact radial functions in float64, tables in float32; TorchScript runs other code from its third call on."""
    model = mdplug.save(build(MODELS[name]), tmp_path / "m.safetensors")
    eager = mdplug.load(model, dtype=dtype)
    assert isinstance(eager, KernelMACE)
    loaded = mdplug.load(export(model, tmp_path / "m.pt", "native", dtype=dtype))
    assert (loaded.target, loaded.spec.dtype) == ("native", dtype)
    for system in systems():
        wanted = evaluate(eager, system)
        for _ in range(3):
            same(evaluate(loaded, system), wanted, 1e-10 if dtype == "float64" else 2e-6)


@built
@pytest.mark.parametrize("name", ["residual", "density", "nonlinear", "state"])
@pytest.mark.parametrize("tables", [True, False])
def test_no_tape(name, tables):
    """Not in the file, and not in the eager form: nothing asks for gradients, and inference mode does not matter."""
    model = KernelMACE(build(MODELS[name]), tables)
    system = box(charge=1, spin=2)
    near = pairs(system, model.cutoff)
    for form in (Deployed(model), native(model)):
        wanted = call(form, system, near)
        with torch.inference_mode():
            got = call(form, system, near)
        with torch.enable_grad():
            positions = system.positions.clone().requires_grad_(True)
            arguments = (system.cell, system.pbc, near.index, near.shifts, system.system_index)
            rest = (system.total_charge, system.total_spin, system.head)
            recorded = form(system.numbers, positions, *arguments, *rest)
        assert wanted.keys() == got.keys() == recorded.keys() >= {"energy", "forces", "virial", "atom_energy"}
        for key, value in wanted.items():
            assert not value.requires_grad
            assert not recorded[key].requires_grad
            assert torch.equal(got[key], value)
            torch.testing.assert_close(recorded[key], value, atol=1e-11, rtol=1e-11)


@built
def test_gradients_of_higher_order_come_from_the_definition(tmp_path):
    potential, system = build({"l_hidden": 1}), box()
    loaded = mdplug.load(export(potential, tmp_path / "m.pt", "native"))
    p = evaluate(loaded, system, create_graph=True)
    assert p.forces.requires_grad
    torch.testing.assert_close(p.forces.detach(), evaluate(potential, system).forces, atol=1e-11, rtol=0)
    assert torch.equal(evaluate(loaded, system, forces=False).energy, evaluate(loaded, system).energy)


@built
def test_heads_charge_and_spin(tmp_path):
    potential = build(MODELS["state"], heads=("pbe", "r2scan"))
    path = export(potential, tmp_path / "m.pt", "native")
    energies = set()
    for head in ("pbe", "r2scan"):
        loaded = mdplug.load(path, head=head)
        for charge, spin in ((0, 1), (1, 2)):
            system = box(charge=charge, spin=spin)
            wanted = evaluate(potential, system.with_(head=torch.tensor([loaded.head])))
            got = evaluate(loaded, system)
            same(got, wanted, 1e-10)
            energies.add(round(float(got.energy), 6))
    assert len(energies) == 4
    both = batch([box().with_(head=torch.tensor([k])) for k in (0, 1)])
    same(evaluate(native(potential), both), evaluate(potential, both), 1e-10)


@built
@pytest.mark.parametrize("kind", [Sum, Ensemble])
def test_compositions(kind, tmp_path):
    """One part without a written adjoint, and one of another cutoff."""
    plain = kind.of([build({"l_hidden": 1}), build({}, cutoff=3.1), ZBL.new(2.0, 1.0)])
    loaded = mdplug.load(export(plain, tmp_path / "m.pt", "native"))
    for system in systems():
        same(evaluate(loaded, system), evaluate(plain, system), 1e-10)
    assert all(p.requires_grad for p in plain.parts[0].parameters())  # what was exported is as it was


@built
def test_positions_in_a_box_and_kj_mol():
    """The form that finds its own pairs."""
    potential, atoms = build({"l_hidden": 1}), liquid([1, 8], n=12, edge=6.0)
    script = for_torchforce(native(potential), atoms.numbers)
    energy, forces = script(torch.tensor(atoms.positions) / NM, torch.tensor(atoms.cell.array) / NM)
    wanted = evaluate(potential, AtomicSystem.from_ase(atoms))
    assert float(energy) / KJ_MOL_PER_EV == pytest.approx(float(wanted.interaction_energy), abs=1e-9)
    np.testing.assert_allclose(forces / (KJ_MOL_PER_EV * NM), wanted.forces, atol=1e-9)


@built
def test_calculator(tmp_path):
    model = mdplug.save(build({"l_hidden": 1}), tmp_path / "m.safetensors")
    atoms = liquid([1, 8], n=20, edge=7.5)
    found = []
    for source in (model, export(model, tmp_path / "m.pt", "native")):
        atoms.calc = mdplug.Calculator(source)
        found.append([])
        for _ in range(4):
            atoms.rattle(0.05, seed=len(found[-1]))
            found[-1].append((atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress()))
        atoms = liquid([1, 8], n=20, edge=7.5)
    for wanted, got in zip(*found, strict=True):
        for a, b in zip(wanted, got, strict=True):
            np.testing.assert_allclose(b, a, atol=1e-10, rtol=1e-12)


@built
def test_threads_share_a_file(tmp_path):
    """Nothing is kept from one evaluation to the next."""
    loaded = mdplug.load(export(build({"l_hidden": 1}), tmp_path / "m.pt", "native"))
    of = [systems()[0], systems()[2]]
    wanted = [evaluate(loaded, system).forces for system in of]
    wrong = []

    def repeat(k):
        wrong.extend(k for _ in range(20) if not torch.equal(evaluate(loaded, of[k]).forces, wanted[k]))

    threads = [threading.Thread(target=repeat, args=(k,)) for k in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# --- other processes -------------------------------------------------------------------------------------------------

WITH_MDPLUG = """
import sys
import torch
from ase import Atoms
import mdplug
case = torch.jit.load(sys.argv[2])
atoms = Atoms(case.numbers.numpy(), 10 * case.positions.numpy(), cell=10 * case.box.numpy(), pbc=True)
atoms.calc = mdplug.Calculator(mdplug.load(sys.argv[1]))
assert abs(atoms.get_potential_energy() * 96.48533212331002 - float(case.energy)) < 1e-7
"""

WITHOUT_MDPLUG = """
import sys
sys.path.insert(0, sys.argv[4])
import torch
try:
    torch.jit.load(sys.argv[1])
except RuntimeError as error:
    assert "mdplug::" in str(error), error
else:
    raise SystemExit("it loads without the operators")
torch.ops.load_library(sys.argv[3])
case = torch.jit.load(sys.argv[2])
form = torch.jit.load(sys.argv[1]).torchforce
form.set_topology(case.numbers, torch.arange(len(case.numbers)), 0.0, 1.0, 0)
for k in range(3):
    with torch.inference_mode():
        energy, forces = form(case.positions, case.box)
    assert abs(float(energy - case.energy)) < 1e-7, (energy, case.energy)
    assert float((forces - case.forces).abs().max()) < 1e-6
assert not any(name.partition(".")[0] in ("mdplug", "numpy", "ase") for name in sys.modules)
"""

HIDDEN = """
import sys
from mdplug import kernels
kernels.LIBRARY = "not-there.so"
import mdplug
mdplug.load(sys.argv[1])
"""


class Case(torch.nn.Module):
    """A state and what plain torch says of it."""

    def __init__(self, potential, atoms):
        super().__init__()
        p = evaluate(potential, AtomicSystem.from_ase(atoms))
        self.register_buffer("numbers", torch.tensor(atoms.numbers, dtype=torch.int64))
        self.register_buffer("positions", torch.tensor(atoms.positions) / NM)
        self.register_buffer("box", torch.tensor(atoms.cell.array) / NM)
        self.register_buffer("energy", p.interaction_energy[0] * KJ_MOL_PER_EV)
        self.register_buffer("forces", p.forces * (KJ_MOL_PER_EV * NM))

    def forward(self):
        return self.energy


def python(code, *arguments, alone=False):
    words = [sys.executable, *(["-I", "-S"] if alone else []), "-c", code, *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, timeout=300)


@built
def test_other_processes(tmp_path):
    """One that imports mdplug to load it, one that has torch and the library alone, one without the library."""
    potential, atoms = build({"l_hidden": 1, "kinds": ["D", "DR"], "repulsion": True}), liquid([1, 8], n=12, edge=6.0)
    path = export(potential, tmp_path / "model.pt", "native")
    torch.jit.script(Case(potential, atoms)).save(str(tmp_path / "case.pt"))
    done = python(WITH_MDPLUG, path, tmp_path / "case.pt")
    assert done.returncode == 0, done.stderr
    library = Path(kernels.__file__).with_name(kernels.LIBRARY)
    done = python(WITHOUT_MDPLUG, path, tmp_path / "case.pt", library, with_torch_alone(tmp_path / "site"), alone=True)
    assert done.returncode == 0, done.stderr
    done = python(HIDDEN, path)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "ModelFileError" in last
    assert "native operators" in last
    assert "mdplug export --for portable" in last


# --- what is refused -------------------------------------------------------------------------------------------------


def refuse(match, kind, call_, *arguments, **options):
    with pytest.raises(kind, match=match) as caught:
        call_(*arguments, **options)
    assert "\n" not in str(caught.value)


@built
def test_refusals(tmp_path, monkeypatch):
    out = tmp_path / "out.pt"
    refuse("'lj' has no form on the native operators; use --for portable", InputError, export,
           LennardJones.new(0.01, 3.0, 8.0), out, "native")  # fmt: skip
    many = build({}, species=tuple(range(1, MOST_SPECIES + 2)))
    refuse(f"knows 11 elements.*at most {MOST_SPECIES}.*--species", InputError, export, many, out, "native")
    assert not out.exists()
    path = export(build({}), out, "native")
    assert read_spec(path).species == (1, 8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    refuse("CPU alone.*--for portable", InputError, mdplug.load, path, device="cuda")
    monkeypatch.setattr(kernels, "load", lambda: "torch 2.9.1 is older than 2.10")
    refuse("torch 2.9.1.*mdplug export --for portable", ModelFileError, mdplug.load, path)
    refuse("cannot be made here.*2.9.1.*--for portable", InputError, export, build({}), out, "native")


@pytest.mark.parametrize("target", ["portable", pytest.param("native", marks=built)])
@pytest.mark.parametrize("name", ["agnesi", "density", "nonlinear", "residual"])
def test_file_for_some_elements(target, name, tmp_path):
    """Of a model of many elements, whose tables would be too many."""
    options = {**MODELS.get(name, {"kinds": ["A", "R"], "radial": {"transform": "agnesi"}})}
    potential = build(options, species=tuple(range(1, 90)))
    model = mdplug.save(potential, tmp_path / "m.safetensors")
    wanted = evaluate(potential, box())
    for dtype, tolerance in (("float64", 1e-10), ("float32", 1e-4)):
        out = tmp_path / f"{dtype}.pt"
        result = run(Config(model=model, output=out, target=target, dtype=dtype, species=["O", "H"]))
        loaded = mdplug.load(result.output)
        assert loaded.spec.species == (1, 8)
        got = evaluate(loaded, box())
        scale = max(1.0, float(wanted.forces.abs().max()))
        assert float((got.forces - wanted.forces).abs().max()) < tolerance * scale
        assert abs(float(got.energy - wanted.energy)) < 20 * tolerance * scale
        with pytest.raises(InputError, match="does not know"):
            evaluate(loaded, AtomicSystem.from_ase(liquid([6, 8], n=8)))
    assert potential.spec.species == tuple(range(1, 90))


def test_elements_that_cannot_be(tmp_path):
    out = tmp_path / "out.pt"
    potential = build({})
    refuse("cannot be narrowed to Li; it knows H O", InputError, export, potential, out, species=[3, 8])
    refuse("cannot be narrowed to no element", InputError, export, potential, out, species=[])
    refuse("fewer elements", InputError, export, LennardJones.new(0.01, 3.0, 8.0), out, species=[18])
    model = mdplug.save(potential, tmp_path / "m.safetensors")
    refuse("'Xx' is not an element", InputError, run, Config(model=model, output=out, species=["Xx"]))
    assert not out.exists()


@built
def test_command_line(tmp_path, capsys):
    model = mdplug.save(build({}), tmp_path / "m.safetensors")
    out = tmp_path / "m.pt"
    words = ["export", str(model), "-o", str(out), "--for", "native", "--dtype", "float32", "--species", "O"]
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 0
    assert str(out) in capsys.readouterr().out
    loaded = mdplug.load(out)
    assert (loaded.target, loaded.spec.dtype, loaded.spec.species) == ("native", "float32", (8,))
