import copy
from functools import partial

import pytest
import torch
from helpers import randomize_weights
from torch import nn

from ldm.condition import Condition
from ldm.net import blocks
from ldm.net.attention import softmax_attention
from ldm.net.blocks import mlp, timestep_embedding
from ldm.net.dit import MLP, DiT, SwiGLU
from ldm.net.positions import rope, sincos

SMALL = dict(channels=16, depth=2, num_heads=2, frequencies=8)
OPTIONS = {
    "plain": {},
    "told": dict(context_dim=6, vector_dim=16, attention_fn=softmax_attention),
    "projected": dict(vector_dim=5, vector_embedding=mlp),
    "lightning": dict(
        norm=partial(nn.RMSNorm, eps=1e-6),
        feed_forward=SwiGLU,
        rotary=rope,
        qk_norm=partial(nn.RMSNorm, eps=1e-6),
        gradient_checkpointing=True,
    ),
}
X, T = torch.randn(2, 3, 6, 4, generator=torch.Generator().manual_seed(1)), torch.tensor([1.0, 500.0])


def told(net: DiT, length: int = 4, mask: torch.Tensor | None = None, seed: int = 5) -> Condition:
    g = torch.Generator().manual_seed(seed)
    cross, vector = net.blocks[0].cross_attention, net.vector
    width = 16 if isinstance(vector, nn.Identity) else 5
    return Condition(
        context=None if cross is None else torch.randn(2, length, 6, generator=g),
        mask=mask,
        vector=None if vector is None else torch.randn(2, width, generator=g),
    )


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_dit_output_is_zero_at_init(options):
    net = DiT(3, 6, **SMALL, **options)
    assert torch.equal(net(X, T, told(net)), torch.zeros(2, 6, 6, 4))
    assert randomize_weights(net)(X, T, told(net)).std() > 0.01


def test_dit_block_is_identity_at_init():
    """adaLN-Zero: every gate is zero, and so is what cross-attention adds."""
    net = DiT(3, 3, **SMALL, **OPTIONS["told"])
    x, block = torch.randn(2, 6, 16), net.blocks[0]
    memory = net.memory(told(net)).layers[0]
    assert torch.equal(block(x, torch.randn(2, 16), memory, None, None), x)


def test_dit_block_matches_manual_adaln():
    torch.manual_seed(0)
    block = randomize_weights(DiT(3, 3, **SMALL)).blocks[1]
    x, emb = torch.randn(2, 6, 16), torch.randn(2, 16)
    six = block.modulation(emb)[:, None].split(16, dim=-1)
    h = x + six[2] * block.attention(nn.functional.layer_norm(x, (16,), eps=1e-6) * (1 + six[1]) + six[0])
    expected = h + six[5] * block.feed_forward(nn.functional.layer_norm(h, (16,), eps=1e-6) * (1 + six[4]) + six[3])
    torch.testing.assert_close(block(x, emb, None, None, None), expected)


def test_dit_block_adds_cross_attention_between_attention_and_mlp():
    net = randomize_weights(DiT(3, 3, **SMALL, **OPTIONS["told"]))
    block, memory, x, emb = net.blocks[0], net.memory(told(net)).layers[0], torch.randn(2, 6, 16), torch.randn(2, 16)
    with torch.no_grad():
        block.modulation.weight.zero_()
        block.modulation.bias.zero_()
    torch.testing.assert_close(block(x, emb, memory, None, None), x + block.cross_attention(x, memory[0], None))


def test_dit_head_uses_sum_of_time_and_vector():
    net, seen = randomize_weights(DiT(3, 3, **SMALL, vector_dim=16)), []
    net.head.register_forward_pre_hook(lambda module, args: seen.extend(args))
    row = torch.randn(2, 16)
    out = net(X, T, Condition(vector=row))
    told = nn.functional.silu(net.time(timestep_embedding(T, 8)) + row)
    torch.testing.assert_close(seen[1], told)
    shift, scale = net.head.modulation(told)[:, None].split(16, dim=-1)
    patches = net.head.out(nn.functional.layer_norm(seen[0], (16,), eps=1e-6) * (1 + scale) + shift)
    torch.testing.assert_close(
        out[:, :, 2:4, :2], patches[:, 2].reshape(2, 2, 2, 3).permute(0, 3, 1, 2)
    )  # row 1, column 0


