"""Pairs inside the cutoff, sorted by receiver, by torch's own operators on the device; one count comes to the host."""

import torch
from torch import Tensor


def graph(
    pairs: Tensor, vectors: Tensor, place: Tensor, n_owned: int, cutoff: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Pairs of one evaluation, those of a receiver in the order given.

    Args:
        pairs: (2, E) int64 receiver and sender. vectors: (E, 3) A. place: (N,) int32 atom -> sorted place.

    Returns:
        vectors (P, 3), r (P,), receiver and sender (P,) int32 sorted places, first (n_owned + 1,) int32,
        origin (P,) int64: place of each pair in `pairs`.
    """
    r = (vectors * vectors).sum(dim=1).sqrt()
    kept = torch.nonzero(r < cutoff).squeeze(1)
    receiver, order = torch.sort(place[pairs[0, kept]], stable=True)
    origin = kept[order]
    places = torch.arange(n_owned + 1, dtype=torch.int32, device=place.device)
    first = torch.searchsorted(receiver, places, out_int32=True)
    return vectors[origin], r[origin], receiver, place[pairs[1, origin]], first, origin


def pairs_of(first: Tensor, begin: int, end: int, r: Tensor) -> int:
    """How many pairs the receivers begin..end have; asked of the device only where these are not all of them."""
    if begin == 0 and end == first.shape[0] - 1:
        return r.shape[0]
    return int(first[end] - first[begin])


def by_sender(
    sender: Tensor, first: Tensor, begin: int, end: int, pairs: int, n_senders: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The pairs of receivers begin..end in the order of their senders.

    Returns:
        order (pairs,) int64: the pairs; first (n_senders + 1,) int32: the first of each sender in `order`;
        receiver (pairs,) int32, from 0, of each pair in the order of receivers.
    """
    e0 = 0 if begin == 0 else int(first[begin])
    ordered, order = torch.sort(sender[e0 : e0 + pairs], stable=True)
    senders = torch.arange(n_senders + 1, dtype=sender.dtype, device=sender.device)
    sent_first = torch.searchsorted(ordered, senders, out_int32=True)
    at = torch.arange(e0, e0 + pairs, dtype=first.dtype, device=first.device)
    receiver = torch.searchsorted(first[begin : end + 1], at, right=True, out_int32=True) - 1
    return order + e0, sent_first, receiver
