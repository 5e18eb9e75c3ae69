"""What the pictures show is what the mathematics says: closed forms, and the very tensors that the tasks return."""

from functools import partial

import pytest
import torch
from oracle import Gaussian
from PIL import Image
from test_tasks import model as echo

from ldm import plotting
from ldm.animate import arguments, attention
from ldm.animate.brownian import brownian, paths, spread
from ldm.animate.density import density, trajectory
from ldm.animate.forward import alpha_bar, forward, process
from ldm.animate.guidance import guidance
from ldm.animate.interpolate import interpolate
from ldm.animate.loss import loss, terms
from ldm.animate.mixture import Mixture, ring
from ldm.animate.reverse import reverse
from ldm.animate.schedules import schedules
from ldm.animate.toy_net import score_of, train_toy_denoiser
from ldm.condition import Condition
from ldm.conditioner.rows import num_rows
from ldm.diffusion import grids, sampler
from ldm.diffusion.denoiser import Denoised, Denoiser
from ldm.diffusion.guidance import cfg
from ldm.diffusion.prediction import V
from ldm.diffusion.schedule import Flow, cosine, linear
from ldm.errors import UserError
from ldm.model import LatentDiffusion
from ldm.net.attention import CrossAttention, sdpa, softmax_attention
from ldm.net.unet import UNet
from ldm.sampling import tasks
from ldm.sampling.monitor import states
from ldm.tensors import KeyedNoise

PROMPT = "a red sneaker"


@pytest.fixture
def photo(tmp_path):
    Image.new("RGB", (40, 24), (255, 0, 0)).save(tmp_path / "a.png")
    return str(tmp_path / "a.png")


@pytest.fixture
def run(monkeypatch):
    """tests/sampling/test_tasks.py's model, whose answer is 0.1 times the length of what it is told, in place of any
    run's.
    """
    model = echo()
    monkeypatch.setattr(arguments, "model_of", lambda run: model)
    monkeypatch.setattr(
        arguments,
        "prompt_batch",
        lambda run, prompt, num: {"index": list(range(num)), "caption": [prompt or "abc"] * num},
    )
    return model


def drawn(film):
    frames = list(film.frames)
    assert len(frames) == film.count
    assert len({frame.shape for frame in frames}) == 1
    assert all(frame.dtype == torch.uint8 and frame.shape[2] == 3 for frame in frames)
    return frames


@pytest.mark.parametrize("schedule", [linear(), cosine()])
def test_forward_process_has_exact_mean_and_variance(schedule):
    x0 = torch.full((1, 64, 64), 0.7, dtype=torch.float64)
    ts = torch.tensor([0.0, 0.3, 0.8, 1.0], dtype=torch.float64)
    states = process(x0, schedule, ts)
    for state, t in zip(states, ts, strict=True):
        alpha, sigma = schedule.alpha_sigma(t)
        assert float(state.mean()) == pytest.approx(0.7 * float(alpha), abs=5 * float(sigma) / 64 + 1e-9)
        assert float(state.std()) == pytest.approx(float(sigma), rel=0.05, abs=1e-9)
    eps = (states[2] - schedule.alpha_sigma(ts[2])[0] * x0) / schedule.alpha_sigma(ts[2])[1]
    again = schedule.alpha_sigma(ts[1])[0] * x0 + schedule.alpha_sigma(ts[1])[1] * eps
    torch.testing.assert_close(states[1], again)  # one noise at every time
    torch.testing.assert_close(alpha_bar(schedule, ts), schedule.alpha_sigma(ts)[0] ** 2, atol=1e-9, rtol=1e-6)


def test_forward_draws_both_images(photo):
    film = forward(photo, frames=2, size=16)
    first, last = drawn(film)
    red = torch.tensor([255, 0, 0], dtype=torch.uint8)
    assert (first == red).all(-1).sum() == 2 * 128 * 128  # both images, without noise, eight pixels for each of theirs
    assert (last == red).all(-1).sum() < 128 * 128
    (still,) = drawn(schedules(photo, stages=3, size=16, crop=(0, 0, 24, 24)))
    assert still.shape[0] == 2 * 68 + 46


