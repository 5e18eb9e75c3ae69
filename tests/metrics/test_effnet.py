import pytest
import torch

from ldm.io.download import AssetNotFoundError
from ldm.io.images import to_uint8
from ldm.metrics.effnet import EfficientNet


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Weights drawn at random, in a file laid out like the published one."""
    import timm

    torch.manual_seed(0)
    state = timm.create_model("tf_efficientnet_lite0", pretrained=False).state_dict()
    path = tmp_path_factory.mktemp("effnet") / "effnet.pth"
    torch.save({f"other.{i}": value for i, value in enumerate(state.values())}, path)
    return path


@torch.no_grad()
def test_effnet_features_match_timm(file):
    import timm

    net = EfficientNet(size=48, weights=file).train()
    assert not net.net.training
    images = to_uint8(torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1)
    whole = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    whole.load_state_dict(dict(zip(whole.state_dict(), torch.load(file).values(), strict=True)))
    x = torch.nn.functional.interpolate((images / 255 - 0.5) / 0.5, size=(48, 48), mode="bilinear", antialias=True)
    torch.testing.assert_close(
        net(images), whole.forward_head(whole.forward_features(x), pre_logits=True), rtol=1e-4, atol=1e-5
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert net(images).dtype == torch.float32
    assert net(images[:, :1]).shape == (2, net.num_features)


def test_effnet_name_and_identity(file):
    assert EfficientNet.name == "effnet"
    small, large = EfficientNet(48, file), EfficientNet(96, file)
    assert small.identity == EfficientNet(48, file).identity != large.identity
    with pytest.raises(ValueError, match="uint8"):
        small(torch.zeros(1, 3, 32, 32))


def test_effnet_reports_missing_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_CACHE", str(tmp_path))
    monkeypatch.setenv("LDM_OFFLINE", "1")
    with pytest.raises(AssetNotFoundError, match="efficientnet-lite0 is missing") as error:
        EfficientNet()
    assert "\n" not in str(error.value)
