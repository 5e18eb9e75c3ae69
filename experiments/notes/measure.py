"""Whether notes are played as their captions say: python experiments/notes/measure.py RUN [VOCODER]

RUN: a run of experiment=notes, or a step of one.  VOCODER: a run of experiment=notes/vocoder.
Writes results.csv, a row as soon as it is known, figure.png and some notes as .wav here; what is drawn and scored is
stored in the run and not computed again.
The pitch is heard by basic-pitch (Bittner et al. 2022), which nobody here trained; the family by the run's evaluator.
All captions are of pairs of instrument and pitch that training never had.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm import plotting
from ldm.checkpoint.load import load_model, load_run_config
from ldm.checkpoint.vocoder import load_vocoder
from ldm.diffusion.grids import trailing
from ldm.diffusion.guidance import cfg
from ldm.diffusion.sampler import dpmpp_2m
from ldm.errors import UserError
from ldm.evaluation.evaluator import load_evaluator
from ldm.io import atomic
from ldm.io.images import to_uint8
from ldm.media import sound
from ldm.media.mel import RATE, griffin_lim, log_mel, to_nats
from ldm.metrics.distribution import frechet
from ldm.metrics.interval import bootstrap
from ldm.report.rows import write
from ldm.runs import cache
from ldm.runs.folder import find_run
from ldm.sampling.request import load_held_out
from ldm.sampling.tasks import sample
from ldm.tensors import derive_seed

HERE = Path(__file__).parent
GROUPS, STEPS, BATCH, SHOWN = 160, 25, 48, 8  # notes at three velocities; steps of the sampler; notes in figures
SCALES = (1.0, 1.5, 2.0, 3.0)
HEARD_RATE, HEARD_SAMPLES, LOWEST = 22_050, 43_844, 21  # of basic-pitch: its input, the MIDI pitch of its first output
SOUNDING = round(0.8 * HEARD_RATE / 256)  # frames of basic-pitch until the key is released
INSTALL = "pip install onnxruntime soxr && pip install --no-deps basic-pitch==0.4.0"


def main(run: str, vocoder: str | None = None) -> None:
    torch.set_num_threads(1)
    folder, config = find_run(run) / "measured" / Path(run).name, load_run_config(run)
    model, data, hear = load_model(run), load_held_out(run), pitch_listener()
    judge, reference = load_evaluator(config, cache.ensure_evaluator(config))
    rows = choose_groups(data.notes)
    batch = data.batch([(0, i) for i in rows])
    ways: dict[str, Callable[[Tensor], Tensor]] = {"Griffin-Lim": griffin_lim}
    if vocoder is not None:
        ways["vocoder"] = load_vocoder(vocoder)
    results: list[dict[str, Any]] = []

    def add(source: str, way: str, image: Tensor, scale: float | None = None) -> Tensor:
        """Add the row of spectrograms (N, 1, 128, 64) made to sound in a way; return their waves (N, L)."""
        name = f"{source} {scale or ''} {way}".replace("  ", " ")
        file = folder / f"{name}.json"
        wave = batch["wave"] if way == "as rendered" else in_parts(ways[way], image)
        if not file.is_file():
            scores = score(judge, reference, image, wave, batch, hear)
            atomic.write_json(file, {"source": source, "guidance": scale, "sound": way, "n": len(rows), **scores})
        results.append(json.loads(file.read_text()))
        write(HERE / "results.csv", results)
        print(results[-1], flush=True)
        return wave

    real = batch["image"]
    shown = [i for i, row in enumerate(rows) if data.notes[row].bank == "fluid"][:: max(1, len(rows) // 2 // SHOWN)]
    shown = shown[:SHOWN]  # of the bank whose licence lets its notes be passed on
    waves = {"real": add("real", "as rendered", real)}
    spectrograms = {"real": real}
    for way in ways:
        waves[f"real-{way}"] = add("real", way, real)
    with torch.no_grad():
        coded = torch.cat([model.decode(model.encode(part)).clamp(-1, 1) for part in real.split(BATCH)])
    for way in ways:
        waves[f"first-stage-{way}"] = add("first stage", way, coded)
    spectrograms["first stage"] = coded
    for scale in SCALES:
        file = folder / f"{scale:g}.safetensors"
        if not file.is_file():
            atomic.write_tensors(file, {"image": draw(model, batch["caption"], rows, partial(cfg, scale=scale))})
        image = atomic.read_tensors(file)["image"]
        spectrograms[f"drawn, guidance {scale:g}"] = image
        for way in ways:
            waves[f"drawn-{scale:g}-{way}"] = add("drawn", way, image, scale)
    best = max((row for row in results if row["source"] == "drawn"), key=lambda row: row["pitch"])
    for name in ("real", *(x for x in waves if x.startswith(("real-", f"drawn-{best['guidance']:g}-")))):
        atomic.write_bytes(HERE / f"{name.lower()}.wav", sound.encode_wav(waves[name][shown].flatten()))
    draw_figure(results, {name: image[shown] for name, image in spectrograms.items()})


def choose_groups(notes: Sequence[Any]) -> list[int]:
    """Return the rows of GROUPS notes at every velocity, chosen by key: rows of a group follow each other."""
    groups: dict[tuple[str, int, int], list[int]] = {}
    for i, note in enumerate(notes):
        groups.setdefault((note.bank, note.program, note.pitch), []).append(i)
    most = max(map(len, groups.values()))
    whole = [rows for rows in groups.values() if len(rows) == most]
    chosen = sorted(whole, key=lambda rows: derive_seed("measured", rows[0]))[:GROUPS]
    return [row for rows in sorted(chosen) for row in rows]


def draw(model: Any, captions: Sequence[str], rows: Sequence[int], guidance: Any) -> Tensor:
    """Sample the spectrogram (N, 1, 128, 64) of each caption, with its row as seed."""
    ts, parts = trailing(model.denoiser.schedule, STEPS), []
    for start in range(0, len(rows), BATCH):
        batch = {"caption": list(captions[start : start + BATCH])}
        parts.append(sample(model, batch, rows[start : start + BATCH], ts, dpmpp_2m, guidance).clamp(-1, 1))
    return torch.cat(parts)


@torch.no_grad()
def in_parts(vocoder: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
    """Make spectrograms (N, 1, 128, T) sound, a few at a time."""
    return torch.cat([vocoder(part) for part in image.split(BATCH)])


@torch.no_grad()
def score(
    judge: Any,
    reference: Tensor,
    image: Tensor,
    wave: Tensor,
    batch: Mapping[str, Any],
    hear: Callable[[Tensor], Tensor],
) -> dict[str, float]:
    """Score notes: spectrograms (N, 1, 128, 64) and the waves (N, L) made of them, against what was asked.

    pitch: part heard at the pitch's own semitone by basic-pitch, with an interval.  family, own_pitch: parts that the
    evaluator recognises.  fd_notes: distance of its features to those of the training notes.  loudness: see
    `loudness_correlation`.  mel_error: of the waves' spectrograms to these, in nats.
    """
    right = (hear(wave) == batch["pitch"]).double()
    low, high = bootstrap(right)
    features = torch.cat([judge(to_uint8(part)) for part in image.split(BATCH)])
    found = {name: logits.argmax(1) for name, logits in judge.classify_all(features).items()}
    moments = [(x.double().mean(0), x.double().T.cov()) for x in (features, reference)]
    error = torch.cat([(to_nats(log_mel(w)) - to_nats(m)).abs().mean((1, 2, 3)) for w, m in
                       zip(wave.split(BATCH), image.split(BATCH), strict=True)])  # fmt: skip
    return {
        "pitch": float(right.mean()),
        "low": low,
        "high": high,
        "family": float((found["label"] == batch["label"]).double().mean()),
        "own_pitch": float((found["pitch"] == batch["pitch"]).double().mean()),
        "fd_notes": float(frechet(*moments[0], *moments[1])),
        "loudness": loudness_correlation(wave, batch["velocity"]),
        "mel_error": float(error.mean()),
    }


def loudness_correlation(wave: Tensor, velocity: Tensor) -> float:
    """Return the correlation of the level of waves (N, L) and velocity (N,) within notes of different velocities alone.

    Both as logarithms, less their mean over the rows of a note, which follow each other: instruments differ in level by
    more than soft and loud do.
    """
    size = len(velocity.unique())
    level = wave.double().square().mean(1).clamp_min(1e-12).log() / 2
    a, b = (x - x.mean(1, keepdim=True) for x in (y.reshape(-1, size) for y in (level, velocity.double().log())))
    return float((a * b).sum() / (a.square().sum() * b.square().sum()).sqrt().clamp_min(1e-12))


def pitch_listener() -> Callable[[Tensor], Tensor]:
    """Return basic-pitch: waves (N, L) at RATE -> the MIDI pitch (N,) that sounds strongest while the key is down.

    Raises UserError with the command that installs it.
    """
    package = find_spec("basic_pitch")
    try:
        import onnxruntime
        import soxr
    except ModuleNotFoundError:
        package = None
    if package is None or package.origin is None:
        raise UserError(f"the pitch is heard by basic-pitch: {INSTALL}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    file = Path(package.origin).parent / "saved_models" / "icassp_2022" / "nmp.onnx"
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def hear(wave: Tensor) -> Tensor:
        pitches = []
        for one in wave.float().numpy():
            resampled = torch.from_numpy(soxr.resample(one, RATE, HEARD_RATE))
            padded = torch.nn.functional.pad(resampled, (0, HEARD_SAMPLES - len(resampled)))
            (notes,) = session.run(["StatefulPartitionedCall:1"], {name: padded[None, :, None].numpy()})
            pitches.append(LOWEST + int(notes[0, :SOUNDING].mean(0).argmax()))
        return torch.tensor(pitches)

    return hear


def draw_figure(results: Sequence[Mapping[str, Any]], spectrograms: Mapping[str, Tensor]) -> None:
    """Draw pitch and family against guidance, with the controls as lines, and spectrograms of some notes in rows."""
    figure = plotting.canvas(920, 360)
    for left, key, title in ((60, "pitch", "pitch heard by basic-pitch"), (360, "family", "family, by the evaluator")):
        axes = plotting.panel(figure, left, 40, 230, 240, title, "guidance", "part that is right")
        for (source, way), colour in zip(
            (("real", "as rendered"), ("real", "Griffin-Lim"), ("first stage", "Griffin-Lim")),
            (plotting.INK, plotting.BLUE, plotting.GREEN),
            strict=True,
        ):
            (row,) = [r for r in results if (r["source"], r["sound"]) == (source, way)]
            axes.axhline(row[key], color=colour, lw=1, label=f"{source}, {way}")
        for way, marker in (("Griffin-Lim", "o"), ("vocoder", "s")):
            rows = [r for r in results if (r["source"], r["sound"]) == ("drawn", way)]
            if rows:
                x = [r["guidance"] for r in rows]
                axes.plot(x, [r[key] for r in rows], marker=marker, color=plotting.RED, label=f"drawn, {way}")
        axes.set_ylim(0, 1)
        axes.legend(fontsize=6, loc="lower right")
    names = ("real", "first stage", *list(spectrograms)[-len(SCALES) :])
    sheet = sound.sheet([x for name in names for x in spectrograms[name]], SHOWN)
    axes = plotting.panel(figure, 660, 20, 240, 320, "rows: real, first stage, guidance 1 to 3")
    axes.imshow((sheet.permute(1, 2, 0) + 1) / 2, aspect="auto")
    axes.set_axis_off()
    figure.savefig(HERE / "figure.png", metadata={"Software": None})


if __name__ == "__main__":
    main(*sys.argv[1:])