def test_animations_reject_invalid_arguments(photo, tmp_path):
    (tmp_path / "b.png").write_text("no image")
    for call, said in [
        (
            lambda: forward(photo, schedules=("linear", "cosin")).frames.__next__(),
            "schedules=cosin: no such schedule; did you mean 'cosine'",
        ),
        (lambda: forward(photo, schedules=("linear",)), "schedules=linear: expected two names"),
        (lambda: forward(photo, frames=1), "frames=1: expected 2 or more"),
        (
            lambda: forward(photo, crop=(30, 0, 20, 20)),
            "crop=30,0,20,20: expected left,top,width,height within 40 x 24 pixels",
        ),
        (lambda: forward(str(tmp_path / "c.png")), "no such file"),
        (lambda: forward(str(tmp_path / "b.png")), "expected an image file"),
        (lambda: density(num=0), "num=0: expected 1 or more"),
    ]:
        with pytest.raises(UserError) as error:
            call()
        assert said in str(error.value)


@pytest.mark.parametrize("dim", [2, 3])
def test_brownian_variance_is_dimension_times_time(dim):
    walk = paths(4000, 8, dim)
    time = torch.linspace(0, 1, 9, dtype=torch.float64)
    torch.testing.assert_close(spread(walk), dim * time, rtol=0.06, atol=0)
    steps = walk.diff(dim=0)
    assert (
        abs(float((steps[3] * steps[5]).mean())) < 0.01 * float(steps.square().mean()) * 10
    )  # what comes next owes nothing to what was
    torch.testing.assert_close(walk[:, :10], paths(10, 8, dim))  # a particle's path is its own


def test_brownian_draws_every_frame():
    assert len(drawn(brownian(num=5, frames=2))) == 3


def test_mixture_of_one_matches_gaussian_oracle():
    schedule, x = cosine(), torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one = Mixture(schedule, torch.full((1, 2), 0.6, dtype=torch.float64), 0.35)
    for t in torch.tensor([0.1, 0.6, 1.0], dtype=torch.float64):
        for mine, exact in zip(one(x, t)[:2], Gaussian(schedule)(x, t)[:2], strict=True):
            torch.testing.assert_close(mine, exact)


