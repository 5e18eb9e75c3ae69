import pytest
import torch
from helpers import randomize_weights

from ldm.condition import Condition
from ldm.net import blocks
from ldm.net.attention import QKVAttention, SpatialTransformer, softmax_attention
from ldm.net.blocks import Downsample, ResBlock, Upsample, identity_embedding, timestep_embedding
from ldm.net.unet import Layer, UNet


def told(b: int = 2, length: int = 4, mask: torch.Tensor | None = None, **other) -> Condition:
    return Condition(context=torch.randn(b, length, 6, generator=torch.Generator().manual_seed(5)), mask=mask, **other)


def told_to(net: UNet, **other) -> Condition:
    return told(**other) if net.context_dim else Condition(vector=other.get("vector"))


SMALL = dict(channels=8, context_dim=6, num_head_channels=8, num_groups=4)
SHAPES = {
    "plain": dict(channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(2,)),
    "deep": dict(channel_mult=(1, 2, 2), num_res_blocks=2, attention_resolutions=(1, 4)),
    "flat": dict(channel_mult=(1,), num_res_blocks=1, attention_resolutions=(1,)),
    "no attention": dict(channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=()),
    "heads": dict(
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(2,),
        num_heads=4,
        transformer_depth=2,
        use_scale_shift_norm=True,
        attention_fn=softmax_attention,
    ),
    "depths": dict(
        channel_mult=(1, 2, 2),
        num_res_blocks=1,
        attention_resolutions=(2, 4),
        transformer_depth=(1, 2, 3),
        gradient_checkpointing=True,
    ),
    "ADM": dict(
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(2,),
        use_scale_shift_norm=True,
        resblock_updown=True,
    ),
    "QKV": dict(
        channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(2,), context_dim=None, block=QKVAttention
    ),
}


@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES.keys())
def test_unet_output_is_zero_at_init(options):
    net = UNet(3, 5, **{**SMALL, **options})
    x, t = torch.randn(2, 3, 8, 12), torch.tensor([1.0, 500.0])
    assert torch.equal(net(x, t, told_to(net)), torch.zeros(2, 5, 8, 12))
    assert randomize_weights(net)(x, t, told_to(net)).std() > 0.01


@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES.keys())
def test_unet_precomputed_embedding_and_memory_equal_plain_call(options):
    net = randomize_weights(UNet(3, 3, **{**SMALL, "vector_dim": 5, **options}))
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([1.0, 500.0])
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    cond = told_to(net, mask=mask, vector=torch.randn(2, 5))
    plain = net(x, t, cond)
    assert torch.equal(plain, net(x, t, cond, emb=net.embed(t, cond), memory=net.memory(cond)))
    assert torch.equal(plain, net(x, t, Condition(), emb=net.embed(t, cond), memory=net.memory(cond)))


def test_unet_uses_every_condition():
    net = randomize_weights(
        UNet(
            3,
            3,
            channels=8,
            context_dim=6,
            vector_dim=5,
            concat_channels=2,
            num_head_channels=8,
            num_groups=4,
            num_res_blocks=1,
        )
    )
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([10.0, 500.0])
    mask = torch.ones(2, 4, dtype=torch.bool)
    cond = told(mask=mask, vector=torch.randn(2, 5), concat=torch.randn(2, 2, 8, 8))
    before = net(x, t, cond)
    half = torch.tensor([True, True, False, False]).expand(2, 4)
    changes = {
        "context": Condition(cond.context + 1, mask, cond.vector, cond.concat),
        "mask": Condition(cond.context, half, cond.vector, cond.concat),
        "vector": Condition(cond.context, mask, cond.vector + 1, cond.concat),
        "concat": Condition(cond.context, mask, cond.vector, cond.concat + 1),
    }
    for name, other in changes.items():
        assert (net(x, t, other) - before).abs().max() > 1e-3, name
    assert (net(x, t + 100, cond) - before).abs().max() > 1e-3


