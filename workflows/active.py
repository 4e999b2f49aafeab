"""Molecular dynamics that learns on the way: it stops where the model does not know, has labels made, and goes on.

Every walker runs until its time is over or members disagree on a force; frames around that place are selected, cut to
clusters, labelled and learnt from; then the walkers go on from their last safe frames with the better model. The run
folder holds a folder for each round, and at the end model.safetensors, labels.extxyz, walker-*.extxyz, report.md, .json
and .png. The same call again continues: every decision is on disk before the next, or follows from what is.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.io import read

from mdplug.artifact import read_spec
from mdplug.errors import InputError, MdplugError
from mdplug.registry import resolve
from mdplug.uncertainty_statistics import AdaptiveConformal
from mdplug.workflows import label as labelling
from mdplug.workflows._common import (
    Caught,
    Progress,
    RunFolder,
    Stopped,
    catch_signals,
    silent,
    torch_threads,
    write_atomic,
)
from mdplug.workflows._structures import read_structures
from mdplug.workflows.active_carve import to_label, with_molecules
from mdplug.workflows.active_config import MAY_CHANGE, Config, Result
from mdplug.workflows.active_md import (
    Candidate,
    Segment,
    Track,
    all_frames,
    last_of,
    look_around,
    run_segment,
    trajectory_of,
    uncertain_frames,
    write_start,
)
from mdplug.workflows.active_report import Round, judged, plot, text_of
from mdplug.workflows.active_select import Posterior, force_rows, informative
from mdplug.workflows.active_update import (
    Fitted,
    Trained,
    as_new,
    body_of,
    fit_members,
    train_on,
    with_limit,
    write_known,
)
from mdplug.workflows.journal import as_extxyz

ROOM = 1.5  # times the largest sigma that held-out labels have tested: beyond it nobody knows what sigma is worth
BEYOND = 1.5  # a bound without end becomes this times the largest ratio ever seen
WINDOW = 100  # labels that the bound remembers
LABEL_FMAX_EV_A = 20.0


class _TimeOver(MdplugError):
    """max_hours are over."""


def run(config: Config, *, progress: Progress = silent) -> Result:
    """Run, or go on.

    Raises:
        InputError: structures, options, data or a model that cannot be right.
        RunFolderError: a folder of another run, a full or read-only disk.
        Stopped: a signal; the same call goes on.
    """
    inputs = [*config.structures, *config.data, resolve(config.model)]
    for path in inputs:
        if not path.is_file():
            raise InputError(f"no file {path}; check the name")
    with (
        catch_signals() as caught,
        torch_threads(config.threads),
        RunFolder(config.output, "active", config, inputs=inputs, may_change=MAY_CHANGE) as folder,
    ):
        return _Run(config, folder, caught, progress)()


class _Clock:
    """Seconds of all calls together."""

    def __init__(self, path: Path):
        self.path, self._began = path, time.monotonic()
        self._before = float(json.loads(path.read_text())) if path.exists() else 0.0
        self._saved = self._began

    @property
    def seconds(self) -> float:
        return self._before + time.monotonic() - self._began

    def keep(self, every_s: float = 0.0) -> None:
        if time.monotonic() - self._saved >= every_s:
            write_atomic(self.path, json.dumps(self.seconds))
            self._saved = time.monotonic()


class _Run:
    def __init__(self, config: Config, folder: RunFolder, caught: Caught, progress: Progress):
        self.config, self.folder, self.caught, self._show = config, folder, caught, progress
        self.clock = _Clock(folder / "clock.json")
        self.rounds: list[Round] = []
        self.segments: list[Segment] = []
        self.used = 0
        self.doing = ""
        self.ready = False  # before that there is no model to end with

    # --- the loop

    def __call__(self) -> Result:
        ended = ""
        try:
            self._prepare()
            while not ended:
                ended = self._round(len(self.rounds) + 1)
                self.clock.keep()
        except _TimeOver:
            ended = f"{self.config.max_hours:g} hours are over"
        return self._finish(ended)

    def _progress(self, done: int, total: int, text: str) -> None:
        """Shows, and is where signals and the clock are looked at."""
        if self.caught.number is not None:
            self.clock.keep()
            raise Stopped(self.caught.number, f"stopped by {self.caught.name}; the same command goes on")
        self.clock.keep(every_s=20.0)
        if self.ready and self.config.max_hours is not None and self.clock.seconds > 3600 * self.config.max_hours:
            self.clock.keep()
            raise _TimeOver
        self._show(done, total, f"{self.doing}: {text}")

    def _prepare(self) -> None:
        config, first = self.config, self.folder / "round-00"
        starts = [config.prepared(atoms) for path in config.structures for atoms in read_structures(path)]
        self.starts: list[Path] = []
        for k, atoms in enumerate(one for one in starts for _ in range(config.walkers)):
            path = self.folder / f"start-{k}.extxyz"
            if not path.exists():
                atoms.calc = None
                write_atomic(path, as_extxyz([with_molecules(atoms)]))
            self.starts.append(path)
        self.at = list(self.starts)
        self.ps = [0.0] * len(self.starts)
        self.tracks = [Track() for _ in self.starts]
        self.known = self.folder / "known.extxyz"
        first.mkdir(exist_ok=True)
        self.body = first / "body.safetensors"
        model = resolve(config.model)
        if not self.body.exists():
            body_of(model, self.body)
        if not self.known.exists():
            write_known(config.data, config.replay, config.seed, self.known)
        spec = read_spec(model)
        self.members = int(spec.config["members"])
        self.method = str(spec.provenance.get("ensemble", {}).get("method", "laplace"))
        self.doing = "members and their scale"
        self.fitted = self._fit(first, [self.known])
        self._set_limit(first, None)
        self.new: Path | None = None
        self.ready = True

    def _round(self, number: int) -> str:
        """One round; why it was the last, or nothing."""
        config, folder = self.config, self.folder / f"round-{number:02d}"
        began = self.clock.seconds
        record = folder / "round.json"
        segments = self._dynamics(folder, number)
        stopped = [one for one in segments if one.status != "done"]
        if not stopped:
            return "every walker ran its time"
        if not record.exists():
            if self.used >= config.budget_labels:
                return f"all {config.budget_labels} labels are used"
            if number > config.rounds:
                return f"all {config.rounds} rounds are over"
        before = Round(**json.loads(record.read_text())) if record.exists() else None
        selected = self._select(folder, number, stopped)
        labels, count = self._label(folder)
        self.used += len(selected)
        if before is not None:
            seen = before.seen
        else:
            seen = judged(self.model, labels, self.factor, self.threshold) if count else []
        trained = self._update(folder, number, labels if count else None, [row["score"] for row in seen])
        if before is not None:
            self.rounds.append(before)
            return ""
        done = Round(
            number, [asdict(one) for one in segments], len(selected), count, len(selected) - count, seen,
            None if trained is None else self._plain(trained), self.threshold, self.sigma_max, self.factor,
            (self.clock.seconds - began) / 60,
        )  # fmt: skip
        write_atomic(record, json.dumps(asdict(done), indent=1))
        self.rounds.append(done)
        self._report("running")
        self._show(self.used, config.budget_labels, done.line())
        return ""

    def _plain(self, trained: Trained) -> dict[str, Any]:
        return {**asdict(trained), "body": str(trained.body.relative_to(self.folder.path))}

    # --- its parts

    def _dynamics(self, folder: Path, number: int) -> list[Segment]:
        config = self.config
        found = []
        for walker, path in enumerate(self.at):
            if self.ps[walker] >= config.time_ps - 1e-9:
                continue
            self.doing = f"round {number}, walker {walker} from {self.ps[walker]:.4g} ps"
            own = folder / f"walker-{walker}"
            drawn = np.random.SeedSequence((config.seed, number, walker)).generate_state(2)
            options = {
                "model": str(self.model), "device": config.device, "dtype": config.dtype, "head": config.head,
                "threads": config.threads, "temperature_K": config.temperature_K, "ensemble": config.ensemble,
                "sigma_max_eV_A": self.sigma_max, "format": "extxyz", **config.md_options,
                "seed": int(drawn[0] >> 1),
            }  # fmt: skip
            segment = run_segment(own, path, options, walker, number, self.ps[walker], config.time_ps, self._progress)
            if segment.status != "done":
                look_around(
                    own, options, config.around, int(drawn[1]), config.around_ps, config.around_ps / 10, self._progress
                )
            safe = self.tracks[walker].extend(segment, trajectory_of(own), last_of(self.starts[walker]))
            if not (own / "safe.extxyz").exists():
                write_start(own / "safe.extxyz", safe)
            self.at[walker], self.ps[walker] = own / "safe.extxyz", segment.safe_ps
            self.segments.append(segment)
            found.append(segment)
        return found

    def _select(self, folder: Path, number: int, stopped: list[Segment]) -> list[Atoms]:
        """What is to be labelled, decided once."""
        path = folder / "selected.extxyz"
        if path.exists():
            return list(read(path, ":"))
        config = self.config
        self.doing = f"round {number}, selection"
        count = min(config.labels_per_round, config.budget_labels - self.used)
        rng = np.random.default_rng([config.seed, number])
        candidates: list[Candidate] = []
        for segment in stopped:
            place = folder / f"walker-{segment.walker}"
            candidates += (
                uncertain_frames(place, segment, self.sigma_max)
                if config.selection == "uncertain"
                else all_frames(place, segment, rng)
            )
        if not candidates:
            raise InputError("the walkers ended before their first frame; relax the structures, or take other ones")
        self._progress(0, len(candidates), "cutting clusters")
        cut = [to_label(one.atoms, one.atom, config.cluster_atoms) for one in candidates]
        if config.selection == "uncertain":
            first = [k for k, one in enumerate(candidates) if one.alarm]
            rows = force_rows(self.body, self.model, cut)
            chosen, gains = informative(rows, Posterior.load(self.fitted.posterior), count, first)
        else:
            chosen = sorted(int(k) for k in rng.permutation(len(cut))[:count])
            gains = [float("nan")] * len(chosen)
        out = []
        for k, gain in zip(chosen, gains, strict=True):
            one, atoms = candidates[k], cut[k]
            atoms.info |= {
                "group": f"round-{number:02d}-walker-{one.walker}", "source": "active", "alarm": one.alarm,
                "gain_eV2_A2": gain, "walker": one.walker, "round": number,
            }  # fmt: skip
            out.append(atoms)
        write_atomic(path, as_extxyz(out))
        return list(read(path, ":"))

    def _label(self, folder: Path) -> tuple[Path, int]:
        """The labels of what was selected, and how many there are."""
        config = self.config
        self.doing = f"labels by {config.label}"
        method = {"method": "xtb"} if config.label == "xtb" else {"method": "ase", "calculator": config.label}
        result = labelling.run(
            labelling.Config.read(
                given={
                    "inputs": (folder / "selected.extxyz",), "output": folder / "labels",
                    "fmax_eV_A": LABEL_FMAX_EV_A, **method, **config.label_options,
                }
            ),
            progress=self._progress,
        )  # fmt: skip
        return result.labels, result.n_labelled

    def _update(self, folder: Path, number: int, labels: Path | None, scores: list[float]) -> Trained | None:
        """Learn from the labels; `body`, `fitted`, `model` and the limit are then those to go on with."""
        config, trained = self.config, None
        path = folder / "new.extxyz"
        if labels is not None:
            if not path.exists():
                before: list[Atoms] = list(read(self.new, ":")) if self.new is not None else []
                added = as_new(list(read(labels, ":")), len(before), config.new_weight)
                write_atomic(path, as_extxyz([*before, *added]))
            self.new = path
            self.doing = f"round {number}, training"
            record = folder / "trained.json"
            if record.exists():
                given = json.loads(record.read_text())
                trained = Trained(**{**given, "body": self.folder / given["body"]})
            else:
                options, threads = dict(config.training), config.threads or 1
                trained = train_on(folder, self.body, self.known, path, options, threads, config.seed, self._progress)
                write_atomic(record, json.dumps(self._plain(trained), indent=1))
            self.body = trained.body
            self.doing = f"round {number}, members and their scale"
            self.fitted = self._fit(folder, [self.known, path])
        self._set_limit(folder, scores)
        return trained

    def _fit(self, folder: Path, data: list[Path]) -> Fitted:
        record = folder / "fitted.json"
        if not record.exists():
            made = fit_members(folder, self.body, data, self.members, self.method, self.config.seed, self._progress)
            write_atomic(record, json.dumps({"scores": made.scores, "sigma": made.sigma, "error": made.error}))
        return Fitted(folder / "ensemble.safetensors", folder / "posterior.npz", **json.loads(record.read_text()))

    def _set_limit(self, folder: Path, scores: list[float] | None) -> None:
        """The force sigma at which the bound on the error reaches the threshold, or labels that were good end.

        The factor between sigma and the bound is conformal: it starts from held-out structures and adapts with every
        label.
        """
        if scores is None:
            self.bound = AdaptiveConformal(self.config.level, self.fitted.scores, window=WINDOW)
        for score in scores or ():
            self.bound.update(score)
        self.factor = min(self.bound.factor, BEYOND * max(self.bound.scores))
        if scores is None:
            self.threshold = self.config.threshold_eV_A or ROOM * self.factor * max(self.fitted.sigma)
        pairs = zip(self.fitted.sigma, self.fitted.error, strict=True)
        tested = max((sigma for sigma, error in pairs if error <= self.threshold), default=min(self.fitted.sigma))
        self.sigma_max = min(self.threshold / self.factor, ROOM * tested)
        self.model = folder / "model.safetensors"
        if not self.model.exists():
            record = {"threshold_eV_A": self.threshold, "factor": self.factor, "labels": self.used}
            with_limit(self.fitted.model, self.sigma_max, record, self.model)

    # --- what is left behind

    def _report(self, ended: str) -> None:
        record = {
            "ended": ended, "walker_ps": self.ps, "labels_used": self.used, "minutes": self.clock.seconds / 60,
            "threshold_eV_A": self.threshold, "rounds": [asdict(one) for one in self.rounds],
            "segments": [asdict(one) for one in self.segments],
        }  # fmt: skip
        write_atomic(self.folder / "report.json", json.dumps(record, indent=1))
        write_atomic(self.folder / "report.md", text_of(record, self.rounds))
        if self.rounds:
            plot(self.folder / "report.png", self.rounds)

    def _finish(self, ended: str) -> Result:
        folder = self.folder
        self._report(ended)
        model, labels = folder / "model.safetensors", folder / "labels.extxyz"
        write_atomic(model, self.model.read_bytes())
        write_atomic(labels, self.new.read_bytes() if self.new is not None else b"")
        for walker in range(len(self.starts)):
            write_atomic(folder / f"walker-{walker}.extxyz", as_extxyz(self._frames_of(walker)))
        finished = all(t >= self.config.time_ps - 1e-9 for t in self.ps)
        result = Result(
            folder.path, model, labels, folder / "report.md", len(self.rounds), self.used, finished, ended, self.ps
        )
        folder.summary(**{k: v for k, v in vars(result).items() if k != "folder"})
        return result

    def _frames_of(self, walker: int) -> list[Atoms]:
        """The frames of a walker that stand."""
        out = []
        for time_ps, atoms in self.tracks[walker].frames:
            one = atoms.copy()
            one.info |= {"time_ps": time_ps}
            out.append(one)
        return out
