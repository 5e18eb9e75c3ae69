"""Frames into files: as many, of that size, in those colours, for that long; and nothing half written."""

import sys
from types import ModuleType

import pytest
import torch
from PIL import Image

from ldm import plotting
from ldm.animate.animation import Animation, write
from ldm.errors import UserError


def frames(n: int, height: int = 6, width: int = 10):
    for k in range(n):
        frame = torch.full((height, width, 3), 255, dtype=torch.uint8)
        frame[:, k] = torch.tensor([0, 114, 178], dtype=torch.uint8)
        frame[0, :] = torch.tensor([213, 94, 0], dtype=torch.uint8)
        yield frame


def test_write_gif_contains_every_frame(tmp_path):
    said = []
    write(tmp_path / "a.gif", Animation(frames(5), 5, seconds=0.1, hold=1.0), said.append)
    assert said == [1, 2, 3, 4, 5]
    with Image.open(tmp_path / "a.gif") as file:
        assert (file.n_frames, file.size, file.info["loop"]) == (5, (10, 6), 0)
        times = []
        for k, frame in enumerate(frames(5)):
            file.seek(k)
            times.append(file.info["duration"])
            assert torch.equal(
                torch.tensor(list(file.convert("RGB").getdata()), dtype=torch.uint8).reshape(6, 10, 3), frame
            )
    assert times == [100, 100, 100, 100, 1000]


def test_write_png_is_figure_or_six_frames(tmp_path):
    write(tmp_path / "one.png", Animation(frames(1), 1))
    write(tmp_path / "film.png", Animation(frames(9), 9))
    assert Image.open(tmp_path / "one.png").size == (10, 6)
    assert Image.open(tmp_path / "film.png").size == (2 * 14 + 4, 3 * 10 + 4)


@pytest.mark.parametrize("name", ["a.jpg", "a", "a.GIF "])
def test_write_rejects_unknown_suffix_before_drawing(tmp_path, name):
    def never():
        raise AssertionError("drawn")
        yield

    with pytest.raises(UserError, match=r"expected a name that ends in \.gif, \.mp4, \.png"):
        write(tmp_path / name, Animation(never(), 1))


def test_write_mp4_names_missing_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(UserError, match=r"MP4 needs imageio with its ffmpeg"):
        write(tmp_path / "a.mp4", Animation(frames(2), 2))
    assert not list(tmp_path.iterdir())


def test_write_mp4_pads_to_even_size_and_repeats_last_frame(tmp_path, monkeypatch):
    given = {}

    def mimwrite(path, images, **options):
        given.update(options, shapes=[image.shape for image in images])
        path.write_bytes(b"film")

    imageio, ffmpeg = ModuleType("imageio"), ModuleType("imageio_ffmpeg")
    imageio.mimwrite, ffmpeg.get_ffmpeg_exe = mimwrite, lambda: "ffmpeg"
    monkeypatch.setitem(sys.modules, "imageio", imageio)
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", ffmpeg)
    write(tmp_path / "a.mp4", Animation(frames(3, 7, 11), 3, seconds=0.5, hold=2.0))
    assert given["shapes"] == [(6, 10, 3)] * 7
    assert given["fps"] == 2
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]


def test_plotting_image_is_pixel_exact():
    figure = plotting.canvas(40, 30)
    pixels = torch.linspace(-1, 1, 3 * 4 * 5).reshape(3, 4, 5)
    plotting.image(figure, pixels, 7, 9, 3)
    seen = plotting.frame(figure)
    assert seen.shape == (30, 40, 3)
    wanted = ((pixels + 1) * 127.5).round().byte().repeat_interleave(3, 1).repeat_interleave(3, 2).permute(1, 2, 0)
    assert torch.equal(seen[9 : 9 + 12, 7 : 7 + 15], wanted)
    seen[9 : 9 + 12, 7 : 7 + 15] = 255
    assert (seen == 255).all()


def test_plotting_reports_missing_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match="pictures need matplotlib"):
        plotting.canvas(10, 10)


def test_stack_rows_labels_and_spaces_images():
    rows = {
        name: torch.linspace(-1, 1, 6)[:, None, None, None].expand(6, 3, 8, 8) * sign
        for name, sign in (("up", 1), ("down", -1))
    }
    seen = plotting.frame(plotting.stack_rows(rows, 3, left=40)).float()
    assert seen.shape == (20, 40 + 3 * 8 + 2 * 2, 3)
    up, down = (seen[top + 4, [44, 54, 64], 0] / 127.5 - 1 for top in (0, 10))
    torch.testing.assert_close(up, torch.tensor([-1.0, -0.2, 0.6]), atol=0.02, rtol=0)
    torch.testing.assert_close(down, -up, atol=0.02, rtol=0)
