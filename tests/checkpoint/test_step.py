"""Durable files: whole or absent under faults, and damage named."""

import gzip
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from hashlib import sha256

import pytest
import torch

from ldm.checkpoint.step import (
    latest_valid_checkpoint,
    list_checkpoints,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    verify_checkpoint,
)
from ldm.io.atomic import (
    CorruptFileError,
    read_tensors,
    remove_stale_temporaries,
    write_bytes,
    write_json,
    write_tensors,
    write_text,
)


def save(folder, step, keep=2, value=0.0, size=64):
    weights = {"layer.weight": torch.full((size,), value + step), "count": torch.tensor(step)}
    return save_checkpoint(
        folder,
        step,
        {"model": weights, "ema": weights},
        {"step": step, "moments": [torch.ones(3)]},
        f"step: {step}\n",
        keep,
    )


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_small_files_round_trip_without_leftovers(tmp_path):
    write_bytes(tmp_path / "a" / "b", b"\0\1")
    write_text(tmp_path / "t", "ü")
    write_json(tmp_path / "j", {"fid": 1.5})
    write_tensors(tmp_path / "w", {"x": torch.arange(3), "same": torch.arange(3)}, {"made": "here"})
    assert (tmp_path / "a" / "b").read_bytes() == b"\0\1"
    assert (tmp_path / "t").read_text(encoding="utf-8") == "ü"
    assert json.loads((tmp_path / "j").read_text()) == {"fid": 1.5}
    assert torch.equal(read_tensors(tmp_path / "w")["x"], torch.arange(3))
    assert names(tmp_path) == ["a", "j", "t", "w"]


def test_failed_write_preserves_old_file(tmp_path):
    write_json(tmp_path / "j", 1)
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(tmp_path / "j", float("nan"))
    with pytest.raises(ValueError, match="x: 1 of 2 values are not finite"):
        write_tensors(tmp_path / "j", {"x": torch.tensor([1.0, float("inf")])})
    assert (tmp_path / "j").read_text() == "1\n"
    assert names(tmp_path) == ["j"]


def test_write_tensors_accepts_tied_weights(tmp_path):
    x = torch.arange(6.0)
    write_tensors(tmp_path / "w", {"a": x, "b": x, "head": x[:3]})
    back = read_tensors(tmp_path / "w")
    assert torch.equal(back["a"], x)
    assert torch.equal(back["b"], x)
    assert torch.equal(back["head"], x[:3])


def test_checkpoint_round_trip(tmp_path):
    path = save(tmp_path, 12000)
    assert path.name == "step-00012000"
    assert names(path) == ["config.yaml", "ema.safetensors", "manifest.json", "model.safetensors", "train_state.pt"]
    back = load_checkpoint(path)
    assert back.step == 12000
    assert back.config == "step: 12000\n"
    assert back.state["step"] == 12000
    assert torch.equal(back.tensors["ema"]["layer.weight"], torch.full((64,), 12000.0))
    assert torch.equal(back.state["moments"][0], torch.ones(3))
    assert latest_valid_checkpoint(tmp_path) == (path, [])


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def empty(path):
    path.write_bytes(b"")


