"""A guided evaluation of a U-Net or DiT, and fifty of them as DDIM: ours against diffusers' networks and its
DDIMScheduler.
"""

import copy
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import diffusers
import torch
from built import Pair, Told, drawing
from ceilings import peak
from pairs import Work, keep, paired
from pairs import told as row_of
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ldm.diffusion import grids, sampler
from ldm.diffusion.denoiser import Denoise, Denoiser
from ldm.diffusion.guidance import cfg
from ldm.diffusion.prediction import Eps
from ldm.diffusion.schedule import scaled_linear
from ldm.net.inference import InferenceNet

SCALE, STEPS = 7.5, 50
T = 500  # of one evaluation
AUTOCAST, WEIGHTS = "bf16 autocast", "bf16 weights, channels_last"
FROZEN, COMPILED = "compiled, weights frozen", "compiled"
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
    scheduler.set_timesteps(STEPS, device=given.x.device)
    x = given.x
    for t in scheduler.timesteps:
        with_words, without = (
            net(scheduler.scale_model_input(torch.cat([x, x]), t), t, given.context).sample.float().chunk(2)
        )
        x = scheduler.step(without + SCALE * (with_words - without), t, x).prev_sample.to(given.x.dtype)
    return x.float()


def guided(denoiser: Denoiser, given: Told) -> Denoise:
    n = len(given.x)
    return cfg(denoiser, given.both.index(slice(None, n)), given.both.index(slice(n, None)), scale=SCALE)


@torch.inference_mode()
def ours_once(denoise: Denoise, given: Told) -> Tensor:
    return denoise(given.x, torch.tensor((T + 1) / 1000, dtype=torch.float64)).eps


@torch.inference_mode()
def ours_loop(denoiser: Denoiser, given: Told) -> Tensor:
    grid = grids.trailing(denoiser.schedule, STEPS)
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


class Asked(NamedTuple):
    """A row: how many steps, one of the peer's two ways to bfloat16 or none, and how the peer is compiled, if it is."""

    steps: int = 1
    low: str = ""
    compiled: str = ""

    @property
    def what(self) -> str:
        words = ["guided evaluation" if self.steps == 1 else f"DDIM-{STEPS}", "bf16" if self.low else "", self.both]
        return ", ".join(filter(None, words))

    @property
    def peer(self) -> str:
        return "diffusers, " + (", ".join(filter(None, (self.low, self.compiled))) or "eager")

    @property
    def both(self) -> str:
        """Said where ours is compiled too, which it is on a GPU: on a CPU its layers are packed."""
        return "compiled" if self.compiled == COMPILED else ""


def asked(size: int, device: str, compiled: bool = False) -> list[Asked]:
    """The rows of a network at a size: all steps of a drawing at 16x16 or on a GPU alone; those to be compiled last."""
    if device != "cpu":
        eager = [Asked(), Asked(STEPS), Asked(low=AUTOCAST), Asked(low=WEIGHTS)]
        return eager + [Asked(steps, low, COMPILED) for low in ("", WEIGHTS) for steps in (1, STEPS)]
    whole = [Asked(STEPS), Asked(STEPS, WEIGHTS)] if size <= 16 else []
    return [Asked(), *whole, Asked(low=AUTOCAST), Asked(low=WEIGHTS), *([Asked(compiled=FROZEN)] if compiled else [])]


def versioned(peer: str) -> str:
    return peer.replace("diffusers", f"diffusers {diffusers.__version__}")


def setting(name: str, size: int, images: int) -> str:
    return f"{name}, {size}x{size} latents, {images} images"


def calls(row: Asked, made: Pair, given: Told, device: str) -> tuple[Answer, Answer]:
    """What a row times: ours, and theirs, which for WEIGHTS is the copy with weights of bfloat16."""
    denoiser = denoiser_of(made, torch.bfloat16 if row.low else torch.float32)
    ours = partial(ours_once, guided(denoiser, given), given) if row.steps == 1 else partial(ours_loop, denoiser, given)
    told = given.low() if row.low == WEIGHTS else given
    theirs = partial(theirs_once if row.steps == 1 else theirs_loop, made.theirs, told)
    return in_bf16(ours, device) if row.low else ours, in_bf16(theirs, device) if row.low == AUTOCAST else theirs


def measure(
    name: str, size: int, images: int, pairs: int, threads: int, compiled: bool = False, device: str = "cpu"
) -> None:
    """Every row of one network at one size.

    compiled: theirs by inductor too, which takes minutes before it begins; on a GPU always, and ours as well.
    """
    made, given = (one.to(device) for one in drawing(name, size, images))
    halved = Pair(made.ours, copy.deepcopy(made.theirs).to(torch.bfloat16, memory_format=torch.channels_last))
    flops = flops_of(partial(theirs_once, made.theirs, given))
    where = setting(name, size, images) + ("" if device == "cpu" else f", {torch.cuda.get_device_name()}")
    for row in asked(size, device, compiled):
        nets = halved if row.low == WEIGHTS else made
        if row.compiled:
            compile_once(row, nets)
        ours, theirs = calls(row, nets, given, device)
        dtype = torch.bfloat16 if row.low else torch.float32
        equal = difference(ours, theirs, relative=row.steps > 1 or dtype != torch.float32)
        times_of = paired(ours, theirs, pairs)
        more = (
            {}
            if device == "cpu"
            else on_gpu(images / statistics.median(times_of[0]), (ours, nets.ours), (theirs, nets.theirs))
        )
        work = Work(row.what, where, versioned(row.peer), row.steps * flops)
        keep(row_of(work, threads, *times_of, equal, peak(dtype, device), **more))


def compile_once(row: Asked, made: Pair) -> None:
    """Compile in place what the row asks for, where it is not yet; rows that ask for less come before."""
    for net in (made.theirs, *([made.ours] if row.both else [])):
        if net._compiled_call_impl is None:
            net.compile(options={"freezing": row.compiled == FROZEN})


def on_gpu(images_per_s: float, *sides: tuple[Answer, torch.nn.Module], held: int = 1) -> dict[str, Any]:
    """What a row tells of a GPU: images a second, and each side's peak in GiB (`gib` and `theirs_gib`).

    A side is its call and its network; held: how many times its weights' bytes are there all the time.
    """
    gib = []
    for call, net in sides:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()  # the other side's too
        call()
        weights = held * sum(one.numel() * one.element_size() for one in net.parameters())
        gib.append((torch.cuda.max_memory_allocated() - before + weights) / 2**30)
    return {"images_per_s": round(images_per_s, 2), "gib": round(gib[0], 2), "theirs_gib": round(gib[1], 2)}


def denoiser_of(made: Pair, dtype: torch.dtype = torch.float32) -> Denoiser:
    return Denoiser(InferenceNet(made.ours, dtype), scaled_linear(), Eps())
