"""An inert stack machine for pickles: data come out, nothing in them is run or imported.

A pickle is a program for a small stack machine. This one is ours: it knows how to build numbers, strings, containers
and tensors, and turns every other class into an `Inert` record of its name, arguments and state. No name in the pickle
is ever looked up, so neither mace-torch nor e3nn has to be installed and a hostile file has nothing to call.
"""

import collections
import io
import math
import pickletools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from mdplug.errors import ModelFileError

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
# Names from these places may appear in a checkpoint of MACE; they stay inert all the same.
_PACKAGES: tuple[str, ...] = (
    "mace",
    "e3nn",
    "cuequivariance",
    "cuequivariance_torch",
    "openequivariance",
    "les",
    "graph_longrange",
)
_PACKAGES += ("opt_einsum", "opt_einsum_fx", "sympy", "fractions")
# The functions of torch that torch.save writes calls of; they stay inert too, where `_Machine.builders` has no reader.
_TORCH_CALLS = {"torch.device", "torch.fx.graph_module.reduce_graph_module", "torch.fx._symbolic_trace.Tracer"}
_PYTHON_NAMES = {"builtins.set", "builtins.frozenset", "builtins.getattr", "builtins.slice", "builtins.complex"}
_PYTHON_NAMES |= {"builtins.int", "builtins.float", "builtins.bool", "builtins.str", "builtins.list", "builtins.dict"}
_PYTHON_NAMES |= {"builtins.object", "builtins.tuple", "builtins.bytearray", "builtins.type"}
_PYTHON_NAMES |= {"collections.OrderedDict", "collections.defaultdict", "_codecs.encode", "copyreg._reconstructor"}
_NUMPY_NAMES = {"dtype", "ndarray", "core.multiarray.scalar", "core.multiarray._reconstruct", "float64", "float32"}
_NUMPY_NAMES |= {
    "_core.multiarray.scalar",
    "_core.multiarray._reconstruct",
    "int64",
    "int32",
    "_core.numeric._frombuffer",
}
_SCALAR_TYPES = {"f8", "f4", "i8", "i4", "b1"}


@dataclass(frozen=True)
class Named:
    """A name in the file that was not looked up, e.g. `torch.nn.functional.silu`."""

    name: str


@dataclass(eq=False)
class Inert:
    """An object of a class that was not looked up: its class's dotted name, its constructor's arguments, its state."""

    class_name: str
    args: tuple = ()
    state: Any = None
    entries: list = field(default_factory=list)

    @property
    def short_name(self) -> str:
        """The class's name without its module."""
        return self.class_name.rsplit(".", 1)[-1]

    @property
    def attributes(self) -> dict:
        """The instance's attributes (empty where the state is not a dictionary)."""
        return self.state if isinstance(self.state, dict) else {}

    def children(self, key: str) -> dict:
        """`_parameters`, `_buffers` or `_modules` of a torch module."""
        found = self.attributes.get(key)
        return found if isinstance(found, dict) else {}

    def module(self, path: str) -> "Inert | None":
        """The submodule at a dotted path, None where there is none."""
        here: Any = self
        for part in path.split("."):
            here = here.children("_modules").get(part) if isinstance(here, Inert) else None
        return here if isinstance(here, Inert) else None


@dataclass(frozen=True)
class _Storage:
    values: torch.Tensor  # flat


class _Mark:
    """The marker on the stack below a run of items."""


