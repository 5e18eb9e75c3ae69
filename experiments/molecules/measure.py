"""Train, sample and score molecules: python experiments/molecules/measure.py [runs=runs/molecules] [short=4000]
[long=20000] [num=10000] [key=value ...]

First the weight of the KL penalty is chosen: for each, a first stage and a denoiser of `short` steps, by the FCD of
`num` molecules.  With that weight it trains SMILES in place of SELFIES, no first stage, and captions for as long, and
SELFIES for `long` steps, from which the analogues of leads are sampled too.  Each row of results.csv is written as soon
as it is known, and what is there is not computed again: started again, it goes on.  Other words go to train.py.
Then figure.png, samples.png and analogues.png.
"""

import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm import plotting
from ldm.checkpoint.load import load_model, load_run_config
from ldm.config import build
from ldm.data.moses import read_moses
from ldm.diffusion.grids import trailing
from ldm.diffusion.guidance import cfg
from ldm.diffusion.sampler import dpmpp_2m
from ldm.io import atomic
from ldm.io.images import save_png
from ldm.io.molecules import VOCABULARIES, canonical_smiles, facts_of, is_molecule, read_molecule, to_sample, to_tokens
from ldm.io.molsets import filter_patterns, moses, reference_statistics
from ldm.media.molecule import draw, sheet
from ldm.metrics.molecules import Reference, fact_scores, fingerprints, molecule_scores, tanimoto, unpack
from ldm.report import rows
from ldm.sampling.tasks import generate, img2img, sample

HERE = Path(__file__).parent
TABLE = HERE / "results.csv"
TRAIN = HERE.parents[1] / "train.py"
KL_WEIGHTS = (1.0e-3, 1.0e-2, 5.0e-2, 2.0e-1)
STEPS, BATCH = 25, 250  # of the sampler; samples at a time
SCALES = (1.0, 1.5, 2.0)  # of guidance, of the long run
NOISE = (0.1, 0.3)  # deviations of a latent, that a first stage should survive
LEADS, EACH, STRENGTHS = 6, 20, (0.2, 0.4, 0.6, 0.8)
FRAMES = 7  # of an interpolation
SHOWN = 24  # molecules of samples.png, the first


def main(*words: str) -> None:
    torch.set_num_threads(1)
    options = {"runs": "runs/molecules", "short": "4000", "long": "20000", "num": "10000"}
    more = [word for word in words if word.partition("=")[0] not in options]
    options |= dict(word.split("=", 1) for word in words if word not in more)
    runs, short, long, num = Path(options["runs"]), int(options["short"]), int(options["long"]), int(options["num"])

    def train(variant: str, steps: int, *overrides: str) -> Path:
        return trained(runs / variant.replace(" ", "_"), f"training.steps={steps}", *overrides, *more)

    for weight in KL_WEIGHTS:
        run = train(f"kl {weight:g}", short, f"first_stage.loss.kl_weight={weight}")
        first_stage_row(run, weight)
        sample_row(run, f"kl {weight:g}", short, num)
    best = min(KL_WEIGHTS, key=lambda weight: float(known(variant=f"kl {weight:g}", guidance=1.0)["fcd"]))
    kl = f"first_stage.loss.kl_weight={best}"
    for variant, overrides in {
        "SMILES": (kl, "data.representation=smiles"),
        "no first stage": ("autoencoder=identity", "net.patch_size=[4]"),
        "captions": (kl, "conditioner=minilm"),
    }.items():
        sample_row(train(variant, short, *overrides), variant, short, num)
    run = train("long", long, kl)
    real_rows(run, num)
    for scale in SCALES:
        sample_row(run, "long", long, num, scale)
    analogue_rows(run)
    figure(run, num)
    print("valid is 1 by construction for SELFIES: every string of its symbols is a molecule")


def trained(folder: Path, *words: str) -> Path:
    """Train in a folder, or go on there; return the run."""
    command = [sys.executable, str(TRAIN), "experiment=molecules", f"runs={folder}", *words]
    subprocess.run(command, check=True)
    (run,) = (file.parent for file in folder.glob("*/metrics.json"))
    return run


def known(**key: Any) -> dict[str, str] | None:
    """Return the row of results.csv with these cells, if there is one."""
    wanted = {name: rows.format_cell(value) for name, value in key.items()}
    return next((row for row in rows.read(TABLE) if all(row.get(name, "") == wanted[name] for name in wanted)), None)


def add(values: Callable[[], dict[str, Any]], **key: Any) -> None:
    """Append a row of results.csv, unless it is there."""
    if known(**key) is None:
        row = {**key, **values()}
        print("  ".join(f"{name} {rows.format_cell(value)}" for name, value in row.items()), flush=True)
        rows.write(TABLE, [*rows.read(TABLE), row])


