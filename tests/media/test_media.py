"""Media: files and sheets of images, clips and fields against decoders of others, closed forms and counts."""

import io
import itertools
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from ldm.errors import UserError
from ldm.io import atomic
from ldm.io.images import encode_png, make_grid, to_uint8
from ldm.media import clip, field, files, image
from ldm.media.medium import available_media, load_medium

SCOPE = "def write(stem, sample, metadata): ...\n\n\ndef sheet(samples, columns): ...\n"
TEXT = {"prompt": "a wave", "reproduce": '{"row": 3}'}


def picture(path):
    """Return the pixels (C, H, W) uint8 and the metadata of a PNG."""
    with Image.open(path) as file:
        file.load()
        pixels = torch.from_numpy(np.array(file))
        return (pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)), file.text


def smooth_clip(channels=3, frames=6, height=32, width=48):
    """Return a clip (C, F, H, W) in [-1, 1] of smooth colours that move."""
    x = torch.linspace(0, 3, width).expand(height, -1) + torch.linspace(0, 2, height)[:, None]
    return torch.stack([torch.stack([(x + 0.3 * f + c).sin() for f in range(frames)]) for c in range(channels)]).clamp(
        -1, 1
    )


def decode_mp4(data):
    """Return frames (F, 3, H, W) and their times in seconds, by decoding all."""
    with av.open(io.BytesIO(data)) as container:
        decoded = list(container.decode(video=0))
    frames = torch.stack([torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in decoded])
    return frames.permute(0, 3, 1, 2), [frame.time for frame in decoded]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_image_is_the_png_of_its_pixels_and_its_sheet_their_grid(tmp_path, channels):
    sample = torch.rand(channels, 5, 7) * 2.4 - 1.2
    (path,) = image.write(tmp_path / "000003", sample, TEXT)
    assert path.name == "000003.png"
    assert path.read_bytes() == encode_png(to_uint8(sample), TEXT)
    samples = torch.rand(5, channels, 5, 7) * 2 - 1
    assert torch.equal(to_uint8(image.sheet(list(samples), 2)), make_grid(to_uint8(samples), 2, zoom=2))
    assert not image.fault((channels, 5, 7))
    assert image.fault((2, 5, 7))


@pytest.mark.parametrize(("rate", "side"), [(Fraction(8), 33), (Fraction("29.97"), 32)], ids=str)
def test_mp4_has_every_frame_at_its_time_and_colours_within_h264(rate, side):
    frames = clip.to_frames(smooth_clip(frames=6, height=side, width=47))
    decoded, times = decode_mp4(clip.encode_mp4(frames, rate))
    assert decoded.shape == (6, 3, side + side % 2, 48)  # also the last: the encoder holds all of a short clip back
    assert times == pytest.approx([float(k / rate) for k in range(6)], abs=2e-3)
    difference = (decoded[:, :, :side, :47].float() - frames).abs()
    assert difference.mean() < 4  # a channel swapped or a frame out of order is off by 30 and more
    assert (frames[0].float() - frames[1]).abs().mean() > 12
    with av.open(io.BytesIO(clip.encode_mp4(frames, rate))) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")


@pytest.mark.parametrize("rate", [8, 12, 24, 30, 60])
def test_durations_of_a_gif_add_up_to_the_clip_at_every_frame(rate):
    ends = list(itertools.accumulate(clip.frame_durations(60, Fraction(rate))))
    assert all(abs(end - 1000 * k / rate) <= 5 for k, end in enumerate(ends, 1))
    assert all(end % 10 == 0 for end in ends)
    assert sorted(clip.frame_durations(3, Fraction(30))) == [30, 30, 40]


