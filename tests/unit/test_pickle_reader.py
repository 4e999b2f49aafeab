"""The inert reader: what it reads, what it refuses, and that nothing of a file ever runs."""

import io
import os
import pickle
import pickletools
import struct
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from mdplug.errors import ModelFileError
from mdplug.potentials.convert.pickle_machine import Inert, Named
from mdplug.potentials.convert.pickle_reader import read_module, read_object, tensors

SKELETONS = Path(__file__).parents[1] / "fixtures" / "mace" / "skeletons.zip"


def archive(path: Path, pickled: bytes, records: dict[str, bytes] | None = None, folder: str = "m", **how) -> Path:
    """A file laid out as torch.save does, with a pickle of our choice."""
    with zipfile.ZipFile(path, "w", **how) as out:
        out.writestr(f"{folder}/data.pkl", pickled)
        for key, value in (records or {}).items():
            out.writestr(f"{folder}/{key}", value)
    return path


def tensor_pickle(count: object, size: tuple, stride: tuple, offset: int = 0) -> bytes:
    """A pickle of one float64 tensor on record data/0, with sizes of our choice."""

    class Storage:
        pass

    class Tensor:
        def __reduce__(self):
            return (torch._utils._rebuild_tensor_v2, (Storage(), offset, size, stride, False, OrderedDict()))

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            return ("storage", torch.DoubleStorage, "0", "cpu", count) if isinstance(obj, Storage) else None

    buffer = io.BytesIO()
    Pickler(buffer, 2).dump(Tensor())
    return buffer.getvalue()


def refusal(path: Path, read=read_module) -> str:
    with pytest.raises(ModelFileError) as caught:
        read(path)
    text = str(caught.value)
    assert "\n" not in text
    assert path.name in text
    return text


def test_reads_tensors_of_every_kind_and_layout(tmp_path):
    base = torch.arange(24.0, dtype=torch.float64).reshape(4, 6)
    what = {
        "transposed": base.T,
        "slice": base[1:3, ::2],
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "bf16": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "flag": torch.tensor([True, False]),
        "int": torch.tensor([1, 2], dtype=torch.int32),
        "parameter": torch.nn.Parameter(base.clone()),
        "nested": [1, 2.5, None, ("a", {"b": {3}}), b"x", 10**30, np.float64(0.1), torch.tanh, torch.Size([2])],
    }
    torch.save(what, tmp_path / "t.pt")
    found = read_object(tmp_path / "t.pt")
    for key, value in what.items():
        if isinstance(value, torch.Tensor):
            assert found[key].dtype == value.dtype
            assert torch.equal(found[key], value.detach())
    assert found["nested"][:6] == [1, 2.5, None, ("a", {"b": {3}}), b"x", 10**30]
    assert found["nested"][6] == 0.1
    assert found["nested"][7] == Named("torch.tanh")
    assert found["nested"][8] == (2,)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_reads_every_pickle_protocol(tmp_path, protocol):
    what = {"weights": torch.arange(6.0).reshape(2, 3), "words": ["a", "b"], "set": {1, 2}, "deep": [[[[]]]]}
    torch.save(what, tmp_path / "p.pt", pickle_protocol=protocol)
    found = read_object(tmp_path / "p.pt")
    assert torch.equal(found["weights"], what["weights"])
    assert {k: found[k] for k in ("words", "set", "deep")} == {k: what[k] for k in ("words", "set", "deep")}


