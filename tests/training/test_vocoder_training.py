"""The vocoder's loss by hand, and the recipe: trained, resumed, used."""

import math

import pytest
import torch

from ldm.media import mel
from ldm.media.stft import HOP
from ldm.training.vocoder import FLOOR, RESOLUTIONS, mel_error, stft_loss, vocoder_loss


def waves(seed: int) -> torch.Tensor:
    return torch.randn(2, 16 * HOP, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) / 10


def test_stft_loss_equals_its_formula():
    wave, target = waves(0), waves(1)
    total = torch.zeros(2, dtype=torch.float64)
    for n in RESOLUTIONS:
        window, pad = torch.hann_window(n, dtype=torch.float64), (3 * n // 8, 3 * n // 8)
        found, true = (
            torch.stft(
                torch.nn.functional.pad(x, pad, mode="reflect"), n, n // 4, window=window, center=False,
                return_complex=True,
            ).abs()
            for x in (wave, target)
        )  # fmt: skip
        total += (found - true).flatten(1).norm(dim=1) / true.flatten(1).norm(dim=1)
        total += (found.clamp_min(FLOOR) / true.clamp_min(FLOOR)).log().abs().flatten(1).mean(1)
    torch.testing.assert_close(stft_loss(wave, target), total / len(RESOLUTIONS), rtol=1e-9, atol=0)


def test_losses_of_a_scaled_wave_are_the_logarithm_of_the_scale():
    target = waves(2)
    terms = vocoder_loss(2 * target, target, 3.0)
    assert terms["mel"].item() == pytest.approx(math.log(2), rel=1e-6)
    assert terms["stft"].item() == pytest.approx(1 + math.log(2), rel=1e-3)
    assert terms["loss"].item() == pytest.approx(terms["stft"].item() + 3 * terms["mel"].item())
    assert mel_error(target, target).tolist() == [0, 0]


def test_loss_of_equal_and_silent_waves_has_a_gradient():
    for target in (waves(3), torch.zeros(2, 16 * HOP, dtype=torch.float64)):
        wave = target.clone().requires_grad_()
        vocoder_loss(wave, target, 1.0)["loss"].backward()
        assert wave.grad.isfinite().all()


def test_loss_pulls_the_amplitude_towards_the_target():
    """The phase is another one, which no term may depend on."""
    time = torch.arange(16 * HOP, dtype=torch.float64) / mel.RATE
    target = 0.2 * torch.sin(2 * math.pi * 500 * time)[None]
    for start, sign in ((0.05, -1), (0.4, 1)):
        amplitude = torch.tensor(start, dtype=torch.float64, requires_grad=True)
        vocoder_loss(amplitude * torch.sin(2 * math.pi * 500 * time + 1)[None], target, 1.0)["loss"].backward()
        assert amplitude.grad.sign() == sign
