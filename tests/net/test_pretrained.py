"""Published networks from files of random weights under the published names."""

import pytest
import torch

from ldm.net import pretrained


@pytest.fixture(autouse=True)
def no_download(monkeypatch):
    def download():
        raise AssertionError("a file was given")

    for name in ("efficientnet_lite0", "vgg16"):
        monkeypatch.setattr(pretrained, name, download)


def test_vgg16_features_are_read_from_file(tmp_path):
    from torchvision.models import vgg16

    with torch.device("meta"):
        shapes = vgg16(weights=None).features.state_dict()
    state = {f"features.{name}": torch.full(value.shape, 0.5) for name, value in shapes.items()}
    torch.save(state | {"classifier.0.bias": torch.zeros(3)}, tmp_path / "vgg.pth")
    net = pretrained.load_vgg16_features(tmp_path / "vgg.pth")
    assert net.state_dict().keys() == shapes.keys()
    assert all((value == 0.5).all() for value in net.state_dict().values())
    assert not net.training
    assert not any(p.requires_grad for p in net.parameters())


def test_efficientnet_is_read_from_file_by_order(tmp_path):
    import timm

    state = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    torch.save({f"renamed.{i}": value for i, value in enumerate(state.values())}, tmp_path / "lite.pth")
    net = pretrained.load_efficientnet_lite0(tmp_path / "lite.pth")
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert not net.training


def test_lpips_weights_are_those_of_five_stages():
    assert [len(weight) for weight in pretrained.lpips_weights()] == [64, 128, 256, 512, 512]
