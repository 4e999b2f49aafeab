"""openmm-ml's entry point: MLPotential("mdplug", modelPath=...).

openmm-ml imports this module whenever it is imported itself, so nothing heavy may be imported here; its classes are
looked up when a potential is made.
"""

from typing import Any


class MdplugFactory:
    """What the entry point names; openmm-ml makes one without arguments (see its `MLPotentialImplFactory`)."""

    def createImpl(
        self,
        name: str,
        modelPath: Any = None,
        device: str = "cpu",
        precision: str | None = None,
        head: str | None = None,
        radial: str | None = None,
        **unknown: Any,
    ) -> Any:
        """The potential behind `MLPotential("mdplug", ...)`.

        Args:
            name: "mdplug".
            modelPath: model file, or the name of a shipped model.
            device: torch device.
            precision: "single", "double", or None: as trained.
            head: level of theory, by name.
            radial: "exact" or "tables" (see `mdplug.load`).
            unknown: anything else is a mistake.

        Raises:
            InputError: no modelPath, an unknown argument or precision.
        """
        from mdplug.errors import InputError

        widths = {None: None, "single": "float32", "double": "float64"}
        if unknown:
            raise InputError(
                f"MLPotential('mdplug') has no argument {sorted(unknown)[0]!r}; it takes modelPath, device, "
                "precision, head and radial (charge and spin go to createSystem)"
            )
        if modelPath is None:
            raise InputError("MLPotential('mdplug') needs modelPath: a model file or the name of a shipped model")
        if precision not in widths:
            raise InputError(f"precision must be 'single' or 'double', got {precision!r}")
        from mdplug.artifact import load

        return _implementation()(load(modelPath, device, widths[precision], head, radial))


def _implementation() -> type:
    from openmmml.mlpotential import MLPotentialImpl

    class MdplugImpl(MLPotentialImpl):
        """openmm-ml's view of a potential."""

        def __init__(self, potential: Any):
            self.potential = potential

        def addForces(
            self,
            topology: Any,
            system: Any,
            atoms: Any,
            forceGroup: int,
            charge: float = 0.0,
            multiplicity: float = 1.0,
            **others: Any,
        ) -> None:
            """Add the force; `others` are openmm-ml's own arguments (mlLongRange, linkAtomDistances, ...)."""
            from mdplug.engines.openmm.plug import force

            # While interpolating, `system` is an empty one without a box.
            periodic = topology.getPeriodicBoxVectors() is not None or system.usesPeriodicBoundaryConditions()
            made = force(
                topology,
                self.potential,
                atoms=None if atoms is None else list(atoms),
                charge=charge,
                spin=multiplicity,
                periodic=periodic,
            )
            made.setForceGroup(forceGroup)
            system.addForce(made)

        def getMLLongRange(self) -> bool:
            """Whether the potential holds electrostatics beyond its cutoff."""
            return self.potential.spec.long_range

    return MdplugImpl
