"""Sampled potentials: true parameters are covered, kills change nothing, what did not mix is not called a posterior."""

import signal
import subprocess
import sys

import labelled as made
import numpy as np
import pytest
import torch
from argon import crystal

import mdplug
from mdplug import cli
from mdplug.compose import Ensemble
from mdplug.deployed import evaluate
from mdplug.errors import InputError, RunFolderError
from mdplug.pairs import pairs
from mdplug.potentials.members import SharedMembers
from mdplug.potentials.pair import LennardJones
from mdplug.system import AtomicSystem
from mdplug.uncertainty import uncertainty
from mdplug.workflows import train
from mdplug.workflows.bayes import BayesConfig
from mdplug.workflows.bayes_posterior import Batches, Noise, Posterior, minus_log_likelihood
from mdplug.workflows.bayes_sampler import Chain
from mdplug.workflows.dataset import Labelled, Loader

NOISE = 0.002  # eV/A, on forces
MACE = {
    "channels": 4,
    "l_max": 1,
    "correlation": [2, 2],
    "radial": {"widths": [8], "n_basis": 4},
    "readout": {"hidden": 4},
}
SMALL = {"chains": 2, "approach_steps": 60, "burn_in_steps": 16, "samples": 6, "thinning": 2, "members": 3}


@pytest.fixture(scope="module")
def argon(tmp_path_factory):
    frames = made.argon_frames(24)
    rng = np.random.default_rng(0)
    for atoms in frames:
        atoms.arrays["REF_forces"] += NOISE * rng.normal(size=atoms.positions.shape)
    return made.save(tmp_path_factory.mktemp("argon") / "argon.xyz", frames)


def lj_config(folder, data, bayes=None, **changes):
    options = {
        "data": [data],
        "output": folder,
        "architecture": "lj",
        "cutoff_A": 18.0,
        "dtype": "float64",
        "reference_energies_eV": {"Ar": made.OFFSET},
        "model": {"epsilon": 0.0115, "sigma": 3.35, "cutoff": 18.0, "switch": 17.0},
        "loss": {"energy": 0.0},
        "threads": 2,
        "bayes": SMALL | {"full_batch": True} | (bayes or {}),
    }
    return train.Config(**{**options, **changes})


def loader(frames, noise=NOISE, seed=0):
    """Labels of our own smoothed Lennard-Jones liquid, with Gaussian noise on forces."""
    model, rng, found = LennardJones.new(made.EPSILON, made.SIGMA, 7.0), np.random.default_rng(seed), []
    for k, atoms in enumerate(frames):
        system = AtomicSystem.from_ase(atoms)
        there = evaluate(model, system)
        forces = there.forces + torch.tensor(noise * rng.normal(size=there.forces.shape))
        found.append(Labelled(system, float(there.energy), forces, None, 1.0, "", str(k), "train", "liquid", k))
    return Loader(found, 7.0, {"Ar": 0.0})


def test_intervals_cover_the_parameters_of_a_liquid_over_repeated_data():
    """90 % intervals of both parameters from noisy forces; control: with a third of the noise they are too narrow."""
    covered = {1.0: 0, 1 / 3: 0}
    config = BayesConfig(
        approach_steps=0, burn_in_steps=60, samples=100, thinning=4, full_batch=True, friction=0.4, prior_width=3.0
    )
    n, n_control = 20, 8
    for seed in range(n):
        data = loader([crystal(2, 0.25, seed=seed)], noise=0.0005, seed=seed)
        for factor in covered if seed < n_control else [1.0]:
            noise = Noise(("forces",), torch.tensor([0.0005 * factor]).double(), torch.tensor([False]))
            target = Posterior(LennardJones.new(0.0105, 3.395, 7.0), Batches(data), noise, config)
            chain = Chain(target, config, seed, target.start(), lambda position: position.clone())
            while not chain.done:
                chain.advance()
            samples = torch.stack(chain.state.seen) * target.sizes
            low, high = samples.quantile(0.05, dim=0), samples.quantile(0.95, dim=0)
            truth = torch.tensor([made.EPSILON, made.SIGMA], dtype=torch.float64)
            covered[factor] += int(((low < truth) & (truth < high)).sum())
    assert covered[1.0] >= 0.8 * 2 * n
    assert covered[1 / 3] < 0.65 * 2 * n_control


