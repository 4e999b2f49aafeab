"""What the machine allows: its rates of multiplying and copying, and the operations that a model needs at least."""

from __future__ import annotations

import time
from collections.abc import Callable

from mdplug.spec import Spec

# Of the Clebsch-Gordan product of channels (degrees l1 <= L of the sender with l_max = 3 harmonics), by L:
# paths; products R H over (path, m1); products with harmonics over (path, m1, m2); components that come out of it.
COUPLING = {0: (4, 4, 16, 16), 1: (10, 22, 88, 40), 2: (17, 57, 243, 71)}
PRODUCT = {0: 1.9e3, 1: 4.8e3, 2: 8.4e3}  # FLOP per channel of both layers' sparse polynomials, adjoint included
SPLINE = 16  # FLOP for value and slope of one function by a cubic B-spline
HIDDEN = 32  # rank of the radial functions of the first layer, whose net ends in a linear map


def mflop_per_atom(
    channels: int, l_hidden: int, neighbours: float, elements: int = 2, sender_by_element: bool = True
) -> float:
    """MFLOP per atom for energy and forces: two-layer MACE, l_max 3, correlation 3, best exact factorisation known.

    edge part, per neighbour: splines 16 (32 + P K); layer 1 forward K (2 O + R), backward K (4 O + 8 R); layer 0
    through the neighbour density B[z, b, lm] = sum_j phi_b(r) Y_lm: 3 x 2 x 16 x 32.
    node part: layer-0 GEMM of the density 2 x 2 x 16 x (elements x 32) K; linear map of layer 1's sums 4 C K^2; both
    layers' products (counted per channel); the other linear maps 4 ((L+1)^2 + 2) K^2.
    P, R, O, C are the paths, products and components of COUPLING; matrices count twice, for value and adjoint. Where it
    is less, or the sender's features are no function of its element alone, layer 0 is counted as a scalar layer 1.

    Args:
        channels: K. l_hidden: L, 0 to 2. neighbours: mean number within the cutoff. elements: present in the system.
        sender_by_element: False with embeddings of charge and spin.
    """
    k, square = channels, channels * channels

    def layer(degree: int) -> tuple[float, float]:
        p, r, o, c = COUPLING[degree]
        return SPLINE * p * k + k * (2 * o + r) + k * (4 * o + 8 * r), 4.0 * c * square

    edge, node = layer(l_hidden)
    node += PRODUCT[l_hidden] * k + 4.0 * ((l_hidden + 1) ** 2 + 2) * square
    edge_0, node_0 = layer(0)
    first = neighbours * edge_0 + node_0
    if sender_by_element:
        density = neighbours * (SPLINE * HIDDEN + 3 * 2 * 16 * HIDDEN) + 2.0 * 2 * 16 * elements * HIDDEN * k
        first = min(first, density)
    return 1e-6 * (neighbours * edge + node + first)


def limit_of(spec: Spec, neighbours: float, elements: int) -> float | None:
    """MFLOP per atom of a model, or None where nobody has counted (other architectures, layers, correlations)."""
    config = spec.config
    if (
        not spec.architecture.endswith(":MACE")
        or len(config["kinds"]) != 2
        or "NL" in config["kinds"]
        or config["l_max"] != 3
        or list(config["correlation"]) != [3, 3]
        or config["edge_channels"] != config["channels"]
        or config["edge_l"] != config["l_hidden"]
        or config["keep_last"]
    ):
        return None
    return mflop_per_atom(config["channels"], config["l_hidden"], neighbours, elements, not config["embedding"])


def rates(dtype: str, device: str) -> Callable[[], dict[str, float]]:
    """A function that measures, with torch's present threads, {"gflops", "copy_GB_s"}: best of a few.

    gflops: product of two 1024 x 1024 matrices of `dtype`. copy_GB_s: copy of 256 MB, read and written bytes counted.
    """
    import torch

    a = torch.rand(1024, 1024, dtype=getattr(torch, dtype), device=device)
    out = torch.empty_like(a)
    source = torch.ones(32_000_000, dtype=torch.float64, device=device)
    target = torch.empty_like(source)

    def best(what: Callable[[], object], times: int) -> float:
        seconds = []
        for _ in range(times):
            begin = time.perf_counter()
            what()
            if device != "cpu":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
        return min(seconds)

    def measure() -> dict[str, float]:
        return {
            "gflops": 2e-9 * 1024**3 / best(lambda: torch.mm(a, a, out=out), 6),
            "copy_GB_s": 2e-9 * source.numel() * source.element_size() / best(lambda: target.copy_(source), 3),
        }

    measure()  # first touch of the memory, start of the threads
    return measure
