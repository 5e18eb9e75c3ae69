"""A training step that encodes its images, with and without augmentation, beside one that reads cached latents."""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from built import ours_unet, vae
from pairs import Work, keep, paired
from pairs import told as row_of

from ldm.condition import Condition
from ldm.conditioner.none import Unconditional
from ldm.data.augment import AugmentedDataset, RandomResizedCrop
from ldm.data.color import ColorJitter
from ldm.data.latents import LatentDataset, encode_latents
from ldm.data.memory import InMemoryDataset
from ldm.data.stream import BatchDataset, BatchStream
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.objective import Objective
from ldm.diffusion.prediction import Eps
from ldm.diffusion.schedule import scaled_linear
from ldm.diffusion.times import independent, uniform
from ldm.diffusion.weighting import output
from ldm.model import LatentDiffusion
from ldm.training.diffusion import LitDiffusion

BATCH, IMAGES = 8, 32


class NoContext(Unconditional):
    """A cross-attention U-Net without a text: one token of zeros, as wide as the network reads."""

    def __init__(self, dim: int):
        super().__init__()
        self.context_dim = dim
        self.register_buffer("token", torch.zeros(1, 1, dim))

    def forward(self, batch: dict[str, Any]) -> Condition:
        return Condition(context=self.token.expand(len(batch["index"]), 1, -1))

    null = forward


def photographs(size: int) -> InMemoryDataset:
    """Images of random bytes, mirrored at random."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (IMAGES, 3, size, size), generator=generator, dtype=torch.uint8)
    return InMemoryDataset("bytes", images, torch.zeros(IMAGES), {"image": [""]}, flip=True)


def step_of(lit: LitDiffusion, data: Any) -> Callable[[], None]:
    """Return a function that does the next training step, reading its batch included."""
    optimizer: Any = lit.configure_optimizers()
    batches, parts = BatchDataset(data), iter(BatchStream(IMAGES, BATCH, 1 << 30))

    def step() -> None:
        batch = batches[next(parts)]
        moved = {name: x.to(lit.device) if isinstance(x, torch.Tensor) else x for name, x in batch.items()}
        lit.training_step(moved, 0)["loss"].backward()
        lit.on_before_optimizer_step(optimizer)
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(name: str, first_stage: str, size: int, pixels: int, pairs: int, threads: int, device: str = "cpu") -> None:
    """Write the rows of one network and first stage."""
    net = ours_unet(name, size)
    denoiser = Denoiser(net.train(), scaled_linear(), Eps())
    model = LatentDiffusion(vae(first_stage).ours, NoContext(net.context_dim), denoiser, (pixels, pixels))
    objective = Objective(partial(independent, density=uniform), output)
    lit = LitDiffusion(model, objective, partial(torch.optim.AdamW, lr=1e-5, fused=True), 0.0, 1.0).to(device)
    data = photographs(pixels)
    changed = AugmentedDataset(data, True, RandomResizedCrop(None, (0.5, 1.0)), color=ColorJitter(0.1, 0.1, 0.1, 0.02))
    cached = step_of(lit, LatentDataset(data, encode_latents(model.autoencoder, data)))
    setting = f"{name}, {first_stage} first stage at {pixels} px, {BATCH} images, {device}"
    for what, other in (("", data), (", crops and colours", changed)):
        times = paired(step_of(lit, other), cached, pairs)
        ours, theirs = (BATCH / statistics.median(seconds) for seconds in times)
        work = Work(f"training step, latents=online{what}", setting, "latents=cached")
        keep(row_of(work, threads, *times, f"{ours:.4g} and {theirs:.4g} images/s"))
