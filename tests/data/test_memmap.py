import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.data.memmap import create_memmap, open_memmap
from ldm.io.atomic import CorruptFileError


@pytest.mark.parametrize(("dtype", "kind"), [("F16", torch.float16), ("F32", torch.float32), ("U8", torch.uint8)])
def test_memmap_round_trip(tmp_path, dtype, kind):
    values = torch.arange(24).reshape(2, 3, 4).to(kind)
    with create_memmap(tmp_path / "in" / "x.safetensors", "values", dtype, (2, 3, 4), {"a": "b"}) as tensor:
        assert not (tmp_path / "in" / "x.safetensors").exists()
        tensor[:] = values
    assert torch.equal(open_memmap(tmp_path / "in" / "x.safetensors", "values"), values)
    assert torch.equal(load_file(tmp_path / "in" / "x.safetensors")["values"], values)
    assert len(list((tmp_path / "in").iterdir())) == 1


def test_open_memmap_reads_files_of_safetensors(tmp_path):
    state = {"a": torch.rand(3, 2), "b": torch.rand(5).half()}
    save_file(state, tmp_path / "x.safetensors")
    assert all(torch.equal(open_memmap(tmp_path / "x.safetensors", name), value) for name, value in state.items())


def test_create_memmap_failure_preserves_old_file(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(2)}, path)

    def write():
        with create_memmap(path, "a", "F32", (2,), {}) as tensor:
            tensor[:] = 1
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert open_memmap(path, "a").tolist() == [0, 0]
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_open_memmap_reports_damage(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(100)}, path)
    whole = path.read_bytes()
    for content in (whole[:-4], whole[:20], b"", b"{}" * 30):
        path.write_bytes(content)
        with pytest.raises(CorruptFileError, match=r"x\.safetensors is not a whole"):
            open_memmap(path, "a")
    path.write_bytes(whole)
    with pytest.raises(CorruptFileError, match="'b'"):
        open_memmap(path, "b")


def test_memmap_is_aligned_to_eight_bytes(tmp_path):
    """With the fewest spaces after a header of any length."""
    path = tmp_path / "x.safetensors"
    for letters in range(8):
        with create_memmap(path, "a", "U8", (1,), {"b": "c" * letters}):
            pass
        (length,) = struct.unpack("<Q", path.read_bytes()[:8])
        assert length % 8 == 0
        assert length - len(path.read_bytes()[8 : 8 + length].rstrip()) < 8
