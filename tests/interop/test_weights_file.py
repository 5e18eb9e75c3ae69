"""Weights in files of every kind, whole and damaged, honest and not."""

import io
import json
import os
import pickle
import struct
import zipfile
from argparse import Namespace
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file

from ldm.errors import UserError
from ldm.interop import safe_unpickler, torchfile
from ldm.interop.weights_file import metadata, read_weights
from ldm.io.atomic import CorruptFileError

LEGACY = {"_use_new_zipfile_serialization": False}


@pytest.fixture
def state():
    wide = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    tied = torch.arange(5.0)
    return OrderedDict(
        {
            "a.weight": wide,
            "turned": wide.T,
            "part": wide[1:3, ::2],
            "one": tied,
            "same": tied,
            "half": wide.half(),
            "brain": wide.bfloat16(),
            "long": torch.tensor(7),
            "flag": torch.tensor([True, False]),
            "empty": torch.zeros(0, 3),
            "parameter": torch.nn.Parameter(wide[0].clone()),
            "double": wide.double(),
        }
    )


def same(read, state):
    assert list(read) == list(state)
    for name, value in state.items():
        assert read[name].dtype == value.dtype
        assert torch.equal(read[name], value), name


@pytest.mark.parametrize("how", [{}, LEGACY, {"pickle_protocol": 4}], ids=["zip", "legacy", "protocol 4"])
def test_read_weights_of_torch_file_is_exact(tmp_path, state, how):
    torch.save(state, tmp_path / "a.pt", **how)
    same(read_weights(tmp_path / "a.pt"), state)


def test_read_weights_preserves_tied_tensors(tmp_path, state):
    torch.save(state, tmp_path / "a.pt")
    read = read_weights(tmp_path / "a.pt")
    read["one"][0] = 9
    assert read["same"][0] == 9


def test_read_weights_of_safetensors_with_metadata(tmp_path):
    state = {"a": torch.ones(2), "b": torch.zeros(3, dtype=torch.bfloat16)}
    save_file(state, tmp_path / "a.safetensors", {"config": "net: 1"})
    same(read_weights(tmp_path / "a.safetensors"), state)
    assert metadata(tmp_path / "a.safetensors") == {"config": "net: 1"}
    os.rename(tmp_path / "a.safetensors", tmp_path / "a.ckpt")  # told by what is in it, not by its name
    same(read_weights(tmp_path / "a.ckpt"), state)


@pytest.mark.parametrize("how", [{}, LEGACY], ids=["zip", "legacy"])
def test_read_weights_selects_weights_of_training_checkpoint(tmp_path, how):
    raw, ema = {"w": torch.zeros(2)}, {"w": torch.ones(2)}
    torch.save(
        {"model": raw, "ema": ema, "opt": {"state": {0: {"step": 1}}}, "args": Namespace(lr=1e-4)},
        tmp_path / "dit.pt",
        **how,
    )
    same(read_weights(tmp_path / "dit.pt"), ema)
    same(read_weights(tmp_path / "dit.pt", "raw"), raw)
    torch.save(
        {"state_dict": {f"module.{name}": one for name, one in raw.items()}, "epoch": 3}, tmp_path / "pl.ckpt", **how
    )
    same(read_weights(tmp_path / "pl.ckpt"), raw)
    with pytest.raises(UserError, match="weights=best: expected ema or raw"):
        read_weights(tmp_path / "pl.ckpt", "best")


class Asks:
    """Pickles as a call of `call` with `arguments`."""

    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


