"""Derivatives of the operators for torch's autograd: of first order, and of second order for losses on forces.

Second derivatives of `density` and `convolution` need the radial functions as values, not as tables. There is no third
order: the operators `*_second` and `harmonics_tangent` refuse to be differentiated.

In an evaluation the force pass asks for derivatives by the pair vectors and the last pass for those by the weights;
each formula leaves out what its pass does not ask for.
"""

import threading
from functools import cache
from typing import Any, Callable, Sequence

import torch
from torch import Tensor

from mdplug.errors import MdplugError
from mdplug.kernels import reference

ops: Any = torch.ops.mdplug
Grads = tuple[Tensor | None, ...]

# Places of arguments, as in `reference`.
HARMONICS = {"density": 0, "convolution": 1}
DENSITY_VALUES, CONVOLUTION_VALUES = 2, 3


_registering = threading.Lock()


def register() -> None:
    """Teach torch the shapes and derivatives of all operators; once, after the library is loaded."""
    with _registering:  # a trainer has several threads
        _register()


@cache
def _register() -> None:
    for name, (shape, backward) in OPERATORS.items():
        torch.library.register_fake(f"mdplug::{name}", shape)
        if backward is not None:
            torch.library.register_autograd(f"mdplug::{name}", backward, setup_context=_keep)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.tensors = [i for i, x in enumerate(inputs) if isinstance(x, Tensor)]
    ctx.save_for_backward(*(inputs[i] for i in ctx.tensors))
    ctx.others = {i: x for i, x in enumerate(inputs) if not isinstance(x, Tensor)}
    ctx.set_materialize_grads(False)


def _arguments(ctx: Any) -> list[Any]:
    found = dict(zip(ctx.tensors, ctx.saved_tensors, strict=True)) | ctx.others
    return [found[i] for i in range(len(found))]


def _wanted(ctx: Any, place: int) -> bool:
    """Whether the running pass uses the gradient of an argument (`needs_input_grad` is true for other passes, too)."""
    if not ctx.needs_input_grad[place]:
        return False
    node = ctx.next_functions[ctx.tensors.index(place)][0]
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except (AttributeError, RuntimeError):  # a leaf that is asked for, or a torch without this question
        return True


def _of_all(part: Tensor, pairs: Tensor, first: Tensor, begin: int) -> Tensor:
    """Rows of the pairs of some receivers, among zeros for all other pairs."""
    if part.shape[0] == pairs.shape[0]:
        return part.contiguous()
    start = int(first[begin])
    after = pairs.shape[0] - start - part.shape[0]
    return torch.cat([part.new_zeros(start, *part.shape[1:]), part, part.new_zeros(after, *part.shape[1:])])


def _no_third(ctx: Any, *grads: Tensor) -> Grads:
    raise MdplugError("the native operators have first and second derivatives only; use the model in plain torch")


# --- harmonics -------------------------------------------------------------------------------------------------------


def _harmonics_backward(ctx: Any, grad: Tensor | None) -> Grads:
    """r is |vectors| and has no gradient of its own here."""
    if grad is None:
        return (None,) * 6
    arguments = _arguments(ctx)
    return (ops.harmonics_backward(*arguments, grad.contiguous(), torch.zeros_like(arguments[1])), *(None,) * 5)


def _harmonics_second(ctx: Any, along: Tensor | None) -> Grads:
    if along is None:
        return (None,) * 8
    vectors, r, left, right, table, l_max, grad, grad_r = _arguments(ctx)
    by_grad = by_grad_r = by_vectors = None
    if _wanted(ctx, 6) or _wanted(ctx, 7):
        by_grad, by_grad_r = ops.harmonics_tangent(vectors, r, left, right, table, l_max, along.contiguous())
    if _wanted(ctx, 0):  # of second order in the positions: no loss needs it
        with torch.enable_grad():
            v = vectors.detach().requires_grad_(True)
            length = torch.linalg.vector_norm(v, dim=1)
            y = reference.harmonics(v, length, left, right, table, l_max)
            slope = torch.autograd.grad((y * grad).sum() + (length * grad_r).sum(), v, create_graph=True)[0]
            by_vectors = torch.autograd.grad(slope, v, along)[0]
    return (by_vectors, None, None, None, None, None, by_grad, by_grad_r)


