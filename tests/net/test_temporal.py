import pytest
import torch
from torch import nn

from ldm.condition import Condition
from ldm.errors import ConfigError
from ldm.net.inference import InferenceNet
from ldm.net.temporal import InflatedUNet, TemporalTransformer
from ldm.net.unet import UNet
from ldm.recipes.init_weights import copy_weights

OPTIONS = {
    **{"channels": 16, "num_groups": 4, "num_res_blocks": 1, "num_head_channels": 8, "attention_resolutions": (2,)},
    **{"context_dim": 6, "vector_dim": 5, "concat_channels": 1, "use_scale_shift_norm": True},
}


def randomise(net: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.data = 0.2 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
    return net


@pytest.fixture(scope="module")
def nets() -> tuple[nn.Module, nn.Module]:
    """A U-Net of images without a zero weight, and one inflated from it by `init`."""
    image = randomise(UNet(2, 2, **OPTIONS), 0)
    clip = InflatedUNet(2, 2, temporal_heads=2, **OPTIONS).double()
    models = [nn.ModuleDict({"denoiser": nn.ModuleDict({"net": net})}) for net in (clip, image)]
    message = copy_weights(*models, "RUN")
    assert all(".temporal." in name for name in message.split("new: ")[1].split(", "))
    assert set(image.state_dict()) < set(clip.state_dict())
    return image, clip


def batch() -> tuple[torch.Tensor, torch.Tensor, Condition]:
    g = torch.Generator().manual_seed(1)
    x, concat, context, vector = (
        torch.randn(*shape, dtype=torch.float64, generator=g)
        for shape in ((2, 2, 3, 8, 8), (2, 1, 3, 8, 8), (2, 4, 6), (2, 5))
    )
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    return x, torch.tensor([10.0, 400.0]).double(), Condition(context=context, mask=mask, vector=vector, concat=concat)


@torch.no_grad()
def test_inflated_unet_is_the_image_network_at_first(nets):
    """Frame by frame, to rounding in float64; and with what sampling computes once given."""
    image, clip = nets
    x, t, cond = batch()
    out = clip(x, t, cond)
    for k in range(3):
        one = Condition(context=cond.context, mask=cond.mask, vector=cond.vector, concat=cond.concat[:, :, k])
        assert (out[:, :, k] - image(x[:, :, k], t, one)).abs().max() < 1e-12
    assert torch.equal(clip(x, t, cond, emb=clip.embed(t, cond), memory=clip.memory(cond)), out)
    assert (InferenceNet(clip)(x, t, cond) - out).abs().max() < 1e-12
    first = Condition(context=cond.context[:1], vector=cond.vector[:1], concat=cond.concat[:1])
    assert (clip(x[:1], t[:1], first) - out[:1]).abs().max() < 1e-12


def test_temporal_layers_learn_from_the_first_step(nets):
    """Their last projections have gradients at once; trained, a frame depends on the others and on its number."""
    _, clip = nets
    x, t, cond = batch()
    clip(x, t, cond).square().mean().backward()
    ends = [p.grad for name, p in clip.named_parameters() if name.endswith("temporal.proj_out.weight")]
    assert len(ends) == 7
    assert all(grad.abs().max() > 0 for grad in ends)
    trained = InflatedUNet(2, 2, temporal_heads=2, **OPTIONS)
    randomise(trained, 2)
    with torch.no_grad():
        out = trained(x, t, cond)
        changed = x.clone()
        changed[:, :, 0] += 1
        assert (trained(changed, t, cond) - out)[:, :, 2].abs().max() > 1e-3
        backwards = Condition(context=cond.context, mask=cond.mask, vector=cond.vector, concat=cond.concat.flip(2))
        assert (trained(x.flip(2), t, backwards).flip(2) - out).abs().max() > 1e-3


@torch.no_grad()
def test_temporal_transformer_attends_along_time_alone():
    """Without its normalisation over places, a change reaches the same place of the same clip in every frame."""
    layer = randomise(TemporalTransformer(8, 2, 4), 3)
    layer.norm, layer.frames = nn.Identity(), 3
    x = torch.randn(6, 8, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    changed = x.clone()
    changed[3:4, :, 1, 2] += 1  # the first frame of the second clip
    moved = (layer(changed) - layer(x)).abs().amax(1) > 1e-9
    expected = torch.zeros(6, 2, 5, dtype=torch.bool)
    expected[3:, 1, 2] = True
    assert torch.equal(moved, expected)


@torch.no_grad()
def test_temporal_transformer_is_the_written_out_one():
    """At each place: two attentions along time with the frames' positions, a feed-forward layer, all as residuals."""
    layer = randomise(TemporalTransformer(8, 2, 4).double(), 3)
    layer.frames = 3
    g = torch.Generator().manual_seed(4)
    x = torch.randn(6, 8, 2, 2, dtype=torch.float64, generator=g)  # two clips
    normed, got = layer.norm(x), layer(x)
    angles = torch.arange(3.0, dtype=torch.float64)[:, None] * 10_000 ** (-torch.arange(4) / 4)
    places = torch.cat([angles.sin(), angles.cos()], 1)
    for clip in range(2):
        for row in range(2):
            for column in range(2):
                one = slice(3 * clip, 3 * clip + 3)
                h = layer.proj_in(normed[one, :, row, column])[None]  # (1, F, C)
                for k in range(2):
                    h = h + layer.attentions[k](layer.norms[k](h) + places)
                h = h + layer.feed_forward(layer.norms[2](h))
                want = x[one, :, row, column] + layer.proj_out(h)[0]
                torch.testing.assert_close(got[one, :, row, column], want, atol=1e-6, rtol=1e-6)  # places in float32
    with pytest.raises(ConfigError, match="temporal_heads=3 does not divide"):
        TemporalTransformer(8, 3, 4)
    with pytest.raises(ConfigError, match="temporal_heads=0"):
        TemporalTransformer(8, 0, 4)
