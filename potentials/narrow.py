"""A MACE for fewer elements: the same function of them, in a smaller file and with tables for their pairs alone."""

from dataclasses import replace
from typing import Sequence

import torch

from mdplug.errors import InputError
from mdplug.potentials.mace import MACE


def narrowed(mace: MACE, species: Sequence[int]) -> MACE:
    """A copy that knows some of the elements.

    Args:
        mace: radial functions exact. species: atomic numbers.

    Raises:
        InputError: none at all, or one that the model does not know.
    """
    from ase.data import chemical_symbols

    spec = mace.spec
    kept = tuple(z for z in spec.species if z in species)
    unknown = [chemical_symbols[z] for z in species if z not in spec.species]
    if unknown or not kept:
        known = " ".join(chemical_symbols[z] for z in spec.species)
        raise InputError(f"{spec.name!r} cannot be narrowed to {' '.join(unknown) or 'no element'}; it knows {known}")
    small = MACE(replace(spec, species=kept)).to(mace.embedding.device, mace.embedding.dtype)
    rows = torch.tensor([spec.species.index(z) for z in kept], device=mace.embedding.device)
    wanted = small.state_dict()
    tensors = {}
    for name, tensor in mace.state_dict().items():
        for axis, size in enumerate(wanted[name].shape):
            if size != tensor.shape[axis]:  # that of the elements
                tensor = tensor.index_select(axis, rows)
        tensors[name] = tensor
    small.load_state_dict(tensors)
    small.head, small.origin = mace.head, mace.origin
    return small.requires_grad_(mace.embedding.requires_grad).train(mace.training)
