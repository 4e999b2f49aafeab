"""Radial functions against reference values, numpy, and their own exact form."""

import math

import numpy as np
import pytest
import torch

from mdplug.errors import InputError
from mdplug.potentials.blocks.radial import make_basis, make_transform, polynomial_cutoff
from mdplug.potentials.blocks.repulsion import Repulsion
from mdplug.potentials.mace import MACE, describe

F64 = torch.float64
RADII = [0.31, 0.66]


def column(*values):
    return torch.tensor(values, dtype=F64).unsqueeze(1)


def test_known_values():
    assert polynomial_cutoff(column(2.0), torch.tensor(4.5, dtype=F64), 5).item() == pytest.approx(0.8542026929)
    bessel = make_basis("bessel", 3, 4.5, F64)(column(1.0))[0]
    np.testing.assert_allclose(bessel, [0.4285250731, 0.6565385020, 0.5773502692], atol=1e-10)
    pair = torch.tensor([0]), torch.tensor([1])
    for kind, value in (("agnesi", 0.3376963285), ("soft", 0.8537349587), ("none", 1.0)):
        assert make_transform(kind, RADII, F64)(column(1.0), *pair).item() == pytest.approx(value)
    zbl = Repulsion([1, 8], RADII, 5, F64)
    assert zbl(column(0.5), *pair).item() == pytest.approx(3.0723075493)
    assert zbl(column(0.98), *pair).item() == 0.0  # beyond the sum of radii


def test_bases_against_numpy():
    x = np.linspace(0.05, 0.95, 7)
    chebyshev = make_basis("chebyshev", 8, 4.5, F64)(column(*x)).numpy()
    np.testing.assert_allclose(chebyshev, np.polynomial.chebyshev.chebvander(x, 8)[:, 1:], atol=1e-14)
    gaussian = make_basis("gaussian", 4, 4.5, F64)(column(*x)).numpy()
    np.testing.assert_allclose(gaussian, np.exp(-0.5 * ((x[:, None] - np.arange(4) * 1.5) / 1.5) ** 2), atol=1e-14)


def test_unknown_names_are_refused():
    with pytest.raises(InputError, match="bessel, gaussian or chebyshev"):
        make_basis("fourier", 3, 4.5, F64)
    with pytest.raises(InputError, match="none, agnesi or soft"):
        make_transform("log", RADII, F64)


def test_cutoff_is_smooth():
    """Value, slope and curvature vanish at the cutoff; a hard cutoff would fail this."""
    cutoff = torch.tensor(4.5, dtype=F64)
    r = column(4.5 - 1e-5).requires_grad_(True)
    f = polynomial_cutoff(r, cutoff, 5)
    (slope,) = torch.autograd.grad(f, r, create_graph=True)
    (curvature,) = torch.autograd.grad(slope, r)
    assert f.item() < 1e-14
    assert abs(slope.item()) < 1e-8
    assert abs(curvature.item()) < 1e-3
    assert not polynomial_cutoff(column(4.5, 5.0, 50.0), cutoff, 5).any()


@pytest.mark.parametrize("kind", ["agnesi", "soft"])
def test_transforms_are_finite_near_zero_and_monotonic(kind):
    r = torch.linspace(1e-3, 6.0, 200, dtype=F64).unsqueeze(1).requires_grad_(True)
    pair = torch.zeros(200, dtype=torch.int64), torch.ones(200, dtype=torch.int64)
    x = make_transform(kind, RADII, F64)(r, *pair)
    (slope,) = torch.autograd.grad(x.sum(), r)
    assert torch.isfinite(x).all()
    assert torch.isfinite(slope).all()
    steps = x.diff(dim=0)
    assert (steps < 0).all() if kind == "agnesi" else (steps > -1e-3).all()


TABLES = {
    "plain": {"kinds": ["A", "R"]},
    "agnesi": {"kinds": ["D", "DR"], "radial": {"transform": "agnesi"}},
    "nonlinear": {"kinds": ["NL", "NL"], "radial": {"transform": "agnesi", "apply_cutoff": False}},
}


def model(name, tolerance):
    spec = describe(name, {"channels": 8, **TABLES[name]}, 4.5, (1, 8))
    exact = MACE.from_spec(spec).initialise(torch.Generator().manual_seed(0))
    for net in exact.radial.nets:
        if hasattr(net, "source"):  # the tables of a fresh net are nearly zero: make the pairs differ
            net.source.data.normal_(generator=torch.Generator().manual_seed(1))
            net.target.data.normal_(generator=torch.Generator().manual_seed(2))
    return exact, exact.with_tables(tolerance)


def radial_slopes(mace, r, receiver, sender):
    """Slopes of all R(r) that reach the messages, by central differences."""
    a, b = (torch.full((len(r),), z) for z in (receiver, sender))

    def functions(x):
        columns = mace.radial(x, a, b)
        used = [layer.messenger.n_radial for layer in mace.layers]
        weights = [layer.messenger.radial_weight.detach().flatten(1) for layer in mace.layers]
        return torch.cat([c[:, :n] @ w for c, n, w in zip(columns, used, weights, strict=True)], dim=1)

    with torch.no_grad():
        return (functions(r + 1e-6) - functions(r - 1e-6)) / 2e-6


