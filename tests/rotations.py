"""Rotation matrices of the real spherical harmonics, found from their values."""

import numpy as np
import torch

from mdplug.potentials.blocks.harmonics import SphericalHarmonics

L_MAX = 4


def harmonics(points, l_max=L_MAX):
    """(E, (l_max+1)^2) values at points of any length."""
    unit = torch.as_tensor(points, dtype=torch.float64)
    unit = unit / torch.linalg.vector_norm(unit, dim=1, keepdim=True)
    return SphericalHarmonics(l_max, torch.float64)(unit).numpy()


def wigner(rotation, ell):
    """(2l+1, 2l+1): Y(R x) = D Y(x), from many points by least squares."""
    x = np.random.default_rng(0).normal(size=(60, 3))
    block = slice(ell * ell, (ell + 1) ** 2)
    return np.linalg.lstsq(harmonics(x)[:, block], harmonics(x @ rotation.T)[:, block], rcond=None)[0].T
