"""The pressure tensor, from the virial that came with the last forces."""

import numpy as np
import openmm
from openmm import unit

from mdplug.engines.openmm.plug import plug_of
from mdplug.engines.openmm.topology import MOLECULES, box_A_of
from mdplug.errors import InputError
from mdplug.units import AMU_A2_PER_FS2, BAR, NM, PS


def pressure_tensor_bar(context: openmm.Context, *, molecular: bool = False) -> np.ndarray:
    """(3, 3) instantaneous pressure in bar: (kinetic + virial) / volume.

    The virial is the memo's when the positions are those of the last evaluation, so that logging costs no further one.

    Args:
        context: of a periodic system whose only energy is one mdplug force.
        molecular: from the motion of, and the forces on, whole molecules; the same average with less noise, and what
            a barostat that moves molecules balances.

    Raises:
        InputError: not periodic, or other forces contribute.
    """
    system = context.getSystem()
    plug = plug_of(system)
    if len(plug.numbers) != system.getNumParticles():
        raise InputError("the pressure tensor needs a force on all atoms; this one acts on some")
    for force in system.getForces():
        ours = force.getName() == MOLECULES or force.getName().endswith(plug.token)
        if not ours and not isinstance(force, _NO_ENERGY):
            raise InputError(f"the pressure tensor knows mdplug forces only; {force.getName()} has no virial here")
    state = context.getState(getPositions=True, getVelocities=True)
    box = box_A_of(state)
    if box is None or not plug.options["periodic"]:
        raise InputError("a pressure needs a periodic system; give the topology a box")
    positions = state.getPositions(asNumpy=True).value_in_unit(unit.nanometer) * NM
    velocities = state.getVelocities(asNumpy=True).value_in_unit(unit.nanometer / unit.picosecond) * (NM / PS)
    found = plug.result(positions, box)
    tensor = found["virial"].copy()
    masses = np.array([system.getParticleMass(a).value_in_unit(unit.dalton) for a in range(len(positions))])
    if molecular:
        for members in context.getMolecules():
            index = np.array(members)
            weight = masses[index] / masses[index].sum()
            arms = positions[index] - weight @ positions[index]
            tensor -= arms.T @ found["forces"][index]
            velocities[index] = weight @ velocities[index]
    tensor += AMU_A2_PER_FS2 * (velocities.T * masses) @ velocities
    return 0.5 * (tensor + tensor.T) / abs(np.linalg.det(box)) / BAR


_NO_ENERGY = (
    openmm.CMMotionRemover,
    openmm.AndersenThermostat,
    openmm.MonteCarloBarostat,
    openmm.MonteCarloAnisotropicBarostat,
    openmm.MonteCarloMembraneBarostat,
    openmm.MonteCarloFlexibleBarostat,
)
