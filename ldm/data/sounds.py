"""A folder of sounds, read once and cut into excerpts; captions from a list, files beside them, folders or names."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.data.captions import annotate, format_names, printable
from ldm.data.folder import File, scan, split_train_test
from ldm.data.image_cache import cached
from ldm.data.memory import iter_bytes
from ldm.data.waves import WaveDataset, to_int16
from ldm.errors import UserError
from ldm.io.extras import extra
from ldm.io.progress import ProgressBar
from ldm.media.mel import RATE
from ldm.media.stft import HOP

EXTENSIONS = (".wav", ".flac", ".ogg", ".mp3", ".opus", ".oga", ".aif", ".aiff")
EXPECTED = (
    "expected sounds in it: in a subfolder for each class, or with captions beside them (x.wav, x.txt), "
    "or named by what is heard"
)
READER = 1  # raise it when `load_wave` changes its samples, so that excerpts read before are not used
SILENT = 1e-3  # largest amplitude of an excerpt that counts as silent, -60 dB
STREAMED = 0xFFFFFF00  # sizes in a WAV header from here on say that the writer did not know its length


class SoundFolder(WaveDataset):
    """The sounds under `path`, as one channel at 16 kHz, in excerpts of `seconds`: image (1, 128, 62.5 seconds).

    A shorter sound is followed by silence; a longer one is cut into excerpts one after another, without its rest.
    Channels are averaged; nothing is normalised. Silent excerpts, and files that cannot be read, are left out and
    counted.
    seconds: a multiple of 0.016.
    captions: see ldm.data.captions.annotate; all excerpts of a file have its captions.
    test_fraction: fraction of the files in the test split, chosen by each file's name alone; if that leaves a split
    without a file, both splits have all.
    max_unreadable: fraction of the files that may be unreadable or silent.
    content_hash: expected digest of sounds and captions.
    Raises UserError naming the path.
    """

    def __init__(
        self,
        path: str | Path,
        split: str = "train",
        seconds: float = 1.024,
        captions: str | Path | None = None,
        test_fraction: float = 0.02,
        max_unreadable: float = 0.2,
        content_hash: str | None = None,
        seed: int = 0,
    ):
        if split not in ("train", "test"):
            raise UserError(f"split={split!r}: expected train or test")
        if not 0 <= test_fraction < 1:
            raise UserError(f"test_fraction={test_fraction}: expected a fraction of at least 0 and below 1")
        length = round(seconds * RATE / HOP) * HOP
        if length < 2 * HOP or abs(length - seconds * RATE) > 1e-3:
            raise UserError(f"seconds={seconds}: expected a multiple of {HOP / RATE}, {2 * HOP / RATE} or more")
        root = Path(path).expanduser()
        files = scan(root, EXTENSIONS, EXPECTED)
        excerpts = read_all(root, files, length)
        self.root, self.skipped = root, excerpts.skipped
        if len(self.skipped) > max_unreadable * len(files):
            raise UserError(
                f"path={root}: {len(self.skipped):,} of {len(files):,} sounds cannot be used, more than "
                f"data.max_unreadable={max_unreadable}: {format_names(self.skipped)} "
                f"({next(iter(self.skipped.values()))}); repair or remove them, or allow more"
            )
        names = [file.name for file in files if file.name not in self.skipped]
        annotations = annotate(root, names, captions)
        number = {name: i for i, name in enumerate(names)}
        sources = [number[name] for name in excerpts.files]
        self.held_out, of_split = split_train_test(names, test_fraction)[split]
        chosen = set(of_split)
        rows = [i for i, source in enumerate(sources) if source in chosen]
        texts = [annotations.texts[source] for source in sources]
        labels = torch.tensor([annotations.labels[source] for source in sources])
        super().__init__(
            f"sounds-{split}",
            excerpts.waves,
            labels[rows],
            annotations.classes,
            seed,
            torch.tensor(rows),
            [texts[i] for i in rows],
        )
        self.content = digest(excerpts.waves, texts, labels.tolist())
        if content_hash not in (None, self.content):
            raise UserError(
                f"path={root}: its sounds or captions are not those of this run (digest {self.content}, then "
                f"{content_hash}); put them back, or start a new run with its command"
            )
        form = f"{len(excerpts.files):,} excerpts of {seconds} s"
        self.summary = ", ".join(
            [f"{root}: {len(names):,} sounds", *annotations.notes, form, f"{self.held_out} held out", *excerpts.notes]
        )

    @property
    def resolved_config(self) -> dict[str, Any]:
        """Values of the options that a config left open; content_hash makes run names depend on sounds and captions."""
        return {"content_hash": self.content}


@dataclass(frozen=True)
class Excerpts:
    """The excerpts of a folder's sounds.

    waves: (N, 1, L) int16.  files: the name of each one's file.  notes: remarks.
    skipped: name -> fault of the files without an excerpt.
    """

    waves: Tensor
    files: Sequence[str]
    notes: Sequence[str]
    skipped: Mapping[str, str]


def digest(waves: Tensor, texts: Sequence[Sequence[str]], labels: Sequence[int]) -> str:
    """Return 16 hex digits of SHA-256 over every sample, caption and label."""
    total = sha256(json.dumps([list(waves.shape), list(map(list, texts)), list(labels)]).encode())
    for part in iter_bytes(waves):
        total.update(part)
    return total.hexdigest()[:16]


def read_all(root: Path, files: Sequence[File], length: int) -> Excerpts:
    """Read excerpts of `length` samples of these files, or map them from the cache if the files have not changed.

    Raises UserError if none can be used.
    """
    require_readers("data=sounds")  # without them every file below would be at fault
    key = (READER, length, os.path.realpath(root), *map(tuple, files))
    waves, info = cached("sounds", key, partial(_read_files, root, [file.name for file in files], length))
    return Excerpts(waves, **info)


def _read_files(root: Path, names: Sequence[str], length: int) -> tuple[Tensor, dict[str, Any]]:
    """Read files; return excerpts (N, 1, length) int16, and the other fields of Excerpts."""
    bar, parts, sources, skipped, short, silent = ProgressBar("reading", len(names), unit="sounds"), [], [], {}, [], 0
    for i, name in enumerate(names):
        try:
            wave = load_wave(root / name)
        except Exception as error:  # libsndfile's messages, and those of Python's own readers
            skipped[name] = " ".join(str(error).replace(repr(os.fspath(root / name)), "").split()) or repr(error)
            continue
        finally:
            bar.update(i + 1)
        pieces = cut(wave, length)
        audible = pieces[pieces.abs().amax(1) > SILENT]
        silent += len(pieces) - len(audible)
        if not len(audible):
            skipped[name] = "silent"
            continue
        short += [name] * (len(wave) < length)
        parts.append(to_int16(audible))
        sources += [name] * len(audible)
    if not parts:
        first = next(iter(skipped))
        raise UserError(f"path={root}: none of {len(names):,} sounds can be used; {printable(first)}: {skipped[first]}")
    notes = [f"{len(short):,} followed by silence: {format_names(short)}"] if short else []
    notes += [f"{silent:,} silent excerpts left out"] if silent else []
    notes += [f"{len(skipped):,} skipped: {format_names(skipped)} ({next(iter(skipped.values()))})"] if skipped else []
    return torch.cat(parts)[:, None], {"files": sources, "notes": notes, "skipped": skipped}


def cut(wave: Tensor, length: int) -> Tensor:
    """Cut a wave (L,) into excerpts (N, length): one ending in silence if it is shorter, else without the rest."""
    if len(wave) < length:
        return torch.nn.functional.pad(wave, (0, length - len(wave)))[None]
    return wave[: len(wave) // length * length].reshape(-1, length)


def require_readers(use: str) -> None:
    """Raise UserError with the command that installs what `load_wave` needs, unless it is installed.

    use: what needs it, as it begins the message.
    """
    with extra("audio", use):
        import soundfile  # noqa: F401
        import soxr  # noqa: F401


def load_wave(path: Path) -> Tensor:
    """Read a sound file as one channel (L,) float32 at RATE, of about [-1, 1]: channels averaged, then resampled.

    Raises ValueError for a file that is empty, shorter than its header says or holds values that are not finite, and
    whatever libsndfile raises for other broken files.
    """
    import soundfile
    import soxr

    check_wav_size(path)
    with soundfile.SoundFile(path) as file:
        expected, rate = file.frames, file.samplerate
        samples = file.read(dtype="float32", always_2d=True)
    if 0 <= expected < 1 << 62 and len(samples) < expected:
        raise ValueError(f"truncated: {len(samples):,} of {expected:,} samples")
    wave = torch.from_numpy(soxr.resample(samples.mean(1), rate, RATE, quality="HQ"))
    if not len(wave):
        raise ValueError("no samples in it")
    if not wave.isfinite().all():
        raise ValueError("it holds values that are not finite")
    return wave


def check_wav_size(path: Path) -> None:
    """Raise ValueError for a WAV file shorter than its header says, which libsndfile reads without a word."""
    with open(path, "rb") as file:
        head = file.read(8)
    size = int.from_bytes(head[4:8], "little") + 8
    if head[:4] == b"RIFF" and path.stat().st_size < size < STREAMED:
        raise ValueError(f"truncated: {path.stat().st_size:,} of {size:,} bytes")
