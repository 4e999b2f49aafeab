"""A System made of a potential alone, and what may be asked of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import openmm
from openmm import app, unit

from mdplug.engines.openmm.errors import errors_of
from mdplug.engines.openmm.plug import force, plugs_of
from mdplug.engines.openmm.topology import molecules_force
from mdplug.errors import InputError
from mdplug.potential import Model

NVE = (openmm.VerletIntegrator, openmm.VariableVerletIntegrator)
BAROSTATS = (
    openmm.MonteCarloBarostat,
    openmm.MonteCarloAnisotropicBarostat,
    openmm.MonteCarloMembraneBarostat,
    openmm.MonteCarloFlexibleBarostat,
)


def create_system(
    topology: app.Topology,
    potential: Model | str | Path,
    *,
    hydrogen_mass_amu: float | None = None,
    molecules: str | Sequence[tuple[int, int]] | None = "topology",
    remove_cm: bool = True,
    **options: Any,
) -> openmm.System:
    """A System whose only energy is the potential's.

    Args:
        topology: elements, bonds and box.
        potential: see `force`.
        hydrogen_mass_amu: mass of hydrogens, taken from the atoms they are bonded to; averages of positions stay.
        molecules: which atoms a barostat moves and a reporter keeps together: "topology" (its bonds), None (each atom
            alone: solids, reactive systems) or bonds as index pairs.
        remove_cm: take out the motion of the centre of mass at every step (not for NVE).
        options: the others of `force`: charge, spin, periodic, skin_A, max_force_eV_A, bad_frame.

    Raises:
        InputError: as `force`; bonds out of range; a hydrogen mass that leaves nothing of its neighbour.
    """
    main = force(topology, potential, **options)
    system = openmm.System()
    for atom in topology.atoms():
        system.addParticle(atom.element.mass)
    if topology.getPeriodicBoxVectors() is not None:
        system.setDefaultPeriodicBoxVectors(*topology.getPeriodicBoxVectors())
    if molecules == "topology":
        bonds = [(a.index, b.index) for a, b in topology.bonds()]
    elif molecules is None:
        bonds = []
    elif isinstance(molecules, str):
        raise InputError(f"molecules must be 'topology', None or a list of bonds, got {molecules!r}")
    else:
        bonds = [(int(i), int(j)) for i, j in molecules]
    for i, j in bonds:
        if not (0 <= i < system.getNumParticles() and 0 <= j < system.getNumParticles() and i != j):
            raise InputError(f"bond ({i}, {j}) does not join two of the {system.getNumParticles()} atoms")
    if hydrogen_mass_amu is not None:
        _repartition(system, topology, bonds, hydrogen_mass_amu)
    if bonds:
        system.addForce(molecules_force(bonds, main.usesPeriodicBoundaryConditions()))
    system.addForce(main)
    if remove_cm:
        system.addForce(openmm.CMMotionRemover())
    return system


def _repartition(
    system: openmm.System, topology: app.Topology, bonds: list[tuple[int, int]], hydrogen_mass_amu: float
) -> None:
    atoms = list(topology.atoms())
    masses = [system.getParticleMass(a).value_in_unit(unit.dalton) for a in range(len(atoms))]
    hydrogen = [atom.element is app.element.hydrogen for atom in atoms]
    done = set()
    for pair in bonds:
        for h, other in (pair, pair[::-1]):
            if hydrogen[h] and not hydrogen[other] and h not in done:
                done.add(h)
                masses[other] -= hydrogen_mass_amu - masses[h]
                masses[h] = hydrogen_mass_amu
    for a, mass in enumerate(masses):
        if mass <= 0:
            raise InputError(
                f"hydrogen_mass_amu={hydrogen_mass_amu:g} leaves atom {a} ({atoms[a].name}) a mass of {mass:.2f}; "
                "take a smaller one"
            )
        system.setParticleMass(a, mass)


def check_ensemble(
    system: openmm.System, integrator: openmm.Integrator, *, allow_non_conservative: bool = False
) -> None:
    """Refuse what would run and be wrong.

    Raises:
        InputError: NVE or a barostat with a potential whose forces are not the gradient of its energy; a barostat
            without a thermostat or in an open system; a membrane barostat in a box whose normal is not z.
    """
    barostats = [one for one in system.getForces() if isinstance(one, BAROSTATS)]
    nve = isinstance(integrator, NVE)
    thermostat = any(isinstance(one, openmm.AndersenThermostat) for one in system.getForces())
    loose = [plug for plug in plugs_of(system) if not plug.conservative]
    if loose and not allow_non_conservative:
        name = loose[0].potential.spec.name
        if barostats:
            raise InputError(
                f"the forces of {name!r} are not the gradient of its energy, and a Monte-Carlo barostat would sample "
                "another pressure than the forces; run NVT, or allow it with allow_non_conservative"
            )
        if nve and not thermostat:
            raise InputError(
                f"the forces of {name!r} are not the gradient of its energy, which NVE does not keep; run NVT, or "
                "allow it with allow_non_conservative"
            )
    if len(barostats) > 1:
        raise InputError(f"{len(barostats)} barostats in one system; keep one")
    if not barostats:
        return
    barostat = barostats[0]
    if not system.usesPeriodicBoundaryConditions():
        raise InputError("a barostat needs a periodic system; give the topology a box")
    if nve and not thermostat:
        raise InputError("a barostat needs a thermostat; use a Langevin integrator, or take the barostat out")
    a, b, c = (vector.value_in_unit(unit.nanometer) for vector in system.getDefaultPeriodicBoxVectors())
    upright = a[1] == a[2] == b[0] == b[2] == c[0] == c[1] == 0.0
    if isinstance(barostat, openmm.MonteCarloMembraneBarostat) and not (c[0] == c[1] == 0.0):
        raise InputError("a membrane barostat needs the membrane normal along z: a box whose c has no x or y part")
    if isinstance(barostat, openmm.MonteCarloAnisotropicBarostat) and not upright:
        raise InputError("an anisotropic barostat scales x, y and z and would shear a triclinic box; take another one")


class Simulation(app.Simulation):
    """`openmm.app.Simulation` that lets the model's and the guard's own exceptions through, Ctrl-C included."""

    def minimizeEnergy(self, *args: Any, **kwargs: Any) -> None:
        """See `openmm.app.Simulation.minimizeEnergy`."""
        with errors_of(self.system):
            super().minimizeEnergy(*args, **kwargs)

    def _simulate(self, *args: Any, **kwargs: Any) -> None:
        # Every way of stepping (step, runForClockTime) ends here, reporters included.
        with errors_of(self.system):
            super()._simulate(*args, **kwargs)