class Machine:
    """The stack machine: one instance reads one pickle.

    Args:
        name: of the file, for messages. storage: bytes of the record of a tensor storage.
    """

    def __init__(self, name: str, storage: Callable[[str], bytes]) -> None:
        self.name = name
        self.read_storage = storage
        self.storages: dict[str, _Storage] = {}
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.builders: dict[str, Callable[..., Any]] = {
            "collections.OrderedDict": lambda *items: collections.OrderedDict(*items),
            "collections.defaultdict": lambda *_: {},
            "builtins.set": lambda *items: set(*items),
            "builtins.frozenset": lambda *items: frozenset(*items),
            "_codecs.encode": _encode,
            "torch.Size": lambda *items: tuple(*items),
            "torch._utils._rebuild_tensor": self._tensor,
            "torch._utils._rebuild_tensor_v2": self._tensor,
            "torch._utils._rebuild_parameter": lambda data, *_: data,
            "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
            "builtins.getattr": self._attribute,
            "numpy.core.multiarray.scalar": _numpy_scalar,
            "numpy._core.multiarray.scalar": _numpy_scalar,
            "e3nn.o3._irreps.Irreps": lambda *items: tuple(*items),
            "e3nn.o3._irreps._MulIr": lambda *items: tuple(*items),
            "e3nn.o3._irreps.Irrep": lambda *items: tuple(*items),
        }

    def run(self, data: bytes) -> Any:
        """The object that the pickle describes."""
        for opcode, argument, _ in pickletools.genops(io.BytesIO(data)):
            if opcode.name == "STOP":
                return self.stack.pop()
            self._step(opcode.name, argument)
        raise ModelFileError(f"{self.name}: its pickle ends early; download or copy the file again")

    def _step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[int(argument)] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[int(argument)])
        elif name == "POP":
            stack.pop()
        elif name == "POP_MARK":
            self._items()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name.startswith("TUPLE") and name != "TUPLE":
            count = int(name[-1])
            stack[-count:] = [tuple(stack[-count:])]
        elif name in _COLLECTORS:
            stack.append(_COLLECTORS[name](self._items()))
        elif name in ("APPEND", "APPENDS", "ADDITEMS"):
            items = [stack.pop()] if name == "APPEND" else self._items()
            _extend(stack[-1], items)
        elif name in ("SETITEM", "SETITEMS"):
            items = [stack.pop(-2), stack.pop()] if name == "SETITEM" else self._items()
            _update(stack[-1], items)
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            parts = argument.split(" ", 1) if name == "GLOBAL" else [stack.pop(-2), stack.pop()]
            stack.append(self._name(*parts))
        elif name in ("REDUCE", "NEWOBJ"):
            args, target = stack.pop(), stack.pop()
            stack.append(self._make(target, args))
        elif name == "NEWOBJ_EX":
            _, args, target = stack.pop(), stack.pop(), stack.pop()
            stack.append(self._make(target, args))
        elif name in ("INST", "OBJ"):
            items = self._items()
            target = self._name(*argument.split(" ", 1)) if name == "INST" else items.pop(0)
            stack.append(self._make(target, tuple(items)))
        elif name == "BUILD":
            state = stack.pop()
            if isinstance(stack[-1], Inert):
                stack[-1].state = state
        elif name == "BINPERSID":
            stack.append(self._persistent(stack.pop()))
        elif name not in ("PROTO", "FRAME"):
            raise ModelFileError(f"{self.name}: its pickle uses {name}, which torch.save never writes; save it again")

    def _items(self) -> list:
        stack = self.stack
        start = len(stack) - 1
        while not isinstance(stack[start], _Mark):
            start -= 1
            if start < 0:
                raise IndexError("a mark is missing in the pickle")
        items = stack[start + 1 :]
        del stack[start:]
        return items

    def _name(self, module: str, name: str) -> Named:
        full = f"{module}.{name}".replace("__builtin__.", "builtins.", 1)
        if not _expected(full):
            raise self._foreign(f"names {full}")
        return Named(full)

    def _make(self, target: Any, args: Any) -> Any:
        if not isinstance(target, Named) or not isinstance(args, tuple):
            raise ValueError("the pickle calls something that is not a named class")
        builder = self.builders.get(target.name)
        if builder is not None:
            return builder(*args)
        if not _expected_call(target.name):
            raise self._foreign(f"calls {target.name}")
        return Inert(target.name, args)

    def _foreign(self, what: str) -> ModelFileError:
        return ModelFileError(
            f"{self.name}: {what}, which no MACE checkpoint does; nothing of the file was run; "
            "do not open it with torch.load, get the checkpoint from its authors"
        )

    def _attribute(self, owner: Any, name: Any) -> Named:
        # How torch.tanh and torch.abs are pickled: as an attribute of the class of torch's functions.
        if owner != Named("torch._C._VariableFunctionsClass") or name not in ("abs", "tanh", "sigmoid"):
            raise self._foreign(f"asks for attribute {name!r} of {getattr(owner, 'name', 'an object')}")
        return Named(f"torch.{name}")

    def _persistent(self, key: Any) -> _Storage:
        kind, storage_type, record, _, count = key
        if kind != "storage" or not isinstance(storage_type, Named) or not isinstance(record, str):
            raise ValueError("a tensor without a storage")
        if record not in self.storages:
            short = storage_type.name.rsplit(".", 1)[-1]
            dtype = torch.uint8 if short == "UntypedStorage" else _STORAGES.get(short)
            if dtype is None:
                raise ModelFileError(
                    f"{self.name}: holds tensors of kind {short}, which cannot be read; save as float64"
                )
            data = self.read_storage(record)
            if not isinstance(count, int) or count < 0 or count * dtype.itemsize != len(data):
                raise ModelFileError(
                    f"{self.name}: record data/{record} has {len(data)} bytes, not {count} numbers of {dtype}; "
                    "download or copy the file again"
                )
            values = torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
            self.storages[record] = _Storage(values)
        return self.storages[record]

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> torch.Tensor:
        if not isinstance(storage, _Storage):
            raise ValueError("a tensor without a storage")
        whole = [offset, *size, *stride]
        if len(size) != len(stride) or any(type(n) is not int or n < 0 for n in whole):
            raise ValueError(f"a tensor of size {size} and stride {stride}")
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        have = storage.values.numel()
        count = math.prod(size)
        if count and (last >= have or count > have):
            raise ModelFileError(
                f"{self.name}: a tensor of shape {tuple(size)} does not fit its storage of {have} numbers; "
                "download or copy the file again"
            )
        if not count:
            return storage.values.new_empty(size)
        return storage.values.as_strided(size, stride, offset).clone()


