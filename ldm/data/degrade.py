"""Degrade images: the low-resolution images and masks that super-resolution and inpainting are conditioned on."""

import io
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from ldm.data.masks import Mask, randint, uniform
from ldm.data.wrapper import WrappedDataset
from ldm.errors import ConfigError

Shrink = Callable[[Tensor, Generator], Tensor]  # (C, H, W) in [-1, 1], generator -> (C, h, w) in [-1, 1]
JPEG_MODES = {1: "L", 3: "RGB"}
RESIZES = ("bilinear", "bicubic", "area")


class DegradedDataset(WrappedDataset):
    """A data set with degraded images and masks added to its batches.

    low_res: creates low_res (B, C, H / factor, W / factor) in [-1, 1].  mask: creates mask (B, 1, H, W), 1 = to be
    generated. None leaves one out. Both depend on (seed, epoch, index) alone; low_res is computed from
    the image as it is in the batch, flipped or not. Everything else is the data set's.
    Raises ConfigError for data that are no images.
    """

    def __init__(self, dataset, low_res: Shrink | None = None, mask: Mask | None = None, seed: int = 0):
        if len(dataset.shape) != 3:
            raise ConfigError(f"degradation: samples of shape {tuple(dataset.shape)} are no images; leave it out")
        super().__init__(dataset)
        self.low_res, self.mask, self.seed = low_res, mask, seed

    def batch(self, samples: Sequence[tuple[int, int]]) -> dict:
        """Return the samples, (epoch, index) pairs, as the data set gives them, with low_res and mask."""
        batch = self.dataset.batch(samples)
        image = batch["image"]
        if self.low_res is not None:
            draws = (self.generator("low_res", *sample) for sample in samples)
            batch["low_res"] = torch.stack([self.low_res(x, draw) for x, draw in zip(image, draws, strict=True)])
        if self.mask is not None:
            batch["mask"] = torch.stack(
                [self.mask(tuple(image.shape[-2:]), self.generator("mask", *sample)) for sample in samples]
            )
        return batch

    def batch_metadata(self, samples: Sequence[tuple[int, int]]) -> dict:
        """Return a batch without its images, including low_res and mask."""
        return {name: value for name, value in self.batch(samples).items() if name != "image"}


def identity(dataset):
    """Return the data set unchanged."""
    return dataset


def bicubic(image: Tensor, draw: Generator, factor: int = 4) -> Tensor:
    """Downscale an image by `factor` with antialiasing. Raises ConfigError for a size that `factor` does not divide."""
    return resize(image, reduced_size(image, factor), "bicubic").clamp(-1, 1)


def bsr(
    image: Tensor,
    draw: Generator,
    factor: int = 4,
    blur: Sequence[float] = (0.2, 1.5),
    noise: Sequence[float] = (0.0, 0.1),
    quality: Sequence[int] = (40, 95),
) -> Tensor:
    """Blur, downscale, add noise to and JPEG-compress an image, in random order and by random amounts.

    blur: range of standard deviations, in pixels of the result.
    noise: range of standard deviations, for values in [-1, 1].
    quality: range of the JPEG quality.  Raises ConfigError as `bicubic` does, and unless there are 1 or 3 channels.
    After Zhang et al. 2021 (BSRGAN), section 3, without camera noise; LDM section 4.4 trains on it.
    """
    size = reduced_size(image, factor)
    if len(image) not in JPEG_MODES:
        raise ConfigError(f"degradation: JPEG takes images of 1 or 3 channels, these have {len(image)}; use bicubic_x4")

    def blurred(x: Tensor) -> Tensor:
        scale = x.shape[-1] / size[1]
        return F.conv2d(
            *_kernel(x, [uniform(draw, *blur) * scale for _ in range(2)], uniform(draw, 0, math.pi)), groups=x.shape[0]
        )[0]

    def smaller(x: Tensor) -> Tensor:
        part = uniform(draw, 1 / factor, 1)
        return resize(
            x,
            [max(minimum, round(part * side)) for minimum, side in zip(size, x.shape[-2:], strict=True)],
            RESIZES[randint(draw, 0, 2)],
        )

    def noisy(x: Tensor) -> Tensor:
        return x + uniform(draw, *noise) * torch.randn(x.shape, generator=draw)

    def compressed(x: Tensor) -> Tensor:
        return jpeg(x, randint(draw, *quality))

    steps = (blurred, smaller, noisy, compressed)
    for step in torch.randperm(len(steps), generator=draw).tolist():
        image = steps[step](image)
    return resize(image, size, "bicubic").clamp(-1, 1)


def reduced_size(image: Tensor, factor: int) -> tuple[int, int]:
    """Return height and width divided by `factor`. Raises ConfigError if it does not divide them."""
    height, width = image.shape[-2:]
    if height % factor or width % factor:
        raise ConfigError(
            f"factor={factor} does not divide the image's {height}x{width} pixels; choose another size or factor"
        )
    return height // factor, width // factor


def resize(image: Tensor, size: Sequence[int], mode: str) -> Tensor:
    """Resize an image (C, H, W); mode: bilinear or bicubic, both with antialiasing, or area."""
    options = {} if mode == "area" else {"antialias": True, "align_corners": False}
    return F.interpolate(image[None], tuple(size), mode=mode, **options)[0]


def jpeg(image: Tensor, quality: int) -> Tensor:
    """Compress an image (1 or 3, H, W) in [-1, 1] as JPEG and decode it."""
    from PIL import Image

    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if len(image) == 1 else pixels, JPEG_MODES[len(image)]).save(
        buffer, "jpeg", quality=quality
    )
    back = torch.from_numpy(np.array(Image.open(buffer))).reshape(*image.shape[1:], len(image))
    return back.permute(2, 0, 1).float() / 127.5 - 1


def _kernel(image: Tensor, sigma: Sequence[float], angle: float) -> tuple[Tensor, Tensor]:
    """Return the padded image and the kernels (C, 1, k, k) of an anisotropic Gaussian blur, rotated by `angle`."""
    reach = min(math.ceil(3 * max(sigma)), *(side - 1 for side in image.shape[-2:]))
    axis = torch.arange(-reach, reach + 1.0)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    u, v = math.cos(angle) * x + math.sin(angle) * y, math.cos(angle) * y - math.sin(angle) * x
    kernel = torch.exp(-0.5 * ((u / sigma[0]) ** 2 + (v / sigma[1]) ** 2))
    return F.pad(image[None], [reach] * 4, mode="reflect"), (kernel / kernel.sum()).expand(len(image), 1, -1, -1)
