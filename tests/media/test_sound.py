"""What a sound is to a person: a WAV file and a picture of its spectrogram."""

import math
import wave

import pytest
import soundfile
import torch
from PIL import Image

from ldm.media import sound
from ldm.media.medium import load_medium
from ldm.media.mel import RATE, griffin_lim, log_mel
from ldm.media.stft import HOP


def tone(hertz: float, amplitude: float = 0.1) -> torch.Tensor:
    """The spectrogram (1, 128, 16) of a sine."""
    time = torch.arange(16 * HOP) / RATE
    return log_mel(amplitude * torch.sin(2 * math.pi * hertz * time)[None])[0]


def test_write_gives_wav_and_picture_with_metadata(tmp_path):
    sample = tone(440)
    paths = load_medium("sound").write(tmp_path / "000001", sample, {"prompt": "a tone"})
    assert [path.name for path in paths] == ["000001.wav", "000001.png"]
    samples, rate = soundfile.read(paths[0], dtype="int16")
    assert rate == 16_000
    expected = (griffin_lim(sample[None])[0] * 2**15).round()
    assert torch.equal(torch.from_numpy(samples).float(), expected)
    with Image.open(paths[1]) as picture:
        assert picture.size == (16 + 2 * sound.GAP, 128 + 2 * sound.GAP)
        assert picture.text["prompt"] == "a tone"


def test_write_uses_the_vocoder_and_clips_at_full_scale(tmp_path):
    samples = torch.tensor([0.0, 0.5, 1.0, 1.5, -1.0, -2.0, 0.25, 1 / 2**15])

    def vocoder(image):
        assert image.shape == (1, 1, 128, 16)
        assert image.abs().max() <= 1
        return samples[None]

    sound.write(tmp_path / "x", 3 * tone(440), {}, vocoder)
    with wave.open(str(tmp_path / "x.wav")) as file:
        assert file.getparams()[:4] == (1, 2, 16_000, 8)
        content = torch.frombuffer(bytearray(file.readframes(8)), dtype=torch.int16)
    assert content.tolist() == [0, 16384, 32767, 32767, -32768, -32768, 8192, 1]


def test_sheet_has_low_frequencies_at_the_bottom():
    sheet = sound.sheet([tone(200), tone(5_000), torch.full((1, 128, 16), -1.0)], 2)
    assert sheet.shape == (3, 2 * 128 + 12, 2 * 16 + 12)
    assert -1 <= sheet.min() < sheet.max() <= 1
    low, high, silent = (sheet[:, r : r + 128, c : c + 16].mean((0, 2)) for r, c in ((4, 4), (4, 24), (136, 4)))
    assert low.argmax() > 100
    assert high.argmax() < 40
    assert silent.max() == silent.min() < low.min() + 1e-2


@pytest.mark.parametrize(("shape", "is_sound"), [((1, 128, 64), True), ((1, 64, 64), False), ((3, 128, 64), False)])
def test_fault_names_shapes_that_are_no_sounds(shape, is_sound):
    assert (load_medium("sound").fault(shape) == "") == is_sound
