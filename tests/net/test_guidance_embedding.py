"""A network told the guidance scale: the plain one at first, and then one that hears it."""

from functools import partial

import torch

from ldm.condition import Condition
from ldm.net.blocks import timestep_embedding
from ldm.net.guidance_embedding import GuidanceEmbedding
from ldm.net.unet import UNet


def test_guidance_embedding_is_identity_at_init_and_uses_scale():
    torch.manual_seed(0)
    net = partial(UNet, channels=16, num_groups=8, num_head_channels=8)
    told = GuidanceEmbedding(net, 2, 2, context_dim=4)
    with torch.no_grad():
        for p in told.net.parameters():
            p.normal_(std=0.1)
    x, t, context = torch.randn(2, 2, 8, 8), torch.tensor([3.0, 900.0]), torch.randn(2, 3, 4)
    plain = told.net(x, t, Condition(context=context))
    asked = Condition(context=context, scale=torch.tensor([1.0, 5.0]))
    assert torch.equal(told(x, t, asked), plain)
    assert torch.equal(told(x, t, Condition(context=context)), plain)
    with torch.no_grad():
        told.scale[-1].weight.normal_(std=0.5)
    scale = told.scale(timestep_embedding(torch.tensor([100.0, 500.0]), 64))
    torch.testing.assert_close(told.embed(t, asked), told.net.embed(t, asked) + scale)
    heard, other = told(x, t, asked), told(x, t, Condition(context=context, scale=torch.tensor([1.0, 2.0])))
    assert torch.equal(heard[0], other[0])
    assert not torch.allclose(heard[1], other[1])
    assert torch.equal(told(x, t, asked, emb=told.embed(t, asked), memory=told.memory(asked)), heard)
