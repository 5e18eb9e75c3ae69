"""The sound files that a user gives to sample.py, and a task that draws a part of a sound anew."""

import math
from pathlib import Path

import torch
from torch import Tensor

from ldm.data.sounds import EXTENSIONS, cut, load_wave, require_readers
from ldm.data.waves import to_int16
from ldm.errors import ConfigError, UserError
from ldm.media.mel import RATE, log_mel
from ldm.media.sound import fault
from ldm.media.stft import HOP
from ldm.model import LatentDiffusion
from ldm.sampling.inputs import InputFiles, InputSpec, open_input
from ldm.sampling.tasks import Batch, SamplingPlan, inpaint
from ldm.tensors import KeyedNoise


def sound_input(spec: InputSpec, path: str | None, key: str = "image") -> InputFiles:
    """Return a reader of sound files as log-mel spectrograms (1, BANDS, T) in [-1, 1] of the spec's length.

    A longer sound is cut off, a shorter one followed by silence.
    path: a file or a folder.  key: the option that gave it.
    Raises UserError naming the file, or for a model of other samples.
    """
    if why := fault((spec.channels, *spec.size)):
        raise UserError(f"{key}={path}: {why}; this model does not draw sounds")

    def read(file: Path) -> Tensor:
        require_readers(f"{key}={file}")
        try:
            wave = load_wave(file)
        except Exception as error:  # libsndfile's messages, and those of Python's own readers
            reason = " ".join(str(error).replace(repr(str(file)), "").split()) or repr(error)
            raise UserError(f"{key}={file} cannot be read as a sound: {reason}") from None
        excerpt = to_int16(cut(wave, HOP * spec.size[1])[0]).float() / 2**15
        return log_mel(excerpt[None])[0]

    return open_input(key, path, read, EXTENSIONS)


def fill_sound(
    model: LatentDiffusion, batch: Batch, noise: KeyedNoise, ts: Tensor, start: float = 0.5, end: float | None = None
) -> SamplingPlan:
    """Sample a sound batch["image"] from `start` to `end` seconds, and keep its spectrogram elsewhere.

    end: None is the end of the sound, which is then continued.  Frames of 16 ms that are partly within are drawn.
    Raises ConfigError for times outside the sound, and if they leave nothing to keep or to draw.
    """
    image = batch["image"]
    frames = image.shape[-1]
    seconds = frames * HOP / RATE
    last = seconds if end is None else end
    typed = f"start={start} end={'null' if end is None else end}"
    if not 0 <= start < last <= seconds + 1e-9:
        raise ConfigError(f"{typed}: expected seconds in order, from 0 to {seconds:g}")
    time = torch.arange(frames)
    drawn = (time + 1 > start * RATE / HOP + 1e-6) & (time < math.ceil(last * RATE / HOP - 1e-6))
    if drawn.all():
        raise ConfigError(f"{typed}: nothing of the sound's {seconds:g} s is kept; use task=generate")
    mask = drawn.to(image).expand(len(image), 1, *image.shape[-2:])
    return inpaint(model, {**batch, "mask": mask}, noise, ts)
