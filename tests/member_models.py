"""Small ensembles with random weights: members on one body, and independent models."""

import torch
from mace_models import box, build

from mdplug.compose import Ensemble
from mdplug.pairs import pairs
from mdplug.potentials.members import SharedMembers


def arguments(model, system):
    """What `Potential.local` takes."""
    found = pairs(system, model.cutoff)
    return (
        system.numbers, found.index, found.vectors, len(system.numbers), system.system_index, system.total_charge,
        system.total_spin, system.head,
    )  # fmt: skip


def shared(options=None, members=5, seed=0, spread=0.1):
    """Members on one body, of H and O; spread: of their weights, in eV."""
    body = build(options or {})
    width = body.local(*arguments(body, box()))["features"].shape[1]
    made = SharedMembers.of(body, members, width)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        made.weight.copy_(spread * torch.randn(made.weight.shape, generator=generator, dtype=torch.float64))
        made.offset.copy_(spread * torch.randn(made.offset.shape, generator=generator, dtype=torch.float64))
        made.centre.fill_(0.1)
        made.scale.fill_(0.7)
    return made.requires_grad_(False).eval()


def ensemble(members=4):
    """Independent models."""
    return Ensemble.of([build({}, seed=10 * k) for k in range(members)]).requires_grad_(False)
