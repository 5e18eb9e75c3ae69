import math

import pytest
import torch

from ldm.errors import ConfigError
from ldm.net.blocks import (
    MIN_POSITIONS_FLOAT32_NORM,
    Downsample,
    ResBlock,
    Upsample,
    ddpm_sinusoid,
    downsample,
    identity_embedding,
    maybe_checkpoint,
    mlp,
    norm,
    require_positive,
    reversed_timestep_embedding,
    timestep_embedding,
    upsample,
    zero_module,
)

MIN_SIDE = math.isqrt(MIN_POSITIONS_FLOAT32_NORM)


def test_timestep_embedding_is_cosines_then_sines():
    t = torch.tensor([0.0, 1.0, 250.0])
    emb = timestep_embedding(t, 8)
    assert emb.shape == (3, 8)
    torch.testing.assert_close(emb[0], torch.tensor([1.0] * 4 + [0.0] * 4))
    rates = [10_000 ** (-k / 4) for k in range(4)]
    torch.testing.assert_close(emb[1], torch.tensor([math.cos(r) for r in rates] + [math.sin(r) for r in rates]))
    torch.testing.assert_close(emb[2, 4], torch.tensor(math.sin(250.0)))


def test_reversed_timestep_embedding_is_that_of_time_from_noise_to_data():
    t = torch.tensor([0.0, 250.0, 1000.0])
    torch.testing.assert_close(
        reversed_timestep_embedding(t, 8, 100.0), timestep_embedding(torch.tensor([1.0, 0.75, 0.0]), 8, 100.0)
    )


def test_size_below_one_is_config_error():
    require_positive(width=1, layers=2)
    with pytest.raises(ConfigError, match="layers=0: expected 1 or more"):
        require_positive(width=1, layers=0)


@pytest.mark.parametrize(
    ("side", "device", "dtype", "computed"),
    [
        (MIN_SIDE, "cpu", torch.bfloat16, torch.float32),
        (MIN_SIDE - 1, "cpu", torch.bfloat16, torch.bfloat16),
        (MIN_SIDE, "meta", torch.bfloat16, torch.bfloat16),
        (MIN_SIDE, "cpu", torch.float32, torch.float32),
    ],
)
def test_norm_of_large_bfloat16_map_on_cpu_is_computed_in_float32(side, device, dtype, computed, monkeypatch):
    seen, compute = [], torch.nn.functional.group_norm
    monkeypatch.setattr(torch.nn.functional, "group_norm", lambda x, *a: seen.append(x.dtype) or compute(x, *a))
    made = norm(4, 2).to(device)
    assert made(torch.ones(1, 4, side, side, dtype=dtype, device=device)).dtype == dtype
    assert seen == [computed]


@pytest.mark.parametrize(
    ("channels", "groups", "expected"), [(64, 32, 32), (48, 32, 16), (16, 8, 8), (6, 4, 2), (7, 8, 1)]
)
def test_norm_chooses_dividing_groups(channels, groups, expected):
    assert norm(channels, groups).num_groups == expected


@pytest.mark.parametrize("scale_shift", [False, True])
@pytest.mark.parametrize("out_channels", [8, 16])
def test_res_block_is_skip_at_init(out_channels, scale_shift):
    block = ResBlock(8, out_channels, emb_dim=12, scale_shift=scale_shift, groups=4)
    x, emb = torch.randn(2, 8, 6, 6), torch.randn(2, 12)
    torch.testing.assert_close(block(x, emb), block.skip(x), rtol=0, atol=0)
    assert block(x, emb).shape == (2, out_channels, 6, 6)
    if out_channels == 8:
        assert torch.equal(block(x, emb), x)


@pytest.mark.parametrize("scale_shift", [False, True])
def test_res_block_uses_embedding(scale_shift):
    torch.manual_seed(0)
    block = ResBlock(8, 8, emb_dim=12, scale_shift=scale_shift, groups=4)
    torch.nn.init.normal_(block.conv2.weight)
    x, emb = torch.randn(2, 8, 6, 6), torch.randn(2, 12)
    assert (block(x, emb) - block(x, -emb)).abs().max() > 0.1
    assert (block(x, emb) - block(x)).abs().max() > 0.1


@pytest.mark.parametrize("side", [4, 16])
def test_norm_in_bfloat16_computes_statistics_in_float32(side):
    layer, x = norm(16, 4), (torch.randn(2, 16, side, side) + 30).bfloat16()
    exact = torch.nn.functional.group_norm(x.float(), 4)
    assert layer(x).dtype == torch.bfloat16
    torch.testing.assert_close(layer(x).float(), exact, rtol=2**-7, atol=2**-7)
    assert norm(16, 4).double()(x.double()).dtype == torch.float64


def test_res_block_scale_shift_applies_after_norm():
    torch.manual_seed(0)
    block = ResBlock(4, 4, emb_dim=6, scale_shift=True, groups=2)
    torch.nn.init.normal_(block.conv2.weight)
    x, emb = torch.randn(2, 4, 5, 5), torch.randn(2, 6)
    silu = torch.nn.functional.silu
    told = block.emb(silu(emb))
    h = block.norm2(block.conv1(silu(block.norm1(x)))) * (1 + told[:, :4, None, None]) + told[:, 4:, None, None]
    torch.testing.assert_close(block(x, emb), x + block.conv2(silu(h)))


