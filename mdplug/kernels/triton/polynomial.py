"""Sparse polynomials of an atom's features, written out: one program for each atom and block of channels.

Products are made depth first, so that few of them live in registers at a time: a product, all terms that use it, then
the products it is a factor of. The adjoint walks the same tree and adds up each product's cotangent on the way back.
A kernel has some of the outputs: the time that Triton compiles grows with the square of the terms.
"""

from typing import Any

import torch
from torch import Tensor

from mdplug.kernels.memo import memo
from mdplug.kernels.triton.source import channel_block, compiled, contiguous, launch

CHANNELS = {torch.float32: 64, torch.float64: 32}  # of one program, which is one warp
TERMS = 160  # of one kernel: about two seconds to compile


class Tree:
    """What some outputs o need of a polynomial.

    Args:
        n_inputs: M. nodes: factors of each product. term: the entry of each term. starts: of each output.

    Attributes:
        children: entry -> [(product that grows from it, the other factor)]. uses: entry -> [(output, term)].
    """

    def __init__(self, n_inputs: int, nodes: list[list[int]], term: list[int], starts: list[int], outputs: range):
        self.n_inputs, self.n_terms, self.outputs = n_inputs, len(term), outputs
        self.children: list[list[tuple[int, int]]] = [[] for _ in range(n_inputs + len(nodes))]
        self.uses: list[list[tuple[int, int]]] = [[] for _ in range(n_inputs + len(nodes))]
        for o in outputs:
            for t in range(starts[o], starts[o + 1]):
                self.uses[term[t]].append((o, t))
        for number in range(len(nodes) - 1, -1, -1):
            low, high = sorted(nodes[number])
            if low >= n_inputs:
                raise RuntimeError("mdplug kernels: a product of a polynomial has no input among its factors")
            entry = n_inputs + number
            if self.uses[entry] or self.children[entry]:
                self.children[high].insert(0, (entry, low))


def _split(starts: list[int]) -> list[range]:
    """Outputs that follow one another, of TERMS terms at most where one has no more."""
    parts, begin = [], 0
    for o in range(1, len(starts)):
        if o == len(starts) - 1 or starts[o + 1] - starts[begin] > TERMS:
            parts.append(range(begin, o))
            begin = o
    return parts


def _start(
    name: str, arguments: str, tree: Tree, k: int, block: int, size: int, n_blocks: int
) -> tuple[list[str], str]:
    """First lines of a kernel, and what masks a load (with a zero) and a store."""
    lines = [
        f"@triton.jit(do_not_specialize=['n'])\ndef {name}({arguments}, n):",
        "i = tl.program_id(0).to(tl.int64)",
        f"channel = tl.program_id(1) * {block} + tl.arange(0, {block})",
        f"weight = coefficients + tl.load(kind + i).to(tl.int64) * {n_blocks * tree.n_terms * size}"
        f" + (channel // {size}) * {tree.n_terms * size} + channel % {size}",
    ]
    if k % block:
        lines.append(f"inside = channel < {k}")
    mask = ", inside, 0.0" if k % block else ""
    lines += [f"x{m} = tl.load(inputs + ({m} * n + i) * {k} + channel{mask})" for m in range(tree.n_inputs)]
    return lines, mask


def _text(lines: list[str]) -> str:
    return "\n    ".join(lines) + "\n"


def _forward(tree: Tree, k: int, block: int, size: int, n_blocks: int) -> Any:
    arguments = "inputs, coefficients, kind, out"
    lines, mask = _start("polynomial", arguments, tree, k, block, size, n_blocks)
    lines += [f"a{o} = tl.zeros(({block},), out.dtype.element_ty)" for o in tree.outputs]

    def visit(entry: int) -> None:
        lines.extend(f"a{o} += tl.load(weight + {t * size}{mask}) * x{entry}" for o, t in tree.uses[entry])
        for product, factor in tree.children[entry]:
            lines.append(f"x{product} = x{entry} * x{factor}")
            visit(product)

    for m in range(tree.n_inputs):
        visit(m)
    stored = mask.removesuffix(", 0.0")
    lines += [f"tl.store(out + ({o} * n + i) * {k} + channel, a{o}{stored})" for o in tree.outputs]
    return compiled("polynomial", _text(lines))


