"""Own sounds: every file becomes the right excerpts, or is skipped and counted."""

import struct
import wave as wave_files

import numpy as np
import pytest
import soundfile
import torch

from ldm.data.sounds import SoundFolder, load_wave
from ldm.errors import UserError
from ldm.media.mel import RATE, log_mel


def tone(rate: int, seconds: float = 1.0, hertz: float = 440, amplitude: float = 0.25) -> np.ndarray:
    return amplitude * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(
    ("name", "rate", "subtype"),
    [
        ("a.wav", 8_000, "PCM_16"),
        ("a.wav", 44_100, "PCM_24"),
        ("a.wav", 48_000, "FLOAT"),
        ("a.flac", 22_050, "PCM_16"),
        ("a.ogg", 16_000, "VORBIS"),
        ("a.mp3", 32_000, "MPEG_LAYER_III"),
    ],
)
def test_load_wave_has_one_rate_whatever_the_files(name, rate, subtype, tmp_path):
    """The left channel is the tone, the right one silence: their mean has half its amplitude."""
    left = tone(rate)
    soundfile.write(tmp_path / name, np.stack([left, 0 * left], 1), rate, subtype)
    wave = load_wave(tmp_path / name)
    assert wave.dtype == torch.float32
    assert abs(len(wave) - RATE) <= (0 if name != "a.mp3" else 4_000)  # an MP3 has whole frames
    middle = wave[4_000:12_000].double()
    assert middle.abs().max().item() == pytest.approx(0.125, rel=0.05)
    power = torch.fft.rfft(middle * torch.hann_window(8_000, dtype=torch.float64)).abs()
    assert int(power.argmax()) * RATE / 8_000 == 440


def test_load_wave_has_no_aliases(tmp_path):
    """At 48 kHz, a tone of 11 kHz lies above what 16 kHz can hold: it vanishes and does not turn up at 5 kHz."""
    soundfile.write(tmp_path / "a.wav", tone(48_000, hertz=11_000), 48_000)
    assert load_wave(tmp_path / "a.wav")[1_000:-1_000].abs().max() < 1e-3


def damage(path, kind: str) -> None:
    """Write a file that cannot be used."""
    soundfile.write(path, tone(RATE), RATE, "PCM_16", format="WAV")
    content = path.read_bytes()
    if kind == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "no sound":
        path.write_bytes(b"this is a text" * 10)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "no samples":
        soundfile.write(path, np.zeros(0), RATE)
    elif kind == "silent":
        soundfile.write(path, np.zeros(RATE), RATE)
    elif kind == "not finite":
        soundfile.write(path, np.full(RATE, np.nan, np.float32), RATE, "FLOAT")


@pytest.mark.parametrize("kind", ["truncated", "no sound", "empty", "no samples", "silent", "not finite"])
def test_unusable_file_is_skipped_and_counted(kind, tmp_path):
    for i in range(3):
        soundfile.write(tmp_path / f"good {'abc'[i]}.wav", tone(RATE), RATE)
    damage(tmp_path / "bad.wav", kind)
    data = SoundFolder(tmp_path, seconds=0.512, test_fraction=0, max_unreadable=0.5)
    assert len(data) == 3  # of a second each, one excerpt of about half a second
    assert list(data.skipped) == ["bad.wav"]
    assert "1 skipped: bad.wav" in data.summary
    assert "\n" not in data.skipped["bad.wav"]
    assert SoundFolder(tmp_path, seconds=0.512, test_fraction=0, max_unreadable=0.5).summary == data.summary  # cached
    with pytest.raises(UserError, match=r"1 of 4 sounds cannot be used, more than data.max_unreadable=0.1: bad.wav"):
        SoundFolder(tmp_path, seconds=0.512, max_unreadable=0.1)


def test_streamed_header_of_unknown_length_is_read(tmp_path):
    """Programs that write to a pipe leave 0xFFFFFFFF as the size."""
    soundfile.write(tmp_path / "a.wav", tone(RATE), RATE)
    content = bytearray((tmp_path / "a.wav").read_bytes())
    content[4:8] = content[40:44] = struct.pack("<I", 0xFFFFFFFF)
    (tmp_path / "a.wav").write_bytes(content)
    assert len(load_wave(tmp_path / "a.wav")) == RATE


def test_folder_is_cut_into_excerpts_with_their_files_captions(tmp_path):
    """Written by Python's own module, so that reading is compared with other code than soundfile's."""
    long = np.concatenate([tone(RATE, 1.024, 200 * (k + 1)) for k in range(3)] + [tone(RATE, 0.3)])
    long[16_384 : 2 * 16_384] = 0  # the second of three is silent
    for name, samples in (("low hum.wav", long), ("click_2.wav", tone(RATE, 0.1))):
        with wave_files.open(str(tmp_path / name), "wb") as file:
            file.setparams((1, 2, RATE, 0, "NONE", ""))
            file.writeframes(np.round(samples * 32768).astype("<i2").tobytes())
    data = SoundFolder(tmp_path, test_fraction=0)
    assert (data.medium, data.shape, len(data)) == ("sound", (1, 128, 64), 3)
    batch = data.batch([(0, i) for i in range(3)])
    assert batch["caption"] == ["click", "low hum", "low hum"]
    expected = torch.from_numpy(np.round(long * 32768) / 32768).float()
    assert torch.equal(batch["wave"][1:], expected[: 3 * 16_384].reshape(3, -1)[[0, 2]])
    assert torch.equal(batch["image"], log_mel(batch["wave"]))
    assert torch.equal(batch["image"], data.pixels([0, 1, 2]))
    assert batch["wave"][0, :1_600].abs().max() > 0.2
    assert batch["wave"][0, 1_600:].abs().max() == 0
    assert (batch["image"][0, 0, :, 10:] == -1).all()
    for remark in ("2 sounds", "3 excerpts of 1.024 s", "1 followed by silence: click_2.wav", "1 silent excerpts"):
        assert remark in data.summary
    (tmp_path / "low hum.txt").write_text("a hum")
    assert SoundFolder(tmp_path, test_fraction=0).content != data.content
    with pytest.raises(UserError, match=r"are not those of this run"):
        SoundFolder(tmp_path, content_hash=data.content)


def test_folder_refuses_bad_options(tmp_path):
    with pytest.raises(UserError, match=r"nothing that ends in .wav"):
        SoundFolder(tmp_path)
    soundfile.write(tmp_path / "a.wav", tone(RATE), RATE)
    with pytest.raises(UserError, match=r"seconds=1.0: expected a multiple of 0.016"):
        SoundFolder(tmp_path, seconds=1.0)
    soundfile.write(tmp_path / "a.wav", 0 * tone(RATE), RATE)
    with pytest.raises(UserError, match=r"none of 1 sounds can be used; a.wav: silent"):
        SoundFolder(tmp_path)


def test_without_the_extra_one_line_names_it(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "a.wav", tone(RATE), RATE)
    monkeypatch.setitem(__import__("sys").modules, "soxr", None)
    with pytest.raises(UserError, match=r"data=sounds needs the package soxr: pip install -e '.\[audio\]'"):
        SoundFolder(tmp_path)
