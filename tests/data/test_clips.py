from fractions import Fraction
from io import BytesIO
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.clip_files import DecodedClip, read_clip
from ldm.data.clips import ClipFolder
from ldm.errors import UserError


def grey(count: int, side: int = 32) -> np.ndarray:
    """Frames (count, side, side, 3) uint8 of one level each, 16 apart."""
    levels = (8 + 16 * np.arange(count)).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, side, side, 3)).copy()


def encoded(frames: np.ndarray, kind: str, codec: str, ticks: list[int], per_second: int = 8, pixels: str = "yuv420p"):
    """A file of frames that are shown at ticks / per_second seconds."""
    buffer = BytesIO()
    with av.open(buffer, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=per_second)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], pixels
        for frame, tick in zip(frames, ticks, strict=True):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = tick, Fraction(1, per_second)
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    return buffer.getvalue()


def animated(path: Path, frames: np.ndarray, pauses: list[int]) -> None:
    first, *others = map(Image.fromarray, frames)
    options = {"lossless": True} if path.suffix == ".webp" else {}
    first.save(path, save_all=True, append_images=others, duration=pauses, loop=0, **options)


def levels(frames: torch.Tensor) -> list[int]:
    """The number of each frame of `grey`, from its mean level."""
    return ((frames.float().mean((1, 2, 3)) - 8) / 16).round().int().tolist()


