"""A VAE, a GAN and diffusion at equal CPU time: python experiments/families/measure.py RUN [seeds=0,1,2]
[steps=300,700] [num=2000] ...

RUN, a quickstart, lends data and judge.  Diffusion is the quickstart's recipe in so many steps of its first stage and
of its denoiser; what
its command took in CPU seconds, start included, is what the VAE and the GAN, class-conditional both, then train for.  A
row of results.csv
a family and seed; started again it goes on with what is missing. What else is typed goes to train.py.
"""

import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from ldm.io import atomic
from ldm.report import rows, table

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TABLE = HERE / "results.csv"
NAMES = ("fd_fashion", "precision", "recall", "accuracy")
BATCH, DIM, WIDTH, CLASSES = 128, 64, 48, 10


def main(run: str, *words: str) -> None:
    torch.set_num_threads(1)
    said = {"seeds": "0,1,2", "steps": "300,700", "num": "2000"}
    more = [word for word in words if word.partition("=")[0] not in said]
    said |= dict(word.split("=", 1) for word in words)
    from ldm.checkpoint.load import load_run_config
    from ldm.config import build
    from ldm.evaluation import evaluator

    config = load_run_config(Path(run))
    make, _ = evaluator.make_scorer(config, config.metrics)
    score, data = make(), build.build_dataset(config)
    batch = data.batch([(0, i) for i in range(len(data))])
    images, labels = batch["image"], batch["label"]
    first, second = map(int, said["steps"].split(","))
    for seed in map(int, said["seeds"].split(",")):
        budget = diffusion(Path(run).absolute(), first, second, seed, score, int(said["num"]), more)
        for name, family in (("VAE", vae), ("GAN", gan)):
            if known(name, seed) is None:
                torch.manual_seed(seed)
                draw, steps = family(images, labels, budget)
                keep(
                    {
                        "family": name,
                        "seed": seed,
                        "seconds": budget,
                        "steps": steps,
                        **measured(score, draw, int(said["num"])),
                    }
                )
    readme = HERE / "README.md"
    atomic.write_text(readme, table.replace_block(readme.read_text(), "table", "\n".join(lines(rows.read(TABLE)))))


def lines(found: Sequence[Mapping[str, str]]) -> Iterator[str]:
    """Markdown: each family's steps and numbers, their mean and, in brackets, their spread over seeds."""
    yield f"| family | CPU seconds | steps | {' | '.join(NAMES)} | seeds |"
    yield "|---|---|---|" + "---|" * (len(NAMES) + 1)
    for family in dict.fromkeys(row["family"] for row in found):
        mine = [row for row in found if row["family"] == family]
        values = {name: [float(row[name]) for row in mine] for name in (*NAMES, "seconds", "steps")}
        cells = [f"{mean(values[name]):.3g} ({min(values[name]):.3g} to {max(values[name]):.3g})" for name in NAMES]
        spent = " | ".join(f"{mean(values[name]):,.0f}" for name in ("seconds", "steps"))
        yield f"| {family} | {spent} | {' | '.join(cells)} | {len(mine)} |"


def known(family: str, seed: int) -> dict[str, str] | None:
    """The row of results.csv, if there is one."""
    return next((row for row in rows.read(TABLE) if (row["family"], row["seed"]) == (family, str(seed))), None)


def keep(row: dict[str, Any]) -> None:
    print("  ".join(f"{name} {rows.format_cell(value)}" for name, value in row.items()), flush=True)
    rows.append(TABLE, row)


@torch.inference_mode()
def measured(score: Any, draw: Callable[[Tensor], Tensor], num: int) -> dict[str, float]:
    """The judge's numbers of `num` images, classes in turn."""
    score.reset()
    for part in torch.arange(num).split(250):
        label = part % CLASSES
        score.update(draw(label), label)
    return numbers(score)


def numbers(score: Any) -> dict[str, float]:
    found = score.compute()
    return {name: found[name] for name in NAMES}


def diffusion(run: Path, first: int, second: int, seed: int, score: Any, num: int, more: Sequence[str] = ()) -> float:
    """Train and score the quickstart's recipe; returns the CPU seconds that it took, both stages from nothing."""
    if (row := known("diffusion", seed)) is not None:
        return float(row["seconds"])
    from functools import partial

    from ldm.checkpoint.load import load_data_card, load_model
    from ldm.diffusion import grids, sampler
    from ldm.diffusion.guidance import cfg
    from ldm.evaluation.evaluate import CaptionSource
    from ldm.sampling.generate import generate_samples

    place = run.parent / "families" / f"s{seed}"
    words = (
        f"first_stage.steps={first}",
        f"first_stage.seed={seed}",
        f"training.steps={second}",
        f"seed={seed}",
        "metrics=none",
    )
    often = (
        f"training.sample_every={second}",
        f"training.save_every={second}",
        f"first_stage.sample_every={first}",
        f"runs={place}",
    )
    start = first * 4 // 5  # of the discriminator, as in the whole recipe
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        *more,
        *words,
        *often,
        f"first_stage.discriminator_start={start}",
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    (folder,) = (file.parent for file in place.glob("*/config.yaml"))
    model, card = load_model(folder), load_data_card(folder)
    ts, guidance = grids.trailing(model.denoiser.schedule, 12), partial(cfg, scale=4.0, interval=(0.2, 0.75))
    score.reset()
    told = CaptionSource(card.classes, card.captions).batch
    for image, batch in generate_samples(model, told, range(num), 0, 250, ts, sampler.dpmpp_2m, guidance, "32"):
        score.update(image, batch["label"])
    keep({"family": "diffusion", "seed": seed, "seconds": round(spent, 1), "steps": second, **numbers(score)})
    return spent


