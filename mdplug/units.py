"""The one table of constants: CODATA 2018 (exact SI where the SI is exact).

Inside mdplug: Angstrom, eV, amu, fs, elementary charge, kelvin. Everything else exists only at a border.
Multiply by `X` to go from the unit X to the internal one; divide to go out.
"""

ELEMENTARY_CHARGE = 1.602176634e-19  # C
AVOGADRO = 6.02214076e23  # 1/mol
BOLTZMANN = 8.617333262145179e-5  # eV/K
ATOMIC_MASS = 1.66053906660e-27  # kg
KJ_MOL_PER_EV = 96.48533212331002

KJ_MOL = 1.0 / KJ_MOL_PER_EV  # eV
KCAL_MOL = 4.184 / KJ_MOL_PER_EV  # eV
HARTREE = 27.211386245988  # eV
BOHR = 0.529177210903  # A
NM = 10.0  # A
PS = 1.0e3  # fs
NS = 1.0e6  # fs
# 1 bar = 1e5 J/m^3
BAR = 1.0e5 * 1.0e-30 / ELEMENTARY_CHARGE  # eV/A^3
ATM = 1.01325 * BAR
GPA = 1.0e4 * BAR
# 1 amu (A/fs)^2 in eV: kinetic energy from internal masses and velocities
AMU_A2_PER_FS2 = ATOMIC_MASS * 1.0e10 / ELEMENTARY_CHARGE
# g/cm^3 = (amu/A^3) * this
G_CM3_PER_AMU_A3 = ATOMIC_MASS * 1.0e3 / 1.0e-24
# mol/L = (1/A^3) * this
MOL_L_PER_A3 = 1.0e27 / AVOGADRO
M2_S = 1.0e5  # A^2/fs
# e^2/(4 pi eps0) in eV A
COULOMB = 14.399645478425668
DEBYE = 0.20819433442462576  # e A
