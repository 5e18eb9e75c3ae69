"""Sounds in memory: waves of 16 bits, from which the log-mel spectrograms of a batch are computed."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from ldm.data.memory import InMemoryDataset
from ldm.media.mel import log_mel


class WaveDataset(InMemoryDataset):
    """Sounds (N, 1, L) int16 at `ldm.media.mel.RATE`, with labels and captions as InMemoryDataset has them.

    image: their log-mel spectrograms (1, BANDS, L / HOP) in [-1, 1], computed when they are read; a batch also has wave
    (B, L) float32 in [-1, 1).
    """

    medium = "sound"
    stored_types = (torch.int16,)

    def __init__(
        self,
        name: str,
        waves: Tensor,
        labels: Tensor | None = None,
        captions: Mapping[str, Sequence[str]] = MappingProxyType({}),
        seed: int = 0,
        rows: Tensor | None = None,
        texts: Sequence[Sequence[str]] | None = None,
    ):
        super().__init__(name, waves, labels, captions, seed, rows=rows, texts=texts)
        self.shape = tuple(log_mel(torch.zeros(1, waves.shape[2])).shape[1:])

    def batch(self, samples: Sequence[tuple[int, int]]) -> dict:
        """Return the samples, (epoch, index) pairs: image, wave and `batch_metadata`."""
        wave = self.waves([i for _, i in samples])
        return {"image": _mels(wave), "wave": wave, **self.batch_metadata(samples)}

    def pixels(self, index: Sequence[int] | Tensor) -> Tensor:
        """Return log-mel spectrograms (B, 1, BANDS, L / HOP) float32 in [-1, 1]."""
        return _mels(self.waves(index))

    def waves(self, index: Sequence[int] | Tensor) -> Tensor:
        """Return waves (B, L) float32 in [-1, 1)."""
        index = torch.as_tensor(index, dtype=torch.long)
        return self.stored[index if self.rows is None else self.rows[index]][:, 0].float() / 2**15


def _mels(waves: Tensor) -> Tensor:
    """Return the log-mel spectrograms of any number of waves, a few at a time, as their spectra are large."""
    return torch.cat([log_mel(part) for part in waves.split(256)])


def to_int16(wave: Tensor) -> Tensor:
    """Quantise a wave in [-1, 1) to 16 bits; values beyond are clipped."""
    return (wave * 2**15).round().clamp(-(2**15), 2**15 - 1).short()
