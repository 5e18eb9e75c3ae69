"""A diffusion model of 8x8 images that trains in a second, on generated images."""

from collections.abc import Sequence
from functools import partial

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from ldm.autoencoder.identity import Identity
from ldm.condition import Condition
from ldm.conditioner.label import Label
from ldm.conditioner.none import Unconditional
from ldm.data.synthetic import Synthetic
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.objective import Objective
from ldm.diffusion.prediction import V
from ldm.diffusion.schedule import cosine
from ldm.diffusion.times import stratified, uniform
from ldm.diffusion.weighting import output
from ldm.model import LatentDiffusion
from ldm.net.unet import UNet
from ldm.training.diffusion import LitDiffusion
from ldm.training.fit import fit

BATCH = 8


class Convolutions(nn.Module):
    """Two convolutions and an embedding of time: the least that torch.compile has to compile."""

    def __init__(self):
        super().__init__()
        self.first, self.time, self.last = nn.Conv2d(1, 8, 3, padding=1), nn.Linear(1, 8), nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor, cond: Condition) -> Tensor:
        embedded = self.time(time.to(x.dtype)[:, None] / 1000)
        return self.last(silu(self.first(x) + embedded[:, :, None, None]))


def make_convolutions(seed: int = 0) -> LatentDiffusion:
    """Build a model of Convolutions without condition, with weights of a seed."""
    torch.manual_seed(seed)
    return LatentDiffusion(Identity(1), Unconditional(), Denoiser(Convolutions(), cosine(), V()), (8, 8))


def make_unet(seed: int = 0) -> LatentDiffusion:
    """Build a small U-Net conditioned on ten labels, with weights of a seed."""
    torch.manual_seed(seed)
    conditioner = Label(10, 8)
    net = UNet(
        1, 1, channels=8, channel_mult=(1, 2), num_res_blocks=1, num_head_channels=8, num_groups=4, context_dim=8
    )
    return LatentDiffusion(Identity(1), conditioner, Denoiser(net, cosine(), V()), (8, 8))


def make_lit(model: LatentDiffusion, drop: float = 0.1, lr: float = 2e-3) -> LitDiffusion:
    """Build the training of a model, as the default of train.py: fused AdamW, stratified times, clipping."""
    objective = Objective(partial(stratified, density=uniform), output)
    optimizer = partial(torch.optim.AdamW, lr=lr, betas=(0.9, 0.99), fused=True)
    return LitDiffusion(model, objective, optimizer, drop, 1.0)


def train(lit: L.LightningModule, callbacks: Sequence[L.Callback], steps: int, **options) -> None:
    """Train on a CPU."""
    fit(lit, Synthetic(num=64, size=8), callbacks, batch_size=BATCH, steps=steps, accelerator="cpu", **options)


class Losses(L.Callback):
    """Records the loss of every step."""

    def __init__(self):
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer, lit, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"].detach()))