def test_unet_ignores_masked_tokens_and_padding():
    net = randomize_weights(UNet(3, 3, channels=8, context_dim=6, num_head_channels=8, num_groups=4, num_res_blocks=1))
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([10.0, 500.0])
    short = told(length=2)
    padded = Condition(torch.cat([short.context, torch.full((2, 3, 6), 7.0)], 1), torch.arange(5).expand(2, 5) < 2)
    torch.testing.assert_close(net(x, t, short), net(x, t, padded), rtol=1e-4, atol=1e-5)


def test_unet_rows_are_independent():
    net = randomize_weights(UNet(3, 3, channels=8, context_dim=6, num_head_channels=8, num_groups=4, num_res_blocks=1))
    x, t, cond = torch.randn(3, 3, 8, 8), torch.tensor([10.0, 500.0, 3.0]), told(3)
    one = net(x[1:2], t[1:2], cond.index(slice(1, 2)))
    torch.testing.assert_close(net(x, t, cond)[1:2], one, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("mult", "blocks"), [((1, 2), 1), ((1, 2, 3), 2), ((1,), 3)])
def test_unet_uses_every_skip_once_in_reverse(mult, blocks):
    net = UNet(3, 3, channels=8, channel_mult=mult, num_res_blocks=blocks, attention_resolutions=(), num_groups=4)
    down = [8]
    for level in net.down:
        down += [layer.res.conv2.out_channels for layer in level.layers]
        down += [level.resample.conv.out_channels] if level.resample else []
    came = net.middle2.res.conv2.out_channels
    for level in net.up:
        for layer in level.layers:
            assert layer.res.conv1.in_channels == came + down.pop()
            came = layer.res.conv2.out_channels
    assert not down
    assert (
        sum(isinstance(m, Downsample) for m in net.modules())
        == len(mult) - 1
        == sum(isinstance(m, Upsample) for m in net.modules())
    )


def skip_shapes(net: UNet, x: torch.Tensor) -> list[torch.Size]:
    shapes, height, width = [torch.Size((len(x), net.channels, *x.shape[2:]))], *x.shape[2:]
    for level in net.down:
        for layer in level.layers:
            shapes.append(torch.Size((len(x), layer.res.conv2.out_channels, height, width)))
        if level.resample is not None:
            height, width = height // 2, width // 2
            shapes.append(torch.Size((*shapes[-1][:2], height, width)))
    return shapes


def test_unet_adds_residuals_to_skips_and_middle():
    net = randomize_weights(UNet(3, 3, channels=8, context_dim=6, num_head_channels=8, num_groups=4, num_res_blocks=1))
    x, t, cond = torch.randn(2, 3, 8, 8), torch.tensor([10.0, 500.0]), told()
    shapes = skip_shapes(net, x)
    zeros = [torch.zeros(s) for s in (*shapes, shapes[-1])]
    plain = net(x, t, cond)
    assert torch.equal(net(x, t, cond, residuals=zeros), plain)
    for place in range(len(zeros)):
        nudged = [z + 0.5 * (i == place) for i, z in enumerate(zeros)]
        assert (net(x, t, cond, residuals=nudged) - plain).abs().max() > 1e-3, place
    with pytest.raises(ValueError, match="shorter"):
        net(x, t, cond, residuals=[*zeros[:-2], zeros[-1]])


def test_unet_skips_bypass_middle():
    """With the middle's answer cut off the output still depends on x, and each skip's channels are the second half of a
    concatenation.
    """
    net = randomize_weights(
        UNet(3, 3, channels=8, channel_mult=(1,), num_res_blocks=1, attention_resolutions=(), num_groups=4)
    )
    seen = []
    net.up[0].layers[0].register_forward_hook(lambda module, args, out: seen.append(args[0]))
    x = torch.randn(1, 3, 4, 4)
    net(x, torch.tensor([1.0]), Condition())
    h = net.stem(x)
    h = net.down[0].layers[0](h, net.embed(torch.tensor([1.0]), Condition()), None, None)
    torch.testing.assert_close(seen[0][:, 8:], h)


