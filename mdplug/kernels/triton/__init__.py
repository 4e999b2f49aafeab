"""The operators of mdplug.kernels for CUDA devices, in Triton; ../README.md says how they work.

`available()` registers them once, for tensors on CUDA. Triton is imported then, not before: mdplug runs without it.
"""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec

import torch

from mdplug.kernels.schemas import define

CAPABILITY = (8, 0)  # that Triton compiles for
_registered: list[torch.library.Library] = []  # a registration lasts as long as its object


def operators() -> dict[str, Callable]:
    """The operators by name, as plain functions. Imports Triton."""
    from mdplug.kernels.triton import convolution, density, graph, harmonics, pair_list, polynomial, product

    return {
        "graph": graph.graph,
        "harmonics": harmonics.harmonics,
        "harmonics_backward": harmonics.harmonics_backward,
        "density": density.density,
        "density_backward": density.density_backward,
        "convolution": convolution.convolution,
        "convolution_backward": convolution.convolution_backward,
        "polynomial": polynomial.polynomial,
        "polynomial_backward": polynomial.polynomial_backward,
        "product": product.product,
        "product_backward": product.product_backward,
        "linear": product.linear,
        "pair_list": pair_list.pair_list,
        "sum_atoms": pair_list.sum_atoms,
        "sum_pairs": pair_list.sum_pairs,
    }


def register() -> None:
    """Give torch.ops.mdplug these operators for CUDA tensors; once in a process."""
    if _registered:
        return
    found, schemas = operators(), define()
    library = torch.library.Library("mdplug", "IMPL", "CUDA")
    for name, function in found.items():
        library.impl(name, function)
    _registered.extend([library] if schemas is None else [library, schemas])


@cache
def why_not() -> str:
    """Why the operators cannot be used on a CUDA device; empty where they can, and then they are registered."""
    if not torch.cuda.is_available():
        return "no CUDA device here"
    if find_spec("triton") is None:
        return "triton is not installed"
    if torch.cuda.get_device_capability() < CAPABILITY:
        return "Triton needs compute capability {}.{}".format(*CAPABILITY)
    try:
        register()
    except (ImportError, RuntimeError) as error:
        return f"the Triton operators cannot be registered: {error}"
    return ""


def available() -> bool:
    """Whether the operators can be used on CUDA tensors."""
    return not why_not()
