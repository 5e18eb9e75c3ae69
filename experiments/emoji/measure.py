"""Draw held-out captions with both arms, and have the drawings read.

python experiments/emoji/measure.py TOLD_BY_MINILM TOLD_BY_CLIP CLIP, a run or a step of one for each arm, and the run
of the CLIP.  Writes
captions.txt, results.csv, samples.png and restyled.png here; draws through sample.py, into the runs.
"""

import csv
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from ldm.checkpoint.load import load_run_config
from ldm.conditioner.clip import build_clip, init_towers, register_model_config
from ldm.conditioner.clip_image import preprocess
from ldm.conditioner.minilm import MiniLM
from ldm.config import build
from ldm.io.images import save_png, to_uint8
from ldm.metrics.effnet import EfficientNet
from ldm.metrics.features import extract
from ldm.metrics.interval import bootstrap, wilson
from ldm.runs.folder import find_run

HERE = Path(__file__).parent
SAMPLE = HERE.parents[1] / "sample.py"
NUM, EACH = 100, 3  # captions, drawings of each
HOW = ("sampler=dpmpp_2m", "steps=20", "guidance=cfg", "batch_size=50")
SCALES = (1.0, 3.0)
STRENGTHS = (0.6, 0.8)


def main(minilm: str, told_by_clip: str, clip: str) -> None:
    torch.set_num_threads(1)
    config = load_run_config(find_run(minilm))
    data, test = build.build_dataset(config), build.build_dataset(config, "test")
    readers = Readers(data, Path(clip))
    rows = chosen(len(test))
    captions = [test.texts[row][0] for row in rows]
    (HERE / "captions.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")
    learned = chosen(len(data))
    (work := measured(minilm)).mkdir(parents=True, exist_ok=True)
    (work / "learned.txt").write_text("\n".join(data.texts[row][0] for row in learned) + "\n", encoding="utf-8")

    results, sheets = [], {"real": test.pixels(rows)}
    results.append(
        {"arm": "real images", "captions": "held out"}
        | readers.read(test.pixels(rows)[:, None], captions, styles(rows))
    )
    for arm, run in (("MiniLM", minilm), ("CLIP", told_by_clip)):
        for scale in SCALES:
            images = drawn(run, f"prompts={HERE / 'captions.txt'}", f"num={EACH}", f"guidance.scale={scale}").unflatten(
                0, (NUM, EACH)
            )
            sheets[f"{arm}, scale {scale:g}"] = images[:, 0]
            told = {"arm": arm, "captions": "held out", "guidance": scale}
            results.append(told | readers.read(images, captions, styles(rows)))
            print(results[-1], flush=True)
    images = drawn(minilm, f"prompts={work / 'learned.txt'}", f"num={EACH}", "guidance.scale=3.0").unflatten(
        0, (NUM, EACH)
    )
    told = {"arm": "MiniLM", "captions": "of the training", "guidance": 3.0}
    results.append(told | readers.read(images, [data.texts[row][0] for row in learned], styles(learned)))

    restyle, sources = (
        [],
        [row - row % 2 for row in rows],
    )  # the 3-D render of each chosen emoji, asked for as a flat drawing
    for place, image in enumerate(to_uint8(test.pixels(sources))):
        save_png(work / "sources" / f"{place:03d}.png", image)
    asked = [test.texts[row + 1][0] for row in sources]
    (work / "restyled.txt").write_text("\n".join(asked) + "\n", encoding="utf-8")
    restyle.append(test.pixels(sources))
    for strength in STRENGTHS:
        typed = (
            "task=img2img",
            f"image={work / 'sources'}",
            f"strength={strength}",
            f"prompts={work / 'restyled.txt'}",
            "num=1",
        )
        restyle.append(drawn(minilm, *typed, "guidance.scale=3.0"))
        told = {"arm": "MiniLM", "captions": f"held out, restyled at {strength}", "guidance": 3.0}
        flat = readers.read(restyle[-1][:, None], asked, torch.ones(NUM, dtype=torch.long))
        results.append(told | flat | {"kept_psnr": round(psnr(restyle[-1], restyle[0]), 2)})
        print(results[-1], flush=True)
    write(HERE / "results.csv", results)
    sheet(HERE / "samples.png", sheets, captions)
    names = ["3-D render, held out", *(f"flat, strength {strength}" for strength in STRENGTHS)]
    sheet(
        HERE / "restyled.png",
        dict(zip(names, restyle, strict=True)),
        [text.removeprefix("a flat illustration of ") for text in asked],
    )