def _backward(tree: Tree, k: int, block: int, size: int, n_blocks: int) -> Any:
    arguments = "inputs, coefficients, kind, grad, grad_inputs"
    lines, mask = _start("polynomial_backward", arguments, tree, k, block, size, n_blocks)
    lines += [f"g{o} = tl.load(grad + ({o} * n + i) * {k} + channel{mask})" for o in tree.outputs]
    zeros = f"tl.zeros(({block},), grad_inputs.dtype.element_ty)"
    if tree.outputs.start == 0:
        lines += [f"d{m} = {zeros}" for m in range(tree.n_inputs)]
    else:  # on top of what other outputs gave
        lines += [f"d{m} = tl.load(grad_inputs + ({m} * n + i) * {k} + channel{mask})" for m in range(tree.n_inputs)]

    def visit(entry: int) -> None:
        if entry >= tree.n_inputs and not tree.uses[entry]:
            lines.append(f"d{entry} = {zeros}")
        for number, (o, t) in enumerate(tree.uses[entry]):
            sign = "=" if entry >= tree.n_inputs and number == 0 else "+="
            lines.append(f"d{entry} {sign} tl.load(weight + {t * size}{mask}) * g{o}")
        for product, factor in tree.children[entry]:
            lines.append(f"x{product} = x{entry} * x{factor}")
            visit(product)
            lines.extend([f"d{entry} += d{product} * x{factor}", f"d{factor} += d{product} * x{entry}"])

    for m in range(tree.n_inputs):
        visit(m)
    stored = mask.removesuffix(", 0.0")
    lines += [f"tl.store(grad_inputs + ({m} * n + i) * {k} + channel, d{m}{stored})" for m in range(tree.n_inputs)]
    return compiled("polynomial_backward", _text(lines))


def _kernels(
    make: Any, inputs: Tensor, coefficients: Tensor, kind: Tensor, nodes: Tensor, term: Tensor, starts: Tensor
) -> tuple[list[Any], tuple[int, int]]:
    """The kernels for these arguments, and their grid."""
    contiguous(inputs.dtype, inputs=inputs, coefficients=coefficients)
    contiguous(torch.int32, kind=kind)
    n_inputs, n, k = inputs.shape
    block = channel_block(k, CHANNELS[inputs.dtype])
    shape = (k, block, coefficients.shape[3], coefficients.shape[1])

    def made() -> list[Any]:
        structure = (nodes.tolist(), term.tolist(), starts.tolist())
        return [make(Tree(n_inputs, *structure, outputs), *shape) for outputs in _split(structure[2])]

    return memo.get((nodes, term, starts), (make, n_inputs, *shape), made), (n, -(-k // block))


def polynomial(
    inputs: Tensor, coefficients: Tensor, kind: Tensor, nodes: Tensor, term: Tensor, starts: Tensor
) -> Tensor:
    """See reference.polynomial."""
    kernels, grid = _kernels(_forward, inputs, coefficients, kind, nodes, term, starts)
    out = inputs.new_empty(starts.shape[0] - 1, *inputs.shape[1:])
    for kernel in kernels:
        launch(kernel, grid, (inputs, coefficients, kind, out, inputs.shape[1]), {})
    return out


def polynomial_backward(
    inputs: Tensor, coefficients: Tensor, kind: Tensor, nodes: Tensor, term: Tensor, starts: Tensor, grad: Tensor
) -> Tensor:
    """(M, n, k) cotangent of the inputs."""
    kernels, grid = _kernels(_backward, inputs, coefficients, kind, nodes, term, starts)
    contiguous(inputs.dtype, grad=grad)
    out = torch.empty_like(inputs)
    for kernel in kernels:
        launch(kernel, grid, (inputs, coefficients, kind, grad, out, inputs.shape[1]), {})
    return out
