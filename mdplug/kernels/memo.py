"""What was made of some tensors, remembered: reading a list from a device waits for all that the device has to do."""

from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class Memo:
    """What was made of some tensors, for as long as they live and do not change."""

    def __init__(self) -> None:
        self._known: dict[int, Any] = {}  # by how many tensors: dictionaries in dictionaries, as deep

    def get(self, tensors: tuple[Tensor, ...], key: Hashable, make: Callable[[], Any]) -> Any:
        """`make()`, called once for the same tensors and key."""
        level = self._known.setdefault(len(tensors), WeakTensorKeyDictionary())
        for tensor in tensors[:-1]:
            level = level.setdefault(tensor, WeakTensorKeyDictionary())
        versions = tuple(0 if tensor.is_inference() else tensor._version for tensor in tensors)
        entry = level.get(tensors[-1])
        if entry is None or entry[0] != versions:
            entry = (versions, {})
            level[tensors[-1]] = entry
        if key not in entry[1]:
            entry[1][key] = make()
        return entry[1][key]


memo = Memo()