def test_gradient_of_the_posterior_by_finite_differences():
    data = loader([crystal(1, 0.3), crystal(1, 0.2, seed=4)])
    config = BayesConfig()
    noise = Noise.of(data, config, True, True)
    assert noise.names == ("energy", "forces")
    target = Posterior(LennardJones.new(0.011, 3.3, 7.0), Batches(data), noise, config)
    start = target.start() + torch.tensor([0.0, 0.0, 0.3, -0.2], dtype=torch.float64)
    _, gradient = target.likelihood(start, [0, 1])
    _, pull = target.prior(start)
    for k in range(4):
        ends = []
        for sign in (1, -1):
            moved = start.clone()
            moved[k] += sign * 1e-5
            ends.append(target.likelihood(moved, [0, 1])[0] + target.prior(moved)[0])
        assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(float(gradient[k] + pull[k]), rel=1e-5)


def test_likelihood_is_that_of_independent_normal_labels():
    from scipy.stats import norm

    data = loader([crystal(1, 0.3), crystal(1, 0.2, seed=4)])
    data.structures = [data.structures[0], train.replace(data.structures[1], weight=2.0)]
    batch = data.collate([0, 1])
    out = {"energy": batch.energy + torch.tensor([0.01, -0.02]), "forces": batch.forces + 0.003}
    noise = {"energy": torch.tensor(0.004).double(), "forces": torch.tensor(0.005).double()}
    n = data.structures[0].n_atoms
    wanted = 0.0
    for weight, off in ((1.0, 0.01), (2.0, -0.02)):
        wanted -= weight * (norm.logpdf(off / n, scale=0.004) + 3 * n * norm.logpdf(0.003, scale=0.005))
    assert float(minus_log_likelihood(noise, out, batch)) == pytest.approx(wanted, rel=1e-6)
    alone = {"forces": noise["forces"]}
    assert float(minus_log_likelihood(alone, out, batch)) == pytest.approx(
        -3.0 * 3 * n * norm.logpdf(0.003, scale=0.005)
    )


def test_finds_the_noise_and_writes_a_posterior(tmp_path, argon):
    bayes = {
        "chains": 3, "approach_steps": 200, "burn_in_steps": 200, "samples": 100, "thinning": 4, "friction": 0.3,
        "learning_rate": 0.03, "prior_width": 3.0, "members": 7, "probe_structures": 3, "probe_forces": 9,
    }  # fmt: skip
    result = train.run(lj_config(tmp_path / "run", argon, bayes))
    assert result.converged, str(result)
    assert "NOT A POSTERIOR" not in str(result)
    assert result.noise["forces"] == pytest.approx(NOISE, rel=0.15)
    model = mdplug.load(result.model)
    assert isinstance(model, Ensemble)
    assert len(model.parts) == 7
    facts = model.spec.provenance["posterior_facts"]
    assert facts["converged"] is True
    assert facts["rhat"] == pytest.approx(result.rhat)
    assert model.spec.provenance["posterior"].startswith("converged: R-hat 1.0")
    epsilons = np.array([float(part.epsilon) for part in model.parts])
    assert epsilons.std() > 1e-6
    assert epsilons.mean() == pytest.approx(made.EPSILON, rel=0.05)
    found = uncertainty(model, AtomicSystem.from_ase(crystal(1)), pairs(AtomicSystem.from_ase(crystal(1)), 18.0))
    assert float(found.forces.max()) > 0
    for name in ("diagnostics.csv", "chains.csv", "traces.npz", "summary.yaml", "config.yaml"):
        assert (tmp_path / "run" / name).stat().st_size > 0
    assert (tmp_path / "run/traces.png").read_bytes().startswith(b"\x89PNG")
    with np.load(tmp_path / "run/traces.npz") as traces:
        assert traces["values"].shape == (3, 100, len(traces["names"]))
    # The same command again finds everything done, and says the same.
    assert str(train.run(lj_config(tmp_path / "run", argon, bayes))) == str(result)


KILLED = """
import os, signal, sys
from mdplug.workflows import train
config = train.Config.model_validate_json(sys.argv[1])
train.run(config, progress=lambda done, total, text: os.kill(os.getpid(), signal.SIGKILL) if done >= 124 else None)
"""


