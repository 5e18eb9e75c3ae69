"""LoRA: nothing at first, merged as unmerged, reloaded to the bit, several at once, and diffusers' output through
PEFT's names.
"""

import pytest
import torch
from torch import nn

from ldm.adapter import lora
from ldm.condition import Condition
from ldm.errors import UserError
from ldm.interop import diffusers
from ldm.interop.adapters import export_lora, import_lora, lora_scaling
from ldm.net.unet import UNet

EVERY = ("*attention*", "*conv1")


@pytest.fixture
def net():
    torch.manual_seed(0)
    made = UNet(
        4,
        4,
        channels=32,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(1, 2),
        context_dim=16,
        num_heads=4,
        num_head_channels=8,
        num_groups=8,
    )
    for p in made.parameters():
        nn.init.normal_(p, std=0.1)
    return made


def told(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, context = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 16, generator=generator)
    return x, torch.tensor([10.0, 700.0]), Condition(context=context)


def lively(net, which=-1, seed=1):
    """Corrections that correct something."""
    generator = torch.Generator().manual_seed(seed)
    for corrections in lora.lora_layers(net).values():
        nn.init.normal_(corrections[which].up, std=0.1, generator=generator)
    return net


def test_lora_is_identity_at_init_and_trains_alone(net):
    before, names = net(*told()), set(net.state_dict())
    lora.inject(net, rank=2, target_modules=EVERY)
    assert torch.equal(net(*told()), before)
    net(*told()).square().mean().backward()
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in net.named_parameters() if p.grad is not None}
    assert all(name.endswith((".down", ".up")) for name in trained)
    assert len(trained) == 2 * sum(
        "attention" in n or n.endswith("conv1") for n, m in net.named_modules() if isinstance(m, lora.LAYERS)
    )
    assert set(lora.merge(net).state_dict()) == names


def test_lora_merge_equals_unmerged_at_any_scale(net):
    before = net(*told())
    corrected = lively(lora.inject(net, rank=3, target_modules=EVERY))(*told())
    assert (corrected - before).abs().max() > 0.01
    lora.set_scale(net, 0.0)
    assert torch.equal(net(*told()), before)
    lora.set_scale(net, 1.0)
    assert (lora.merge(net)(*told()) - corrected).abs().max() <= 1e-5


def test_lora_correction_is_up_times_down(net):
    layer = net.middle1.attention.blocks[0].cross_attention.kv
    weight = layer.weight.detach().clone()
    lively(lora.inject(net, rank=2, target_modules=["middle1.*.kv"]))
    (correction,) = lora.lora_layers(net)["middle1.attention.blocks.0.cross_attention.kv"]
    lora.set_scale(net, 0.5)
    assert torch.equal(layer.weight, weight + 0.5 * (correction.up @ correction.down))


def test_lora_factors_reload_exactly_and_add_up(net):
    first = lora.export_factors(lively(lora.inject(net, rank=2, target_modules=EVERY)))
    alone = net(*told())
    second = {name: value + 0.1 for name, value in first.items()}
    lora.load_factors(net, second, scale=0.3)
    both = net(*told())
    lora.set_scale(net, 0.0, which=1)
    assert torch.equal(net(*told()), alone)
    for loaded, scale in (({name: value.clone() for name, value in first.items()}, 0.0), (second, 0.3)):
        assert all(
            torch.equal(loaded[name], value)
            for name, value in lora.export_factors(net, which=0 if scale == 0.0 else 1).items()
        )
    lora.set_scale(net, 0.3, which=1)
    assert torch.equal(net(*told()), both)
    assert (both - alone).abs().max() > 1e-3


def test_lora_rejects_factors_of_another_network(net):
    other = UNet(
        4,
        4,
        channels=48,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(1, 2),
        context_dim=16,
        num_heads=4,
        num_groups=8,
    )
    made = lora.export_factors(lora.inject(other, rank=2))
    with pytest.raises(ValueError, match=r"of another network: .*factors .* and .* are not of a weight"):
        lora.load_factors(net, made)
    with pytest.raises(ValueError, match="corrects nowhere, which does not exist"):
        lora.load_factors(net, {"nowhere.down": torch.ones(1, 2), "nowhere.up": torch.ones(2, 1)})
    with pytest.raises(ValueError, match=r"target_modules=\['\*nothing\*'\]: no layer has such a name; there are"):
        lora.inject(net, target_modules=["*nothing*"])
    with pytest.raises(ValueError, match="rank=0"):
        lora.inject(net, rank=0)
    assert not lora.lora_layers(net)


