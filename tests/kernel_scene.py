"""Random neighbours for the native operators."""

import torch

from mdplug.potentials.blocks.harmonics import SphericalHarmonics


def scene(n, degree, dtype, seed=0, ghosts=0, l_max=3):
    """Random pairs by receiver: some atoms have none. Returns vectors, r, sender, first, harmonics."""
    g = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, degree + 1, (n,), generator=g)
    if n > 2:
        counts[1] = 0  # an isolated atom
    first = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).to(torch.int32)
    e = int(first[-1])
    sender = torch.randint(0, max(n + ghosts, 1), (e,), generator=g).to(torch.int32)
    vectors = torch.randn(e, 3, generator=g, dtype=torch.float64)
    vectors = (vectors * (0.2 + 3 * torch.rand(e, 1, generator=g)) / vectors.norm(dim=1, keepdim=True)).to(dtype)
    r = vectors.norm(dim=1)
    module = SphericalHarmonics(l_max, dtype)
    left, right = module.products()
    y = torch.ops.mdplug.harmonics(vectors, r, left, right, module.table, l_max)
    return vectors, r, sender, first, y, (left, right, module.table), g
