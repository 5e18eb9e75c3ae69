"""Score the study's runs before and after the discriminator, and draw them: python experiments/first_stage/measure.py

Reads the finished runs named first_stage in the cache, and what is there of their controls; writes results.csv,
curves.csv, figure.png.
"""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from ldm.checkpoint.state import load_trainable
from ldm.checkpoint.step import load_checkpoint
from ldm.config import build, serialize
from ldm.io.download import cache_dir
from ldm.io.images import to_uint8
from ldm.metrics.distribution import frechet
from ldm.metrics.effnet import EfficientNet
from ldm.metrics.features import extract
from ldm.metrics.paired import Reconstruction
from ldm.runs import metrics_log
from ldm.tensors import KeyedNoise

HERE = Path(__file__).parent
NUM = 2560  # test images, or as many as there are: twice the features, below which the distance is biased upwards
HEALTH = (
    "adversarial_weight",
    "logits_real",
    "logits_fake",
    "discriminator_accuracy",
    "kl_channel_min",
    "kl_channel_max",
    "dead_channels",
)
SHOWN = 10


def found() -> Iterator[tuple[Path, Any]]:
    """The runs of this study: folder and config."""
    for path in sorted((cache_dir() / "first_stage").glob("*/config.yaml")):
        config = OmegaConf.create(serialize.load_config(path))
        start, steps = config.training.get("discriminator_start"), config.training.steps
        if config.name == "first_stage" and {load_checkpoint(step).step for step in steps_of(path.parent)} == {
            start,
            steps,
        }:
            yield path.parent, config


def steps_of(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints").glob("step-*"))


def at(config: Any, step: Path, channels: int) -> nn.Module:
    """The autoencoder with the averaged weights of a step."""
    autoencoder = build.build_autoencoder(config.autoencoder, channels)
    load_trainable(autoencoder, load_checkpoint(step).tensors["ema"])
    return autoencoder.eval().requires_grad_(False)


def journal(folder: Path) -> dict[int, dict[str, float]]:
    """What was recorded, by step."""
    rows: dict[int, dict[str, float]] = {}
    for row in metrics_log.read_metrics_log(folder / "metrics.jsonl"):
        if "step" in row:
            rows.setdefault(int(row["step"]), {}).update(row)
    return rows


@torch.no_grad()
def scored(
    autoencoder: nn.Module, images: Tensor, net: EfficientNet, reference: tuple[Tensor, Tensor]
) -> dict[str, float]:
    """PSNR, SSIM and rFD of images decoded from a posterior sample, as a second stage sees them."""
    paired, features = Reconstruction(), []
    for rows in torch.arange(len(images)).split(128):
        posterior = autoencoder.posterior(images[rows])
        again = autoencoder.decode_raw(
            posterior.sample(KeyedNoise(0, rows.tolist()).normal("posterior", posterior.mean))
        )
        paired.update(images[rows], again)
        features.append(net(to_uint8(again)))
    # the same number as the metric's `rfd_effnet`, by eigenvalues of a symmetric matrix: minutes less at 1280 features
    return {**paired.compute(), "rfd_effnet": float(frechet(*reference, *gaussian(torch.cat(features))))}


def gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D) of features (N, D) in float64."""
    return features.double().mean(0), features.double().T.cov()


def main() -> None:
    torch.set_num_threads(1)
    net, references, results, curves, strips = EfficientNet(), {}, [], [], {}
    for folder, config in found():
        name = config.data._target_.rsplit(".", 1)[-1]
        model = f"KL f = {config.autoencoder.factor}"
        test = build.build_dataset(config, "test")
        images = test.batch([(0, i) for i in range(min(NUM, len(test)))])["image"]
        if name not in references:  # the very images that are reconstructed: a perfect first stage has distance 0
            references[name] = gaussian(extract(net, images.split(100)))
        rows = journal(folder)
        control = config.training.discriminator_weight == 0
        for step in steps_of(folder):
            at_step = load_checkpoint(step).step
            phase = "before" if at_step == config.training.discriminator_start else "without" if control else "after"
            if control and phase == "before":
                continue  # the same weights as those of the run with a discriminator
            autoencoder = at(config, step, test.shape[0])
            told = {"data": name, "model": model, "phase": phase, "step": at_step, "n": len(images)}
            told["parameters"] = sum(p.numel() for p in autoencoder.parameters())
            told |= scored(autoencoder, images, net, references[name])
            told |= {key: rows[at_step].get(f"train/{key}", "") for key in HEALTH}
            results.append({key: round(value, 5) if isinstance(value, float) else value for key, value in told.items()})
            print(results[-1], flush=True)
            with torch.no_grad():
                strips.setdefault((name, model), {"image": images[:SHOWN]})[phase] = autoencoder.decode(
                    autoencoder.encode(images[:SHOWN])
                )
        if not control:
            curves += [{"data": name, "model": model, "step": step, **plain(row)} for step, row in sorted(rows.items())]
    order = ["CIFAR10", "Emoji"], ["before", "without", "after"]
    results.sort(key=lambda row: (order[0].index(row["data"]), row["model"], order[1].index(row["phase"])))
    write(HERE / "results.csv", results)
    write(HERE / "curves.csv", curves)
    draw(strips, curves, HERE / "figure.png")


def plain(row: dict[str, float]) -> dict[str, float]:
    names = ("train/pixel", *(f"train/{key}" for key in HEALTH), "val/psnr", "val/ssim")
    return {name: round(row[name], 4) if name in row else "" for name in names}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def strip(parts: dict[str, Tensor]) -> Tensor:
    """Images over their reconstructions, (H, W, 3) uint8: above, before the discriminator, after it."""
    rows = [
        torch.cat(list(to_uint8(parts[key].float())), dim=2) for key in ("image", "before", "after") if key in parts
    ]
    return torch.cat(rows, dim=1).permute(1, 2, 0)


def draw(strips: dict[tuple[str, str], dict[str, Tensor]], curves: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(13, 3 + 1.9 * len(strips)))
    layout = figure.add_gridspec(len(strips) + 1, 3, height_ratios=[*[1.9] * len(strips), 2.6], hspace=0.25)
    for row, ((data, model), parts) in enumerate(sorted(strips.items())):
        axis = figure.add_subplot(layout[row, :])
        axis.imshow(strip(parts), interpolation="nearest")
        axis.set_title(f"{data}, {model}: test images, before the discriminator starts, at the end", fontsize=9)
        axis.axis("off")
    panels = {"val/psnr": "PSNR of 64 test images, dB", "train/discriminator_accuracy": "discriminator's accuracy"}
    panels["train/adversarial_weight"] = "adaptive weight x ramp"
    for column, (key, title) in enumerate(panels.items()):
        axis = figure.add_subplot(layout[-1, column])
        for data, model in sorted(strips):
            points = [(c["step"], c[key]) for c in curves if (c["data"], c["model"]) == (data, model) and c[key] != ""]
            axis.plot(*zip(*points, strict=True), label=f"{data} {model}", linewidth=1)
        axis.set_title(title, fontsize=9)
        axis.tick_params(labelsize=7)
        axis.set_xlabel("step", fontsize=7)
        if column == 0:
            axis.legend(fontsize=7)
    figure.savefig(path, dpi=80, bbox_inches="tight")


if __name__ == "__main__":
    main()