def flip(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("file", ["model.safetensors", "train_state.pt", "config.yaml", "manifest.json"])
@pytest.mark.parametrize("harm", [truncate, empty, flip, os.remove])
def test_damaged_newest_checkpoint_is_skipped_with_message(tmp_path, file, harm):
    older, newer = save(tmp_path, 1), save(tmp_path, 2)
    harm(newer / file)
    if harm is flip and file == "manifest.json":  # a flipped byte of the manifest must not pass either
        (newer / file).write_text((newer / file).read_text().replace('"sha256": "', '"sha256": "0', 1))
    found, skipped = latest_valid_checkpoint(tmp_path)
    assert found == older
    assert [path for path, _ in skipped] == [newer]
    assert file in skipped[0][1]
    assert "\n" not in skipped[0][1]
    with pytest.raises(CorruptFileError, match=file):
        load_checkpoint(newer)


def test_latest_valid_checkpoint_without_valid_one(tmp_path):
    assert latest_valid_checkpoint(tmp_path / "absent") == (None, [])
    empty(save(tmp_path, 1) / "train_state.pt")
    found, skipped = latest_valid_checkpoint(tmp_path)
    assert found is None
    assert "has 0 bytes, not" in skipped[0][1]
    with pytest.raises(CorruptFileError, match="is not there"):
        verify_checkpoint(tmp_path / "step-00000009")


def test_latest_valid_checkpoint_before_step(tmp_path):
    one, two = save(tmp_path, 1), save(tmp_path, 2)
    assert [latest_valid_checkpoint(tmp_path, before)[0] for before in (1, 2, 3, None)] == [None, one, two, two]


def test_manifest_without_step_is_damaged(tmp_path):
    step = save(tmp_path, 1)
    manifest = json.loads((step / "manifest.json").read_text())
    del manifest["step"]
    (step / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CorruptFileError, match=r"manifest\.json is damaged"):
        verify_checkpoint(step)


def test_manifest_cannot_name_files_outside(tmp_path):
    step = save(tmp_path, 1)
    manifest = json.loads((step / "manifest.json").read_text())
    manifest["files"]["../secret"] = {"sha256": "0", "bytes": 0}
    (step / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CorruptFileError, match="outside its folder"):
        verify_checkpoint(step)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_pickle_bomb_in_checkpoint_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    step = save(tmp_path, 1)
    torch.save({"state": Bomb()}, step / "train_state.pt")
    manifest = json.loads((step / "manifest.json").read_text())
    from ldm.io.atomic import file_sha256

    size = (step / "train_state.pt").stat().st_size
    manifest["files"]["train_state.pt"] = {"sha256": file_sha256(step / "train_state.pt"), "bytes": size}
    (step / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CorruptFileError, match="more than tensors and plain values"):
        load_checkpoint(step)
    assert not (tmp_path / "exploded").exists()


def test_file_sha256_of_several_files_is_of_concatenation(tmp_path):
    from ldm.io.atomic import file_sha256

    (tmp_path / "a").write_bytes(b"1" * 3_000_000)
    (tmp_path / "b").write_bytes(b"2")
    assert file_sha256(tmp_path / "a", tmp_path / "b") == sha256(b"1" * 3_000_000 + b"2").hexdigest()
    with gzip.open(tmp_path / "c", "wb") as file:
        file.write(b"2")
    assert file_sha256(tmp_path / "c", opener=gzip.open) == file_sha256(tmp_path / "b") != file_sha256(tmp_path / "c")


def test_non_finite_weights_are_not_written(tmp_path):
    save(tmp_path, 1)
    with pytest.raises(ValueError, match=r"model w: 1 of 3 values are not finite; nothing was written"):
        save_checkpoint(tmp_path, 2, {"model": {"w": torch.tensor([0.0, float("nan"), 1.0])}}, {})
    assert names(tmp_path) == ["step-00000001"]


def test_full_disk_is_detected_before_writing(tmp_path, monkeypatch):
    save(tmp_path, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 100, 100))
    with pytest.raises(OSError, match=r"no space for a checkpoint: 1 MiB .* 0 MiB free") as caught:
        save(tmp_path, 2, size=1 << 17)
    assert caught.value.errno == 28
    assert names(tmp_path) == ["step-00000001"]


def test_disk_full_while_writing_leaves_no_partial_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 1)
    monkeypatch.setattr(
        "ldm.checkpoint.step._write_tensor_file",
        lambda state, path: (_ for _ in ()).throw(OSError(28, "No space left on device")),
    )
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001"]


