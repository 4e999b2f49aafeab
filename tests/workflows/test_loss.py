"""The loss against numbers worked out by hand."""

import labelled as made
import numpy as np
import pytest
import torch

from mdplug.workflows import dataset
from mdplug.workflows.loss import LossConfig, loss, penalty


@pytest.fixture
def batch(tmp_path):
    frames = made.crystal_frames(2)
    frames[1].info["config_weight"] = 3.0
    del frames[1].info["REF_stress"]
    data = dataset.read([made.save(tmp_path / "l.xyz", frames)])
    return dataset.Loader(data.structures, 3.0, {"Cu": 0.0}).collate([0, 1])


def test_squared(batch):
    config = LossConfig(kind="squared", energy=2.0, forces=5.0, stress=7.0)
    forces = batch.forces.clone()
    forces[0, 1] += 0.3  # structure 0, weight 1
    forces[40, 2] -= 0.1  # structure 1, weight 3
    energy = batch.energy + torch.tensor([3.2, -6.4], dtype=torch.float64)  # 32 atoms each
    stress = batch.stress.clone()
    stress[0, 0, 1] += 0.2
    stress[1] = float("nan")  # no label, whatever the model says
    by_hand = 2.0 * (1 * 0.1**2 + 3 * 0.2**2) / 2 + 5.0 * (1 * 0.3**2 + 3 * 0.1**2) / (3 * 64) + 7.0 * 0.2**2 / 18
    assert float(loss(energy, forces, stress, batch, config)) == pytest.approx(by_hand)


def test_huber_is_continuous_with_slope_one_beyond():
    delta = 0.1
    x = torch.tensor([0.0, 0.05, delta, delta + 1e-9, 1.0, -1.0], dtype=torch.float64)
    y = penalty(x, "huber", delta)
    np.testing.assert_allclose(y, [0.0, 0.0125, 0.05, 0.05 + 1e-9, 0.95, 0.95], rtol=1e-9)


def test_energy_weight_grows_geometrically():
    config = LossConfig(energy=1.0, energy_end=100.0)
    assert [config.energy_weight(f) for f in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 10.0, 100.0])
    assert LossConfig(energy=4.0).energy_weight(0.7) == 4.0


def test_parts_of_a_batch_add_up_to_it(tmp_path):
    data = dataset.read([made.save(tmp_path / "l.xyz", made.argon_frames(7))])
    loader = dataset.Loader(data.structures, 6.0, {"Ar": made.OFFSET})
    rng = torch.Generator().manual_seed(0)
    config = LossConfig(kind="huber", energy=3.0, forces=2.0)

    def value(chosen, whole):
        b = loader.collate(chosen)
        return loss(guess["e"][chosen], torch.cat([guess["f"][k] for k in chosen]), None, b, config, 0.0, whole)

    guess = {
        "e": torch.randn(7, generator=rng, dtype=torch.float64),
        "f": [torch.randn(s.n_atoms, 3, generator=rng, dtype=torch.float64) for s in data.structures],
    }
    everything = list(range(7))
    whole = (7, sum(s.n_atoms for s in data.structures))
    parts = value(everything[::2], whole) + value(everything[1::2], whole)
    assert float(parts) == pytest.approx(float(value(everything, None)))
