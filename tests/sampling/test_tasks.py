"""Drawing with a model whose answer is known: where it starts, what it is told, and that only the seed decides."""

from functools import partial
from itertools import pairwise

import pytest
import torch

from ldm.condition import Condition
from ldm.conditioner.rows import num_rows
from ldm.diffusion.denoiser import Denoised, Denoiser
from ldm.diffusion.grids import trailing
from ldm.diffusion.guidance import cfg
from ldm.diffusion.prediction import X0
from ldm.diffusion.sampler import ddim, ddpm
from ldm.diffusion.schedule import EDM, Flow, cosine, linear
from ldm.model import LatentDiffusion
from ldm.sampling import tasks
from ldm.sampling.pixels import fill_holes, slerp
from ldm.sampling.tasks import (
    ddim_edit,
    generate,
    img2img,
    inpaint,
    interpolate,
    outpaint,
    prior_sample,
    sample,
    super_resolution,
    txt2img,
    unconditional,
    variations,
)
from ldm.tensors import KeyedNoise


class Names(torch.nn.Module):
    """A caption's length as its vector; the empty one is the null condition."""

    keys, context_dim, vector_dim = ("caption",), None, 1

    def forward(self, batch):
        return Condition(vector=torch.tensor([[float(len(caption))] for caption in batch["caption"]]))

    def null(self, batch):
        return Condition(vector=torch.zeros(num_rows(batch), 1))


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
def test_prior_sample_has_std_of_noised_data(schedule):
    t = torch.tensor(1.0, dtype=torch.float64)
    alpha, sigma = schedule.alpha_sigma(t)
    noise = torch.randn(2, 1, 3, 3)
    expected = (alpha**2 + sigma**2) ** 0.5
    torch.testing.assert_close(prior_sample(schedule, t, noise), noise * expected.float())


def test_sample_returns_answer_of_conditioned_model():
    """x0 is 0.1 times the caption's length at every step, the image half of it: guidance 1 draws that, guidance 3 three
    times it.
    """
    ts = trailing(cosine(), 5)
    for scale in (1.0, 3.0):
        image = sample(model(), {"caption": ["four", "eight  8"]}, [0, 1], ts, ddim, partial(cfg, scale=scale))
        assert image.shape == (2, 1, 8, 12)
        for one, length in zip(image, (4, 8), strict=True):
            torch.testing.assert_close(
                one, torch.full((1, 8, 12), min(1.0, scale * 0.1 * length * 0.5)), rtol=1e-4, atol=1e-4
            )


def test_txt2img_repeats_prompts_and_counts_seeds():
    made = model()
    image = txt2img(made, ["four", "eight  8"], num=3, steps=4, scale=1.0)
    assert image.shape == (6, 1, 8, 12)
    assert [round(float(x), 3) for x in image.mean((1, 2, 3))] == [0.2] * 3 + [0.4] * 3
    assert len(made.denoiser.net.seen) == 4
    assert all(n == 6 for _, n in made.denoiser.net.seen)
    assert txt2img(made, "four", steps=2).shape == (1, 1, 8, 12)
    grids = []
    txt2img(made, "four", steps=3, grid=lambda *asked: grids.append(asked) or torch.tensor([1.0, 0.5, 0.0]).double())
    assert grids == [(made.denoiser.schedule, 3)]


def test_sampling_times_descend_from_one():
    made = model()
    txt2img(made, "four", steps=4, scale=1.0)
    times = [t for t, _ in made.denoiser.net.seen]
    assert times == sorted(times, reverse=True)
    assert times[0] == made.denoiser.schedule.net_time(torch.tensor(1.0))


@pytest.mark.parametrize("sampler", [ddim, partial(ddim, eta=1.0), ddpm], ids=["ddim", "eta 1", "ddpm"])
def test_sample_depends_on_seed_not_batch(sampler):
    """The grid ends before 0, so that the noise is still to be seen; rows by themselves, in another order, and all
    together are equal.
    """
    made, ts = model(linear()), trailing(linear(), 6)[:4]
    told = lambda n: {"caption": ["four"] * n}  # noqa: E731
    whole = sample(made, told(4), [7, 8, 9, 10], ts, sampler)
    assert len({float(x.std()) for x in whole}) == 4
    assert torch.equal(sample(made, told(2), [9, 7], ts, sampler), whole[[2, 0]])
    assert torch.equal(torch.cat([sample(made, told(1), [seed], ts, sampler) for seed in (7, 8, 9, 10)]), whole)


