from functools import partial

import pytest
import torch

from ldm.autoencoder.kl import AutoencoderKL
from ldm.autoencoder.patch import PatchDecoder, PatchEncoder
from ldm.conditioner.none import Unconditional
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.grids import trailing
from ldm.diffusion.prediction import V
from ldm.diffusion.schedule import cosine
from ldm.errors import ConfigError
from ldm.model import LatentDiffusion
from ldm.net.dit import DiT
from ldm.sampling.clips import complete_clip, extend_clip
from ldm.sampling.tasks import sample
from ldm.tensors import KeyedNoise


@pytest.fixture(scope="module")
def model() -> LatentDiffusion:
    """A model of clips (1, 6, 8, 8) with random weights, whose latent cells have two frames."""
    torch.manual_seed(0)
    options = {"channels": 1, "z_channels": 2, "factor": [2, 4, 4], "width": 8}
    first_stage = AutoencoderKL(PatchEncoder(**options), PatchDecoder(**options), 2, [2, 4, 4])
    net = DiT(2, 2, [1, 1, 1], 24, 1, 2)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return LatentDiffusion(first_stage, Unconditional(), Denoiser(net, cosine(), V()), (6, 8, 8))


def draw(model, image, seeds=(0, 1), **options):
    batch = {"index": list(range(len(image))), "image": image}
    ts = trailing(model.denoiser.schedule, 4)
    return sample(model, batch, seeds, ts, task=partial(complete_clip, **options))


def clips(num: int = 2) -> torch.Tensor:
    return 1.9 * torch.rand(num, 1, 6, 8, 8, generator=torch.Generator().manual_seed(1)) - 0.95


@pytest.mark.parametrize(("first", "last"), [(1, 0), (1, 1), (3, 0), (0, 2)])
def test_complete_clip_keeps_the_given_frames(model, first, last):
    """To the bit; the others follow them, also those in a latent cell with one, and see nothing of their own pixels."""
    x = clips()
    given = [*range(first), *range(6 - last, 6)]
    drawn = draw(model, x, first=first, last=last)
    assert drawn.shape == x.shape
    assert torch.equal(drawn[:, :, given], x[:, :, given])
    other = x.clone()
    other[:, :, [k for k in range(6) if k not in given]] = 0.3
    assert torch.equal(draw(model, other, first=first, last=last), drawn)
    other[:, :, given] *= -1
    moved = (draw(model, other, first=first, last=last) - drawn).abs().amax((0, 1, 3, 4))
    assert (moved > 1e-3).all()


def test_complete_clip_holds_the_given_frames_at_every_step(model):
    """The estimates that the sampler gets are those of a clip with the given frames; other cells are as estimated."""
    x, noise, ts = clips(), KeyedNoise(0, [0, 1]), trailing(model.denoiser.schedule, 4)
    plan = complete_clip(model, {"image": x}, noise, ts, first=1)
    state = torch.randn(2, 2, 3, 2, 2, generator=torch.Generator().manual_seed(2))
    cond = model.condition({"noise": noise})
    free = model.denoiser(state, ts[1], cond)
    held = plan.wrap_denoise(lambda x_t, t: model.denoiser(x_t, t, cond))(state, ts[1])
    clip = model.decode(free.x0)
    clip[:, :, 0] = x[:, :, 0]
    assert torch.allclose(held.x0[:, :, 0], model.encode(clip)[:, :, 0], atol=1e-5)
    assert torch.equal(held.x0[:, :, 1:], free.x0[:, :, 1:])
    assert not torch.allclose(held.x0[:, :, 0], free.x0[:, :, 0])
    assert plan.batch["mask"].shape == (2, 1, 6, 8, 8)
    assert plan.batch["mask"][0, 0, :, 0, 0].tolist() == [
        0,
        1,
        1,
        1,
        1,
        1,
    ]


def test_complete_clip_of_a_picture(model):
    """A picture is the first frame."""
    x = clips()
    assert torch.equal(draw(model, x[:, :, 0]), draw(model, x))


@pytest.mark.parametrize("options", [{"first": 0}, {"first": 6}, {"first": 3, "last": 3}, {"first": -1, "last": 2}])
def test_complete_clip_refuses(model, options):
    with pytest.raises(ConfigError, match=f"first={options['first']} last="):
        draw(model, clips(), **options)


def test_extend_clip_slides_by_half():
    """Every piece begins with the last half of the one before, which stays as it is."""
    asked = []

    def drawn(clip, first, piece):
        asked.append(clip[0, 0, :first, 0, 0].tolist())
        ramp = clip[:, :, first - 1 : first] + torch.arange(1.0, 3.0).view(1, 1, -1, 1, 1)
        return torch.cat([clip[:, :, :first], ramp], 2)

    start = torch.arange(5.0).view(1, 1, 5, 1, 1)
    assert extend_clip(start, 3, drawn).flatten().tolist() == list(range(11))
    assert asked == [[2, 3, 4], [4, 5, 6], [6, 7, 8]]
    assert torch.equal(extend_clip(start, 0, drawn), start)