def test_a_module_becomes_records_and_tensors(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    torch.save(module, tmp_path / "m.model")
    root = read_module(tmp_path / "m.model")
    assert root.class_name == "torch.nn.modules.container.Sequential"
    assert root.module("0").attributes["in_features"] == 3
    assert root.module("0.nothing") is None
    found = tensors(root)
    assert set(found) == set(module.state_dict())
    for key, value in module.state_dict().items():
        assert torch.equal(found[key], value)


def test_reads_every_stored_mace_checkpoint_without_mace(tmp_path):
    before = set(sys.modules)
    with zipfile.ZipFile(SKELETONS) as stored:
        names = stored.namelist()
        assert len(names) >= 27
        for name in names:
            root = read_module(Path(stored.extract(name, tmp_path)))
            assert root.class_name.startswith("mace.modules.models.")
            found = tensors(root)
            assert found["atomic_numbers"].tolist() == [1, 8, 11]
            assert float(found["r_max"]) == 4.5
            assert root.module("interactions.0").attributes["avg_num_neighbors"] == 17.3
    assert not {m for m in set(sys.modules) - before if m.split(".")[0] in ("mace", "e3nn")}


class Evil:
    """Pickles as a call of a function with arguments."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("where", ["root", "attribute", "key"])
@pytest.mark.parametrize(
    "make",
    [
        lambda mark: Evil(os.system, f"touch {mark}"),
        lambda mark: Evil(eval, f"open({str(mark)!r}, 'w')"),
        lambda mark: Evil(open, str(mark), "w"),
        lambda mark: Evil(os.mkdir, str(mark)),
        lambda mark: Evil(torch.save, 1, str(mark)),
        lambda mark: Evil(torch.hub.load, "a/b", "c"),
        lambda mark: Evil(getattr, torch.nn.Module, "__init__"),
        lambda mark: Evil(__import__, "antigravity"),
    ],
    ids=["os.system", "eval", "open", "mkdir", "torch.save", "torch.hub", "getattr", "import"],
)
def test_code_in_a_file_never_runs(tmp_path, make, where):
    mark = tmp_path / "ran"
    evil = make(mark)
    module = torch.nn.Sequential(torch.nn.Linear(2, 2))
    if where == "attribute":
        module.note = evil
    what = {"root": evil, "attribute": module, "key": {"model": [1, evil]}}[where]
    torch.save(what, tmp_path / "evil.model")
    text = refusal(tmp_path / "evil.model")
    assert "nothing of the file was run" in text
    assert not mark.exists()
    if evil.call[0] in (os.system, os.mkdir, torch.save):  # negative control: the file is armed
        torch.load(tmp_path / "evil.model", weights_only=False)
        assert mark.exists()


@pytest.mark.parametrize("opcode", ["INST", "OBJ", "EXT1"])
def test_the_older_ways_to_call_are_inert_too(tmp_path, opcode):
    mark = tmp_path / "ran"
    argument = b"V" + str(f"touch {mark}").encode() + b"\n"
    program = {
        "INST": b"(" + argument + b"ios\nsystem\n.",
        "OBJ": b"(cos\nsystem\n" + argument + b"o.",
        "EXT1": b"\x80\x02\x82\x01.",
    }[opcode]
    assert opcode in {op.name for op, _, _ in pickletools.genops(program)}
    refusal(archive(tmp_path / "old.model", program))
    assert not mark.exists()


def test_setstate_of_a_known_class_is_not_called(tmp_path):
    program = b"\x80\x02cmace.modules.models\nMACE\n)\x81}X\x01\x00\x00\x00aK\x01sb."
    found = read_object(archive(tmp_path / "b.model", program))
    assert found == found
    assert isinstance(found, Inert)
    assert found.state == {"a": 1}
    assert "mace" not in sys.modules


def test_refuses_what_is_no_module_file(tmp_path):
    (tmp_path / "empty.model").write_bytes(b"")
    assert "is empty" in refusal(tmp_path / "empty.model")
    (tmp_path / "text.model").write_text("# an input file of something else\n")
    assert "not a torch.save file" in refusal(tmp_path / "text.model")
    (tmp_path / "bare.model").write_bytes(pickle.dumps({"a": 1}))
    assert "bare pickle" in refusal(tmp_path / "bare.model")
    torch.save(torch.nn.Linear(1, 1), tmp_path / "legacy.model", _use_new_zipfile_serialization=False)
    assert "before 1.6" in refusal(tmp_path / "legacy.model")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as out:
        out.writestr("readme.txt", "hello")
    assert "no data.pkl" in refusal(tmp_path / "other.zip")
    assert "cannot be read" in refusal(tmp_path / "absent.model")
    assert "cannot be read" in refusal(tmp_path)


def test_refuses_torchscript_and_names_the_mend(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(tmp_path / "x_compiled.model"))
    text = refusal(tmp_path / "x_compiled.model")
    assert "TorchScript" in text
    assert ".model file that it was compiled from" in text


def test_refuses_weights_without_a_module(tmp_path):
    linear = torch.nn.Linear(2, 2)
    torch.save({"model": linear.state_dict(), "optimizer": {}, "lr_scheduler": {}}, tmp_path / "epoch-3.pt")
    assert "model, optimizer" in refusal(tmp_path / "epoch-3.pt")
    torch.save(linear.state_dict(), tmp_path / "state.pt")
    assert "hyper-parameters are missing" in refusal(tmp_path / "state.pt")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    assert "not a torch module" in refusal(tmp_path / "tensor.pt")


def test_a_truncated_file_is_refused_at_any_length(tmp_path):
    torch.save(torch.nn.Sequential(torch.nn.Linear(8, 8)), tmp_path / "whole.model")
    data = (tmp_path / "whole.model").read_bytes()
    for length in [3, 40, *range(200, len(data) - 1, 397), len(data) - 1]:
        (tmp_path / "cut.model").write_bytes(data[:length])
        refusal(tmp_path / "cut.model")


def test_a_flipped_byte_is_noticed(tmp_path):
    torch.save(torch.nn.Sequential(torch.nn.Linear(64, 64)), tmp_path / "whole.model")
    data = bytearray((tmp_path / "whole.model").read_bytes())
    with zipfile.ZipFile(tmp_path / "whole.model") as inside:
        record = max(inside.infolist(), key=lambda r: r.file_size)
        where = record.header_offset + 4096
    data[where] ^= 0x40
    (tmp_path / "flipped.model").write_bytes(data)
    assert "damaged" in refusal(tmp_path / "flipped.model")


def test_a_pickle_cut_within_a_whole_archive(tmp_path):
    whole = pickle.dumps({"a": [1, 2, {"b": "text"}]}, protocol=2)
    for length in range(len(whole) - 1):
        refusal(archive(tmp_path / "cut.model", whole[:length]))


@pytest.mark.parametrize(
    ("count", "size", "stride", "offset"),
    [
        (4, (5,), (1,), 0),
        (4, (4,), (1,), 1),
        (4, (2,), (4,), 0),
        (4, (10**12,), (0,), 0),
        (4, (2**40, 2**40), (0, 0), 0),
        (4, (-1,), (1,), 0),
        (4, (2, 2), (2,), 0),
        (4, (2,), (1,), -3),
        (10**15, (4,), (1,), 0),
        (-4, (4,), (1,), 0),
        ("4", (4,), (1,), 0),
        (4, ("4",), (1,), 0),
    ],
)
def test_absurd_sizes_are_refused(tmp_path, count, size, stride, offset):
    record = {"data/0": np.arange(4.0).tobytes()}
    refusal(archive(tmp_path / "s.model", tensor_pickle(count, size, stride, offset), record), read_object)
    good = read_object(archive(tmp_path / "g.model", tensor_pickle(4, (2, 2), (2, 1)), record))
    assert good.tolist() == [[0.0, 1.0], [2.0, 3.0]]


def test_absurd_lengths_in_the_pickle_are_refused_without_reserving_memory(tmp_path):
    for program in (
        b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b"x.",  # BINBYTES8
        b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"1.",  # LONG4
        b"\x80\x02X" + struct.pack("<I", 2**32 - 1) + b"a.",  # BINUNICODE
        b"\x80\x02h\xff.",  # a memo that was never put
        b"\x80\x02R.",  # a call on an empty stack
        b"\x80\x02K\x01K\x02R.",  # a call of a number
        b"\x80\x02}]K\x01s.",  # a list as a key
        b"I" + b"9" * 10000 + b"\n.",  # a number of ten thousand digits
    ):
        refusal(archive(tmp_path / "len.model", program), read_object)
    huge_index = b"\x80\x02K\x07r" + struct.pack("<I", 2**32 - 1) + b"."
    assert read_object(archive(tmp_path / "memo.model", huge_index)) == 7


def test_missing_compressed_and_big_endian_records(tmp_path):
    program = tensor_pickle(4, (4,), (1,))
    assert "data/0 is missing" in refusal(archive(tmp_path / "a.model", program), read_object)
    record = {"data/0": np.arange(4.0).tobytes()}
    bomb = archive(tmp_path / "b.model", program, record, compression=zipfile.ZIP_DEFLATED)
    assert "compressed" in refusal(bomb, read_object)
    big = archive(tmp_path / "c.model", program, {**record, "byteorder": b"big"})
    assert "big-endian" in refusal(big, read_object)
