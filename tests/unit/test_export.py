"""Exported files: equal to the definition, loadable with torch alone, refused where they must be."""

import json
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from ase import Atoms
from contract import liquid
from torch_alone import with_torch_alone

import mdplug
from mdplug.artifact import SPEC_KEY, read_spec
from mdplug.deployed import Deployed, evaluate
from mdplug.errors import InputError, ModelFileError
from mdplug.export import export, for_torchforce, portable
from mdplug.potentials.mace import MACE, describe
from mdplug.potentials.pair import ZBL, LennardJones, Morse
from mdplug.potentials.stillinger_weber import StillingerWeber
from mdplug.spec import CONTRACT
from mdplug.system import AtomicSystem, batch
from mdplug.units import KJ_MOL_PER_EV, NM


def mace(dtype="float64", **changes):
    """Random weights; two layers, so that features would cross a domain border between them."""
    config = {"channels": 8, "l_hidden": 1, "l_max": 2, "correlation": [2, 2], "neighbours": [12.0, 12.0], **changes}
    spec = describe("random", config, 4.0, (1, 8), dtype=dtype, atomic_energies={"default": {"H": -13.6, "O": -430.0}})
    return MACE.from_spec(spec).initialise(torch.Generator().manual_seed(4))


CASES = {
    "lj": (lambda: LennardJones.new(0.0103, 3.0, 7.0), [18]),
    "morse": (lambda: Morse.new(0.4, 1.3, 2.5, 6.0), [29]),
    "zbl": (lambda: ZBL.new(3.0, 1.0), [6, 17]),
    "stillinger-weber": (StillingerWeber.new, [14]),
    "mace": (mace, [1, 8]),
}


@pytest.fixture(params=CASES)
def case(request):
    make, species = CASES[request.param]
    return make(), species


def structures(species):
    """A liquid, a cluster, and a triclinic cell with heights below the cutoff, atoms far from the origin."""
    tiny = Atoms(
        [species[0], species[-1]],
        [[0.1, 0.2, 0.3], [101.6, -50.9, 1.9]],
        cell=[[3.1, 0, 0], [0.9, 3.0, 0], [-0.7, 0.4, 3.3]],
        pbc=True,
    )
    return [liquid(species, min_distance=1.8), liquid(species, n=7, edge=6.0, seed=1, pbc=False), tiny]


def in_openmm_units(script, atoms):
    """Energy in eV and forces in eV/A from a module made for TorchForce."""
    x = torch.tensor(atoms.positions) / NM
    energy, forces = script(x, torch.tensor(atoms.cell.array) / NM) if atoms.pbc.all() else script(x)
    return float(energy) / KJ_MOL_PER_EV, forces.numpy() / (KJ_MOL_PER_EV * NM)


def test_definition_deployed_exported_reloaded(case, tmp_path):
    potential, species = case
    reloaded = mdplug.load(export(potential, tmp_path / "model.pt"))
    for atoms in structures(species):
        system = AtomicSystem.from_ase(atoms)
        reference = evaluate(potential, system)
        scale = 1e-10 * max(1.0, float(reference.forces.abs().max()))
        for other in (Deployed(potential), portable(potential), reloaded):
            for _ in range(3):  # TorchScript runs other code from its second and third call on
                p = evaluate(other, system)
                assert abs(float(p.energy - reference.energy)) < scale * len(atoms)
                torch.testing.assert_close(p.forces, reference.forces, atol=scale, rtol=0)
                torch.testing.assert_close(p.virial, reference.virial, atol=scale * len(atoms), rtol=0)
                assert set(p.extras) == set(reference.extras)


def test_torchforce_form_finds_its_own_pairs(case):
    potential, species = case
    for atoms in structures(species):
        reference = evaluate(potential, AtomicSystem.from_ase(atoms))
        script = for_torchforce(potential, atoms.numbers)
        for _ in range(3):
            energy, forces = in_openmm_units(script, atoms)
            scale = 1e-10 * max(1.0, float(reference.forces.abs().max()))
            assert abs(energy - float(reference.interaction_energy)) < scale * len(atoms)
            np.testing.assert_allclose(forces, reference.forces.numpy(), atol=scale, rtol=0)


