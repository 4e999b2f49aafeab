"""Lennard-Jones fluids at constant pressure by Monte Carlo in plain numpy, hundreds side by side, in reduced units.

V = twelve sum r^-12 - six sum r^-6 over nearest images, without a cutoff: linear in (twelve, six), so the mean of
several such potentials is one of them, and a change of the box scales the two sums.
"""

from dataclasses import dataclass

import numpy as np


@dataclass
class Fluids:
    """Frames of R fluids.

    Attributes:
        sum12, sum6: (F, R) of r^-12 and r^-6 over pairs. volume: (F, R).
        g: (F, R, B) radial distribution function in the bins asked for.
    """

    sum12: np.ndarray
    sum6: np.ndarray
    volume: np.ndarray
    g: np.ndarray


def lattice(atoms: int, replicas: int) -> np.ndarray:
    """(3, R, N) a simple cubic start in units of the box."""
    side = int(np.ceil(atoms ** (1 / 3) - 1e-9))
    grid = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"), axis=-1).reshape(-1, 3)[:atoms]
    return np.repeat(((grid + 0.5) / side).T[:, None, :], replicas, axis=1)


def sums(places: np.ndarray, at: np.ndarray, i: int) -> tuple[np.ndarray, np.ndarray]:
    """(R,) sums of r^-12 and r^-6 over the partners of atom i, were it `at` (3, R); lengths in units of the box."""
    d = places - at[:, :, None]
    d -= np.rint(d)
    d *= d
    square = d.sum(axis=0)
    square[:, i] = np.inf
    inverse = 1.0 / square
    sixth = inverse * inverse * inverse
    return np.einsum("rn,rn->r", sixth, sixth), sixth.sum(axis=1)


def radial(places: np.ndarray, box: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """(R, B) radial distribution function of equal bins."""
    atoms, replicas, bins = places.shape[2], len(box), len(edges) - 1
    i, j = np.triu_indices(atoms, 1)
    d = places[:, :, i] - places[:, :, j]
    d -= np.rint(d)
    distance = np.sqrt((d * d).sum(axis=0)) * box[:, None]
    which = np.floor((distance - edges[0]) / (edges[1] - edges[0])).astype(int)
    which = np.where((which < 0) | (which >= bins), bins, which) + np.arange(replicas)[:, None] * (bins + 1)
    counts = np.bincount(which.ravel(), minlength=replicas * (bins + 1)).reshape(replicas, bins + 1)[:, :bins]
    shells = 4 / 3 * np.pi * np.diff(edges**3)
    return counts * box[:, None] ** 3 / (len(i) * shells)


def simulate(
    twelve: np.ndarray, six: np.ndarray, *, atoms: int, kT: float, pressure: float, sweeps: int, every: int,
    settle: int, edges: np.ndarray, seed: int, density: float = 0.7,
) -> Fluids:  # fmt: skip
    """Run R fluids, each with its (twelve, six), from `density`; a frame `every` sweeps after `settle` of them.

    Steps are tuned while it settles, and stay as they are afterwards.
    """
    random = np.random.default_rng(seed)
    replicas = len(twelve)
    places = lattice(atoms, replicas)
    box = np.full(replicas, (atoms / density) ** (1 / 3))
    s12, s6 = np.zeros(replicas), np.zeros(replicas)
    for i in range(atoms):
        a, b = sums(places, places[:, :, i].copy(), i)
        s12, s6 = s12 + a / 2, s6 + b / 2
    step, stretch = 0.06, 0.03
    accepted = np.zeros(2)
    frames = []
    for sweep in range(-settle, sweeps):
        a, b = twelve / box**12, six / box**6
        moves = random.uniform(-step, step, size=(atoms, 3, replicas))
        coins = np.log(random.random((atoms, replicas)))
        for i in range(atoms):
            old = places[:, :, i].copy()
            new = old + moves[i]
            (o12, o6), (n12, n6) = sums(places, old, i), sums(places, new, i)
            taken = coins[i] < -(a * (n12 - o12) - b * (n6 - o6)) / kT
            places[:, :, i] = np.where(taken, new, old)
            s12 += np.where(taken, n12 - o12, 0.0)
            s6 += np.where(taken, n6 - o6, 0.0)
            accepted[0] += taken.mean() / atoms
        for _ in range(3):
            other = box * np.exp(random.uniform(-stretch, stretch, replicas))
            change = twelve * s12 * (other**-12.0 - box**-12.0) - six * s6 * (other**-6.0 - box**-6.0)
            change += pressure * (other**3 - box**3)
            taken = np.log(random.random(replicas)) < -change / kT + 3 * (atoms + 1) * np.log(other / box)
            box = np.where(taken, other, box)
            accepted[1] += taken.mean() / 3
        if -settle < sweep < 0 and (sweep + settle) % 20 == 0:
            step *= 1.1 if accepted[0] / 20 > 0.4 else 0.9
            stretch *= 1.1 if accepted[1] / 20 > 0.4 else 0.9
            accepted[:] = 0
        if sweep >= 0 and sweep % every == 0:
            frames.append((s12 / box**12, s6 / box**6, box**3, radial(places, box, edges)))
    return Fluids(*(np.array(part) for part in zip(*frames, strict=True)))
