"""Spherical harmonics and 3j symbols: quadrature, rotations, and numbers computed elsewhere."""

import math

import numpy as np
import pytest
import torch
from rotations import L_MAX, harmonics, wigner
from scipy.spatial.transform import Rotation

from mdplug.potentials.blocks.harmonics import SphericalHarmonics, real_3j

TRIPLES = [(a, b, c) for a in range(4) for b in range(4) for c in range(5) if abs(a - b) <= c <= a + b]


def test_known_values():
    # reference values of e3nn 0.4.4, component normalisation
    known = [1, 0.52489066, -0.87481777, 1.39970842, 0.94848572, -0.59280357, -0.26239573, -1.58080953, 1.08680655]
    known += [1.18364716, -1.26746735, 0.13527282, 1.15222321, 0.36072753, -1.45230634, 0.6381777]
    np.testing.assert_allclose(harmonics([[0.3, -0.5, 0.8]], 3)[0], known, atol=1e-8)


def test_orthonormal_on_the_sphere():
    z, weight = np.polynomial.legendre.leggauss(12)  # exact for products up to l = 11
    phi = np.arange(24) * 2 * math.pi / 24
    rho = np.sqrt(1 - z**2)
    points = np.stack([np.outer(rho, np.cos(phi)), np.outer(rho, np.sin(phi)), np.outer(z, np.ones(24))], -1)
    y = harmonics(points.reshape(-1, 3))
    gram = (y * np.repeat(weight / 2 / 24, 24)[:, None]).T @ y
    np.testing.assert_allclose(gram, np.eye(25), atol=1e-13)


def test_parity_and_single_degree():
    x = np.random.default_rng(1).normal(size=(5, 3))
    sign = np.concatenate([np.full(2 * ell + 1, (-1.0) ** ell) for ell in range(L_MAX + 1)])
    np.testing.assert_allclose(harmonics(-x), sign * harmonics(x), atol=1e-14)
    np.testing.assert_allclose(harmonics(x, 0), np.ones((5, 1)))


@pytest.mark.parametrize("triple", TRIPLES)
def test_3j_is_the_invariant_tensor(triple):
    tensor = real_3j(*triple)
    assert np.linalg.norm(tensor) == pytest.approx(1.0, abs=1e-14)
    d1, d2, d3 = (wigner(Rotation.random(random_state=7).as_matrix(), ell) for ell in triple)
    np.testing.assert_allclose(np.einsum("ai,bj,ck,ijk->abc", d1, d2, d3, tensor), tensor, atol=1e-12)


def test_3j_known_values():
    assert real_3j(1, 1, 1)[0, 1, 2] == pytest.approx(1 / math.sqrt(6))
    np.testing.assert_allclose(np.diag(real_3j(1, 1, 0)[:, :, 0]), 1 / math.sqrt(3))
    np.testing.assert_allclose(np.diag(real_3j(1, 1, 2)[:, :, 2]), [-0.18257419, 0.36514837, -0.18257419], atol=1e-8)
    np.testing.assert_allclose(real_3j(0, 3, 3)[0], np.eye(7) / math.sqrt(7), atol=1e-14)
    assert not real_3j(1, 1, 3).any()


def test_3j_of_natural_parity_couples_harmonics():
    """sum C Y_l1 Y_l2 is proportional to Y_l3 of the same point."""
    x = np.random.default_rng(2).normal(size=(9, 3))
    y = harmonics(x)
    for a, b, c in [(1, 1, 2), (1, 2, 3), (2, 2, 2), (3, 1, 2)]:
        blocks = [y[:, ell * ell : (ell + 1) ** 2] for ell in (a, b, c)]
        coupled = np.einsum("ijk,ni,nj->nk", real_3j(a, b, c), blocks[0], blocks[1])
        ratio = (coupled * blocks[2]).sum(1) / (2 * c + 1)
        np.testing.assert_allclose(ratio, ratio[0], atol=1e-13)
        np.testing.assert_allclose(coupled, ratio[:, None] * blocks[2], atol=1e-13)
        assert abs(ratio[0]) > 0.1


def test_constants_survive_a_change_of_dtype():
    module = SphericalHarmonics(3, torch.float64)
    exact = module.table.clone()
    module.float()
    assert module.table.dtype == torch.float32
    module.double()
    assert torch.equal(module.table, exact)