def test_mixture_score_is_gradient_of_log_density():
    data, t = ring(cosine(), 5), torch.tensor(0.4, dtype=torch.float64)
    x = torch.randn(7, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    (grad,) = torch.autograd.grad(data.density(x, t).log().sum(), x)
    torch.testing.assert_close(data.score(x.detach(), t), grad)
    x0, eps, _ = data(x.detach(), t)
    alpha, sigma = data.schedule.alpha_sigma(t)
    torch.testing.assert_close(alpha * x0 + sigma * eps, x.detach())
    line = torch.linspace(-6, 6, 121, dtype=torch.float64)
    assert float(data.density(torch.cartesian_prod(line, line), t).sum()) * 0.01 == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("draw", [sampler.ddpm, sampler.ddim])
def test_flow_carries_noise_to_data(draw):
    data = ring(cosine())
    ts = grids.trailing(data.schedule, 30)
    walk = trajectory(data, data, ts, 160, 0, draw)
    assert walk.shape == (31, 160, 2)
    assert float(walk[0].std()) == pytest.approx(1, abs=0.1)
    nearest = torch.cdist(walk[-1], data.means).min(1)
    assert (nearest.values < 0.5).double().mean() > 0.95
    assert len(nearest.indices.unique()) == 8  # no Gaussian is forgotten
    torch.testing.assert_close(
        walk[0], trajectory(data, data, ts, 160, 0, sampler.euler)[0]
    )  # every sampler starts there


@pytest.mark.parametrize("training", [0, 2])
def test_density_draws_every_frame(training):
    assert len(drawn(density(num=6, steps=2, training=training))) == 3


@pytest.mark.slow
def test_toy_net_learns_score_from_points():
    """After 400 steps the network's score is near the exact one, before any it is not, and it carries noise to the
    data.
    """
    data = ring(cosine())
    some = data.sample(KeyedNoise(7, range(500)))
    eps = torch.randn(500, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    off = {}
    for steps in (0, 400):
        found = train_toy_denoiser(data, steps)
        for t in torch.tensor([0.2, 0.5], dtype=torch.float64):
            alpha, sigma = data.schedule.alpha_sigma(t)
            x = alpha * some + sigma * eps
            exact = data.score(x, t)
            off[steps, float(t)] = float((score_of(found, data, x, t) - exact).square().sum() / exact.square().sum())
    assert off[400, 0.2] < 0.25 < off[0, 0.2]
    assert off[400, 0.5] < 0.02 < off[0, 0.5]
    last = trajectory(data, found, grids.trailing(data.schedule, 20), 80, 0, sampler.ddim)[-1]
    assert (torch.cdist(last, data.means).min(1).values < 0.5).double().mean() > 0.9


def test_states_of_second_order_sampler_are_on_grid():
    data = ring(cosine())
    ts = grids.uniform_grid(data.schedule, 4)
    x = torch.ones(1, 2, dtype=torch.float64)
    assert len(states(lambda denoise: sampler.heun(denoise, data.schedule, x, ts, torch.zeros_like), data, ts)) == 5


def region(frame, images, left):
    sheet = plotting.concatenate(images, plotting.columns_of(len(images)))
    zoom = max(1, round(200 / sheet.shape[-1]))
    pixels = ((sheet.clamp(-1, 1) + 1) * 127.5).round().byte().repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)
    place = frame[24 : 24 + pixels.shape[1], left : left + pixels.shape[2]]
    return place, pixels.expand(3, -1, -1).permute(1, 2, 0), pixels.shape[2]


def test_reverse_starts_at_prior_and_ends_at_sample(run):
    frames = drawn(reverse("run", prompt="some words", num=3, steps=4, seed=5))
    assert len(frames) == 5
    noise = KeyedNoise(0, [5, 6, 7])
    ts = grids.trailing(run.denoiser.schedule, 4)
    seen, wanted, wide = region(
        frames[0], run.decode(tasks.prior_sample(run.denoiser.schedule, ts[0], tasks.initial_noise(run, noise))), 12
    )
    assert torch.equal(seen, wanted)
    batch = {"index": [0, 1, 2], "caption": ["some words"] * 3}
    sample = tasks.sample(run, batch, range(5, 8), ts, sampler.ddim, partial(cfg, scale=3.0))
    for left in (12, 24 + wide):
        seen, wanted, _ = region(frames[-1], sample, left)
        assert torch.equal(seen, wanted)


def test_interpolate_starts_and_ends_at_its_seeds(run, monkeypatch):
    shown = []
    monkeypatch.setattr(
        "ldm.animate.interpolate.torch.stack", lambda ways: shown.extend(ways) or torch.cat([w[None] for w in ways])
    )
    run.denoiser.net.forward = lambda x, t, cond, **kept: 0.3 * x  # an answer that depends on the noise
    assert len(drawn(interpolate("run", num=2, frames=3, steps=2, seed=4))) == 3
    ts = grids.trailing(run.denoiser.schedule, 2)
    ends = tasks.sample(
        run, {"index": [0] * 4, "caption": ["abc"] * 4}, range(4, 8), ts, sampler.ddim, partial(cfg, scale=3.0)
    )
    for row, way in enumerate(shown[:2]):
        torch.testing.assert_close(way[0], ends[2 * row])
        torch.testing.assert_close(way[-1], ends[2 * row + 1])


def test_guidance_draws_one_column_per_scale(run):
    (one,) = drawn(guidance("run", num=2, scales=(1.0, 3.0), steps=2))
    (two,) = drawn(guidance("run", num=2, scales=(1.0, 3.0, 5.0), steps=2))
    assert two.shape[1] - one.shape[1] == 60 + 4  # 12 pixels wide, five for each
    grey = [int(one[30, 190 + 2 + column * 64, 0]) for column in range(2)]
    assert grey[1] - grey[0] == pytest.approx(
        127.5 * 0.5 * 0.1 * 3 * 2, abs=1
    )  # decoded x0 = 0.5 * 0.1 * length * scale


def test_animations_sample_on_a_schedule_without_entries(run):
    run.denoiser.schedule = Flow()
    assert len(drawn(reverse("run", num=1, steps=2))) == 3
    assert len(drawn(interpolate("run", num=1, frames=2, steps=2))) == 2
    assert len(drawn(guidance("run", num=1, steps=2))) == 1


class Told(torch.nn.Module):
    """Three words and two marks as tokens of their own, the rest padding."""

    keys, context_dim, vector_dim, concat_channels = ("caption",), 6, None, 0

    def forward(self, batch):
        n = num_rows(batch)
        context = torch.randn(1, 8, 6, generator=torch.Generator().manual_seed(2)).expand(n, 8, 6)
        return Condition(context=context, mask=torch.arange(8).expand(n, 8) < 6)

    null = forward

    def tokenize(self, prompt):
        return ["a", "red", "sneak", "er"]


@pytest.fixture(params=[sdpa, softmax_attention])
def reader(request):
    net = UNet(
        2,
        2,
        channels=8,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(1, 2),
        context_dim=6,
        num_heads=2,
        num_groups=4,
        attention_fn=request.param,
    )
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(p.numel()))
    first = echo().autoencoder
    first.z_channels = 2
    first.decode = lambda z: z[:, :1].repeat_interleave(2, 2).repeat_interleave(2, 3)
    return LatentDiffusion(first, Told(), Denoiser(net, cosine(), V()), (12, 16))