@cache
def data_of(run: Path, split: str = "test") -> Any:
    return build.build_dataset(load_run_config(run), split)


@cache
def reference() -> Reference:
    """MOSES's training set, all of it, its filters and its statistics of the test set."""
    return Reference(set(read_moses(moses() / "train.csv.gz")), filter_patterns(), reference_statistics("test"))


@torch.no_grad()
def first_stage_row(run: Path, weight: float) -> None:
    """Score the first stage on held-out molecules: strings and symbols that come back, also from latents with noise."""

    def values() -> dict[str, Any]:
        data, stage = data_of(run), load_model(run).autoencoder
        image = data.pixels(range(min(2000, len(data))))
        posterior, tokens = stage.posterior(image), to_tokens(image)
        z = stage.normalise(posterior.mode)
        noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
        found = {level: to_tokens(stage.decode(z + level * noise)) == tokens for level in (0.0, *NOISE)}
        return {
            "n": len(image),
            "nats": float(posterior.kl().mean()),
            "exact": float(found[0.0].all(1).float().mean()),
            "symbols": float(found[0.0].float().mean()),
            **{f"exact_noise_{level:g}": float(found[level].all(1).float().mean()) for level in NOISE},
        }

    add(values, part="first stage", variant=f"kl {weight:g}")


def sample_row(run: Path, variant: str, steps: int, num: int, scale: float = 1.0) -> None:
    """Score molecules sampled under the facts of held-out ones."""

    def values() -> dict[str, Any]:
        smiles = sampled(run, num, scale)
        return {**molecule_scores(smiles, reference()), **fact_scores(smiles, data_of(run).facts[: len(smiles)])}

    add(values, part="samples", variant=variant, steps=steps, guidance=scale)


def sampled(run: Path, num: int, scale: float) -> list[str]:
    """Return the SMILES sampled under the facts, or the captions, of the first `num` held-out molecules; once."""
    data, file = data_of(run), run / "measured" / f"{num}-{scale:g}.safetensors"
    num = min(num, len(data))
    if not file.is_file():
        model = load_model(run)
        ts, guidance = trailing(model.denoiser.schedule, STEPS), partial(cfg, scale=scale)
        parts = []
        for part in torch.arange(num).split(BATCH):
            index = part.tolist()
            batch = {**data.batch_metadata([(0, i) for i in index]), "index": index}
            parts.append(to_tokens(sample(model, batch, index, ts, dpmpp_2m, guidance, generate)).byte())
        atomic.write_tensors(file, {"tokens": torch.cat(parts)})
    return [data.vocabulary.decode(tokens) for tokens in atomic.read_tensors(file)["tokens"].tolist()]


def real_rows(run: Path, num: int) -> None:
    """Score held-out molecules: themselves, through the first stage, and against facts of others (chance)."""
    data = data_of(run)
    num = min(num, len(data))
    smiles, facts = data.smiles(range(num)), data.facts[:num]

    @torch.no_grad()
    def decoded() -> dict[str, Any]:
        stage = load_model(run).autoencoder
        images = [stage.decode(stage.encode(data.pixels(part))) for part in torch.arange(num).split(500)]
        back = [data.vocabulary.decode(tokens) for tokens in to_tokens(torch.cat(images)).tolist()]
        return {**molecule_scores(back, reference()), **fact_scores(back, facts)}

    add(lambda: molecule_scores(smiles, reference()) | fact_scores(smiles, facts), part="real", variant="test molecules")
    add(lambda: fact_scores(smiles, facts.roll(1, 0)) | {"n": num}, part="real", variant="test molecules, other facts")
    add(decoded, part="real", variant="test molecules through the first stage")


