"""A training step, AdamW and average of weights included, from cached latents: ours against diffusers' U-Net as its script trains it."""

from functools import partial

import diffusers
import torch
from built import told, unet
from ceilings import peak
from pairs import Work, keep, paired
from pairs import told as row_of
from sampling import flops_of
from torch import Tensor
from torch.nn import functional as F

from ldm.condition import Condition
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.prediction import Eps
from ldm.diffusion.schedule import scaled_linear
from ldm.ema import PowerEMA

BATCH = 8


class Theirs:
    """train_text_to_image.py's step: add_noise, MSE, clipped gradients, AdamW, EMAModel."""

    def __init__(self, net, size: int, context: Tensor):
        from diffusers import DDPMScheduler
        from diffusers.training_utils import EMAModel

        self.net, self.context, self.size = net.train(), context, size
        self.scheduler = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        self.optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5)
        self.average = EMAModel(net.parameters(), decay=0.9999)
        self.z = torch.randn(BATCH, 4, size, size)

    def loss(self, t: Tensor, noise: Tensor) -> Tensor:
        noisy = self.scheduler.add_noise(self.z, noise, t)
        return F.mse_loss(self.net(noisy, t, self.context).sample.float(), noise)

    def step(self, low: bool) -> None:
        t, noise = torch.randint(0, 1000, (BATCH,)), torch.randn_like(self.z)
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
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
        self.cond, self.count = Condition(context=context), 0
        self.optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5, fused=True)
        self.average = PowerEMA(net, 0.1)
        self.z = torch.randn(BATCH, 4, size, size)

    def loss(self, t: Tensor, noise: Tensor) -> Tensor:
        alpha, sigma = (part.float()[:, None, None, None] for part in self.denoiser.schedule.alpha_sigma((t.double() + 1) / 1000))
        out, _ = self.denoiser.output(alpha * self.z + sigma * noise, (t.float() + 1) / 1000, self.cond)
        return F.mse_loss(out.float(), noise)

    def step(self, low: bool) -> None:
        t, noise = torch.randint(0, 1000, (BATCH,)), torch.randn_like(self.z)
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            loss = self.loss(t, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.denoiser.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.count += 1
        self.average.update(self.count)


def measure(name: str, size: int, pairs: int, threads: int) -> None:
    """float32 and bfloat16 against the peer's, and ours in bfloat16 against ours in float32."""
    made, context = unet(name, size), told(name, size, BATCH).context[:BATCH]
    ours, theirs = Ours(made.ours, size, context), Theirs(made.theirs, size, context)
    theirs.z = ours.z
    t, noise = torch.arange(0, 1000, 125), torch.randn_like(ours.z)
    with torch.no_grad():
        equal = f"losses {abs(float(ours.loss(t, noise) / theirs.loss(t, noise)) - 1):.1e} apart"
    setting, peer = f"{name}, {size}x{size} latents, {BATCH} images", f"diffusers {diffusers.__version__}"
    flops = flops_of(partial(theirs.step, False))
    for what, mine, other, by, dtype in (
        ("training step", partial(ours.step, False), partial(theirs.step, False), f"{peer}, eager", torch.float32),
        ("training step, bf16", partial(ours.step, True), partial(theirs.step, True), f"{peer}, bf16 autocast", torch.bfloat16),
        ("training step, bf16", partial(ours.step, True), partial(ours.step, False), "ours in float32", torch.bfloat16),
    ):
        said = equal if dtype == torch.float32 else ""
        keep(row_of(Work(what, setting, by, flops), threads, *paired(mine, other, pairs), said, peak(dtype)))


def encoding(name: str, first_stage: str, size: int, pixels: int, pairs: int, threads: int) -> None:
    """Our step from cached moments against our step that encodes its images anew, which is what a script without a cache does."""
    from built import vae

    made, stage = unet(name, size), vae(first_stage).ours
    ours = Ours(made.ours, size, told(name, size, BATCH).context[:BATCH])
    image = torch.rand(BATCH, 3, pixels, pixels) * 2 - 1

    def encoded() -> None:
        with torch.no_grad():
            stage.encode(image)
        ours.step(False)

    work = Work(
        "training step from cached moments", f"{name}, {first_stage} first stage at {pixels} px, {BATCH} images", "encoding each step"
    )
    keep(row_of(work, threads, *paired(partial(ours.step, False), encoded, pairs), "the same step"))