@pytest.mark.parametrize("patch", [1, 2])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_dit_accepts_rectangles_of_any_size(options, patch):
    net = randomize_weights(DiT(3, 3, patch_size=patch, **SMALL, **options))
    for size in ((2, 2), (4, 10)):
        assert net(torch.randn(2, 3, *size), T, told(net)).shape == (2, 3, *size)


def test_dit_rejects_invalid_sizes():
    with pytest.raises(ValueError, match="5 x 4 cannot be cut into patches of 2"):
        DiT(3, 3, **SMALL)(torch.randn(2, 3, 5, 4), T, Condition())
    with pytest.raises(ValueError, match="num_heads=3 does not divide channels=16"):
        DiT(3, 3, **{**SMALL, "num_heads": 3})
    with pytest.raises(ValueError, match="the network has no cross-attention"):
        DiT(3, 3, **SMALL)(X, T, Condition(context=torch.randn(2, 3, 6)))
    with pytest.raises(ValueError, match=r"conditioner\.dim=16"):
        DiT(3, 3, vector_dim=5, **SMALL)


def test_dit_unpatchify_inverts_patchify():
    """Without blocks and positions, and with a head that undoes the cutting, the answer is x."""
    net = DiT(
        3,
        3,
        **{**SMALL, "depth": 0},
        norm=lambda channels: nn.Identity(),
        positions=lambda grid, d, device: torch.zeros(grid.numel(), d),
    )
    with torch.no_grad():
        net.patch.weight.copy_(
            torch.eye(16)[:, :12].reshape(16, 2, 2, 3).permute(0, 3, 1, 2)
        )  # a patch's features are (row, column, channel)
        net.head.out.weight.copy_(torch.eye(16)[:12])
    torch.testing.assert_close(net(X, T, Condition()), X)


def test_dit_adds_position_embedding():
    net, seen = DiT(3, 3, **SMALL), []
    net.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    net(X, T, Condition())
    torch.testing.assert_close(seen[0], net.patch(X).flatten(2).mT + sincos((3, 2), 16))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_dit_precomputed_embedding_and_memory_equal_plain_call(options):
    net = randomize_weights(DiT(3, 3, **SMALL, **options))
    cond = told(net, mask=torch.tensor([[True, True, True, False], [True, False, False, False]]))
    plain = net(X, T, cond)
    assert torch.equal(plain, net(X, T, cond, emb=net.embed(T, cond), memory=net.memory(cond)))
    assert torch.equal(plain, net(X, T, Condition(), emb=net.embed(T, cond), memory=net.memory(cond)))


def test_dit_uses_every_condition():
    net = randomize_weights(DiT(3, 3, **SMALL, **OPTIONS["told"], concat_channels=2))
    cond = told(net, mask=torch.ones(2, 4, dtype=torch.bool))
    concat, half = torch.randn(2, 2, 6, 4), torch.tensor([True, True, False, False]).expand(2, 4)
    before = net(X, T, Condition(cond.context, cond.mask, cond.vector, concat))
    changes = {
        "context": Condition(cond.context + 1, cond.mask, cond.vector, concat),
        "mask": Condition(cond.context, half, cond.vector, concat),
        "vector": Condition(cond.context, cond.mask, cond.vector + 1, concat),
        "concat": Condition(cond.context, cond.mask, cond.vector, concat + 1),
    }
    for name, other in changes.items():
        assert (net(X, T, other) - before).abs().max() > 1e-3, name
    assert (net(X, T + 100, Condition(cond.context, cond.mask, cond.vector, concat)) - before).abs().max() > 1e-3


def test_dit_ignores_masked_tokens():
    net = randomize_weights(DiT(3, 3, **SMALL, **OPTIONS["told"]))
    short = told(net, length=2)
    context = torch.cat([short.context, torch.full((2, 3, 6), 7.0)], 1)
    padded = Condition(context, torch.arange(5).expand(2, 5) < 2, short.vector)
    torch.testing.assert_close(net(X, T, short), net(X, T, padded), rtol=1e-4, atol=1e-5)