def leads(run: Path) -> list[int]:
    """Return the rows of the lead molecules, evenly spaced over the held-out ones."""
    return [i * len(data_of(run)) // LEADS for i in range(LEADS)]


def analogues(run: Path, strength: float) -> list[list[str]]:
    """Return EACH analogues of each lead, by image-to-image under the lead's own facts."""
    data, model = data_of(run), load_model(run)
    index = [lead for lead in leads(run) for _ in range(EACH)]
    batch = {**data.batch([(0, i) for i in index]), "index": list(range(len(index)))}
    ts, task = trailing(model.denoiser.schedule, STEPS), partial(img2img, strength=strength)
    found = sample(model, batch, batch["index"], ts, dpmpp_2m, partial(cfg, scale=1.0), task)
    smiles = [data.vocabulary.decode(tokens) for tokens in to_tokens(found).tolist()]
    return [smiles[start : start + EACH] for start in range(0, len(smiles), EACH)]


def analogue_rows(run: Path) -> None:
    """Score analogues by strength: valid, changed, distinct, and similarity to their lead."""
    sources = data_of(run).smiles(leads(run))

    def values(strength: float) -> dict[str, Any]:
        groups = analogues(run, strength)
        pairs = [(a, b) for a, group in zip(sources, groups, strict=True) for b in group if is_molecule(b)]
        canonical = [(canonical_smiles(a), canonical_smiles(b)) for a, b in pairs]
        similarity = [float(tanimoto(*(unpack(fingerprints([x])) for x in pair))) for pair in canonical]
        total = LEADS * EACH
        return {
            "n": total,
            "valid": len(pairs) / total,
            "changed": sum(a != b for a, b in canonical) / max(1, len(pairs)),
            "distinct": len(set(canonical)) / max(1, len(pairs)),
            "similarity": sum(similarity) / max(1, len(pairs)),
        }

    for strength in STRENGTHS:
        add(partial(values, strength), part="analogues", variant="long", strength=strength)


@torch.no_grad()
def interpolated(run: Path, first: int, second: int) -> Tensor:
    """Return samples (FRAMES, symbols, L) decoded along the line from one held-out molecule to another in z."""
    stage = load_model(run).autoencoder
    a, b = stage.encode(data_of(run).pixels([first, second]))
    return stage.decode(torch.stack([a + (b - a) * i / (FRAMES - 1) for i in range(FRAMES)]))


def figure(run: Path, num: int) -> None:
    """Draw figure.png, samples.png and analogues.png."""
    drawing = plotting.canvas(860, 360)
    axes = plotting.panel(drawing, 60, 30, 340, 270, f"{num:,} molecules", "novelty", "FCD to the test set")
    for row in rows.read(HERE / "moses.csv"):
        axes.plot(float(row["novelty"]), float(row["fcd"]), "o", color=plotting.SOFT, ms=4)
        axes.annotate(row["model"], (float(row["novelty"]), float(row["fcd"])), fontsize=6, color=plotting.SOFT)
    for row in rows.read(TABLE):
        if row["part"] == "samples":
            axes.plot(float(row["novelty"]), float(row["fcd"]), "o", color=plotting.BLUE, ms=4)
            axes.annotate(f"{row['variant']}, {row['guidance']}", (float(row["novelty"]), float(row["fcd"])), fontsize=6)
    if (real := known(part="real", variant="test molecules")) is not None:
        axes.axhline(float(real["fcd"]), color=plotting.RED, lw=0.8, ls="--")
    axes.set_yscale("log")
    axes = plotting.panel(drawing, 480, 30, 340, 270, "long, guidance 1", "logP of the condition", "logP")
    smiles = sampled(run, num, 1.0)[:2000]
    pairs = list(logp_pairs(smiles, data_of(run).facts[: len(smiles), 0].tolist()))
    axes.plot([x for x, _ in pairs], [y for _, y in pairs], ".", color=plotting.BLUE, ms=1.5)
    axes.axline((0, 0), slope=1, color=plotting.SOFT, lw=0.6)
    drawing.savefig(HERE / "figure.png", metadata={"Software": None})
    save_png(HERE / "samples.png", torch.stack([*strip(sampled(run, num, 1.0)[:SHOWN], 8)]))
    data, rows_of = data_of(run), leads(run)
    lines = []
    for number, lead in enumerate(data.smiles(rows_of)[:3]):
        lines += [lead, *(analogues(run, strength)[number][0] for strength in STRENGTHS)]
    save_png(HERE / "analogues.png", torch.stack([*strip(lines, 1 + len(STRENGTHS))]))
    path = sheet(list(interpolated(run, *rows_of[:2])), FRAMES)
    save_png(HERE / "interpolation.png", ((path + 1) * 127.5).round().byte())


def strip(smiles: Iterable[str], columns: int) -> Tensor:
    """Draw molecules in rows: (3, H, W) uint8."""
    from ldm.io.images import make_grid

    return make_grid(torch.stack([draw(text) for text in smiles]), columns)


def logp_pairs(smiles: Iterable[str], asked: Iterable[float]) -> Iterator[tuple[float, float]]:
    """Yield logP of the condition and of the molecule, for each text that is a molecule."""
    for text, value in zip(smiles, asked, strict=True):
        if is_molecule(text):
            yield value, facts_of(read_molecule(text))[0]


if __name__ == "__main__":
    main(*sys.argv[1:])
