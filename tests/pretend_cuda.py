"""A CUDA device that is not there: tensors that say they are on it, held and computed on the CPU.

What a real device would refuse is refused (operands on two devices), what would wait for it is noted (copies to and
from the host, sizes that depend on values), and operators of mdplug are those that the dispatcher has for CUDA, their
kernels in Triton's interpreter.
"""

import traceback
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("cuda:0")
ROOT = Path(__file__).parents[1]
aten = torch.ops.aten
COPIES = {aten._to_copy.default, aten.copy_.default}
ASK = {  # their result, or its shape, is known to the host only when the device has finished
    aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.masked_select.default,
    aten._unique2.default, aten.bincount.default, aten.repeat_interleave.Tensor, aten.unique_consecutive.default,
}  # fmt: skip
EITHER = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}


class OnDevice(torch.Tensor):
    """A tensor that tells Python it is on DEVICE. To torch's C++ it is on the meta device, which needs no driver."""

    @staticmethod
    def __new__(cls, held):
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device="meta",
        )  # fmt: skip
        made.held = held
        return made

    @property
    def device(self):
        return DEVICE

    @property
    def is_cuda(self):
        return True

    def __getitem__(self, index):
        return super().__getitem__(torch.tensor(index, device=DEVICE) if isinstance(index, list) else index)

    def tolist(self):
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} on a tensor of the pretended device, outside of it")


def held(value):
    """The tensor on the CPU behind one on the device; anything else as it is."""
    return value.held if isinstance(value, OnDevice) else value


class PretendedCuda(TorchDispatchMode):
    """The device, while it is entered.

    Attributes:
        waits: what the host has waited for: "operator file:line".
        ran: names of mdplug's operators that ran on the device.
    """

    def __init__(self):
        super().__init__()
        self.waits, self.ran = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        here = [x for x in tensors if isinstance(x, OnDevice)]
        if func.namespace == "mdplug" and here:
            self.ran.append(func._schema.name.removeprefix("mdplug::"))
            with self:
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *args, **kwargs)
        if here and func.namespace == "aten":
            with self:  # what is made of other operators, inside one of mdplug's
                made = func.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
        if any(x.is_meta for x in tensors if not isinstance(x, OnDevice)):
            raise RuntimeError(f"{func}: this device cannot be pretended here")
        target = kwargs.get("device")
        on_device = bool(here) if target is None else torch.device(target).type in ("cuda", "meta")
        if on_device and target is not None:
            kwargs["device"] = "cpu"
        there = [x for x in tensors if not isinstance(x, OnDevice) and x.dim() > 0]
        if func in COPIES:
            from_device = isinstance(args[0 if func is aten._to_copy.default else 1], OnDevice)
            to_device = on_device if func is aten._to_copy.default else isinstance(args[0], OnDevice)
            on_device = to_device
            if from_device != to_device:
                self._waits(func)
        elif here and there and func not in EITHER:
            raise RuntimeError(f"{func}: operands on two devices")
        elif here and (func in ASK or (func in EITHER and (there or _by_mask(args[1])))):
            self._waits(func)
        arguments, options = tree_map(held, (args, kwargs))
        out = func(*arguments, **options)
        if func is aten._to_copy.default and on_device and out is held(args[0]):
            out = out.clone()
        if not on_device:
            return out
        return tree_map(lambda x: OnDevice(x) if isinstance(x, torch.Tensor) else x, out)

    def _waits(self, func):
        for frame in reversed(traceback.extract_stack()):
            path = Path(frame.filename)
            if path.is_relative_to(ROOT) and "site-packages" not in path.parts and path.parent.name != "tests":
                self.waits.append(f"{func._schema.name} {path.relative_to(ROOT)}:{frame.lineno}")
                return
        self.waits.append(f"{func._schema.name} elsewhere")


def _by_mask(indices):
    return any(isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8) for x in indices)


def _by_the_host(make):
    """`make` where it leaves torch's dispatcher out: on the host first."""

    def made(data, *args, device=None, **kwargs):
        out = make(data, *args, **kwargs)
        return out if device is None else out.to(device)

    return made


@contextmanager
def pretended_cuda(monkeypatch):
    """A process in which torch sees a CUDA device and Triton interprets."""
    from triton.runtime.interpreter import GridExecutor

    run = GridExecutor.__call__

    def interpreted(self, *args, **kwargs):
        device = PretendedCuda.current.pop()
        try:
            with torch.utils._python_dispatch._disable_current_modes():
                return run(self, *map(held, args), **kwargs)
        finally:
            PretendedCuda.current.append(device)

    PretendedCuda.current = []
    monkeypatch.setattr(GridExecutor, "__call__", interpreted)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    for name in ("tensor", "as_tensor"):
        monkeypatch.setattr(torch, name, _by_the_host(getattr(torch, name)))
    device = PretendedCuda()
    PretendedCuda.current.append(device)
    with device:
        yield device
