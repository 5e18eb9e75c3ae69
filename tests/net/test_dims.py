"""Networks over one, two and three sides: against references in plain functions, against each other, on rings."""

import math
from functools import partial

import pytest
import torch
from helpers import randomize_weights
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.condition import Condition
from ldm.net.attention import QKVAttention, SelfAttention, SpatialTransformer, TransformerBlock
from ldm.net.blocks import CONV, Downsample
from ldm.net.dit import DiT
from ldm.net.guidance_embedding import GuidanceEmbedding
from ldm.net.positions import rope, sincos
from ldm.net.unet import UNet
from ldm.plan import flops

SIDES = {1: (10,), 2: (6, 10), 3: (3, 5, 6)}  # also odd ones, which are rounded up when they are halved
T = torch.tensor([1.0, 700.0], dtype=torch.float64)
MODES = ("zeros", "circular")
UNET = {"channels": 8, "num_res_blocks": 1, "num_groups": 4, "num_head_channels": 4}


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def made(net):
    return randomize_weights(net).double().requires_grad_(False)


def convolve(state, name: str, x: Tensor, mode: str = "zeros", stride: int = 1) -> Tensor:
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    dims, reach = x.ndim - 2, weight.shape[-1] // 2
    padded = F.pad(x, [reach] * 2 * dims, mode={"zeros": "constant"}.get(mode, mode))
    return (F.conv1d, F.conv2d, F.conv3d)[dims - 1](padded, weight, bias, stride)


def linear(state, name: str, x: Tensor) -> Tensor:
    y = x @ state[f"{name}.weight"].T
    return y + state[f"{name}.bias"] if f"{name}.bias" in state else y


def normed(state, name: str, x: Tensor, groups: int = 4, eps: float = 1e-5) -> Tensor:
    """Group normalisation of (B, C, ...) in four groups; of tokens, layer normalisation."""
    if x.shape[1] != len(state[f"{name}.weight"]):
        shape = x.shape[-1:]
        return F.layer_norm(x, shape, state[f"{name}.weight"], state[f"{name}.bias"])
    flat = x.reshape(len(x), groups, -1)
    flat = (flat - flat.mean(2, keepdim=True)) / (flat.var(2, unbiased=False, keepdim=True) + eps).sqrt()
    scale, shift = (state[f"{name}.{leaf}"].reshape(-1, *[1] * (x.ndim - 2)) for leaf in ("weight", "bias"))
    return flat.reshape(x.shape) * scale + shift


def attention(q: Tensor, k: Tensor, v: Tensor, width: int = 4) -> Tensor:
    """Of (B, N, C), in heads of `width` neighbouring channels."""
    q, k, v = (x.reshape(*x.shape[:2], -1, width) for x in (q, k, v))
    weights = (torch.einsum("bnhd,bmhd->bhnm", q, k) / math.sqrt(width)).softmax(-1)
    return torch.einsum("bhnm,bmhd->bnhd", weights, v).flatten(2)


def residual(state, name: str, x: Tensor, emb: Tensor, mode: str) -> Tensor:
    h = convolve(state, f"{name}.conv1", F.silu(normed(state, f"{name}.norm1", x)), mode)
    shift = linear(state, f"{name}.emb", F.silu(emb))
    h = h + shift.reshape(*shift.shape, *[1] * (x.ndim - 2))
    h = convolve(state, f"{name}.conv2", F.silu(normed(state, f"{name}.norm2", h)), mode)
    return h + (convolve(state, f"{name}.skip", x) if f"{name}.skip.weight" in state else x)


def transformer(state, name: str, x: Tensor, context: Tensor) -> Tensor:
    order = [0, *range(2, x.ndim), 1]
    h = normed(state, f"{name}.norm", x, eps=1e-6).permute(order).reshape(len(x), -1, x.shape[1])
    h, block = linear(state, f"{name}.proj_in", h), f"{name}.blocks.0"
    qkv = linear(state, f"{block}.self_attention.qkv", normed(state, f"{block}.norm1", h))
    h = h + linear(state, f"{block}.self_attention.out", attention(*qkv.chunk(3, -1)))
    q = linear(state, f"{block}.cross_attention.q", normed(state, f"{block}.norm2", h))
    k, v = linear(state, f"{block}.cross_attention.kv", context).chunk(2, -1)
    h = h + linear(state, f"{block}.cross_attention.out", attention(q, k, v))
    up, gate = linear(state, f"{block}.feed_forward.up", normed(state, f"{block}.norm3", h)).chunk(2, -1)
    h = linear(state, f"{name}.proj_out", h + linear(state, f"{block}.feed_forward.down", up * F.gelu(gate)))
    return x + h.reshape(len(x), *x.shape[2:], -1).permute(0, -1, *range(1, x.ndim - 1))


