"""Three tasks of one net on tiles it never saw: python experiments/blue_marble/measure.py RUN

Writes results.csv and figure.png here; what is told goes to files, and sample.py draws from them as a person would have
it draw.
"""

import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.checkpoint.load import load_model, load_run_config
from ldm.config import build
from ldm.io.images import save_png, to_uint8
from ldm.metrics.distribution import frechet
from ldm.metrics.effnet import EfficientNet
from ldm.metrics.features import extract
from ldm.metrics.interval import bootstrap
from ldm.tensors import derive_seed

HERE = Path(__file__).parent
SAMPLE = HERE.parents[1] / "sample.py"
HOW = ("sampler=dpmpp_2m", "guidance=cfg", "batch_size=50")
KINDS = ("sea", "lake", "land")
KIND = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 2])  # of each class of the map
HOLE, MARGIN = 32, 16  # pixels: the side of the hole, what is added on each side
THIRD, SHOWN = 3, 8


def main(run: str) -> None:
    torch.set_num_threads(1)
    config = load_run_config(Path(run))
    data, test = build.build_dataset(config), build.build_dataset(config, "test")
    num = len(test)
    batch = test.batch([(0, i) for i in range(num)])
    batch["image"], batch["map"] = test.pixels(range(num)), test.maps.long()  # as they are, not flipped
    low = F.interpolate(batch["image"], (16, 16), mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)
    work = Path(run) / "measured"
    part = list(range(0, num, THIRD))  # of the tiles, for all but super-resolution
    for place in range(num):
        kept(work / "low_res" / f"{place:03d}.png", to_uint8(low)[place])
    for place in part:
        kept(work / "images of a third" / f"{place:03d}.png", to_uint8(batch["image"])[place])
        kept(work / "maps of a third" / f"{place:03d}.png", batch["map"][place][None].to(torch.uint8))
    hole = torch.zeros(1, 64, 64)
    hole[:, 32 - HOLE // 2 : 32 + HOLE // 2, 32 - HOLE // 2 : 32 + HOLE // 2] = 1
    save_png(work / "hole.png", (255 * hole).to(torch.uint8))

    score, sees = Likeness(batch["image"]), trained(data)
    fewer, maps = Likeness(batch["image"][part]), batch["map"][part]
    results: list[dict[str, Any]] = []

    def add(task: str, way: str, images: Tensor, where: Tensor | None = None) -> Tensor:
        found = {"task": task, "way": way, "n": len(images), **(score if len(images) == num else fewer)(images, where)}
        if task == "semantic synthesis":
            found |= agreement(sees, images, maps)
        results.append(found)
        print(found, flush=True)
        return images

    with torch.no_grad():
        model = load_model(run)
        again = torch.cat([model.decode(model.encode(part)).clamp(-1, 1) for part in batch["image"].split(100)])
    add("none", "first stage alone", again)
    small = to_uint8(low).float() / 127.5 - 1
    bicubic = add("x4", "bicubic", F.interpolate(small, (64, 64), mode="bicubic", align_corners=False).clamp(-1, 1))
    told = ("task=super_resolution", f"low_res={work / 'low_res'}", "scale=4", "guidance.scale=1.0", f"num={num}")
    sharp = [add("x4", f"drawn, {steps} steps", drawn(run, *told, f"steps={steps}")) for steps in (5, 20)]
    sharp += [add("x4", "drawn, 20 steps, back-projected", drawn(run, *told, "steps=20", "back_projection_steps=10"))]
    add("semantic synthesis", "real images", batch["image"][part])
    told = ("task=semantic", f"map={work / 'maps of a third'}", f"num={len(part)}", "steps=20")
    synthetic = [
        add("semantic synthesis", f"scale {s:g}", drawn(run, *told, f"guidance.scale={s}")) for s in (1.0, 2.0)
    ]
    untold = ("task=unconditional", f"num={len(part)}", "steps=20", "guidance.scale=1.0")
    add("semantic synthesis", "told nothing", drawn(run, *untold))
    told = (
        "task=inpaint",
        f"image={work / 'images of a third'}",
        f"mask={work / 'hole.png'}",
        f"num={len(part)}",
        "steps=20",
    )
    holes = [
        add("hole", way, drawn(run, *told, f"guidance.scale={s}"), hole)
        for way, s in (("training-free", 0.0), ("told the hole", 1.0))
    ]
    assert all(torch.equal(to_uint8(one * (1 - hole)), to_uint8(batch["image"][part] * (1 - hole))) for one in holes)
    sides = [f"pad_{side}={MARGIN}" for side in ("left", "right", "top", "bottom")]
    places = part[:: len(part) // SHOWN][:SHOWN]
    for place in places:
        kept(work / "some" / f"{place:03d}.png", to_uint8(batch["image"])[place])
    wide = drawn(
        run, "task=outpaint", f"image={work / 'some'}", *sides, f"num={SHOWN}", "steps=20", "guidance.scale=1.0"
    )
    inside = slice(MARGIN, MARGIN + 64)
    assert torch.equal(to_uint8(wide[..., inside, inside]), to_uint8(batch["image"][places]))
    write(HERE / "results.csv", results)

    colours = torch.tensor(PALETTE)[batch["map"]].movedim(-1, 1).float() / 127.5 - 1
    shown = {
        "map": colours,
        "drawn from it": synthetic[1],
        "real": batch["image"],
        "a quarter": F.interpolate(small, (64, 64), mode="nearest"),
        "bicubic": bicubic,
        "drawn from it ": sharp[1],
        "back-projected": sharp[2],
        "hole": batch["image"] * (1 - hole) + hole,
        "training-free": holes[0],
        "told the hole": holes[1],
    }
    where = [part.index(place) for place in places]
    picked = {name: images[places if len(images) == num else where] for name, images in shown.items()}
    sheet(HERE / "figure.png", {**picked, "widened": wide})


PALETTE = [
    *([11, 40, 110], [40, 90, 170], [90, 150, 210], [120, 200, 255]),
    *([70, 140, 60], [150, 170, 80], [190, 150, 90], [140, 100, 70], [250, 250, 250]),
]


def kept(path: Path, image: Tensor) -> None:
    """The image in a file, unless it is there."""
    if not path.is_file():
        save_png(path, image)


def drawn(run: str, *typed: str) -> Tensor:
    """What `python sample.py run=RUN TYPED` draws, (N, 3, H, W) in [-1, 1]; once."""
    out = Path(run) / "measured" / "-".join(word.split("=")[1].replace("/", "_")[-12:] for word in typed)
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


class Likeness:
    """PSNR against the very images, with its interval, and rfd_effnet: the Frechet distance of EfficientNet's features
    to theirs.
    """

    def __init__(self, images: Tensor):
        self.images, self.net = images, EfficientNet()
        self.reference = gaussian(extract(self.net, images.split(100)))

    def __call__(self, images: Tensor, where: Tensor | None) -> dict[str, float]:
        error = (images - self.images).square()
        part = torch.ones(1, 64, 64) if where is None else where
        psnr = 10 * torch.log10(4 / ((error * part).sum((1, 2, 3)) / (3 * part.sum())).clamp(min=1e-8))
        low, high = bootstrap(psnr)
        distance = float(frechet(*self.reference, *gaussian(extract(self.net, images.split(100)))))
        return {
            "psnr": round(float(psnr.mean()), 3),
            "psnr_low": round(low, 3),
            "psnr_high": round(high, 3),
            "rfd_effnet": round(distance, 2),
        }


def gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D) of features (N, D) in float64."""
    return features.double().mean(0), features.double().T.cov()


def trained(data: Any, steps: int = 300, batch: int = 32) -> nn.Module:
    """A classifier of every pixel as sea, lake or land, on the training tiles: it is in no loss of the net that it
    measures.
    """
    torch.manual_seed(0)

    def conv(inside: int, outside: int, dilation: int) -> list[nn.Module]:
        return [
            nn.Conv2d(inside, outside, 3, padding=dilation, dilation=dilation, bias=False),
            nn.BatchNorm2d(outside),
            nn.SiLU(),
        ]

    body = [*conv(48, 48, 1), *conv(48, 48, 2), *conv(48, 48, 1)]
    net = nn.Sequential(nn.PixelUnshuffle(4), *body, nn.Conv2d(48, 16 * len(KINDS), 1), nn.PixelShuffle(4))
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for step in range(steps):
        rows = [derive_seed("judge", step, place) % len(data) for place in range(batch)]
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / steps)
        loss = F.cross_entropy(net(data.pixels(rows)), KIND[data.maps[rows].long()])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return net.eval()


@torch.no_grad()
def agreement(net: nn.Module, images: Tensor, maps: Tensor) -> dict[str, float]:
    """The part of pixels seen as what the map says, over all with its interval over tiles, and of the pixels of each
    kind.
    """
    right = torch.cat([net(part).argmax(1) for part in images.split(100)]) == KIND[maps]
    low, high = bootstrap(right.flatten(1).float().mean(1))
    each = {
        f"agreement_{kind}": round(right[KIND[maps] == number].float().mean().item(), 4)
        for number, kind in enumerate(KINDS)
    }
    return {
        "agreement": round(right.float().mean().item(), 4),
        "agreement_low": round(low, 4),
        "agreement_high": round(high, 4),
    } | each


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def sheet(path: Path, rows: dict[str, Tensor]) -> None:
    """A row for each kind of image, named at its left."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(rows), SHOWN, figsize=(1.05 * SHOWN + 0.3, 1.05 * len(rows)), squeeze=False)
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(line, to_uint8(images), strict=True):
            axis.imshow(image.permute(1, 2, 0), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(name.strip(), fontsize=7)
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=60)
    plt.close(figure)


if __name__ == "__main__":
    main(*sys.argv[1:])
