"""Builds the native operators (mdplug/kernels/native) where a C++ compiler is; all else is in pyproject.toml.

They need no torch to build: its symbols are found when the library is loaded into a process that has it. Without a
compiler the install succeeds, and potentials run in plain torch.
"""

import os
import platform
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

NATIVE = Path("mdplug/kernels/native")
LIBRARY = "libmdplug_kernels"
FLAGS = ["-O3", "-std=c++17", "-fPIC", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
X86 = {
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma"],
}


class BuildKernels(build_ext):
    """One object for each instruction set, one library that picks at run time."""

    def get_ext_filename(self, fullname: str) -> str:
        """The library is not a Python module: no tag of a Python version in its name."""
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, extension: Extension) -> None:
        """Compile; a failure leaves no library and says so."""
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        try:
            compile_kernels(target)
        except (OSError, subprocess.CalledProcessError) as error:
            target.unlink(missing_ok=True)
            print(f"mdplug: the native operators were not built ({error}); potentials will run in plain torch")

    def run(self) -> None:
        """As build_ext, without asking for a Python to link with."""
        for extension in self.extensions:
            self.build_extension(extension)


class PlatformWheel(bdist_wheel):
    """One wheel for every Python: the library speaks to torch's C interface alone."""

    def get_tag(self) -> tuple[str, str, str]:
        """py3-none-PLATFORM."""
        return "py3", "none", super().get_tag()[2]


def compile_kernels(target: Path) -> None:
    """Write the library to `target`."""
    compiler = os.environ.get("CXX", "c++")
    sets: dict[str, list[str]] = {"baseline": []}
    if platform.machine().lower() in ("x86_64", "amd64"):
        sets |= X86
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        objects, jobs = [], []
        for name, flags in sets.items():
            objects.append(f"{folder}/{name}.o")
            source = str(NATIVE / "kernels.cpp")
            jobs.append([compiler, *FLAGS, *flags, f"-DMDPLUG_ISA={name}", "-c", source, "-o", objects[-1]])
        x86 = ["-DMDPLUG_X86"] if len(sets) > 1 else []
        for source in sorted(NATIVE.glob("torch_*.cpp")):  # registration: one object for all instruction sets
            objects.append(f"{folder}/{source.stem}.o")
            jobs.append([compiler, *FLAGS, *x86, "-c", str(source), "-o", objects[-1]])
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda job: subprocess.run(job, check=True), jobs))
        if sys.platform == "darwin":
            link = ["-undefined", "dynamic_lookup"]
        else:  # an empty stand-in puts libtorch_cpu.so, which the process has loaded, among the library's needs
            stub = f"{folder}/libtorch_cpu.so"
            empty = ["-shared", "-x", "c++", "/dev/null", "-o", stub, "-Wl,-soname,libtorch_cpu.so"]
            subprocess.run([compiler, *empty], check=True)
            link = ["-Wl,--no-as-needed", f"-L{folder}", "-ltorch_cpu"]
        part = target.with_suffix(".part")
        subprocess.run([compiler, "-shared", *objects, *link, "-o", str(part)], check=True)
        part.replace(target)


setup(
    ext_modules=[Extension(f"mdplug.kernels.{LIBRARY}", sources=[], optional=True)],
    cmdclass={"build_ext": BuildKernels, "bdist_wheel": PlatformWheel},
)
