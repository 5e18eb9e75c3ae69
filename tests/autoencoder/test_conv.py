"""The convolutional first stage against plain tensors, and the resolutions of its attention."""

import pytest
import torch
from torch.nn import functional as F

from ldm.autoencoder.conv import Decoder, Encoder, Level, Residual, SpatialAttention
from ldm.net.blocks import Downsample


def randomised(module):
    """The module in float64 with random weights, none of them zero or one."""
    generator = torch.Generator().manual_seed(0)
    for p in module.double().parameters():
        p.data = torch.randn(p.shape, dtype=torch.float64, generator=generator) * 0.5
    return module


def image(channels, side=4):
    return torch.randn(2, channels, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def normalised(layer, x, groups):
    return F.group_norm(x, groups, layer.weight, layer.bias, 1e-6)


def convolved(layer, x, padding=1):
    return F.conv2d(x, layer.weight, layer.bias, padding=padding)


@pytest.mark.parametrize("outputs", [4, 6])
def test_residual_adds_two_convolutions_to_its_skip(outputs):
    block, x = randomised(Residual(4, outputs, 2)), image(4)
    h = convolved(block.conv1, F.silu(normalised(block.norm1, x, 2)))
    h = convolved(block.conv2, F.silu(normalised(block.norm2, h, 2)))
    skip = x if outputs == 4 else convolved(block.skip, x, 0)
    torch.testing.assert_close(block(x), skip + h, rtol=1e-12, atol=1e-12)


def test_spatial_attention_adds_a_mean_of_values_to_its_input():
    layer, x = randomised(SpatialAttention(4, 2)), image(4)
    h = normalised(layer.norm, x, 2)
    q, k, v = (
        torch.einsum("oi,bihw->bohw", one.weight[..., 0, 0], h) + one.bias[:, None, None]
        for one in (layer.q, layer.k, layer.v)
    )
    q, k, v = (one.flatten(2) for one in (q, k, v))  # (B, C, H W)
    weights = (torch.einsum("bci,bcj->bij", q, k) / 4**0.5).softmax(2)
    mean = torch.einsum("bij,bcj->bci", weights, v).reshape(x.shape)
    torch.testing.assert_close(layer(x), x + convolved(layer.out, mean, 0), rtol=1e-12, atol=1e-12)


def test_padded_downsample_pads_right_and_below():
    layer, x = randomised(Downsample(2, asymmetric=True)), image(2)
    padded = torch.zeros(2, 2, 5, 5, dtype=torch.float64)
    padded[..., :4, :4] = x
    torch.testing.assert_close(layer(x), F.conv2d(padded, layer.conv.weight, layer.conv.bias, stride=2))


def test_level_follows_each_block_by_its_attention():
    blocks, attention = [Residual(4, 4, 2) for _ in range(2)], [SpatialAttention(4, 2) for _ in range(2)]
    level, x = randomised(Level(blocks, attention, Downsample(4, asymmetric=True))), image(4)
    expected = x
    for block, attend in zip(blocks, attention, strict=True):
        expected = attend(block(expected))
    assert torch.equal(level(x), level.resample(expected))
    assert torch.equal(Level(blocks, [], None)(x), blocks[1](blocks[0](x)))


OPTIONS = dict(z_channels=2, width=4, channel_mult=(1, 2, 2, 4), num_groups=2, attention_resolutions=(1, 8))


@pytest.mark.parametrize("blocks", [1, 3])
def test_encoder_has_its_blocks_and_attention_at_the_chosen_factors(blocks):
    net = Encoder(num_res_blocks=blocks, **OPTIONS)
    assert [len(level.blocks) for level in net.down] == [blocks] * 4
    assert [len(level.attention) for level in net.down] == [blocks, 0, 0, blocks]
    assert [level.resample is not None for level in net.down] == [True, True, True, False]
    assert [[block.conv1.in_channels for block in level.blocks] for level in net.down] == [
        [first, *[width] * (blocks - 1)] for first, width in ((4, 4), (4, 8), (8, 8), (8, 16))
    ]
    assert {block.conv2.out_channels for block in net.down[3].blocks} == {16}
    assert net.moments.out_channels == 4
    assert Encoder(double_z=False, **OPTIONS).moments.out_channels == 2
    assert net(torch.zeros(1, 3, 16, 24)).shape == (1, 4, 2, 3)


@pytest.mark.parametrize("blocks", [1, 3])
def test_decoder_has_its_blocks_and_attention_at_the_chosen_factors(blocks):
    net = Decoder(num_res_blocks=blocks, **OPTIONS)
    assert [len(level.blocks) for level in net.up] == [blocks + 1] * 4
    assert [len(level.attention) for level in net.up] == [blocks + 1, 0, 0, blocks + 1]
    assert [level.resample is not None for level in net.up] == [False, True, True, True]
    assert [level.blocks[0].conv1.in_channels for level in net.up] == [8, 8, 16, 16]
    assert [level.blocks[-1].conv2.out_channels for level in net.up] == [4, 8, 8, 16]
    assert net(torch.zeros(1, 2, 2, 3)).shape == (1, 3, 16, 24)


@pytest.mark.parametrize("attends", [True, False])
def test_middle_attends_unless_it_is_left_out(attends):
    for net in (Encoder(middle_attention=attends, **OPTIONS), Decoder(middle_attention=attends, **OPTIONS)):
        assert isinstance(net.middle[1], SpatialAttention) == attends