def test_prune_checkpoints_preserves_newest_and_a_valid_older(tmp_path):
    for step in range(1, 5):
        save(tmp_path, step, keep=0)
    truncate(tmp_path / "step-00000004" / "model.safetensors")
    truncate(tmp_path / "step-00000003" / "model.safetensors")
    prune_checkpoints(tmp_path, 2)
    assert [path.name[-1] for path in list_checkpoints(tmp_path)] == ["4", "3", "2", "1"]
    save(tmp_path, 5, keep=1)
    assert [path.name[-1] for path in list_checkpoints(tmp_path)] == ["5", "4", "2"]
    save(tmp_path, 6, keep=3)
    assert [path.name[-1] for path in list_checkpoints(tmp_path)] == ["6", "5", "4"]


def test_save_checkpoint_replaces_same_step(tmp_path):
    save(tmp_path, 1)
    save(tmp_path, 1, value=5.0)
    assert load_checkpoint(tmp_path / "step-00000001").tensors["model"]["layer.weight"][0] == 6
    assert names(tmp_path) == ["step-00000001"]


def test_remove_stale_temporaries_spares_live_processes(tmp_path):
    step = save(tmp_path, 3)
    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True
    ).stdout.strip()
    (tmp_path / f".step-00000001.{dead}.tmp").mkdir()
    (tmp_path / f".last.json.{dead}.tmp").write_text("half")
    (tmp_path / f".step-00000007.{os.getppid()}.tmp").mkdir()
    os.replace(step, tmp_path / f".step-00000003.{dead}.old.tmp")
    assert len(remove_stale_temporaries(tmp_path)) == 3
    assert names(tmp_path) == [f".step-00000007.{os.getppid()}.tmp", "step-00000003"]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_written_files_follow_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        step = save(tmp_path, 1)
        write_json(tmp_path / "j", 1)
        write_tensors(tmp_path / "w", {"x": torch.arange(3)})
        write_tensors(tmp_path / "w", {"x": torch.arange(4)})  # over one that is there
    finally:
        os.umask(before)
    files = [tmp_path / "j", tmp_path / "w", *step.iterdir()]
    assert len(files) == 7
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in files} == {
        path.name: oct(0o666 & ~umask) for path in files
    }
    assert step.stat().st_mode & 0o777 == 0o777 & ~umask


def write_on(path):
    while True:
        write_tensors(path, {"w": torch.zeros(1 << 23)})


def unfinished(path):
    """The files in path's folder, at any depth, but for path itself."""
    files = [os.path.join(folder, name) for folder, _, names in os.walk(path.parent) for name in names]
    return [file for file in files if file != str(path)]


def test_killed_write_tensors_leaves_only_stale_temporary(tmp_path):
    """Killed in the middle of 32 MB, under whatever name the library writes: the next start clears it, and so does the
    next write.
    """
    path = tmp_path / "w"
    for clear in (lambda: remove_stale_temporaries(tmp_path), lambda: write_tensors(path, {"w": torch.zeros(3)})):
        for _ in range(20):
            writer = multiprocessing.get_context("fork").Process(target=write_on, args=(path,), daemon=True)
            writer.start()
            while not unfinished(path):
                assert writer.is_alive()
            writer.kill()
            writer.join()
            if unfinished(path):
                break
        assert unfinished(path)
        clear()
        assert set(names(tmp_path)) <= {"w"}


WRITER = """
import sys, torch
from ldm.checkpoint.step import save_checkpoint
folder, step = sys.argv[1], 0
weights = {"w": torch.zeros(1 << 18)}
while True:
    step += 1
    save_checkpoint(folder, step, {"model": weights}, {"optimizer": {"m": torch.zeros(1 << 18)}})
    print("saved", flush=True)
"""


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_save_never_leaves_damaged_checkpoint(tmp_path, kills):
    for kill in range(kills):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE)
        assert writer.stdout.readline() == b"saved\n"
        time.sleep(0.05 + 0.0137 * kill)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        for step in list_checkpoints(tmp_path):
            verify_checkpoint(step)
    remove_stale_temporaries(tmp_path)
    assert not list(tmp_path.glob(".*"))
    assert list_checkpoints(tmp_path)
