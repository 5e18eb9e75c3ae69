"""Which frames of a sound are drawn anew, and what is read from a sound file."""

import pytest
import torch

from ldm.data.waves import to_int16
from ldm.errors import ConfigError, UserError
from ldm.media.mel import log_mel
from ldm.media.sound import encode_wav
from ldm.sampling import sounds
from ldm.sampling.inputs import InputSpec
from ldm.sampling.sounds import fill_sound, sound_input


@pytest.mark.parametrize(
    ("start", "end", "first", "last"),
    [
        (0.5, None, 31, 63),  # 0.5 s is within frame 31
        (0.512, None, 32, 63),  # frame 32 begins there
        (0.032, 0.064, 2, 3),
        (0.0, 0.065, 0, 4),
        (0.4, 1.024, 25, 63),
    ],
)
def test_fill_sound_draws_the_frames_within(start, end, first, last, monkeypatch):
    monkeypatch.setattr(sounds, "inpaint", lambda model, batch, noise, ts: batch["mask"])
    mask = fill_sound(None, {"image": torch.zeros(2, 1, 128, 64)}, None, None, start, end)
    assert mask.shape == (2, 1, 128, 64)
    expected = torch.zeros(64)
    expected[first : last + 1] = 1
    assert torch.equal(mask, expected.expand(2, 1, 128, 64))


@pytest.mark.parametrize(("start", "end"), [(-0.1, None), (0.5, 0.5), (0.5, 0.4), (0.5, 1.1), (1.024, None), (0, None)])
def test_fill_sound_refuses_times_outside(start, end):
    with pytest.raises(ConfigError, match=f"start={start} end={'null' if end is None else end}: "):
        fill_sound(None, {"image": torch.zeros(1, 1, 128, 64)}, None, None, start, end)


def test_sound_input_reads_the_beginning_as_spectrogram(tmp_path):
    wave = 0.3 * torch.sin(torch.arange(6_000) * 0.2)
    (tmp_path / "a.wav").write_bytes(encode_wav(wave))
    reader = sound_input(InputSpec((128, 16), 1), str(tmp_path / "a.wav"))
    expected = to_int16(wave[:4_096]).float()[None] / 2**15
    torch.testing.assert_close(reader([0, 5]), log_mel(expected).expand(2, -1, -1, -1))
    with pytest.raises(UserError, match="this model does not draw sounds"):
        sound_input(InputSpec((32, 32), 3), str(tmp_path / "a.wav"))
    with pytest.raises(UserError, match=r"image=.*: no such file or folder"):
        sound_input(InputSpec((128, 16), 1), str(tmp_path / "b.wav"))
