"""Whether clips move as their captions say: python experiments/moving/measure.py RUN

RUN: a run of experiment=moving, or a step of one.  Adds the model's rows to results.csv, each as soon as it is known;
draws figure.png (obedience against guidance), samples.png and samples.gif.  Samples, and the judge, are stored and not
made again.
All is measured on the nine pairs of garment and motion that no training clip had. Motion is measured without a network,
the garment by a judge that is in no loss; frames are those that were drawn, never read back from a video file.
"""

import sys
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm import plotting
from ldm.checkpoint.load import load_model, load_run_config
from ldm.data.moving import MovingGarments
from ldm.diffusion.grids import trailing
from ldm.diffusion.guidance import cfg
from ldm.diffusion.sampler import dpmpp_2m
from ldm.io import atomic
from ldm.io.download import cache_dir
from ldm.io.images import save_png, to_uint8
from ldm.media import clip as medium
from ldm.metrics.distribution import frechet
from ldm.metrics.features import extract
from ldm.metrics.interval import bootstrap
from ldm.metrics.motion import freeze, measure_motion, shuffle_frames
from ldm.metrics.moving_net import MovingNet
from ldm.report.rows import read, write
from ldm.runs.folder import find_run
from ldm.sampling.clips import complete_clip, extend_clip
from ldm.sampling.tasks import generate, sample
from ldm.tensors import derive_seed

HERE = Path(__file__).parent
EACH, REFERENCE = 40, 100  # clips of each pair: measured, and whose features samples are compared with
STEPS, BATCH = 20, 60  # of the sampler; clips at a time
SCALES, SHOWN = (1.0, 2.0, 3.0, 4.0, 6.0), 3.0  # of guidance; that of the pictures and of the task with a first frame
PICTURED = ("2x4x4", "DiTBlock")  # the model whose samples are shown
THROUGH = "real clips through the first stage"
STYLES = {"real clips": "-", THROUGH: "--", "frames shuffled": "-.", "first frame repeated": ":"}
JUDGE = {"steps": 2000, "batch": 64, "lr": 3e-3, "seed": 0}


def main(run: str) -> None:
    torch.set_num_threads(1)
    folder, config = find_run(run) / "measured" / Path(run).name, load_run_config(run)
    options = {name: config.data[name] for name in ("frames", "size", "root")}
    test, others = (MovingGarments(split, pairs="held_out", **options) for split in ("test", "train"))
    index = of_each_garment(test, EACH)
    batch = test.batch([(0, i) for i in index])
    clips, caption = batch["image"], batch["caption"]
    judge = trained_judge(MovingGarments("train", pairs="all", **options))
    reference = gaussian(extract(judge, chunks(others.pixels(of_each_garment(others, REFERENCE)))))
    name = {"first_stage": kind_of_first_stage(config), "blocks": kind_of_blocks(config)}
    results = [row for row in read(HERE / "results.csv") if any(row[key] != value for key, value in name.items())]

    def add(way: str, drawn: Tensor, guidance: float | None = None) -> Tensor:
        """Measure clips and add their row."""
        measured = measure_motion(drawn, batch["motion"])
        garment, motion = seen(judge, drawn)
        right = {"motion": measured["motion"], "garment": (garment == batch["label"]).double()}
        row: dict[str, Any] = {**name, "way": way, "guidance": guidance, "n": len(drawn)}
        for key, hits in right.items():
            low, high = bootstrap(hits)
            row |= {key: float(hits.mean()), f"{key}_low": low, f"{key}_high": high}
        row["motion_judged"] = float((motion == batch["motion"]).double().mean())
        row |= {key: float(measured[key].mean()) for key in ("speed", "acceleration", "steadiness", "continuity")}
        row["fd_moving"] = float(frechet(*reference, *gaussian(extract(judge, chunks(drawn)))))
        results.append(row)
        write(HERE / "results.csv", results)
        print(row, flush=True)
        return drawn

    model = load_model(run)
    add("real clips", clips)
    with torch.no_grad():
        through = torch.cat([model.decode(model.encode(part)) for part in chunks(clips)])
    add(THROUGH, through)
    add("frames shuffled", shuffle_frames(through, index))
    add("first frame repeated", freeze(through))
    make = partial(draw, model, caption)
    drawn = {}
    for scale in SCALES:
        file = folder / f"drawn-{scale:g}.safetensors"
        drawn[scale] = add("drawn", stored(file, partial(make, generate, scale, clips)), scale)
    animate = partial(complete_clip, first=1)
    given = stored(folder / f"first-frame-{SHOWN:g}.safetensors", partial(make, animate, SHOWN, clips))
    assert torch.equal(to_uint8(given)[:, :, 0], to_uint8(clips)[:, :, 0])  # the given frame is kept
    add("drawn, first frame given", given, SHOWN)
    figure(read(HERE / "results.csv"))
    if (name["first_stage"], name["blocks"]) == PICTURED:
        one = list(range(0, len(clips), EACH))  # of each pair

        def go_on(clip: Tensor, first: int, piece: int) -> Tensor:
            task, seeds = partial(complete_clip, first=first), [len(clips) * (piece + 1) + i for i in one]
            return draw(model, [caption[i] for i in one], task, SHOWN, clip, seeds)

        longer = extend_clip(drawn[SHOWN][one], 2, go_on)
        pictures(*(part[one] for part in (clips, through, drawn[SHOWN], given)), longer)


