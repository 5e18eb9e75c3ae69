"""Prepared for drawing: every network answers as before, keys and values are looked up once, and what was swapped is
put back.
"""

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers import randomize_weights
from torch import nn

from ldm.adapter import lora
from ldm.checkpoint.load import load_model
from ldm.condition import Condition
from ldm.net import cpu_kernels
from ldm.net.attention import FeedForward, QKVAttention
from ldm.net.blocks import ResBlock, Upsample
from ldm.net.cpu_kernels import GEGLU, Conv2d, Linear, PackedResBlock, PackedUpsample, pack
from ldm.net.dit import DiT
from ldm.net.guidance_embedding import GuidanceEmbedding
from ldm.net.inference import InferenceNet, fast_inference, pack_copy, shares_work
from ldm.net.unet import UNet

randomize_small = partial(randomize_weights, std=0.1)

SMALL = partial(
    UNet,
    4,
    4,
    channels=32,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(1, 2),
    num_heads=4,
    num_groups=8,
)
NETS = {
    "words": partial(SMALL, context_dim=16),
    "vector and concat": partial(SMALL, vector_dim=6, concat_channels=2),
    "scale and shift, resized by blocks": partial(
        SMALL, context_dim=16, use_scale_shift_norm=True, resblock_updown=True
    ),
    "ADM's attention": partial(SMALL, block=QKVAttention),
    "transformer": partial(DiT, 4, 4, channels=32, depth=2, num_heads=4, context_dim=16),
    "told the scale": partial(GuidanceEmbedding, SMALL.func, in_channels=4, out_channels=4, context_dim=16),
}


def told(name, size=8, rows=3):
    generator = torch.Generator().manual_seed(1)
    normal = partial(torch.randn, generator=generator)
    cond = Condition(
        context=normal(rows, 5, 16)
        if name in ("words", "scale and shift, resized by blocks", "transformer", "told the scale")
        else None,
        vector=normal(rows, 6) if "vector" in name else None,
        concat=normal(rows, 2, size, size) if "concat" in name else None,
        scale=torch.tensor([1.0, 2.0, 5.0])[:rows] if "told" in name else None,
    )
    return normal(rows, 4, size, size), cond