def test_dit_blocks_receive_their_memory():
    net = randomize_weights(DiT(3, 3, **SMALL, **OPTIONS["told"]))
    cond, seen = told(net), []
    for block in net.blocks:
        block.cross_attention.register_forward_pre_hook(
            lambda module, args: seen.append((module.memory(cond.context), args[1]))
        )
    net(X, T, cond)
    assert len(seen) == 2
    assert all(torch.equal(own, given) for pair in seen for own, given in zip(*pair, strict=True))


def test_dit_adds_residuals_after_each_block():
    net = randomize_weights(DiT(3, 3, **SMALL))
    zeros, nudge = [torch.zeros(2, 6, 16)] * 2, torch.randn(2, 6, 16)
    plain = net(X, T, Condition())
    assert torch.equal(net(X, T, Condition(), residuals=zeros), plain)
    for place in range(2):
        nudged = [z + nudge * (i == place) for i, z in enumerate(zeros)]
        assert (net(X, T, Condition(), residuals=nudged) - plain).abs().max() > 1e-3, place
    seen = []
    net.blocks[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    net(X, T, Condition())
    net(X, T, Condition(), residuals=[nudge, zeros[1]])
    torch.testing.assert_close(seen[1], seen[0] + nudge)
    with pytest.raises(ValueError, match="shorter"):
        net(X, T, Condition(), residuals=zeros[:1])


@pytest.mark.parametrize("name", ["told", "lightning"])
def test_dit_checkpointing_preserves_gradients(name):
    grads = []
    for checkpoint in (False, True):
        net = randomize_weights(DiT(3, 3, **SMALL, **{**OPTIONS[name], "gradient_checkpointing": checkpoint}))
        net(X, T, told(net)).square().sum().backward()
        grads.append([p.grad for p in net.parameters()])
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


def test_dit_checkpoints_only_on_request(monkeypatch):
    for checkpoint in (False, True):
        net = DiT(3, 3, **SMALL, gradient_checkpointing=checkpoint)
        calls: list[object] = []
        monkeypatch.setattr(
            blocks, "checkpoint", lambda module, *a, calls=calls, **k: calls.append(module) or module(*a)
        )
        net(X, T, Condition())
        assert calls == ([*net.blocks] if checkpoint else [])


def test_dit_block_skips_cross_attention_without_memory():
    net = randomize_weights(DiT(3, 3, **SMALL, **OPTIONS["told"]))
    block, x, emb = net.blocks[0], torch.randn(2, 6, 16), torch.randn(2, 16)
    plain, memory = copy.deepcopy(block), net.memory(told(net)).layers[0]
    plain.cross_attention = None
    assert torch.equal(block(x, emb, None, None, None), plain(x, emb, memory, None, None))


def test_dit_depends_on_positions_through_embedding_or_rope():
    """Blind to the order of patches without either; RoPE alone tells them apart."""
    x, swapped = X, X.roll(2, 2)  # whole rows of patches
    for rotary, blind in ((None, True), (rope, False)):
        net = randomize_weights(
            DiT(3, 3, **SMALL, positions=lambda grid, d, device: torch.zeros(grid.numel(), d), rotary=rotary)
        ).double()
        same = (
            (net(swapped.double(), T.double(), Condition()) - net(x.double(), T.double(), Condition()).roll(2, 2))
            .abs()
            .max()
        )
        assert (same < 1e-9) == blind


def test_dit_feed_forward_matches_formula():
    torch.manual_seed(0)
    x = torch.randn(3, 12)
    layer = MLP(12, 2.0)
    torch.testing.assert_close(layer(x), layer.down(nn.functional.gelu(layer.up(x), approximate="tanh")))
    layer = SwiGLU(12)
    assert layer.down.in_features == 32  # two thirds of 48
    gate, h = layer.up(x)[:, :32], layer.up(x)[:, 32:]
    torch.testing.assert_close(layer(x), layer.down(gate * gate.sigmoid() * h))


def test_dit_initialization_matches_paper():
    torch.manual_seed(0)
    net = DiT(3, 3, **{**SMALL, "channels": 64, "frequencies": 64}, vector_dim=64)
    bound = (6 / (64 + 3 * 64)) ** 0.5
    assert 0.95 * bound < net.blocks[0].attention.qkv.weight.abs().max() <= bound
    bound = (6 / (64 + 12)) ** 0.5
    assert 0.9 * bound < net.patch.weight.abs().max() <= bound
    assert net.time[0].weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not any(p.any() for name, p in net.named_parameters() if name.endswith("bias"))
