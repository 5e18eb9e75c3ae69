import pytest
import torch
from helpers import randomize_weights

from ldm.net.attention import SpatialTransformer, sdpa, softmax_attention
from ldm.net.classifier import AttentionPool, NoisyClassifier

SMALL = dict(
    channels=8, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(2,), num_head_channels=4, num_groups=4
)


@pytest.mark.parametrize("attend", [sdpa, softmax_attention])
def test_attention_pool_matches_mean_token_attention(attend):
    pool = AttentionPool((3, 3), 8, heads=2, out=5, attend=attend).double()
    x = torch.randn(2, 8, 3, 3, dtype=torch.float64)
    h = x.flatten(2).mT
    h = torch.cat([h.mean(1, keepdim=True), h], 1) + pool.positions
    q, k, v = pool.qkv(h).chunk(3, -1)
    parts = [slice(0, 4), slice(4, 8)]
    found = [((q[:, 0, p][:, None] @ k[..., p].mT) / 2).softmax(-1) @ v[..., p] for p in parts]
    torch.testing.assert_close(pool(x), pool.out(torch.cat(found, -1)[:, 0]), rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="has learned 3 x 3 positions"):
        pool(x[..., :2])


def test_noisy_classifier_depends_on_state_and_time():
    net = randomize_weights(NoisyClassifier(3, 5, size=(8, 4), **SMALL))
    x, t = torch.randn(2, 3, 8, 4, requires_grad=True), torch.tensor([1.0, 500.0])
    logits = net(x, t)
    assert logits.shape == (2, 5)
    assert (net(x, t + 100) - logits).abs().max() > 1e-3
    (grad,) = torch.autograd.grad(logits.log_softmax(-1)[:, 0].sum(), x)
    assert torch.isfinite(grad).all()
    assert grad.abs().max() > 1e-4
    assert not torch.equal(logits[0], logits[1])


def test_noisy_classifier_checkpointing_preserves_gradients():
    grads = []
    for checkpoint in (False, True):
        net = randomize_weights(NoisyClassifier(3, 5, size=(8, 8), gradient_checkpointing=checkpoint, **SMALL)).train()
        net(torch.ones(2, 3, 8, 8), torch.tensor([1.0, 500.0])).square().sum().backward()
        grads.append([p.grad for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_noisy_classifier_has_adm_blocks():
    net = NoisyClassifier(3, 5, size=(8, 8), **SMALL)
    assert net.down[0].resample.scale_shift
    assert net.down[0].layers[0].attention is None
    assert net.down[1].layers[0].attention.heads == net.middle1.attention.heads == 4
    assert not any(isinstance(m, SpatialTransformer) for m in net.modules())
    with pytest.raises(ValueError, match="4 x 4 positions"):
        net(torch.randn(1, 3, 12, 12), torch.tensor([1.0]))


def test_attention_pool_has_a_position_for_each_token():
    positions = AttentionPool((8, 8), 64, heads=2, out=5).positions
    assert positions.shape == (65, 64)
    assert positions.std().item() == pytest.approx(64**-0.5, rel=0.1)


def test_noisy_classifier_pools_the_smallest_map():
    net = NoisyClassifier(3, 5, size=(16, 16), **SMALL | {"channel_mult": (1, 1, 1, 1)})
    assert net.out[2].size == (2, 2)
    assert net(torch.randn(1, 3, 16, 16), torch.tensor([1.0])).shape == (1, 5)
