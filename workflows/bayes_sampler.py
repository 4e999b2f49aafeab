"""Sampling by stochastic gradients: preconditioned Langevin dynamics, and Hamiltonian dynamics with friction.

A chain first descends (by Adam, and over few weights then by Newton's method), then burns in, then samples. The
preconditioner G is constant between a few turns of the burn-in, the last of which is its end: div G, the term Gamma of
an adaptive preconditioner that is mostly left out, is then zero, and what is sampled is exp(-U / temperature) up to the
step. That is a fraction of the largest stable one, or less where the noise of batches would heat the chain.

Refs.: SGLD, M. Welling and Y. W. Teh, ICML 2011; its preconditioner, C. Li et al., AAAI 2016; SGHMC, T. Chen et al.,
ICML 2014; G from rows of H, Y. Dauphin et al., NeurIPS 2015; BAOAB, B. Leimkuhler and C. Matthews, J. Chem. Phys. 138,
174102 (2013); cycles, R. Zhang et al., ICLR 2020.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from mdplug.errors import InputError
from mdplug.workflows._common import Config
from mdplug.workflows.bayes_curvature import FEW, Local, minimum, root_of, stiffest, times, times_transposed

TURNS = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)  # of the burn-in, where G and the step are set anew
REMEMBERED = 0.5  # of the burn-in: before it chains may be hot; from there on what turns measure is taken together
CURVED_BATCHES = 4  # whose curvature a turn measures
NOISY_BATCHES = 16  # and whose gradients' scatter


class SamplerConfig(Config):
    """How a chain goes. Steps are evaluations of the gradient."""

    sampler: Literal["sghmc", "sgld"] = Field("sghmc", description="with momentum and friction, or without")
    preconditioner: Literal["curvature", "rmsprop", "none"] = Field(
        "curvature",
        description="G from the Hessian H (1/|H| for few weights, else 1/length of its rows), 1/sqrt(mean g^2), or 1",
    )
    step: float = Field(0.2, gt=0, lt=1, description="of the largest stable one")
    heat_max: float = Field(
        0.1, gt=0, description="noise of batches may add this fraction to the temperature; the step falls to that"
    )
    friction: float = Field(0.1, gt=0, description="sghmc: velocities keep exp(-friction) per step")
    temperature: float = Field(1.0, gt=0, description="1: the posterior; below: a cold one, exp(-U/temperature)")
    approach_steps: int = Field(1000, ge=0, description="of Adam, before the chain")
    learning_rate: float = Field(0.01, gt=0, description="of Adam, in typical sizes of weights; falls as a cosine")
    burn_in_steps: int = Field(1000, ge=0)
    samples: int = Field(100, ge=4, description="of each chain, for diagnostics")
    thinning: int = Field(10, ge=1, description="steps from sample to sample")
    cycles: int = Field(
        0, ge=0, description="0: constant step; else the step falls as a cosine so often, samples in second halves"
    )
    full_batch: bool = Field(False, description="exact gradients; else a batch's, times the number of batches")

    @model_validator(mode="after")
    def _even_cycles(self) -> SamplerConfig:
        if self.cycles and self.samples % self.cycles:
            raise ValueError(f"samples must be a multiple of cycles, got {self.samples} and {self.cycles}")
        return self

    @property
    def total_steps(self) -> int:
        """Of a chain, from the start to the last sample."""
        return self.approach_steps + self.burn_in_steps + self.samples * self.thinning * (2 if self.cycles else 1)


class Target(Protocol):
    """What is sampled: exp(-U), U = sum over data - log prior.

    Attributes:
        displacement: length of differences of gradients that its arithmetic resolves.
    """

    displacement: float

    def plan(self, seed: int | None) -> list[list[int]]:
        """Batches that hold every datum once, in an order that `seed` decides."""

    def likelihood(self, position: Tensor, chosen: Sequence[int]) -> tuple[float, Tensor]:
        """-log likelihood of some data at a position (P,) float64, and its gradient."""

    def prior(self, position: Tensor) -> tuple[float, Tensor]:
        """-log prior, and its gradient."""

    def prior_curvature(self) -> Tensor:
        """(P,) second derivative of -log prior, or a lower bound."""


def langevin(
    position: Tensor, gradient: Tensor, root: Tensor, step: float, temperature: float, noise: Tensor
) -> Tensor:
    """One step of preconditioned SGLD: x - e G g + sqrt(2 e T) R noise, with G = R R^T.

    Exact for G that does not depend on x, as e goes to zero; else e T div G is to be added. For a Gaussian of curvature
    H the variance is T / H / (1 - e G H / 2).

    Args:
        position, gradient of U, noise of unit variance: (P,). root: R, (P,) for a diagonal one, or (P, P).
    """
    drift = times(root, times_transposed(root, gradient))
    return position - step * drift + math.sqrt(2.0 * step * temperature) * times(root, noise)


def hamiltonian(
    position: Tensor,
    velocity: Tensor,
    gradient: Tensor,
    root: Tensor,
    step: float,
    friction: float,
    temperature: float,
    noise: Tensor,
) -> tuple[Tensor, Tensor]:
    """One step of SGHMC with masses 1/G, G = R R^T: kick, half a drift, friction and noise, half a
    drift (BAOAB, kicks merged).

    The positions of a Gaussian have the right variance at every stable step, h sqrt(G H) < 2.

    Args:
        as `langevin`; velocity (P,); friction: velocities keep exp(-friction).
    """
    keep = math.exp(-friction)
    velocity = velocity - step * times(root, times_transposed(root, gradient))
    position = position + 0.5 * step * velocity
    velocity = keep * velocity + math.sqrt((1.0 - keep * keep) * temperature) * times(root, noise)
    return position + 0.5 * step * velocity, velocity


@dataclass
class State:
    """All that changes in a chain: with the target and the options, it decides the rest.

    Attributes:
        step: taken so far. position, velocity, first: (P,) where it is, how fast, Adam's first moment.
        squares: (P,) mean of squared gradients since `since`. root: (P,) or (P, P) R, G = R R^T. stiffest: (P,)
            direction.
        places: (P,) each, of the turns that are taken together. measured: H (P, P) there, or the diagonal of H^2 (P,).
        curvature, scatter: of the last turn: largest eigenvalue of R^T H R; mean over weights of the variance of R^T
            times a batch's gradient.
        noise: state of the generator. seen: what `observe` gave at each sample. kept: positions of some samples.
    """

    position: Tensor
    velocity: Tensor
    first: Tensor
    squares: Tensor
    root: Tensor
    stiffest: Tensor
    noise: Tensor
    step: int = 0
    since: int = 0
    curvature: float = 0.0
    scatter: float = 0.0
    places: list[Tensor] = field(default_factory=list)
    measured: list[Tensor] = field(default_factory=list)
    seen: list[Tensor] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)


class Chain:
    """One chain.

    Args:
        target: what to sample. config: how. seed: of noise and batches.
        start: (P,) float64. observe: called at each sample; gives (Q,) numbers to remember.
        keep: indices of the samples whose positions are kept.
    """

    def __init__(
        self,
        target: Target,
        config: SamplerConfig,
        seed: int,
        start: Tensor,
        observe: Callable[[Tensor], Tensor],
        keep: Sequence[int] = (),
    ):
        self.target, self.config, self.seed, self.observe, self.keep = target, config, seed, observe, frozenset(keep)
        self.generator = torch.Generator().manual_seed(seed)
        zero = torch.zeros_like(start)
        self.state = State(
            start.clone(), zero, zero.clone(), zero.clone(), torch.ones_like(start),
            torch.randn(start.shape, generator=self.generator, dtype=start.dtype), self.generator.get_state(),
        )  # fmt: skip
        first = config.approach_steps
        self.turns = sorted({first + round(part * config.burn_in_steps) for part in TURNS})
        self._plan: tuple[int, list[list[int]]] = (-1, [])

    @property
    def _remembered(self) -> float:
        return self.config.approach_steps + REMEMBERED * self.config.burn_in_steps

    @property
    def done(self) -> bool:
        """Whether the last sample is taken."""
        return self.state.step >= self.config.total_steps

    def restore(self, record: dict[str, Any]) -> None:
        """Go on from `vars(state)` of a chain of the same kind."""
        state = State(**record)
        if state.position.shape != self.state.position.shape:
            raise ValueError(f"a chain over {len(state.position)} numbers, not {len(self.state.position)}")
        self.state = state
        self.generator.set_state(state.noise)

    def gradient(self, position: Tensor, batches: Sequence[Sequence[int]], factor: float) -> tuple[float, Tensor]:
        """Estimate of U and of its gradient: factor times the likelihood of the batches, and the prior."""
        value, gradient = self.target.prior(position)
        for chosen in batches:
            v, g = self.target.likelihood(position, chosen)
            value, gradient = value + factor * v, gradient + factor * g
        return value, gradient

    def _batch(self) -> tuple[list[list[int]], float]:
        """Batches of this step and their factor; over a pass, gradients add up to the full one times the factor."""
        if self.config.full_batch:
            if self._plan[0] < 0:
                self._plan = (0, self.target.plan(None))
            return self._plan[1], 1.0
        step = self.state.step
        while True:
            # Plans of different passes may differ in length: count through them, from the one in hand where possible.
            begin, plan = self._plan
            if begin >= 0 and begin <= step < begin + len(plan):
                return [plan[step - begin]], float(len(plan))
            begin = begin + len(plan) if 0 <= begin <= step else 0
            self._plan = (begin, self.target.plan(self.seed + 1000003 * begin))

    def advance(self) -> None:
        """One step.

        Raises:
            InputError: the chain has run away.
        """
        state, config = self.state, self.config
        if state.step in self.turns:
            self._turn()
        batches, factor = self._batch()
        value, gradient = self.gradient(state.position, batches, factor)
        if not math.isfinite(value) or not bool(torch.isfinite(gradient).all()):
            raise InputError(
                f"the posterior is not finite at step {state.step} of the chain with seed {self.seed}; lower "
                "learning_rate or step, or look for structures with huge labels (fmax_eV_A leaves them out)"
            )
        approaching = state.step < config.approach_steps
        fading = 0.001 if approaching else 0.0
        state.squares.lerp_(gradient.square(), max(fading, 1.0 / (state.step - state.since + 1)))
        if approaching:
            self._descend(gradient)
        else:
            self._move(gradient)
        state.step += 1
        state.noise = self.generator.get_state()
        if self._is_sample():
            if len(state.seen) in self.keep:
                state.kept.append(state.position.clone())
            state.seen.append(self.observe(state.position))

    def _descend(self, gradient: Tensor) -> None:
        state, config = self.state, self.config
        n = state.step + 1
        state.first.lerp_(gradient, max(0.1, 1.0 / n))
        rate = config.learning_rate * min(1.0, n / min(100.0, 0.1 * config.approach_steps + 1.0))
        rate *= 0.5 * (1.0 + math.cos(math.pi * state.step / config.approach_steps))
        state.position = state.position - rate * state.first / (state.squares.sqrt() + 1e-30)

    def _move(self, gradient: Tensor) -> None:
        state, config = self.state, self.config
        size = self.step_size() * self._cycle()[1]
        noise = torch.randn(gradient.shape, generator=self.generator, dtype=gradient.dtype)
        if config.sampler == "sgld":
            state.position = langevin(state.position, gradient, state.root, size, config.temperature, noise)
        else:
            state.position, state.velocity = hamiltonian(
                state.position, state.velocity, gradient, state.root, size, config.friction, config.temperature, noise
            )

    def step_size(self) -> float:
        """Step of the chain: `step` times the largest stable one, or less, so that `heat` keeps to `heat_max`."""
        config, curvature = self.config, max(self.state.curvature, 1e-300)
        size = 2.0 * config.step / (curvature if config.sampler == "sgld" else math.sqrt(curvature))
        settled = self.state.step > self._remembered or not config.burn_in_steps
        excess = self._heat(size) / (config.heat_max if settled else max(1.0, config.heat_max))
        return size if excess <= 1.0 else size / (excess if config.sampler == "sgld" else math.sqrt(excess))

    def heat(self) -> float:
        """What the noise of batches adds to the temperature, relative to it, if batches were drawn independently.

        They are not: within a pass their noise sums to zero, and a chain that moves little in a pass hardly feels it.
        """
        return self._heat(self.step_size())

    def _heat(self, size: float) -> float:
        config, scatter = self.config, self.state.scatter
        if config.sampler == "sgld":
            return size * scatter / (2.0 * config.temperature)
        return size**2 * scatter / (-math.expm1(-2.0 * config.friction) * config.temperature)

    def _cycle(self) -> tuple[float, float]:
        """How far the present cycle is, 0 to 1 (1 where there are none), and the factor on the step."""
        config = self.config
        place = self.state.step - config.approach_steps - config.burn_in_steps
        if not config.cycles or place < 0:
            return 1.0, 1.0
        length = 2 * config.thinning * (config.samples // config.cycles)
        part = (place % length) / length
        return part, 0.5 * (1.0 + math.cos(math.pi * part))

    def _is_sample(self) -> bool:
        """Whether the position after the step that was just counted is one."""
        config = self.config
        place = self.state.step - config.approach_steps - config.burn_in_steps
        if place <= 0 or place % config.thinning:
            return False
        length = 2 * config.thinning * (config.samples // config.cycles) if config.cycles else 1
        return not config.cycles or (place - 1) % length >= length // 2

    # --- turns -------------------------------------------------------------------------------------------------------

    def _turn(self) -> None:
        """Set the preconditioner, and measure what step is stable and how much the noise of batches heats."""
        state, config = self.state, self.config
        plan = self.target.plan(None if config.full_batch else self.seed + 7919 * (state.step + 1))
        chosen = plan if config.full_batch else _evenly(plan, CURVED_BATCHES)
        factor = len(plan) / len(chosen)

        def local(place: Tensor) -> Local:
            return Local.at(lambda x: self.gradient(x, chosen, factor), place, self.target.displacement)

        softest, measures = self.target.prior_curvature(), config.preconditioner == "curvature"
        if state.step == config.approach_steps and measures and len(state.position) <= FEW:
            state.position = minimum(local(state.position), config.temperature, float(softest.min()))
        if state.step <= self._remembered:
            state.places, state.measured = [], []
        state.places = [*state.places, state.position.clone()]
        # A generator of its own: a turn is the same whenever the chain is continued.
        generator = torch.Generator().manual_seed(self.seed + 104729 * (state.step + 1))
        here = local(state.position)
        if state.step == 0:
            state.squares = here.gradient.square()
        if measures:  # the prior's part of the curvature is known: nothing is softer than that
            state.measured.append(here.measured(generator))
            state.root = root_of(state.measured, here.gradient, config.temperature, softest)
        elif config.preconditioner == "rmsprop":
            size = state.squares.sqrt()
            state.root = (1e-5 * size.max() + size).rsqrt()
        root = state.root
        noise = torch.randn(state.velocity.shape, generator=generator, dtype=state.velocity.dtype)
        state.velocity = math.sqrt(config.temperature) * times(root, noise)  # in equilibrium with the new masses
        if root.dim() == 2:
            whole = torch.stack([root.t() @ one @ root for one in state.measured])
            state.curvature = float(torch.linalg.eigvalsh(whole).abs().max())
        else:
            places = [here, *(local(place) for place in reversed(state.places[:-1]))]
            state.curvature, state.stiffest = stiffest(places, root, state.stiffest)
        if not math.isfinite(state.curvature) or state.curvature == 0.0:
            raise InputError(
                f"the chain with seed {self.seed} finds no curvature at step {state.step}; lower learning_rate"
            )
        state.scatter = 0.0
        if not config.full_batch and len(plan) > 1:
            parts = [self.gradient(state.position, [one], float(len(plan)))[1] for one in _evenly(plan, NOISY_BATCHES)]
            state.scatter = float(torch.stack([times_transposed(root, g) for g in parts]).var(dim=0).mean())
        state.since = state.step


def _evenly(plan: list[list[int]], n: int) -> list[list[int]]:
    """At most n batches of a plan, from its whole length."""
    return [plan[k] for k in np.unique(np.linspace(0, len(plan) - 1, n, dtype=int))]