def test_sample_is_in_range_without_gradient():
    image = txt2img(model(), "x" * 100, steps=2, scale=1.0)
    assert image.max() == 1.0
    assert not image.requires_grad


def test_autoencoder_is_frozen_in_training():
    made = model()
    made.train()
    assert not made.autoencoder.training
    assert made.denoiser.training
    assert [name for name, p in made.named_parameters() if p.requires_grad] == ["denoiser.net.weight"]


def test_latent_shape_follows_autoencoder():
    assert model().latent_shape(5) == (5, 1, 4, 6)
    assert model().encode(torch.zeros(2, 1, 8, 12)).shape == (2, 1, 4, 6)


class Gauss(torch.nn.Module):
    """The exact x0 of Gaussian data N(0.3, 0.5^2): a net for X0 whose every task has a known answer."""

    def __init__(self, schedule):
        super().__init__()
        self.weight, self.schedule = torch.nn.Parameter(torch.zeros(())), schedule

    def forward(self, x, t, cond, **kept):
        (t,) = set(t.tolist())
        alpha, sigma = self.schedule.alpha_sigma(torch.tensor((t + 1) / self.schedule.T, dtype=torch.float64))
        gain = alpha * 0.25 / (alpha**2 * 0.25 + sigma**2)
        return self.weight + 0.3 + gain.float() * (x - alpha.float() * 0.3)


def gaussian(size=(8, 12)) -> LatentDiffusion:
    schedule = linear()
    return LatentDiffusion(Doubling(), Names(), Denoiser(Gauss(schedule), schedule, X0()), size)


class Patches(torch.nn.Module):
    """A first stage of factor 2 that keeps all: 2 x 2 pixels are four channels."""

    z_channels, factor = 4, 2

    def encode(self, image):
        return torch.nn.functional.pixel_unshuffle(image, 2) * 1.7

    def decode(self, z):
        return torch.nn.functional.pixel_shuffle(z / 1.7, 2)


def patched() -> LatentDiffusion:
    made = gaussian()
    return LatentDiffusion(Patches(), Names(), made.denoiser, (8, 12))


def images(n: int, *size: int) -> torch.Tensor:
    return torch.rand(n, 1, *size, generator=torch.Generator().manual_seed(0)) * 1.8 - 0.9


def chosen(made, task, batch, n=2, steps=5):
    noise = KeyedNoise(0, list(range(n)))
    return task(
        made,
        {"caption": [""] * n, "index": list(range(n)), **batch, "noise": noise},
        noise,
        trailing(made.denoiser.schedule, steps),
    )


def test_img2img_starts_at_strength():
    made, image = gaussian(), images(2, 8, 12)
    choices = chosen(made, partial(img2img, strength=0.5), {"image": image})
    assert choices.ts.tolist() == [0.5, 0.4, 0.2, 0.0]
    alpha, sigma = made.denoiser.schedule.alpha_sigma(torch.tensor(0.5, dtype=torch.float64))
    start = KeyedNoise(0, [0, 1]).normal("start", torch.empty(2, 1, 4, 6))
    torch.testing.assert_close(choices.start, alpha.float() * made.encode(image) + sigma.float() * start)
    assert choices.batch["caption"] == ["", ""]


@pytest.mark.parametrize("strength", [0.0, -0.1, 1.1])
def test_img2img_rejects_invalid_strength(strength):
    with pytest.raises(ValueError, match=f"strength {strength}"):
        chosen(gaussian(), partial(img2img, strength=strength), {"image": images(2, 8, 12)})


def test_img2img_at_lower_strength_is_closer():
    made, image = patched(), images(4, 8, 12)
    batch, ts = {"caption": [""] * 4, "image": image}, trailing(linear(), 50)
    far = [
        float((sample(made, batch, range(4), ts, task=partial(img2img, strength=s)) - image).abs().mean())
        for s in (0.02, 0.3, 1.0)
    ]
    assert far == sorted(far)
    assert far[0] < 0.05


def test_ddim_edit_inverts_image():
    """Followed to its noise and drawn from there as its source, an image is itself but for the steps' error, which
    falls with them.
    """
    made, image = patched(), images(2, 8, 12)
    batch = {"caption": ["", ""], "image": image}
    error = [
        float((sample(made, batch, [0, 1], trailing(linear(), n), task=ddim_edit) - image).abs().max())
        for n in (50, 200)
    ]
    assert error[1] < 0.35 * error[0] < 0.05
    start = chosen(made, ddim_edit, {"image": image}, steps=500).start
    mean, std = 0.3, 0.5  # the ODE keeps the number of standard deviations from the mean
    torch.testing.assert_close(start, (made.encode(image) - mean) / std, atol=0.05, rtol=0)


