"""The doctor tries things; what it says is compared with what is there."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import openmm
import torch

from mdplug.workflows import doctor


def test_what_everybody_needs_works_here():
    result = doctor.run(doctor.Config())
    found = {one.name: one for one in result.checks}
    for name in (
        "python",
        "torch",
        "OpenMM platforms",
        "OpenMM PythonForce",
        "ase",
        "mdtraj",
        "pymatgen",
        "shipped model",
    ):
        assert found[name].works, found[name]
    assert result.exit_code == 0
    assert torch.__version__ in found["torch"].text
    assert openmm.__version__ in found["OpenMM platforms"].text
    assert "Reference" in found["OpenMM platforms"].text
    assert bool(found["cuda"].works) == torch.cuda.is_available()
    compiler = shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    assert bool(found["C++ compiler"].works) == bool(compiler)
    assert str(result).count("\n") == len(result.checks) - 1


def test_what_is_missing_is_named_with_its_extra(tmp_path):
    """The same checks in a process that cannot find the optional packages and has no programs on its path."""
    code = (
        "import sys, importlib.machinery as m\n"
        "real, hidden = m.PathFinder.find_spec, ('tblite', 'rdkit', 'openmmml')\n"
        "def find(name, *rest, **more):\n"
        "    return None if name.split('.')[0] in hidden else real(name, *rest, **more)\n"
        "m.PathFinder.find_spec = find\n"
        "from mdplug.workflows.doctor import Config, run\n"
        "print(run(Config()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PATH": str(tmp_path)},
    )
    lines = {line[3:26].strip(): line for line in done.stdout.splitlines()}
    assert "pip install 'mdplug[label]'" in lines["tblite"]
    assert "pip install 'mdplug[build]'" in lines["rdkit"]
    assert "pip install 'mdplug[openmmml]'" in lines["openmm-ml"]
    assert lines["torch"].startswith("ok")
    assert lines["C++ compiler"].startswith("-  ")
    packmol_here = Path(sys.executable).with_name("packmol").exists()
    assert lines["packmol"].startswith("ok" if packmol_here else "-")
