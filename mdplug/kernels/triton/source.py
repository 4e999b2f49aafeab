"""Kernels written out term by term from tables known when they are made; how they are compiled and launched."""

import linecache
from contextlib import nullcontext
from functools import cache
from hashlib import sha256
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mdplug.kernels.triton import radial

OPTIONS = {"enable_fp_fusion": True}  # its default is about to change, and sums of products are all there is here


@cache
def compiled(name: str, text: str) -> Any:
    """The Triton kernel `name` of generated source."""
    filename = f"<mdplug {name} {sha256(text.encode()).hexdigest()[:16]}>"
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)  # Triton reads the source
    scope: dict[str, Any] = {"__name__": f"{__name__}.{name}", "triton": triton, "tl": tl, "knot": radial.knot}
    exec(compile(text, filename, "exec"), scope)
    return scope[name]


def launch(kernel: Any, grid: tuple[int, ...], arguments: tuple, constants: dict[str, Any], warps: int = 1) -> None:
    """Run a kernel on the device of its first argument; nothing where the grid is empty."""
    if 0 in grid:
        return
    on = torch.cuda.device(arguments[0].device) if arguments[0].is_cuda else nullcontext()
    with on:
        kernel[grid](*arguments, **constants, num_warps=warps, **OPTIONS)


def contiguous(dtype: torch.dtype, **tensors: Tensor) -> None:
    """Refuse what the kernels would read wrongly.

    Raises:
        RuntimeError: a tensor of another dtype, or with gaps.
    """
    for name, tensor in tensors.items():
        if tensor.dtype != dtype or not tensor.is_contiguous():
            raise RuntimeError(f"mdplug kernels: {name} has another dtype or is not contiguous")


def channel_block(k: int, most: int) -> int:
    """Channels of one program: as many as `most` without more padding than full warps need."""
    block = most
    while block > 32 and -(-k // block) * block > -(-k // 32) * 32:
        block //= 2
    return block
