"""Guidance away from a perturbed network: what is perturbed, what comes of it, and that nothing of it remains."""

from functools import partial

import pytest
import torch
from cases import F64, f64

from ldm.condition import Condition
from ldm.diffusion import guidance, perturbed, prediction, schedule
from ldm.diffusion.denoiser import Denoiser
from ldm.errors import ConfigError
from ldm.net.attention import QKVAttention, SelfAttention, sdpa
from ldm.net.dit import DiT
from ldm.net.inference import InferenceNet
from ldm.net.unet import UNet

T = f64(0.6)[0]
PERTURB = (perturbed.identity_attention, perturbed.smoothed_attention, perturbed.skipped_layers)


def lively(net):
    """A network all of whose layers, those initialised to zero too, have an effect."""
    generator = torch.Generator().manual_seed(0)
    for p in net.parameters():
        with torch.no_grad():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.3 if p.ndim < 2 else p[0].numel() ** -0.5))
    return net.double().eval()


def dit(**options):
    return lively(DiT(2, 2, patch_size=1, channels=16, depth=4, num_heads=2, vector_dim=16, **options))


def unet(**options):
    net = partial(UNet, 2, 2, channels=16, channel_mult=(1, 2), attention_resolutions=(1, 2), num_head_channels=8)
    return lively(net(num_res_blocks=1, num_groups=4, vector_dim=16, **options))


def normal(seed, *shape):
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


COND, UNCOND, X = Condition(vector=normal(1, 3, 16)), Condition(vector=normal(2, 3, 16)), normal(3, 3, 2, 4, 4)


def make(net):
    return Denoiser(net, schedule.cosine(), prediction.V())


@torch.no_grad()
def weak_x0(denoiser, perturb):
    with perturb(denoiser.net):
        return denoiser(X, T, COND).x0


@pytest.mark.parametrize("perturb", PERTURB)
@pytest.mark.parametrize("net", [dit, unet, partial(unet, block=QKVAttention)], ids=["dit", "unet", "adm"])
@torch.no_grad()
def test_guidance_is_cfg_plus_the_difference_from_the_perturbed_network(net, perturb):
    d = make(net())
    got = perturbed.perturbed(d, COND, UNCOND, perturb, scale=2.0, perturbed_scale=3.0)(X, T)
    plain, c = guidance.cfg(d, COND, UNCOND, scale=2.0)(X, T), d(X, T, COND)  # as before: nothing remains perturbed
    weak = weak_x0(d, perturb)
    assert (c.x0 - weak).abs().max() > 1e-6
    torch.testing.assert_close(got.x0, plain.x0 + 3 * (c.x0 - weak))
    alpha, sigma = d.schedule.alpha_sigma(T)
    torch.testing.assert_close(alpha * got.x0 + sigma * got.eps, X)
    alone = perturbed.perturbed(d, COND, None, perturb, perturbed_scale=3.0)(X, T)
    torch.testing.assert_close(alone.x0, c.x0 + 3 * (c.x0 - weak))
    off = perturbed.perturbed(d, COND, UNCOND, perturb, scale=2.0, perturbed_scale=0.0)(X, T)
    assert torch.equal(off.x0, plain.x0)
    outside = perturbed.perturbed(d, COND, UNCOND, perturb, scale=2.0, interval=(0.0, 0.5))(X, T)
    assert torch.equal(outside.x0, c.x0)
    whole = perturbed.perturbed(d, COND, UNCOND, perturb, scale=2.0, rescale=1.0)(X, T).x0
    torch.testing.assert_close(whole.std((1, 2, 3)), c.x0.std((1, 2, 3)))


@torch.no_grad()
def test_identity_attention_returns_the_projected_values():
    layer = SelfAttention(16, 2).double()
    x = normal(0, 2, 5, 16)
    with perturbed.identity_attention(layer, [""]):
        got = layer(x)
    torch.testing.assert_close(got, layer.out(layer.qkv(x)[..., 32:]))
    assert layer.attend is sdpa


@torch.no_grad()
def test_smoothed_queries_are_weighted_means_of_the_grid():
    q = normal(0, 2, 3, 9, 4)
    torch.testing.assert_close(perturbed.blur_queries(q, None), q.mean(2, keepdim=True).expand_as(q))
    torch.testing.assert_close(perturbed.blur_queries(q, 1e4), perturbed.blur_queries(q, None), atol=1e-6, rtol=0)
    torch.testing.assert_close(perturbed.blur_queries(q, 0.1), q, atol=1e-9, rtol=0)
    near, far = torch.exp(f64(-0.5)), torch.exp(f64(-2.0))
    row = torch.cat([f64(1.0), near, far])
    corner = torch.outer(row, row).flatten() / row.sum() ** 2
    torch.testing.assert_close(perturbed.blur_queries(q, 1.0)[:, :, 0], torch.einsum("n,bhnd->bhd", corner, q))
    with pytest.raises(ConfigError, match=r"sigma=1\.0: 8 tokens are no square; expected sigma=null"):
        perturbed.blur_queries(q[:, :, :8], 1.0)


@torch.no_grad()
def test_skipped_layer_returns_its_input():
    net = dit()
    shorter = dit()
    shorter.load_state_dict(net.state_dict())
    del shorter.blocks[2]
    want = make(shorter)(X, T, COND).x0
    torch.testing.assert_close(weak_x0(make(net), partial(perturbed.skipped_layers, layers=["blocks.2"])), want)
    with pytest.raises(ConfigError, match="patch changes its input's shape"):
        weak_x0(make(net), partial(perturbed.skipped_layers, layers=["patch"]))


def test_layer_in_the_middle_is_perturbed_by_default():
    assert perturbed.middle_attention(dit()) == ["blocks.1.attention"]
    assert perturbed.middle_blocks(dit()) == ["blocks.1"]
    assert perturbed.middle_attention(unet()) == ["middle1.attention.blocks.0.self_attention"]
    assert len(perturbed.self_attentions(dit(), ["blocks.0", "blocks.3"])) == 2


@pytest.mark.parametrize("perturb", PERTURB)
@torch.no_grad()
def test_network_packed_for_sampling_is_perturbed_too(perturb):
    net = unet().float()
    plain = perturbed.perturbed(make(net), COND.to(torch.float32), None, perturb, perturbed_scale=1e3)
    packed = perturbed.perturbed(make(InferenceNet(net)), COND.to(torch.float32), None, perturb, perturbed_scale=1e3)
    got, want = (denoise(X.float(), T.float()).x0 for denoise in (packed, plain))
    torch.testing.assert_close(got, want, atol=1e-2, rtol=1e-3)
    assert (want - make(net)(X.float(), T.float(), COND.to(torch.float32)).x0).abs().max() > 0.02


def test_layers_that_do_not_exist_are_named():
    with pytest.raises(ConfigError, match=r"layers: the network has no layer 'mid'; it has blocks\.0\.attention, "):
        perturbed.self_attentions(dit(), ["mid"])
    with pytest.raises(ConfigError, match="the network has no self-attention"):
        perturbed.self_attentions(unet(attention_resolutions=()), None)
    with pytest.raises(ConfigError, match=r"time has no self-attention"):
        perturbed.self_attentions(dit(), ["time"])