def hand_written(path):
    """Pickles that Python's own pickler would not write: every opcode that calls or looks up."""
    shell = f"touch {path}".encode()
    yield b"cos\nsystem\n(V" + shell + b"\ntR."  # GLOBAL, REDUCE
    yield b"(V" + shell + b"\nios\nsystem\n."  # INST
    yield b"(cos\nsystem\nV" + shell + b"\no."  # OBJ
    yield b"\x80\x04\x8c\x02os\x8c\x06system\x93(V" + shell + b"\nt\x81."  # STACK_GLOBAL, NEWOBJ
    yield b"\x80\x04\x8c\x02os\x8c\x06system\x93(V" + shell + b"\nt}\x92."  # NEWOBJ_EX
    yield b"cbuiltins\neval\n(V__import__('os').system('" + shell + b"')\ntR."
    yield b"cbuiltins\nexec\n(Vopen('" + str(path).encode() + b"', 'w')\ntR."
    yield b"cbuiltins\ngetattr\n(cos\npath\nVos.system\ntR(V" + shell + b"\ntR."
    yield b"\x80\x04\x8c\x08builtins\x8c\x0f__import__.eval\x93(V1\ntR."
    yield b"ctorch\nload\n(V" + shell + b"\ntR."
    yield b"ctorch.hub\nload\n(V/\nVx\nVlocal\ntR."
    yield b"ctorch._utils\n_rebuild_from_type_v2\n(cos\nsystem\ncos\nsystem\n(V" + shell + b"\nt}tR."
    yield b"ctorch._dynamo\nrun\n(tR}(V__setstate__\ncos\nsystem\nub."  # BUILD


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_read_weights_never_runs_pickled_code(tmp_path, legacy, monkeypatch):
    proof = tmp_path / "proof"
    ran = []
    monkeypatch.setattr(os, "system", lambda *a: ran.append(a))
    asked = [
        Asks(os.mkdir, str(proof)),
        Asks(eval, f"open({str(proof)!r}, 'w')"),
        Asks(exec, f"open({str(proof)!r}, 'w')"),
        Asks(open, str(proof), "w"),
        Asks(torch.save, {}, str(proof)),
        Asks(torch.from_file, str(proof), True, 1),
        Asks(getattr, Asks(__import__, "os"), "system"),
    ]
    file = tmp_path / "planted.ckpt"
    for one in asked:
        torch.save({"state_dict": {"w": torch.ones(2)}, "callbacks": one}, file, **(LEGACY if legacy else {}))
        same(read_weights(file), {"w": torch.ones(2)})
        torch.save({"w": one, "v": torch.ones(2)}, file, **(LEGACY if legacy else {}))
        with pytest.raises(UserError, match=r"w is a .*, not a plain tensor"):
            read_weights(file)
        assert not proof.exists()
    for one in hand_written(proof):
        if legacy:
            file.write_bytes(
                pickle.dumps(torchfile.MAGIC) + pickle.dumps(1001) + pickle.dumps({}) + one + pickle.dumps([])
            )
        else:
            with zipfile.ZipFile(file, "w") as archive:
                archive.writestr("archive/data.pkl", one)
        with pytest.raises(UserError, match="contains no state dict"):
            read_weights(file)
        assert not proof.exists()
    assert not ran


def test_pickle_exploits_work_in_plain_python(tmp_path):
    proof = tmp_path / "proof"
    pickle.loads(next(hand_written(proof)))
    assert proof.exists()


def test_read_weights_ignores_missing_classes(tmp_path):
    body = b"\x80\x02}(X\x05\x00\x00\x00epochK\x03X\x09\x00\x00\x00callbacks}cgone.away\nClass\n"
    body += b"}(X\x04\x00\x00\x00bestX\x01\x00\x00\x00xusu."
    tree = safe_unpickler.PickleMachine().run(io.BytesIO(body))
    assert tree == {"epoch": 3, "callbacks": {safe_unpickler.Name("gone.away.Class"): {"best": "x"}}}


