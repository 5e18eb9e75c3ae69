"""ControlNet: nothing at first, the published count, diffusers' names and answers, and hints that do not fit."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import randomize_weights
from torch import nn

from ldm.adapter import lora
from ldm.adapter.controlnet import ControlBranch, ControlledUNet, ControlNet, hint_encoder
from ldm.condition import Condition
from ldm.conditioner.edges import Canny
from ldm.conditioner.hint import HintConditioner
from ldm.conditioner.none import Unconditional
from ldm.errors import ConfigError
from ldm.interop.adapters import export_controlnet
from ldm.net.unet import UNet

randomize_small = partial(randomize_weights, std=0.1)

SHAPE = {
    "channels": 32,
    "channel_mult": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (1, 2),
    "context_dim": 16,
    "num_heads": 4,
    "num_groups": 8,
}


@pytest.fixture
def net():
    return randomize_small(UNet(4, 4, **SHAPE))


@pytest.fixture
def told():
    generator = torch.Generator().manual_seed(3)
    hints = tuple(torch.rand(2, 3, 32, 32, generator=generator) for _ in range(2))
    context = torch.randn(2, 5, 16, generator=generator)
    return (
        torch.randn(2, 4, 8, 8, generator=generator),
        torch.tensor([10.0, 700.0]),
        Condition(context=context, hint=hints),
    )


def test_control_branch_is_zero_at_init(net, told):
    control = ControlBranch(net.requires_grad_(False), 4)
    assert all(p.requires_grad for p in control.parameters())
    copied = control.copied.state_dict()
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in copied.items())
    assert {name.split(".")[0] for name in copied} == {"time", "stem", "down", "middle1", "middle2"}
    assert not {id(p) for p in control.parameters()} & {id(p) for p in net.parameters()}
    assert torch.equal(ControlledUNet(net, [control, control])(*told), net(*told))


def test_controlled_unet_adds_weighted_residuals(net, told):
    one, two = (randomize_small(ControlBranch(net, 4), seed) for seed in (1, 2))
    x, t, cond = told
    told_of = [
        0.5 * a - 2 * b for a, b in zip(one(x, t, cond, cond.hint[0]), two(x, t, cond, cond.hint[1]), strict=True)
    ]
    wrapped = ControlledUNet(net, [one, two], [0.5, -2.0])
    wanted = net(*told, residuals=told_of)
    assert (wrapped(*told) - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert (wanted - net(*told)).abs().max() > 0.01
    once = wrapped(x, t, cond, emb=wrapped.embed(t, cond), memory=wrapped.memory(cond))
    assert (once - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    more = wrapped(*told, residuals=told_of)
    assert (more - net(*told, residuals=[2 * r for r in told_of])).abs().max() <= 1e-4 * wanted.abs().max()


def test_control_branch_matches_diffusers(net, told):
    from diffusers import ControlNetModel

    theirs = ControlNetModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        cross_attention_dim=16,
        attention_head_dim=4,
        norm_num_groups=8,
        use_linear_projection=True,
        conditioning_embedding_out_channels=(16, 32, 96),
    )
    control = randomize_small(ControlBranch(net, 4), 1)
    state = export_controlnet(control.state_dict())
    theirs.load_state_dict(state)
    x, t, cond = told
    ours = control(x, t, cond, cond.hint[0])
    found = theirs(x, t, cond.context, cond.hint[0], return_dict=False)
    for mine, yours in zip(ours, [*found[0], found[1]], strict=True):
        assert (mine - yours).abs().max() <= 1e-5 * mine.abs().max()


def test_control_branch_has_published_parameter_count():
    from hydra.utils import instantiate
    from smoke import composed

    from ldm.config import build

    node = {
        **build.to_container(composed("net=sd1", "conditioner=clip_context", "autoencoder=kl_f8").net),
        "context_dim": 768,
    }
    with torch.device("meta"):
        made = ControlBranch(instantiate(node, in_channels=4, out_channels=4), factor=8)
    assert sum(p.numel() for p in made.parameters()) == 361_279_120


def test_hint_encoder_preserves_thin_lines():
    """Two pictures of a line apart: what tells them from one another is not lost on the way."""
    torch.manual_seed(0)
    encoder = hint_encoder(3, 32, 8)
    hint = torch.zeros(2, 3, 64, 64)
    hint[0, :, 20], hint[1, :, :, 40] = 1, 1
    features = encoder[:-1](hint)
    assert (features[0] - features[1]).abs().mean() > 0.3 * features.abs().mean()
    assert torch.equal(encoder(hint), torch.zeros(2, 32, 8, 8))


def test_controlled_unet_rejects_mismatched_hints(net, told):
    x, t, cond = told
    control = ControlBranch(net, 4)
    with pytest.raises(ValueError, match="a hint of 16x32: expected 32x32, the size of the image"):
        control(x, t, cond, cond.hint[0][:, :, :16])
    with pytest.raises(ValueError, match="2 hints for 1 ControlNets"):
        ControlledUNet(net, [control])(*told)
    with pytest.raises(ValueError, match="0 hints for 1 ControlNets"):
        ControlledUNet(net, [control])(x, t, replace(cond, hint=()))
    with pytest.raises(ValueError, match=r"weights=\[1.0\]: expected 2"):
        ControlledUNet(net, [control, control], [1.0])
    with pytest.raises(ValueError, match="factor=3"):
        hint_encoder(3, 32, 3)


class Model(nn.Module):
    """What a ControlNet needs of a model: its network, its conditioner and the factor of its first stage."""

    def __init__(self, net):
        super().__init__()
        self.denoiser, self.autoencoder, self.conditioner = nn.Module(), nn.Module(), Unconditional()
        self.denoiser.net, self.autoencoder.factor = net, 4


CANNY = ControlNet(partial(HintConditioner, extractor=Canny()))


def test_each_controlnet_adds_a_branch_a_weight_and_a_hint(net, told):
    """The second is added to the first, which it freezes, and both are initially zero."""
    model, before = Model(net), net(*told)
    for number, scale in enumerate((0.5, -2.0)):
        CANNY.apply_to(model, scale)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        prefix = f"denoiser.net.controls.{number}."
        assert trained == {name for name, _ in model.named_parameters() if name.startswith(prefix)} != set()
    controlled = model.denoiser.net
    assert controlled.net is net
    assert controlled.weights == [0.5, -2.0]
    assert model.conditioner.keys == ("hint", "hint2")
    assert torch.equal(controlled(*told), before)
    assert [control.factor for control in controlled.controls] == [4, 4]


def test_controlnet_starts_from_weights_with_lora_merged(net):
    layer = "middle1.attention.blocks.0.self_attention.qkv"
    plain = net.get_submodule(layer).weight.detach().clone()
    for corrections in lora.lora_layers(lora.inject(net, rank=2)).values():
        nn.init.ones_(corrections[0].up)
    corrected = net.get_submodule(layer).weight
    model = Model(net)
    CANNY.apply_to(model)
    (control,) = model.denoiser.net.controls
    assert torch.equal(control.copied.get_submodule(layer).weight, corrected)
    assert not torch.equal(corrected, plain)
    assert not lora.lora_layers(control.copied)
    assert lora.lora_layers(net), "those of the model's network stay separate"


def test_controlnet_of_another_network_than_a_unet_is_refused():
    model = Model(nn.Linear(1, 1))
    with pytest.raises(ConfigError, match="adapter=controlnet: expected a U-Net, this network is a Linear"):
        CANNY.apply_to(model)
    assert all(p.requires_grad for p in model.parameters())
    assert isinstance(model.conditioner, Unconditional)