def chosen(total: int) -> list[int]:
    """NUM rows of a data set, evenly spaced over its emoji, in either style by turns."""
    return [2 * (place * (total // 2) // NUM) + place % 2 for place in range(NUM)]


def styles(rows: list[int]) -> Tensor:
    """0 for a 3-D render, 1 for a flat drawing."""
    return torch.tensor([row % 2 for row in rows])


def measured(run: str) -> Path:
    """Where what is drawn from a run, or from a step of one, is kept."""
    return find_run(run) / "measured" / Path(run).name


def drawn(run: str, *typed: str) -> Tensor:
    """What `python sample.py run=RUN TYPED` draws, (N, 3, H, W) in [-1, 1]; once."""
    out = measured(run) / "-".join(word.split("=")[1].replace("/", "_")[-12:] for word in typed)
    if not (out / "metrics.json").is_file():
        subprocess.run(
            [sys.executable, str(SAMPLE), f"run={run}", f"output_dir={out}", *HOW, *typed],
            check=True,
            stdout=subprocess.DEVNULL,
        )
    files = sorted(out.glob("[0-9]*.png"))
    return (
        torch.stack([torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1) for file in files]).float() / 127.5
        - 1
    )


class Readers:
    """Who reads the drawings, none of them part of any loss of the nets that drew.

    words: EfficientNet's features mapped linearly onto a caption's words, as tf-idf: part of neither arm.  minilm: the
    same onto MiniLM's
    sentence vectors, which told one arm.  clip: the small CLIP, whose text tower told the other.  style: EfficientNet's
    features again.
    """

    def __init__(self, data: Any, clip: Path):
        self.net = build_clip(
            register_model_config(str(clip / "model.json")), str(clip / "weights.safetensors"), False, False
        )[0].eval()
        self.tokenize = init_towers(str(clip / "model.json"))[1]
        self.effnet, self.minilm = EfficientNet(), MiniLM()
        every = list(range(len(data)))
        told = [data.texts[row][0] for row in every]
        self.words = Words(told)
        features = extract(self.effnet, (data.pixels(every[i : i + 200]) for i in range(0, len(every), 200)))
        self.to_words, self.to_minilm = ridge(features, self.words(told)), ridge(features, self.sentences(told))
        self.to_style = ridge(features, 2.0 * styles(every)[:, None] - 1)

    def sentences(self, captions: list[str]) -> Tensor:
        """MiniLM's vectors (N, 384) of captions, of norm 1."""
        return torch.cat(
            [normalize(self.minilm(captions[i : i + 100]).vector, dim=1) for i in range(0, len(captions), 100)]
        )

    @torch.no_grad()
    def read(self, images: Tensor, captions: list[str], style: Tensor) -> dict[str, Any]:
        """Of images (captions, each, 3, H, W): how often each reader ranks the own caption first, and sees the style
        (captions,).
        """
        number, each = images.shape[:2]
        flat = images.flatten(0, 1)
        own = torch.arange(number).repeat_interleave(each)
        image, text, _ = self.net(preprocess(self.net.visual, flat), self.tokenize(captions))
        features = extract(self.effnet, flat.split(100))
        ranked = {
            "words": normalize(self.to_words(features), dim=1) @ self.words(captions).T,
            "minilm": normalize(self.to_minilm(features), dim=1) @ self.sentences(captions).T,
            "clip": image @ text.T,
        }
        hits = {name: cosine.argmax(1) == own for name, cosine in ranked.items()}
        hits["style"] = (self.to_style(features)[:, 0] > 0) == style.repeat_interleave(each).bool()
        found: dict[str, Any] = {"n": number * each}
        for name, hit in hits.items():
            low, high = (
                wilson(int(hit.sum()), number)
                if each == 1
                else bootstrap(hit.float().unflatten(0, (number, each)).mean(1))
            )
            found |= {
                name: round(hit.float().mean().item(), 4),
                f"{name}_low": round(low, 4),
                f"{name}_high": round(high, 4),
            }
        return found


class Words:
    """Captions as vectors (N, V) of norm 1, a number for each word of the training captions: its tf-idf, the rarer the
    larger.
    """

    def __init__(self, captions: list[str]):
        sets = [set(split(text)) for text in captions]
        self.place = {word: place for place, word in enumerate(sorted(set().union(*sets)))}
        count = torch.tensor([sum(word in one for one in sets) for word in self.place], dtype=torch.float32)
        self.idf = torch.log(len(captions) / count)

    def __call__(self, captions: list[str]) -> Tensor:
        out = torch.zeros(len(captions), len(self.place))
        for row, text in zip(out, captions, strict=True):
            row[[self.place[word] for word in split(text) if word in self.place]] = 1
        return normalize(out * self.idf, dim=1)


def split(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def ridge(x: Tensor, y: Tensor, weight: float = 1.0) -> Callable[[Tensor], Tensor]:
    """The linear map from x (N, D), standardised, to y (N, E) with the least squared error, `weight` times N / 10 on
    its size.
    """
    std, mean = torch.std_mean(x, 0)
    z = ((x - mean) / (std + 1e-6)).double()
    inner = z.T @ z + weight * len(x) / 10 * torch.eye(x.shape[1], dtype=torch.float64)
    map_, offset = torch.linalg.solve(inner, z.T @ (y - y.mean(0)).double()).float(), y.mean(0)
    return lambda other: (other - mean) / (std + 1e-6) @ map_ + offset


def psnr(a: Tensor, b: Tensor) -> float:
    """The mean over images (N, C, H, W) in [-1, 1], dB."""
    return float((10 * torch.log10(4 / (a - b).square().flatten(1).mean(1).clamp(min=1e-8))).mean())


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def sheet(path: Path, rows: dict[str, Tensor], captions: list[str], columns: int = 12) -> None:
    """A row for each kind, a column for each of `columns` captions, evenly spaced."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    places = [place * len(captions) // columns for place in range(columns)]
    figure, axes = plt.subplots(len(rows), columns, figsize=(1.05 * columns, 1.05 * len(rows) + 0.6), squeeze=False)
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for axis, place in zip(line, places, strict=True):
            axis.imshow(to_uint8(images[place : place + 1])[0].permute(1, 2, 0), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            if name == next(iter(rows)):
                axis.set_title(textwrap.fill(captions[place].removeprefix("a "), 20), fontsize=5)
        line[0].set_ylabel(name, fontsize=6)
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=70)
    plt.close(figure)


if __name__ == "__main__":
    main(*sys.argv[1:])
