"""Learn the score of data in the plane with a small network, trained with the same objective as the large ones."""

import math
from functools import partial

import torch
from torch import Tensor, nn

from ldm.animate.mixture import Mixture
from ldm.condition import Condition
from ldm.diffusion import grids, times, weighting
from ldm.diffusion.denoiser import Denoise, Denoised, Denoiser
from ldm.diffusion.objective import Objective
from ldm.diffusion.prediction import V
from ldm.tensors import KeyedNoise

BATCH = 512  # points per step
RATE = 4e-3  # maximum learning rate
KNOWN = 4096  # size of the training set
WIDTH = 128  # hidden units


class ToyNet(nn.Module):
    """A network on points in the plane: x (B, 2), time (B,) in 0..T-1 -> (B, 2)."""

    def __init__(self, T: int, width: int = WIDTH):
        super().__init__()
        self.T = T
        self.layers = nn.Sequential(
            nn.Linear(2 + 8, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, 2),
        )

    def forward(self, x: Tensor, time: Tensor, cond: Condition) -> Tensor:
        angle = (time[:, None] + 1) / self.T * math.pi / 2 * torch.tensor([1.0, 2.0, 4.0, 8.0])  # (B, 4)
        return self.layers(torch.cat([x, angle.sin(), angle.cos()], 1))


def train_toy_denoiser(data: Mixture, steps: int, seed: int = 0) -> Denoise:
    """Train a network for `steps` on samples of the data and return its denoise function; the density is not used.

    Inputs and outputs are float64, as for the exact one.
    """
    T = grids.num_timesteps(data.schedule)
    x0 = data.sample(KeyedNoise(seed, range(KNOWN))).float()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        denoiser = Denoiser(ToyNet(T), data.schedule, V())
    objective = Objective(partial(times.independent, density=times.discrete), weighting.output)
    optimizer = torch.optim.AdamW(denoiser.parameters(), RATE, betas=(0.9, 0.99), weight_decay=0.0)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, max(steps, 2), pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(KNOWN, (BATCH,), generator=generator)
        t = (torch.randint(T, (BATCH,), generator=generator) + 1) / T
        eps = torch.randn(BATCH, 2, generator=generator)
        loss = objective.loss_at(denoiser, x0[rows], Condition(), t, eps)["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()

    @torch.no_grad()
    def denoise(x_t: Tensor, t: Tensor) -> Denoised:
        estimate = denoiser(x_t.float(), t, Condition())
        return Denoised(estimate.x0.to(x_t), estimate.eps.to(x_t))

    return denoise


def score_of(denoise: Denoise, data: Mixture, x_t: Tensor, t: Tensor) -> Tensor:
    """Return the score (B, 2) implied by a denoise function, -eps / sigma (Song et al. 2021b).

    At t = 0 that of the schedule's first entry is returned.
    """
    t = t.clamp(min=1 / grids.num_timesteps(data.schedule))
    return -denoise(x_t, t).eps / data.schedule.alpha_sigma(t)[1]
