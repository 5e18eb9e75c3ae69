"""Costs found on the meta device are those of closed forms, and of what torch counts and keeps when it computes."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from ldm.condition import Condition
from ldm.net.unet import UNet
from ldm.plan import flops

B, IN, H, OUT = 6, 32, 64, 16


def mlp() -> nn.Sequential:
    with flops.meta_device():
        return nn.Sequential(nn.Linear(IN, H), nn.ReLU(), nn.Linear(H, OUT))


def test_flops_and_bytes_of_two_layers():
    net = mlp()
    cost = flops.training_cost(lambda n: net(torch.empty(n, IN, device="meta")).sum(), list(net.parameters()), B)
    first, second = 2 * B * IN * H, 2 * B * H * OUT
    assert cost.flops == 2 * first + 3 * second  # the first layer's input wants no gradient
    assert cost.saved_for_backward == 4 * (
        B * IN + B * H + 1
    )  # input, ReLU's answer and the loss; the ReLU's input and the output are gone
    assert (
        cost.saved_for_backward
        < cost.peak
        <= cost.saved_for_backward + 4 * sum(p.numel() for p in net.parameters()) + 4 * 2 * B * (H + OUT)
    )
    assert all(p.grad is None for p in net.parameters())
    assert flops.forward_cost(lambda n: net(torch.empty(n, IN, device="meta")), B).flops == first + second


def test_forward_cost_peak_counts_live_tensors():
    layers = [nn.Linear(H, H, device="meta") for _ in range(9)]

    def run(n: int) -> None:
        x = torch.empty(n, H, device="meta")
        for layer in layers:
            x = layer(x)

    assert flops.forward_cost(run, B).peak == 2 * 4 * B * H  # input and output of one layer, whatever their number


def test_flops_views_and_inplace_need_no_memory():
    weight = torch.empty(H, H, device="meta")

    def run(n: int) -> None:
        x = torch.empty(n, H, device="meta")
        x.view(-1).add_(1).reshape(n, H).t()
        weight.t().mul_(2)

    assert flops.forward_cost(run, B).peak == 4 * B * H


@pytest.mark.parametrize(("low", "element"), [(None, 4), (torch.bfloat16, 2)])
def test_attention_cost_is_two_products_without_scores(low, element):
    n, length, dim = 2, 256, 16
    q = torch.empty(n, 4, length, dim, device="meta", requires_grad=True)
    cost = flops.training_cost(lambda _: F.scaled_dot_product_attention(q, q, q).sum(), [q], n, low)
    products = 2 * n * 4 * length * length * dim
    assert cost.flops == 7 * products  # two forward, five backward of which one computes the scores again
    assert cost.saved_for_backward < 4 * n * 4 * length * length  # one score each would be this much
    assert flops.forward_cost(lambda _: F.scaled_dot_product_attention(q, q, q), n, low).flops == 2 * products
    out = element * n * 4 * length * dim
    assert flops.forward_cost(lambda _: F.scaled_dot_product_attention(q, q, q), n, low).peak >= out * (
        1 if low is None else 4
    )


def test_meta_autocast_rounds_products_not_norms():
    seen = []
    with flops.meta_device():
        conv, norm = nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8)

    def run(n: int) -> None:
        h = conv(torch.empty(n, 8, 4, 4, device="meta"))
        seen.extend([h.dtype, norm(h).dtype, (h @ h).dtype])

    flops.forward_cost(run, 1, torch.bfloat16)
    assert seen == [torch.bfloat16, torch.float32, torch.bfloat16]


def unet(**options) -> UNet:
    return UNet(4, 4, 32, (1, 2), 1, (1, 2), context_dim=16, num_heads=2, num_groups=8, **options)


def told(net: UNet, n: int, device: str) -> torch.Tensor:
    x, t, context = (torch.zeros(size, device=device) for size in ((n, 4, 8, 8), (n,), (n, 5, 16)))
    return net(x, t, Condition(context=context)).square().mean()


def test_unet_flops_match_torch_counter():
    """Attention aside, which torch does not count on a CPU: here it is written out."""
    from ldm.net.attention import softmax_attention

    with flops.meta_device():
        net = unet(attention_fn=softmax_attention)
    cost = flops.training_cost(lambda n: told(net, n, "meta"), list(net.parameters()), 3)
    real = unet(attention_fn=softmax_attention)
    with FlopCounterMode(display=False) as count:
        told(real, 3, "cpu").backward()
    assert cost.flops == count.get_total_flops()

    saved: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        if not isinstance(x, nn.Parameter) and (x._base is None or not isinstance(x._base, nn.Parameter)):
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = told(real, 3, "cpu")
    assert cost.saved_for_backward == pytest.approx(sum(saved.values()), rel=0.02)
    del loss


def test_checkpointing_saves_memory_and_adds_flops():
    with flops.meta_device():
        plain, checkpointed = unet(), unet(gradient_checkpointing=True)
    costs = [
        flops.training_cost(lambda n, net=net: told(net, n, "meta"), list(net.parameters()), 4, torch.bfloat16)
        for net in (plain, checkpointed)
    ]
    assert costs[1].saved_for_backward < 0.5 * costs[0].saved_for_backward
    assert 1.2 < costs[1].flops / costs[0].flops < 1.35


def test_num_bytes_counts_shared_tensors_once():
    w = torch.empty(3, 5, dtype=torch.bfloat16, device="meta")
    assert flops.num_bytes([w, w]) == 30
    assert flops.num_bytes({"a": w, "b": torch.empty(2)}) == 38
