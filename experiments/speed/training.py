"""A training step, AdamW and average of weights included, from cached latents: ours against diffusers' U-Net as its
script trains it.
"""

import statistics
from functools import partial
from typing import NamedTuple

import torch
from built import told, unet
from ceilings import peak
from pairs import Work, keep, paired
from pairs import told as row_of
from sampling import flops_of, on_gpu, setting, versioned
from torch import Tensor
from torch.nn import functional as F

from ldm.condition import Condition
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.prediction import Eps
from ldm.diffusion.schedule import scaled_linear
from ldm.ema import PowerEMA

BATCH = 8
HELD = 4  # times a network's weights: they, AdamW's two moments and the average


class Theirs:
    """train_text_to_image.py's step: add_noise, MSE, clipped gradients, AdamW, EMAModel."""

    def __init__(self, net, size: int, context: Tensor):
        from diffusers import DDPMScheduler
        from diffusers.training_utils import EMAModel

        self.net, self.context, self.size = net.train(), context, size
        self.scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        self.optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5)
        self.average = EMAModel(net.parameters(), decay=0.9999)
        self.z = torch.randn(BATCH, 4, size, size, device=context.device)

    def loss(self, t: Tensor, noise: Tensor) -> Tensor:
        noisy = self.scheduler.add_noise(self.z, noise, t)
        return F.mse_loss(self.net(noisy, t, self.context).sample.float(), noise)

    def step(self, low: bool) -> None:
        t, noise = torch.randint(0, 1000, (BATCH,), device=self.z.device), torch.randn_like(self.z)
        with torch.autocast(self.z.device.type, torch.bfloat16, enabled=low):
            loss = self.loss(t, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.step(self.net.parameters())


class Ours:
    """The same by our trainer's parts: channels last, fused AdamW, an average by one foreach."""

    def __init__(self, net, size: int, context: Tensor):
        self.denoiser = Denoiser(net.train().to(memory_format=torch.channels_last), scaled_linear(), Eps())
        self.cond = Condition(context=context)
        self.optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5, fused=True)
        self.average = PowerEMA(net, 0.1)
        self.z = torch.randn(BATCH, 4, size, size, device=context.device)

    def loss(self, t: Tensor, noise: Tensor) -> Tensor:
        alpha, sigma = (
            part.float()[:, None, None, None] for part in self.denoiser.schedule.alpha_sigma((t.double() + 1) / 1000)
        )
        out, _ = self.denoiser.output(alpha * self.z + sigma * noise, (t.float() + 1) / 1000, self.cond)
        return F.mse_loss(out.float(), noise)

    def step(self, low: bool) -> None:
        t, noise = torch.randint(0, 1000, (BATCH,), device=self.z.device), torch.randn_like(self.z)
        with torch.autocast(self.z.device.type, torch.bfloat16, enabled=low):
            loss = self.loss(t, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.denoiser.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update()


class Asked(NamedTuple):
    """A row: ours in float32 or bfloat16, against diffusers in the same or ours in float32, and whether both are
    compiled.
    """

    low: bool = False
    diffusers: bool = True
    compiled: bool = False

    @property
    def what(self) -> str:
        return "training step" + ", bf16" * self.low + ", compiled" * self.compiled

    @property
    def peer(self) -> str:
        if not self.diffusers:
            return "ours in float32"
        return "diffusers, " + (
            ", ".join(filter(None, ["bf16 autocast" * self.low, "compiled" * self.compiled])) or "eager"
        )


def asked(device: str) -> list[Asked]:
    """The rows of a network; on a GPU compiled too, which comes last."""
    rows = [Asked(), Asked(low=True), Asked(low=True, diffusers=False)]
    return rows if device == "cpu" else [*rows, Asked(compiled=True), Asked(low=True, compiled=True)]


def measure(name: str, size: int, pairs: int, threads: int, device: str = "cpu") -> None:
    """Every row of one network at one size."""
    made, context = unet(name, size).to(device), told(name, size, BATCH).to(device).context[:BATCH]
    ours, theirs = Ours(made.ours, size, context), Theirs(made.theirs, size, context)
    theirs.z = ours.z
    t, noise = torch.arange(0, 1000, 125, device=device), torch.randn_like(ours.z)
    with torch.no_grad():
        equal = f"losses {abs(float(ours.loss(t, noise) / theirs.loss(t, noise)) - 1):.1e} apart"
    where = setting(name, size, BATCH) + ("" if device == "cpu" else f", {torch.cuda.get_device_name()}")
    flops = flops_of(partial(theirs.step, False))
    for row in asked(device):
        if row.compiled and made.ours._compiled_call_impl is None:
            made.ours.compile()
            made.theirs.compile()
        peer, net = (theirs, made.theirs) if row.diffusers else (ours, made.ours)
        mine, other = partial(ours.step, row.low), partial(peer.step, row.low and row.diffusers)
        dtype = torch.bfloat16 if row.low else torch.float32
        times = paired(mine, other, pairs)
        more = (
            {}
            if device == "cpu"
            else on_gpu(BATCH / statistics.median(times[0]), (mine, made.ours), (other, net), held=HELD)
        )
        said = equal if dtype == torch.float32 else ""
        keep(
            row_of(
                Work(row.what, where, versioned(row.peer), flops), threads, *times, said, peak(dtype, device), **more
            )
        )


def encoding(name: str, first_stage: str, size: int, pixels: int, pairs: int, threads: int) -> None:
    """Our step from cached moments against our step that encodes its images anew, which is what a script without a
    cache does.
    """
    from built import vae

    made, stage = unet(name, size), vae(first_stage).ours
    ours = Ours(made.ours, size, told(name, size, BATCH).context[:BATCH])
    image = torch.rand(BATCH, 3, pixels, pixels) * 2 - 1

    def encoded() -> None:
        with torch.no_grad():
            stage.encode(image)
        ours.step(False)

    work = Work(
        "training step from cached moments",
        f"{name}, {first_stage} first stage at {pixels} px, {BATCH} images",
        "encoding each step",
    )
    keep(row_of(work, threads, *paired(partial(ours.step, False), encoded, pairs), "the same step"))
