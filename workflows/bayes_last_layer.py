"""The posterior of linear readouts of a potential's features: quadratic, so that a step costs no evaluation at all.

Energies and forces are linear in the weights of `SharedMembers`; what labels say about them is A (F, F), b (F,), c and
n for each kind of label, gathered once by pulling each feature back to the positions. At fixed noise the posterior is
the Gaussian of precision H = sum A / s^2 + 1/width^2 and mean H^-1 sum b / s^2; chains move in coordinates where H = 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mdplug.errors import InputError
from mdplug.pairs import pair_vectors
from mdplug.potential import Potential
from mdplug.potentials.members import SharedMembers
from mdplug.uncertainty import Pulled, linearised
from mdplug.workflows.bayes import BayesConfig, displaced
from mdplug.workflows.bayes_posterior import Noise
from mdplug.workflows.bayes_sampler import Target
from mdplug.workflows.dataset import Batch, Loader


@dataclass(frozen=True)
class Design:
    """What is linear in the weights, of a batch: energies (S, W) per atom and forces (3 N, W), and the body's own.

    Attributes:
        energy, forces: slopes. energy_body: (S,) eV/atom. forces_body: (3 N,) eV/A.
    """

    energy: Tensor
    forces: Tensor
    energy_body: Tensor
    forces_body: Tensor


class Linear:
    """Energies and forces as linear functions of weights (F,) and offsets (Z,) of the elements.

    Args:
        body: gives "features". data: whose features are centred and scaled to unit variance.
        forces, energies: which labels are used; without energies there are no offsets to find.
    """

    def __init__(self, body: Potential, data: Loader, energies: bool, forces: bool):
        self.body, self.energies, self.forces = body, energies, forces
        features, numbers = [], []
        for chosen in data.plan(None):
            batch = data.collate(chosen)
            features.append(self._linearised(batch)[0]["features"].to(torch.float64))
            numbers.append(batch.system.numbers)
        self.features, self.numbers = torch.cat(features), torch.cat(numbers)
        self.centre = self.features.mean(dim=0)
        spread = self.features.std(dim=0)
        self.scale = torch.where(spread > 1e-9 * spread.max(), 1.0 / spread.clamp_min(1e-300), torch.zeros_like(spread))
        self.species = torch.tensor(body.spec.species) if energies else torch.zeros(0, dtype=torch.int64)

    def _linearised(self, batch: Batch) -> tuple[dict[str, Tensor], Pulled]:
        system, found = batch.system, batch.pairs  # a batch brings no vectors: training forms them on its own
        vectors = pair_vectors(system, found.index, found.shifts)
        return linearised(self.body, system, replace(found, vectors=vectors, system=system))

    def design(self, batch: Batch) -> Design:
        """Of a batch of structures."""
        system = batch.system
        out, pulled = self._linearised(batch)
        features = out["features"]
        white = (features.to(torch.float64) - self.centre) * self.scale
        kinds = (system.numbers.unsqueeze(1) == self.species).to(torch.float64)
        columns = torch.cat([white, kinds], dim=1)
        n = torch.bincount(system.system_index, minlength=system.cell.shape[0]).to(torch.float64)
        energy = columns.new_zeros(len(n), columns.shape[1]).index_add(0, system.system_index, columns) / n[:, None]
        body = n.new_zeros(len(n)).index_add(0, system.system_index, out["atom_energy"].to(torch.float64)) / n
        slopes, own = columns.new_zeros(0, columns.shape[1]), columns.new_zeros(0)
        if self.forces:
            slopes = columns.new_zeros(3 * len(system.numbers), columns.shape[1])
            for k in range(features.shape[1]):
                cotangent = torch.zeros_like(features)
                cotangent[:, k] = self.scale[k].to(features.dtype)
                slopes[:, k] = pulled({"features": cotangent})[0].reshape(-1)
            own = pulled({"atom_energy": torch.ones_like(out["atom_energy"])})[0].reshape(-1)
        return Design(energy, slopes, body, own)


@dataclass
class Moments:
    """Of one kind of label: sum of w x x^T (W, W), of w x r (W,), of w r^2, of w, with residuals r of the body."""

    xx: Tensor
    xr: Tensor
    rr: float = 0.0
    n: float = 0.0

    def add(self, x: Tensor, r: Tensor, w: Tensor) -> None:
        """Labels: slopes (n, W), residuals (n,), weights (n,)."""
        self.xx += x.t() @ (w[:, None] * x)
        self.xr += x.t() @ (w * r)
        self.rr += float((w * r).dot(r))
        self.n += float(w.sum())

    def misfit(self, weights: Tensor) -> tuple[float, Tensor]:
        """Half the sum of w (r - x . weights)^2, and its gradient."""
        product = self.xx @ weights
        return 0.5 * (float(weights.dot(product - 2.0 * self.xr)) + self.rr), product - self.xr


class Quadratic:
    """Target of a sampler: positions are weights in coordinates where the precision at the centre is one.

    Attributes:
        back: (W, W), weights = back @ position. mean, covariance: of the weights at fixed noise, exactly.
    """

    displacement = 1e-3

    def __init__(self, moments: dict[str, Moments], noise: Noise, width: Tensor, scale_width: float):
        self.moments, self.noise, self.width, self.scale_width = moments, noise, width, scale_width
        precision = torch.diag(width.square().reciprocal())
        pull = torch.zeros_like(width)
        for name, s in noise.at(torch.zeros(noise.n_sampled, dtype=torch.float64)).items():
            precision = precision + moments[name].xx / s.square()
            pull = pull + moments[name].xr / s.square()
        lower = torch.linalg.cholesky(precision)
        self.back = torch.linalg.inv(lower).t().contiguous()
        self.covariance = self.back @ self.back.t()
        self.mean = self.covariance @ pull

    def start(self) -> Tensor:
        """(P,) the mean, noise at its centre."""
        return torch.cat([torch.linalg.solve(self.back, self.mean), torch.zeros(self.noise.n_sampled)])

    def plan(self, seed: int | None) -> list[list[int]]:
        """See `Target.plan`."""
        return [[0]]

    def likelihood(self, position: Tensor, chosen: Sequence[int]) -> tuple[float, Tensor]:
        """See `Target.likelihood`."""
        n = len(self.width)
        weights = self.back @ position[:n]
        noise = self.noise.at(position[n:])
        value, slope, logs = 0.0, torch.zeros_like(weights), []
        for k, (name, s) in enumerate(noise.items()):
            one = self.moments[name]
            misfit, gradient = one.misfit(weights)
            value += misfit / float(s) ** 2 + one.n * math.log(float(s))
            slope = slope + gradient / s.square()
            if bool(self.noise.sampled[k]):
                logs.append(one.n - 2.0 * misfit / float(s) ** 2)
        return value, torch.cat([self.back.t() @ slope, torch.tensor(logs, dtype=torch.float64)])

    def prior(self, position: Tensor) -> tuple[float, Tensor]:
        """See `Target.prior`."""
        n = len(self.width)
        z, u = (self.back @ position[:n]) / self.width, position[n:] / self.scale_width
        value = 0.5 * float(z.square().sum() + u.square().sum())
        return value, torch.cat([self.back.t() @ (z / self.width), u / self.scale_width])

    def prior_curvature(self) -> Tensor:
        """See `Target.prior_curvature`."""
        own = (self.back / self.width[:, None]).square().sum(dim=0)
        return torch.cat([own, own.new_full((self.noise.n_sampled,), self.scale_width**-2)])


class LastLayer:
    """The readouts of a body's features (see `bayes.Problem`).

    Args:
        body: as loaded. data: labels. probed: structures whose predictions are compared.

    Raises:
        InputError: a body without features.
    """

    def __init__(
        self,
        body: Potential,
        data: Loader,
        probed: Loader,
        config: BayesConfig,
        seed: int,
        energies: bool,
        forces: bool,
    ):
        if "features" not in body.spec.outputs:
            raise InputError(f"potential {body.spec.name!r} gives no features; sample all weights (last_layer: false)")
        self.config, self.seed, self.body = config, seed, body
        noise = Noise.of(data, config, energies, forces)
        energies, forces = "energy" in noise.names, "forces" in noise.names
        self.linear = linear = Linear(body, data, energies, forces)
        n_weights = linear.features.shape[1] + len(linear.species)
        moments = {
            name: Moments(torch.zeros(n_weights, n_weights, dtype=torch.float64), torch.zeros(n_weights).double())
            for name in noise.names
        }
        for chosen in data.plan(None):
            batch = data.collate(chosen)
            design = linear.design(batch)
            if energies:
                residual = batch.energy / batch.n_atoms - design.energy_body
                moments["energy"].add(design.energy, residual, batch.energy_weight)
            if forces:
                weight = batch.forces_weight[batch.system.system_index].repeat_interleave(3)
                moments["forces"].add(design.forces, batch.forces.reshape(-1) - design.forces_body, weight)
        # The body has been trained: what it misses is a better centre of the noise than a part of the labels' spread.
        missed = torch.tensor([math.sqrt(max(moments[name].rr / moments[name].n, 1e-12)) for name in noise.names])
        self.noise = Noise(noise.names, torch.where(noise.sampled, missed.double(), noise.centre), noise.sampled)
        size = data.statistics()["rms_force"]
        width = torch.full((n_weights,), config.prior_width * size, dtype=torch.float64)
        width[: linear.features.shape[1]] /= math.sqrt(linear.features.shape[1])
        self.target = Quadratic(moments, self.noise, width, config.scale_width)
        batch = probed.collate(range(len(probed.structures)))
        self.probe = linear.design(batch)
        order = torch.randperm(len(self.probe.forces), generator=torch.Generator().manual_seed(seed))
        self.components = order[: config.probe_forces].sort().values
        names = ["log_posterior", *(f"ln_sigma_{n}" for k, n in enumerate(noise.names) if bool(noise.sampled[k]))]
        names += [f"energy_{k}_eV_atom" for k in range(len(self.probe.energy))] if energies else []
        self.names = (*names, *(f"force_{int(k)}_eV_A" for k in self.components))

    def chain(self, k: int) -> tuple[Target, Tensor, Callable[[Tensor], Tensor]]:
        """See `Problem.chain`; a standard deviation of the posterior apart."""
        return self.target, displaced(self.target.start(), 1.0, self.seed, k), self._observe

    def _observe(self, position: Tensor) -> Tensor:
        target, n = self.target, len(self.target.width)
        weights = target.back @ position[:n]
        value = -target.likelihood(position, [0])[0] - target.prior(position)[0]
        parts = [torch.tensor([value], dtype=torch.float64), position[n:]]
        if "energy" in self.noise.names:
            parts.append(self.probe.energy @ weights + self.probe.energy_body)
        forces = self.probe.forces[self.components] @ weights + self.probe.forces_body[self.components]
        return torch.cat([*parts, forces])

    def ensemble(self, positions: list[Tensor]) -> tuple[Potential, dict[str, Any]]:
        """See `Problem.ensemble`: rows of `SharedMembers.weight`, whose mean stays the body."""
        linear, n_features = self.linear, self.linear.features.shape[1]
        rows = torch.stack([self.target.back @ one[: len(self.target.width)] for one in positions])
        model = SharedMembers.of(self.body.without_kernels(), len(rows), n_features).requires_grad_(False)
        model.weight.copy_(rows[:, :n_features])
        if len(linear.species):
            model.offset.copy_(rows[:, n_features:])
        model.centre.copy_(linear.centre)
        model.scale.copy_(linear.scale)
        for k, z in enumerate(model.spec.species):
            own = linear.features[linear.numbers == z]
            if len(own) > 1:
                centre, white = whitening(own)
                model.centre_of[k].copy_(centre)
                model.whiten[k].copy_(white)
        # How far the posterior's mean lies from the body, in its own standard deviations.
        shift = float(torch.linalg.solve(self.target.back, self.target.mean).square().mean().sqrt())
        return model, {"last_layer": True, "body_from_mean_sd": shift}


def whitening(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (F,) of features (n, F), and (F, F) what makes them uncorrelated with unit variance.

    Directions in which they hardly vary count as if they varied by 1e-3 of the largest.
    """
    centre = features.mean(dim=0)
    values, vectors = torch.linalg.eigh(torch.cov(features.t()).reshape(features.shape[1], -1))
    floor = max(1e-6 * float(values.max()), 1e-24)
    return centre, vectors @ torch.diag(values.clamp_min(floor).rsqrt()) @ vectors.t()