def test_lora_export_matches_diffusers(net):
    from diffusers import UNet2DConditionModel

    theirs = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=8,
        use_linear_projection=True,
    )
    plain = {name: value.clone() for name, value in net.state_dict().items()}
    theirs.load_state_dict(diffusers.export_unet(plain))
    lively(lora.inject(net, rank=2, target_modules=EVERY))
    made = export_lora(lora.export_factors(net), plain, prefix="")
    theirs.load_lora_adapter(made, prefix=None)
    x, t, cond = told()
    ours = net(x, t, cond)
    assert (ours - theirs(x, t, cond.context).sample).abs().max() <= 1e-4 * ours.abs().max()
    back = lora.merge(net)
    again = UNet(
        4,
        4,
        channels=32,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(1, 2),
        context_dim=16,
        num_heads=4,
        num_head_channels=8,
        num_groups=8,
    )
    again.load_state_dict(plain)
    lora.load_factors(again, import_lora(made, plain, prefix=""))  # of their several layers' ranks
    assert (again(x, t, cond) - back(x, t, cond)).abs().max() <= 1e-5
    with pytest.raises(UserError, match=r"LoRA: unknown names elsewhere.lora_A"):
        import_lora({"elsewhere.lora_A.weight": torch.ones(1, 2)}, plain, prefix="")
    weaker = {**made, "mid_block.attentions.0.proj_in.alpha": torch.tensor(1.0)}  # of rank 2
    half, whole = (import_lora(one, plain, prefix="")["middle1.attention.proj_in.up"] for one in (weaker, made))
    assert torch.equal(half, whole / 2)
    with pytest.raises(
        UserError, match=r"LoRA: mid_block\.attentions\.0\.proj_in\.lora_B\.weight is int8; expected floating-point"
    ):
        import_lora(
            {**made, "mid_block.attentions.0.proj_in.lora_B.weight": torch.ones(64, 2, dtype=torch.int8)},
            plain,
            prefix="",
        )
    assert lora_scaling('{"unet.lora_alpha": 8, "unet.r": 4}') == 2
    assert lora_scaling(None) == lora_scaling("{}") == 1


def test_lora_uses_alpha_of_each_layer(net):
    """Two layers with an alpha, of two ranks, one without: 3 / 2, 3 / 4 and 1, and so in a layer of ours that is
    several of theirs.
    """
    place = "mid_block.attentions.0.transformer_blocks.0."
    layers = {"ff.net.2": (2, 3.0), "attn1.to_q": (4, 3.0), "attn1.to_k": (2, None), "attn2.to_q": (4, None)}
    shapes = {name: value.shape for name, value in diffusers.export_unet(net.state_dict()).items()}
    state, expected = {}, {}
    for seed, (layer, (rank, alpha)) in enumerate(layers.items()):
        generator = torch.Generator().manual_seed(seed)
        rows, columns = shapes[f"{place}{layer}.weight"][:2]
        down, up = torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator)
        state |= {f"unet.{place}{layer}.lora_A.weight": down, f"unet.{place}{layer}.lora_B.weight": up}
        state |= {} if alpha is None else {f"unet.{place}{layer}.alpha": torch.tensor(alpha)}
        expected[f"{place}{layer}.weight"] = up.double() @ down.double() * (1 if alpha is None else alpha / rank)
    plain = {name: value.detach().clone() for name, value in net.state_dict().items()}
    lora.load_factors(net, import_lora(state, plain))
    before, after = diffusers.export_unet(plain), diffusers.export_unet(lora.merge(net).state_dict())
    for name, value in before.items():
        moved = after[name].double() - value.double()
        assert torch.allclose(
            moved, expected.get(name, 0 * moved), atol=1e-5, rtol=0
        )  # a correction of 10 in float32, rank up to 4


class Model(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.denoiser = nn.Module()
        self.denoiser.net = net


@pytest.mark.parametrize(("alpha", "scaling"), [(None, 1.0), (2.0, 0.25)])
def test_lora_is_scaled_by_alpha_over_rank(alpha, scaling):
    adapter = lora.LoRA(rank=8, alpha=alpha, target_modules=("*",))
    assert adapter.scaling == scaling
    model = Model(nn.Sequential(nn.Linear(8, 8)))
    adapter.apply_to(model, 3.0)
    ((correction,),) = lora.lora_layers(model.denoiser.net).values()
    assert correction.scale == 3.0 * scaling


@pytest.mark.parametrize(("down", "up"), [((2, 6), (4, 2)), ((2, 5), (3, 2)), ((2, 5), (4, 3))])
def test_lora_factors_must_both_fit_the_weight(down, up):
    weight = torch.zeros(4, 5)
    lora.LoRAParametrization(weight, torch.zeros(2, 5), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="are not of a weight"):
        lora.LoRAParametrization(weight, torch.zeros(down), torch.zeros(up))


@pytest.mark.parametrize("layer", [nn.Linear(9, 4), nn.Conv2d(3, 4, 3)])
def test_lora_starts_at_zero_with_down_of_unit_variance_at_its_output(layer):
    net = nn.Sequential(layer)
    shape, inputs = layer.weight.shape, layer.weight[0].numel()
    lora.inject(net, 2, ("*",), torch.Generator().manual_seed(3))
    factors = lora.export_factors(net)
    expected = torch.randn(2, *shape[1:], generator=torch.Generator().manual_seed(3)) / inputs**0.5
    torch.testing.assert_close(factors["0.down"], expected)
    assert not factors["0.up"].any()
    assert [name for name, p in net.named_parameters() if p.requires_grad] == [
        "0.parametrizations.weight.0.down",
        "0.parametrizations.weight.0.up",
    ]
