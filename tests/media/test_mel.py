"""The log-mel spectrogram and its way back."""

import math

import pytest
import torch

from ldm.media import mel
from ldm.media.stft import HOP, N_FFT, inverse_stft, stft

# librosa 0.11: filters.mel(sr=16000, n_fft=1024, n_mels=128, fmin=0, fmax=8000, dtype=float64), at the largest weights
LIBROSA = {
    **{(0, 1): 0.0285777797169, (9, 15): 0.0417653674899, (18, 28): 0.0303799104023, (27, 42): 0.0399632368046},
    **{(36, 55): 0.0321820410876, (45, 69): 0.033937039672, (54, 86): 0.0302832622617, (63, 107): 0.0228924356647},
    **{(72, 133): 0.0180210624058, (81, 165): 0.015450494604, (90, 205): 0.0124162205373, (99, 254): 0.0096948846152},
    **{(108, 316): 0.00828967397414, (117, 393): 0.00655268289222, (126, 488): 0.00539048569532},
}
LIBROSA_SUM, LIBROSA_SQUARES, LIBROSA_POSITIVE = 8.18838044060668, 0.14269633507166335, 1009


def tones(*hertz: float, amplitude: float = 0.1, length: int = 64 * HOP) -> torch.Tensor:
    """A chord (1, length) float64."""
    time = torch.arange(length, dtype=torch.float64) / mel.RATE
    return sum(amplitude * torch.sin(2 * math.pi * f * time) for f in hertz)[None]


def test_filterbank_has_librosas_weights():
    weights = mel.filterbank()
    assert weights.shape == (128, 513)
    for (band, bin_), value in LIBROSA.items():
        assert weights[band].argmax() == bin_
        assert weights[band, bin_].item() == pytest.approx(value, rel=1e-9)
    assert weights.sum().item() == pytest.approx(LIBROSA_SUM, rel=1e-12)
    assert weights.square().sum().item() == pytest.approx(LIBROSA_SQUARES, rel=1e-12)
    assert (weights > 0).sum() == LIBROSA_POSITIVE


def test_filterbank_refuses_empty_filters():
    with pytest.raises(ValueError, match="of 128 filters are empty at n_fft=256"):
        mel.filterbank(128, 256)


def test_stft_is_torchs_and_is_inverted():
    wave = torch.randn(2, 16 * HOP, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    spectrum = stft(wave)
    padded = torch.nn.functional.pad(wave, (384, 384), mode="reflect")
    window = torch.hann_window(N_FFT, dtype=torch.float64)
    expected = torch.stft(padded, N_FFT, HOP, window=window, center=False, return_complex=True)
    assert spectrum.shape == (2, 513, 16)
    torch.testing.assert_close(spectrum, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(inverse_stft(spectrum), wave, rtol=1e-10, atol=1e-10)


def test_log_mel_of_a_sine_is_its_analytic_peak():
    """A sine on bin k has |X| = (amplitude N / 4) (1/2, 1, 1/2) at k - 1, k, k + 1 under a Hann window."""
    k, amplitude = 64, 0.25
    image = mel.log_mel(tones(k * mel.RATE / N_FFT, amplitude=amplitude))
    assert image.shape == (1, 1, 128, 64)
    line = torch.zeros(513, dtype=torch.float64)
    line[k - 1 : k + 2] = amplitude * N_FFT / 4 * torch.tensor([0.5, 1, 0.5], dtype=torch.float64)
    expected = (mel.filterbank() @ line).clamp_min(1e-5).log()
    band = int(expected.argmax())
    middle = mel.to_nats(image[0, 0, :, 32])
    assert middle.argmax() == band
    assert middle[band].item() == pytest.approx(expected[band].item(), abs=1e-9)
    louder = mel.to_nats(mel.log_mel(tones(k * mel.RATE / N_FFT, amplitude=2 * amplitude)))[0, 0, band, 32]
    assert louder.item() - middle[band].item() == pytest.approx(math.log(2), abs=1e-9)  # nothing is normalised


def test_log_mel_maps_silence_to_minus_one_and_full_scale_below_one():
    assert (mel.log_mel(torch.zeros(1, 4 * HOP)) == -1).all()
    peaks = [mel.log_mel(tones(f, amplitude=1.0, length=16 * HOP)).max().item() for f in (110, 440, 3000)]
    assert max(peaks) < 1
    assert mel.to_nats(torch.tensor([-3.0, -1, 1, 3])).tolist() == pytest.approx([mel.FLOOR] * 2 + [3, 3])


def test_log_mel_is_computed_in_float32_under_autocast():
    wave = tones(440).float()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mel.log_mel(wave), mel.log_mel(wave.clone()))
        found = mel.log_mel(wave)
    assert found.dtype == torch.float32
    assert torch.equal(found, mel.log_mel(wave))


def test_griffin_lim_is_consistent_with_its_spectrogram():
    wave = tones(220, 550, 1730)
    magnitude = stft(wave).abs()

    def convergence(rounds: int, momentum: float) -> float:
        found = stft(mel.with_phase(magnitude, rounds, momentum)).abs()
        return ((found - magnitude).norm() / magnitude.norm()).item()

    assert convergence(32, 0.99) < 0.6 * convergence(32, 0.0) < 0.6 * convergence(1, 0.0)
    image = mel.log_mel(wave)
    back = mel.log_mel(mel.griffin_lim(image))
    loud = image > 0.3
    assert (mel.to_nats(back) - mel.to_nats(image))[loud].abs().mean() < 0.3
    assert torch.equal(mel.griffin_lim(image.repeat(2, 1, 1, 1))[1:], mel.griffin_lim(image))


def test_griffin_lim_keeps_silence_and_loudness():
    assert mel.griffin_lim(torch.full((1, 1, 128, 8), -1.0)).abs().max() == 0
    soft, loud = (mel.griffin_lim(mel.log_mel(tones(440, amplitude=a))).square().mean().sqrt() for a in (0.02, 0.2))
    assert (loud / soft).item() == pytest.approx(10, rel=0.1)
