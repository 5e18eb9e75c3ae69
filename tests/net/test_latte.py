from itertools import pairwise

import pytest
import torch

from ldm.condition import Condition
from ldm.net.attention import softmax_attention
from ldm.net.dit import DiT, DiTBlock
from ldm.net.latte import SpatialBlock, TemporalBlock
from ldm.net.positions import rope

GRID = (3, 2, 4)


def network(blocks, attend=softmax_attention, rotary=None) -> DiT:
    torch.manual_seed(0)
    options = {"context_dim": 8, "attention_fn": attend, "rotary": rotary}
    net = DiT(2, 2, patch_size=[1, 2, 2], channels=24, depth=4, num_heads=2, blocks=blocks, **options).double()
    for p in net.parameters():  # the blocks are zero at first
        torch.nn.init.normal_(p, std=0.2)
    return net


@pytest.mark.parametrize("rotary", [None, rope])
def test_factorised_blocks_are_masked_full_attention(rotary):
    """Spatial and temporal blocks equal plain ones whose attention is masked to the same frame, or the same place."""
    frame, place = (i.flatten() for i in torch.meshgrid(torch.arange(3), torch.arange(8), indexing="ij"))
    masks = {SpatialBlock: frame[:, None] == frame, TemporalBlock: place[:, None] == place}
    turn = [SpatialBlock, TemporalBlock] * 2

    def masked(which):
        return lambda q, k, v, mask: softmax_attention(q, k, v, masks[which] if k.shape[2] == 24 else mask)

    net, plain = network((SpatialBlock, TemporalBlock), rotary=rotary), network((DiTBlock,), rotary=rotary)
    assert [type(block) for block in net.blocks] == turn
    assert {n: p.shape for n, p in net.named_parameters()} == {n: p.shape for n, p in plain.named_parameters()}
    for block, which in zip(plain.blocks, turn, strict=True):
        block.attention.attend = masked(which)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, 2, 3, 4, 8, dtype=torch.float64, generator=g)
    cond = Condition(context=torch.randn(2, 5, 8, dtype=torch.float64, generator=g))
    t = torch.tensor([3.0, 700.0], dtype=torch.float64)
    with torch.no_grad():
        assert (net(x, t, cond) - plain(x, t, cond)).abs().max() < 1e-11
    other = network((DiTBlock,), rotary=rotary)
    with torch.no_grad():
        assert (net(x, t, cond) - other(x, t, cond)).abs().max() > 1e-3
    assert all(a is not b for a, b in pairwise(net.blocks))
