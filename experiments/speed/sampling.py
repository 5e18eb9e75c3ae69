"""A guided evaluation of the U-Net, and fifty of them as DDIM: ours against diffusers' UNet2DConditionModel and DDIMScheduler."""

import copy
from collections.abc import Callable
from functools import partial

import diffusers
import torch
from built import Pair, Told, told, unet
from ceilings import peak
from pairs import Work, keep, paired
from pairs import told as row_of
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ldm.adapter.prepared import Prepared
from ldm.diffusion import sampler, times
from ldm.diffusion.denoiser import Denoise, Denoiser
from ldm.diffusion.guidance import cfg
from ldm.diffusion.prediction import Eps
from ldm.diffusion.schedule import scaled_linear

SCALE, STEPS, IMAGES = 7.5, 50, 4
T = 500  # of one evaluation
Answer = Callable[[], Tensor]


@torch.inference_mode()
def theirs_once(net, given: Told, scale: float = SCALE) -> Tensor:
    """As StableDiffusionPipeline's loop has it."""
    with_words, without = net(torch.cat([given.x, given.x]), T, given.context).sample.float().chunk(2)
    return without + scale * (with_words - without)


@torch.inference_mode()
def theirs_loop(net, given: Told) -> Tensor:
    from diffusers import DDIMScheduler

    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler = DDIMScheduler(**betas, clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing")
    scheduler.set_timesteps(STEPS)
    x = given.x
    for t in scheduler.timesteps:
        with_words, without = net(scheduler.scale_model_input(torch.cat([x, x]), t), t, given.context).sample.float().chunk(2)
        x = scheduler.step(without + SCALE * (with_words - without), t, x).prev_sample
    return x


def guided(denoiser: Denoiser, given: Told) -> Denoise:
    n = len(given.x)
    return cfg(denoiser, given.both.index(slice(None, n)), given.both.index(slice(n, None)), scale=SCALE)


@torch.inference_mode()
def ours_once(denoise: Denoise, given: Told) -> Tensor:
    return denoise(given.x, torch.tensor((T + 1) / 1000, dtype=torch.float64)).eps


@torch.inference_mode()
def ours_loop(denoiser: Denoiser, given: Told) -> Tensor:
    grid = times.trailing(denoiser.schedule, STEPS)
    return sampler.ddim(guided(denoiser, given), denoiser.schedule, given.x, grid, torch.randn_like)


def in_bf16(call: Answer, device: str = "cpu") -> Answer:
    def within() -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return call()

    return within


def flops_of(call: Answer) -> float:
    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


def difference(ours: Answer, theirs: Answer, relative: bool) -> str:
    a, b = ours(), theirs()
    largest = float((a - b).abs().max())
    return f"{largest / float(b.abs().max()):.1e} of the largest" if relative else f"{largest:.1e}"


def measure(name: str, size: int, pairs: int, threads: int, compiled: bool = False, device: str = "cpu") -> None:
    """Every row of one network at one size, all steps of a drawing at 16x16 or on a GPU alone.

    compiled: theirs by inductor too, which takes minutes before it begins.
    """
    made, given = unet(name, size).to(device), told(name, size, IMAGES).to(device)
    setting = f"{name}, {size}x{size} latents, {IMAGES} images" + ("" if device == "cpu" else f", {torch.cuda.get_device_name()}")
    eager = partial(theirs_once, made.theirs, given)
    flops, version = flops_of(eager), f"diffusers {diffusers.__version__}"
    single, low = denoiser_of(made), denoiser_of(made, torch.bfloat16)
    once, once_low = (partial(ours_once, guided(one, given), given) for one in (single, low))
    loop = partial(ours_loop, single, given)
    peers: list[tuple[str, str, Answer, Answer, torch.dtype, int]] = [
        ("guided evaluation", "eager", once, eager, torch.float32, 1),
    ]
    if size <= 16 or device != "cpu":
        peers += [(f"DDIM-{STEPS}", "eager", loop, partial(theirs_loop, made.theirs, given), torch.float32, STEPS)]
    what, mine = "guided evaluation, bf16", in_bf16(once_low, device)
    peers += [(what, said, mine, call, torch.bfloat16, 1) for said, call in halved(made, given, device).items()]
    if compiled:
        whole = torch.compile(made.theirs, options={"freezing": device == "cpu"})
        peers += [("guided evaluation", "compiled, weights frozen", once, partial(theirs_once, whole, given), torch.float32, 1)]
    for what, how, ours, theirs, dtype, steps in peers:
        equal = difference(ours, theirs, relative=steps > 1 or dtype != torch.float32)
        times_of = paired(ours, theirs, pairs)
        keep(row_of(Work(what, setting, f"{version}, {how}", steps * flops), threads, *times_of, equal, peak(dtype, device)))


def halved(made: Pair, given: Told, device: str) -> dict[str, Answer]:
    """diffusers' two ways to bfloat16: autocast, and weights in it laid out channels last."""
    cast = in_bf16(partial(theirs_once, made.theirs, given), device)
    copied = copy.deepcopy(made.theirs).to(torch.bfloat16, memory_format=torch.channels_last)
    low = given._replace(x=given.x.to(torch.bfloat16), context=given.context.to(torch.bfloat16))
    return {"bf16 autocast": cast, "bf16 weights, channels_last": partial(theirs_once, copied, low)}


def denoiser_of(made: Pair, dtype: torch.dtype = torch.float32) -> Denoiser:
    return Denoiser(Prepared(made.ours, dtype), scaled_linear(), Eps())