# --- density and convolution: linear in features, harmonics and values ------------------------------------------------


def _linear_backward(name: str, values: int, linear: Sequence[int]) -> Callable[..., Grads]:
    """First derivatives of `name`; `values`: place of the radial functions; `linear`: places it is linear in."""
    table, r = values - 1, values + 1

    def backward(ctx: Any, grad: Tensor | None) -> Grads:
        arguments = _arguments(ctx)
        found: list[Tensor | None] = [None] * len(arguments)
        if grad is None:
            return tuple(found)
        tabulated = arguments[table].numel() > 0
        places = [*linear[:-1], r if tabulated else values]
        if not any(_wanted(ctx, i) for i in places):
            return tuple(found)
        pairs = _range(name, arguments)
        for i, part in zip(places, getattr(ops, f"{name}_backward")(*arguments, grad.contiguous()), strict=True):
            found[i] = _of_all(part, arguments[HARMONICS[name]], *pairs) if i in (HARMONICS[name], r) else part
        return tuple(found)

    return backward


def _refuse_tables(table: Tensor) -> None:
    if table.numel() > 0:
        raise MdplugError("second derivatives need radial functions as values, not as tables")


def _density_second(ctx: Any, move_harmonics: Tensor | None, move_values: Tensor | None) -> Grads:
    """S = <grad, density(move_harmonics, values) + density(harmonics, move_values)>."""
    harmonics, table, values, *rest, grad = _arguments(ctx)
    _refuse_tables(table)
    by_harmonics = by_values = by_grad = None
    if move_harmonics is not None:
        whole = _of_all(move_harmonics, harmonics, *_range("density", _arguments(ctx)))
        by_grad = ops.density(whole, table, values, *rest)
        if _wanted(ctx, 2):
            by_values = ops.density_backward(whole, table, values, *rest, grad)[1]
    if move_values is not None:
        moved = (harmonics, table, move_values.contiguous(), *rest)
        by_grad = ops.density(*moved) if by_grad is None else by_grad + ops.density(*moved)
        if _wanted(ctx, 0):
            part = ops.density_backward(*moved, grad)[0]
            by_harmonics = _of_all(part, harmonics, *_range("density", _arguments(ctx)))
    return (by_harmonics, None, by_values, *(None,) * len(rest), by_grad)


def _convolution_second(ctx: Any, *moves: Tensor | None) -> Grads:
    """S = <grad, the change of the messages along the moves of features, harmonics and values>."""
    *arguments, grad = _arguments(ctx)
    sent, harmonics, table, values = arguments[:4]
    _refuse_tables(table)
    pairs = _range("convolution", arguments)
    move_sent, move_harmonics, move_values = (
        torch.zeros_like(x) if move is None else move.contiguous()
        for x, move in zip((sent, harmonics, values), moves, strict=True)
    )
    move_harmonics = _of_all(move_harmonics, harmonics, *pairs)
    by_grad, by_sent, by_values = ops.convolution_second(*arguments, grad, move_sent, move_harmonics, move_values)
    by_harmonics = None
    if _wanted(ctx, 1):  # of second order in the positions: no loss needs it
        by_features = ops.convolution_backward(move_sent, harmonics, table, values, *arguments[4:], grad)[1]
        by_radial = ops.convolution_backward(sent, harmonics, table, move_values, *arguments[4:], grad)[1]
        by_harmonics = _of_all(by_features + by_radial, harmonics, *pairs)
    return (by_sent, by_harmonics, None, by_values, *(None,) * 12, by_grad)


def _range(name: str, arguments: list[Any]) -> tuple[Tensor, int]:
    """First pair of each receiver, and the first receiver of the call."""
    return (arguments[6], arguments[8]) if name == "density" else (arguments[7], arguments[11])