def test_gif_lasts_as_long_as_the_clip_when_pillow_merges_equal_frames():
    moving, still = torch.zeros(2, 8, 3, 8, 8, dtype=torch.uint8)
    moving += torch.arange(8, dtype=torch.uint8)[:, None, None, None] * 30
    for frames, kept in ((moving, 8), (still, 1)):
        with Image.open(io.BytesIO(clip.encode_gif(frames, Fraction(8)))) as gif:
            durations = [frame.info["duration"] for frame in ImageSequence.Iterator(gif)]
        assert len(durations) == kept
        assert sum(durations) == 1000
    with Image.open(io.BytesIO(clip.encode_gif(moving, Fraction(8)))) as gif:
        read = [np.array(frame.convert("RGB")) for frame in ImageSequence.Iterator(gif)]
    assert [pixels[0, 0, 0] for pixels in read] == [30 * k for k in range(8)]


def test_clip_writes_mp4_gif_and_a_contact_sheet_with_the_record(tmp_path):
    sample = smooth_clip(channels=1, frames=16)
    written = clip.write(tmp_path / "000003", sample, {**TEXT, "rate": "16"})
    assert [path.name for path in written] == ["000003.mp4", "000003.gif", "000003.png"]
    pixels, text = picture(written[-1])
    assert text == {**TEXT, "rate": "16"}
    assert torch.equal(pixels, to_uint8(clip.sheet([sample], 1)))
    frames, times = decode_mp4(written[0].read_bytes())
    assert len(frames) == 16
    assert times[-1] == pytest.approx(15 / 16, abs=2e-3)
    with Image.open(written[1]) as gif:
        assert sum(frame.info["duration"] for frame in ImageSequence.Iterator(gif)) == 1000


def test_clip_of_one_frame_and_one_pixel_is_written(tmp_path):
    mp4, gif, _ = clip.write(tmp_path / "a", torch.ones(1, 1, 1, 1), {})
    frames, _ = decode_mp4(mp4.read_bytes())
    assert frames.shape == (1, 3, 2, 2)
    assert frames.min() > 250
    with Image.open(gif) as picture:
        assert (picture.size, picture.n_frames) == ((1, 1), 1)


def test_clip_without_its_package_is_one_line(monkeypatch):
    monkeypatch.delitem(sys.modules, "ldm.media.clip")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"^medium=clip needs the package av: pip install -e '\.\[video\]'$"):
        load_medium("clip")


def test_contact_sheet_has_a_row_for_each_clip_from_its_first_frame_to_its_last():
    clips = [smooth_clip(frames=20, height=10, width=12), -smooth_clip(frames=20, height=10, width=12)]
    sheet = to_uint8(clip.sheet(clips, 1))
    assert sheet.shape == (3, 2 + 2 * 12, 2 + 8 * 14)
    for row, sample in enumerate(clips):
        frames = clip.to_frames(sample)
        for column, frame in ((0, 0), (7, 19)):
            top, left = 2 + 12 * row, 2 + 14 * column
            assert torch.equal(sheet[:, top : top + 10, left : left + 12], frames[frame])
    one_frame = clip.sheet([clips[0][:, :1]], 1)
    assert one_frame.shape == (3, 14, 16)
    assert not clip.fault((3, 8, 32, 32))
    assert clip.fault((3, 32, 32))
    assert clip.fault((2, 8, 32, 32))


def test_spectrum_of_a_sine_is_at_its_wavenumber_and_adds_up_to_the_mean_square():
    x = torch.arange(64) * 2 * torch.pi / 64
    power = field.power_spectrum(torch.stack([0.5 + 3 * (5 * x).sin(), (32 * x).cos()]))
    expected = torch.zeros(2, 33, dtype=torch.float64)
    expected[0, 0], expected[0, 5], expected[1, 32] = 0.25, 4.5, 1
    torch.testing.assert_close(power, expected, rtol=0, atol=1e-5)
    noise = torch.randn(2, 7, 63, dtype=torch.float64)
    torch.testing.assert_close(field.power_spectrum(noise).sum(1), noise.square().mean((1, 2)))


