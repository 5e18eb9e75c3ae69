"""The first stage's encoder and decoder: ours, packed for drawing, against diffusers' AutoencoderKL with the same
weights.
"""

import copy
from functools import partial

import diffusers
import torch
from built import vae
from ceilings import peak
from pairs import Work, keep, paired
from pairs import told as row_of
from sampling import difference, flops_of, in_bf16
from torch import Tensor

from ldm.net.inference import pack_copy


@torch.inference_mode()
def decode(stage, z: Tensor) -> Tensor:
    answer = stage.decode_raw(z) if hasattr(stage, "decode_raw") else stage.decode(z).sample
    return answer.float()


@torch.inference_mode()
def encode(stage, image: Tensor) -> Tensor:
    answer = stage.posterior(image).mean if hasattr(stage, "decode_raw") else stage.encode(image).latent_dist.mean
    return answer.float()


def measure(name: str, pixels: int, batch: int, pairs: int, threads: int) -> None:
    made = vae(name)
    factor = 2 ** (len(made.theirs.config.block_out_channels) - 1)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(batch, 4, pixels // factor, pixels // factor, generator=generator)
    image = torch.rand(batch, 3, pixels, pixels, generator=generator) * 2 - 1
    single, low = pack_copy(made.ours, torch.float32), pack_copy(made.ours, torch.bfloat16)
    halved = copy.deepcopy(made.theirs).to(torch.bfloat16, memory_format=torch.channels_last)
    setting, peer = f"{name} at {pixels} px, {batch} images", f"diffusers {diffusers.__version__}"
    for what, call, given in (("decode", decode, z), ("encode", encode, image))[: 1 if name == "sd1" else 2]:
        eager, mine = partial(call, made.theirs, given), partial(call, single, given)
        mine_low = in_bf16(partial(call, low, given))
        flops = flops_of(eager)
        for title, ours, theirs, by, dtype in (
            (what, mine, eager, "eager", torch.float32),
            (f"{what}, bf16", mine_low, eager, "eager float32", torch.bfloat16),
            (f"{what}, bf16", mine_low, in_bf16(eager), "bf16 autocast", torch.bfloat16),
            (
                f"{what}, bf16",
                mine_low,
                partial(call, halved, given.bfloat16()),
                "bf16 weights, channels_last",
                torch.bfloat16,
            ),
        ):
            equal = difference(ours, theirs, relative=dtype != torch.float32)
            keep(
                row_of(
                    Work(title, setting, f"{peer}, {by}", flops),
                    threads,
                    *paired(ours, theirs, pairs),
                    equal,
                    peak(dtype),
                )
            )
