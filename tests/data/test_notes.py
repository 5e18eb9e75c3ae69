"""Notes of sampled instruments, by a stand-in for the renderer with its known habits."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ldm.data import notes
from ldm.data.notes import BANKS, INSTRUMENTS, Note, Notes, captions, pitch_name, render
from ldm.errors import ConfigError, UserError
from ldm.media.mel import RATE, filterbank


class Synth:
    """A sine at the pitch whose amplitude is proportional to the velocity; it sounds on after noteoff, as pads do."""

    def __init__(self, gain: float, samplerate: int):
        assert (gain, samplerate) == (-6.0, 48_000)
        self.amplitude, self.tail, self.phase, self.files = 0.0, 0.0, 0, []

    def sfload(self, file: str) -> int:
        self.files.append(file)
        return len(self.files) - 1

    def program_select(self, channel: int, font: int, bank: int, preset: int) -> None:
        assert (channel, bank) == (0, 0)
        self.silent = preset == 5 and "TimGM" in self.files[font]

    def noteon(self, channel: int, pitch: int, velocity: int) -> None:
        self.hertz, self.amplitude, self.phase = 440 * 2 ** ((pitch - 69) / 12), velocity / 400, 0

    def noteoff(self, channel: int, pitch: int) -> None:
        self.amplitude /= 10

    def sounds_off(self, channel: int) -> None:
        self.tail, self.amplitude = self.amplitude, 0.0

    def generate(self, samples: int) -> memoryview:
        time = (self.phase + np.arange(samples)) / 48_000
        wave = (0 if self.silent else self.amplitude) * np.sin(2 * np.pi * self.hertz * time)
        wave[:4_800] += self.tail  # for 100 ms, unless that has passed
        self.phase, self.tail = self.phase + samples, 0.0
        return memoryview(np.stack([1.5 * wave, 0.5 * wave], 1).astype(np.float32).tobytes())


@pytest.fixture(autouse=True)
def _renderer(tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "tinysoundfont", SimpleNamespace(Synth=Synth))
    monkeypatch.setattr(notes, "bank_file", lambda bank: tmp_path / bank.file)


def test_render_is_the_note_for_0_8_s_and_independent_of_the_order():
    some = [Note("fluid", 0, 69, 100), Note("fluid", 3, 81, 40), Note("timgm6mb", 3, 57, 127)]
    waves = torch.stack(list(render(some)))
    assert waves.shape == (3, 16_384)
    assert waves.dtype == torch.int16
    assert torch.equal(torch.stack(list(render(some[::-1]))).flip(0), waves)
    for note, wave in zip(some, waves.double() / 2**15, strict=True):
        sounding, after = wave[2_000:12_000], wave[13_200:16_000]
        assert sounding.abs().max().item() == pytest.approx(note.velocity / 400, rel=0.01)  # of both channels the mean
        assert after.abs().max().item() == pytest.approx(note.velocity / 4000, rel=0.02)
        spectrum = torch.fft.rfft(sounding * torch.hann_window(10_000, dtype=torch.float64), n=80_000).abs()
        assert int(spectrum.argmax()) * RATE / 80_000 == pytest.approx(440 * 2 ** ((note.pitch - 69) / 12), rel=0.002)


def test_notes_hold_out_pairs_of_instrument_and_pitch(monkeypatch):
    monkeypatch.setattr(notes, "INSTRUMENTS", INSTRUMENTS[:10])
    options = {"banks": ["timgm6mb"], "lowest": 60, "highest": 69, "step": 1, "velocities": [80]}
    train, test = Notes(**options), Notes("test", **options)
    pairs = [{(note.program, note.pitch) for note in split.notes} for split in (train, test)]
    assert pairs[1] == {(p, 60 + (3 - 7 * p) % 10) for p in range(10) if p != 5}  # a silent instrument
    assert pairs[0] == {(p, k) for p in range(10) for k in range(60, 70) if p != 5} - pairs[1]
    assert (len(train), len(test)) == (81, 9)


def test_notes_batch_says_what_is_heard(monkeypatch):
    monkeypatch.setattr(notes, "INSTRUMENTS", INSTRUMENTS[:10])
    data = Notes(lowest=60, highest=61, step=1, velocities=[40, 80, 120])
    rows = [0, len(data) // 2, len(data) - 1]
    batch = data.batch([(0, i) for i in rows])
    assert (data.shape, data.medium, tuple(batch["image"].shape)) == ((1, 128, 64), "sound", (3, 1, 128, 64))
    assert torch.equal(batch["image"], data.pixels(rows))
    for k, i in enumerate(rows):
        note = data.notes[i]
        assert [int(batch[x][k]) for x in ("program", "pitch", "velocity")] == [note.program, note.pitch, note.velocity]
        assert int(batch["label"][k]) == note.program // 8
        assert batch["caption"][k] in captions(note)
        assert batch["wave"][k, 2_000:12_000].abs().max().item() == pytest.approx(note.velocity / 400, rel=0.02)
        bin_ = round(440 * 2 ** ((note.pitch - 69) / 12) / RATE * 1024)
        assert abs(int(batch["image"][k, 0, :, 20].argmax()) - int(filterbank()[:, bin_].argmax())) <= 1
    louder = data.batch([(0, i) for i in range(3)])["image"].amax((1, 2, 3))
    assert louder[0] < louder[1] < louder[2]


def test_captions_are_composed_of_facts():
    assert len(INSTRUMENTS) == len(set(INSTRUMENTS)) == 96
    assert captions(Note("fluid", 40, 66, 120)) == ["a loud violin playing F sharp 4", "F sharp 4 on a loud violin"]
    assert captions(Note("timgm6mb", 0, 36, 80), True)[0] == "an acoustic grand piano of a small sound bank playing C 2"
    assert captions(Note("fluid", 60, 60, 40))[0] == "a soft French horn playing C 4"
    assert [pitch_name(p) for p in (36, 69, 84)] == ["C 2", "A 4", "C 6"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "val"}, "split='val'"),
        ({"banks": ["fluid", "fluid"]}, "expected some of fluid, timgm6mb"),
        ({"lowest": 60, "highest": 59}, "expected pitches from 0 to 127"),
        ({"velocities": [0]}, "expected numbers from 1 to 127"),
        ({"banks": ["timgm6mb"], "lowest": 60, "highest": 60, "velocities": [1]}, ""),
    ],
)
def test_notes_refuse_bad_options(options, message, monkeypatch):
    monkeypatch.setattr(notes, "INSTRUMENTS", INSTRUMENTS[:6])
    monkeypatch.setattr(notes, "SILENT", 1 << 15)
    with pytest.raises(ConfigError, match=message or "all of 6 notes are silent"):
        Notes(**options)


def test_without_the_renderer_one_line_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "tinysoundfont", None)
    with pytest.raises(UserError, match=r"needs the package tinysoundfont: pip install --no-deps tinysoundfont==0.3.7"):
        Notes(lowest=60, highest=60)
    assert {bank.size for bank in BANKS.values()} == {"large", "small"}
