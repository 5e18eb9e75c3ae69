"""Files as entries of TensorBoard, as they are: `add_video` and `add_audio` would encode them once more."""

import wave
from pathlib import Path
from typing import Any


def gif_summary(name: str, path: Path) -> Any:
    """Return the entry of a GIF, which TensorBoard's page plays."""
    from PIL import Image
    from tensorboard.compat.proto.summary_pb2 import Summary

    with Image.open(path) as image:
        width, height = image.size
    encoded = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=path.read_bytes())
    return Summary(value=[Summary.Value(tag=name, image=encoded)])


def wav_summary(name: str, path: Path) -> Any:
    """Return the entry of a WAV, which TensorBoard's page plays."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    with wave.open(str(path)) as file:
        sizes = {
            "sample_rate": file.getframerate(),
            "num_channels": file.getnchannels(),
            "length_frames": file.getnframes(),
        }
    encoded = Summary.Audio(encoded_audio_string=path.read_bytes(), content_type="audio/wav", **sizes)
    return Summary(value=[Summary.Value(tag=name, audio=encoded)])
