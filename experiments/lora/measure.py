"""What a LoRA learnt of a style, and what is left of the rest: python experiments/lora/measure.py RUN

RUN: a run of experiment=lora, or a step of one.  Writes results.csv, a row as soon as it is known, and figure.png here;
what was drawn
is kept in the run and not drawn again.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm import plotting
from ldm.checkpoint.adapters import BaseModelRef
from ldm.checkpoint.load import apply_adapter, load_model
from ldm.data.emoji import Emoji
from ldm.diffusion.grids import trailing
from ldm.diffusion.guidance import cfg
from ldm.diffusion.sampler import dpmpp_2m
from ldm.io import atomic
from ldm.io.images import to_uint8
from ldm.metrics.distribution import frechet
from ldm.metrics.effnet import EfficientNet
from ldm.metrics.features import extract
from ldm.metrics.interval import bootstrap
from ldm.report.rows import write
from ldm.runs.folder import find_run
from ldm.sampling.tasks import sample

HERE = Path(__file__).parent
NUM, STEPS, SCALE, LEARNED, SHOWN = (
    48,
    12,
    3.0,
    200,
    12,
)  # captions, of the sampler, of guidance, images a style for the reader, columns
STYLES = ("3d", "flat", "pencil")
STRENGTHS = (0.0, 1.0)


def main(run: str) -> None:
    torch.set_num_threads(1)
    folder = find_run(run)
    work = folder / "measured" / Path(run).name
    tests = {style: Emoji("test", styles=(style,)) for style in STYLES}
    reader, results, shown = Reader(work / "reader.safetensors"), [], {}

    def add(asked: str, way: str, images: Tensor, before: Tensor | None = None) -> None:
        features = extract(reader.net, images.split(48))
        right = (reader.map(features).argmax(1) == STYLES.index(asked)).float()
        low, high = bootstrap(right)
        distance = float(frechet(*gaussian(features), *gaussian(real[asked])))
        found = {
            "asked": asked,
            "way": way,
            "n": NUM,
            "style": right.mean().item(),
            "style_low": low,
            "style_high": high,
        }
        found |= {"rfd_effnet": distance, "moved": float("nan") if before is None else rms(images, before)}
        results.append({name: round(value, 4) if isinstance(value, float) else value for name, value in found.items()})
        write(HERE / "results.csv", results)
        print(results[-1], flush=True)

    rows = {style: [place * len(test) // NUM for place in range(NUM)] for style, test in tests.items()}
    images = {style: test.pixels(rows[style]) for style, test in tests.items()}
    real = {style: extract(reader.net, image.split(48)) for style, image in images.items()}
    base = load_model(BaseModelRef.read(folder).path)
    for style in STYLES:
        add(style, "real images", images[style])
    with torch.no_grad():
        add("pencil", "first stage alone", base.decode(base.encode(images["pencil"])))
    shown["real, pencil"] = images["pencil"]
    before: dict[str, Tensor] = {}
    for strength in STRENGTHS:
        model = load_model(BaseModelRef.read(folder).path)
        apply_adapter(model, run, strength)
        for style in STYLES[::-1]:
            captions = [tests[style].texts[row][0] for row in rows[style]]
            drawings = drawn(work / f"{style}-{strength}.safetensors", model, captions)
            add(style, f"LoRA at {strength}", drawings, before.get(style))
            shown[f"{style}, LoRA at {strength:g}"] = drawings
            before.setdefault(style, drawings)
    plotting.stack_rows(shown, SHOWN).savefig(HERE / "figure.png", metadata={"Software": None})


class Reader:
    """Who sees the style: EfficientNet's features, mapped linearly onto the three; it is in no loss."""

    def __init__(self, path: Path):
        self.net = EfficientNet()
        if not path.is_file():
            features = []
            for style in STYLES:
                data = Emoji(styles=(style,))
                rows = [place * len(data) // LEARNED for place in range(LEARNED)]
                features.append(extract(self.net, (data.pixels(rows[i : i + 50]) for i in range(0, LEARNED, 50))))
            atomic.write_tensors(path, {"features": torch.cat(features)})
        x = atomic.read_tensors(path)["features"].double()
        y = torch.eye(len(STYLES), dtype=torch.float64).repeat_interleave(LEARNED, 0)
        self.std, self.mean = torch.std_mean(x, 0)
        z = (x - self.mean) / (self.std + 1e-6)
        inner = z.T @ z + len(x) / 10 * torch.eye(x.shape[1], dtype=torch.float64)
        self.weight, self.offset = torch.linalg.solve(inner, z.T @ (y - y.mean(0))), y.mean(0)

    def map(self, features: Tensor) -> Tensor:
        """(N, 3) scores of the styles."""
        return (features.double() - self.mean) / (self.std + 1e-6) @ self.weight + self.offset


def drawn(path: Path, model: Any, captions: list[str]) -> Tensor:
    """Images (N, 3, H, W) in [-1, 1], caption i with seed i; once."""
    if not path.is_file():
        ts, parts = trailing(model.denoiser.schedule, STEPS), []
        for start in range(0, NUM, 32):
            part = list(range(start, min(start + 32, NUM)))
            batch = {"index": part, "caption": [captions[i] for i in part]}
            parts.append(sample(model, batch, part, ts, dpmpp_2m, partial(cfg, scale=SCALE)))
        atomic.write_tensors(path, {"images": to_uint8(torch.cat(parts))})
    return atomic.read_tensors(path)["images"].float() / 127.5 - 1


def gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D) of features (N, D) in float64."""
    return features.double().mean(0), features.double().T.cov()


def rms(a: Tensor, b: Tensor) -> float:
    """The root mean square difference of images, in [-1, 1] units."""
    return float((a - b).square().mean().sqrt())


if __name__ == "__main__":
    main(*sys.argv[1:])
