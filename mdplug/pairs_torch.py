"""A linear-scaling pair list in plain torch: any device, and inside exported TorchScript files.

Ghost copies of the atoms within the cutoff of the box are made explicitly, so that cells smaller than the cutoff,
mixed and triclinic periodicity and unwrapped atoms are all the same case. Bins are found by binary search in a sorted
key list: no array grows with the empty space of an open system. Candidates are looked at for some atoms at a time.
"""

from typing import List, Tuple

import torch
from torch import Tensor


def _filled(cell: Tensor, pbc: Tensor) -> Tensor:
    """Rows of open directions replaced by unit vectors orthogonal to the periodic ones."""
    if bool(pbc.all()):
        return cell
    rows = cell * pbc.to(cell.dtype).unsqueeze(1)
    n_open = int((~pbc).sum())
    vh = torch.linalg.svd(rows)[2]
    free = vh[3 - n_open :]
    k = 0
    out = rows.clone()
    for d in range(3):
        if not bool(pbc[d]):
            out[d] = free[k]
            k += 1
    return out


def torch_pairs(
    positions: Tensor, cell: Tensor, pbc: Tensor, cutoff: float, at_once: int = 8192
) -> Tuple[Tensor, Tensor]:
    """Pairs of one structure.

    Args:
        positions: (N, 3) A. cell: (3, 3) A, rows. pbc: (3,) bool. cutoff: A.
        at_once: receivers whose candidates are held at a time, some 20 kB each in a liquid.

    Returns:
        (2, E) int64 receiver and sender, (E, 3) int64 shifts; sorted by (i, j, shift).
    """
    n = positions.shape[0]
    device = positions.device
    box = _filled(cell, pbc)
    inverse = torch.linalg.inv(box)
    height = 1.0 / torch.linalg.vector_norm(inverse, dim=0)
    fractional = positions @ inverse
    wraps = torch.floor(fractional) * pbc.to(fractional.dtype)
    wrapped = positions - wraps @ box
    # Coordinates along the face normals, A: a cutoff sphere spans exactly one cutoff in each.
    u = (fractional - wraps) * height

    # Ghosts: lattice translations that can bring an atom within the cutoff of the box.
    reach = torch.ceil(cutoff / height) * pbc.to(height.dtype)
    ranges = [torch.arange(-int(reach[d]), int(reach[d]) + 1, device=device) for d in range(3)]
    grid = torch.meshgrid(ranges, indexing="ij")
    shift = torch.stack([grid[0].reshape(-1), grid[1].reshape(-1), grid[2].reshape(-1)], dim=1)
    low, high = u.min(dim=0)[0] - cutoff, u.max(dim=0)[0] + cutoff
    ghost_u = u.unsqueeze(0) + shift.to(u.dtype).unsqueeze(1) * height
    inside = ((ghost_u >= low) & (ghost_u <= high)).all(dim=2)
    which = inside.nonzero()
    ghost_shift, ghost_atom = shift[which[:, 0]], which[:, 1]
    ghost_u = ghost_u[which[:, 0], which[:, 1]]

    bins = torch.floor((ghost_u - low) / cutoff).to(torch.int64) + 1
    size = bins.max(dim=0)[0] + 2
    key = (bins[:, 0] * size[1] + bins[:, 1]) * size[2] + bins[:, 2]
    key, order = torch.sort(key, stable=True)
    own = torch.floor((u - low) / cutoff).to(torch.int64) + 1
    around = torch.arange(-1, 2, device=device)
    steps = torch.meshgrid([around, around, around], indexing="ij")
    step = torch.stack([steps[0].reshape(-1), steps[1].reshape(-1), steps[2].reshape(-1)], dim=1)
    # From here on in the order of the bins.
    ghost_shift, ghost_atom = ghost_shift[order], ghost_atom[order]
    ghost_translation = ghost_shift.to(box.dtype) @ box
    span = 2 * reach.max().to(torch.int64) + 1
    place = (ghost_shift[:, 0] * span + ghost_shift[:, 1]) * span + ghost_shift[:, 2]
    images = span * span * span
    place, places = ghost_atom * images + place, n * images
    itself = torch.where((ghost_shift == 0).all(dim=1), ghost_atom, -1)
    receivers: List[Tensor] = []
    ghosts: List[Tensor] = []
    for begin in range(0, n, at_once):
        end = min(begin + at_once, n)
        near = own[begin:end].unsqueeze(1) + step.unsqueeze(0)
        wanted = ((near[:, :, 0] * size[1] + near[:, :, 1]) * size[2] + near[:, :, 2]).reshape(-1)
        first = torch.searchsorted(key, wanted)
        count = torch.searchsorted(key, wanted, right=True) - first
        start = torch.cumsum(count, 0) - count
        bin_of = torch.repeat_interleave(count)
        ghost = torch.arange(bin_of.shape[0], device=device) + (first - start)[bin_of]
        receiver = torch.div(bin_of, 27, rounding_mode="floor") + begin
        vector = wrapped[ghost_atom[ghost]] - wrapped[receiver] + ghost_translation[ghost]
        close = (vector * vector).sum(dim=1) < cutoff * cutoff
        keep = (close & (itself[ghost] != receiver)).nonzero().squeeze(1)
        receiver, ghost = receiver[keep], ghost[keep]
        order = torch.argsort(receiver * places + place[ghost])
        receivers.append(receiver[order])
        ghosts.append(ghost[order])
    receiver, ghost = torch.cat(receivers), torch.cat(ghosts)
    sender = ghost_atom[ghost]
    # The list of the wrapped atoms, said for the atoms where they are.
    shifts = ghost_shift[ghost] + (wraps[receiver] - wraps[sender]).to(torch.int64)
    return torch.stack([receiver, sender]), shifts
