"""Compare images with their originals: reconstructions, or a task with one correct answer."""

import math
from typing import Any, Protocol

import torch
from torch import Tensor

from ldm.errors import ConfigError
from ldm.metrics.distribution import FrechetDistance, MetricSuite
from ldm.metrics.features import FeatureNet
from ldm.tensors import frames


class Perceptual(Protocol):
    """A perceptual distance between images, such as ldm.autoencoder.perceptual.LPIPS."""

    name: str

    def distance(self, a: Tensor, b: Tensor) -> Tensor: ...  # (B, C, H, W) in [-1, 1] -> (B,)


class Reconstruction:
    """`psnr` (dB, mean over images), `ssim` and, with a feature network, `rfd_<net>` of reconstructions.

    All are computed over all processes.
    net, reference: feature network, and its features (N, D) of the originals (see `extract`).
    perceptual: adds `lpips_<name>`, the mean over images.
    PSNR and SSIM (Wang et al. 2004) are torchmetrics', on images clipped to [-1, 1] but not quantised, with sides of at
    least 11 px, SSIM's window.  Of a clip, SSIM is of its frames; samples with one side have none.
    """

    def __init__(
        self,
        net: FeatureNet | None = None,
        reference: Tensor | None = None,
        device: str | torch.device = "cpu",
        perceptual: Perceptual | None = None,
    ):
        from torchmetrics.aggregation import MeanMetric

        if (net is None) != (reference is None):
            raise ValueError(
                "a feature network and its reference features belong together: give both, "
                "or neither for psnr and ssim alone"
            )
        self.device, self.perceptual = torch.device(device), perceptual
        # per image, then averaged: the logarithm of a mean over all pixels would be dominated by the worst images
        names = ("psnr", "ssim", *([f"lpips_{perceptual.name}"] if perceptual else []))
        self.means = {name: MeanMetric(nan_strategy="error").to(device).set_dtype(torch.float64) for name in names}
        self.score = (
            MetricSuite(net, reference, {"fd": FrechetDistance}) if net is not None and reference is not None else None
        )

    @torch.no_grad()
    def update(self, image: Tensor, reconstruction: Tensor) -> None:
        """Add images and their reconstructions (B, C, H, W), or other samples, floating point in [-1, 1]."""
        from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

        a, b = (x.float().clamp(-1, 1).to(self.device) for x in (reconstruction, image))
        sides = tuple(range(1, a.ndim))
        values: dict[str, Any] = {"psnr": peak_signal_noise_ratio(a, b, data_range=2.0, dim=sides, reduction="none")}
        if a.ndim > 3:
            similarity = structural_similarity_index_measure(frames(a), frames(b), data_range=2.0, reduction="none")
            values["ssim"] = similarity
        if self.perceptual:
            values[f"lpips_{self.perceptual.name}"] = self.perceptual.distance(a, b)
        for name, value in values.items():
            self.means[name].update(torch.as_tensor(value).double())
        if self.score:
            self.score.update(reconstruction)

    def compute(self) -> dict[str, float]:
        """Return {key: number} over all processes. Raises ConfigError without images."""
        numbers = {
            name: mean.compute().item() for name, mean in self.means.items() if mean.update_called or name == "psnr"
        }
        if math.isnan(numbers["psnr"]):  # 0 / 0
            raise ConfigError("no image was compared with its original: expected at least one; raise num")
        return numbers | (
            {f"r{key}": value for key, value in self.score.compute().items() if key != "n"} if self.score else {}
        )

    def reset(self) -> None:
        """Drop the images and keep the reference."""
        for mean in self.means.values():
            mean.reset()
        if self.score:
            self.score.reset()