@pytest.mark.parametrize("options", [{}, {"full_batch": False, "sampler": "sgld", "cycles": 2}])
def test_kill_9_and_ctrl_c_change_nothing(tmp_path, argon, options):
    whole = train.run(lj_config(tmp_path / "whole", argon, options, batch_pairs=150, threads=1))
    broken = lj_config(tmp_path / "broken", argon, options, batch_pairs=150)
    process = subprocess.run([sys.executable, "-c", KILLED, broken.model_dump_json()], check=False)
    assert process.returncode == -signal.SIGKILL
    saved = [torch.load(path, weights_only=True)["step"] for path in (tmp_path / "broken").glob("chain_*.pt")]
    assert max(saved) >= 60  # it goes on from here, not from the start

    def interrupt(done, total, text):
        if done >= 150:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train.run(broken, progress=interrupt)
    resumed = train.run(broken)
    with np.load(tmp_path / "whole/traces.npz") as one, np.load(tmp_path / "broken/traces.npz") as two:
        assert np.array_equal(one["values"], two["values"])  # to the last bit, on another number of threads
    for a, b in zip(mdplug.load(whole.model).parameters(), mdplug.load(resumed.model).parameters(), strict=True):
        assert torch.equal(a, b)


def call(*words, capsys):
    """What a command prints; it must end with exit code 0."""
    with pytest.raises(SystemExit) as end:
        cli.main([str(word) for word in words])
    assert not end.value.code
    return capsys.readouterr().out


def test_mace_by_the_command_line_is_flagged_and_info_shows_it(tmp_path, argon, capsys):
    bayes = "{chains: 2, approach_steps: 30, burn_in_steps: 8, samples: 6, thinning: 1, members: 4}"
    words = ["train", argon, "-o", tmp_path / "run", "--architecture", "mace", "--cutoff_A", "6", "--threads", "2"]
    words += ["--model", str(MACE), "--bayes", bayes, "--name", "sampled", "--batch_pairs", "400"]
    said = call(*words, capsys=capsys)
    assert "4 members from 2 chains, unconverged" in said
    assert "NOT A POSTERIOR" in said
    model = mdplug.load(tmp_path / "run/model.safetensors")
    assert len(model.parts) == 4
    assert model.spec.provenance["posterior_facts"]["converged"] is False
    system = AtomicSystem.from_ase(made.argon_frames(1)[0])
    assert float(uncertainty(model, system, pairs(system, 6.0)).forces.max()) > 0
    shown = call("info", tmp_path / "run/model.safetensors", capsys=capsys)
    assert "from: posterior" in shown
    assert "unconverged: R-hat" in shown
    assert "member_atom_energy" in shown


