import pytest
import torch
from torch.nn.functional import interpolate

from ldm.autoencoder import perceptual
from ldm.autoencoder.perceptual import EfficientNetDistance


@pytest.fixture(scope="module")
def distance():
    return EfficientNetDistance(size=32)  # fetches its weights once, and says so in one line where it cannot


@pytest.mark.slow
def test_perceptual_distance_is_zero_for_equal_and_grows_with_noise(distance):
    torch.manual_seed(0)
    image = torch.rand(2, 1, 32, 32) * 2 - 1
    noise = torch.randn_like(image)
    near, far = distance(image + 0.05 * noise, image), distance(image + 0.5 * noise, image)
    assert distance(image, image).tolist() == [0.0, 0.0]
    assert near.shape == (2,)
    assert (near > 0).all()
    assert (far > near).all()
    torch.testing.assert_close(distance(image[:1] + 0.5 * noise[:1], image[:1]), far[:1], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_perceptual_network_is_frozen_and_differentiable(distance):
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    other = (image + 0.1).requires_grad_()
    distance.train()
    assert not any(module.training for module in distance.modules())
    distance(other, image).sum().backward()
    assert other.grad.abs().max() > 0
    assert not any(p.requires_grad for p in distance.parameters())


@pytest.mark.slow
def test_perceptual_weights_are_loaded_in_order(distance):
    """Each normalisation's stored mean is near that of what really arrives there; tensors in a wrong order are
    deviations off.
    """
    torch.manual_seed(0)
    image = interpolate(torch.randn(8, 3, 8, 8), size=(128, 128), mode="bicubic").clamp(-2, 2) / 2
    off = []

    def look(norm, args):
        off.append(((args[0].mean((0, 2, 3)) - norm.running_mean) / norm.running_var.sqrt()).abs().median())

    hooks = [m.register_forward_pre_hook(look) for m in distance.net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    with torch.no_grad():
        distance.net(image)
    for hook in hooks:
        hook.remove()
    assert len(off) > 40
    assert torch.stack(off).mean() < 0.6


def test_perceptual_distance_reports_missing_weights(tmp_path, monkeypatch):
    from ldm.io.download import AssetNotFoundError

    monkeypatch.setenv("LDM_CACHE", str(tmp_path))
    monkeypatch.setenv("LDM_OFFLINE", "1")
    with pytest.raises(AssetNotFoundError, match="efficientnet-lite0 is missing") as error:
        EfficientNetDistance()
    assert "\n" not in str(error.value)


class Stages(torch.nn.Module):
    """Two stages: the image's channels and their negatives, and the same of half the size."""

    def forward_intermediates(self, x, intermediates_only):
        assert intermediates_only
        return [torch.cat([x, 2 * x[:, :1]], 1), torch.nn.functional.avg_pool2d(x, 2)]


def test_perceptual_distance_is_of_unit_features_per_pixel_and_scaled(monkeypatch):
    monkeypatch.setattr(perceptual, "load_efficientnet_lite0", lambda weights: Stages())
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    expected = torch.zeros(2, dtype=torch.float64)
    for x, y in zip(*(Stages().forward_intermediates(one, True) for one in (a, b)), strict=True):
        unit = [one / one.norm(dim=1, keepdim=True) for one in (x, y)]
        expected += (unit[0] - unit[1]).square().sum(1).mean((1, 2))
    distance = EfficientNetDistance(size=4, scale=0.25)
    torch.testing.assert_close(distance(a, b), 0.25 * 48 * expected)
