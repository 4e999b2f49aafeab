"""Symmetric contraction: counts of the literature's couplings, and a recursion on numbers instead of tensors."""

import numpy as np
import pytest
import torch
from rotations import wigner
from scipy.spatial.transform import Rotation

from mdplug.potentials.blocks.contraction import SymmetricContraction, factorise, symmetric_basis
from mdplug.potentials.blocks.harmonics import real_3j

# (l_max, L): couplings and independent couplings for nu = 1, 2, 3 (, 4)
COUNTS = {
    (3, 0): ([1, 4, 23], [1, 4, 8]),
    (3, 1): ([1, 6, 51], [1, 3, 12]),
    (3, 2): ([1, 7, 65], [1, 5, 14]),
    (3, 3): ([1, 6, 65], [1, 3, 15]),
    (2, 0): ([1, 3, 11, 46], [1, 3, 5, 9]),
    (2, 1): ([1, 4, 21], [1, 2, 5]),
}


@pytest.mark.parametrize("case", list(COUNTS))
def test_couplings_and_rank(case):
    for nu, (columns, rank) in enumerate(zip(*COUNTS[case], strict=True), start=1):
        index, basis, sizes = symmetric_basis(*case, nu)
        assert basis.shape[1] == columns
        assert np.linalg.matrix_rank(basis) == rank
        assert sum(sizes) == basis.shape[0] == index.shape[1]
        assert (np.diff(index, axis=0) >= 0).all()


def test_few_monomials_for_a_scalar():
    assert [symmetric_basis(3, 0, nu)[1].shape[0] for nu in (1, 2, 3)] == [1, 16, 77]


def coupled_values(features, l_max, degree):
    """All couplings of `degree` copies of one feature vector, as numbers: (l, parity, values (2l+1,))."""
    blocks = [features[ell * ell : (ell + 1) ** 2] for ell in range(l_max + 1)]
    entries = [(ell, (-1) ** ell, blocks[ell]) for ell in range(l_max + 1)]
    for _ in range(degree - 1):
        grown = []
        for left, parity, values in entries:
            for ell in range(l_max + 1):
                for out in range(abs(left - ell), left + ell + 1):
                    symbol = np.sqrt(2 * out + 1) * real_3j(out, left, ell)
                    grown.append((out, parity * (-1) ** ell, np.einsum("cab,a,b->c", symbol, values, blocks[ell])))
        entries = sorted(grown, key=lambda entry: entry[:2])
    return entries


@pytest.mark.parametrize(("l_max", "l_out", "degree"), [(3, 0, 3), (3, 1, 3), (2, 2, 3), (3, 2, 2), (1, 1, 3)])
def test_monomials_equal_coupling_step_by_step(l_max, l_out, degree):
    features = np.random.default_rng(3).normal(size=(l_max + 1) ** 2)
    wanted = np.stack(
        [v for ell, p, v in coupled_values(features, l_max, degree) if ell == l_out and p == (-1) ** ell], axis=1
    )
    index, basis, sizes = symmetric_basis(l_max, l_out, degree)
    terms = features[index].prod(axis=0)[:, None] * basis
    starts = np.cumsum([0, *sizes[:-1]])
    np.testing.assert_allclose(np.add.reduceat(terms, starts, axis=0), wanted, atol=1e-12)


def contraction(n_species=2, channels=3):
    module = SymmetricContraction(3, 2, 3, n_species, channels, torch.float64)
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data.normal_(generator=generator)
    return module


def apply(module, features, sizes=(2, 3), kinds=(0, 1)):
    return module(features, torch.arange(2), list(sizes), list(kinds))


def blocks(features):
    return torch.split(features, [1, 3, 5])


def test_the_whole_module_sums_the_powers():
    """One atom, one channel, against the couplings step by step."""
    module = contraction(channels=1)
    features = np.random.default_rng(3).normal(size=16)
    got = apply(module, torch.from_numpy(features).view(16, 1, 1), (1,), (1,))[:, 0, 0]
    for l_out in range(3):
        wanted = 0.0
        for nu in (1, 2, 3):
            weight = module.outputs[l_out].powers[nu - 1].weight[1, :, 0].detach().numpy()
            columns = [v for ell, p, v in coupled_values(features, 3, nu) if ell == l_out and p == (-1) ** ell]
            wanted = wanted + np.stack(columns, axis=1) @ weight
        np.testing.assert_allclose(got[l_out**2 : (l_out + 1) ** 2].detach(), wanted, atol=1e-11)


def test_prefixes_cover_every_monomial_once():
    for case in ((3, 0, 3), (3, 1, 3), (2, 0, 4), (3, 0, 1)):
        prefixes, places = factorise(*case)
        flat = np.concatenate(places)
        assert (
            len(np.unique(flat))
            == len(flat)
            == sum(
                symmetric_basis(case[0], ell, nu)[1].shape[0]
                for ell in range(case[1] + 1)
                for nu in range(1, case[2] + 1)
            )
        )
        assert prefixes.shape[1] < len(flat) or len(flat) == 1


def test_rotates_as_its_irreps():
    module = contraction()
    rotation = Rotation.random(random_state=4).as_matrix()
    turn = [torch.from_numpy(wigner(rotation, ell)) for ell in range(4)]
    features = torch.randn(16, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    out = blocks(apply(module, features))
    turned = blocks(apply(module, torch.einsum("ab,bnk->ank", torch.block_diag(*turn), features)))
    for ell in range(3):
        torch.testing.assert_close(torch.einsum("ab,bnk->ank", turn[ell], out[ell]), turned[ell])
    assert not torch.allclose(out[1], turned[1])


def test_each_species_has_its_weights_and_chunks_do_not_matter():
    module = contraction()
    features = torch.randn(16, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    whole = apply(module, features)
    torch.testing.assert_close(whole, apply(module, features, (1, 1, 2, 1), (0, 0, 1, 1)))
    assert not torch.allclose(whole[0], apply(module, features, (2, 3), (1, 0))[0])


def test_folding_changes_nothing():
    module = contraction()
    features = torch.randn(16, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    before = apply(module, features)
    module.fold()
    assert module.folded
    torch.testing.assert_close(before, apply(module, features), rtol=1e-13, atol=1e-13)
