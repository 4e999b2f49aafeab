"""The training loss: energy per atom, force components, stress; squared or Huber, every structure's weight honoured."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from mdplug.workflows._common import Config
from mdplug.workflows.dataset import Batch


class LossConfig(Config):
    """Shape and weights of the loss.

    The energy weight goes geometrically from `energy` to `energy_end` over the run: forces first teach the shape of the
    surface, energies fix what is left.
    """

    kind: Literal["squared", "huber"] = "huber"
    energy: float = Field(1.0, ge=0)
    energy_end: float | None = Field(None, ge=0, description="None: as energy")
    forces: float = Field(10.0, ge=0)
    stress: float = Field(0.0, ge=0)
    delta_energy_eV_atom: float = Field(0.01, gt=0)
    delta_forces_eV_A: float = Field(0.1, gt=0)
    delta_stress_eV_A3: float = Field(0.01, gt=0)

    def energy_weight(self, fraction: float) -> float:
        """Weight of the energy term when `fraction` of the run is done."""
        end = self.energy if self.energy_end is None else self.energy_end
        if self.energy <= 0 or end <= 0:
            return self.energy + (end - self.energy) * fraction
        return self.energy * (end / self.energy) ** fraction


def penalty(error: Tensor, kind: str, delta: float) -> Tensor:
    """Element-wise e^2, or Huber's e^2/2 up to delta and delta (|e| - delta/2) beyond, over delta (so slope 1)."""
    if kind == "squared":
        return error.square()
    size = error.abs()
    return torch.where(size < delta, 0.5 * error.square() / delta, size - 0.5 * delta)


def loss(
    energy: Tensor,
    forces: Tensor,
    stress: Tensor | None,
    batch: Batch,
    config: LossConfig,
    fraction: float = 0.0,
    whole: tuple[int, int] | None = None,
) -> Tensor:
    """Weighted sum of means: over structures (energy per atom, stress components) and over force components.

    Args:
        energy: (S,) eV, interaction part. forces: (N, 3) eV/A. stress: (S, 3, 3) eV/A^3; needed if it has a weight.
        batch: labels. config: shape and weights. fraction: of the run that is done.
        whole: structures and atoms of the batch that this is a part of; the parts' losses then add up to the whole's.
    """
    n_structures, n_atoms = whole or (energy.shape[0], forces.shape[0])
    kind = config.kind
    e = penalty((energy - batch.energy) / batch.n_atoms, kind, config.delta_energy_eV_atom)
    total = config.energy_weight(fraction) * (batch.energy_weight * e).sum() / n_structures
    if config.forces:
        f = penalty(forces - batch.forces, kind, config.delta_forces_eV_A)
        weight = batch.forces_weight[batch.system.system_index].unsqueeze(1)
        total = total + config.forces * (weight * f).sum() / (3 * n_atoms)
    if config.stress and stress is not None:
        # Structures without a volume have no stress: weight 0 times NaN would be NaN.
        known = batch.stress_weight > 0
        s = penalty((stress - batch.stress)[known], kind, config.delta_stress_eV_A3)
        total = total + config.stress * (batch.stress_weight[known].view(-1, 1, 1) * s).sum() / (9 * n_structures)
    return total
