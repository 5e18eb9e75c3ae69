"""Moving Fashion-MNIST: clips of one garment that moves in one of eight directions, or stands still, with captions.

Moving MNIST's convention (Srivastava et al. 2015) with text (Sync-DRAW, Mittal et al. 2017). Clips are made as they are
read: training never repeats one.
"""

import math
from collections.abc import Sequence
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from ldm.data.fashion_mnist import FashionMNIST
from ldm.data.memory import read_captions
from ldm.errors import ConfigError
from ldm.tensors import KeyedNoise, interpolation_weights

CLASSES = tuple(read_captions(Path(__file__).with_name("fashion_mnist.json")))
# the last one is the only one without a direction; the others are in steps of 45 degrees, clockwise on the screen
MOTIONS = (
    *("to the right", "down and to the right", "down", "down and to the left"),
    *("to the left", "up and to the left", "up", "up and to the right"),
    "standing still",
)
STILL = len(MOTIONS) - 1
SPEEDS = (1.0, 3.0)  # pixels a frame, the slowest and the fastest
PAIRS = ("seen", "held_out", "all")
PLURAL = ("trousers",)  # names of garments that take no article


class MovingGarments(Dataset):
    """Clips of a garment of Fashion-MNIST that moves: image (1, frames, size, size) in [-1, 1], background -1.

    A batch also has label (B,), the garment; motion (B,), an index into MOTIONS; speed (B,) in pixels a frame, 0 for a
    garment that stands still; track (B, frames, 2), row and column of the upper left corner, in pixels.
    The garment's side is 7/16 of `size`. It moves at a constant speed of 1 to 3 pixels a frame and is reflected at the
    border, not before half of the clip: until then the caption is true.
    Clip i has garment i of the split. In the training set the rest depends on (seed, epoch, i), in the test set on
    (seed, i).
    frames: 3 or more.  size: pixels, a multiple of 16.  root: a folder that may contain Fashion-MNIST's files.
    pairs: which pairs of garment and motion; seen: all but the nine with (garment + motion) % 10 == 3, held_out: those
    nine.
    Raises ConfigError for an invalid option, AssetNotFoundError without the files.
    """

    medium = "clip"
    classes: Sequence[str] = CLASSES
    flip = False  # a mirrored clip would move in another direction than its caption says
    changed_by = ("data=moving",)  # each epoch has other clips

    def __init__(
        self,
        split: str = "train",
        frames: int = 8,
        size: int = 32,
        pairs: str = "seen",
        root: str | Path | None = None,
        seed: int = 0,
    ):
        if pairs not in PAIRS:
            raise ConfigError(f"pairs={pairs}: expected one of {', '.join(PAIRS)}")
        if frames < 3 or size < 16 or size % 16:
            raise ConfigError(f"frames={frames} size={size}: expected 3 frames or more, and a multiple of 16 pixels")
        room, way = size - size * 7 // 16, SPEEDS[1] * (frames - 1) / 2
        if way > room:
            raise ConfigError(
                f"frames={frames} size={size}: half a clip at {SPEEDS[1]:g} pixels a frame is {way:g} pixels, and a "
                f"garment has room for {room}; lower frames or raise size"
            )
        garments = FashionMNIST(split, root, size=28)
        self.motions = [[m for m in range(len(MOTIONS)) if shows(k, m, pairs)] for k in range(len(CLASSES))]
        rows = torch.tensor([bool(motions) for motions in self.motions])[garments.labels].nonzero()[:, 0]
        side = size * 7 // 16
        self.sprites, self.labels = shrink(garments.stored[rows, 0].float() / 255, side), garments.labels[rows]
        self.split, self.seed, self.shape = split, seed, (1, frames, size, size)
        self.captions = [[caption(k, m) for m in motions] for k, motions in enumerate(self.motions)]
        self.origin = f"{garments.fingerprint} {pairs}"

    @cached_property
    def fingerprint(self) -> str:
        """Identity of the clips."""
        return f"moving-{sha256(repr((self.origin, self.split, self.shape, self.seed)).encode()).hexdigest()[:16]}"

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict:
        """Return one clip of the first epoch: image, caption, label, index."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"moving has {len(self)} clips, index {index} is out of range")
        batch = self.batch([(0, index % len(self))])
        return {name: batch[name][0] for name in ("image", "caption", "label", "index")}

    def batch_metadata(self, samples: Sequence[tuple[int, int]]) -> dict:
        """Return a batch, (epoch, index) pairs, without its images: what they show, and how it moves."""
        index = [i for _, i in samples]
        keys: list[int | tuple[int, int]] = [(epoch, i) if self.split == "train" else i for epoch, i in samples]
        label = self.labels[torch.tensor(index, dtype=torch.long)]
        chosen = KeyedNoise(self.seed, keys).uniform("clip", torch.empty(len(keys), 4, dtype=torch.float64))
        motions = [self.motions[k] for k in label.tolist()]
        picked = [m[int(u * len(m))] for m, u in zip(motions, chosen[:, 0].tolist(), strict=True)]
        motion = torch.tensor(picked, dtype=torch.long)
        speed = torch.where(motion == STILL, 0, SPEEDS[0] + (SPEEDS[1] - SPEEDS[0]) * chosen[:, 1])
        _, frames, size, _ = self.shape
        room = size - self.sprites.shape[-1]
        return {
            "caption": [caption(k, m) for k, m in zip(label.tolist(), picked, strict=True)],
            "label": label,
            "motion": motion,
            "speed": speed.float(),
            "track": track(direction(motion) * speed[:, None], chosen[:, 2:], frames, room).float(),
            "flip": torch.zeros(len(index), dtype=torch.bool),
            "index": index,
            "epoch": [epoch for epoch, _ in samples],
        }

    def batch(self, samples: Sequence[tuple[int, int]]) -> dict:
        """Return the clips (epoch, index): `batch_metadata`, and image (B, 1, frames, size, size) in [-1, 1]."""
        batch = self.batch_metadata(samples)
        sprites = self.sprites[torch.tensor(batch["index"], dtype=torch.long)]
        return {"image": 2 * paste(sprites, batch["track"], self.shape[-1])[:, None] - 1, **batch}

    def pixels(self, index: Sequence[int]) -> Tensor:
        """Return the clips (B, 1, frames, size, size) of the first epoch in [-1, 1]."""
        return self.batch([(0, int(i)) for i in index])["image"]

    def all_captions(self) -> list[str]:
        """Return every caption, without repetitions."""
        return [text for texts in self.captions for text in texts]


def shows(garment: int, motion: int, pairs: str) -> bool:
    """Return whether a pair of garment and motion is among `pairs`, one of PAIRS."""
    return pairs == "all" or ((garment + motion) % 10 == 3) == (pairs == "held_out")


def caption(garment: int, motion: int) -> str:
    """Return the caption of a pair, such as "a boot moving up and to the left"."""
    name = CLASSES[garment]
    article = "" if name in PLURAL else "an " if name[0] in "aeiou" else "a "
    return f"{article}{name} {'' if motion == STILL else 'moving '}{MOTIONS[motion]}"


def direction(motion: Tensor) -> Tensor:
    """Return the unit vectors (B, 2), rows down and columns to the right, of motions (B,); 0 for STILL."""
    angle = motion.double() * (math.tau / STILL)
    return torch.stack([angle.sin(), angle.cos()], -1) * (motion != STILL)[:, None]


def track(velocity: Tensor, chosen: Tensor, frames: int, room: int) -> Tensor:
    """Return positions (B, frames, 2) in [0, room] at a constant velocity (B, 2) a frame, reflected at both ends.

    chosen: (B, 2) in [0, 1), where the start is within the positions that leave room for half of the way.
    """
    half = velocity * (frames - 1) / 2
    start = (-half).clamp(min=0) + chosen * (room - half.abs())
    way = start[:, None] + velocity[:, None] * torch.arange(frames, dtype=velocity.dtype)[:, None]
    return room - (way.remainder(2 * room) - room).abs()


def paste(sprites: Tensor, corner: Tensor, size: int) -> Tensor:
    """Draw sprites (B, s, s) with their upper left corners at (B, F, 2), by linear interpolation: (B, F, size, size).

    Total and centre of brightness are exact at any position inside the picture.
    """
    rows, columns = (
        interpolation_weights(corner[..., side], size, sprites.shape[-1]) for side in (0, 1)
    )  # (B, F, size, s)
    return rows @ sprites[:, None] @ columns.mT


def shrink(images: Tensor, side: int) -> Tensor:
    """Scale images (N, 28, 28) to (N, side, side), averaging what a pixel covers."""
    return F.interpolate(images[:, None], (side, side), mode="bilinear", antialias=True, align_corners=False)[:, 0]
