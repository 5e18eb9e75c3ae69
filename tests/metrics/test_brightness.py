"""Brightness: one number an image, and a distance in squared grey levels that has a closed form."""

import torch

from ldm.metrics.distribution import FrechetDistance, MetricSuite
from ldm.metrics.features import Brightness, extract


def test_brightness_distance_is_frechet_of_normals():
    generator = torch.Generator().manual_seed(0)
    level = torch.linspace(-0.8, 0.8, 40)
    images = level[:, None, None, None] + 0.05 * torch.randn(40, 1, 8, 8, generator=generator)
    net = Brightness()
    reference = extract(net, [images])
    assert reference.shape == (40, 1)
    score = MetricSuite(net, reference, {"fd": FrechetDistance})
    score.update(0.5 * images + 0.25)
    other = extract(net, [0.5 * images + 0.25])
    (mu, sigma), (nu, tau) = ((x.double().mean(), x.double().std()) for x in (reference, other))
    assert abs(score.compute()["fd_brightness"] / float((mu - nu) ** 2 + (sigma - tau) ** 2) - 1) < 1e-4
    assert float(other.mean() - reference.mean()) > 20