@pytest.mark.parametrize("attention", [(), (2,), (1, 2)])
def test_unet_attention_is_at_configured_factors(attention):
    net = UNet(
        3,
        3,
        channels=8,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=attention,
        context_dim=6,
        num_head_channels=8,
        num_groups=4,
    )
    levels = [2**i for i, level in enumerate(net.down) if level.layers[0].attention is not None]
    assert tuple(levels) == attention
    assert (net.middle1.attention is not None) == bool(attention)
    memory = net.memory(told())
    assert len(memory.layers) == sum(1 for m in net.modules() if isinstance(m, Layer) and m.attention is not None)
    assert net.memory(Condition()) is None


@pytest.mark.parametrize("attention", [(1,), (2,), (1, 2)])
def test_unet_transformers_receive_their_memory(attention):
    net = randomize_weights(
        UNet(
            3,
            3,
            channels=8,
            channel_mult=(1, 2),
            num_res_blocks=2,
            attention_resolutions=attention,
            context_dim=6,
            num_head_channels=8,
            num_groups=4,
        )
    )
    cond, wrong = told(), []

    def look(module, args):
        for (k, v), (own_k, own_v) in zip(args[1], module.memory(cond.context), strict=True):
            if not (torch.equal(k, own_k) and torch.equal(v, own_v)):
                wrong.append(module)

    found = [m for m in net.modules() if isinstance(m, SpatialTransformer)]
    for module in found:
        module.register_forward_pre_hook(look)
    net(torch.randn(2, 3, 8, 8), torch.tensor([1.0, 2.0]), cond)
    assert not wrong


@pytest.mark.parametrize("size", [(7, 5), (9, 12), (1, 3)])
@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES.keys())
def test_unet_accepts_odd_sizes(options, size):
    net = randomize_weights(UNet(3, 3, **{**SMALL, **options}))
    out = net(torch.randn(2, 3, *size), torch.tensor([1.0, 500.0]), told_to(net))
    assert out.shape == (2, 3, *size)
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("name", ["deep", "ADM", "depths", "QKV"])
def test_unet_checkpointing_preserves_gradients(name):
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([1.0, 500.0])
    grads = []
    for checkpoint in (False, True):
        net = randomize_weights(
            UNet(3, 3, dropout=0.5, **{**SMALL, **SHAPES[name], "gradient_checkpointing": checkpoint})
        ).train()
        torch.manual_seed(3)
        net(x, t, told_to(net)).square().sum().backward()
        grads.append([p.grad for p in net.parameters()])
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_unet_checkpoints_only_on_request(monkeypatch):
    for checkpoint in (False, True):
        net = UNet(3, 3, **{**SMALL, **SHAPES["QKV"], "gradient_checkpointing": checkpoint})
        calls: list[object] = []
        monkeypatch.setattr(
            blocks, "checkpoint", lambda module, *a, calls=calls, **k: calls.append(module) or module(*a)
        )
        net(torch.randn(1, 3, 8, 8), torch.tensor([1.0]), Condition())
        levels = {module for level in (*net.down, *net.up) for module in level.layers}
        assert len(levels & {*calls}) == (len(levels) if checkpoint else 0)
        assert (net.middle1 in calls, net.middle2 in calls) == (checkpoint, checkpoint)


def test_unet_transformer_depth_is_per_level():
    net = UNet(3, 3, **{**SMALL, **SHAPES["depths"]})

    def depths(levels):
        return [len(level.layers[0].attention.blocks) if level.layers[0].attention else 0 for level in levels]

    assert depths(net.down) == [0, 2, 3]
    assert depths(net.up) == [3, 2, 0]
    assert len(net.middle1.attention.blocks) == 3
    with pytest.raises(ValueError, match="3, one for each level"):
        UNet(3, 3, **{**SMALL, **SHAPES["depths"], "transformer_depth": (1, 2)})


def test_unet_attention_outside_levels_is_in_middle_only():
    net = UNet(3, 3, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(32, 16, 8), **SMALL)
    assert net.middle1.attention is not None
    assert [m for m in net.modules() if isinstance(m, SpatialTransformer)] == [net.middle1.attention]


