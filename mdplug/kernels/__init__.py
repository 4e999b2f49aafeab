"""Operators written for a processor, under torch.ops.mdplug; README.md here says what each computes.

`available()` loads the native library once, or registers those in Triton for a CUDA device. Where that cannot be,
potentials run in plain torch, and `why_not()` says why.
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


def missing(device: torch.device) -> str:
    """What keeps the operators from a device; empty where they are there. Says nothing aloud."""
    if device.type == "cpu":
        return load()
    if device.type != "cuda":
        return f"there are no operators for {device.type} devices"
    from mdplug.kernels import triton

    return triton.why_not()


@cache
def why_not(device: str = "cpu") -> str:
    """Why the operators are not in use on "cpu" or "cuda"; empty where they are. Says so once, as a warning."""
    reason = missing(torch.device(device))
    if reason and (device != "cpu" or _torch() >= NEEDS):
        warnings.warn(f"potentials run in plain torch, several times slower: {reason}", stacklevel=2)
    return reason


def available(device: str = "cpu") -> bool:
    """Whether the operators can be used on tensors of this type of device."""
    return not why_not(device)


def serves(tensor: torch.Tensor) -> bool:
    """Whether the operators are there, without a word where they are not, for this tensor's device."""
    return not missing(tensor.device)


def instruction_set() -> str:
    """Which of its builds the library runs: avx512, avx2 or baseline; empty where there is no library."""
    if not available():
        return ""
    name = ctypes.CDLL(str(Path(__file__).with_name(LIBRARY))).mdplug_instruction_set
    name.restype = ctypes.c_char_p
    return name().decode()