def test_field_keeps_its_numbers_and_is_drawn_on_one_scale(tmp_path):
    sample = 7 * torch.randn(2, 3, 8)
    array, drawn = field.write(tmp_path / "000003", sample, TEXT)
    with np.load(array) as stored:
        assert torch.equal(torch.from_numpy(stored["field"]), sample)
        assert torch.equal(torch.from_numpy(stored["spectrum"]), field.power_spectrum(sample))
    pixels, text = picture(drawn)
    assert text == TEXT
    assert torch.equal(pixels, to_uint8(field.sheet([sample], 1)))
    strip = to_uint8(field.sheet([torch.tensor([[[-1.0, 0.0, 1.0]]])], 1))[:, 10, [10, 150, 250]].int()
    assert strip[2, 0] > strip[0, 0] + 50  # -1 is blue
    assert (strip[:, 1] > 240).all()  # 0 is white
    assert strip[0, 2] > strip[2, 2] + 50  # 1 is red
    both = to_uint8(field.sheet([torch.full((1, 3, 3), 2.0), torch.full((1, 3, 3), 1.0)], 2))
    assert torch.equal(both[:, 10, 10], strip[:, 2].byte())
    assert not torch.equal(both[:, 10, 10], both[:, 10, 210])


def test_graph_of_a_field_is_dark_where_its_values_are():
    ramp = torch.linspace(-1, 1, 96)[None]
    dark = (to_uint8(field.sheet([ramp], 1))[0] < 128).float()[4:100, 4:100]
    rows = (dark * torch.arange(96.0)[:, None]).sum(0) / dark.sum(0)
    torch.testing.assert_close(rows, torch.linspace(95, 0, 96), rtol=0, atol=1.0)
    with pytest.raises(
        UserError, match=r"^field: 2 values are not finite; the model that generated them has diverged$"
    ):
        field.sheet([torch.tensor([[1.0, float("nan"), float("inf")]])], 1)
    assert [bool(field.fault(shape)) for shape in ((1, 8), (2, 8, 8), (1, 2, 8, 8))] == [False, False, True]


def test_files_of_a_sample_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    def full(path, data):
        if path.suffix == ".png":
            raise OSError(28, "No space left on device")
        path.write_bytes(data)

    white = torch.ones(3, 4, 4)
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "write_bytes", full)
        with pytest.raises(OSError, match="No space"):
            files.write_sample(tmp_path / "000001", {".wav": b"a"}, white, {})
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="NaN"):
        files.write_sample(tmp_path / "000001", {".wav": b"a"}, white * float("nan"), {})
    assert not list(tmp_path.iterdir())
    written = files.write_sample(tmp_path / "000001", {".wav": b"a", ".smi": b"C<C"}, white, {})
    (tmp_path / "000001-again").mkdir()
    assert sorted(files.sample_files(tmp_path / "000001.png")) == sorted(written)
    assert files.sample_files(tmp_path / "000001.png")[-1] == written[-1]
    html = files.player_html([tmp_path / "a.mp4", *written], lambda path: f'file={path.name}&"')
    assert html.count("<video controls") == html.count("<audio controls") == 1
    assert 'src="file=000001.wav&amp;&quot;"' in html
    assert "<code>C&lt;C</code>" in html
    assert "<img" not in html


def test_load_medium_names_the_media_and_takes_modules_of_ones_own(tmp_path, monkeypatch):
    assert {"image", "clip", "field"} <= set(available_media())
    assert not {"files", "medium"} & set(available_media())
    assert load_medium("field").is_picture
    assert not load_medium("clip").is_picture
    expected = (
        r"^medium=files: expected atoms, clip, .*image.*, or the dotted name of a module of your own with the functions"
    )
    with pytest.raises(UserError, match=expected):
        load_medium("files")
    with pytest.raises(UserError, match=r"^medium=no_such\.scope: expected"):
        load_medium("no_such.scope")
    (tmp_path / "our_scope.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "our_lab").mkdir()
    (tmp_path / "our_lab" / "scope.py").write_text(
        "def write(stem, sample, metadata): ...\ndef sheet(samples, columns): ...\n"
    )
    own = load_medium("our_lab.scope")
    assert (own.fault((9, 9)), own.is_picture) == ("", False)
