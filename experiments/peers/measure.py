"""Quality at equal CPU minutes: python experiments/peers/measure.py RUN [minutes=2,4,8] [pixels=4] [seeds=0,1]
[num=2000] [rates=...] ...

RUN, a quickstart, lends its first stage, text encoder, data and judge; each side trains a U-Net for so many minutes of
CPU time of its
training loop, one thread, in bfloat16 where the CPU multiplies it: ours and diffusers' in those latents, and for
`pixels` minutes that of
diffusers and of denoising-diffusion-pytorch in pixels (recipes.py).  A peer is trained with the first seed at each of
the rates, with the
others at those that were best; of these, and of raw and averaged weights, the best on other noise (tried.csv) is
scored.  All are drawn
alike.  A row of results.csv a model that was scored, and one of reconstructions; started again it goes on with what is
missing.
"""

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import recipes
import told
import torch
from recipes import WARMUP, DenoisingDiffusion, Diffusers, Recipe, Space

from ldm.io import atomic
from ldm.report import rows

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TABLE, TRIED = HERE / "results.csv", HERE / "tried.csv"
KEYS = ("minutes", "pixels", "seeds", "num", "rates")  # of this command; what else is typed goes to train.py
SCALES = (3.0, 5.0)  # of guidance in its interval; the better on other seeds is taken
DEV, DEV_SEED, SEED, STEPS = 500, 6_000_000, 5_000_000, 16


def main(run: str, *words: str) -> None:
    torch.set_num_threads(1)
    said = dict(word.split("=", 1) for word in words)
    more = [word for word in words if word.partition("=")[0] not in KEYS]
    minutes = [float(one) for one in said.get("minutes", "2,4,8").split(",")]
    rates = [float(one) for one in said.get("rates", "1e-4,5e-4,2e-3").split(",")]
    shared = Shared(Path(run).absolute(), int(said.get("num", 2000)), more)
    if not known({"who": "reconstructions"}, TABLE):
        keep({"who": "reconstructions", "fd_fashion": shared.reconstructed()})
    peers = [(recipe, minutes, shared.scored) for recipe in shared.latent()]
    if pixels := [float(one) for one in said.get("pixels", "4").split(",") if one]:
        peers += [(recipe, pixels, shared.alone) for recipe in shared.pixels()]
    best = {recipe.name: rates for recipe, *_ in peers}
    for seed in map(int, said.get("seeds", "0,1").split(",")):
        ours(shared, minutes, seed)
        for recipe, marks, score in peers:
            best[recipe.name] = theirs(recipe, shared, marks, seed, best[recipe.name], score)
    told.write(rows.read(TABLE), HERE)


class Shared:
    """What all sides have: data, captions, first stage, the encoder of the captions, the judge, and how a model is
    scored.
    """

    def __init__(self, run: Path, num: int, more: Sequence[str] = ()):
        from ldm.checkpoint.load import load_model, load_run_config
        from ldm.config import build
        from ldm.evaluation import evaluator
        from ldm.evaluation.evaluate import CaptionSource

        config = load_run_config(run)
        self.run, self.num, self.more, self.model = run, num, more, load_model(run)
        self.data = build.build_dataset(config)
        make, _ = evaluator.make_scorer(config, config.metrics)
        self.config, self.score, self.told = config, make(), CaptionSource(self.data.classes, self.data.captions)

    def latent(self) -> Iterator[Recipe]:
        """The peers in our latents, of our size."""
        space = Space(self.model.autoencoder, self.data)
        yield Diffusers("diffusers", space, self.model.conditioner, self.model.size, (48, 96))

    def pixels(self) -> Iterator[Recipe]:
        """The peers in pixels, of about our size."""
        from ldm.autoencoder.identity import Identity

        space = Space(Identity(self.data.pixels([0]).shape[1]), self.data)
        yield Diffusers("diffusers, pixels", space, self.model.conditioner, self.model.size, (32, 64, 96))
        yield DenoisingDiffusion(space, len(self.data.classes), self.model.size)

    def alone(self, model: Any, scale: float = 1.0) -> dict[str, float]:
        """The numbers of a model, without guidance or at a scale."""
        found = self.measured(model, scale, self.num, SEED)
        return {name: found[name] for name in ("fd_fashion", "recall", "accuracy")}

    def scored(self, model: Any) -> dict[str, float]:
        """The numbers of a model without guidance and with it, the scale chosen on other seeds."""
        tried = {scale: self.measured(model, scale, DEV, DEV_SEED)["fd_fashion"] for scale in SCALES}
        best = min(tried, key=tried.__getitem__)
        guided = {f"guided_{name}": value for name, value in self.alone(model, best).items()}
        return {**self.alone(model), "scale": best, **guided}

    def reconstructed(self) -> float:
        """The distance of as many held-out images, encoded and decoded: what nobody trained in these latents gets
        below.
        """
        from ldm.config import build
        from ldm.recipes.autoencoder import evaluate_reconstruction

        test = build.build_dataset(self.config, "test")
        return evaluate_reconstruction(self.model.autoencoder, test, self.score, self.num)["rfd_fashion"]

    def measured(self, model: Any, scale: float, num: int, seed: int) -> dict[str, float]:
        from ldm.diffusion import constraint, grids, sampler
        from ldm.diffusion.guidance import cfg
        from ldm.evaluation.evaluate import compute_scores
        from ldm.sampling.generate import generate_samples

        guidance = partial(cfg, scale=scale, interval=(0.2, 0.75)) if scale != 1 else cfg
        if model.autoencoder.factor == 1:  # pixels, which both peers hold to their range
            guidance = partial(constraint.constrained_guidance, constraint=constraint.clip)
        ts = grids.trailing(model.denoiser.schedule, STEPS)
        return compute_scores(
            self.score,
            generate_samples(model, self.told.batch, range(num), seed, 250, ts, sampler.dpmpp_2m, guidance, "auto"),
        )


