"""Screened repulsion of Ziegler, Biersack and Littmark (1985) as MACE writes it."""

from typing import Final, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor

from mdplug.potentials.blocks.harmonics import Constants
from mdplug.potentials.blocks.radial import cutoff_with_slope, polynomial_cutoff


class Repulsion(Constants):
    """Screened nuclear repulsion, switched off at the sum of covalent radii; credited to the receiver.

    Args:
        numbers: (S,) atomic numbers. radii: (S,) A. p: exponent of the switch.
    """

    p: Final[int]
    coefficients: Tensor
    exponent: Tensor
    prefactor: Tensor
    radii: Tensor
    charges: Tensor
    decay: Tensor
    rounded: Tensor

    def __init__(self, numbers: Sequence[int], radii: Sequence[float], p: int, dtype: torch.dtype):
        super().__init__()
        self.p = p
        self.register_buffer("coefficients", torch.tensor([0.1818, 0.5099, 0.2802, 0.02817], dtype=dtype))
        self.register_buffer("exponent", torch.tensor(0.3, dtype=dtype))
        self.register_buffer("prefactor", torch.tensor(0.4543, dtype=dtype))
        self.register_buffer("radii", torch.tensor(radii, dtype=dtype))
        self.add_constant("charges", np.array(numbers), dtype)
        self.add_constant("decay", np.array([3.2, 0.9423, 0.4028, 0.2016]), dtype)
        # Bohr radius (A) and e^2/(4 pi eps0) (eV A) as rounded by upstream: the weights were trained around them.
        self.add_constant("rounded", np.array([0.529, 14.3996]), dtype)

    def forward(self, r: Tensor, receiver: Tensor, sender: Tensor) -> Tensor:
        """(E, 1) A, species of both atoms (E,) -> (E,) eV, half of the pair energy."""
        power = self.charges**self.exponent
        length = self.prefactor * self.rounded[0] / (power[receiver] + power[sender])
        screening = torch.mv(torch.exp(-(r / length.unsqueeze(1)) * self.decay), self.coefficients)
        product = self.charges[receiver] * self.charges[sender]
        bare = 0.5 * self.rounded[1] * product / r.squeeze(1)
        reach = (self.radii[receiver] + self.radii[sender]).unsqueeze(1)
        return bare * screening * polynomial_cutoff(r, reach, self.p).squeeze(1)

    def with_slope(self, r: Tensor, receiver: Tensor, sender: Tensor) -> Tuple[Tensor, Tensor]:
        """What `forward` gives, and its derivative by r, eV/A; both (E,)."""
        power = self.charges**self.exponent
        length = self.prefactor * self.rounded[0] / (power[receiver] + power[sender])
        rate = self.decay / length.unsqueeze(1)
        parts = torch.exp(-r * rate) * self.coefficients
        screening, d_screening = parts.sum(1), -(parts * rate).sum(1)
        x = r.squeeze(1)
        bare = 0.5 * self.rounded[1] * self.charges[receiver] * self.charges[sender] / x
        reach = (self.radii[receiver] + self.radii[sender]).unsqueeze(1)
        switch, d_switch = cutoff_with_slope(r, reach, self.p)
        switch, d_switch = switch.squeeze(1), d_switch.squeeze(1)
        slope = bare * (d_screening * switch + screening * (d_switch - switch / x))
        return bare * screening * switch, slope
