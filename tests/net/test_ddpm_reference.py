"""DDPM's U-Net against diffusers' UNet2DModel, which runs google/ddpm-cifar10-32: the same weights, the same answer."""

import pytest
import torch
from test_counts import config
from torch import nn

from ldm.condition import Condition
from ldm.net.unet import Layer

KINDS = ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D")


@pytest.fixture(scope="module")
def reference() -> nn.Module:
    from diffusers import UNet2DModel

    torch.manual_seed(0)
    net = UNet2DModel(
        block_out_channels=(32, 64, 64, 64),
        down_block_types=KINDS,
        up_block_types=[kind.replace("Down", "Up") for kind in reversed(KINDS)],
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
        attention_head_dim=None,
    )
    for p in net.parameters():
        nn.init.normal_(p, std=0.1)
    return net.eval()


def take(ours: nn.Module, theirs: nn.Module) -> None:
    with torch.no_grad():
        ours.weight.copy_(theirs.weight.reshape(ours.weight.shape))
        ours.bias.copy_(theirs.bias)


def take_layer(ours: Layer, res: nn.Module, attention: nn.Module | None) -> None:
    for name, other in (
        ("norm1", "norm1"),
        ("conv1", "conv1"),
        ("emb", "time_emb_proj"),
        ("norm2", "norm2"),
        ("conv2", "conv2"),
    ):
        take(getattr(ours.res, name), getattr(res, other))
    if res.conv_shortcut is not None:
        take(ours.res.skip, res.conv_shortcut)
    assert (ours.attention is None) == (attention is None)
    if attention is not None:
        take(ours.attention.norm, attention.group_norm)
        take(ours.attention.out, attention.to_out[0])
        parts = (attention.to_q, attention.to_k, attention.to_v)
        with torch.no_grad():
            ours.attention.qkv.weight.copy_(torch.cat([p.weight for p in parts]))
            ours.attention.qkv.bias.copy_(torch.cat([p.bias for p in parts]))


def test_ddpm_unet_matches_diffusers(reference):
    from hydra.utils import instantiate

    ours = instantiate(
        config("ddpm_cifar", "channels=32"), in_channels=3, out_channels=3, context_dim=None, vector_dim=None
    ).eval()
    take(ours.stem, reference.conv_in)
    take(ours.time[0], reference.time_embedding.linear_1)
    take(ours.time[2], reference.time_embedding.linear_2)
    for level, block in zip((*ours.down, *ours.up), (*reference.down_blocks, *reference.up_blocks), strict=True):
        attentions = getattr(block, "attentions", [None] * len(block.resnets))
        for layer, res, attention in zip(level.layers, block.resnets, attentions, strict=True):
            take_layer(layer, res, attention)
        resamplers = getattr(block, "downsamplers", None) or getattr(block, "upsamplers", None)
        assert (level.resample is None) == (resamplers is None)
        if resamplers:
            take(level.resample.conv, resamplers[0].conv)
    take_layer(ours.middle1, reference.mid_block.resnets[0], reference.mid_block.attentions[0])
    take_layer(ours.middle2, reference.mid_block.resnets[1], None)
    take(ours.out[0], reference.conv_norm_out)
    take(ours.out[2], reference.conv_out)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in reference.parameters())
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([3.0, 700.0])
    with torch.no_grad():
        expected, found = reference.double()(x.double(), t).sample, ours.double()(x.double(), t.double(), Condition())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
