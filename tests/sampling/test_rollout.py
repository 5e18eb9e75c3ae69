"""Forecasts of an exact model: linear dynamics with noise, whose mean and variance after n steps are known."""

import pytest
import torch
from torch import nn

from ldm.autoencoder.identity import Identity
from ldm.conditioner.spatial import SpatialMap
from ldm.diffusion import grids
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.prediction import V
from ldm.diffusion.sampler import ddim, ddpm, dpmpp_2m
from ldm.diffusion.schedule import Schedule, cosine, pde_refiner
from ldm.model import LatentDiffusion
from ldm.sampling.forecast import change_sampler, rollout

DECAY, NOISE, SCALE = 0.9, 0.3, 8.0  # next state = DECAY * state + NOISE * normal
LATENT_SCALE = SCALE / NOISE  # latents of unit variance


class ExactNet(nn.Module):
    """v of z given the state: z is normal with mean (DECAY - 1) state and deviation NOISE, both in latent units."""

    def __init__(self, schedule: Schedule, noise: float = NOISE):
        super().__init__()
        self.schedule, self.noise, self.anchor = schedule, noise, nn.Parameter(torch.zeros(()))

    def forward(self, x, time, cond):
        T = self.schedule.T
        alpha, sigma = (part[:, None, None].to(x) for part in self.schedule.alpha_sigma((time.double() + 1) / T))
        unit = LATENT_SCALE / SCALE
        mean, variance = unit * (DECAY - 1) * cond.concat[:, :1], (unit * self.noise) ** 2
        x0 = mean + alpha * variance / (alpha**2 * variance + sigma**2) * (x - alpha * mean)
        return (alpha * x - x0) / sigma  # v = alpha eps - sigma x0


def exact_model(schedule: Schedule, noise: float = NOISE) -> LatentDiffusion:
    net = ExactNet(schedule, noise)
    return LatentDiffusion(Identity(1, LATENT_SCALE), SpatialMap(1, "before"), Denoiser(net, schedule, V()), (8,))


@pytest.mark.parametrize(("schedule", "method", "steps"), [(cosine(), dpmpp_2m, 40), (pde_refiner(), ddpm, 4)])
def test_rollout_of_exact_model_follows_its_dynamics(schedule, method, steps):
    """Without noise DECAY^n state, in few rows; its deviation from noise is that of an autoregression."""
    ts = grids.trailing(schedule, steps)
    state = torch.linspace(-2, 2, 8, dtype=torch.float64).repeat(3, 1, 1)
    still = rollout(change_sampler(exact_model(schedule, 0.0), SCALE, [0, 1, 2], ts, method), state, 3)
    assert (still.shape, still.dtype) == ((3, 4, 1, 8), torch.float64)
    for n in range(4):
        torch.testing.assert_close(still[:, n], DECAY**n * state, rtol=0, atol=1e-4)
    rows = 1500
    drawn = rollout(
        change_sampler(exact_model(schedule), SCALE, range(rows), ts, method), state[:1].expand(rows, 1, 8), 2
    )
    variance = NOISE**2 * torch.tensor([1.0, 1 + DECAY**2], dtype=torch.float64)
    if method is dpmpp_2m:  # the refiner has too few steps for a variance
        torch.testing.assert_close(drawn[:, 1:].var(0).mean((1, 2)), variance, rtol=0.05, atol=0)
    torch.testing.assert_close(drawn.mean(0)[2], DECAY**2 * state[0], rtol=0, atol=0.05)


def test_rows_are_keyed_by_seed_and_step():
    schedule = cosine()
    model, ts = exact_model(schedule), grids.trailing(schedule, 4)
    state = torch.zeros(4, 1, 8, dtype=torch.float64)
    together = rollout(change_sampler(model, SCALE, [5, 6, 7, 5], ts, ddpm), state, 3)
    alone = rollout(change_sampler(model, SCALE, [7], ts, ddpm), state[:1], 3)
    assert torch.equal(together[2], alone[0])
    assert torch.equal(together[0], together[3])
    assert not torch.equal(together[0], together[1])
    changes = together[0].diff(dim=0) + (1 - DECAY) * together[0, :-1]
    assert (changes[0] - changes[1]).abs().max() > 0.1  # another step, other noise


def test_sensors_are_kept_and_the_rest_is_drawn():
    """Where the next state is known it is exact, at every step; elsewhere the model's own draw goes on."""
    schedule = cosine()
    ts = grids.trailing(schedule, 8)
    truth = torch.randn(4, 2, 1, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    known = torch.zeros(2, 1, 8, dtype=torch.bool)
    known[..., ::4] = True
    observe = lambda step: (truth[step + 1], known)  # noqa: E731
    draw = change_sampler(exact_model(schedule, 0.0), SCALE, [0, 1], ts, ddim, observe=observe)
    drawn = rollout(draw, truth[0].roll(1, 0), 3)
    for step in range(1, 4):
        torch.testing.assert_close(drawn[:, step][known], truth[step][known], rtol=0, atol=1e-5)
        free = DECAY * drawn[:, step - 1]
        torch.testing.assert_close(drawn[:, step][~known], free[~known], rtol=0, atol=1e-4)
