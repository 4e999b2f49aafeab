"""The posterior of a potential's weights, given labels: Gaussian noise on energies and forces, Gaussian priors.

U = sum over structures of w (1/2 ((E - E^)/(n s_E))^2 + ln s_E) + sum over force components of w (1/2 ((F - F^)/s_F)^2
+ ln s_F) + 1/2 sum of (weight / (width size))^2 + 1/2 sum of (ln(s / s_0) / scale_width)^2: a sum over all labels,
where a training loss is a mean. w is the weight of a structure.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from mdplug.deployed import call, deploy
from mdplug.errors import InputError
from mdplug.potential import Potential, dtype_of
from mdplug.workflows._common import Config
from mdplug.workflows.dataset import Batch, Loader

HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)


class PriorConfig(Config):
    """What is believed before the labels are seen."""

    prior_width: float = Field(1.0, gt=0, description="standard deviation of weights, in their typical sizes")
    sigma_energy_eV_atom: float | None = Field(None, gt=0, description="noise of energies; default: sampled as well")
    sigma_forces_eV_A: float | None = Field(None, gt=0, description="noise of force components; default: sampled")
    scale_width: float = Field(2.0, gt=0, description="of ln(noise) about a tenth of the labels' own spread")


@dataclass(frozen=True)
class Noise:
    """Standard deviations of the labels' noise.

    Attributes:
        names: of the kinds of labels that are used, "energy" (eV/atom) and "forces" (eV/A).
        centre: (K,) the fixed values, or where the prior is centred. sampled: (K,) whether each is sampled.
    """

    names: tuple[str, ...]
    centre: Tensor
    sampled: Tensor

    @classmethod
    def of(cls, data: Loader, config: PriorConfig, energies: bool, forces: bool) -> Noise:
        """For the labels of a data set.

        Args:
            energies, forces: whether these labels are to be used where they are.

        Raises:
            InputError: no label is left.
        """
        found: list[tuple[str, float | None, float]] = []
        statistics = data.statistics()
        weighted = [(s.weight, e) for s, e in zip(data.structures, data.interaction, strict=True)]
        known = [e / s.n_atoms for s, (w, e) in zip(data.structures, weighted, strict=True) if w > 0 and np.isfinite(e)]
        if energies and known:
            spread = float(np.std(known)) or statistics["rms_force"] * 0.1
            found.append(("energy", config.sigma_energy_eV_atom, 0.1 * spread))
        if forces and any(s.forces is not None and s.weight > 0 for s in data.structures):
            found.append(("forces", config.sigma_forces_eV_A, 0.1 * statistics["rms_force"]))
        if not found:
            raise InputError("no label is left for the posterior; give loss.energy or loss.forces a weight above zero")
        return cls(
            tuple(name for name, _, _ in found),
            torch.tensor([given or guess for _, given, guess in found], dtype=torch.float64),
            torch.tensor([given is None for _, given, _ in found]),
        )

    @property
    def n_sampled(self) -> int:
        """How many are sampled."""
        return int(self.sampled.sum())

    def at(self, logs: Tensor) -> dict[str, Tensor]:
        """{name: standard deviation} where the sampled ones are exp(logs) times their centre."""
        place = torch.cumsum(self.sampled, 0) - 1
        return {
            name: self.centre[k] * logs[place[k]].exp() if bool(self.sampled[k]) else self.centre[k]
            for k, name in enumerate(self.names)
        }


def minus_log_likelihood(noise: dict[str, Tensor], out: dict[str, Tensor], batch: Batch) -> Tensor:
    """Of the labels of a batch.

    Args:
        noise: {"energy": eV/atom, "forces": eV/A}; kinds that are not there are left out.
        out: "energy" (S,) eV, "forces" (N, 3) eV/A as predicted.
    """
    total = batch.energy.new_zeros(())
    if "energy" in noise:
        z = (out["energy"] - batch.energy) / (batch.n_atoms * noise["energy"])
        total = total + (batch.energy_weight * (0.5 * z.square() + noise["energy"].log() + HALF_LOG_2PI)).sum()
    if "forces" in noise:
        z = (out["forces"] - batch.forces) / noise["forces"]
        each = 0.5 * z.square().sum(dim=1) + 3.0 * (noise["forces"].log() + HALF_LOG_2PI)
        total = total + (batch.forces_weight[batch.system.system_index] * each).sum()
    return total


class Batches:
    """Batches of a data set; those in order are put together once, for they come again and again.

    Args:
        data: the structures.
    """

    def __init__(self, data: Loader):
        self.data = data
        self.ordered = data.plan(None)
        self._kept: dict[tuple[int, ...], Batch | None] = {tuple(chosen): None for chosen in self.ordered}

    def plan(self, seed: int | None) -> list[list[int]]:
        """See `Loader.plan`."""
        return self.ordered if seed is None else self.data.plan(seed)

    def collate(self, chosen: Sequence[int]) -> Batch:
        """See `Loader.collate`."""
        key = tuple(chosen)
        batch = self._kept.get(key) or self.data.collate(chosen)
        if key in self._kept:
            self._kept[key] = batch
        return batch


class Posterior:
    """Target of a sampler: positions are weights over their typical sizes, then ln(noise / centre) where sampled.

    Args:
        potential: evaluated with any weights; it is changed, and belongs to one chain.
        data: labels. noise: of them. config: priors.
    """

    def __init__(self, potential: Potential, data: Batches, noise: Noise, config: PriorConfig):
        self.potential, self.deployed, self.data, self.noise = potential, deploy(potential), data, noise
        self.weights = dict(potential.named_parameters())
        if not self.weights:
            raise InputError(f"potential {potential.spec.name!r} has no parameters; there is nothing to sample")
        scales = potential.scales()
        sizes = [
            torch.as_tensor(scales.get(name, 1.0), dtype=torch.float64).expand(one.shape).reshape(-1)
            for name, one in self.weights.items()
        ]
        self.sizes = torch.cat(sizes)
        self.displacement = 1e-5 if dtype_of(potential) is torch.float64 else 3e-4
        width = torch.full_like(self.sizes, config.prior_width)
        self.width = torch.cat([width, width.new_full((noise.n_sampled,), config.scale_width)])

    def start(self) -> Tensor:
        """(P,) where the potential is now, noise at its centre."""
        weights = torch.cat([one.detach().to(torch.float64).reshape(-1) for one in self.weights.values()])
        return torch.cat([weights / self.sizes, weights.new_zeros(self.noise.n_sampled)])

    def put(self, position: Tensor) -> Tensor:
        """Give the potential the weights of a position; what is left is the logarithms of the noise."""
        n = len(self.sizes)
        values = (position[:n] * self.sizes).split([one.numel() for one in self.weights.values()])
        with torch.no_grad():
            for one, value in zip(self.weights.values(), values, strict=True):
                one.copy_(value.view(one.shape))
        return position[n:]

    def plan(self, seed: int | None) -> list[list[int]]:
        """See `Target.plan`."""
        return self.data.plan(seed)

    def likelihood(self, position: Tensor, chosen: Sequence[int]) -> tuple[float, Tensor]:
        """See `Target.likelihood`."""
        logs = self.put(position).clone().requires_grad_(True)
        batch = self.data.collate(chosen)
        with torch.enable_grad():
            out = call(self.deployed, batch.system, batch.pairs, "forces" in self.noise.names, True)
            value = minus_log_likelihood(self.noise.at(logs), out, batch)
            inputs = [*self.weights.values(), logs]
            found = torch.autograd.grad(value, inputs, allow_unused=True, materialize_grads=True)
        flat = torch.cat([one.to(torch.float64).reshape(-1) for one in found[:-1]])
        return float(value.detach()), torch.cat([flat * self.sizes, found[-1]])

    def prior(self, position: Tensor) -> tuple[float, Tensor]:
        """See `Target.prior`."""
        z = position / self.width
        return 0.5 * float(z.square().sum()), z / self.width

    def prior_curvature(self) -> Tensor:
        """See `Target.prior_curvature`."""
        return self.width.square().reciprocal()

    def predictions(self, position: Tensor, data: Batches) -> tuple[float, Tensor, Tensor]:
        """-log likelihood of a data set, its energies (S,) eV/atom and force components (3 N,), at a position."""
        noise = self.noise.at(self.put(position))
        total, energies, forces = 0.0, [], []
        forces_too = "forces" in self.noise.names
        for chosen in data.plan(None):
            batch = data.collate(chosen)
            out = call(self.deployed, batch.system, batch.pairs, forces_too, False)
            total += float(minus_log_likelihood(noise, out, batch))
            energies.append(out["energy"].detach() / batch.n_atoms)
            if forces_too:
                forces.append(out["forces"].detach().reshape(-1))
        return total, torch.cat(energies), torch.cat([*forces, torch.zeros(0, dtype=torch.float64)])


@dataclass(frozen=True)
class Probes:
    """What is remembered of each sample, to see whether chains agree: functions, for weights are not identifiable.

    Attributes:
        data: structures whose predictions are compared. components: (C,) places in their force components.
        names: (Q,) of the numbers of `observe`.
    """

    data: Batches
    components: Tensor
    names: tuple[str, ...]

    @classmethod
    def of(cls, data: Loader, noise: Noise, n_forces: int, seed: int) -> Probes:
        """Energies of each structure of `data` where energies are fitted, and some of its force components."""
        n = 3 * sum(s.n_atoms for s in data.structures) if "forces" in noise.names else 0
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        chosen = order[:n_forces].sort().values
        names = ["log_posterior", *(f"ln_sigma_{noise.names[k]}" for k in noise.sampled.nonzero().flatten().tolist())]
        if "energy" in noise.names:
            names += [f"energy_{k}_eV_atom" for k in range(len(data.structures))]
        names += [f"force_{int(k)}_eV_A" for k in chosen]
        return cls(Batches(data), chosen, tuple(names))

    def observe(self, target: Posterior, position: Tensor) -> Tensor:
        """(Q,) the log posterior, ln of sampled noise, and predictions on the probe structures."""
        data = target.predictions(position, target.data)[0]
        _, energies, forces = target.predictions(position, self.data)
        n = target.noise.n_sampled
        parts = [torch.tensor([-data - target.prior(position)[0]], dtype=torch.float64)]
        parts.append(position[len(position) - n :])
        if "energy" in target.noise.names:
            parts.append(energies)
        return torch.cat([*parts, forces[self.components]])
