"""Does a classifier learn more with drawn images beside real ones?

python experiments/augmentation/measure.py RUN[,RUN] [drawn=5000] [steps=600]

Trains the judge's network on a few real images of each class, alone and with what a quickstart drew, whose label is
what was asked for; the
same number of steps for all. A row of results.csv an arm and seed, and the README's table; started again it goes on
with what is missing.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from math import nan
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm.io import atomic
from ldm.metrics.interval import paired
from ldm.report import rows, table

HERE = Path(__file__).parent
TABLE = HERE / "results.csv"
REAL = (200, 1000, 60000)  # real images, a tenth of each class
BATCH, SEED = 128, 7_000_000


def main(runs: str, *words: str) -> None:
    torch.set_num_threads(1)
    said = {"drawn": "5000", "steps": "600", **dict(word.split("=", 1) for word in words)}
    for run in runs.split(","):
        one(Path(run).absolute(), int(said["drawn"]), int(said["steps"]))
    readme = HERE / "README.md"
    atomic.write_text(readme, table.replace_block(readme.read_text(), "table", "\n".join(lines(rows.read(TABLE)))))


def lines(found: Sequence[Mapping[str, str]]) -> Iterator[str]:
    """Markdown: for each number of real images the accuracy alone and with drawn ones, by seed, and the difference,
    paired by seed.
    """
    yield "| real images | alone, by seed | with drawn images | difference | 95% interval |"
    yield "|---|---|---|---|---|"
    for real in dict.fromkeys(row["real"] for row in found):
        alone, more = (
            {
                row["seed"]: float(row["accuracy"])
                for row in found
                if row["real"] == real and (row["drawn"] == "0") == none
            }
            for none in (True, False)
        )
        differences = [more[seed] - alone[seed] for seed in alone if seed in more]
        if differences:
            low, high = paired(differences) if len(differences) > 1 else (nan, nan)
            cells = (", ".join(f"{value:.1%}" for value in side.values()) for side in (alone, more))
            difference = sum(differences) / len(differences)
            yield f"| {int(real):,} | {' | '.join(cells)} | {100 * difference:+.1f} points | {100 * low:+.1f} to {100 * high:+.1f} |"


def one(run: Path, count: int, steps: int) -> None:
    """Every arm of one quickstart, which gives its seed."""
    from ldm.checkpoint.load import load_run_config
    from ldm.config import build

    config = load_run_config(run)
    seed = int(config.seed)
    wanted = [{"seed": seed, "real": real, "drawn": drawn} for real in REAL for drawn in (0, count)]
    missing = [row for row in wanted if not known(row)]
    if not missing:
        return
    train, test = build.build_dataset(config), build.build_dataset(config, "test")
    images, labels = whole(train)
    held, truth = whole(test)
    made, asked = drawn_by(run, count)
    for row in missing:
        chosen = balanced(labels, row["real"], seed)
        given, label = images[chosen], labels[chosen]
        if row["drawn"]:
            given, label = torch.cat([given, made]), torch.cat([label, asked])
        keep({**row, "steps": steps, "accuracy": learned(given, label, held, truth, steps, seed), "test": len(held)})


def known(row: dict[str, Any]) -> bool:
    said = {name: rows.format_cell(value) for name, value in row.items()}
    return any(said.items() <= one.items() for one in rows.read(TABLE))


def keep(row: dict[str, Any]) -> None:
    print("  ".join(f"{name} {rows.format_cell(value)}" for name, value in row.items()), flush=True)
    rows.append(TABLE, row)


def whole(data: Any) -> tuple[Tensor, Tensor]:
    """All images (N, 1, H, W) uint8 and labels (N,)."""
    from ldm.io.images import to_uint8

    batch = data.batch([(0, i) for i in range(len(data))])
    return to_uint8(batch["image"]), batch["label"]


def drawn_by(run: Path, count: int) -> tuple[Tensor, Tensor]:
    """Images and the classes that were asked for, as the quickstart's evaluation draws them, from other seeds."""
    from ldm.checkpoint.load import load_data_card, load_model
    from ldm.diffusion import grids, sampler
    from ldm.diffusion.guidance import cfg
    from ldm.evaluation.evaluate import CaptionSource
    from ldm.io.images import to_uint8
    from ldm.sampling.generate import generate_samples

    model, card = load_model(run), load_data_card(run)
    ts = grids.trailing(model.denoiser.schedule, 12)
    guidance = partial(cfg, scale=4.0, interval=(0.2, 0.75))
    told = CaptionSource(card.classes, card.captions).batch
    found = [
        (to_uint8(image), batch["label"])
        for image, batch in generate_samples(
            model, told, range(count), SEED, 250, ts, sampler.dpmpp_2m, guidance, "auto"
        )
    ]
    return torch.cat([image for image, _ in found]), torch.cat([label for _, label in found])


def balanced(labels: Tensor, count: int, seed: int) -> Tensor:
    """Places of `count` rows, as many of each class."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    classes = int(labels.max()) + 1
    return torch.cat([order[labels[order] == k][: count // classes] for k in range(classes)])


def learned(images: Tensor, labels: Tensor, held: Tensor, truth: Tensor, steps: int, seed: int) -> float:
    """Accuracy on held-out images of the judge's network after so many steps."""
    from ldm.metrics.judge import FashionNet

    torch.manual_seed(seed)
    net = FashionNet()
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(len(images), (BATCH,), generator=generator)
        F.cross_entropy(net.logits(images[rows]), labels[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    net.eval()
    with torch.inference_mode():
        right = sum(
            int((net.logits(a).argmax(1) == b).sum()) for a, b in zip(held.split(500), truth.split(500), strict=True)
        )
    return right / len(held)


if __name__ == "__main__":
    main(*sys.argv[1:])