@pytest.mark.parametrize("size", [8, 6])
@pytest.mark.parametrize("name", NETS)
@torch.inference_mode()
def test_inference_net_matches_network(name, size):
    torch.manual_seed(0)
    net = randomize_small(NETS[name]())
    x, cond = told(name, size)
    one, each = torch.tensor(500.0).expand(3), torch.tensor([3.0, 500.0, 999.0])
    made = InferenceNet(net)
    for t in (one, each):
        expected = net(x, t, cond)
        torch.testing.assert_close(made(x, t, cond), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@torch.inference_mode()
def test_inference_net_accepts_odd_sizes():
    net = randomize_small(NETS["words"]())
    x, cond = told("words", 7)
    torch.testing.assert_close(
        InferenceNet(net)(x, torch.full((3,), 9.0), cond), net(x, torch.full((3,), 9.0), cond), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    "layer", [ResBlock(64, 32, 16), Upsample(64), FeedForward(64)], ids=("residual", "doubled", "geglu")
)
@torch.inference_mode()
def test_packed_layer_matches_its_layer(layer):
    layer = randomize_small(layer.double()).float()
    given = (torch.randn(2, 9, 64),) if isinstance(layer, FeedForward) else (torch.randn(2, 64, 5, 5),)
    given += (torch.randn(1, 16),) if isinstance(layer, ResBlock) else ()
    twin = pack(layer)
    assert type(twin) in (PackedResBlock, PackedUpsample, GEGLU)
    torch.testing.assert_close(twin(*given), layer(*given), rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_inference_net_in_bfloat16_is_as_accurate_as_autocast():
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        assert isinstance(InferenceNet(randomize_small(NETS["words"]()), torch.bfloat16).net, UNet)
        return
    net = randomize_small(NETS["words"]())
    x, cond = told("words")
    t = torch.full((3,), 500.0)
    exact, made = net(x, t, cond), InferenceNet(net, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        cast, ours = net(x, t, cond).float(), made(x, t, cond).float()
    assert (ours - exact).abs().mean() <= 1.2 * (cast - exact).abs().mean()


@pytest.mark.parametrize("side", [8, 32])
@torch.inference_mode()
def test_packed_group_norm_computes_statistics_in_float32(side):
    layer = nn.GroupNorm(4, 16)
    x = (torch.randn(2, 16, side, side) + 30).bfloat16().contiguous(memory_format=torch.channels_last)
    made, exact = pack(layer, torch.bfloat16)(x), layer(x.float())
    assert made.dtype == torch.bfloat16
    torch.testing.assert_close(made.float(), exact, rtol=2**-7, atol=2**-7)


@torch.inference_mode()
def test_inference_net_computes_memory_once_per_condition(monkeypatch):
    net = InferenceNet(randomize_small(NETS["words"]()))
    asked = []
    memory = net.net.memory
    monkeypatch.setattr(net.net, "memory", lambda cond: asked.append(cond) or memory(cond))
    x, cond = told("words")
    other = cond.index([1, 2, 0])
    for one in (cond, other, cond, other):
        net(x, torch.full((3,), 500.0), one)
    assert [id(one) for one in asked] == [id(cond), id(other)]
    for _ in range(9):
        net(x, torch.full((3,), 500.0), cond.index([0, 1, 2]))
    assert len(net.cache) == 4


def test_inference_net_uses_network_for_gradients():
    net = randomize_small(NETS["words"]())
    x, cond = told("words")
    x.requires_grad_()
    assert torch.equal(InferenceNet(net)(x, torch.full((3,), 500.0), cond), net(x, torch.full((3,), 500.0), cond))


@torch.inference_mode()
def test_pack_copy_shares_weights_and_merges_lora():
    net = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)).requires_grad_(False)
    assert pack_copy(net, torch.float32)[0].weight.data_ptr() == net[0].weight.data_ptr()
    lora.inject(net, 2, ["*1"])
    nn.init.normal_(lora.lora_layers(net)["1"][0].up)
    x, made = torch.randn(3, 8), pack_copy(net, torch.float32)
    assert isinstance(made[1], Linear)
    torch.testing.assert_close(made(x), net(x), rtol=1e-5, atol=1e-5)
    assert lora.lora_layers(net)


def test_fast_inference_restores_model(smoke):
    model = load_model(smoke.run)
    net, stage = model.denoiser.net, model.autoencoder
    with fast_inference(model):
        assert isinstance(model.denoiser.net, InferenceNet)
    assert model.denoiser.net is net
    assert model.autoencoder is stage


class Plain(nn.Module):
    """A network whose `memory` is no method."""

    def __init__(self):
        super().__init__()
        self.memory, self.embed = nn.Parameter(torch.zeros(1)), nn.Identity()

    def forward(self, x, t, cond):
        return x


class Narrowed(UNet):
    def forward(self, x, t, cond):
        return super().forward(x, t, cond)


class Widened(UNet):
    def forward(self, x, t, cond, **options):
        return super().forward(x, t, cond, **options)


def test_shares_work_only_of_a_forward_that_takes_its_results():
    sizes = {"channels": 8, "num_groups": 4, "attention_resolutions": ()}
    nets = [kind(3, 3, **sizes) for kind in (UNet, Widened, Narrowed)] + [Plain()]
    assert [shares_work(net) for net in nets] == [True, True, False, False]


def test_fast_inference_leaves_unknown_networks_alone():
    odd = nn.Conv2d(4, 4, 3, padding="same")
    assert pack(odd) is odd
    model = SimpleNamespace(denoiser=SimpleNamespace(net=odd), autoencoder=nn.Identity())
    with fast_inference(model):
        assert model.denoiser.net is odd


@pytest.mark.parametrize(
    ("channels", "dtype", "packed"),
    [(64, torch.float32, True), (32, torch.float32, False), (64, torch.bfloat16, False), (32, torch.bfloat16, False)],
)
def test_upsampling_is_packed_where_it_is_faster(channels, dtype, packed):
    layer = pack(Upsample(channels), dtype)
    assert isinstance(layer, PackedUpsample if packed else Upsample)
    assert packed or isinstance(layer.conv, Conv2d)


def test_packed_upsampling_is_a_transposed_convolution_where_it_doubles(monkeypatch):
    calls, convolve = [], torch.nn.functional.conv_transpose2d
    monkeypatch.setattr(torch.nn.functional, "conv_transpose2d", lambda *a, **k: calls.append(1) or convolve(*a, **k))
    layer, plain = PackedUpsample(made := Upsample(8), torch.float32), made
    x = torch.randn(1, 8, 3, 5)
    for size, transposed in ((None, 1), (torch.Size((6, 10)), 1), (torch.Size((5, 10)), 0), (torch.Size((6, 9)), 0)):
        calls.clear()
        torch.testing.assert_close(layer(x, size=size), plain(x, size=size), rtol=1e-4, atol=1e-5)
        assert len(calls) == transposed


@pytest.mark.parametrize(("side", "computed"), [(32, torch.bfloat16), (31, torch.float32)])
def test_packed_norm_computes_small_maps_in_float32(side, computed, monkeypatch):
    seen, compute = [], torch.nn.functional.group_norm
    monkeypatch.setattr(torch.nn.functional, "group_norm", lambda x, *a: seen.append(x.dtype) or compute(x, *a))
    layer = pack(nn.GroupNorm(2, 4), torch.bfloat16)
    assert layer(torch.ones(1, 4, side, side, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert seen == [computed]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("dims", "padding_mode"), [(1, "zeros"), (2, "circular"), (3, "circular")])
def test_packed_network_of_other_dimensions_and_padding_equals_plain(dims, padding_mode, dtype):
    """Also where an axis is not doubled, of as many channels as are otherwise packed as one transposed convolution."""
    shape = {"dims": dims, "padding_mode": padding_mode}
    net = UNet(3, 3, channels=64, num_res_blocks=1, num_groups=8, **shape)
    part = nn.Sequential(randomize_weights(net).stem, Upsample(64, [1, *[2] * (dims - 1)], **shape)).requires_grad_(
        False
    )
    x, t = torch.randn(2, 3, *[6] * dims, generator=torch.Generator().manual_seed(0)), torch.tensor([1.0, 9.0])
    bound = 1e-4 if dtype == torch.float32 else 0.1
    fast, twin = InferenceNet(net, dtype), pack(copy.deepcopy(part), dtype)
    with torch.no_grad():
        for found, expected in ((fast(x, t, Condition()), net(x, t, Condition())), (twin(x), part(x))):
            torch.testing.assert_close(found.float(), expected, rtol=bound, atol=bound * expected.abs().max().item())
    assert not any(isinstance(m, PackedResBlock | PackedUpsample) for m in (*fast.net.modules(), *twin.modules()))


@pytest.mark.parametrize("emb_dim", [None, 6])
def test_packed_residual_block_without_embedding_equals_plain(emb_dim):
    block = randomize_weights(ResBlock(8, 16, emb_dim, groups=4))
    x, emb = torch.randn(2, 8, 4, 4), None if emb_dim else torch.randn(2, 6)
    torch.testing.assert_close(PackedResBlock(block, torch.float32)(x, emb), block(x, emb), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("supported", [True, False])
def test_pack_copy_uses_bfloat16_where_the_cpu_has_it(supported, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    packed = nn.Identity()
    monkeypatch.setattr(cpu_kernels, "pack", lambda module, dtype: packed)
    layer = nn.Linear(2, 2)
    assert pack_copy(layer, torch.bfloat16) is (packed if supported else layer)
    assert pack_copy(layer, torch.float32) is packed


def test_images_are_given_channels_last_and_other_shapes_as_they_are():
    class Seen(nn.Module):
        def embed(self, t, cond):
            return t

        def memory(self, cond):
            return None

        def forward(self, x, t, cond, emb=None, memory=None):
            return x

    net, t = InferenceNet(Seen()), torch.zeros(2)
    with torch.no_grad():
        image, line = (net(torch.zeros(2, 3, *sides), t, Condition()) for sides in ((4, 5), (6,)))
    assert image.is_contiguous(memory_format=torch.channels_last)
    assert line.shape == (2, 3, 6)
