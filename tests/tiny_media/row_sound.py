"""A medium of one's own: the rows of a grey image, one after another, as the samples of a sound."""

import io
import wave

import numpy as np

from ldm.media import image
from ldm.media.files import write_sample

RATE = 4000


def write(stem, sample, metadata):
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((sample.clamp(-1, 1) * 32767).flatten().numpy().astype(np.int16).tobytes())
    return write_sample(stem, {".wav": buffer.getvalue()}, sample, metadata)


sheet = image.sheet
