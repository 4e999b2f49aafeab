"""Irreducible representations as checkpoints name them."""

import re
from typing import Any


def irreps(value: Any) -> list[tuple[int, int, int]]:
    """(multiplicity, l, parity) of e3nn irreps as pickled: tuples of (mul, (l, p)), or text like "8x0e+8x1o"."""
    if isinstance(value, str):
        out = []
        for term in value.replace(" ", "").split("+"):
            match = re.fullmatch(r"(?:(\d+)x)?(\d+)([eo])", term)
            if match:
                out.append((int(match[1] or 1), int(match[2]), 1 if match[3] == "e" else -1))
        return out
    if isinstance(value, tuple):
        return [(mul, *ir) for mul, ir in value]
    return []