def test_inpaint_preserves_known_pixels_exactly():
    made, image = patched(), images(2, 8, 12)
    mask = torch.zeros(2, 1, 8, 12)
    mask[0, 0, 2:5, 3:9] = 1
    mask[1] = 1
    decoded = []
    decode = made.autoencoder.decode
    made.autoencoder.decode = lambda z: decoded.append(z) or decode(z)
    out = sample(made, {"caption": ["", ""], "image": image, "mask": mask}, [0, 1], trailing(linear(), 5), task=inpaint)
    (z,), hole = decoded, mask > 0.5
    cells = torch.nn.functional.max_pool2d(mask, 2).bool().expand(2, 4, 4, 6)
    assert torch.equal(z[~cells], made.encode(image)[~cells])
    assert torch.equal(out[~hole], image[~hole])
    assert (out[hole] != image[hole]).all()
    assert out[1].std() > 0.1


def test_inpaint_constrains_every_step_and_ignores_masked_pixels():
    made, image = patched(), images(2, 8, 12)
    mask = torch.zeros(2, 1, 8, 12)
    mask[..., 2:4, 2:6] = 1
    seen = []
    made.autoencoder.encode = lambda x: seen.append(x) or torch.nn.functional.pixel_unshuffle(x, 2)
    other = torch.where(mask > 0.5, 0.77, image)
    one, two = (chosen(made, inpaint, {"image": x, "mask": mask}) for x in (image, other))
    assert torch.equal(*seen)
    bound = one.wrap_denoise(lambda x_t, t: Denoised(torch.full_like(x_t, 9.0), x_t))
    x0 = bound(one.start, one.ts[0]).x0
    assert (x0[:, :, 1, 1:3] == 9).all()
    assert torch.equal(x0[:, :, 0], torch.nn.functional.pixel_unshuffle(image, 2)[:, :, 0])
    assert torch.equal(two.batch["mask"], mask)


def test_fill_holes_interpolates_from_edge():
    image = torch.zeros(1, 1, 5, 7)
    image[..., 3:] = 1
    hole = torch.zeros(1, 1, 5, 7, dtype=torch.bool)
    hole[..., 1:4, 1:6] = True
    full = fill_holes(image, hole)
    assert torch.equal(full[~hole], image[~hole])
    assert 0 <= float(full.min()) <= float(full.max()) <= 1
    assert full[0, 0, 2, 1] < 0.2 < 0.8 < full[0, 0, 2, 5]
    assert not fill_holes(image, torch.ones_like(hole)).any()


@pytest.mark.parametrize(
    "sides",
    [
        {"pad_left": 4},
        {"pad_right": 2},
        {"pad_top": 6},
        {"pad_bottom": 2},
        {"pad_left": 2, "pad_right": 4, "pad_top": 2, "pad_bottom": 4},
    ],
)
def test_outpaint_preserves_original(sides):
    made, image = patched(), images(2, 8, 12)
    out = sample(
        made, {"caption": ["", ""], "image": image}, [0, 1], trailing(linear(), 5), task=partial(outpaint, **sides)
    )
    left, right, top, bottom = (sides.get(f"pad_{side}", 0) for side in ("left", "right", "top", "bottom"))
    assert out.shape == (2, 1, 8 + top + bottom, 12 + left + right)
    assert torch.equal(out[:, :, top : top + 8, left : left + 12], image)
    frame = torch.ones_like(out, dtype=torch.bool)
    frame[:, :, top : top + 8, left : left + 12] = False
    assert out[frame].std() > 0.1


@pytest.mark.parametrize("sides", [{}, {"pad_left": -2, "pad_right": 4}])
def test_outpaint_rejects_zero_padding(sides):
    with pytest.raises(ValueError, match="expected pixels to add"):
        chosen(patched(), partial(outpaint, **sides), {"image": images(2, 8, 12)})


def test_super_resolution_has_scaled_size():
    choices = chosen(gaussian(), partial(super_resolution, scale=4, noise_level=0.3), {"low_res": images(2, 2, 3)})
    assert choices.start.shape == (2, 1, 4, 6)
    assert choices.batch["level"] == 0.3