def known(row: Mapping[str, Any], table: Path) -> bool:
    """Whether the csv has a row that says this."""
    said = {name: rows.format_cell(value) for name, value in row.items()}
    return any(said.items() <= one.items() for one in rows.read(table))


def keep(row: Mapping[str, Any]) -> None:
    print("  ".join(f"{name} {rows.format_cell(value)}" for name, value in row.items()), flush=True)
    rows.append(TABLE, row)


def ours(shared: Shared, minutes: Sequence[float], seed: int) -> None:
    """`python train.py` of as many steps as fit in the minutes, which the CPU time between two short trainings tells."""
    from ldm.checkpoint.load import load_model

    wanted = [{"who": "ours", "minutes": one, "seed": seed} for one in minutes]
    if all(known(row, TABLE) for row in wanted):
        return
    shutil.rmtree(shared.run.parent / "peers" / "timed", ignore_errors=True)
    trained(shared, 10, seed, "timed")  # the first has more to read
    (few, short), (many, longer) = ((steps, trained(shared, steps, seed, "timed")[1]) for steps in (20, 220))
    each = (longer - short) / (many - few)
    for row in wanted:
        if not known(row, TABLE):
            steps = round(60 * row["minutes"] / each)
            run, _ = trained(shared, steps, seed, "ours")
            model = load_model(run)
            keep(
                {
                    **row,
                    "weights": "ema",
                    "steps": steps,
                    "parameters": size(model.denoiser.net),
                    **shared.scored(model),
                }
            )


def trained(shared: Shared, steps: int, seed: int, name: str) -> tuple[Path, float]:
    """A run of the quickstart's recipe of so many steps, and the CPU seconds that its command took."""
    import resource

    place = shared.run.parent / "peers" / name / f"{steps}-s{seed}"
    words = (
        f"training.steps={steps}",
        f"seed={seed}",
        f"runs={place}",
        "metrics=none",
        "trainer=cpu",
        "trainer.precision=auto",
    )
    often = (
        f"training.sample_every={steps}",
        f"training.save_every={steps}",
        f"training.lr_schedule.warmup={min(WARMUP, steps // 4)}",
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *shared.more, *words, *often], check=True, stdout=subprocess.DEVNULL
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    (folder,) = (file.parent for file in place.glob("*/config.yaml"))
    return folder, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def theirs(
    recipe: Recipe,
    shared: Shared,
    minutes: Sequence[float],
    seed: int,
    rates: Sequence[float],
    score: Callable[[Any], dict[str, float]],
) -> list[float]:
    """A peer's recipe at each rate, its weights kept at each of the minutes, raw and averaged, and the best scored;
    returns its rates.
    """
    place = shared.run.parent / "peers" / f"{recipe.name.replace(', ', '-')}-s{seed}"
    for rate in rates:
        wanted = [{"who": recipe.name, "minutes": one, "seed": seed, "rate": rate} for one in minutes]
        if all(known({**row, "weights": "ema"}, TRIED) for row in wanted):
            continue
        for row, (steps, weights) in zip(
            wanted, recipes.trained(recipe, rate, [60 * one for one in minutes], seed), strict=True
        ):
            for kind, state in weights.items():
                file = place / f"{rate:g}-{row['minutes']:g}-{kind}.safetensors"
                atomic.write_tensors(file, state)
                found = shared.measured(recipe.model(state), 1.0, DEV, DEV_SEED)
                rows.append(
                    TRIED,
                    {**row, "weights": kind, "steps": steps, "fd_fashion": found["fd_fashion"], "file": file.name},
                )
    won = []
    for one in minutes:
        row = {"who": recipe.name, "minutes": one, "seed": seed}
        said = {name: rows.format_cell(value) for name, value in row.items()}
        best = min(
            (some for some in rows.read(TRIED) if said.items() <= some.items()),
            key=lambda some: float(some["fd_fashion"]),
        )
        won.append(float(best["rate"]))
        if not known(row, TABLE):
            model = recipe.model(atomic.read_tensors(place / best["file"]))
            more = {name: best[name] for name in ("rate", "weights", "steps")}
            keep({**row, **more, "parameters": size(model.denoiser.net), **score(model)})
    return sorted(set(won))


def size(network: torch.nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


if __name__ == "__main__":
    main(*sys.argv[1:])
