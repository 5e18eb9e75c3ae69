"""Few images of another domain: training from init= of a run of the first domain, against training from scratch.

python experiments/domain_adaptation/measure.py [work=runs/domain_adaptation]

Trains what is missing in the folder `work`, measures the checkpoints, a row of results.csv each, and draws figure.png;
started again it goes on with what is missing.
"""

import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ldm import plotting
from ldm.checkpoint.load import load_model
from ldm.data.latents import batches
from ldm.data.synthetic import SHAPES, Synthetic
from ldm.diffusion.grids import trailing
from ldm.diffusion.guidance import cfg
from ldm.diffusion.sampler import dpmpp_2m
from ldm.io import atomic
from ldm.io.images import save_png, to_uint8
from ldm.metrics.distribution import frechet
from ldm.metrics.features import extract
from ldm.metrics.interval import paired
from ldm.metrics.judge import FashionNet
from ldm.report import rows, table
from ldm.sampling.tasks import sample

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TABLE = HERE / "results.csv"
COUNT = 100  # training images of the second domain
STEPS = (50, 100, 200, 300)  # of which checkpoints are measured
SEEDS = (0, 1, 2)
ARMS = {"adapted": "base", "scratch": "untrained"}  # arm -> the run of init=
NUM, JUDGED = 500, 2000  # samples of a row, test images
COMMON = ("metrics=none", "trainer=cpu", "training.sample_every=1000", "training.log_every=50")
FIRST_STAGE = ("first_stage.steps=300", "first_stage.batch_size=64", "first_stage.discriminator_start=1000")
BASES = {"base": 600, "untrained": 1}  # run on Fashion-MNIST -> steps; the second for its first stage alone
COLOURS = {"adapted": plotting.BLUE, "scratch": plotting.RED}


def main(*words: str) -> None:
    torch.set_num_threads(1)
    work = ROOT / dict(word.split("=", 1) for word in words).get("work", "runs/domain_adaptation")
    measure(work)
    draw_figure(rows.read(TABLE), work)
    readme, shown = HERE / "README.md", ["", "![Fréchet distance over the steps, and samples](figure.png)"]
    lines = "\n".join([*table_lines(rows.read(TABLE)), *shown])
    atomic.write_text(readme, table.replace_block(readme.read_text(), "table", lines))


def measure(work: Path) -> None:
    """Train and measure what results.csv has no row of."""
    bases = {}
    for name, steps in BASES.items():
        words = ("data=fashion_mnist", f"training.steps={steps}", "training.batch_size=64", *FIRST_STAGE)
        bases[name] = train(work / name, *words)
    judge = Judge(work / "judge.safetensors")
    if not is_measured("first stage", 0, 0):
        model, test = load_model(bases["base"]), Synthetic("test", num=NUM)
        with torch.no_grad():
            image = torch.cat([model.decode(model.encode(part)) for part in test.pixels(range(NUM)).split(100)])
        append("first stage", 0, 0, judge.scores(image))
    for arm, base in ARMS.items():
        if not is_measured(arm, 0, 0):  # before the first step, the same for all seeds
            append(arm, 0, 0, judge.scores(samples(load_model(bases[base]))))
    for seed in SEEDS:
        for arm, base in ARMS.items():
            if all(is_measured(arm, seed, step) for step in STEPS):
                continue
            words = ("data=synthetic", f"data.num={COUNT}", f"init={bases[base]}", f"seed={seed}")
            words += (f"training.steps={STEPS[-1]}", "training.batch_size=32", "training.save_every=50", "keep_last=10")
            run = train(work / f"{arm}-{seed}", *words, "training.lr_schedule.warmup=20")
            for step in STEPS:
                if not is_measured(arm, seed, step):
                    image = samples(load_model(run / f"checkpoints/step-{step:08d}"))
                    if seed == SEEDS[0]:
                        shown = plotting.concatenate(image[:10], 10, 2)
                        save_png(work / f"{arm}-{step}.png", to_uint8(shown[None])[0])
                    append(arm, seed, step, judge.scores(image))


def train(folder: Path, *words: str) -> Path:
    """Run train.py unless it is done; return the folder of its run, the only one in `folder`."""
    line = [sys.executable, str(ROOT / "train.py"), *COMMON, *words, f"runs={folder}"]
    subprocess.run(line, cwd=ROOT, check=True)
    (run,) = (path for path in folder.iterdir() if path.is_dir())
    return run


def samples(model: Any) -> Tensor:
    """Draw images (NUM, 1, 32, 32) in [-1, 1]; image i is of class i mod 10 and has the seed i."""
    ts, parts = trailing(model.denoiser.schedule, 10), []
    for start in range(0, NUM, 100):
        index = list(range(start, min(start + 100, NUM)))
        batch = {
            "index": index,
            "label": torch.tensor(index) % len(SHAPES),
            "caption": [SHAPES[i % len(SHAPES)] for i in index],
        }
        parts.append(sample(model, batch, index, ts, dpmpp_2m, partial(cfg, scale=1.0)))
    return torch.cat(parts)


