"""Single notes of the instruments of General MIDI, rendered from SoundFonts, with captions composed from facts."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.data.image_cache import cached
from ldm.data.waves import WaveDataset, to_int16
from ldm.errors import ConfigError, UserError
from ldm.io.download import fetch, from_debian
from ldm.io.extras import extra
from ldm.io.progress import ProgressBar
from ldm.media.mel import RATE

FAMILIES = {  # General MIDI's first 96 programs, in order; the others are effects, ethnic and percussion
    "piano": "acoustic grand piano, bright acoustic piano, electric grand piano, honky-tonk piano, electric piano, "
    "chorused electric piano, harpsichord, clavinet",
    "chromatic percussion": "celesta, glockenspiel, music box, vibraphone, marimba, xylophone, tubular bell, dulcimer",
    "organ": "drawbar organ, percussive organ, rock organ, church organ, reed organ, accordion, harmonica, "
    "tango accordion",
    "guitar": "nylon guitar, steel guitar, jazz guitar, clean guitar, muted guitar, overdriven guitar, "
    "distorted guitar, guitar harmonics",
    "bass": "acoustic bass, fingered bass, picked bass, fretless bass, slap bass, popped bass, synth bass, "
    "rubber synth bass",
    "strings": "violin, viola, cello, contrabass, tremolo strings, pizzicato strings, orchestral harp, timpani",
    "ensemble": "string ensemble, slow string ensemble, synth strings, slow synth strings, choir, voice, synth voice, "
    "orchestra hit",
    "brass": "trumpet, trombone, tuba, muted trumpet, French horn, brass section, synth brass, soft synth brass",
    "reed": "soprano saxophone, alto saxophone, tenor saxophone, baritone saxophone, oboe, English horn, bassoon, "
    "clarinet",
    "pipe": "piccolo, flute, recorder, pan flute, blown bottle, shakuhachi, whistle, ocarina",
    "synth lead": "square lead, sawtooth lead, calliope lead, chiff lead, charang lead, voice lead, fifths lead, "
    "bass lead",
    "synth pad": "new age pad, warm pad, polysynth pad, choir pad, bowed pad, metallic pad, halo pad, sweep pad",
}
INSTRUMENTS = [name for names in FAMILIES.values() for name in names.split(", ")]
NOTES = ("C", "C sharp", "D", "D sharp", "E", "F", "F sharp", "G", "G sharp", "A", "A sharp", "B")
RENDERER = 1  # raise it when rendering changes samples, so that cached ones are not used
RENDER_RATE = 48_000  # samples per second; aliases of what is rendered at 16 kHz would stay
LENGTH, NOTE_OFF = 16_384, 0.8  # samples of a note; seconds after which the key is released
GAIN = -6.0  # dB; the loudest notes peak at about 0.7
SILENT = 32  # largest value in 16 bits of a note that counts as silent
INSTALL = "pip install --no-deps tinysoundfont==0.3.7"  # it declares pyaudio, which it needs to play aloud only


@dataclass(frozen=True)
class Bank:
    """A SoundFont in a Debian package.  size: how captions name it."""

    package: str
    file: str
    sha256: str
    size: str


BANKS = {
    "fluid": Bank(  # MIT
        "fluid-soundfont-gm",
        "FluidR3_GM.sf2",
        "74594e8f4250680adf590507a306655a299935343583256f3b722c48a1bc1cb0",
        "large",
    ),
    "timgm6mb": Bank(  # GPL-2
        "timgm6mb-soundfont",
        "TimGM6mb.sf2",
        "c5378b62028c920cb11e4803327983fee2f2cdff5dc89c708e39da417e51c854",
        "small",
    ),
}


@dataclass(frozen=True)
class Note:
    """A note.  bank: a key of BANKS.  program: from 0.  pitch: MIDI's, 60 is middle C.  velocity: 1..127."""

    bank: str
    program: int
    pitch: int
    velocity: int

    @property
    def is_held_out(self) -> bool:
        """Return whether this instrument is never heard at this pitch in training: about one pair in ten."""
        return (7 * self.program + self.pitch) % 10 == 3


