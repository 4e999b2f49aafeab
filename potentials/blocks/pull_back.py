"""Vector-Jacobian products without torch.autograd.grad's own cotangents, whose first use imports sympy (0.7 s)."""

from typing import List, Sequence, Tuple

import torch
from torch import Tensor


def pull_back(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor], create_graph: bool = False
) -> Tuple[Tensor, ...]:
    """Cotangents of `inputs` for those of `outputs`, to the last bit what torch.autograd.grad gives.

    Args:
        outputs, cotangents: tensors of the same shapes. inputs: all of them must matter. create_graph: as torch's.
    """
    with torch.enable_grad():
        products: List[Tensor] = [(out * cotangent).sum() for out, cotangent in zip(outputs, cotangents, strict=True)]
        return torch.autograd.grad(products, inputs, retain_graph=True, create_graph=create_graph)
