"""The one table of constants against OpenMM's and ASE's."""

import ase.units
import openmm.unit as unit
import pytest

from mdplug import units


def test_against_openmm():
    kj = unit.kilojoule_per_mole
    ev = unit.Quantity(units.ELEMENTARY_CHARGE * units.AVOGADRO / 1000, kj)
    assert ev.value_in_unit(kj) == pytest.approx(units.KJ_MOL_PER_EV, rel=1e-15)
    assert pytest.approx(1.0, rel=1e-15) == units.KJ_MOL * units.KJ_MOL_PER_EV
    r = unit.MOLAR_GAS_CONSTANT_R.value_in_unit(kj / unit.kelvin) * units.KJ_MOL
    assert r == pytest.approx(units.BOLTZMANN, rel=1e-6)


def test_against_ase():
    # ASE keeps CODATA 2014.
    for ours, theirs in (
        (units.HARTREE, ase.units.Hartree),
        (units.BOHR, ase.units.Bohr),
        (units.GPA, ase.units.GPa),
        (units.BAR, ase.units.bar),
        (units.KCAL_MOL, ase.units.kcal / ase.units.mol),
        (units.DEBYE, ase.units.Debye),
        (units.AMU_A2_PER_FS2, 1.0 / ase.units.fs**2),
    ):
        assert ours == pytest.approx(theirs, rel=1e-6)


def test_water_density():
    """33.33 molecules per nm^3 are 0.997 g/cm^3 and 55.4 mol/L."""
    per_volume = 33.33 / 1000
    assert per_volume * 18.015 * units.G_CM3_PER_AMU_A3 == pytest.approx(0.997, abs=1e-3)
    assert per_volume * units.MOL_L_PER_A3 == pytest.approx(55.4, abs=0.1)
