"""A medium of one's own: a grey image as a clip of its four quarters, by ldm's."""

import torch

from ldm.media import clip


def frames(sample):
    """Cut an image (1, H, W) into a clip (1, 4, H / 2, W / 2)."""
    return torch.stack([quarter for half in sample.chunk(2, 1) for quarter in half.chunk(2, 2)], 1)


def write(stem, sample, metadata):
    return clip.write(stem, frames(sample), metadata)


def sheet(samples, columns):
    return clip.sheet([frames(sample) for sample in samples], columns)
