"""Drawing with a model whose answer is known: where it starts, what it is told, and that only the seed decides."""

from functools import partial

import pytest
import torch

from ldm.condition import Condition
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import cfg
from ldm.diffusion.prediction import X0
from ldm.diffusion.sampler import ddim, ddpm
from ldm.diffusion.schedule import EDM, Flow, cosine, linear
from ldm.diffusion.times import trailing
from ldm.model import LatentDiffusion
from ldm.task import draw, prior, txt2img


class Names(torch.nn.Module):
    """A caption's length as its vector; the empty one is the null condition."""

    keys, context_dim, vector_dim = ("caption",), None, 1

    def forward(self, batch):
        return Condition(vector=torch.tensor([[float(len(caption))] for caption in batch["caption"]]))

    def null(self, batch):
        return Condition(vector=torch.zeros(len(batch["caption"]), 1))


class Echo(torch.nn.Module):
    """Says that x0 is the number it is told, everywhere; notes what it saw."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.1))
        self.seen: list[tuple[float, int]] = []

    def forward(self, x, t, cond, **kept):
        self.seen.append((float(t[0]), len(x)))
        return self.weight * cond.vector[:, :, None, None].expand_as(x)


class Doubling(torch.nn.Module):
    """A first stage of factor 2 whose image is half its latent, pixel for pixel twice as large."""

    z_channels, factor = 1, 2

    def decode(self, z):
        return 0.5 * z.repeat_interleave(2, 2).repeat_interleave(2, 3)

    def encode(self, image):
        return 2 * image[..., ::2, ::2]


def model(schedule=None) -> LatentDiffusion:
    return LatentDiffusion(Doubling(), Names(), Denoiser(Echo(), schedule or cosine(), X0()), (8, 12))


@pytest.mark.parametrize("schedule", [cosine(), linear(), Flow(), EDM()], ids=["cosine", "linear", "flow", "edm"])
def test_prior_has_the_spread_of_noised_data(schedule):
    t = torch.tensor(1.0, dtype=torch.float64)
    alpha, sigma = schedule.alpha_sigma(t)
    noise = torch.randn(2, 1, 3, 3)
    expected = (alpha**2 + sigma**2) ** 0.5
    torch.testing.assert_close(prior(schedule, t, noise), noise * expected.float())


def test_the_answer_is_what_the_model_was_told():
    """x0 is 0.1 times the caption's length at every step, the image half of it: guidance 1 draws that, guidance 3 three times it."""
    ts = trailing(cosine(), 5)
    for scale in (1.0, 3.0):
        image = draw(model(), {"caption": ["four", "eight  8"]}, [0, 1], ts, ddim, partial(cfg, scale=scale))
        assert image.shape == (2, 1, 8, 12)
        for one, length in zip(image, (4, 8), strict=True):
            torch.testing.assert_close(one, torch.full((1, 8, 12), min(1.0, scale * 0.1 * length * 0.5)), rtol=1e-4, atol=1e-4)


def test_txt2img_repeats_each_prompt_and_counts_seeds():
    made = model()
    image = txt2img(made, ["four", "eight  8"], num=3, steps=4, scale=1.0)
    assert image.shape == (6, 1, 8, 12)
    assert [round(float(x), 3) for x in image.mean((1, 2, 3))] == [0.2] * 3 + [0.4] * 3
    assert len(made.denoiser.net.seen) == 4
    assert all(n == 6 for _, n in made.denoiser.net.seen)
    assert txt2img(made, "four", steps=2).shape == (1, 1, 8, 12)


def test_times_descend_from_one():
    made = model()
    txt2img(made, "four", steps=4, scale=1.0)
    times = [t for t, _ in made.denoiser.net.seen]
    assert times == sorted(times, reverse=True)
    assert times[0] == made.denoiser.schedule.net_time(torch.tensor(1.0))


@pytest.mark.parametrize("sampler", [ddim, partial(ddim, eta=1.0), ddpm], ids=["ddim", "eta 1", "ddpm"])
def test_a_seed_is_an_image_in_any_company(sampler):
    """The grid ends before 0, so that the noise is still to be seen; rows by themselves, in another order, and all together are equal."""
    made, ts = model(linear()), trailing(linear(), 6)[:4]
    told = lambda n: {"caption": ["four"] * n}  # noqa: E731
    whole = draw(made, told(4), [7, 8, 9, 10], ts, sampler)
    assert len({float(x.std()) for x in whole}) == 4
    assert torch.equal(draw(made, told(2), [9, 7], ts, sampler), whole[[2, 0]])
    assert torch.equal(torch.cat([draw(made, told(1), [seed], ts, sampler) for seed in (7, 8, 9, 10)]), whole)


def test_drawing_keeps_the_image_in_range_and_makes_no_gradient():
    image = txt2img(model(), "x" * 100, steps=2, scale=1.0)
    assert image.max() == 1.0
    assert not image.requires_grad


def test_the_first_stage_is_never_trained():
    made = model()
    made.train()
    assert not made.autoencoder.training
    assert made.denoiser.training
    assert [name for name, p in made.named_parameters() if p.requires_grad] == ["denoiser.net.weight"]


def test_latents_have_the_first_stages_shape():
    assert model().latent_shape(5) == (5, 1, 4, 6)
    assert model().encode(torch.zeros(2, 1, 8, 12)).shape == (2, 1, 4, 6)
