"""Operators written for a processor, under torch.ops.mdplug; README.md here says what each computes.

`available()` loads the native library once. Where it cannot be loaded, potentials run in plain torch, and `why_not()`
says why.
"""

import ctypes
import warnings
from functools import cache
from pathlib import Path

import torch

LIBRARY = "libmdplug_kernels.so"
NEEDS = (2, 10)  # torch whose stable C interface has what the library uses


def _torch() -> tuple[int, ...]:
    return tuple(int(part) for part in torch.__version__.split(".")[:2])


@cache
def load() -> str:
    """Loads the native library; why that cannot be, or nothing."""
    if _torch() < NEEDS:
        return f"torch {torch.__version__} is older than {NEEDS[0]}.{NEEDS[1]}"
    path = Path(__file__).with_name(LIBRARY)
    if not path.exists():
        return f"{LIBRARY} was not built; reinstall mdplug where a C++ compiler is, or take a released wheel"
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return f"{path} does not load: {error}"
    return ""


@cache
def why_not() -> str:
    """Why the native library is not in use; empty where it is. Says so once, as a warning, where it is missing."""
    reason = load()
    if reason and _torch() >= NEEDS:
        warnings.warn(f"potentials run in plain torch, several times slower: {reason}", stacklevel=2)
    return reason


def available() -> bool:
    """Whether the native operators can be used (on CPU tensors)."""
    return not why_not()


def serves(tensor: torch.Tensor) -> bool:
    """Whether the library is there, without a word where it is not, and for this tensor's device."""
    return tensor.device.type == "cpu" and not load()


def instruction_set() -> str:
    """Which of its builds the library runs: avx512, avx2 or baseline; empty where there is no library."""
    if not available():
        return ""
    name = ctypes.CDLL(str(Path(__file__).with_name(LIBRARY))).mdplug_instruction_set
    name.restype = ctypes.c_char_p
    return name().decode()