def test_batches_and_changing_sizes(tmp_path):
    potential = mace()
    reloaded = mdplug.load(export(potential, tmp_path / "model.pt"))
    several = batch([AtomicSystem.from_ase(a) for a in structures([1, 8])])
    for system in (several, AtomicSystem.from_ase(structures([1, 8])[1]), several):
        one, other = evaluate(potential, system), evaluate(reloaded, system)
        torch.testing.assert_close(one.forces, other.forces, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(one.energy, other.energy, atol=1e-9, rtol=1e-12)


def test_single_precision_file(tmp_path):
    atoms = structures([1, 8])[0]
    system = AtomicSystem.from_ase(atoms)
    model = mdplug.save(mace(), tmp_path / "model.safetensors")
    reference = evaluate(mdplug.load(model, dtype="float32"), system)
    reloaded = mdplug.load(export(model, tmp_path / "model.pt", dtype="float32"))
    assert reloaded.spec.dtype == "float32"
    p = evaluate(reloaded, system)
    assert p.forces.dtype == p.energy.dtype == torch.float64
    scale = max(1.0, float(reference.forces.abs().max()))
    assert float((p.forces - reference.forces).abs().max()) < 1e-5 * scale
    exact = evaluate(mdplug.load(export(model, tmp_path / "exact.pt", dtype="float64")), system)
    assert 0 < float((p.forces - exact.forces).abs().max()) < 1e-3 * scale


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_shipped_potential(dtype, tmp_path):
    atoms = liquid([3, 8, 1], min_distance=1.8)
    system = AtomicSystem.from_ase(atoms)
    reference = evaluate(mdplug.load("electrolyte", dtype=dtype), system)
    path = export("electrolyte", tmp_path / "electrolyte.pt", dtype=dtype)
    p = evaluate(mdplug.load(path), system)
    scale = (1e-10 if dtype == "float64" else 1e-5) * max(1.0, float(reference.forces.abs().max()))
    torch.testing.assert_close(p.forces, reference.forces, atol=scale, rtol=0)
    torch.testing.assert_close(p.energy, reference.energy, atol=scale * len(atoms), rtol=0)


def test_subset_of_particles():
    """Atoms among others, in another order; the rest feels nothing."""
    potential = mace()
    atoms = structures([1, 8])[0]
    places = np.random.default_rng(0).permutation(40)[: len(atoms)]
    everything = Atoms("He40", np.random.default_rng(1).random((40, 3)), cell=atoms.cell, pbc=True)
    everything.positions[places] = atoms.positions
    script = for_torchforce(potential, atoms.numbers, atoms=places)
    energy, forces = in_openmm_units(script, everything)
    reference = evaluate(potential, AtomicSystem.from_ase(atoms))
    assert energy == pytest.approx(float(reference.interaction_energy), abs=1e-9)
    np.testing.assert_allclose(forces[places], reference.forces.numpy(), atol=1e-9)
    rest = np.setdiff1d(np.arange(40), places)
    assert (forces[rest] == 0).all()


def test_charge_spin_and_head_are_baked_in(tmp_path):
    config = {
        "channels": 4, "l_max": 1, "correlation": [2, 2],
        "embedding": [
            {"name": "total_charge", "kind": "categorical", "classes": 5, "offset": 2, "width": 4},
            {"name": "total_spin", "kind": "categorical", "classes": 4, "offset": 0, "width": 4},
        ],
    }  # fmt: skip
    spec = describe("two-heads", config, 4.0, (1, 8), heads=("pbe", "r2scan"), dtype="float64")
    potential = MACE.from_spec(spec).initialise(torch.Generator().manual_seed(1))
    model = export(mdplug.save(potential, tmp_path / "m.safetensors"), tmp_path / "m.pt")
    atoms = structures([1, 8])[1]
    seen = set()
    for head in ("pbe", "r2scan"):
        for charge, spin in ((0, 1), (1, 2)):
            atoms.info.update(charge=charge, spin=spin)
            loaded = mdplug.load(model, head=head)
            expected = evaluate(potential, AtomicSystem.from_ase(atoms).with_(head=torch.tensor([loaded.head])))
            energy, _ = in_openmm_units(
                for_torchforce(model, atoms.numbers, charge=charge, spin=spin, head=head), atoms
            )
            assert energy == pytest.approx(float(expected.interaction_energy), abs=1e-9)
            assert float(evaluate(loaded, AtomicSystem.from_ase(atoms)).interaction_energy) == pytest.approx(energy)
            seen.add(round(energy, 6))
    assert len(seen) == 4
    with pytest.raises(InputError, match="name one"):
        for_torchforce(potential, atoms.numbers)
    with pytest.raises(InputError, match="no head 'b3lyp'"):
        for_torchforce(portable(potential), atoms.numbers, head="b3lyp")


ALONE = """
import importlib, sys
sys.path.insert(0, sys.argv[1])
for name in ("mdplug", "numpy", "ase", "openmm", "vesin", "scipy"):
    try:
        importlib.import_module(name)
    except ImportError:
        continue
    raise SystemExit(f"{name} is here")
import torch
model = torch.jit.load(sys.argv[2])
case = torch.jit.load(sys.argv[3])
form = model.torchforce
form.set_topology(case.numbers, torch.arange(len(case.numbers)), 0.0, 1.0, 0)
for k in range(3):
    energy, forces = form(case.positions, case.box)
    assert abs(float(energy - case.energy)) < 1e-7, (energy, case.energy)
    assert float((forces - case.forces).abs().max()) < 1e-6
form.save(sys.argv[4])
energy, forces = torch.jit.load(sys.argv[4])(case.positions, case.box)
assert abs(float(energy - case.energy)) < 1e-7
"""


@pytest.mark.parametrize("name", ["stillinger-weber", "mace"])
def test_runs_with_torch_alone(name, tmp_path):
    make, species = CASES[name]
    potential = make()
    atoms = structures(species)[2]
    energy, forces = in_openmm_units(for_torchforce(potential, atoms.numbers), atoms)

    class Case(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("numbers", torch.tensor(atoms.numbers, dtype=torch.int64))
            self.register_buffer("positions", torch.tensor(atoms.positions) / NM)
            self.register_buffer("box", torch.tensor(atoms.cell.array) / NM)
            self.register_buffer("energy", torch.tensor(energy * KJ_MOL_PER_EV, dtype=torch.float64))
            self.register_buffer("forces", torch.tensor(forces * KJ_MOL_PER_EV * NM))

        def forward(self):
            return self.energy

    torch.jit.script(Case()).save(str(tmp_path / "case.pt"))
    model = export(potential, tmp_path / "model.pt")
    arguments = [with_torch_alone(tmp_path / "site"), model, tmp_path / "case.pt", tmp_path / "tf.pt"]
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", ALONE, *map(str, arguments)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_what_stays_as_it_was():
    potential = mace()
    before = {key: value.clone() for key, value in potential.state_dict().items()}
    portable(potential)
    assert all(p.requires_grad for p in potential.parameters())
    assert not potential.alone
    assert all(torch.equal(before[key], value) for key, value in potential.state_dict().items())


def test_weights_stay_weights(tmp_path):
    """Compiled into constants, they would not follow `.to(device)`."""
    atoms = structures([1, 8])[0]
    script = mdplug.load(export(mace(), tmp_path / "model.pt")).script.torchforce
    script.set_topology(torch.tensor(atoms.numbers), torch.arange(len(atoms)), 0.0, 1.0, 0)
    energy, _ = in_openmm_units(script, atoms)
    with torch.no_grad():
        for weight in script.parameters():
            weight.zero_()
    assert abs(energy) > 1e-3
    assert in_openmm_units(script, atoms)[0] == 0.0


def test_single_precision_positions(case):
    potential, species = case
    atoms = structures(species)[0]
    script = for_torchforce(potential, atoms.numbers)
    x, box = torch.tensor(atoms.positions) / NM, torch.tensor(atoms.cell.array) / NM
    double, single = script(x, box), script(x.float(), box.float())
    assert single[0].dtype == single[1].dtype == torch.float64
    assert float((single[1] - double[1]).abs().max()) < 1e-4 * max(1.0, float(double[1].abs().max()))


@pytest.mark.gpu
def test_on_a_gpu(case, tmp_path):
    potential, species = case
    system = AtomicSystem.from_ase(structures(species)[0])
    reference = evaluate(potential, system)
    there = mdplug.load(export(potential, tmp_path / "model.pt"), device="cuda")
    p = evaluate(there, system.to("cuda"))
    scale = 1e-9 * max(1.0, float(reference.forces.abs().max()))
    torch.testing.assert_close(p.forces.cpu(), reference.forces, atol=scale, rtol=0)


def refuse(match, kind, call, *arguments, **options):
    with pytest.raises(kind, match=match) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)


def test_refusals_of_export(tmp_path):
    lj = LennardJones.new(0.01, 3.0, 8.0)
    out = tmp_path / "out.pt"
    refuse("'lammps' is not in this version.*use portable", InputError, export, lj, out, "lammps")
    refuse("unknown export target 'onnx'.*portable", InputError, export, lj, out, "onnx")
    refuse("as it is", InputError, export, lj, out, dtype="float32")
    refuse("shipped models", InputError, export, "no-such-model", out)
    assert not out.exists()
    made = export(lj, out)
    refuse("exported model already", InputError, export, made, tmp_path / "again.pt")
    refuse("exported model already", InputError, export, mdplug.load(made), tmp_path / "again.pt")
    refuse("fixed when it was exported", InputError, mdplug.load, made, dtype="float32")
    sw = StillingerWeber.new()
    refuse("atom 1 is C", InputError, for_torchforce, sw, [14, 6])
    refuse("no atoms", InputError, for_torchforce, sw, [])
    refuse("2 different indices", InputError, for_torchforce, sw, [14, 14], atoms=[3, 3])
    with pytest.raises(torch.jit.Error, match="call set_topology first"):
        mdplug.load(made).script.torchforce(torch.zeros(1, 3))


def test_refusals_of_files(tmp_path):
    made = export(LennardJones.new(0.01, 3.0, 8.0), tmp_path / "lj.pt")
    data = made.read_bytes()
    for keep in (0, 10, 200, len(data) // 2, len(data) - 10):
        cut = tmp_path / "cut.pt"
        cut.write_bytes(data[:keep])
        refuse("truncated|not a model file", ModelFileError, mdplug.load, cut)
    spoiled = tmp_path / "spoiled.pt"
    with zipfile.ZipFile(made) as source, zipfile.ZipFile(spoiled, "w") as target:
        for name in source.namelist():
            target.writestr(name, b"no code" if name.endswith(".py") else source.read(name))
    refuse("does not load.*export it again", ModelFileError, mdplug.load, spoiled)
    newer = tmp_path / "newer.pt"
    record = {**json.loads(read_spec(made).to_json()), "contract": CONTRACT + 1}
    torch.jit.save(mdplug.load(made).script, str(newer), _extra_files={SPEC_KEY: json.dumps(record)})
    refuse("upgrade mdplug", ModelFileError, mdplug.load, newer)
    foreign = tmp_path / "theirs.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(foreign))
    refuse("TorchScript of another program", ModelFileError, mdplug.load, foreign)
