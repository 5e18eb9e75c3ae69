import math

import pytest
import torch

from ldm.metrics.paired import Reconstruction


def test_psnr_is_mean_over_images():
    image = torch.rand(3, 1, 16, 16) - 0.5
    errors = torch.tensor([0.1, 0.02, 0.3])
    metric = Reconstruction()
    for i in range(3):  # batching must not matter
        metric.update(image[i : i + 1], image[i : i + 1] + errors[i])
    expected = sum(10 * math.log10(4 / e**2) for e in errors.tolist()) / 3
    assert metric.compute()["psnr"] == pytest.approx(expected, rel=1e-5)


def test_ssim_is_one_for_equal_and_falls_with_noise():
    image = torch.rand(2, 3, 16, 16) * 2 - 1
    values = []
    for std in (0.0, 0.1, 0.5):
        metric = Reconstruction()
        metric.update(image, image + std * torch.randn(image.shape, generator=torch.Generator().manual_seed(0)))
        values.append(metric.compute()["ssim"])
    assert values[0] == pytest.approx(1, abs=1e-6)
    assert values[0] > values[1] > values[2]


def test_ssim_of_flat_images_is_luminance_term():
    a, b, c1 = 0.2, 0.6, (0.01 * 2) ** 2
    metric = Reconstruction()
    metric.update(torch.full((1, 1, 16, 16), a), torch.full((1, 1, 16, 16), b))
    assert metric.compute()["ssim"] == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1), rel=1e-4)


class Pooled(torch.nn.Module):
    """The means of four quarters of a grey picture."""

    name, num_features, identity = "toy", 4, "0"

    def forward(self, images):
        return torch.nn.functional.adaptive_avg_pool2d(images.float() / 64, 2).flatten(1)


def test_rfd_of_originals_is_zero_and_resets():
    net, image = Pooled(), torch.rand(60, 1, 16, 16, generator=torch.Generator().manual_seed(0)) - 0.5
    metric = Reconstruction(net, net((image.add(1) * 127.5).round().byte()))
    values = []
    for worse in (0.0, 0.2):
        metric.reset()
        metric.update(image, image + worse)
        with pytest.warns(UserWarning, match="biased"):
            values.append(metric.compute())
    assert values[0].keys() == {"psnr", "ssim", "rfd_toy"}
    assert values[0]["rfd_toy"] == pytest.approx(0, abs=1e-6) != values[1]["rfd_toy"]
    with pytest.raises(ValueError, match="both, or neither"):
        Reconstruction(net)


class Brighter:
    """The mean difference of two pictures, as a perceptual distance."""

    name = "toy"

    def distance(self, a, b):
        return (a - b).flatten(1).mean(1)


def test_lpips_metric_is_mean_over_images():
    image = torch.rand(5, 1, 16, 16, generator=torch.Generator().manual_seed(0)) - 0.6
    by = torch.tensor([0.1, 0.2, 0.3, 0.1, 0.05])[:, None, None, None]
    metric = Reconstruction(perceptual=Brighter())
    for part in (slice(0, 2), slice(2, 5)):
        metric.update(image[part], (image + by)[part])
    assert metric.compute()["lpips_toy"] == pytest.approx(0.15, abs=1e-6)
    metric.reset()
    metric.update(image[:2], image[:2])
    assert metric.compute()["lpips_toy"] == 0


def test_reconstruction_metric_rejects_empty_input():
    with pytest.raises(ValueError, match="no image was compared"):
        Reconstruction().compute()
