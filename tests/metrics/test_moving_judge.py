import pytest
import torch

from ldm.errors import ConfigError
from ldm.metrics.moving_net import MovingNet


def clips(num: int, frames: int = 8, size: int = 32) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (num, 1, frames, size, size), generator=g, dtype=torch.uint8)


def test_moving_net_sees_clips_and_their_order():
    """Features are standardised, the classifier agrees with its logits, and the order of frames matters."""
    torch.manual_seed(0)
    net = MovingNet(width=4, num_features=8).eval()
    x = clips(20)
    net.standardise(net.penultimate(x))
    features = net(x)
    assert features.shape == (20, 8)
    assert torch.allclose(features.std(0), torch.ones(8), atol=1e-4)
    logits = net.split(net.logits(x))
    assert {name: part.shape for name, part in logits.items()} == {"label": (20, 10), "motion": (20, 9)}
    assert torch.equal(torch.cat(list(logits.values()), 1), net.logits(x))
    assert torch.allclose(net.classify(features), logits["label"], atol=1e-4)
    assert torch.allclose(net.classify_all(features)["motion"], logits["motion"], atol=1e-4)
    assert (net(x.flip(2)) - features).abs().max() > 1e-3
    assert net(clips(2, 16, 64)).shape == (2, 8)


def test_moving_net_refuses_other_samples():
    net = MovingNet(width=4, num_features=8).eval()
    for x in (clips(2).float(), clips(2)[:, :, 0], clips(2).expand(-1, 3, -1, -1, -1)):
        with pytest.raises(ConfigError, match="expected \\(B, 1, F, H, W\\) uint8"):
            net(x)
    with pytest.raises(ValueError, match="MovingNet is in training mode"):
        net.train()(clips(2))