def up(inside: int, outside: int) -> list[nn.Module]:
    return [nn.ConvTranspose2d(inside, outside, 4, 2, 1, bias=False), nn.BatchNorm2d(outside), nn.ReLU()]


class Generator(nn.Module):
    """(z (B, DIM), class (B,)) -> image (B, 1, 32, 32): DCGAN's (Radford et al. 2016), the class beside z."""

    def __init__(self) -> None:
        super().__init__()
        self.label = nn.Embedding(CLASSES, DIM)
        self.stem = nn.Linear(2 * DIM, 4 * WIDTH * 16)
        self.body = nn.Sequential(
            nn.BatchNorm2d(4 * WIDTH),
            nn.ReLU(),
            *up(4 * WIDTH, 2 * WIDTH),
            *up(2 * WIDTH, WIDTH),
            nn.ConvTranspose2d(WIDTH, 1, 4, 2, 1),
        )

    def forward(self, z: Tensor, label: Tensor) -> Tensor:
        h = self.stem(torch.cat([z, self.label(label)], 1))
        return self.body(h.view(len(z), -1, 4, 4)).tanh()


def down(inside: int, outside: int, wrap: Callable[[nn.Module], nn.Module] = lambda layer: layer) -> list[nn.Module]:
    return [wrap(nn.Conv2d(inside, outside, 4, 2, 1)), nn.LeakyReLU(0.2)]


class Seen(nn.Module):
    """(image (B, 1, 32, 32), class (B,)) -> `outputs` numbers, told the class as a plane beside the image."""

    def __init__(self, outputs: int):
        super().__init__()
        self.label = nn.Embedding(CLASSES, 32 * 32)
        layers = [*down(2, WIDTH), *down(WIDTH, 2 * WIDTH), *down(2 * WIDTH, 4 * WIDTH)]
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * WIDTH * 16, outputs))

    def forward(self, image: Tensor, label: Tensor) -> Tensor:
        return self.body(torch.cat([image, self.label(label).view(-1, 1, 32, 32)], 1))


class Critic(nn.Module):
    """(image (B, 1, 32, 32), class (B,)) -> (B,): how real it looks, as that class (Miyato & Koyama 2018, projection)."""

    def __init__(self) -> None:
        super().__init__()
        layers = [
            *down(1, WIDTH, spectral_norm),
            *down(WIDTH, 2 * WIDTH, spectral_norm),
            *down(2 * WIDTH, 4 * WIDTH, spectral_norm),
        ]
        self.body = nn.Sequential(*layers)
        self.out, self.label = spectral_norm(nn.Linear(4 * WIDTH, 1)), spectral_norm(nn.Embedding(CLASSES, 4 * WIDTH))

    def forward(self, image: Tensor, label: Tensor) -> Tensor:
        seen = self.body(image).float().sum((2, 3))
        return self.out(seen)[:, 0] + (self.label(label) * seen).sum(1)


def some(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    at = torch.randint(len(images), (BATCH,))
    return images[at], labels[at]


def vae(images: Tensor, labels: Tensor, budget: float) -> tuple[Callable[[Tensor], Tensor], int]:
    """A class-conditional VAE (Kingma & Welling 2014) with a Gaussian of deviation 0.3 for pixels; drawn from the
    prior, the mean shown.
    """
    encoder, decoder = Seen(2 * DIM), Generator()
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], 1e-3)

    def step() -> None:
        image, label = some(images, labels)
        mean, log_var = encoder(image, label).float().chunk(2, 1)
        shown = decoder(mean + (log_var / 2).exp() * torch.randn_like(mean), label).float()
        divergence = 0.5 * (mean.square() + log_var.exp() - 1 - log_var).sum(1).mean()
        loss = (shown - image).square().flatten(1).sum(1).mean() / (2 * 0.3**2) + divergence
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    steps = until(budget, step)
    decoder.eval()
    return lambda label: decoder(torch.randn(len(label), DIM), label), steps


def gan(images: Tensor, labels: Tensor, budget: float) -> tuple[Callable[[Tensor], Tensor], int]:
    """DCGAN with a hinge loss and spectral normalisation (Miyato et al. 2018)."""
    generator, critic = Generator(), Critic()
    of_generator = torch.optim.Adam(generator.parameters(), 1e-3, (0.5, 0.9))
    of_critic = torch.optim.Adam(critic.parameters(), 1e-3, (0.5, 0.9))

    def step() -> None:
        image, label = some(images, labels)
        with torch.no_grad():
            made = generator(torch.randn(BATCH, DIM), label)
        (F.relu(1 - critic(image, label)).mean() + F.relu(1 + critic(made, label)).mean()).backward()
        of_critic.step()
        label = torch.randint(CLASSES, (BATCH,))
        (-critic(generator(torch.randn(BATCH, DIM), label), label).mean()).backward()
        of_generator.step()
        of_generator.zero_grad()
        of_critic.zero_grad()

    steps = until(budget, step)
    generator.eval()
    return lambda label: generator(torch.randn(len(label), DIM), label), steps


def until(budget: float, step: Callable[[], None]) -> int:
    """Steps, in the precision that the quickstart trains in, until the budget of CPU seconds is spent; returns how
    many.
    """
    from ldm.devices import resolve_precision

    since, steps, low = time.process_time(), 0, resolve_precision("auto") == "bf16"
    while time.process_time() - since < budget:
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            step()
        steps += 1
    return steps


if __name__ == "__main__":
    main(*sys.argv[1:])
