"""Every potential against tests/contract.py; a new one adds one line."""

import pytest
from contract import check

from mdplug.compose import Ensemble, Sum
from mdplug.potentials.pair import ZBL, LennardJones, Morse
from mdplug.potentials.stillinger_weber import StillingerWeber

POTENTIALS = {
    "lj": (lambda: LennardJones.new(0.02, 2.2, 5.0), [18]),
    "morse": (lambda: Morse.new(0.3, 1.3, 2.5, 5.0), [29]),
    "zbl": (lambda: ZBL.new(3.0, 1.0), [1, 8]),
    "stillinger-weber": (lambda: StillingerWeber.new(), [14]),
    "sum": (lambda: Sum.of([LennardJones.new(0.02, 2.2, 5.0), ZBL.new(3.0, 1.0)]), [1, 8]),
    "ensemble": (lambda: Ensemble.of([LennardJones.new(0.02 + 0.01 * k, 2.2, 5.0) for k in range(3)]), [18]),
}


@pytest.mark.parametrize("name", list(POTENTIALS))
def test_contract(name, tmp_path):
    make, species = POTENTIALS[name]
    check(make(), species, tmp_path)
