"""What the uncertainties of an ensemble are worth: compared with errors on labelled data, corrected, and written back.

`run` fits maps from the members' disagreement to the size of the error, tests them on trajectories that they have not
seen, and writes calibrated.safetensors, whose every later uncertainty is calibrated, with calibration.json,
reliability-forces.png and summary.yaml.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

import mdplug
from mdplug.calibration import Calibration
from mdplug.errors import InputError
from mdplug.potential import Potential
from mdplug.uncertainty import has_members
from mdplug.uncertainty_statistics import ErrorLaw
from mdplug.workflows._common import ModelConfig, Progress, RunFolder, silent, torch_threads, write_atomic
from mdplug.workflows.calibration_conformal import fit_conformal
from mdplug.workflows.calibration_data import Measured, measure
from mdplug.workflows.calibration_fits import fit_environment, fit_isotonic, fit_scale
from mdplug.workflows.calibration_metrics import assess, auroc, coverage, miscalibration_area, nll, spearman
from mdplug.workflows.calibration_plots import plot
from mdplug.workflows.dataset import Labelled, read
from mdplug.workflows.evaluate import check_known

FORCES, ENERGY = "forces_eV_A", "energy_eV_atom"
MAPS = ("scale", "isotonic", "environment")
LEVELS = (0.5, 0.68, 0.9, 0.95)
FEWEST_GROUPS = 6


class Config(ModelConfig):
    """Options of `mdplug calibrate`."""

    data: tuple[Path, ...] = Field(description="labelled extended XYZ that the model was not trained on")
    splits: tuple[str, ...] = Field(
        (), description="calibrate on these values of info['split']; default: all but novel"
    )
    novel: tuple[str, ...] = Field(
        (), description="split or config_type of structures it should find strange: tested, not fitted; may be repeated"
    )
    exclude_kinds: tuple[str, ...] = Field(
        ("isolated_atom", "IsolatedAtom"), description="config_type of structures to leave out"
    )
    output: Path = Field(Path("calibrate"), description="folder of the results")
    map: Literal["scale", "isotonic", "environment"] | None = Field(
        None, description="form of the correction of force sigma; default: what does best on held-out trajectories"
    )
    probes: int = Field(8, ge=1, description="random mixtures of members behind a force sigma, here and in dynamics")
    repeats: int = Field(20, ge=1, description="random splits of the trajectories into fit, interval and test")
    seed: int = Field(0, ge=0, description="of splits and probes")


@dataclass
class Result:
    """What was found; prints as lines.

    Attributes:
        model: the calibrated file. map: form of the correction of forces. trajectories, structures, atoms: behind it.
        forces, energy: metrics of calibrated sigma on held-out trajectories, by name: mean over the repeats, and their
            standard deviation. raw: the same of the raw force sigma.
        maps: negative log likelihood of each form on held-out trajectories.
        novel: {split or config_type: {signal: AUROC}} of telling such a structure from a known one.
    """

    model: Path
    map: str
    trajectories: int
    structures: int
    atoms: int
    forces: dict[str, tuple[float, float]]
    energy: dict[str, tuple[float, float]]
    raw: dict[str, float]
    maps: dict[str, float]
    novel: dict[str, dict[str, float]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [
            f"{self.model}: {self.map} map of force sigma, from {self.trajectories} trajectories, {self.structures} "
            f"structures, {self.atoms} atoms"
        ]
        for name, found in (("forces", self.forces), ("energy per atom", self.energy)):
            if not found:
                continue
            text = ", ".join(
                f"{key.replace('_', ' ')} {mean:.3g} +- {sd:.2g}"
                for key, (mean, sd) in found.items()
                if not np.isnan(mean)
            )
            lines.append(f"{name}, held out: {text}")
        lines.append("raw force sigma: " + ", ".join(f"{k.replace('_', ' ')} {v:.3g}" for k, v in self.raw.items()))
        lines.append("maps, -ln likelihood: " + ", ".join(f"{k} {v:.3f}" for k, v in self.maps.items()))
        for split, signals in self.novel.items():
            lines.append(f"{split} told from known, AUROC: " + ", ".join(f"{k} {v:.3f}" for k, v in signals.items()))
        return "\n".join(lines)


def run(config: Config, *, progress: Progress = silent) -> Result:
    """Calibrate.

    Raises:
        InputError: a model without members, too few trajectories, data without forces.
    """
    known, novel = _chosen(config)
    inputs = [*config.data, *([Path(config.model)] if Path(config.model).is_file() else [])]
    with (
        RunFolder(config.output, "calibrate", config, inputs=inputs, may_change=("threads",)) as folder,
        torch_threads(config.threads),
    ):
        model = config.load_model()
        if not isinstance(model, Potential) or not has_members(model):
            raise InputError(f"{config.model} has no members to calibrate; make an ensemble with `mdplug ensemble`")
        check_known([*known, *novel], model.spec)
        data = measure(model, known, config.probes, config.seed, progress)
        found, calibrations = _calibrate(config, data)
        result = Result(
            folder / "calibrated.safetensors", calibrations[FORCES].kind, len(np.unique(data.group)), len(known),
            len(data.errors), **found,
        )  # fmt: skip
        if novel:
            result.novel = _novelty(config, model, novel, data, calibrations[FORCES], progress)
        exact: Any = mdplug.load(config.model, dtype=config.dtype, radial="exact")
        plain = exact.without_kernels()
        record: dict[str, Any] = {key: one.to_dict() for key, one in calibrations.items()}
        record |= {"probes": config.probes, "data_sha256": sorted(folder.hashes.values())}
        record |= data.limits(calibrations[FORCES])
        plain.spec = replace(plain.spec, calibration=record)
        mdplug.save(plain, result.model)
        write_atomic(folder / "calibration.json", json.dumps({**record, **_plain(result)}, indent=1))
        law = ErrorLaw.of_members(data.members, 3)
        sigma = calibrations[FORCES](**data.columns)
        parts = {
            "members": (data.errors, data.sigma, law),
            "calibrated": (data.errors, sigma, calibrations[FORCES].law),
        }
        plot(folder / "reliability-forces.png", parts, "eV/A")
        folder.summary(**_plain(result))
    return result


def _plain(result: Result) -> dict[str, Any]:
    def finite(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: finite(one) for key, one in value.items()}
        if isinstance(value, tuple):
            return [finite(one) for one in value]
        return None if isinstance(value, float) and not np.isfinite(value) else value

    return {key: finite(value) for key, value in vars(result).items() if key != "model"}


def _novel_of(structure: Labelled, config: Config) -> str:
    """Which of `novel` it is; "": none."""
    return next((name for name in (structure.kind, structure.split) if name in config.novel), "")


def _chosen(config: Config) -> tuple[list[Labelled], list[Labelled]]:
    data = read(config.data)
    wanted = [s for s in data.structures if s.kind not in config.exclude_kinds and s.n_atoms > 1]
    novel = [s for s in wanted if _novel_of(s, config)]
    known = [s for s in wanted if not _novel_of(s, config) and (not config.splits or s.split in config.splits)]
    if not known or any(s.forces is None for s in known):
        found = sorted({s.split for s in data.structures})
        raise InputError(f"calibration needs structures with forces; splits in the data: {', '.join(found)}")
    groups = len({s.group for s in known})
    if groups < FEWEST_GROUPS:
        raise InputError(
            f"{groups} independent trajectories (info['group']) are too few to calibrate and test on; give "
            f"{FEWEST_GROUPS} or more"
        )
    for name in config.novel:
        if not any(_novel_of(s, config) == name for s in novel):
            raise InputError(f"no structure of split or config_type {name!r} is in the data; check novel")
    return known, novel


def _fit(kind: str, data: Measured, chosen: np.ndarray) -> Calibration:
    """A map of the force sigma from atoms `chosen` (n,) bool."""
    common: Any = {"components": 3, "quantity": FORCES, "group": data.group[chosen]}
    errors, sigma = data.errors[chosen], data.sigma[chosen]
    if kind == "scale":
        return fit_scale(errors, sigma, **common)
    if kind == "isotonic":
        return fit_isotonic(errors, sigma, **common)
    extra = {key: value[chosen] for key, value in data.extra.items()}
    return fit_environment(errors, sigma, element=data.number[chosen], extra=extra, **common)


def _fit_energy(data: Measured, chosen: np.ndarray) -> Calibration:
    return fit_isotonic(
        data.energy_errors[chosen], data.energy_sigma[chosen], components=1, quantity=ENERGY,
        group=data.energy_group[chosen],
    )  # fmt: skip


def _with_intervals(made: Calibration, scores: np.ndarray, units: np.ndarray) -> Calibration:
    found = [*fit_conformal(scores, units, LEVELS), *fit_conformal(scores, units, LEVELS, target="unit")]
    return replace(made, conformal=tuple(found))


def _calibrate(config: Config, data: Measured) -> tuple[dict[str, Any], dict[str, Calibration]]:
    """Metrics on held-out trajectories over random splits, and the maps of all the data."""
    groups = np.unique(data.group)
    rng = np.random.default_rng(config.seed)
    kinds = MAPS if config.map is None else (config.map,)
    has_energy = len(data.energy_errors) >= 60
    likelihood: dict[str, list[float]] = {kind: [] for kind in kinds}
    rows: dict[str, list[dict[str, float]]] = {kind: [] for kind in kinds}
    energy_rows: list[dict[str, float]] = []
    for _ in range(config.repeats):
        part = dict(zip(groups, rng.permutation(len(groups)) % 3, strict=True))  # fit, interval, test
        third = np.array([part[g] for g in data.group])
        for kind in kinds:
            made = _fit(kind, data, third == 0)
            sigma = made(**data.columns)
            made = _with_intervals(made, (data.errors / sigma)[third == 1], data.group[third == 1])
            test = third == 2
            likelihood[kind].append(nll(data.errors[test], sigma[test], made.law))
            rows[kind].append(_row(data.errors[test], sigma[test], made))
        if has_energy:
            third = np.array([part[g] for g in data.energy_group])
            made = _fit_energy(data, third == 0)
            sigma = made(sigma=data.energy_sigma)
            made = _with_intervals(made, (data.energy_errors / sigma)[third == 1], data.energy_group[third == 1])
            energy_rows.append(_row(data.energy_errors[third == 2], sigma[third == 2], made))
    best = min(kinds, key=lambda kind: float(np.mean(likelihood[kind])))
    raw = assess(data.errors, data.sigma, ErrorLaw.of_members(data.members, 3), group=data.group, resamples=0)
    found = {
        "forces": _mean(rows[best]),
        "energy": _mean(energy_rows),
        "raw": {k: raw[k].value for k in ("miscalibration_area", "coverage_90", "spearman", "spearman_of_ceiling")},
        "maps": {kind: float(np.mean(values)) for kind, values in likelihood.items()},
    }
    # The map of half of the trajectories, intervals from the other half: scores must be of data that no map has seen.
    half = np.isin(data.group, groups[rng.permutation(len(groups)) < len(groups) // 2])
    final = _fit(best, data, half)
    calibrations = {FORCES: _with_intervals(final, (data.errors / final(**data.columns))[~half], data.group[~half])}
    if has_energy:
        half = np.isin(data.energy_group, data.group[half])
        final = _fit_energy(data, half)
        scores = (data.energy_errors / final(sigma=data.energy_sigma))[~half]
        calibrations[ENERGY] = _with_intervals(final, scores, data.energy_group[~half])
    return found, calibrations


def _row(errors: np.ndarray, sigma: np.ndarray, made: Calibration) -> dict[str, float]:
    from mdplug.workflows.calibration_metrics import spearman_ceiling

    factor = made.factor(0.9)[0]
    covered, half_width = coverage(errors, sigma, factor)
    ceiling = spearman_ceiling(sigma, made.law, repeats=3)[0]
    rank = spearman(errors, sigma)
    return {
        "coverage_of_90": covered,
        "half_width_of_90": half_width,
        "miscalibration_area": miscalibration_area(errors, sigma, made.law),
        "spearman": rank,
        "spearman_of_ceiling": rank / ceiling,
    }


def _mean(rows: Sequence[dict[str, float]]) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation by name; infinite where one is (an interval from too few trajectories)."""
    found: dict[str, tuple[float, float]] = {}
    for key in rows[0] if rows else ():
        values = np.array([row[key] for row in rows])
        found[key] = (float(values.mean()), float(values.std()) if np.isfinite(values).all() else float("inf"))
    return found


def _novelty(
    config: Config, model: Potential, novel: Sequence[Labelled], data: Measured, made: Calibration, progress: Progress
) -> dict[str, dict[str, float]]:
    """AUROC of the largest sigma (raw, calibrated) and feature distance of a structure, for each novel split."""
    found: dict[str, dict[str, float]] = {}
    known = data.largest(made)
    for name in config.novel:
        strange = [s for s in novel if _novel_of(s, config) == name]
        there = measure(model, strange, config.probes, config.seed, progress)
        other = there.largest(made)
        truth = np.r_[np.zeros(len(known["sigma"]), dtype=bool), np.ones(len(other["sigma"]), dtype=bool)]
        found[name] = {key: auroc(np.r_[known[key], other[key]], truth) for key in known}
    return found
