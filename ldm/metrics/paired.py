"""How well an autoencoder, or a task with one right answer, gives back what it was given."""

from typing import Protocol

import torch
from torch import Tensor

from ldm.metrics.distribution import FrechetDistance, Score
from ldm.metrics.features import FeatureNet


class Perceptual(Protocol):
    """What tells how alike images look: ldm.autoencoder.perceptual.LPIPS."""

    name: str

    def distance(self, a: Tensor, b: Tensor) -> Tensor: ...  # (B, C, H, W) in [-1, 1] -> (B,)


class Reconstruction:
    """`psnr` (dB, mean over images), `ssim` and, with a feature network, `rfd_<net>` of reconstructions, over all processes.

    reference: its features (N, D) of the originals (see `extract`).  perceptual: gives `lpips_<net>`, the mean over images.
    PSNR and SSIM (Wang et al. 2004) are torchmetrics', on images clipped to [-1, 1] but not quantised, with sides of at least 11 px,
    SSIM's window.
    """

    def __init__(
        self,
        net: FeatureNet | None = None,
        reference: Tensor | None = None,
        device: str | torch.device = "cpu",
        perceptual: Perceptual | None = None,
    ):
        from torchmetrics.aggregation import MeanMetric, SumMetric
        from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

        if (net is None) != (reference is None):
            raise ValueError("a feature network and its reference features go together: give both, or neither for psnr and ssim alone")
        self.count = SumMetric(nan_strategy="error").to(device)
        self.perceptual = perceptual
        self.alike = MeanMetric(nan_strategy="error").to(device).set_dtype(torch.float64)
        # per image and then averaged: the logarithm of a mean over all pixels would be ruled by the worst images
        self.psnr = PeakSignalNoiseRatio(data_range=2.0, dim=(1, 2, 3)).to(device)
        self.ssim = StructuralSimilarityIndexMeasure(data_range=2.0).to(device)
        self.score = Score(net, reference, {"fd": FrechetDistance}) if net is not None and reference is not None else None

    @torch.no_grad()
    def update(self, image: Tensor, reconstruction: Tensor) -> None:
        """Take in images and their reconstructions (B, C, H, W), floating point in [-1, 1]."""
        a, b = (x.float().clamp(-1, 1).to(self.psnr.device) for x in (reconstruction, image))
        self.psnr.update(a, b)
        self.ssim.update(a, b)
        self.count.update(float(len(a)))
        if self.perceptual is not None:
            self.alike.update(self.perceptual.distance(a, b).double())
        if self.score:
            self.score.update(reconstruction)

    def compute(self) -> dict[str, float]:
        """{key: number} over all processes. Raises ValueError for no images at all."""
        if not int(self.count.compute()):
            raise ValueError("no image was compared with its original: expected one or more; raise num")
        distances = {f"r{key}": value for key, value in self.score.compute().items() if key != "n"} if self.score else {}
        if self.perceptual is not None:
            distances[f"lpips_{self.perceptual.name}"] = self.alike.compute().item()
        return {"psnr": self.psnr.compute().item(), "ssim": torch.as_tensor(self.ssim.compute()).item()} | distances

    def reset(self) -> None:
        """Forget the images, keep the reference."""
        self.psnr.reset()
        self.ssim.reset()
        self.count.reset()
        self.alike.reset()
        if self.score:
            self.score.reset()