BOMBS = {  # what never ends doubles a tuple 60 times: to hash it, print it or walk it naively takes 2^60 steps
    "a key whose hash never ends": b"\x80\x02})" + b"2\x86" * 60 + b"K\x01s.",
    "a value that never ends": b"\x80\x02}X\x01\x00\x00\x00w)" + b"2\x86" * 60 + b"s.",
    "ten thousand tuples deep": b"\x80\x02}X\x01\x00\x00\x00w)" + b"\x85" * 10_000 + b"s.",
    "a name that never ends": b"\x80\x04)" + b"2\x86" * 60 + b"2\x93.",
    "a reference that never ends": b"\x80\x04)" + b"2\x86" * 60 + b"Q.",
    "a storage whose name never ends": b"\x80\x04(\x8c\x07storagectorch\nFloatStorage\n)"
    + b"2\x86" * 60
    + b"NK\x01tQ.",
    "a shape that never ends": b"ctorch._utils\n_rebuild_tensor_v2\n(NK\x00)" + b"2\x86" * 60 + b"2tR.",
    "a memo of 32 GiB": b"\x80\x02}r\xff\xff\xff\xff.",
    "a count of 2^60 bytes": b"\x80\x05\x96" + struct.pack("<Q", 1 << 60) + b".",
    "a frame of 2^60 bytes": b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b"}.",
    "a number of a million digits": b"I" + b"9" * 1_000_000 + b"\n.",
    "a list of itself": b"\x80\x02]q\x00h\x00a.",
    "no end": b"\x80\x02}" * 1000,
    "an empty stack": b"\x80\x020.",
    "a registered extension": b"\x80\x02\x82\x01.",
    "a persistent id in words": b"Pstorage\n.",
}


@pytest.mark.parametrize("name", BOMBS)
def test_read_weights_of_pickle_bomb_is_one_error(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "a.ckpt", "w") as archive:
        archive.writestr("archive/data.pkl", BOMBS[name])
    with pytest.raises(UserError) as error:
        read_weights(tmp_path / "a.ckpt")
    assert str(tmp_path / "a.ckpt") in str(error.value)
    assert len(str(error.value)) < 400
    assert "\n" not in str(error.value)


def tensor(shape, stride, numel=4, offset=0, storage=b"FloatStorage"):
    """A pickle of {"w": a tensor} with a storage of `numel` numbers."""
    numbers = lambda values: b"(" + b"".join(b"J" + struct.pack("<i", v) for v in values) + b"t"  # noqa: E731
    pid = (
        b"(X\x07\x00\x00\x00storagectorch\n"
        + storage
        + b"\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuJ"
        + struct.pack("<i", numel)
        + b"tQ"
    )
    made = (
        b"ctorch._utils\n_rebuild_tensor_v2\n("
        + pid
        + b"J"
        + struct.pack("<i", offset)
        + numbers(shape)
        + numbers(stride)
        + b"\x89}tR"
    )
    return b"\x80\x02}X\x01\x00\x00\x00w" + made + b"s."


@pytest.mark.parametrize(
    "body",
    [
        tensor((5,), (1,)),
        tensor((2, 3), (3, 1)),
        tensor((2,), (1,), offset=3),
        tensor((2,), (1,), offset=-1),
        tensor((-2,), (1,)),
        tensor((2,), (-1,)),
        tensor((2, 2), (1,)),
        tensor((1 << 30, 1 << 30), (0, 0)),  # a billion billion numbers out of one
        tensor((4,), (1,), numel=1 << 30),
        tensor((4,), (1,), storage=b"QInt8Storage"),
    ],
)
def test_read_weights_rejects_tensor_beyond_storage(tmp_path, body):
    with zipfile.ZipFile(tmp_path / "a.ckpt", "w") as archive:
        archive.writestr("archive/data.pkl", body)
        archive.writestr("archive/data/0", bytes(16))
    with pytest.raises(CorruptFileError, match=r"is (not a )?(in)?complete"):
        read_weights(tmp_path / "a.ckpt")


