"""OpenMM: a potential as an openmm.PythonForce or TorchForce, and systems made of it."""
