"""Schemas of the operators in Python, for a process that has no native library: the same as native/torch_ops.cpp."""

from functools import cache

import torch

from mdplug.kernels import load

_RADIAL = "Tensor table, Tensor values, Tensor r, Tensor kind"
_KNOTS = "int begin, int end, float first_knot, float step, int per_kind"
_HARMONICS = "Tensor vectors, Tensor r, Tensor left, Tensor right, Tensor table, int l_max"
_DENSITY = f"Tensor harmonics, {_RADIAL}, Tensor species, Tensor first, int kinds, {_KNOTS}"
_CONVOLUTION = (
    f"Tensor sent, Tensor harmonics, {_RADIAL}, Tensor sender, Tensor first, Tensor paths, Tensor coupling, "
    f"Tensor coefficient, {_KNOTS}"
)
_POLYNOMIAL = "Tensor inputs, Tensor coefficients, Tensor kind, Tensor nodes, Tensor term, Tensor starts"
_PRODUCT = (
    "Tensor linear, Tensor rows, Tensor group, Tensor norm, Tensor coefficients, Tensor kind, Tensor nodes, "
    "Tensor term, Tensor starts, Tensor mix, int n, int k, int k_out"
)

SCHEMAS = {
    "graph": "(Tensor pairs, Tensor vectors, Tensor place, int n_owned, float cutoff)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    "harmonics": f"({_HARMONICS}) -> Tensor",
    "harmonics_backward": f"({_HARMONICS}, Tensor grad, Tensor grad_r) -> Tensor",
    "density": f"({_DENSITY}) -> Tensor",
    "density_backward": f"({_DENSITY}, Tensor grad) -> (Tensor, Tensor)",
    "convolution": f"({_CONVOLUTION}) -> Tensor",
    "convolution_backward": f"({_CONVOLUTION}, Tensor grad) -> (Tensor, Tensor, Tensor)",
    "polynomial": f"({_POLYNOMIAL}) -> Tensor",
    "polynomial_backward": f"({_POLYNOMIAL}, Tensor grad) -> Tensor",
    "product": f"(Tensor messages, {_PRODUCT}) -> (Tensor, Tensor)",
    "product_backward": f"(Tensor grad, Tensor mixed, {_PRODUCT}) -> (Tensor, Tensor)",
    "linear": "(Tensor features, Tensor weight, Tensor group, Tensor base, int components, int k_out) -> Tensor",
    "pair_list": "(Tensor positions, Tensor reference, Tensor index, Tensor shifts, Tensor translations, float cutoff, "
    "float least, float most) -> (Tensor, Tensor, Tensor, int, int)",
    "sum_atoms": "(Tensor atom_energy, Tensor system_index, int systems) -> Tensor",
    "sum_pairs": "(Tensor vectors, Tensor gradient, Tensor pairs, Tensor atom_energy, Tensor system_index, int systems)"
    " -> (Tensor, Tensor, Tensor)",
}


@cache
def define() -> torch.library.Library | None:
    """Sees to it that the operators have their schemas, once in a process: from the native library, or from here."""
    if not load():
        return None  # the library has defined them
    library = torch.library.Library("mdplug", "FRAGMENT")
    for name, schema in SCHEMAS.items():
        library.define(name + schema)
    return library