@pytest.mark.parametrize("name", list(TABLES))
def test_tables_keep_their_stated_error(name):
    """At points of our own choice, for every ordered pair of species; a coarse table must be seen as coarse."""
    r = torch.from_numpy(np.random.default_rng(0).uniform(0.5, 4.49, (300, 1)))
    for tolerance in (1e-5, 0.3):
        exact, tables = model(name, tolerance)
        assert 0.0 < tables.table_error < tolerance
        missed, total = 0.0, 0.0
        for receiver in (0, 1):
            for sender in (0, 1):
                wanted = radial_slopes(exact, r, receiver, sender)
                got = radial_slopes(tables, r, receiver, sender)
                missed += (got - wanted).square().sum().item()
                total += wanted.square().sum().item()
        error = math.sqrt(missed / total)
        assert error < 3 * tolerance
        if tolerance == 0.3:
            assert error > 1e-5


def test_tables_are_only_for_loading():
    exact, tables = model("plain", 1e-5)
    assert tables.with_tables() is tables
    assert exact.with_exact_radial() is exact
    with pytest.raises(InputError, match="radial='exact'"):
        tables.with_exact_radial()


@pytest.mark.parametrize("p", [1, 5, 6])
def test_cutoff_is_the_published_polynomial(p):
    t = np.linspace(0.0, 1.0, 11)
    wanted = 1 - (p + 1) * (p + 2) / 2 * t**p + p * (p + 2) * t ** (p + 1) - p * (p + 1) / 2 * t ** (p + 2)
    got = polynomial_cutoff(column(*t), torch.tensor(1.0, dtype=F64), p)[:, 0]
    np.testing.assert_allclose(got, wanted, atol=1e-14)
    # near the cutoff the published form loses all digits of float32; this one does not
    near = torch.tensor([[0.999]])
    exact = polynomial_cutoff(near.double(), torch.tensor(1.0, dtype=F64), p).item()
    assert polynomial_cutoff(near, torch.tensor(1.0), p).item() == pytest.approx(exact, rel=1e-4)


def by_tape(function, r):
    """Values, and derivatives of all columns by autograd, one at a time."""
    leaf = r.clone().requires_grad_(True)
    y = function(leaf).view(len(r), -1)
    columns = [torch.autograd.grad(y[:, k].sum(), leaf, retain_graph=True)[0] for k in range(y.shape[1])]
    return y.detach(), torch.cat(columns, dim=1)


R = torch.from_numpy(np.random.default_rng(3).uniform(0.4, 5.0, (60, 1)))
PAIRS = torch.arange(60) % 2, (torch.arange(60) // 2) % 2


@pytest.mark.parametrize("basis", ["bessel", "gaussian", "chebyshev"])
@pytest.mark.parametrize("transform", ["none", "agnesi", "soft"])
@pytest.mark.parametrize("kinds", [["A", "R"], ["D", "DR"], ["NL", "NL"]])
@pytest.mark.parametrize("apply_cutoff", [True, False])
def test_slopes_of_radial_functions_are_those_of_autograd(basis, transform, kinds, apply_cutoff):
    radial = {"basis": basis, "transform": transform, "apply_cutoff": apply_cutoff, "widths": [12, 20]}
    spec = describe("slopes", {"channels": 4, "kinds": kinds, "radial": radial}, 4.5, (1, 8), dtype="float64")
    mace = MACE.from_spec(spec).initialise(torch.Generator().manual_seed(0))
    for parameter in mace.requires_grad_(False).parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1), dtype=F64)
    values, slopes = mace.radial.with_slopes(R, *PAIRS)
    for t in range(2):
        wanted = by_tape(lambda r, t=t: mace.radial(r, *PAIRS)[t], R)
        torch.testing.assert_close((values[t], slopes[t]), wanted, atol=1e-12, rtol=1e-11)
        assert float(slopes[t].abs().max()) > 1e-2


def test_slope_of_the_repulsion_is_that_of_autograd():
    zbl = Repulsion([1, 8], [1.3, 1.6], 5, F64)
    values, slopes = zbl.with_slope(R, *PAIRS)
    wanted = by_tape(lambda r: zbl(r, *PAIRS), R)
    torch.testing.assert_close((values.unsqueeze(1), slopes.unsqueeze(1)), wanted, atol=1e-12, rtol=1e-12)
    assert float(slopes.abs().max()) > 1


def test_slopes_of_splines_are_those_of_autograd():
    tables = model("nonlinear", 1e-5)[1].double().radial
    values, slopes = tables.with_slopes(R, *PAIRS)
    for t in range(2):
        wanted = by_tape(lambda r, t=t: tables(r, *PAIRS)[t], R)
        torch.testing.assert_close((values[t], slopes[t]), wanted, atol=1e-11, rtol=1e-11)