def test_attention_maps_sum_to_one(reader, monkeypatch):
    ts = grids.trailing(reader.denoiser.schedule, 2)
    found = attention.maps(reader, PROMPT, ts, 3.0, seed=1)
    assert found.words == ["(start)", "a", "red", "sneaker", "(end)"]
    assert found.maps.shape == (5, 6, 8)
    torch.testing.assert_close(found.maps.sum(0), torch.ones(6, 8))
    assert float(found.maps.std()) > 0.01
    plain = tasks.sample(reader, {"index": [0], "caption": [PROMPT]}, [1], ts, sampler.ddim, partial(cfg, scale=3.0))[0]
    assert torch.equal(found.image, plain)  # looking on changes nothing, and nothing looks on afterwards
    assert {place.attend for place in reader.denoiser.net.modules() if isinstance(place, CrossAttention)} <= {
        sdpa,
        softmax_attention,
    }
    monkeypatch.setattr(arguments, "model_of", lambda run: reader)
    drawn(attention.attention("run", PROMPT, steps=1))


def test_resize_map_preserves_positions():
    share = torch.zeros(12, 2)  # 3 x 4 places of a 6 x 8 latent
    share[:, 0], share[5] = 1.0, torch.tensor([0.0, 1.0])  # row 1, column 1
    maps = attention.resize_map(share, (6, 8))
    assert maps[1].argmax() in (2 * 8 + 2, 2 * 8 + 3, 3 * 8 + 2, 3 * 8 + 3)
    torch.testing.assert_close(maps.sum(0), torch.ones(6, 8))


@pytest.mark.parametrize(
    ("prompt", "pieces", "words"),
    [
        ("A red sneaker", ["a", "red", "sneak", "er"], ["a", "red", "sneaker"]),
        ("t-shirt, red", ["t", "-", "shirt", ",", "red"], ["t", "-", "shirt", ",", "red"]),
        ("in in", ["in", "in"], ["in", "in"]),
        ("", [], []),
    ],
)
def test_group_tokens_joins_pieces_into_words(prompt, pieces, words):
    names, groups = attention.group_tokens(prompt, pieces, len(pieces) + 3)
    assert names == ["(start)", *words, "(end)"]
    assert sorted(place for group in groups for place in group) == list(range(len(pieces) + 3))


def test_attention_rejects_model_without_text(run):
    with pytest.raises(UserError, match="does not attend to words"):
        attention.maps(run, PROMPT, grids.trailing(run.denoiser.schedule, 2), 1.0)


def test_loss_terms_are_zero_for_exact_denoiser():
    schedule, x0 = cosine(), torch.randn(3, 1, 2, 2, dtype=torch.float64)

    def knows(x_t, t):
        alpha, sigma = schedule.alpha_sigma(t)
        return Denoised(x0, (x_t - alpha * x0) / sigma)

    noise = KeyedNoise(0, range(3))
    found = terms(knows, schedule, x0, 12, noise)
    assert found.kl.shape == found.eps.shape == (len(found.ts), 3)
    assert float(found.kl.abs().max()) < 1e-9
    assert float(found.eps.max()) < 1e-9
    assert (float(found.ts[0]), float(found.ts[-1])) == (2 / 1000, 1.0)
    wrong = terms(lambda x_t, t: Denoised(x0 + 0.1, x_t), schedule, x0, 12, noise)
    i, (alpha, sigma) = 5, schedule.alpha_sigma(found.ts)
    (alpha_s, sigma_s) = schedule.alpha_sigma(found.ts - 1 / 1000)
    snr = (alpha_s / sigma_s) ** 2 - (alpha / sigma) ** 2
    wanted = 0.5 * snr[i] * 0.01 / torch.log(torch.tensor(2.0))  # Kingma et al. 2021, eq. 13
    torch.testing.assert_close(wrong.kl[i], wanted.expand(3).double(), rtol=1e-6, atol=0)


def test_loss_draws_every_frame():
    drawn(loss(num=3, points=3))