# --- polynomial ------------------------------------------------------------------------------------------------------


def _polynomial_backward(ctx: Any, grad: Tensor | None) -> Grads:
    if grad is None:
        return (None,) * 6
    inputs, coefficients, *structure = _arguments(ctx)
    grad = grad.contiguous()
    by_inputs = by_coefficients = None
    if _wanted(ctx, 0):
        by_inputs = ops.polynomial_backward(inputs, coefficients, *structure, grad)
    if _wanted(ctx, 1):
        by_coefficients = ops.polynomial_coefficients(inputs, *structure, grad, coefficients.shape[0])
    return (by_inputs, by_coefficients, None, None, None, None)


def _polynomial_second(ctx: Any, along: Tensor | None) -> Grads:
    if along is None:
        return (None,) * 7
    by_grad, by_inputs, by_coefficients = ops.polynomial_second(*_arguments(ctx), along.contiguous())
    return (by_inputs, by_coefficients, None, None, None, None, by_grad)


def _polynomial_coefficients_backward(ctx: Any, along: Tensor | None) -> Grads:
    """The change of the polynomial with its coefficients: linear in them."""
    if along is None:
        return (None,) * 7
    inputs, *structure, grad, _ = _arguments(ctx)
    along = along.contiguous()
    by_inputs = ops.polynomial_backward(inputs, along, *structure, grad)
    return (by_inputs, None, None, None, None, ops.polynomial(inputs, along, *structure), None)


# --- shapes ----------------------------------------------------------------------------------------------------------


def _pairs_of(harmonics: Tensor, first: Tensor, begin: int, end: int) -> Any:
    if begin == 0 and end == first.shape[0] - 1:
        return harmonics.shape[0]
    return torch.library.get_ctx().new_dynamic_size()


def _graph(pairs: Tensor, vectors: Tensor, place: Tensor, n_owned: int, cutoff: float) -> tuple[Tensor, ...]:
    p = torch.library.get_ctx().new_dynamic_size()
    integer = place.new_empty
    return (
        vectors.new_empty(p, 3), vectors.new_empty(p), integer(p), integer(p), integer(n_owned + 1),
        pairs.new_empty(p),
    )  # fmt: skip


def _harmonics(vectors: Tensor, r: Tensor, left: Tensor, right: Tensor, table: Tensor, l_max: int) -> Tensor:
    return vectors.new_empty(r.shape[0], (l_max + 1) ** 2)


def _harmonics_tangent(*arguments: Any) -> tuple[Tensor, Tensor]:
    return _harmonics(*arguments[:-1]), torch.empty_like(arguments[1])


def _density(
    harmonics: Tensor, table: Tensor, values: Tensor, r: Tensor, kind: Tensor, species: Tensor, first: Tensor,
    kinds: int, begin: int, end: int, first_knot: float, step: float, per_kind: int,
) -> Tensor:  # fmt: skip
    b = (values if table.numel() == 0 else table).shape[-1]
    return harmonics.new_empty(harmonics.shape[1], end - begin, kinds * b)


def _density_backward(*arguments: Any) -> tuple[Tensor, Tensor]:
    harmonics, table, values, r, _, _, first, _, begin, end = arguments[:10]
    n = _pairs_of(harmonics, first, begin, end)
    of_radial = r.new_empty(n) if table.numel() else torch.empty_like(values)
    return harmonics.new_empty(n, harmonics.shape[1]), of_radial


def _convolution(
    sent: Tensor, harmonics: Tensor, table: Tensor, values: Tensor, r: Tensor, kind: Tensor, sender: Tensor,
    first: Tensor, paths: Tensor, coupling: Tensor, coefficient: Tensor, begin: int, end: int, first_knot: float,
    step: float, per_kind: int,
) -> Tensor:  # fmt: skip
    return sent.new_empty(torch.library.get_ctx().new_dynamic_size())  # the degrees of the paths say how many


