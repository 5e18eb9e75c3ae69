"""Tasks on clips (B, C, F, H, W): given frames are kept to the bit, the others are drawn.

Given the first frame it is image to video, given the first and the last interpolation, given the first half the next
piece of a longer clip.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ldm.diffusion.constraint import change_x0
from ldm.errors import ConfigError
from ldm.model import LatentDiffusion
from ldm.sampling.tasks import Batch, SamplingPlan, generate, reference_tensor
from ldm.tensors import KeyedNoise, one_for_each


def complete_clip(
    model: LatentDiffusion, batch: Batch, noise: KeyedNoise, ts: Tensor, first: int = 1, last: int = 0
) -> SamplingPlan:
    """Sample a clip whose `first` first and `last` last frames are those of batch["image"].

    image: a clip (B, C, F, H, W), or a picture (B, C, H, W), which is a clip of equal frames.
    At every step the estimate is decoded, the given frames are put in, and the latent cells in which one of them lies
    are encoded again: a cell of several frames follows the given one. A model that was told the mask is told it.
    Raises ConfigError unless some frames are given and some are not.
    """
    image = batch["image"].to(reference_tensor(model))
    if len(model.size) != 3:
        raise ConfigError(f"this model draws samples with {len(model.size)} sides; expected one of clips, with frames")
    image = image[:, :, None].expand(-1, -1, model.size[0], -1, -1) if image.ndim == 4 else image
    frames = image.shape[2]
    if min(first, last) < 0 or not 0 < first + last < frames:
        raise ConfigError(f"first={first} last={last}: expected frames that are given, 1 to {frames - 1} of {frames}")
    given = torch.zeros(frames, dtype=torch.bool, device=image.device)
    given[:first], given[frames - last :] = True, True
    hole = ~given.view(1, 1, -1, 1, 1)
    together = one_for_each(model.autoencoder.factor, 3, "factor")[0]  # frames of a cell
    held = given.view(-1, together).any(1).view(1, 1, -1, 1, 1)

    def hold(z: Tensor) -> Tensor:
        clip = torch.where(hole, model.decode(z), image)
        return torch.where(held, model.encode(clip).to(z), z)

    def decode(sampled: Tensor) -> Tensor:
        return torch.where(hole, model.decode(hold(sampled)), image)

    mask = hole.to(image).expand(len(image), 1, *image.shape[2:])
    plan = generate(model, {**batch, "image": image, "mask": mask}, noise, ts, image.shape[2:])
    return replace(plan, wrap_denoise=partial(change_x0, schedule=model.denoiser.schedule, change=hold), decode=decode)


def extend_clip(clip: Tensor, pieces: int, draw: Callable[[Tensor, int, int], Tensor]) -> Tensor:
    """Make a clip (B, C, F, H, W) longer by `pieces` times half of its frames: (B, C, F + pieces * (F // 2), H, W).

    draw: (clip, first, piece) -> a clip (B, C, F, H, W) that begins with the `first` first frames of that clip, as
    complete_clip makes it; each piece begins with the last half of what there is.
    """
    new, longer = clip.shape[2] // 2, clip
    first = clip.shape[2] - new
    for piece in range(pieces):
        given = longer[:, :, -first:]
        padded = torch.cat([given, given[:, :, -1:].expand(-1, -1, new, -1, -1)], 2)
        longer = torch.cat([longer, draw(padded, first, piece)[:, :, first:]], 2)
    return longer