def test_unet_resblock_updown_resizes_and_uses_time():
    net = randomize_weights(
        UNet(3, 3, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(), resblock_updown=True, **SMALL)
    )
    resized = [level.resample for level in (*net.down, *net.up) if level.resample]
    assert len(resized) == 2
    assert all(isinstance(m, ResBlock) and m.emb is not None for m in resized)
    assert not any(isinstance(m, Downsample | Upsample) for m in net.modules())
    seen = []
    resized[0].register_forward_hook(lambda module, args, out: seen.append(out))
    net(torch.ones(2, 3, 8, 8), torch.tensor([1.0, 500.0]), told())
    assert seen[0].shape[2:] == (4, 4)
    assert (seen[0][0] - seen[0][1]).abs().max() > 1e-3


def test_unet_adds_class_embedding_to_time():
    net = randomize_weights(UNet(3, 3, vector_dim=32, vector_embedding=identity_embedding, **SMALL))
    t, row = torch.tensor([1.0, 500.0]), torch.randn(2, 32)
    torch.testing.assert_close(net.embed(t, Condition(vector=row)), net.embed(t, Condition(vector=0 * row)) + row)


def test_unet_rejects_heads_that_do_not_divide():
    with pytest.raises(ValueError, match="num_head_channels=8 does not divide a level's 12 channels"):
        UNet(3, 3, channels=12, attention_resolutions=(1,), num_head_channels=8, num_groups=4)
    with pytest.raises(ValueError, match="num_head_channels=0 does not divide"):
        UNet(1, 1, channels=12, num_head_channels=0, num_groups=4)
    with pytest.raises(ValueError, match="num_heads=3 does not divide a level's 8 channels"):
        UNet(3, 3, channels=8, attention_resolutions=(1,), num_heads=3, num_groups=4)
    assert (
        UNet(3, 3, channels=8, attention_resolutions=(1,), num_heads=1, num_groups=4)
        .middle1.attention.blocks[0]
        .self_attention.heads
        == 1
    )


@pytest.mark.parametrize("block", [SpatialTransformer, QKVAttention])
def test_unet_without_cross_attention_rejects_context(block):
    net = UNet(3, 3, channels=8, attention_resolutions=(2,), num_head_channels=8, num_groups=4, block=block)
    with pytest.raises(ValueError, match="the network has no cross-attention"):
        net(torch.randn(2, 3, 8, 8), torch.tensor([1.0, 2.0]), told())


@pytest.mark.parametrize("odd", [False, True])
def test_unet_matches_manual_forward(odd):
    net = randomize_weights(
        UNet(3, 3, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(2,), vector_dim=5, **SMALL)
    )
    x, t, cond = torch.randn(2, 3, 8 - odd, 8), torch.tensor([1.0, 500.0]), told(vector=torch.randn(2, 5))
    emb = net.time(timestep_embedding(t, 8)) + net.vector(cond.vector)
    first, middle, second, third = (
        (m.memory(cond.context), None) for m in net.modules() if isinstance(m, SpatialTransformer)
    )
    none = (None, None)
    a = net.stem(x)
    b = net.down[0].layers[0](a, emb, *none)
    c = net.down[0].resample(b)
    d = net.down[1].layers[0](c, emb, *first)
    nudges = [torch.randn_like(part) for part in (a, b, c, d, d)]
    for residuals in (None, nudges):
        of_a, of_b, of_c, of_d, of_middle = residuals or [torch.zeros_like(part) for part in nudges]
        h = net.middle2(net.middle1(d, emb, *middle), emb, *none) + of_middle
        h = net.up[0].layers[0](torch.cat([h, d + of_d], 1), emb, *second)
        h = net.up[0].layers[1](torch.cat([h, c + of_c], 1), emb, *third)
        h = net.up[0].resample(h, None, b.shape[2:])
        h = net.up[1].layers[0](torch.cat([h, b + of_b], 1), emb, *none)
        h = net.up[1].layers[1](torch.cat([h, a + of_a], 1), emb, *none)
        torch.testing.assert_close(net(x, t, cond, residuals=residuals), net.out(h))