def test_super_resolution_back_projection_matches_low_res():
    def shrunk(image):
        return torch.nn.functional.interpolate(image, (4, 6), mode="bicubic", antialias=True, align_corners=False)

    low_res = shrunk(images(2, 16, 24))
    drawn, loose = (
        chosen(gaussian(), partial(super_resolution, back_projection_steps=n), {"low_res": low_res}) for n in (20, 0)
    )
    z = torch.randn(2, 1, 8, 12, generator=torch.Generator().manual_seed(1))
    apart, near = ((shrunk(one.decode(z)) - low_res).abs().max() for one in (loose, drawn))
    assert apart > 0.2
    assert near < 1e-3
    assert torch.equal(loose.decode(z), gaussian().decode(z))


def test_generate_accepts_other_sizes():
    choices = chosen(gaussian(), partial(generate, size=[16, 4]), {})
    assert choices.start.shape == (2, 1, 8, 2)
    for size in ([15, 4], [0, 4], [16, 1]):
        with pytest.raises(ValueError, match=rf"size=\[{size[0]},{size[1]}\]: all sides must be multiples of 2"):
            chosen(gaussian(), partial(generate, size=size), {})
    with pytest.raises(ValueError, match=r"size=\[16\]: expected 2 sides"):
        chosen(gaussian(), partial(generate, size=[16]), {})


def test_interpolate_is_slerp_between_seeds():
    made = gaussian()
    frames = chosen(made, partial(interpolate, seed_a=7, seed_b=9, frames=5), {}, n=5).start.double()
    ends = [draw_start(made, seed) for seed in (7, 9)]
    torch.testing.assert_close(frames[0], ends[0])
    torch.testing.assert_close(frames[4], ends[1])
    angles = [
        float(torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).arccos())
        for a, b in pairwise(frames)
    ]
    torch.testing.assert_close(torch.tensor(angles), torch.full((4,), sum(angles) / 4), rtol=0.2, atol=0)
    long = torch.stack([frame.norm() for frame in frames])
    assert long.min() > 0.9 * min(end.norm() for end in ends)


def draw_start(made, seed: int) -> torch.Tensor:
    alpha, sigma = made.denoiser.schedule.alpha_sigma(torch.ones((), dtype=torch.float64))
    return (
        KeyedNoise(0, [seed]).normal("start", torch.empty(1, 1, 4, 6))[0].double() * torch.hypot(alpha, sigma).float()
    )


def test_slerp_matches_manual_values():
    a, b = torch.tensor([[1.0, 0.0], [2.0, 0.0]]), torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    half = slerp(a, b, torch.tensor([1 / 3, 0.5]))
    torch.testing.assert_close(half, torch.tensor([[0.75**0.5, 0.5], [2.0, 0.0]]))


def test_variations_interpolate_image_and_noise():
    made = gaussian()
    starts = [
        chosen(made, partial(variations, source_seed=5, variation_strength=a), {}).start.double()
        for a in (0.0, 0.2, 1.0)
    ]
    torch.testing.assert_close(starts[0], torch.stack([draw_start(made, 5)] * 2))
    torch.testing.assert_close(starts[2], torch.stack([draw_start(made, s) for s in (0, 1)]))
    assert 0 < (starts[1] - starts[0]).norm() < (starts[2] - starts[0]).norm()
    with pytest.raises(ValueError, match=r"variation_strength=1\.5"):
        chosen(made, partial(variations, variation_strength=1.5), {})


def test_negative_prompt_replaces_null_in_guidance():
    """x0 = 0.1 length: at scale 3 it is negative + 3 (prompt - negative), the image half of it."""
    ts, guided = trailing(cosine(), 5), partial(cfg, scale=3.0)
    image = sample(model(), {"caption": ["four"], "negative": ["xx"]}, [0], ts, ddim, guided)
    torch.testing.assert_close(image, torch.full((1, 1, 8, 12), 0.5 * (0.2 + 3 * 0.2)), rtol=1e-4, atol=1e-4)
    held = sample(model(), {"caption": ["four"]}, [0], ts, ddim, guided, keep_conditions=("caption",))
    torch.testing.assert_close(held, torch.full((1, 1, 8, 12), 0.5 * 0.4), rtol=1e-4, atol=1e-4)


def test_unconditional_ignores_conditions():
    ts = trailing(cosine(), 5)
    assert sample(model(), {"caption": ["four"]}, [0], ts, task=unconditional).abs().max() < 1e-6
    assert sample(model(), {}, [0], ts).abs().max() < 1e-6  # as is a batch that says nothing