def test_read_weights_accepts_tensor_within_storage(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.ckpt", "w") as archive:
        archive.writestr("archive/data.pkl", tensor((2, 2), (2, 1)))
        archive.writestr("archive/data/0", struct.pack("<4f", 1, 2, 3, 4))
    assert read_weights(tmp_path / "a.ckpt")["w"].tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize("how", [{}, LEGACY], ids=["zip", "legacy"])
def test_read_weights_of_truncated_file_is_one_error(tmp_path, how):
    state = {"first": torch.zeros(40), "last": torch.ones(40)}
    torch.save(state, tmp_path / "whole.pt", **how)
    data = (tmp_path / "whole.pt").read_bytes()
    for size in [1, 2, 20, 100, len(data) // 2, len(data) - 100, len(data) - 1]:
        (tmp_path / "cut.pt").write_bytes(data[:size])
        with pytest.raises(UserError, match=r"cut\.pt"):
            read_weights(tmp_path / "cut.pt")


def test_read_weights_detects_flipped_bit(tmp_path):
    torch.save({"w": torch.full((64,), 3.0)}, tmp_path / "a.pt")
    data = bytearray((tmp_path / "a.pt").read_bytes())
    data[data.find(struct.pack("<f", 3.0)) + 1] ^= 4
    (tmp_path / "a.pt").write_bytes(data)
    with pytest.raises(CorruptFileError, match=r"a\.pt: w is incomplete \(Bad CRC"):
        read_weights(tmp_path / "a.pt")


def test_read_weights_rejects_zip_bomb(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.ckpt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(1 << 20))
    with pytest.raises(CorruptFileError, match="unpacks to more"):
        read_weights(tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html><html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
        (b"\x93NUMPY\x01\x00", "is a numpy array"),
        (b"\x1f\x8b\x08", "is gzipped"),
        (b"hello", "of unknown kind"),
        (pickle.dumps({"w": [1.0]}), "is a pickle, but not of torch.save"),
    ],
)
@pytest.mark.parametrize("ending", [".ckpt", ".safetensors"])
def test_read_weights_names_other_file_kinds(tmp_path, data, said, ending):
    (tmp_path / f"a{ending}").write_bytes(data)
    with pytest.raises(UserError) as error:
        read_weights(tmp_path / f"a{ending}")
    assert f"a{ending}" in str(error.value)
    assert said in str(error.value) or (
        ending == ".safetensors" and "not a complete safetensors file" in str(error.value)
    )


@pytest.mark.parametrize("size", [4, 8, 30, -1])
def test_read_weights_of_truncated_safetensors_is_one_error(tmp_path, size):
    save_file({"a": torch.ones(100)}, tmp_path / "a.safetensors")
    data = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(data[:size])
    with pytest.raises(CorruptFileError, match=r"a\.safetensors .*is not a complete safetensors file"):
        read_weights(tmp_path / "a.safetensors")


def test_read_weights_rejects_files_that_are_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_weights(tmp_path / "gone.ckpt")
    with pytest.raises(UserError, match=r"no weights in it; expected diffusion_pytorch_model\.safetensors"):
        read_weights(tmp_path)
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    with pytest.raises(UserError, match="contains no state dict of tensors"):
        read_weights(tmp_path / "list.pt")
    torch.jit.script(torch.nn.Linear(1, 1)).save(str(tmp_path / "script.pt"))
    with pytest.raises(UserError, match="is a TorchScript program"):
        read_weights(tmp_path / "script.pt")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(UserError, match=r"is a zip without data\.pkl"):
        read_weights(tmp_path / "a.zip")


def test_read_weights_of_sharded_folder(tmp_path):
    parts = {"one": {"a": torch.ones(2)}, "two": {"b": torch.zeros(3), "c": torch.ones(1)}}
    places = {name: f"{part}.safetensors" for part, state in parts.items() for name in state}
    for part, state in parts.items():
        save_file(state, tmp_path / f"{part}.safetensors")
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    same(read_weights(tmp_path), {**parts["one"], **parts["two"]})

    index.write_text(json.dumps({"weight_map": {**places, "d": "two.safetensors"}}))
    with pytest.raises(CorruptFileError, match="differ in 1 names, the first is d"):
        read_weights(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "../one.safetensors"}}))
    with pytest.raises(CorruptFileError, match="outside its folder"):
        read_weights(tmp_path)
    index.write_text("{")
    with pytest.raises(CorruptFileError, match="is not an index of shards"):
        read_weights(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "three.safetensors"}}))
    with pytest.raises(UserError, match=r"three\.safetensors: no such file"):
        read_weights(tmp_path)
