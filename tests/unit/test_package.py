"""Packaging: what the wheel holds is what is on disk; listing and importing are light."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from mdplug.errors import MissingExtraError, require

ROOT = Path(__file__).parents[2]
MAPPED = {"mdplug": "mdplug", "mdplug.data": "data", "mdplug.potentials": "potentials", "mdplug.workflows": "workflows"}


def on_disk():
    found = set()
    for package, folder in MAPPED.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            inner = init.parent.relative_to(ROOT / folder).parts
            found.add(".".join((package, *inner)))
    return found


def test_package_list_matches_the_disk():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert set(settings["packages"]) == on_disk()
    assert settings["package-dir"] == MAPPED


@pytest.mark.parametrize("package", ["potentials", "workflows"])
def test_no_second_copy(package):
    run = subprocess.run([sys.executable, "-c", f"import {package}"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode != 0
    assert f"as mdplug.{package}" in run.stderr


def test_import_is_light():
    code = (
        "import sys, mdplug, mdplug.registry; mdplug.registry.architectures(); "
        "print([m for m in ('torch', 'openmm', 'ase', 'pymatgen') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_file_sizes():
    """The core (mdplug/ without engines and kernels) under 3,500 lines, uncertainty included; every file under 400."""
    outside = {ROOT / "mdplug" / "engines", ROOT / "mdplug" / "kernels"}
    files = [p for p in (ROOT / "mdplug").rglob("*.py") if not outside & set(p.parents)]
    assert sum(len(p.read_text().splitlines()) for p in files) < 3500
    for folder in MAPPED.values():
        for path in (ROOT / folder).rglob("*.py"):
            assert len(path.read_text().splitlines()) <= 400, path


def test_missing_extra_names_itself():
    with pytest.raises(MissingExtraError, match=r"pip install 'mdplug\[label\]'"):
        require("no_such_package_here", extra="label")