def test_last_layer_is_the_gaussian_of_the_linear_model(tmp_path, argon):
    """Mean and covariance of sampled readouts against normal equations from forces of one-hot readouts."""
    body = train.run(
        train.Config(data=[argon], output=tmp_path / "body", architecture="mace", cutoff_A=6.0, model=MACE, epochs=3,
                     dtype="float64", threads=1, valid_fraction=0)
    ).model  # fmt: skip
    options = {
        "last_layer": True, "chains": 4, "approach_steps": 0, "burn_in_steps": 100, "samples": 500, "thinning": 4,
        "members": 1000, "friction": 0.4, "sigma_forces_eV_A": 0.01, "sigma_energy_eV_atom": 0.01, "probe_forces": 5,
        "probe_structures": 2,
    }  # fmt: skip
    config = train.Config(data=[argon], output=tmp_path / "run", start=body, dtype="float64", bayes=options)
    result = train.run(config)
    assert result.converged, str(result)
    model = mdplug.load(result.model, radial="exact").without_kernels()
    assert isinstance(model, SharedMembers)
    n_features = model.weight.shape[1]

    train_set, _, _ = train.split(config)
    reference = model.spec.atomic_energies["default"]
    data = Loader(train_set, 6.0, reference)
    one_hot = SharedMembers.of(model.parts[0], n_features + 1, n_features)
    one_hot.centre.copy_(model.centre)
    one_hot.scale.copy_(model.scale)
    one_hot.requires_grad_(False)
    precision, pull, size = 0.0, 0.0, data.statistics()["rms_force"]
    for k, labelled in enumerate(train_set):
        system = labelled.system
        columns_e, columns_f = [], []
        for f in range(n_features + 1):
            # The difference of two members of opposite sign is twice a column; no mean is taken off it.
            pair = SharedMembers.of(model.parts[0], 2, n_features).requires_grad_(False)
            pair.centre.copy_(model.centre)
            pair.scale.copy_(model.scale)
            target = pair.weight[:, f] if f < n_features else pair.offset[:, 0]
            target.copy_(torch.tensor([1.0, -1.0]))
            alone = uncertainty_members(pair, system)
            columns_e.append(alone[0] / labelled.n_atoms)
            columns_f.append(alone[1])
        there = evaluate(model.parts[0], system)
        x_e = torch.stack(columns_e)[None]
        x_f = torch.stack(columns_f, dim=1)
        r_e = torch.tensor([data.interaction[k] - float(there.interaction_energy)]).double() / labelled.n_atoms
        r_f = (labelled.forces - there.forces).reshape(-1)
        precision = precision + (x_e.t() @ x_e + x_f.t() @ x_f) / 0.01**2
        pull = pull + (x_e.t() @ r_e + x_f.t() @ r_f) / 0.01**2
    width = torch.full((n_features + 1,), size / n_features**0.5, dtype=torch.float64)
    width[-1] = size
    covariance = torch.linalg.inv(precision + torch.diag(width**-2))
    rows = torch.cat([model.weight, model.offset], dim=1)
    # In coordinates where the exact covariance is one; members are thinned samples, nearly independent.
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), rows.t(), upper=False)
    found = torch.cov(white)
    assert (found - torch.eye(len(found))).abs().max() < 0.2
    assert found.diagonal().mean() == pytest.approx(1.0, abs=0.05)
    exact_mean = torch.linalg.solve_triangular(
        torch.linalg.cholesky(covariance), (covariance @ pull)[:, None], upper=False
    )[:, 0]
    assert (white.mean(1) - exact_mean).abs().max() < 0.2
    facts = model.spec.provenance["posterior_facts"]
    assert facts["body_from_mean_sd"] == pytest.approx(float(exact_mean.square().mean().sqrt()), rel=0.05)
    # Features of training atoms are white: their distance is about one.
    there = evaluate(model, train_set[0].system)
    assert 0.3 < float(there.extras["feature_distance"].mean()) < 3


def uncertainty_members(pair, system):
    """Energy (eV) and forces (3 N) of half the difference of two members."""
    from mdplug.uncertainty import linearised

    out, pulled = linearised(pair, system, pairs(system, pair.cutoff))
    sign = torch.tensor([[0.5], [-0.5]], dtype=torch.float64).expand_as(out["member_atom_energy"])
    return (out["member_atom_energy"] * sign).sum(), pulled({"member_atom_energy": sign})[0].reshape(-1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": {"energy": 0.0, "forces": 0.0}}, "no label is left for the posterior"),
        ({"bayes": SMALL | {"step": 0.9, "learning_rate": 1e6}}, "not finite at step"),
    ],
)
def test_bad_input_is_refused_in_one_line(tmp_path, argon, changes, message):
    with pytest.raises(InputError, match=message) as caught:
        train.run(lj_config(tmp_path / "run", argon, **changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("bayes", "message"),
    [
        ({"members": 13}, "bayes: members cannot exceed chains x samples, got 13 and 2 x 6"),
        ({"last_layer": True}, "bayes.last_layer samples readouts of a trained model; give start"),
        ({"sampler": "nuts"}, "bayes.sampler"),
    ],
)
def test_bad_options_are_named(argon, bayes, message):
    given = {"data": [str(argon)], "architecture": "lj", "cutoff_A": 5.0, "bayes": SMALL | bayes}
    with pytest.raises(InputError, match=message):
        train.Config.read(given=given)


def test_a_damaged_checkpoint_and_other_options_are_refused(tmp_path, argon):
    train.run(lj_config(tmp_path / "run", argon))
    with pytest.raises(RunFolderError, match="bayes was"):
        train.run(lj_config(tmp_path / "run", argon, {"temperature": 0.5}))
    path = tmp_path / "run/chain_1.pt"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(RunFolderError, match=r"chain_1\.pt does not continue this run"):
        train.run(lj_config(tmp_path / "run", argon))


def test_members_come_from_all_chains_and_over_their_whole_length():
    config = BayesConfig(chains=3, samples=10, members=7)
    assert [config.kept(k) for k in range(3)] == [[3, 6, 9], [4, 9], [4, 9]]
    assert BayesConfig(chains=4, members=2).kept(3) == []
