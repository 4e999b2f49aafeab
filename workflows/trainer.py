"""The training loop: preconditioned Adam, schedule, averaged weights, checkpoints from which it continues exactly."""

from __future__ import annotations

import copy
import io
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mdplug.deployed import call, deploy
from mdplug.errors import InputError, RunFolderError
from mdplug.potential import Model, Potential
from mdplug.workflows._common import Config, write_atomic
from mdplug.workflows.dataset import Batch, Loader
from mdplug.workflows.loss import LossConfig, loss


class DivergedError(InputError):
    """Training left the numbers: the loss is not finite."""


class OptimiserConfig(Config):
    """Adam and its schedule."""

    learning_rate: float = Field(0.01, gt=0)
    weight_decay: float = Field(0.0, ge=0, description="decoupled (AdamW)")
    amsgrad: bool = True
    clip_norm: float | None = Field(10.0, gt=0, description="largest norm of the gradient")
    schedule: Literal["cosine", "plateau", "constant"] = "cosine"
    warm_up_steps: int = Field(100, ge=0)
    plateau_factor: float = Field(0.5, gt=0, lt=1)
    plateau_patience: int = Field(5, ge=1, description="epochs")
    ema_decay: float = Field(0.995, ge=0, lt=1, description="0: no averaging of weights")


@dataclass(frozen=True)
class Budget:
    """How long to train: whichever ends first."""

    epochs: int
    max_minutes: float | None
    patience: int | None
    checkpoint_minutes: float = 2.0


@dataclass
class State:
    """Everything that changes while training; with the weights it is the checkpoint."""

    epoch: int = 0
    position: int = 0  # batches of this epoch that are done
    step: int = 0
    elapsed_s: float = 0.0
    train_loss: float = 0.0  # sum over this epoch
    lr_factor: float = 1.0  # of the plateau schedule
    best_loss: float = math.inf
    best_epoch: int = -1
    stopped: str = ""
    history: list[dict[str, float]] = field(default_factory=list)


