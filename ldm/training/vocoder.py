"""The training step of a vocoder: the waves of spectrograms against the sounds that they were computed from."""

from collections.abc import Callable, Iterable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from ldm.media.mel import log_mel, to_nats
from ldm.media.stft import stft
from ldm.tensors import at_least_float32

RESOLUTIONS = (512, 1024, 2048)  # samples of a frame; frames are a quarter of it apart
FLOOR = 1e-3  # magnitude from which on logarithms are compared; the rounding to 16 bits has 2e-4


class LitVocoder(L.LightningModule):
    """stft_loss of net(image) and a batch's wave, and mel_weight times their log-mel error, averaged over the samples.

    net: log-mel spectrograms (B, 1, BANDS, T) in [-1, 1] -> waves (B, HOP T).
    """

    has_unused_parameters = False

    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer],
        mel_weight: float = 1.0,
    ):
        super().__init__()
        self.net, self.optimizer, self.mel_weight = net, optimizer, mel_weight

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        return vocoder_loss(self.net(batch["image"]), batch["wave"], self.mel_weight)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the network, with the arguments of nn.Module.compile."""
        self.net.compile(*args, **kwargs)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters())


def vocoder_loss(wave: Tensor, target: Tensor, mel_weight: float) -> dict[str, Tensor]:
    """Compute loss (), stft () and mel (), in nats, of waves (B, L) against their targets."""
    with torch.autocast(wave.device.type, enabled=False):
        wave = wave.to(at_least_float32(wave.dtype))
        spectral, mel = stft_loss(wave, target.to(wave)).mean(), mel_error(wave, target.to(wave)).mean()
        return {"loss": spectral + mel_weight * mel, "stft": spectral.detach(), "mel": mel.detach()}


def stft_loss(wave: Tensor, target: Tensor) -> Tensor:
    """Compute the multi-resolution spectral error (B,) of waves (B, L) (Yamamoto et al. 2020, eq. 3 to 6).

    At each resolution, spectral convergence plus the mean absolute error of the logarithm of the magnitudes.
    """
    errors = []
    for n_fft in RESOLUTIONS:
        found, true = (stft(x, n_fft, n_fft // 4).abs() for x in (wave, target))
        distance = (found - true).square().sum((1, 2)).add(1e-12).sqrt()  # at 0 a root has no derivative
        convergence = distance / true.square().sum((1, 2)).sqrt().clamp_min(FLOOR)
        logarithm = (found.clamp_min(FLOOR).log() - true.clamp_min(FLOOR).log()).abs().mean((1, 2))
        errors.append(convergence + logarithm)
    return torch.stack(errors).mean(0)


def mel_error(wave: Tensor, target: Tensor) -> Tensor:
    """Compute the mean absolute error (B,) in nats between the log-mel spectrograms of waves (B, L)."""
    found, true = to_nats(log_mel(wave)), to_nats(log_mel(target))
    return (found - true).abs().mean((1, 2, 3))
