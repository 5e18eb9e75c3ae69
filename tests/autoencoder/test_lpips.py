import copy

import pytest
import torch

from ldm.autoencoder.perceptual import LPIPS
from ldm.io.download import AssetNotFoundError


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """VGG-16 with weights drawn at random: the published ones are half a gigabyte."""
    from torchvision.models.vgg import cfgs, make_layers

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save({f"features.{name}": value for name, value in make_layers(cfgs["D"]).state_dict().items()}, path)
    return path


@pytest.fixture(scope="module")
def lpips(file):
    return LPIPS(weights=str(file))


def pair(size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(2, 3, size, size, generator=generator) * 2 - 1
    return image + 0.3 * torch.randn(image.shape, generator=generator), image


def test_lpips_matches_torchmetrics(lpips):
    from torchmetrics.functional.image.lpips import _LPIPS

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torchmetrics.functional.image.lpips._get_tv_model_features", lambda *_: lpips.net)
        reference = _LPIPS(net="vgg", pnet_rand=True)
    a, b = pair()
    expected = reference(a, b).flatten()
    assert (expected > 0).all()
    torch.testing.assert_close(lpips.distance(a, b), expected)
    torch.testing.assert_close(lpips(a, b), a[0].numel() * expected)  # beside an error summed over pixels and channels


def test_lpips_has_gradient_for_image_only(lpips):
    a, b = pair(16)
    a.requires_grad_()
    lpips.train()
    lpips(a, b).sum().backward()
    assert a.grad.abs().max() > 0
    assert not any(p.requires_grad for p in lpips.parameters())
    assert not any(module.training for module in lpips.modules())
    assert lpips(b, b).tolist() == [0, 0]
    torch.testing.assert_close(
        lpips.distance(a[:, :1], b[:, :1]),
        lpips.distance(a[:, :1].expand(-1, 3, -1, -1), b[:, :1].expand(-1, 3, -1, -1)),
    )


def test_lpips_is_multiplied_by_its_scale(lpips, file):
    a, b = pair(16)
    torch.testing.assert_close(LPIPS(scale=0.25, weights=str(file))(a, b), 0.25 * lpips(a, b))


def test_lpips_of_features_without_activation_is_zero(lpips):
    """All channels of a stage may be 0 after its ReLU; a length of 0 divides nothing."""
    silent = copy.deepcopy(lpips)
    silent.net[2].bias.fill_(-100)  # below what the convolution adds
    a, b = pair(16)
    assert not silent.features(a)[0].any()
    assert silent.distance(a.requires_grad_(), b).tolist() == [0, 0]
    (gradient,) = torch.autograd.grad(silent.distance(a, b).sum(), a)
    assert not gradient.any()


def test_lpips_rejects_small_images_and_missing_weights(lpips, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"\(8, 8\): LPIPS .* 16 px"):
        lpips(torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))
    for name in ("LDM_CACHE", "TORCH_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("LDM_OFFLINE", "1")
    with pytest.raises(
        AssetNotFoundError, match=r"LPIPS needs.*EfficientNetDistance.*vgg16 is missing.*vgg16-397923af\.pth into"
    ) as error:
        LPIPS()
    assert "\n" not in str(error.value)