def of_each_garment(data: MovingGarments, num: int) -> list[int]:
    """Return the indices of the first `num` clips of each garment that a data set has."""
    return [i for k in data.labels.unique() for i in (data.labels == k).nonzero()[:num, 0].tolist()]


def kind_of_first_stage(config: Any) -> str:
    """Return the factor of the first stage, of frames, height and width: 1x4x4 encodes every frame by itself."""
    return "x".join(map(str, config.autoencoder.factor))


def kind_of_blocks(config: Any) -> str:
    """Return the names of the network's blocks, used in turn; the network's own where it has no such option."""
    return " ".join(node["_target_"].rsplit(".", 1)[1] for node in config.net.get("blocks") or [config.net])


def chunks(clips: Tensor) -> tuple[Tensor, ...]:
    return clips.split(BATCH)


def gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean (D,) and covariance (D, D) of features (N, D) in float64."""
    return features.double().mean(0), features.double().T.cov()


def trained_judge(data: MovingGarments) -> MovingNet:
    """Return the judge of clips of this shape, trained on all pairs of the training garments; once, then cached."""
    torch.manual_seed(derive_seed("judge", JUDGE["seed"]))
    net = MovingNet()
    path = (
        cache_dir() / "judges" / f"{data.fingerprint}-{'-'.join(f'{value:g}' for value in JUDGE.values())}.safetensors"
    )
    if path.is_file():
        net.load_state_dict(atomic.read_tensors(path))
        return net.eval().requires_grad_(False)
    steps, batch = int(JUDGE["steps"]), int(JUDGE["batch"])
    optimizer = torch.optim.AdamW(net.parameters(), lr=JUDGE["lr"], weight_decay=0.05)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = JUDGE["lr"] * min(1, (step + 1) / 100) * (1 - step / steps)
        samples = [(step, derive_seed("judge", step, place) % len(data)) for place in range(batch)]
        part = data.batch(samples)
        logits = net.split(net.logits(to_uint8(part["image"])))
        loss = sum(F.cross_entropy(logits[name], part[name]) for name in logits)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 200 == 0:
            print(f"judge {step} of {steps}: loss {loss.item():.3f}", flush=True)
    net.eval().requires_grad_(False)
    rows = range(0, len(data), max(1, len(data) // 6000))
    net.standardise(
        torch.cat([net.penultimate(to_uint8(data.pixels(rows[i : i + 200]))) for i in range(0, len(rows), 200)])
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_tensors(path, net.state_dict())
    return net


def seen(judge: MovingNet, clips: Tensor) -> tuple[Tensor, Tensor]:
    """Return the garment and the motion (N,) that the judge sees in clips."""
    logits = judge.split(torch.cat([judge.logits(to_uint8(part)) for part in chunks(clips)]))
    return logits["label"].argmax(1), logits["motion"].argmax(1)


def draw(
    model: Any, caption: list[str], task: Any, scale: float, image: Tensor, index: list[int] | None = None
) -> Tensor:
    """Sample a clip for each caption, seeded by its row, or by `index`: (N, 1, F, H, W).

    image: the clips (N, 1, F, H, W) of which a task is given frames.
    """
    ts, rows, parts = trailing(model.denoiser.schedule, STEPS), list(range(len(caption))), []
    for some in (rows[i : i + BATCH] for i in range(0, len(rows), BATCH)):
        batch = {"index": some, "caption": [caption[i] for i in some], "image": image[some]}
        seeds = some if index is None else [index[i] for i in some]
        parts.append(sample(model, batch, seeds, ts, dpmpp_2m, partial(cfg, scale=scale), task).float())
    return torch.cat(parts)


def stored(file: Path, make: Callable[[], Tensor]) -> Tensor:
    """Return clips in [-1, 1] at 256 levels from a file, made and written first if there is none."""
    if not file.is_file():
        atomic.write_tensors(file, {"clips": to_uint8(make())})
    return atomic.read_tensors(file)["clips"].float() / 127.5 - 1


def figure(rows: list[dict[str, str]]) -> None:
    """Draw obedience in motion and garment against guidance, a line for each model; real clips and controls across."""
    canvas = plotting.canvas(860, 320)
    models = list(dict.fromkeys((row["first_stage"], row["blocks"]) for row in rows))
    for place, (key, title) in enumerate((("motion", "motion as told"), ("garment", "garment as told"))):
        axes = plotting.panel(canvas, 60 + 400 * place, 30, 320, 230, title, "guidance scale", "part of the clips")
        for number, model in enumerate(models):
            some = [row for row in rows if (row["first_stage"], row["blocks"]) == model]
            line = [row for row in some if row["way"] == "drawn"]
            scales, values = ([float(row[name]) for row in line] for name in ("guidance", key))
            ends = [[abs(float(row[f"{key}_{end}"]) - float(row[key])) for row in line] for end in ("low", "high")]
            axes.errorbar(scales, values, ends, color=f"C{number}", marker="o", ms=3, label=" ".join(model))
            for row in some:
                if row["way"] in STYLES and (number == 0 or row["way"] == THROUGH):
                    axes.axhline(float(row[key]), color=f"C{number}" if number else "0.5", ls=STYLES[row["way"]], lw=1)
        axes.set_ylim(0, 1.02)
        if place == 0:
            plotting.legend(axes)
    plotting.words(canvas, "; ".join(f"{style}  {way}" for way, style in STYLES.items()), 60, 298, size=10)
    canvas.savefig(HERE / "figure.png", metadata={"Software": None})


def pictures(real: Tensor, through: Tensor, drawn: Tensor, given: Tensor, longer: Tensor) -> None:
    """Write samples.png, a row of frames for each pair, and samples.gif and longer.gif, in which they move.

    Their columns are the pairs; the rows are real clips, those through the first stage, drawn ones, and drawn ones
    with a given first frame.
    """
    sheets = [medium.sheet(list(clips), 1) for clips in (real, drawn)]
    save_png(
        HERE / "samples.png",
        to_uint8(torch.cat([sheets[0], sheets[0].new_ones(3, sheets[0].shape[1], 8), sheets[1]], 2)),
    )
    moving(HERE / "samples.gif", [real, through, drawn, given])
    moving(HERE / "longer.gif", [longer])


def moving(path: Path, rows: list[Tensor]) -> None:
    """Write clips, several rows of (N, 1, F, H, W), as one GIF, twice as large."""
    clips = torch.cat(rows)
    frames = [plotting.concatenate(frame, len(rows[0])) for frame in clips.unbind(2)]
    large = torch.stack([frame.repeat_interleave(2, 1).repeat_interleave(2, 2).expand(3, -1, -1) for frame in frames])
    atomic.write_bytes(path, medium.encode_gif(to_uint8(large), Fraction(medium.RATE)))


if __name__ == "__main__":
    main(*sys.argv[1:])