class Judge:
    """A classifier of the shapes, trained on 5,000 images that no run has; it is in no loss."""

    def __init__(self, path: Path):
        self.net, data = FashionNet(), Synthetic("test", num=5000 + JUDGED)  # another seed than the training images
        if path.is_file():
            self.net.load_state_dict(atomic.read_tensors(path))
        else:
            self.train(data)
            atomic.write_tensors(path, self.net.state_dict())
        self.net.eval()
        self.real = extract(self.net, [data.pixels(range(5000, 5000 + JUDGED))])

    def train(self, data: Any, steps: int = 300) -> None:
        torch.manual_seed(0)
        optimizer = torch.optim.AdamW(self.net.parameters(), lr=3e-3, weight_decay=0.05)
        for _ in range(steps):
            index = torch.randint(5000, (128,))
            logits = self.net.logits(to_uint8(data.pixels(index)))
            F.cross_entropy(logits, data.labels[index]).backward()
            optimizer.step()
            optimizer.zero_grad()
        self.net.eval()
        with torch.no_grad():
            train = (to_uint8(image) for image in batches(data))
            self.net.standardise(torch.cat([self.net.penultimate(image) for image in train]))

    @torch.no_grad()
    def scores(self, image: Tensor) -> dict[str, float]:
        """Return the Fréchet distance to real images, and the share recognised as class i mod 10."""
        distance = frechet(*gaussian(extract(self.net, image.split(100))), *gaussian(self.real))
        right = self.net.logits(to_uint8(image)).argmax(1) == torch.arange(len(image)) % len(SHAPES)
        return {"fd_shapes": float(distance), "accuracy": right.float().mean().item()}


def gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean (D,) and covariance (D, D) of features (N, D) in float64."""
    return features.double().mean(0), features.double().T.cov()


def is_measured(arm: str, seed: int, step: int) -> bool:
    key = {"arm": arm, "seed": str(seed), "step": str(step)}
    return any(key.items() <= row.items() for row in rows.read(TABLE))


def append(arm: str, seed: int, step: int, scores: Mapping[str, float]) -> None:
    row = {"arm": arm, "seed": seed, "step": step, "images": COUNT, "n": NUM, **scores}
    print("  ".join(f"{name} {rows.format_cell(value)}" for name, value in row.items()), flush=True)
    rows.append(TABLE, row)


def values(results: Sequence[Mapping[str, str]], arm: str, step: int, name: str) -> dict[str, float]:
    """Return seed -> value of an arm's rows at a step."""
    return {row["seed"]: float(row[name]) for row in results if (row["arm"], row["step"]) == (arm, str(step))}


def table_lines(results: Sequence[Mapping[str, str]]) -> Iterator[str]:
    """Markdown: both arms at each step, and their difference, paired by seed."""
    yield "| steps | fd_shapes, adapted | scratch | difference | 95% interval | recognised, adapted | scratch |"
    yield "|---|---|---|---|---|---|---|"
    for step in STEPS:
        ours, theirs = (values(results, arm, step, "fd_shapes") for arm in ARMS)
        differences = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
        if len(differences) > 1:
            low, high = paired(differences)
            shares = (f"{fmean(values(results, arm, step, 'accuracy').values()):.1%}" for arm in ARMS)
            means = f"{fmean(ours.values()):.1f} | {fmean(theirs.values()):.1f} | {fmean(differences):+.1f}"
            yield f"| {step} | {means} | {low:+.1f} to {high:+.1f} | {' | '.join(shares)} |"


def draw_figure(results: Sequence[Mapping[str, str]], work: Path) -> None:
    """Draw the distances over the steps, and samples of the first seed, into figure.png."""
    from ldm.data.decode import open_image, to_tensor

    figure = plotting.canvas(860, 330)
    axes = plotting.panel(figure, 50, 24, 330, 256, "Fréchet distance to real shapes", "steps on 100 images")
    for arm in ARMS:
        for seed in SEEDS:
            line = {step: values(results, arm, step, "fd_shapes").get(str(seed)) for step in STEPS}
            label, start = arm if seed == SEEDS[0] else None, values(results, arm, 0, "fd_shapes")["0"]
            axes.plot([0, *line], [start, *line.values()], color=COLOURS[arm], linewidth=1, marker=".", label=label)
    floor = values(results, "first stage", 0, "fd_shapes")
    if floor:
        axes.axhline(floor["0"], color=plotting.SOFT, linewidth=0.8, linestyle=":", label="first stage alone")
    axes.set_yscale("log")
    plotting.legend(axes)
    top = 24
    for step in STEPS:
        for arm in ARMS:
            with open_image(work / f"{arm}-{step}.png") as file:
                pixels = to_tensor(file, 1).float() / 127.5 - 1
            plotting.words(figure, f"{arm}, {step}", 492, top + 16, COLOURS[arm], 10, ha="right", va="center")
            plotting.image(figure, pixels, 500, top)
            top += 36
    figure.savefig(HERE / "figure.png", metadata={"Software": None})


if __name__ == "__main__":
    main(*sys.argv[1:])
