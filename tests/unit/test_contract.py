"""Every potential against tests/contract.py; a new one adds one line."""

import pytest
import torch
from contract import check

from mdplug.biased import Biased
from mdplug.compose import Ensemble, Sum
from mdplug.potentials.mace import MACE, describe
from mdplug.potentials.members import SharedMembers
from mdplug.potentials.pair import ZBL, LennardJones, Morse
from mdplug.potentials.stillinger_weber import StillingerWeber


def mace(**config):
    """A small MACE with random weights, three elements."""
    full = {"channels": 6, "neighbours": [11.3, 11.3], "radial": {"widths": [8, 8]}, "readout": {"hidden": 4}, **config}
    spec = describe("mace", full, 4.0, (1, 6, 8), dtype="float64", atomic_energies={"default": {"H": -13.6, "O": -2e3}})
    return MACE.from_spec(spec).initialise(torch.Generator().manual_seed(1))


def members():
    body = mace()
    made = SharedMembers.of(body, 4, 2 * body.embedding.shape[1])
    with torch.no_grad():
        made.weight.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(2))
        made.offset.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(3))
    return made


NONLINEAR = {"kinds": ["NL", "NL"], "l_hidden": 1, "edge_channels": 4, "edge_first": True, "agnostic": True}
POTENTIALS = {
    "lj": (lambda: LennardJones.new(0.02, 2.2, 5.0), [18]),
    "morse": (lambda: Morse.new(0.3, 1.3, 2.5, 5.0), [29]),
    "zbl": (lambda: ZBL.new(3.0, 1.0), [1, 8]),
    "stillinger-weber": (lambda: StillingerWeber.new(), [14]),
    "mace L0": (lambda: mace(), [1, 6, 8]),
    "mace L1, density, repulsion": (lambda: mace(l_hidden=1, kinds=["D", "DR"], repulsion=True), [1, 6, 8]),
    "mace L2, three layers": (
        lambda: mace(l_hidden=2, l_max=2, kinds=["A", "R", "R"], correlation=[2] * 3, neighbours=[9.0] * 3),
        [1, 6, 8],
    ),
    "mace nonlinear": (lambda: mace(**NONLINEAR), [1, 6, 8]),
    "sum": (lambda: Sum.of([LennardJones.new(0.02, 2.2, 5.0), ZBL.new(3.0, 1.0)]), [1, 8]),
    "ensemble": (lambda: Ensemble.of([LennardJones.new(0.02 + 0.01 * k, 2.2, 5.0) for k in range(3)]), [18]),
    "members on one body": (lambda: members(), [1, 6, 8]),
    "biased": (lambda: Biased.of(members(), -0.8), [1, 6, 8]),
}


@pytest.mark.parametrize("name", list(POTENTIALS))
def test_contract(name, tmp_path):
    make, species = POTENTIALS[name]
    check(make(), species, tmp_path)