class Notes(WaveDataset):
    """Notes of 96 instruments, 1.024 s at 16 kHz: image (1, 128, 64), a log-mel spectrogram in [-1, 1].

    These are recordings of instruments, played and pitched by a sampler. Captions say loudness, instrument and pitch;
    labels are the 12 families of General MIDI; a batch also has wave (B, 16384), and program, pitch (MIDI's) and
    velocity (B,) int64. Notes that a bank leaves silent are left out.
    split: test has the pairs of instrument and pitch for which (7 program + pitch) % 10 == 3, in every bank and at
    every velocity, train all others.
    banks: some of BANKS.  lowest, highest, step: of the pitches.
    velocities: at least 1 and at most 127; softer than 60 is "soft", louder than 100 "loud" in the captions.
    name_bank: whether captions name the bank.
    Raises ConfigError for an invalid option, AssetNotFoundError without the banks' files, UserError without the
    renderer.
    """

    def __init__(
        self,
        split: str = "train",
        banks: Sequence[str] = ("fluid", "timgm6mb"),
        lowest: int = 36,
        highest: int = 84,
        step: int = 2,
        velocities: Sequence[int] = (40, 80, 120),
        name_bank: bool = False,
        seed: int = 0,
    ):
        if split not in ("train", "test"):
            raise ConfigError(f"split={split!r}: expected train or test")
        if not banks or len(set(banks)) < len(banks) or not set(banks) <= BANKS.keys():
            raise ConfigError(f"banks={list(banks)}: expected some of {', '.join(BANKS)}, each once")
        if not 0 <= lowest <= highest <= 127 or step < 1:
            raise ConfigError(f"lowest={lowest} highest={highest} step={step}: expected pitches from 0 to 127 in order")
        if not velocities or len(set(velocities)) < len(velocities) or not all(1 <= v <= 127 for v in velocities):
            raise ConfigError(f"velocities={list(velocities)}: expected numbers from 1 to 127, each once")
        pitches = range(lowest, highest + 1, step)
        waves, notes = load_notes([Note(*x) for x in product(banks, range(len(INSTRUMENTS)), pitches, velocities)])
        rows = [i for i, note in enumerate(notes) if note.is_held_out == (split == "test")]
        self.notes = [notes[i] for i in rows]
        labels = torch.tensor([note.program // 8 for note in self.notes])
        texts = [captions(note, name_bank) for note in self.notes]
        classes = {
            family: list(
                dict.fromkeys(lines[0] for lines, label in zip(texts, labels.tolist(), strict=True) if label == i)
            )
            or [f"a {family} sound"]
            for i, family in enumerate(FAMILIES)
        }
        super().__init__(f"notes-{split}", waves, labels, classes, seed, torch.tensor(rows, dtype=torch.long), texts)
        self.facts = {
            name: torch.tensor([getattr(note, name) for note in self.notes])
            for name in ("program", "pitch", "velocity")
        }

    def batch_metadata(self, samples: Sequence[tuple[int, int]]) -> dict:
        """Return a batch without its sounds, with program, pitch and velocity (B,) int64; see InMemoryDataset."""
        index = torch.tensor([i for _, i in samples], dtype=torch.long)
        return {**super().batch_metadata(samples), **{name: fact[index] for name, fact in self.facts.items()}}


def captions(note: Note, name_bank: bool = False) -> list[str]:
    """Return a note's captions: "a loud violin playing F sharp 4" and "F sharp 4 on a loud violin"."""
    level = "soft " if note.velocity < 60 else "loud " if note.velocity > 100 else ""
    instrument = level + INSTRUMENTS[note.program]
    instrument = f"{'an' if instrument[0] in 'aeioAEIO' else 'a'} {instrument}"
    bank = f" of a {BANKS[note.bank].size} sound bank" * name_bank
    return [f"{instrument}{bank} playing {pitch_name(note.pitch)}", f"{pitch_name(note.pitch)} on {instrument}{bank}"]


def pitch_name(pitch: int) -> str:
    """Return the name of a MIDI pitch: 60 is "C 4"."""
    return f"{NOTES[pitch % 12]} {pitch // 12 - 1}"


def load_notes(notes: Sequence[Note]) -> tuple[Tensor, list[Note]]:
    """Return waves (N, 1, LENGTH) int16 of the notes that are not silent, and these notes, from the cache if possible.

    Raises AssetNotFoundError without the banks' files, UserError without the renderer.
    """
    banks = {name: BANKS[name].sha256 for name in dict.fromkeys(note.bank for note in notes)}
    rows = [(note.bank, note.program, note.pitch, note.velocity) for note in notes]
    waves, played = cached("notes", (RENDERER, banks, rows), partial(_render_all, notes))
    return waves, [Note(*row) for row in played]


def _render_all(notes: Sequence[Note]) -> tuple[Tensor, list[tuple[str, int, int, int]]]:
    """Render notes; return the waves and the facts of those that are not silent."""
    waves, played, bar = [], [], ProgressBar("rendering", len(notes), unit="notes")
    for i, (note, wave) in enumerate(zip(notes, render(notes), strict=True)):
        if int(wave.abs().max()) > SILENT:
            waves.append(wave)
            played.append((note.bank, note.program, note.pitch, note.velocity))
        bar.update(i + 1)
    if not waves:
        raise ConfigError(f"data=notes: all of {len(notes)} notes are silent; expected other pitches or velocities")
    return torch.stack(waves)[:, None], played


def render(notes: Iterable[Note]) -> Iterator[Tensor]:
    """Yield the wave (LENGTH,) int16 of each note, whose order has no influence.

    Raises AssetNotFoundError without the banks' files, UserError without the renderer.
    """
    synth, banks = make_synth(), {}
    with extra("audio", "data=notes"):
        import soxr

    for note in notes:
        if note.bank not in banks:
            banks[note.bank] = synth.sfload(str(bank_file(BANKS[note.bank])))
        synth.program_select(0, banks[note.bank], 0, note.program)
        synth.noteon(0, note.pitch, note.velocity)
        samples = round(NOTE_OFF * RENDER_RATE)
        before = _generate(synth, samples)
        synth.noteoff(0, note.pitch)
        after = _generate(synth, LENGTH * RENDER_RATE // RATE - samples)
        synth.sounds_off(0)
        _generate(synth, RENDER_RATE // 10)  # what still sounds then would be heard in the next note
        wave = soxr.resample(np.concatenate([before, after]), RENDER_RATE, RATE, quality="HQ")
        yield to_int16(torch.from_numpy(wave))


def make_synth() -> Any:
    """Return the renderer. Raises UserError with the command that installs it."""
    try:
        import tinysoundfont
    except ModuleNotFoundError:
        raise UserError(f"data=notes needs the package tinysoundfont: {INSTALL}") from None
    return tinysoundfont.Synth(gain=GAIN, samplerate=RENDER_RATE)


def _generate(synth: Any, samples: int) -> np.ndarray:
    """Generate samples (samples,) float32, the mean of both channels."""
    return np.frombuffer(synth.generate(samples), np.float32).reshape(-1, 2).mean(1)


def bank_file(bank: Bank) -> Path:
    """Return the file of a bank, downloaded if needed. Raises AssetNotFoundError."""
    folder = "usr/share/sounds/sf2"
    sources = {f"the Debian package {bank.package}": partial(from_debian, bank.package, folder)}
    return fetch(bank.package, {bank.file: bank.sha256}, [Path("/", folder)], sources) / bank.file
