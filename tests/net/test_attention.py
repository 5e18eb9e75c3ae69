import pytest
import torch

from ldm.net.attention import (
    MAX_SMALL_SEQUENCE,
    CrossAttention,
    FeedForward,
    QKVAttention,
    SelfAttention,
    SpatialTransformer,
    TransformerBlock,
    sdpa,
    softmax_attention,
)


@pytest.mark.parametrize("masked", [False, True])
def test_softmax_attention_matches_fused_kernel(masked):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, generator=g, dtype=torch.float64) for n in (5, 7, 7))
    mask = None
    if masked:
        mask = torch.ones(2, 1, 1, 7, dtype=torch.bool)
        mask[0, ..., 4:] = False
        mask[1, ..., 1:] = False
    torch.testing.assert_close(softmax_attention(q, k, v, mask), sdpa(q, k, v, mask), rtol=1e-6, atol=1e-6)
    if masked:  # one token left: its value, whatever the query
        torch.testing.assert_close(
            softmax_attention(q, k, v, mask)[1], v[1, :, :1].expand(3, 5, 8), rtol=1e-6, atol=1e-6
        )


def test_softmax_attention_gradients_match_fused_kernel():
    g = torch.Generator().manual_seed(1)
    grads = []
    for attend in (sdpa, softmax_attention):
        size = (1, 2, MAX_SMALL_SEQUENCE + 1, 8)
        q, k, v = (torch.randn(size, generator=torch.Generator().manual_seed(s), requires_grad=True) for s in range(3))
        (attend(q, k, v) * torch.randn(size, generator=g.manual_seed(9))).sum().backward()
        grads.append([x.grad for x in (q, k, v)])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_attention_on_short_sequences_in_bfloat16_is_explicit(monkeypatch):
    def fused(*_, **__):
        raise AssertionError("the fused kernel")

    q, k = torch.randn(1, 2, 300, 8, requires_grad=True).bfloat16(), torch.randn(1, 2, MAX_SMALL_SEQUENCE, 8).bfloat16()
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, k)
    monkeypatch.setattr("ldm.net.attention.F.scaled_dot_product_attention", fused)
    torch.testing.assert_close(sdpa(q, k, k), expected, rtol=2e-2, atol=1e-2)
    with pytest.raises(AssertionError, match="fused"), torch.no_grad():
        sdpa(q, k, k)
    for many in ((q, q, q), (q.float(), k.float(), k.float())):
        with pytest.raises(AssertionError, match="fused"):
            sdpa(*many)


def test_self_attention_is_permutation_equivariant():
    layer = SelfAttention(8, heads=2)
    x = torch.randn(2, 5, 8)
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(layer(x[:, order]), layer(x)[:, order])


def test_cross_attention_ignores_masked_tokens():
    layer = CrossAttention(8, 6, heads=2)
    x, context = torch.randn(2, 4, 8), torch.randn(2, 5, 6)
    mask = torch.tensor([True, True, True, False, False])[None, None, None].expand(2, 1, 1, 5)
    other = context.clone()
    other[:, 3:] = 100.0
    torch.testing.assert_close(layer(x, layer.memory(context), mask), layer(x, layer.memory(other), mask))
    torch.testing.assert_close(layer(x, layer.memory(context), mask), layer(x, layer.memory(context[:, :3]), None))


def test_cross_attention_memory_has_heads_of_keys_and_values():
    k, v = CrossAttention(8, 6, heads=2).memory(torch.randn(3, 5, 6))
    assert k.shape == v.shape == (3, 2, 5, 4)


def test_feed_forward_is_geglu():
    layer = FeedForward(4, mult=2)
    x = torch.randn(3, 4)
    h, gate = layer.up(x)[:, :8], layer.up(x)[:, 8:]
    torch.testing.assert_close(layer(x), layer.down(h * torch.nn.functional.gelu(gate)))


def test_transformer_block_without_context_has_no_cross_attention():
    block = TransformerBlock(8, 2)
    assert block.cross_attention is None
    assert block(torch.randn(2, 4, 8)).shape == (2, 4, 8)


@pytest.mark.parametrize("attend", [sdpa, softmax_attention])
def test_spatial_transformer_is_identity_at_init_and_uses_context(attend):
    torch.manual_seed(0)
    layer = SpatialTransformer(8, heads=2, context_dim=6, depth=2, attend=attend, groups=4)
    x, a, b = torch.randn(2, 8, 3, 5), torch.randn(2, 4, 6), torch.randn(2, 4, 6)
    assert torch.equal(layer(x, layer.memory(a)), x)
    torch.nn.init.normal_(layer.proj_out.weight)
    assert layer(x, layer.memory(a)).shape == x.shape
    assert (layer(x, layer.memory(a)) - layer(x, layer.memory(b))).abs().max() > 0.01


def test_spatial_transformer_preserves_positions():
    torch.manual_seed(0)
    layer = SpatialTransformer(8, heads=2, groups=4)
    torch.nn.init.normal_(layer.proj_out.weight)
    x = torch.randn(1, 8, 3, 5)
    torch.testing.assert_close(layer(x.transpose(2, 3)), layer(x).transpose(2, 3), rtol=1e-4, atol=1e-5)