def nearest(x: Tensor, sides) -> Tensor:
    for axis, side in enumerate(sides, start=2):
        x = x.index_select(axis, torch.arange(side) * x.shape[axis] // side)
    return x


def reference_unet(state, x: Tensor, t: Tensor, context: Tensor, mode: str) -> Tensor:
    """Two levels of one block each, with attention at the lower one and in the middle."""
    angles = t[:, None] * torch.exp(-math.log(10_000) / 4 * torch.arange(4, dtype=t.dtype))
    emb = torch.cat([angles.cos(), angles.sin()], 1)
    emb = linear(state, "time.2", F.silu(linear(state, "time.0", emb)))
    skips = [convolve(state, "stem", x, mode)]
    skips.append(residual(state, "down.0.layers.0.res", skips[-1], emb, mode))
    skips.append(convolve(state, "down.0.resample.conv", skips[-1], mode, 2))
    h = residual(state, "down.1.layers.0.res", skips[-1], emb, mode)
    skips.append(transformer(state, "down.1.layers.0.attention", h, context))
    h = transformer(state, "middle1.attention", residual(state, "middle1.res", skips[-1], emb, mode), context)
    h = residual(state, "middle2.res", h, emb, mode)
    for layer in range(2):
        h = residual(state, f"up.0.layers.{layer}.res", torch.cat([h, skips.pop()], 1), emb, mode)
        h = transformer(state, f"up.0.layers.{layer}.attention", h, context)
    h = convolve(state, "up.0.resample.conv", nearest(h, x.shape[2:]), mode)
    for layer in range(2):
        h = residual(state, f"up.1.layers.{layer}.res", torch.cat([h, skips.pop()], 1), emb, mode)
    return convolve(state, "out.2", F.silu(normed(state, "out.0", h)), mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dims", CONV)
def test_unet_equals_reference(dims, mode):
    net = made(UNet(3, 2, context_dim=5, dims=dims, padding_mode=mode, **UNET))
    x, context = draws(2, 3, *SIDES[dims]), draws(2, 4, 5, seed=1)
    expected = reference_unet(net.state_dict(), x, T, context, mode)
    torch.testing.assert_close(net(x, T, Condition(context=context)), expected, rtol=1e-9, atol=1e-9)


def reference_dit(state, x: Tensor, t: Tensor, patch, positions: Tensor) -> Tensor:
    """One block of four heads without cross-attention, cut and joined patch by patch."""
    angles = t[:, None] * torch.exp(-math.log(10_000) / 8 * torch.arange(8, dtype=t.dtype))
    emb = linear(state, "time.0", torch.cat([angles.cos(), angles.sin()], 1))
    emb = F.silu(linear(state, "time.2", F.silu(emb)))[:, None]
    grid = [side // p for side, p in zip(x.shape[2:], patch, strict=True)]
    corners = torch.cartesian_prod(*(torch.arange(n) * p for n, p in zip(grid, patch, strict=True))).reshape(
        -1, len(grid)
    )
    boxes = [(..., *(slice(c, c + p) for c, p in zip(corner.tolist(), patch, strict=True))) for corner in corners]
    cut = torch.stack([x[box].flatten(1) for box in boxes], 1)  # (B, N, C p ...)
    h = cut @ state["patch.weight"].flatten(1).T + state["patch.bias"] + positions
    shift1, scale1, gate1, shift2, scale2, gate2 = linear(state, "blocks.0.modulation", emb).chunk(6, -1)

    def plain(h: Tensor) -> Tensor:
        return F.layer_norm(h, h.shape[-1:], eps=1e-6)

    qkv = linear(state, "blocks.0.attention.qkv", plain(h) * (1 + scale1) + shift1)
    h = h + gate1 * linear(state, "blocks.0.attention.out", attention(*qkv.chunk(3, -1), width=6))
    inside = F.gelu(linear(state, "blocks.0.feed_forward.up", plain(h) * (1 + scale2) + shift2), approximate="tanh")
    h = h + gate2 * linear(state, "blocks.0.feed_forward.down", inside)
    shift, scale = linear(state, "head.modulation", emb).chunk(2, -1)
    h = linear(state, "head.out", plain(h) * (1 + scale) + shift)
    out = x.new_zeros(len(x), h.shape[-1] // math.prod(patch), *x.shape[2:])
    for n, box in enumerate(boxes):
        out[box] = h[:, n].reshape(len(x), *patch, -1).movedim(-1, 1)
    return out


@pytest.mark.parametrize("patch", [(3,), (2, 3), (1, 2, 3)])
def test_dit_equals_reference(patch):
    net = made(DiT(3, 2, list(patch), channels=24, depth=1, num_heads=4, frequencies=16))
    x = draws(2, 3, *(2 * (p + 1) * p for p in patch))
    positions = sincos([2 * (p + 1) for p in patch], 24).double()
    expected = reference_dit(net.state_dict(), x, T, patch, positions)
    torch.testing.assert_close(net(x, T, Condition()), expected, rtol=1e-9, atol=1e-9)


def test_dit_of_one_number_cuts_images():
    assert DiT(1, 1, 2, channels=8, depth=0, num_heads=1).patch.weight.shape == (8, 1, 2, 2)
    with pytest.raises(ValueError, match="4 x 4 x 4 cannot be cut into patches of 2 x 2"):
        DiT(1, 1, 2, channels=8, depth=0, num_heads=1)(torch.zeros(1, 1, 4, 4, 4), T[:1].float(), Condition())
    with pytest.raises(ValueError, match=r"patch_size=\[1, 1, 2, 2\]: expected 1 or more, or a list of one to three"):
        DiT(1, 1, [1, 1, 2, 2], channels=8, depth=0, num_heads=1)
    for wrong, message in (
        ({"dims": 4}, "dims=4: expected 1, 2 or 3"),
        ({"padding_mode": "mirror"}, "zeros or circular"),
    ):
        with pytest.raises(ValueError, match=message):
            UNet(1, 1, **UNET, **wrong)


def still_weights(images, clips, taps: Tensor) -> None:
    """Give a network of clips the weights of one of images: each kernel times these taps in time, which sum to one."""
    state, target = images.state_dict(), clips.state_dict()
    assert state.keys() == target.keys()
    for name, value in target.items():
        frames = taps if value.ndim == 5 and value.shape[2] == 3 else value.new_ones(1)
        value.copy_(state[name][:, :, None] * frames[:, None, None] if value.ndim == 5 else state[name])


TAPS = {
    "one": torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64),
    "sum": torch.tensor([0.3, -0.4, 1.1], dtype=torch.float64),
}
BLOCKS = {
    "transformer": {"block": SpatialTransformer, "context_dim": 5, "downsample": partial(Downsample, stride=[1, 2, 2])},
    "conv": {
        "block": partial(SpatialTransformer, conv=True),
        "context_dim": 5,
        "downsample": partial(Downsample, asymmetric=True),
    },
    "qkv": {"block": QKVAttention, "resblock_updown": True, "use_scale_shift_norm": True},
}


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize(("taps", "mode"), [("one", "zeros"), ("sum", "circular")])
def test_unet_of_a_still_clip_equals_unet_of_its_image(block, taps, mode):
    options = {**UNET, **BLOCKS[block], "padding_mode": mode}
    images = made(UNet(3, 2, **{**options, **({"downsample": Downsample} if block == "transformer" else {})}))
    clips = made(UNet(3, 2, dims=3, **options))
    still_weights(images, clips, TAPS[taps])
    x = draws(2, 3, 6, 8)
    cond = Condition(context=draws(2, 4, 5, seed=1)) if options.get("context_dim") else Condition()
    expected, found = images(x, T, cond), clips(x[:, :, None].expand(-1, -1, 4, -1, -1), T, cond)
    torch.testing.assert_close(found, expected[:, :, None].expand_as(found), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rotary", [None, rope])
def test_dit_of_a_still_clip_equals_dit_of_its_image(rotary):
    """With positions of rows and columns alone; RoPE's angles of time are zero for clips of one token in time."""

    def positions(grid, dim, device):
        return sincos(grid[-2:], dim, device).repeat(grid.numel() // grid[-2:].numel(), 1)

    sizes = {"channels": 24, "depth": 2, "num_heads": 2, "positions": positions}
    images = made(DiT(3, 2, 2, **sizes, rotary=rotary and (lambda grid, *rest: rotary((1, *grid), *rest))))
    clips = made(DiT(3, 2, [1, 2, 2], **sizes, rotary=rotary))
    still_weights(images, clips, TAPS["one"])
    x = draws(2, 3, 6, 8)
    expected, found = (
        images(x, T, Condition()),
        clips(x[:, :, None].expand(-1, -1, 1 if rotary else 3, -1, -1), T, Condition()),
    )
    torch.testing.assert_close(found, expected[:, :, None].expand_as(found), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("updown", [False, True])
@pytest.mark.parametrize("dims", CONV)
def test_circular_unet_moves_its_output_with_its_input(dims, updown):
    """By any multiple of the two positions that a cell of the lower level covers; a border of zeros is felt."""
    x, axes = draws(2, 3, *[8] * dims), tuple(range(2, 2 + dims))
    for mode in MODES:
        net = made(UNet(3, 2, resblock_updown=updown, dims=dims, padding_mode=mode, **UNET))
        moved = net(x.roll([2, -4, 6][:dims], axes), T, Condition()).roll([-2, 4, -6][:dims], axes)
        assert ((moved - net(x, T, Condition())).abs().max() < 1e-9) == (mode == "circular")


@pytest.mark.parametrize("dims", [1, 3])
def test_checkpointing_and_flops_of_any_dimensions(dims):
    """Recomputed activations give the same gradients; a product and a sum for each tap, input and output."""
    x, t, grads = draws(1, 3, *[4] * dims).float(), torch.tensor([5.0]), []
    for checkpoint in (False, True):
        net = randomize_weights(UNet(3, 2, dims=dims, gradient_checkpointing=checkpoint, **UNET))
        net(x, t, Condition()).square().sum().backward()
        grads.append([p.grad for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    with flops.meta_device():
        stem = UNet(3, 2, dims=dims, **UNET).stem
        for dtype in (torch.float32, torch.bfloat16):  # as autocast computes convolutions
            made_of = []
            cost = flops.forward_cost(lambda n, to=made_of: to.append(stem(torch.empty(n, 3, *[4] * dims))), 2, dtype)
            assert made_of[0].dtype == dtype
            assert cost.flops == 2 * 2 * 4**dims * 3 * 8 * 3**dims


def test_transformer_attends_twice_without_a_context():
    block = made(TransformerBlock(8, 2, twice=True))
    x = draws(2, 5, 8)
    h = x + block.self_attention(block.norm1(x))
    h = h + block.second_attention(block.norm2(h))
    torch.testing.assert_close(block(x), h + block.feed_forward(block.norm3(h)))
    told = TransformerBlock(8, 2, context_dim=3, twice=True)
    assert told.state_dict().keys() == TransformerBlock(8, 2, context_dim=3).state_dict().keys()
    assert isinstance(SpatialTransformer(8, 2, twice=True, groups=4).blocks[0].second_attention, SelfAttention)


def test_concatenated_vector_stands_beside_the_time():
    net = made(UNet(3, 2, vector_dim=5, vector_embedding=nn.Linear, concat_vector=True, **UNET))
    cond = Condition(vector=draws(2, 5))
    emb = net.embed(T, cond)
    assert torch.equal(emb[:, 32:], net.vector(cond.vector))
    net.vector = None
    assert torch.equal(emb[:, :32], net.embed(T, Condition()))
    net = made(UNet(3, 2, vector_dim=5, vector_embedding=nn.Linear, concat_vector=True, **UNET))
    assert net(draws(2, 3, 4, 4), T, cond).shape == (2, 2, 4, 4)
    assert UNet(3, 2, concat_vector=True, **UNET).embed(T.float(), Condition()).shape == (2, 32)
    with pytest.raises(ValueError, match=r"net\.concat_vector=true: the scale is added"):
        GuidanceEmbedding(partial(UNet, concat_vector=True, **UNET), 3, 2, vector_dim=5)