@pytest.mark.parametrize("name", ["a.mp4", "a.avi", "a.webm", "a.gif", "a.webp"])
def test_read_clip_of_each_kind(tmp_path, name):
    """Every frame, in order, with its time; at another rate frames are repeated or left out, motion keeps its speed."""
    path, codecs = tmp_path / name, {".mp4": "libx264", ".avi": "mpeg4", ".webm": "libvpx-vp9"}
    if path.suffix in codecs:
        path.write_bytes(encoded(grey(12), path.suffix[1:], codecs[path.suffix], list(range(12))))
    else:
        animated(path, grey(12), [125 if path.suffix == ".webp" else 120] * 12)
    clip = read_clip(path, (16, 24), 3)
    assert clip.frames.shape == (12, 3, 16, 24)
    assert levels(clip.frames) == list(range(12))
    rate = Fraction(25, 3) if path.suffix == ".gif" else 8
    assert abs(clip.rate - rate) < 0.1
    assert abs(clip.end - Fraction(12) / rate) < 0.01
    assert levels(clip.at_rate(clip.rate * 2)) == [k // 2 for k in range(24)]
    assert levels(clip.at_rate(clip.rate / 2)) == list(range(0, 12, 2))
    assert read_clip(path, (16, 16), 1).frames.shape == (12, 1, 16, 16)


def test_read_clip_counts_by_decoding(tmp_path):
    """An AVI whose header says 444 frames has those that can be decoded, also when it is cut short."""
    data = bytearray(encoded(grey(12), "avi", "mjpeg", list(range(12)), pixels="yuvj420p"))
    head = data.index(b"avih") + 8 + 16
    data[head : head + 4] = (444).to_bytes(4, "little")
    stream = data.index(b"strh") + 8 + 32
    data[stream : stream + 4] = (444).to_bytes(4, "little")
    (tmp_path / "lies.avi").write_bytes(data)
    with av.open(str(tmp_path / "lies.avi")) as container:
        assert container.streams.video[0].frames == 444
    assert levels(read_clip(tmp_path / "lies.avi", (16, 16), 3).frames) == list(range(12))
    (tmp_path / "cut.avi").write_bytes(data[: data.index(b"movi") + 5000])
    cut = levels(read_clip(tmp_path / "cut.avi", (16, 16), 3).frames)
    assert cut == list(range(len(cut)))
    assert 2 < len(cut) < 11


def test_read_clip_of_variable_rate(tmp_path):
    """Frames at uneven times are held as long as they are shown."""
    (tmp_path / "v.mp4").write_bytes(encoded(grey(6), "mp4", "libx264", [0, 1, 2, 6, 7, 8]))
    clip = read_clip(tmp_path / "v.mp4", (16, 16), 3)
    assert len(clip.frames) == 6
    assert clip.rate == 8
    assert levels(clip.at_rate(Fraction(8)))[:9] == [0, 1, 2, 2, 2, 2, 3, 4, 5]
    animated(tmp_path / "v.gif", grey(3), [100, 300, 0])
    assert levels(read_clip(tmp_path / "v.gif", (16, 16), 3).at_rate(Fraction(10))) == [0, 1, 1, 1, 2]
    assert DecodedClip(torch.zeros(3, 1, 1, 1), [Fraction(0), Fraction(0), Fraction(1, 4)], Fraction(1)).rate == 4
    uneven = DecodedClip(
        torch.arange(3).reshape(3, 1, 1, 1), [Fraction(0), Fraction(1, 3), Fraction(1)], Fraction(4, 3)
    )
    assert uneven.at_rate(Fraction(3)).flatten().tolist() == [0, 1, 1, 2]


def test_clip_folder_cuts_clips_and_lists_the_others(tmp_path, monkeypatch):
    """Pieces of equal length at one rate; a single frame, a short and a broken clip are counted, in one line."""
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "clips"
    root.mkdir()
    (root / "a red ball.mp4").write_bytes(encoded(grey(9), "mp4", "libx264", list(range(9))))
    animated(root / "slow dog.webp", grey(5), [250] * 5)
    animated(root / "one.gif", grey(1), [60000])
    (root / "short.avi").write_bytes(encoded(grey(3), "avi", "mpeg4", list(range(3))))
    (root / "broken.mp4").write_bytes(b"no clip at all")
    (root / "notes.doc").write_bytes(b"")
    data = ClipFolder(root, frames=4, size=16, rate=8, max_unreadable=0.6, test_fraction=0)
    assert data.shape == (3, 4, 16, 16)
    assert data.images.dtype == torch.uint8
    assert data.medium == "clip"
    assert [levels(piece.transpose(0, 1)) for piece in data.images] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [0, 0, 1, 1],
        [2, 2, 3, 3],
    ]
    assert [text for [text] in data.texts] == ["a red ball"] * 2 + ["slow dog"] * 2
    assert set(data.skipped) == {"one.gif", "short.avi", "broken.mp4"}
    assert data.skipped["one.gif"] == "a single frame"
    assert data.skipped["short.avi"] == "3 frames at 8 a second, shorter than 4"
    assert "2 clips, 4 pieces of 4 frames" in data.summary
    assert "3 skipped: " in data.summary
    assert "\n" not in data.summary
    assert len(ClipFolder(root, frames=4, size=16, rate=8, stride=1, max_unreadable=0.6, test_fraction=0)) == 6 + 7
    assert len(ClipFolder(root, frames=10, size=16, rate=8, max_unreadable=1, test_fraction=0)) == 1  # it has ten
    assert ClipFolder(root, frames=4, size=16, max_unreadable=0.6).rate == 8  # the median of 8, 4 and 8
    again = {"rate": 8.0, "content_hash": data.content}
    assert data.resolved_config == again
    with pytest.raises(UserError, match=r"then 0\); put them back"):
        ClipFolder(root, frames=4, size=16, max_unreadable=0.6, content_hash="0")
    for options, expected in (
        ({}, "3 of 5 clips cannot be used, more than data.max_unreadable=0.2"),
        ({"frames": 40, "max_unreadable": 1}, "none of 5 clips can be used"),
        ({"frames": 1}, "frames=1"),
    ):
        with pytest.raises(UserError, match=expected) as caught:
            ClipFolder(root, **{"frames": 4, "size": 16, **options})
        assert "\n" not in str(caught.value)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "x.txt").write_text("")
    with pytest.raises(UserError, match=r"nothing that ends in \.mp4, \.avi, \.gif, \.\.\. among 1 files"):
        ClipFolder(tmp_path / "empty")


def test_clip_folder_splits_by_file(tmp_path, monkeypatch):
    """All pieces of a clip are in one split."""
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))
    for i in range(8):
        (tmp_path / str(i % 2)).mkdir(exist_ok=True)
        animated(tmp_path / str(i % 2) / f"{i}.gif", grey(4 + i % 3)[i % 3 :], [100] * 4)
    options = {"frames": 2, "size": 16, "test_fraction": 0.4, "rate": 10}
    train, test = (ClipFolder(tmp_path, split, **options) for split in ("train", "test"))
    assert len(train) + len(test) == 16
    assert len(train) % 2 == 0
    assert 0 < len(test) == 2 * test.held_out
    assert train.classes == ["0", "1"]
    assert set(train.labels.tolist()) <= {0, 1}
    assert train.fingerprint != test.fingerprint