def _convolution_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    sent, harmonics, table, values, r, _, _, first, _, _, _, begin, end = arguments[:13]
    n = _pairs_of(harmonics, first, begin, end)
    of_radial = r.new_empty(n) if table.numel() else torch.empty_like(values)
    return torch.empty_like(sent), harmonics.new_empty(n, harmonics.shape[1]), of_radial


def _convolution_second_shape(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(arguments[16]), torch.empty_like(arguments[0]), torch.empty_like(arguments[3])


def _polynomial(
    inputs: Tensor, coefficients: Tensor, kind: Tensor, nodes: Tensor, term: Tensor, starts: Tensor
) -> Tensor:
    return inputs.new_empty(starts.shape[0] - 1, *inputs.shape[1:])


def _polynomial_coefficients(
    inputs: Tensor, kind: Tensor, nodes: Tensor, term: Tensor, starts: Tensor, grad: Tensor, kinds: int
) -> Tensor:
    block = 64 // inputs.element_size()
    return inputs.new_empty(kinds, -(-inputs.shape[2] // block), term.shape[0], block)


def _product(messages: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    n, k, k_out = arguments[-3:]
    outputs, inputs = arguments[8].shape[0] - 1, arguments[1].shape[0] ** 2
    return messages.new_empty(outputs, n, k_out), messages.new_empty(inputs, n, k)


def _product_backward(grad: Tensor, mixed: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    size = torch.library.get_ctx().new_dynamic_size()  # the heights of the matrices say how many
    return grad.new_empty(size), torch.empty_like(arguments[3])


def _linear(features: Tensor, weight: Tensor, group: Tensor, base: Tensor, components: int, k_out: int) -> Tensor:
    return features.new_empty(components, features.shape[1], k_out)


def _cell_list(positions: Tensor, cell: Tensor, inverse: Tensor, periodic: int, cutoff: float) -> tuple[Tensor, Tensor]:
    n = torch.library.get_ctx().new_dynamic_size()
    return positions.new_empty(2, n, dtype=torch.int64), positions.new_empty(n, 3, dtype=torch.int64)


def _sum_atoms(atom_energy: Tensor, system_index: Tensor, systems: int) -> Tensor:
    return atom_energy.new_empty(systems, dtype=torch.float64)


def _sum_pairs(
    vectors: Tensor, gradient: Tensor, pairs: Tensor, atom_energy: Tensor, system_index: Tensor, systems: int
) -> tuple[Tensor, Tensor, Tensor]:
    n = system_index.shape[0]
    return vectors.new_empty(systems), vectors.new_empty(n, 3), vectors.new_empty(systems, 3, 3)


# Not among them: pair_list, whose plain numbers no shape without data can tell.
OPERATORS: dict[str, tuple[Callable[..., Any], Callable[..., Grads] | None]] = {
    "graph": (_graph, None),
    "harmonics": (_harmonics, _harmonics_backward),
    "harmonics_backward": (lambda *a: torch.empty_like(a[0]), _harmonics_second),
    "harmonics_tangent": (_harmonics_tangent, _no_third),
    "density": (_density, _linear_backward("density", DENSITY_VALUES, (0, DENSITY_VALUES))),
    "density_backward": (_density_backward, _density_second),
    "convolution": (_convolution, _linear_backward("convolution", CONVOLUTION_VALUES, (0, 1, CONVOLUTION_VALUES))),
    "convolution_backward": (_convolution_backward, _convolution_second),
    "convolution_second": (_convolution_second_shape, _no_third),
    "product": (_product, None),
    "product_backward": (_product_backward, None),
    "linear": (_linear, None),
    "cell_list": (_cell_list, None),
    "sum_atoms": (_sum_atoms, None),
    "sum_pairs": (_sum_pairs, None),
    "polynomial": (_polynomial, _polynomial_backward),
    "polynomial_backward": (lambda *a: torch.empty_like(a[0]), _polynomial_second),
    "polynomial_coefficients": (_polynomial_coefficients, _polynomial_coefficients_backward),
    "polynomial_second": (
        lambda *a: (torch.empty_like(a[6]), torch.empty_like(a[0]), torch.empty_like(a[1])),
        _no_third,
    ),
}