def test_spatial_transformer_convolutions_equal_linear_layers():
    torch.manual_seed(0)
    linear = SpatialTransformer(8, heads=2, context_dim=6, groups=4)
    conv = SpatialTransformer(8, heads=2, context_dim=6, groups=4, conv=True)
    torch.nn.init.normal_(linear.proj_out.weight)
    state = linear.state_dict()
    for name in ("proj_in.weight", "proj_out.weight"):
        assert conv.state_dict()[name].shape == (8, 8, 1, 1)
        state[name] = state[name][:, :, None, None]
    conv.load_state_dict(state)
    x, memory = torch.randn(2, 8, 3, 5), linear.memory(torch.randn(2, 4, 6))
    torch.testing.assert_close(conv(x, memory), linear(x, memory))


@pytest.mark.parametrize("attend", [sdpa, softmax_attention])
@pytest.mark.parametrize("new_order", [False, True])
def test_qkv_attention_matches_explicit_softmax(new_order, attend):
    """The projection's channels are (q, k, v) of heads, or heads of (q, k, v); every place attends to every place."""
    torch.manual_seed(0)
    heads, d = 3, 4
    layer = QKVAttention(heads * d, heads, groups=4, new_order=new_order, attend=attend).double()
    x = torch.randn(2, heads * d, 2, 3, dtype=torch.float64)
    assert torch.equal(layer(x), x)
    torch.nn.init.normal_(layer.out.weight)
    h = layer.qkv(layer.norm(x).flatten(2).mT)  # (B, N, 3C)
    found = []
    for head in range(heads):
        starts = [part * heads * d + head * d if new_order else head * 3 * d + part * d for part in range(3)]
        q, k, v = (h[..., start : start + d] for start in starts)
        found.append((q @ k.mT / d**0.5).softmax(-1) @ v)
    expected = x + layer.out(torch.cat(found, dim=-1)).mT.reshape(x.shape)
    torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-6)


def test_qkv_attention_rejects_context():
    assert QKVAttention(8, 2, groups=4).memory(torch.randn(1, 3, 6)) == ()
    with pytest.raises(ValueError, match="context_dim=6: QKVAttention is one self-attention"):
        QKVAttention(8, 2, context_dim=6)
    with pytest.raises(ValueError, match="transformer_depth=2"):
        QKVAttention(8, 2, depth=2)


def test_qk_norm_bounds_scores():
    """With queries and keys normalised, a thousandfold input gives the same weights: only the values grow."""
    torch.manual_seed(0)
    layer = SelfAttention(8, heads=2, bias=True, qk_norm=lambda d: torch.nn.RMSNorm(d, eps=1e-12)).double()
    torch.nn.init.zeros_(layer.qkv.bias)
    torch.nn.init.zeros_(layer.out.bias)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(1000 * x), 1000 * layer(x), rtol=1e-6, atol=1e-6)
    assert layer.q_norm.weight.shape == (4,)
    assert layer.q_norm is not layer.k_norm


def test_rotation_applies_to_queries_and_keys_only():
    torch.manual_seed(0)
    layer, seen = SelfAttention(8, heads=2), []
    x = torch.randn(1, 3, 8)

    def rotate(part):
        seen.append(part)
        return -part

    torch.testing.assert_close(layer(x, rotate), layer(x))  # both turned round: the products stay
    q, k, _ = layer.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    torch.testing.assert_close(torch.stack(seen), torch.stack([q, k]))


def test_cross_attention_matches_explicit_softmax():
    torch.manual_seed(0)
    layer = CrossAttention(8, 6, heads=2).double()
    x, context = torch.randn(2, 4, 8, dtype=torch.float64), torch.randn(2, 5, 6, dtype=torch.float64)
    q, (k, v) = layer.q(x), layer.kv(context).split(8, dim=-1)
    parts = [slice(0, 4), slice(4, 8)]
    expected = layer.out(torch.cat([(q[..., p] @ k[..., p].mT / 2).softmax(-1) @ v[..., p] for p in parts], dim=-1))
    torch.testing.assert_close(layer(x, layer.memory(context), None), expected, rtol=1e-6, atol=1e-6)


def test_transformer_block_adds_three_residuals():
    torch.manual_seed(0)
    block = TransformerBlock(8, 2, context_dim=6)
    for layer in (block.norm1, block.norm2, block.norm3):
        torch.nn.init.normal_(layer.weight)
    x, memory = torch.randn(2, 4, 8), block.cross_attention.memory(torch.randn(2, 5, 6))
    h = x + block.self_attention(block.norm1(x))
    h = h + block.cross_attention(block.norm2(h), memory, None)
    torch.testing.assert_close(block(x, memory), h + block.feed_forward(block.norm3(h)))


def test_spatial_transformer_matches_manual_forward():
    torch.manual_seed(0)
    layer = SpatialTransformer(8, heads=2, groups=4)
    torch.nn.init.normal_(layer.proj_out.weight)
    x = torch.randn(2, 8, 3, 5)
    h = layer.proj_out(layer.blocks[0](layer.proj_in(layer.norm(x).flatten(2).mT)))
    torch.testing.assert_close(layer(x), x + h.mT.reshape(x.shape))
    assert layer.norm.eps == 1e-6


def test_transformer_block_skips_cross_attention_without_context():
    told = TransformerBlock(8, 2, context_dim=6)
    x = torch.randn(2, 5, 8)
    plain = x + told.self_attention(told.norm1(x))
    assert torch.equal(told(x), plain + told.feed_forward(told.norm3(plain)))
    untold, memory = TransformerBlock(8, 2), told.cross_attention.memory(torch.randn(2, 3, 6))
    assert torch.equal(untold(x, memory), untold(x))
