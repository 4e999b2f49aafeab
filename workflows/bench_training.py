"""Time training: the same weights, structures, batches and loss through mdplug's trainer and mace-torch's, in turns.

Run as a program it is one of the two, in a process of its own (see bench_worker).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
from ase import Atoms
from ase.io import read, write
from pydantic import Field

import mdplug
from mdplug.artifact import read_spec
from mdplug.errors import InputError, MdplugError
from mdplug.pairs import pairs
from mdplug.potential import Potential
from mdplug.system import AtomicSystem
from mdplug.workflows._common import Config as BaseConfig
from mdplug.workflows._common import Progress, RunFolder, Stopped, silent, write_atomic
from mdplug.workflows.bench import most_of_memory, stoppable, water_box, weights
from mdplug.workflows.bench_models import E0_EV, RANDOM, describe
from mdplug.workflows.bench_peers import PACKAGES, Answer, be_worker, missing, peak_mib, timed
from mdplug.workflows.bench_worker import Worker

Engine = Literal["mdplug", "mace-torch"]
ENGINES: tuple[Engine, ...] = ("mdplug", "mace-torch")
# What mace_run_train does without further options.
ENERGY_WEIGHT, FORCES_WEIGHT, CLIP_NORM, WEIGHT_DECAY = 1.0, 100.0, 10.0, 5e-7
LEARNING_RATE = 1e-4  # small: the labels are noise


class Config(BaseConfig):
    """Options of `mdplug bench-training`."""

    models: list[str] = Field(["l0", "l1"], description=f"MACE with random weights (needs mdplug[mace]; {describe()})")
    engines: list[Engine] = Field(list(ENGINES), description="what to time")
    output: Path = Field(Path("bench-training"), description="folder to write; the same command again continues")
    molecules: int = Field(10, ge=1, description="water molecules of one structure, periodic")
    batch: int = Field(5, ge=1, description="structures of one batch")
    dtype: Literal["float32", "float64"] = Field(
        "float64", description="width of the models; mace_run_train's: float64"
    )
    threads: int = Field(1, ge=1, description="CPU threads of both")
    rounds: int = Field(3, ge=1, description="how often they take turns")
    steps: int = Field(4, ge=1, description="steps of one turn")
    turn_s: float = Field(30.0, gt=0, description="a turn ends early after so long")
    memory_GiB: float = Field(
        default_factory=most_of_memory, gt=0, description="one that needs more is left out; default: 60 % of all"
    )
    seed: int = Field(0, description="of weights, structures and labels")
    patience_s: float = Field(3600.0, gt=0, description="longest wait for one answer")


@dataclass
class Result:
    """What was measured.

    Attributes:
        records: one per model and engine: "what", "model", "dtype", "threads", "batch", "atoms" (of a batch), "pairs",
            "structures_per_s", "ms_per_step" (median), "min_ms", "max_ms", "steps", "peak_MiB", "loss" of the first
            batch before training, "slope" (derivative of that loss by the logarithm of a factor on the element
            embeddings, which is the same in any linear parametrisation), "versions"; or "left_out" with the reason.
        folder: holds training.jsonl, training.md and summary.yaml.
    """

    records: list[dict[str, Any]]
    folder: Path

    def __str__(self) -> str:
        return "\n".join([*(json.dumps(one) for one in self.records), "", table(self.records)])


def run(config: Config, *, progress: Progress = silent) -> Result:
    """Measure every model; one that is in the folder already is not measured again.

    Raises:
        InputError: a model that is none of the random ones.
        MissingExtraError: mace-torch, which makes the weights, is not there.
    """
    for name in config.models:
        if name not in RANDOM:
            raise InputError(f"no model {name!r} to train; there are {', '.join(RANDOM)}")
    with RunFolder(config.output, "bench-training", config, may_change=("models",)) as folder, stoppable() as check:
        log = folder / "training.jsonl"
        known = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        scratch = folder / "work"
        scratch.mkdir(exist_ok=True)
        for name in config.models:
            if name not in {r["model"] for r in known}:
                known += _measure(name, config, scratch, progress, check)
                write_atomic(log, "".join(json.dumps(one) + "\n" for one in known))
        write_atomic(folder / "training.md", table(known) + "\n")
        folder.summary(records=known)
    return Result(known, config.output)


def labelled_boxes(number: int, molecules: int, seed: int) -> list[Atoms]:
    """Periodic boxes of water whose REF_energy and REF_forces are noise: enough for speed."""
    rng = np.random.default_rng([seed, 1])
    frames = []
    for k in range(number):
        atoms = water_box(molecules, seed + k)
        noise = rng.normal(0, 0.05 * len(atoms))
        atoms.info["REF_energy"] = float(sum(E0_EV[z] for z in atoms.numbers) + noise)
        atoms.arrays["REF_forces"] = rng.normal(0, 1.0, (len(atoms), 3))
        frames.append(atoms)
    return frames


def _measure(
    name: str, config: Config, folder: Path, progress: Progress, check: Callable[[], None]
) -> list[dict[str, Any]]:
    """Records of one model."""
    setting = {"dtype": config.dtype, "threads": config.threads, "memory_MiB": 1024 * config.memory_GiB}
    ours, upstream = weights(name, folder, config.seed, setting, config.patience_s, check)
    spec = read_spec(ours)
    frames = labelled_boxes(2 * config.batch, config.molecules, config.seed)
    write(folder / "boxes.extxyz", frames)
    n_pairs = [pairs(AtomicSystem.from_ase(one), spec.cutoff).n_pairs for one in frames]
    job = {
        "data": str(folder / "boxes.extxyz"), "model": str(ours), "upstream": str(upstream), "batch": config.batch,
        "head": spec.heads[0] if len(spec.heads) > 1 else None, "folder": str(folder), **setting,
    }  # fmt: skip
    common = {
        "model": name, "dtype": config.dtype, "threads": config.threads, "batch": config.batch,
        "atoms": config.batch * len(frames[0]), "pairs": round(sum(n_pairs) / 2),
    }  # fmt: skip
    records: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for engine in config.engines:
            records[engine] = {"what": engine, **common}
            if engine == "mace-torch" and (reason := missing(engine, "cpu")):
                records[engine]["left_out"] = reason
                continue
            progress(0, config.rounds, f"{name}: starting {engine}")
            worker = Worker({**job, "engine": engine}, folder, config.patience_s, check, module="bench_training")
            stack.enter_context(worker)
            try:
                records[engine] |= worker.ask()  # after a first step on each of the two batches
            except Stopped:
                raise
            except MdplugError as error:
                records[engine]["left_out"] = str(error)
                continue
            workers[engine] = worker
        times: dict[str, list[float]] = {engine: [] for engine in workers}
        for turn in range(config.rounds):
            check()
            progress(turn, config.rounds, name)
            for one in list(workers)[:: 1 if turn % 2 else -1]:
                said = workers[one].ask({"steps": config.steps, "at_most_s": config.turn_s})
                times[one] += said["milliseconds"]
                records[one]["peak_MiB"] = round(said["peak_MiB"], 1)
        progress(config.rounds, config.rounds, name)
    for one, some in times.items():
        ms = float(np.median(some))
        records[one] |= {"ms_per_step": round(ms, 3), "min_ms": round(min(some), 3), "max_ms": round(max(some), 3)}
        records[one] |= {"steps": len(some), "structures_per_s": round(1e3 * config.batch / ms, 4)}
    return list(records.values())


def table(records: list[dict[str, Any]]) -> str:
    """The records as a Markdown table; the last column is the throughput of each over that of mace-torch."""
    base = {r["model"]: r["structures_per_s"] for r in records if r["what"] == "mace-torch" and "steps" in r}
    lines = [
        "| model | engine | dtype | threads | atoms a batch | structures per s | ms per step: median | min | max "
        "| peak MiB | loss before | times mace-torch |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in records:
        lead = f"| {r['model']} | {r['what']} | {r['dtype']} | {r['threads']} | {r['atoms']} |"
        if "left_out" in r:
            lines.append(f"{lead} left out: {r['left_out']} | | | | | | |")
            continue
        ratio = f"{r['structures_per_s'] / base[r['model']]:.2f}" if r["model"] in base else ""
        lines.append(
            f"{lead} {r['structures_per_s']:.3f} | {r['ms_per_step']:.1f} | {r['min_ms']:.1f} | {r['max_ms']:.1f} "
            f"| {r['peak_MiB']:.0f} | {r['loss']:.6g} | {ratio} |"
        )
    return "\n".join(lines)


# --- one engine as a program of its own ------------------------------------------------------------------------------

Start = tuple[dict[str, float], Callable[[int], float]]
"""({"loss", "slope"} of the first step, a function that takes a step on batch k and returns the loss)."""


def _mdplug(job: dict[str, Any]) -> Start:
    import torch

    from mdplug.workflows import dataset
    from mdplug.workflows.loss import LossConfig
    from mdplug.workflows.trainer import Budget, OptimiserConfig, Trainer

    torch.set_num_threads(1)  # as train does: a batch is split over the threads instead
    model = mdplug.load(job["model"], dtype=job["dtype"], head=job["head"], radial="exact")
    assert isinstance(model, Potential)
    model = model.without_kernels().requires_grad_(True).train()
    reference = {"H": E0_EV[1], "O": E0_EV[8]}
    loader = dataset.Loader(dataset.read([Path(job["data"])]).structures, model.cutoff, reference)
    options = OptimiserConfig(
        learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY, amsgrad=True, clip_norm=None, schedule="constant",
        warm_up_steps=0, ema_decay=0.0,
    )  # fmt: skip
    loss = LossConfig(kind="squared", energy=ENERGY_WEIGHT, forces=FORCES_WEIGHT)
    absent = Path(job["folder"]) / "no-checkpoint.pt"
    trainer = Trainer(model, loader, None, loss, options, Budget(1, None, None), 0, absent, job["threads"])

    def step(k: int) -> float:
        return trainer.step(list(range(k * job["batch"], (k + 1) * job["batch"])), 0.0)

    raw = trainer.raw["embedding"]
    before = raw.detach().clone()
    value = step(0)
    assert raw.grad is not None
    first = {"loss": value, "slope": float((before * raw.grad).sum())}
    trainer.options = options.model_copy(update={"clip_norm": CLIP_NORM})
    return first, step


def _mace_torch(job: dict[str, Any]) -> Start:
    import argparse

    import mace  # noqa: F401  (before e3nn)
    import torch
    from mace import data, modules
    from mace.tools import AtomicNumberTable, torch_geometric
    from mace.tools.scripts_utils import get_optimizer, get_params_options
    from mace.tools.train import take_step

    torch.set_num_threads(job["threads"])
    torch.set_default_dtype(getattr(torch, job["dtype"]))
    model = torch.load(job["upstream"], map_location="cpu", weights_only=False).to(getattr(torch, job["dtype"]))
    model.requires_grad_(True).train()
    keys = data.KeySpecification(info_keys={"energy": "REF_energy"}, arrays_keys={"forces": "REF_forces"})
    table = AtomicNumberTable([int(z) for z in model.atomic_numbers])
    graphs: Any = []
    for atoms in read(job["data"], ":"):
        one = data.config_from_atoms(atoms, key_specification=keys, head_name=model.heads[0])
        graphs.append(data.AtomicData.from_config(one, z_table=table, cutoff=float(model.r_max), heads=model.heads))
    batches = torch_geometric.dataloader.DataLoader(graphs, batch_size=job["batch"], shuffle=False, drop_last=True)
    loss = modules.WeightedEnergyForcesLoss(energy_weight=ENERGY_WEIGHT, forces_weight=FORCES_WEIGHT)
    options = argparse.Namespace(
        lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, amsgrad=True, beta=0.9, lr_params_factors="{}", freeze=None,
        optimizer="adam",
    )  # fmt: skip
    adam = get_optimizer(options, get_params_options(options, model))
    wanted = {"forces": True, "virials": False, "stress": False}

    def forever() -> Iterator[Any]:
        while True:
            yield from batches

    stream = forever()

    def step(k: int, clip: float | None = CLIP_NORM) -> float:  # k: the stream has the same order
        value: Any = take_step(model, loss, next(stream), adam, None, wanted, clip, torch.device("cpu"))[0]
        return float(value.detach())

    weight: Any = model.node_embedding.linear.weight
    before = weight.detach().clone()
    value = step(0, clip=None)
    return {"loss": value, "slope": float((before * weight.grad).sum())}, step


def serve(job: dict[str, Any], requests: Iterator[dict[str, Any]], answer: Answer) -> None:
    """Take a step on each batch, then answer requests {"steps", "at_most_s"} until they end."""
    first, step = {"mdplug": _mdplug, "mace-torch": _mace_torch}[job["engine"]](job)
    step(1)
    packages = ("mdplug", "torch") if job["engine"] == "mdplug" else PACKAGES["mace-torch"][1]
    answer(**first, versions={name: metadata.version(name) for name in packages})
    at = 0
    for request in requests:
        steps = (partial(step, k % 2) for k in range(at, at + request["steps"]))
        milliseconds, losses = timed(steps, request["at_most_s"])
        at += len(losses)
        if not all(map(math.isfinite, losses)):
            raise MdplugError("the loss is no longer finite")
        answer(milliseconds=milliseconds, peak_MiB=peak_mib("cpu"))


if __name__ == "__main__":
    be_worker(serve)