def test_downsample_and_upsample_sizes_match():
    x = torch.randn(1, 4, 8, 6)
    assert Downsample(4)(x).shape == (1, 4, 4, 3)
    assert Upsample(4)(Downsample(4)(x)).shape == x.shape


def test_upsample_repeats_pixels_before_convolution():
    up = Upsample(1)
    with torch.no_grad():
        up.conv.weight.zero_()
        up.conv.weight[0, 0, 1, 1] = 1.0
        up.conv.bias.zero_()
    x = torch.arange(4.0).reshape(1, 1, 2, 2)
    assert torch.equal(up(x)[0, 0], x[0, 0].repeat_interleave(2, 0).repeat_interleave(2, 1))


def test_zero_module_outputs_zero():
    layer = zero_module(torch.nn.Linear(3, 2))
    assert torch.equal(layer(torch.randn(4, 3)), torch.zeros(4, 2))


def test_ddpm_sinusoid_is_sines_then_cosines():
    t = torch.tensor([0.0, 250.0])
    rates = [10_000 ** (-k / 3) for k in range(4)]
    assert rates[-1] == pytest.approx(1e-4)
    torch.testing.assert_close(ddpm_sinusoid(t, 8)[0], torch.tensor([0.0] * 4 + [1.0] * 4))
    torch.testing.assert_close(
        ddpm_sinusoid(t, 8)[1], torch.tensor([f(250 * r) for f in (math.sin, math.cos) for r in rates])
    )


def test_vector_embedding_is_mlp_or_identity():
    assert mlp(6, 8)(torch.randn(2, 6)).shape == (2, 8)
    x = torch.randn(2, 8)
    assert torch.equal(identity_embedding(8, 8)(x), x)
    with pytest.raises(ValueError, match=r"conditioner\.dim=8"):
        identity_embedding(6, 8)


def test_downsample_averages_and_upsample_repeats():
    x = torch.arange(12.0).reshape(1, 1, 2, 6)
    torch.testing.assert_close(downsample(x)[0, 0], torch.tensor([[3.5, 5.5, 7.5]]))
    assert torch.equal(downsample(upsample(x)), x)
    assert downsample(torch.zeros(1, 1, 5, 1)).shape == (1, 1, 3, 1)
    assert upsample(torch.zeros(1, 1, 3, 1), torch.Size((5, 1))).shape == (1, 1, 5, 1)
    assert torch.equal(upsample(x, torch.Size((4, 12))), upsample(x))


@pytest.mark.parametrize(("resize", "size"), [(downsample, (2, 3)), (upsample, (8, 12))])
def test_res_block_resizes_both_branches(resize, size):
    """Both branches: the skip alone at first, and the normalised one before its convolution."""
    torch.manual_seed(0)
    block = ResBlock(8, 8, groups=4, resize=resize)
    x = torch.randn(2, 8, 4, 6)
    assert torch.equal(block(x), resize(x))
    torch.nn.init.normal_(block.conv2.weight)
    silu = torch.nn.functional.silu
    expected = resize(x) + block.conv2(silu(block.norm2(block.conv1(resize(silu(block.norm1(x)))))))
    assert block(x).shape == (2, 8, *size)
    torch.testing.assert_close(block(x), expected)


def test_asymmetric_downsample_pads_right_and_bottom():
    x = torch.zeros(1, 1, 4, 4)
    x[0, 0, 0, 0], x[0, 0, 3, 3] = 1.0, 100.0
    for asymmetric, corner, end in (
        (False, 5, 9),
        (True, 1, 5),
    ):  # which of the 9 weights, counted from 1, meets the first and last pixel
        down = Downsample(1, asymmetric)
        with torch.no_grad():
            down.conv.weight.copy_(torch.arange(1.0, 10.0).reshape(1, 1, 3, 3))
            down.conv.bias.zero_()
        assert down(x).shape == (1, 1, 2, 2)
        assert down(x)[0, 0, 0, 0] == corner
        assert down(x)[0, 0, 1, 1] == 100 * end


def test_maybe_checkpoint_recomputes_activations():
    calls = []
    layer = torch.nn.Linear(3, 3)
    layer.register_forward_pre_hook(lambda *seen: calls.append(1))
    x = torch.randn(2, 3, requires_grad=True)
    for keep, expected in ((True, 1), (False, 2)):
        calls.clear()
        maybe_checkpoint(layer, x, keep=keep).sum().backward()
        assert len(calls) == expected
    with torch.no_grad():
        calls.clear()
        maybe_checkpoint(layer, x, keep=False)
        assert len(calls) == 1


def test_norm_uses_eps_argument():
    assert (norm(8).eps, norm(8, 4, 1e-6).eps) == (1e-5, 1e-6)
    block = ResBlock(8, 8, eps=1e-6)
    assert block.norm1.eps == block.norm2.eps == 1e-6


def test_res_block_adds_embedding_before_second_norm():
    torch.manual_seed(0)
    block = ResBlock(4, 4, emb_dim=6, groups=2)
    torch.nn.init.normal_(block.conv2.weight)
    x, emb = torch.randn(2, 4, 5, 5), torch.randn(2, 6)
    silu = torch.nn.functional.silu
    h = block.norm2(block.conv1(silu(block.norm1(x))) + block.emb(silu(emb))[:, :, None, None])
    torch.testing.assert_close(block(x, emb), x + block.conv2(silu(h)))


def test_timestep_embedding_rejects_invalid_max_period():
    with pytest.raises(ValueError, match="max_period=0"):
        timestep_embedding(torch.ones(1), 4, max_period=0)