def _expected(full: str) -> bool:
    root, _, rest = full.partition(".")
    return root == "torch" or root in _PACKAGES or full in _PYTHON_NAMES or (root == "numpy" and rest in _NUMPY_NAMES)


def _expected_call(full: str) -> bool:
    """Classes may be instantiated (inertly); a function of torch, such as torch.hub.load, has no business in a file."""
    short = full.rsplit(".", 1)[-1].lstrip("_")
    return not full.startswith("torch.") or full in _TORCH_CALLS or short[:1].isupper()


def _encode(text: Any, encoding: Any = "utf-8") -> bytes:
    if encoding not in ("latin1", "utf-8"):
        raise ValueError(f"text in encoding {encoding!r}")
    return str(text).encode(encoding)


def _numpy_scalar(dtype: Any, data: Any = b"") -> Any:
    kind = dtype.args[0] if isinstance(dtype, Inert) and dtype.args else None
    if kind not in _SCALAR_TYPES or not isinstance(data, bytes):
        raise ValueError(f"a numpy scalar of type {kind!r}")
    return np.frombuffer(data, dtype=np.dtype(f"<{kind}"), count=1)[0].item()


def _extend(target: Any, items: list) -> None:
    if isinstance(target, Inert):
        target.entries.extend(items)
    elif isinstance(target, set):
        target.update(items)
    elif isinstance(target, list):
        target.extend(items)
    else:
        raise TypeError("the pickle appends to something that is no list")


def _update(target: Any, items: list) -> None:
    pairs: Iterator = zip(items[::2], items[1::2], strict=True)
    if isinstance(target, Inert):
        target.entries.extend(pairs)
    elif isinstance(target, dict):
        target.update(pairs)
    else:
        raise TypeError("the pickle sets items of something that is no dictionary")


_LITERALS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
_LITERALS |= {"STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
_LITERALS |= {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
    "EMPTY_TUPLE": tuple,
    "MARK": _Mark,
}
_COLLECTORS: dict[str, Callable[[list], Any]] = {
    "LIST": list,
    "TUPLE": tuple,
    "FROZENSET": frozenset,
    "DICT": lambda items: dict(zip(items[::2], items[1::2], strict=True)),
}
