"""Train, sample and score molecules: python experiments/molecules/measure.py [runs=runs/molecules] [short=1500]
[long=12000] [few=2000] [num=10000] [key=value ...]

First the weight of the KL penalty is chosen: for each, a first stage and a denoiser of `short` steps, by the FCD of
`few` molecules.  With that weight it trains SMILES in place of SELFIES, no first stage, and captions for as long, and
SELFIES for `long` steps, of which `num` molecules are scored and the analogues of leads are sampled.  Each row of
results.csv is written as soon as it is known, and what is there is not computed again: started again, it goes on.
Then figure.png, samples.png, analogues.png and interpolation.png.  Other words go to train.py.
"""

import subprocess
import sys
from collections.abc import Callable, Iterable
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
from ldm.io.images import make_grid, save_png
from ldm.io.molecules import canonical_smiles, facts_of, is_molecule, read_molecule, samples_to_smiles, to_tokens
from ldm.io.molsets import filter_patterns, moses, reference_statistics
from ldm.media.molecule import draw
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
    options = {"runs": "runs/molecules", "short": "1500", "long": "12000", "few": "2000", "num": "10000"}
    more = [word for word in words if word.partition("=")[0] not in options]
    options |= dict(word.split("=", 1) for word in words if word not in more)
    runs, (short, long, few, num) = Path(options["runs"]), (int(options[k]) for k in ("short", "long", "few", "num"))

    def train(variant: str, steps: int, *overrides: str) -> Path:
        return trained(runs / variant.replace(" ", "_"), f"training.steps={steps}", *overrides, *more)

    for weight in KL_WEIGHTS:
        run = train(f"kl {weight:g}", short, f"first_stage.loss.kl_weight={weight}")
        first_stage_row(run, weight)
        sample_row(run, f"kl {weight:g}", short, few)
    best = min(KL_WEIGHTS, key=lambda weight: distance(known(part="samples", variant=f"kl {weight:g}")))
    kl = f"first_stage.loss.kl_weight={best}"
    for variant, overrides in {
        "SMILES": (kl, "data.representation=smiles"),
        "no first stage": ("autoencoder=identity", "net.patch_size=[4]"),
        "captions": (kl, "conditioner=minilm"),
    }.items():
        sample_row(train(variant, short, *overrides), variant, short, few)
    run = train("long", long, kl)
    for count in (few, num):
        real_row(run, count)
    control_rows(run, num)
    for scale in SCALES:
        sample_row(run, "long", long, num, scale)
    analogue_rows(run)
    plot(run, num)
    draw_molecules(run, num)
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


def distance(row: dict[str, str] | None) -> float:
    """Return the FCD of a row, infinite for one without enough molecules."""
    return float(row["fcd"]) if row and row["fcd"] else float("inf")


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


def real_row(run: Path, num: int) -> None:
    """Score held-out molecules: the floor of the FCD at this number."""
    data = data_of(run)
    index = range(min(num, len(data)))

    def values() -> dict[str, Any]:
        smiles = data.smiles(index)
        return {**molecule_scores(smiles, reference()), **fact_scores(smiles, data.facts[index])}

    add(values, part="real", variant=f"{len(index)} test molecules")


def control_rows(run: Path, num: int) -> None:
    """Score held-out molecules through the first stage, and against the facts of others, which is chance."""
    data = data_of(run)
    index = range(min(num, len(data)))

    def chance() -> dict[str, Any]:
        return {"n": len(index), **fact_scores(data.smiles(index), data.facts[index].roll(1, 0))}

    @torch.no_grad()
    def decoded() -> dict[str, Any]:
        stage = load_model(run).autoencoder
        images = [stage.decode(stage.encode(data.pixels(part))) for part in torch.arange(len(index)).split(500)]
        smiles = [data.vocabulary.decode(tokens) for tokens in to_tokens(torch.cat(images)).tolist()]
        return {**molecule_scores(smiles, reference()), **fact_scores(smiles, data.facts[index])}

    add(chance, part="real", variant="test molecules, facts of others")
    add(decoded, part="real", variant="test molecules through the first stage")


def leads(run: Path) -> list[int]:
    """Return the rows of the lead molecules, evenly spaced over the held-out ones."""
    return [i * len(data_of(run)) // LEADS for i in range(LEADS)]


@cache
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


def plot(run: Path, num: int) -> None:
    """Draw figure.png: FCD against novelty beside MOSES's published rows, and logP against that of the condition."""
    figure = plotting.canvas(900, 360)
    axes = plotting.panel(figure, 60, 30, 360, 280, "each point is a model", "novelty", "FCD to the test set")
    points = [(row["model"], row, plotting.SOFT) for row in rows.read(HERE / "moses.csv")]
    points += [(label(row), row, plotting.BLUE) for row in rows.read(TABLE) if row["part"] == "samples" and row["fcd"]]
    for name, row, colour in points:
        place = float(row["novelty"]), float(row["fcd"])
        axes.plot(*place, "o", color=colour, ms=4)
        axes.annotate(name, place, (4, 2), textcoords="offset points", fontsize=6, color=colour)
    for row in rows.read(TABLE):
        if row["part"] == "real" and row["fcd"] and "through" not in row["variant"]:
            axes.axhline(float(row["fcd"]), color=plotting.RED, lw=0.6, ls="--")
            axes.annotate(row["variant"], (0.7, float(row["fcd"])), fontsize=6, color=plotting.RED)
    axes.set_yscale("log")
    axes = plotting.panel(figure, 500, 30, 360, 280, "sampled by guidance 1", "logP of the condition", "logP")
    smiles = sampled(run, num, 1.0)[:2000]
    pairs = [
        (wish, facts_of(read_molecule(text))[0])
        for text, wish in zip(smiles, data_of(run).facts[: len(smiles), 0].tolist(), strict=True)
        if is_molecule(text)
    ]
    axes.plot(*zip(*pairs, strict=True), ".", color=plotting.BLUE, ms=1.5)
    axes.axline((0, 0), slope=1, color=plotting.SOFT, lw=0.6)
    figure.savefig(HERE / "figure.png", metadata={"Software": None})


def label(row: dict[str, str]) -> str:
    """Return the name of a row in the figure."""
    return f"{row['variant']}, {row['guidance']}" if row["guidance"] != "1" else row["variant"]


def draw_molecules(run: Path, num: int) -> None:
    """Draw samples.png, analogues.png (a lead, then one analogue by strength, in each row) and interpolation.png."""
    save_png(HERE / "samples.png", make_grid(stack(sampled(run, num, 1.0)[:SHOWN]), 8))
    by_strength = [analogues(run, strength) for strength in STRENGTHS]
    sources = data_of(run).smiles(leads(run))
    lines = [text for i, lead in enumerate(sources) for text in (lead, *(groups[i][0] for groups in by_strength))]
    save_png(HERE / "analogues.png", make_grid(stack(lines), 1 + len(STRENGTHS)))
    pairs = zip(leads(run)[::2], leads(run)[1::2], strict=False)
    frames = torch.cat([interpolated(run, first, second) for first, second in pairs])
    save_png(HERE / "interpolation.png", make_grid(stack(samples_to_smiles(frames)), FRAMES))


def stack(smiles: Iterable[str]) -> Tensor:
    """Draw molecules: (N, 3, H, W) uint8."""
    return torch.stack([draw(text) for text in smiles])


if __name__ == "__main__":
    main(*sys.argv[1:])
