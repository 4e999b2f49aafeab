"""Training by sampling: chains over the weights of a potential become an ensemble file that says whether they mixed.

Every chain is checkpointed; the same call again continues to the last bit. Writes model.safetensors (an ensemble),
diagnostics.csv, chains.csv, traces.npz, traces.png and summary.yaml.
"""

from __future__ import annotations

import copy
import io
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

import mdplug
from mdplug.compose import Ensemble
from mdplug.errors import RunFolderError
from mdplug.potential import Potential
from mdplug.workflows._common import Progress, RunFolder, replacing, table_text, write_atomic
from mdplug.workflows.bayes_posterior import Batches, Noise, Posterior, PriorConfig, Probes
from mdplug.workflows.bayes_report import Verdict, judge, plot
from mdplug.workflows.bayes_sampler import Chain, SamplerConfig, Target
from mdplug.workflows.dataset import Loader
from mdplug.workflows.trainer import predictions

CHECKPOINT_S = 120.0


class BayesConfig(SamplerConfig, PriorConfig):
    """Options of `train --bayes`."""

    chains: int = Field(4, ge=1, description="from different starts; threads of them run side by side")
    members: int = Field(8, ge=2, description="samples that become members of the ensemble file, from all chains alike")
    spread: float = Field(0.02, ge=0, description="random displacement of each start, in typical sizes of weights")
    rhat_max: float = Field(1.05, gt=1, description="above it the chains are not called a posterior")
    effective_min: float = Field(100.0, ge=0, description="fewer effective samples are not called one either")
    probe_structures: int = Field(20, ge=1, description="whose predictions must agree: validation, else training")
    probe_forces: int = Field(60, ge=0, description="force components of them, chosen at random")
    last_layer: bool = Field(False, description="sample linear readouts of the features of start, which stays as it is")

    @model_validator(mode="after")
    def _enough_samples(self) -> BayesConfig:
        if self.members > self.chains * self.samples:
            raise ValueError(
                f"members cannot exceed chains x samples, got {self.members} and {self.chains} x {self.samples}"
            )
        return self

    def kept(self, chain: int) -> list[int]:
        """Which samples of a chain become members: the last, and others at even distances before it."""
        n = self.members // self.chains + (chain < self.members % self.chains)
        return sorted({self.samples - 1 - (k * self.samples) // n for k in range(n)}) if n else []


class Problem(Protocol):
    """What is sampled, for all chains."""

    names: tuple[str, ...]
    noise: Noise

    def chain(self, k: int) -> tuple[Target, Tensor, Callable[[Tensor], Tensor]]:
        """Target, start and `observe` of a chain, which no other chain shares."""

    def ensemble(self, positions: list[Tensor]) -> tuple[Potential, dict[str, Any]]:
        """The potential whose members are at these positions, and facts about it."""


class WholeModel:
    """All weights of a potential.

    Args:
        make: an untrained or a loaded potential for the k-th chain.
        data, probed: labels, and structures whose predictions are compared. noise: of the labels.
    """

    def __init__(
        self,
        make: Callable[[int], Potential],
        data: Loader,
        probed: Loader,
        noise: Noise,
        config: BayesConfig,
        seed: int,
    ):
        self.make, self.data, self.noise, self.config, self.seed = make, Batches(data), noise, config, seed
        self.probes = Probes.of(probed, noise, config.probe_forces, seed)
        self.names = self.probes.names

    def chain(self, k: int) -> tuple[Target, Tensor, Callable[[Tensor], Tensor]]:
        """See `Problem.chain`."""
        target = Posterior(self.make(k), self.data, self.noise, self.config)
        start = displaced(target.start(), self.config.spread, self.seed, k)
        return target, start, lambda position: self.probes.observe(target, position)

    def ensemble(self, positions: list[Tensor]) -> tuple[Potential, dict[str, Any]]:
        """See `Problem.ensemble`."""
        target = Posterior(self.make(0), self.data, self.noise, self.config)
        parts = []
        for position in positions:
            target.put(position)
            parts.append(copy.deepcopy(target.potential).requires_grad_(False))
            parts[-1].spec = replace(parts[-1].spec, provenance={})
        return Ensemble.of(parts), {}


def displaced(start: Tensor, spread: float, seed: int, chain: int) -> Tensor:
    """A start of its own for a chain: chains that begin at one point cannot show that they do not mix."""
    generator = torch.Generator().manual_seed(seed + 15485863 * (chain + 1))
    return start + spread * torch.randn(start.shape, generator=generator, dtype=start.dtype)


@dataclass
class Result:
    """What was sampled.

    Attributes:
        model: the ensemble file. converged, status: whether it may be called a posterior. reasons: why not.
        rhat, effective: worst R-hat and effective samples of all numbers that were compared.
        noise: mean of the noise of labels. errors: of the mean of the members, on validation or training structures.
        notes: what was noticed.
    """

    model: Path
    converged: bool
    status: str
    reasons: tuple[str, ...]
    rhat: float
    effective: float
    noise: dict[str, float]
    errors: dict[str, float]
    notes: list[str]
    text: str

    def __str__(self) -> str:
        return self.text


def sample(
    problem: Problem, config: BayesConfig, folder: RunFolder, seed: int, threads: int, progress: Progress
) -> list[Chain]:
    """Run all chains to their ends, several at a time; continues where checkpoints left off.

    Raises:
        InputError: a chain ran away. RunFolderError: a damaged checkpoint.
    """
    chains = []
    for k in range(config.chains):
        target, start, observe = problem.chain(k)
        chain = Chain(target, config, seed + 32452843 * (k + 1), start, observe, config.kept(k))
        path = folder / f"chain_{k}.pt"
        if path.exists():
            try:
                chain.restore(torch.load(path, map_location="cpu", weights_only=True))
            except Exception as error:  # torch raises anything on a damaged file
                detail = " ".join(str(error).split())[:120]
                raise RunFolderError(
                    f"{path} does not continue this run ({detail}); remove it to start again"
                ) from error
        chains.append(chain)
    stop = threading.Event()
    total = config.chains * config.total_steps

    def run(k: int) -> None:
        chain, path, saved = chains[k], folder / f"chain_{k}.pt", time.monotonic()
        while not (chain.done or stop.is_set()):
            chain.advance()
            if chain.state.step in chain.turns or time.monotonic() - saved > CHECKPOINT_S:
                save(chain, path)
                saved = time.monotonic()
        save(chain, path)

    def report() -> None:
        done = sum(chain.state.step for chain in chains)
        where = ", ".join(str(chain.state.step) for chain in chains)
        progress(done, total, f"steps {where} of {config.total_steps}")

    with ThreadPoolExecutor(min(threads, config.chains)) as pool:
        waiting: set[Future[None]] = {pool.submit(run, k) for k in range(config.chains)}
        try:
            while waiting:
                done, waiting = wait(waiting, timeout=0.05, return_when=FIRST_EXCEPTION)
                for one in done:
                    one.result()
                report()
        finally:
            stop.set()
    return chains


def save(chain: Chain, path: Path) -> None:
    """Write a chain's state, atomically."""
    out = io.BytesIO()
    torch.save(dict(vars(chain.state)), out)
    write_atomic(path, out.getvalue())


def finish(
    problem: Problem, config: BayesConfig, chains: list[Chain], held: Loader, name: str, record: dict[str, Any],
    folder: RunFolder, notes: list[str],
) -> Result:  # fmt: skip
    """Judge the chains, write the ensemble and the report."""
    values = np.stack([torch.stack(chain.state.seen).numpy() for chain in chains])
    names = problem.names
    verdict = judge(values, names, config.rhat_max, config.effective_min)
    ensemble, facts = problem.ensemble([position for chain in chains for position in chain.state.kept])
    for row, chain in zip(verdict.chains, chains, strict=True):
        row |= {"step_size": chain.step_size(), "heat_by_batches": chain.heat()}
    hottest = max(chain.heat() for chain in chains)
    noise = _noise(problem, values)
    facts |= {
        "converged": verdict.converged,
        "reasons": list(verdict.reasons),
        "rhat": verdict.rhat,
        "effective_samples": verdict.effective,
        "chains": config.chains,
        "samples": config.chains * config.samples,
        "sampler": config.sampler,
        "temperature": config.temperature,
        "heat_by_batches": hottest,
        "noise": noise,
    }
    ensemble.spec = replace(
        ensemble.spec, name=name, provenance=record | {"posterior": str(verdict), "posterior_facts": facts}
    )
    path = mdplug.save(ensemble, folder / "model.safetensors")
    errors = _errors(ensemble, held)
    _write(values, verdict, names, folder)
    text = f"{path}: {config.members} members from {config.chains} chains, {verdict}\n"
    text += ", ".join(f"{key} {value:.3g}" for key, value in {**errors, **_with_units(noise)}.items())
    if not verdict.converged:
        text += "\nNOT A POSTERIOR: the file says so; its members are an ensemble of samples and no more"
    result = Result(
        path, verdict.converged, verdict.status, verdict.reasons, verdict.rhat, verdict.effective, noise, errors, notes,
        text,
    )  # fmt: skip
    folder.summary(**{key: value for key, value in vars(result).items() if key != "text"})
    return result


def _noise(problem: Problem, values: np.ndarray) -> dict[str, float]:
    noise, found = problem.noise, {}
    for k, name in enumerate(noise.names):
        sampled = bool(noise.sampled[k])
        factor = np.exp(values[:, :, problem.names.index(f"ln_sigma_{name}")]).mean() if sampled else 1.0
        found[name] = float(noise.centre[k] * factor)
    return found


def _with_units(noise: dict[str, float]) -> dict[str, float]:
    units = {"energy": ("noise of energies / meV/atom", 1e3), "forces": ("noise of forces / meV/A", 1e3)}
    return {units[name][0]: value * units[name][1] for name, value in noise.items()}


def _errors(ensemble: Potential, held: Loader) -> dict[str, float]:
    """Mean absolute errors of the mean of the members."""
    de, df = [], []
    for batch, out in predictions(ensemble.eval().with_kernels(False), held):
        de.append(((out["energy"] - batch.energy) / batch.n_atoms)[batch.energy_weight > 0])
        df.append((out["forces"] - batch.forces)[(batch.forces_weight > 0)[batch.system.system_index]].reshape(-1))
    found = {}
    for key, one in (("energy_mae_meV_atom", torch.cat(de)), ("forces_mae_meV_A", torch.cat(df))):
        if len(one):
            found[key] = 1e3 * float(one.abs().mean())
    return found


def _write(values: np.ndarray, verdict: Verdict, names: tuple[str, ...], folder: RunFolder) -> None:
    write_atomic(folder / "diagnostics.csv", table_text(verdict.rows))
    write_atomic(folder / "chains.csv", table_text(verdict.chains))
    with replacing(folder / "traces.npz") as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, values=values, names=np.array(names))
    plot(values, verdict, names, folder / "traces.png")
