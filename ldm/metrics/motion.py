"""Motion of one bright thing on a dark ground, measured without a network: direction, speed, steadiness.

Clips are (B, C, F, H, W) in [-1, 1], background -1. Controls: `freeze` and `shuffle_frames`.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.tensors import KeyedNoise, interpolation_weights

STILL = 8  # the motion of what stands still, after those of eight directions, as ldm.data.moving counts them
FLOOR = 0.1  # brightness, of 0 to 1, that counts as background: a first stage's ground is not exactly black
SLOWEST = 0.5  # pixels a frame; what is slower stands still
EXACT = 1e-8  # mean square below which frames are equal: a PSNR of 86 dB


def centre_of_mass(clips: Tensor, floor: float = FLOOR) -> Tensor:
    """Return row and column (B, F, 2), float64 and in pixels, of the centre of brightness of each frame.

    floor: brightness, of 0 to 1, that is subtracted first.  An empty frame's centre is the picture's.
    """
    mass = ((clips.double() + 1) / 2 - floor).clamp(min=0).sum(1)  # (B, F, H, W)
    total = mass.sum((2, 3))
    sides = [(side, mass.sum(5 - side)) for side in (2, 3)]  # over the other side: (B, F, H) and (B, F, W)
    places = [part @ torch.arange(part.shape[2], dtype=part.dtype, device=part.device) for _, part in sides]
    middle = [(mass.shape[side] - 1) / 2 for side, _ in sides]
    empty = total <= 0
    found = [torch.where(empty, m, place / total.clamp(min=1e-12)) for m, place in zip(middle, places, strict=True)]
    return torch.stack(found, -1)


def steps(centres: Tensor) -> Tensor:
    """Return the displacements (B, F - 1, 2) of centres (B, F, 2) from frame to frame."""
    return centres.diff(dim=1)


def velocity(centres: Tensor) -> Tensor:
    """Return the mean displacement a frame (B, 2) over the first half of centres (B, F, 2).

    A garment of ldm.data.moving keeps its direction as long.
    """
    return steps(centres)[:, : (centres.shape[1] - 1) // 2].mean(1)


def motions(centres: Tensor) -> Tensor:
    """Return the motion (B,) of centres (B, F, 2), an index into ldm.data.moving.MOTIONS: the nearest direction."""
    v = velocity(centres)
    turn = torch.atan2(v[:, 0], v[:, 1]) * (STILL / math.tau)
    return torch.where(v.norm(dim=1) < SLOWEST, STILL, turn.round().long() % STILL)


def speeds(centres: Tensor) -> Tensor:
    """Return the mean length (B,) of the displacements of centres (B, F, 2), in pixels a frame."""
    return steps(centres).norm(dim=2).mean(1)


def rms_acceleration(centres: Tensor) -> Tensor:
    """Return the root mean square (B,) of the second differences of centres (B, F, 2), in pixels a frame squared."""
    return steps(steps(centres)).square().sum(2).mean(1).sqrt()


def shift(clips: Tensor, by: Tensor) -> Tensor:
    """Move each frame of clips by rows and columns (B, F, 2), interpolated linearly; outside is background."""
    rows, columns = (
        interpolation_weights(by[..., axis], side, side).to(clips)[:, None] for axis, side in enumerate(clips.shape[3:])
    )
    return rows @ (clips + 1) @ columns.mT - 1


def recentre(clips: Tensor, centres: Tensor) -> Tensor:
    """Move each frame of clips so that its centre (B, F, 2) is the picture's."""
    middle = [(side - 1) / 2 for side in clips.shape[3:]]
    return shift(clips, torch.tensor(middle, dtype=centres.dtype, device=centres.device) - centres)


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Return the PSNR in dB of frames (B, C, F, H, W) in [-1, 1], averaged over those of a clip: (B,)."""
    error = (a.double() - b.double()).square().mean((1, 3, 4))
    return (10 * torch.log10(4 / error.clamp(min=EXACT))).mean(1)


def steadiness(clips: Tensor, apart: int = 1) -> Tensor:
    """Return the mean PSNR (B,) in dB of frames `apart` frames from each other, once both are re-centred.

    It does not see motion, only whether the thing that moves keeps its look. A frozen clip has 86 dB, more than a real
    one: what is smoother than real is worse.
    """
    still = recentre(clips, centre_of_mass(clips))
    return psnr(still[:, :, apart:], still[:, :, :-apart])


def continuity(clips: Tensor) -> Tensor:
    """Return the mean PSNR (B,) in dB of each frame and the one before, moved on by the step before that.

    Frames in another order do not continue each other.
    """
    step = steps(centre_of_mass(clips))
    return psnr(shift(clips[:, :, 1:-1], step[:, :-1]), clips[:, :, 2:])


def freeze(clips: Tensor) -> Tensor:
    """Return clips whose frames are all their first one."""
    return clips[:, :, :1].expand_as(clips)


def shuffle_frames(clips: Tensor, index: Sequence[int], seed: int = 0) -> Tensor:
    """Return clips with their frames in another order, drawn for each by (seed, its index)."""
    keys = KeyedNoise(seed, list(index)).uniform("frames", clips.new_empty(clips.shape[0], clips.shape[2]))
    order = keys.argsort(1).view(len(clips), 1, -1, 1, 1)
    return clips.gather(2, order.expand_as(clips))


def measure_motion(clips: Tensor, motion: Tensor) -> dict[str, Tensor]:
    """Return (B,) by name: whether clips move as `motion` (B,) says, speed, acceleration, steadiness, continuity."""
    centres = centre_of_mass(clips)
    return {
        "motion": (motions(centres) == motion.to(centres.device)).double(),
        "speed": speeds(centres),
        "acceleration": rms_acceleration(centres),
        "steadiness": steadiness(clips),
        "continuity": continuity(clips),
    }