@pytest.mark.parametrize("name", ["img2img", "edit", "inpaint", "outpaint", "generate", "vary"])
def test_every_task_depends_on_seed_not_batch(name):
    task = {"img2img": img2img, "edit": ddim_edit, "inpaint": inpaint, "generate": generate, "vary": variations}.get(
        name, partial(outpaint, pad_right=2)
    )
    made, ts = patched(), trailing(linear(), 4)
    mask = torch.zeros(4, 1, 8, 12)
    mask[..., :4, :4] = 1

    def told(rows):
        return {"caption": [""] * len(rows), "image": images(4, 8, 12)[rows], "mask": mask[rows], "index": rows}

    whole = sample(made, told([0, 1, 2, 3]), [7, 8, 9, 10], ts, partial(ddim, eta=1.0), task=task)
    assert torch.equal(sample(made, told([2, 0]), [9, 7], ts, partial(ddim, eta=1.0), task=task), whole[[2, 0]])


def test_txt2img_has_seeds_from_the_first_on():
    made, short = model(linear()), lambda schedule, steps: trailing(schedule, steps)[:3]
    image = txt2img(made, "four", num=2, seed=7, steps=5, scale=1.0, grid=short)
    expected = sample(made, {"caption": ["four"] * 2}, [7, 8], short(linear(), 5), ddim, partial(cfg, scale=1.0))
    assert torch.equal(image, expected)


def test_conditions_of_size_are_those_of_whole_images():
    """Those of the images, not of their latents, in both branches of guidance; a batch's own are kept."""
    made, seen = model(), []
    made.condition = lambda batch: seen.append(batch) or Condition(vector=torch.zeros(2, 1))
    ts = trailing(cosine(), 2)
    sample(made, {"caption": ["", ""]}, [0, 1], ts)
    sample(made, {"caption": ["", ""], "crop": torch.full((2, 2), 3)}, [0, 1], ts)
    for batch, crop in zip(seen, (0, 0, 3, 3), strict=True):
        assert batch["original_size"].tolist() == batch["target_size"].tolist() == [[8, 12], [8, 12]]
        assert batch["crop"].tolist() == [[crop, crop]] * 2


def test_inpaint_shows_the_network_known_cells():
    """Every estimate that the sampler gets has the known cells of the image."""
    made, image, seen = patched(), images(2, 8, 12), []
    mask = torch.zeros(2, 1, 8, 12)
    mask[..., 4:] = 1

    def sampler(denoise, schedule, x, ts, noise):
        seen.extend(denoise(x, t).x0 for t in ts[:-1])
        return x

    sample(
        made, {"caption": ["", ""], "image": image, "mask": mask}, [0, 1], trailing(linear(), 3), sampler, task=inpaint
    )
    assert len(seen) == 3
    for x0 in seen:
        assert torch.equal(x0[..., :2], made.encode(image)[..., :2])
        assert not torch.isclose(x0[..., 2:], made.encode(image)[..., 2:]).all()


def test_ddim_edit_inverts_under_its_source_from_the_first_time_after_zero(monkeypatch):
    grids, told = [], []
    monkeypatch.setattr(tasks, "ddim_invert", lambda denoise, schedule, z, up, noise: grids.append(up) or z)
    for schedule, first in ((linear(T=50), 0.02), (Flow(), 1e-3)):
        made = model(schedule)
        condition = made.condition
        made.condition = lambda batch, condition=condition: told.append(batch["caption"]) or condition(batch)
        noise, ts = KeyedNoise(0, [0, 1]), torch.tensor([1.0, 0.5, 0.01, 0.0]).double()
        if first == 1e-3:
            ts[2] = 1e-4
        ddim_edit(made, {"image": images(2, 8, 12), "caption": ["a", "b"]}, noise, ts, source_prompt="some")
        assert grids[-1].tolist() == [1.0, 0.5, first]
    assert told == [["some", "some"]] * 2


def test_fill_holes_reaches_the_middle_from_all_sides():
    image = torch.tensor([0.0, 7.0, 7.0, 7.0, 1.0]).expand(1, 1, 3, 5)
    full = fill_holes(image, image == 7)
    torch.testing.assert_close(full, torch.tensor([0.0, 0.0, 0.5, 1.0, 1.0]).expand(1, 1, 3, 5))