class Trainer:
    """Trains a potential.

    Args:
        potential: its parameters are trained in place.
        train, valid: the data; without `valid` the last weights are the result.
        loss_config, optimiser, budget: how.
        seed: order of the data. checkpoint: file to continue from and to write.
        threads: parts of a batch that are computed side by side.
    """

    def __init__(
        self,
        potential: Potential,
        train: Loader,
        valid: Loader | None,
        loss_config: LossConfig,
        optimiser: OptimiserConfig,
        budget: Budget,
        seed: int,
        checkpoint: Path,
        threads: int = 1,
    ):
        self.potential, self.deployed = potential, deploy(potential)
        self.train, self.valid = train, valid
        self.loss_config, self.options, self.budget, self.seed = loss_config, optimiser, budget, seed
        self.checkpoint, self.threads = checkpoint, threads
        self._pool = ThreadPoolExecutor(threads)
        self.state = State()
        weights = dict(potential.named_parameters())
        if not weights:
            raise InputError(f"potential {potential.spec.name!r} has no parameters; there is nothing to train")
        scales = potential.scales()
        # Adam's steps have the size of the learning rate: it works on weights divided by their typical size.
        self.weights = weights
        self.scales = {k: torch.as_tensor(scales.get(k, 1.0), dtype=w.dtype) for k, w in weights.items()}
        self.raw = {k: nn.Parameter(w.detach() / self.scales[k]) for k, w in weights.items()}
        self.average = {k: r.detach().clone() for k, r in self.raw.items()}
        self.adam = torch.optim.AdamW(
            list(self.raw.values()), lr=optimiser.learning_rate, weight_decay=optimiser.weight_decay,
            amsgrad=optimiser.amsgrad,
        )  # fmt: skip
        self.best: dict[str, Tensor] = {k: v.clone() for k, v in self.average.items()}
        if checkpoint.exists():
            self._read()
        self._started = time.monotonic() - self.state.elapsed_s
        self._saved = time.monotonic()

    # --- state -------------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        try:
            saved = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            self.state = State(**saved["state"])
            with torch.no_grad():
                for k, raw in self.raw.items():
                    raw.copy_(saved["raw"][k])
            self.average, self.best = saved["average"], saved["best"]
            self.adam.load_state_dict(saved["adam"])
        except Exception as error:  # torch raises anything on a damaged file
            raise RunFolderError(
                f"{self.checkpoint} does not continue this run ({' '.join(str(error).split())[:120]}); "
                "remove it to start again"
            ) from error

    def save(self) -> None:
        """Write the checkpoint, atomically."""
        self.state.elapsed_s = time.monotonic() - self._started
        out = io.BytesIO()
        record = {
            "state": dict(vars(self.state)),
            "raw": {k: r.detach() for k, r in self.raw.items()},
            "average": self.average,
            "best": self.best,
            "adam": self.adam.state_dict(),
        }
        torch.save(record, out)
        write_atomic(self.checkpoint, out.getvalue())
        self._saved = time.monotonic()

    def with_weights(self, raw: dict[str, Tensor]) -> Potential:
        """A copy of the potential with given (divided) weights, frozen."""
        clone = copy.deepcopy(self.potential).requires_grad_(False)
        for name, parameter in clone.named_parameters():
            parameter.data.copy_(raw[name].detach() * self.scales[name])
        return clone

    # --- one step ----------------------------------------------------------------------------------------------------

    def fraction(self, n_batches: int) -> float:
        """How much of the run is done, 0 to 1."""
        done = (self.state.epoch + self.state.position / n_batches) / self.budget.epochs
        if self.budget.max_minutes is not None:
            done = max(done, (time.monotonic() - self._started) / (60.0 * self.budget.max_minutes))
        return min(done, 1.0)

    def learning_rate(self, fraction: float) -> float:
        """Learning rate of the next step."""
        lr = self.options.learning_rate * min(1.0, (self.state.step + 1) / max(1, self.options.warm_up_steps))
        if self.options.schedule == "cosine":
            return lr * 0.5 * (1.0 + math.cos(math.pi * fraction))
        return lr * self.state.lr_factor

    def _push(self) -> None:
        with torch.no_grad():
            for k, raw in self.raw.items():
                self.weights[k].copy_(raw * self.scales[k])

    def _loss(
        self, out: dict[str, Tensor], batch: Batch, fraction: float, whole: tuple[int, int] | None = None
    ) -> Tensor:
        stress = None
        if self.loss_config.stress:
            stress = -out["virial"] / batch.system.volume[:, None, None]
        return loss(out["energy"], out["forces"], stress, batch, self.loss_config, fraction, whole)

    def _gradient(self, chosen: list[int], fraction: float, whole: tuple[int, int]) -> tuple[float, list[Tensor]]:
        batch = self.train.collate(chosen)
        value = self._loss(call(self.deployed, batch.system, batch.pairs, True, True), batch, fraction, whole)
        grads = torch.autograd.grad(value, list(self.weights.values()), allow_unused=True, materialize_grads=True)
        return float(value.detach()), list(grads)

    def step(self, chosen: list[int], fraction: float) -> float:
        """One step of the optimiser on a batch of structures; the loss before it.

        Each thread takes a part of the batch: many small operations then never wait for one another.

        Raises:
            DivergedError: the loss is not finite.
        """
        self._push()
        parts = [part for part in (chosen[k :: self.threads] for k in range(self.threads)) if part]
        whole = (len(chosen), sum(self.train.structures[k].n_atoms for k in chosen))
        others = [self._pool.submit(self._gradient, part, fraction, whole) for part in parts[1:]]
        done = [self._gradient(parts[0], fraction, whole), *(other.result() for other in others)]
        value = sum(v for v, _ in done)
        if not math.isfinite(value):
            raise DivergedError(
                f"the loss is not finite at step {self.state.step}; lower learning_rate, or look for structures with "
                "huge labels (fmax_eV_A leaves them out)"
            )
        for i, (k, raw) in enumerate(self.raw.items()):
            raw.grad = sum(grads[i] for _, grads in done) * self.scales[k]
        if self.options.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(list(self.raw.values()), self.options.clip_norm)
        for group in self.adam.param_groups:
            group["lr"] = self.learning_rate(fraction)
        self.adam.step()
        self.state.step += 1
        n = self.state.step
        # Early averages would remember the random start: the decay grows into its value.
        decay = min(self.options.ema_decay, (1.0 + n) / (10.0 + n)) if self.options.ema_decay else 0.0
        with torch.no_grad():
            for k, raw in self.raw.items():
                self.average[k].lerp_(raw, 1.0 - decay)
        return value

    # --- the run -----------------------------------------------------------------------------------------------------

    def run(self, progress: Callable[[int, int, str], None], after_epoch: Callable[[Trainer], None]) -> None:
        """Train until the budget is used up or nothing improves; continues where a checkpoint left off.

        Args:
            progress: called with (steps done, steps expected, text).
            after_epoch: called after every validation, the state and the best weights being up to date.
        """
        state = self.state
        try:
            while not state.stopped and state.epoch < self.budget.epochs:
                plan = self.train.plan(seed=self.seed + 1000003 * state.epoch)
                for k in range(state.position, len(plan)):
                    fraction = self.fraction(len(plan))
                    if fraction >= 1.0:
                        break
                    state.train_loss += self.step(plan[k], fraction)
                    state.position = k + 1
                    expected = max(state.step, round(state.step / max(self.fraction(len(plan)), 1e-9)))
                    progress(state.step, expected, self._text(len(plan)))
                    if time.monotonic() - self._saved > 60.0 * self.budget.checkpoint_minutes:
                        self.save()
                self._end_epoch(self.fraction(len(plan)))
                after_epoch(self)
                self.save()
        except KeyboardInterrupt:
            self.save()
            raise
        finally:
            self._pool.shutdown()

    def _text(self, n_batches: int) -> str:
        state = self.state
        text = f"epoch {state.epoch + 1} ({state.position}/{n_batches}) loss {state.train_loss / state.position:.4f}"
        if state.history:
            last = state.history[-1]
            text += f" | valid {last['energy_mae_meV_atom']:.1f} meV/atom {last['forces_mae_meV_A']:.0f} meV/A"
        return text

    def _end_epoch(self, fraction: float) -> None:
        state = self.state
        row = {
            "epoch": state.epoch + 1,
            "step": state.step,
            "minutes": round((time.monotonic() - self._started) / 60.0, 3),
            "learning_rate": self.learning_rate(fraction),
            "train_loss": state.train_loss / max(1, state.position),
        }
        model = self.with_weights(self.average)
        row |= self.errors(model, self.valid if self.valid is not None else self.train)
        state.history.append(row)
        state.epoch, state.position, state.train_loss = state.epoch + 1, 0, 0.0
        if row["valid_loss"] < state.best_loss:
            state.best_loss, state.best_epoch = row["valid_loss"], state.epoch
            self.best = {k: v.clone() for k, v in self.average.items()}
        idle = state.epoch - state.best_epoch
        if self.options.schedule == "plateau" and idle and idle % self.options.plateau_patience == 0:
            state.lr_factor *= self.options.plateau_factor
        if self.budget.patience is not None and idle >= self.budget.patience:
            state.stopped = f"no improvement in {idle} epochs"
        elif fraction >= 1.0 and state.epoch < self.budget.epochs:
            state.stopped = f"{self.budget.max_minutes:g} minutes are over"

    def errors(self, model: Model, data: Loader) -> dict[str, float]:
        """Loss at its final weights and mean errors of a model on a data set."""
        total, n_batches = 0.0, 0
        sums = dict.fromkeys(("e1", "e2", "ne", "f1", "f2", "nf"), 0.0)
        for batch, out in predictions(model, data, self._pool):
            stress = -out["virial"] / batch.system.volume[:, None, None] if self.loss_config.stress else None
            size = int(batch.n_atoms.shape[0])
            total += size * float(loss(out["energy"], out["forces"], stress, batch, self.loss_config, 1.0))
            n_batches += size
            known = batch.energy_weight > 0
            de = ((out["energy"] - batch.energy) / batch.n_atoms)[known]
            df = (out["forces"] - batch.forces)[(batch.forces_weight > 0)[batch.system.system_index]]
            for key, error in (("e", de), ("f", df)):
                sums[key + "1"] += float(error.abs().sum())
                sums[key + "2"] += float(error.square().sum())
                sums["n" + key] += error.numel()
        ne, nf = max(sums["ne"], 1.0), max(sums["nf"], 1.0)
        return {
            "valid_loss": total / max(1, n_batches),
            "energy_mae_meV_atom": 1e3 * sums["e1"] / ne,
            "energy_rmse_meV_atom": 1e3 * math.sqrt(sums["e2"] / ne),
            "forces_mae_meV_A": 1e3 * sums["f1"] / nf,
            "forces_rmse_meV_A": 1e3 * math.sqrt(sums["f2"] / nf),
        }


def predictions(
    model: Model, data: Loader, pool: ThreadPoolExecutor | None = None
) -> Iterator[tuple[Batch, dict[str, Tensor]]]:
    """Each batch of a data set, in order, with what the model says."""
    deployed = deploy(model)

    def one(chosen: list[int]) -> tuple[Batch, dict[str, Tensor]]:
        batch = data.collate(chosen)
        return batch, dict(call(deployed, batch.system, batch.pairs, True, False))

    yield from (map if pool is None else pool.map)(one, data.plan())
