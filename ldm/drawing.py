"""What sample.py does: a request from a config, images one by one by seed, files, scores, and the words to do it again."""

import csv
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm import durable, runs
from ldm.build import plain
from ldm.errors import UserError
from ldm.load import DataCard, config_of, run_folder
from ldm.space import Space

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.model import LatentDiffusion


@dataclass(frozen=True)
class Request:
    """Who is told what: image i, with seed + i, is told told[i] = (caption, class)."""

    cfg: Any
    folder: Path
    card: DataCard
    told: Sequence[tuple[str, int]]

    @staticmethod
    def of(cfg: Any) -> "Request":
        """Check what was asked before anything is loaded. Raises UserError."""
        folder = run_folder(cfg.run)
        card = DataCard.read(folder)
        for name in ("num", "steps", "batch_size"):
            if cfg[name] < 1:
                raise UserError(f"{name}={cfg[name]}: expected 1 or more")
        if cfg.save not in ("all", "grid", "none"):
            raise UserError(f"save={cfg.save}: expected all, grid or none")
        asked = [name for name in ("prompt", "prompts", "label") if cfg[name] is not None]
        if len(asked) > 1:
            raise UserError(f"{' and '.join(asked)} were given: expected one of them")
        return Request(cfg, folder, card, told(cfg, card))

    @property
    def out(self) -> Path:
        """Where files go: cfg.out, or a folder in the run's, named by what was asked."""
        if self.cfg.out is not None:
            return Path(self.cfg.out)
        asked = runs.without(plain(self.cfg), ("run", "num", "batch_size", "save", "trainer", "out", "metrics"))
        return self.folder / "samples" / f"{self.cfg.seed}-{runs.fingerprint(asked)[:8]}"

    @property
    def in_words(self) -> str | None:
        """The option by which words and nothing else were asked for, or None."""
        words = {"prompt": self.cfg.prompt, "prompts": None if str(self.cfg.prompts).endswith(".csv") else self.cfg.prompts}
        return next((f"{name}={value}" for name, value in words.items() if value is not None), None)

    @property
    def seeds(self) -> list[int]:
        return [self.cfg.seed + i for i in range(len(self.told))]

    def batch(self, rows: Sequence[int]) -> dict[str, Any]:
        import torch

        return {"caption": [self.told[i][0] for i in rows], "label": torch.tensor([self.told[i][1] for i in rows]), "index": list(rows)}


def told(cfg: Any, card: DataCard) -> list[tuple[str, int]]:
    """(caption, class) for each image; the class is 0 where a prompt says none."""
    from ldm.tensors import key

    if cfg.prompt is not None:
        return [(cfg.prompt, 0)] * cfg.num
    if cfg.prompts is not None:
        return [(prompt, label) for prompt, label in read_prompts(Path(cfg.prompts), card) for _ in range(cfg.num)]
    labels = [i % len(card.classes) for i in range(cfg.num)] if cfg.label is None else [class_of(cfg.label, card)] * cfg.num
    return [(card.captions[k][key(0, "told", i) % len(card.captions[k])], k) for i, k in enumerate(labels)]


def read_prompts(path: Path, card: DataCard) -> list[tuple[str, int]]:
    """Prompts of a text file, one a line, or of a csv with the columns prompt and label (a class). Raises UserError naming the file."""
    if not path.is_file():
        raise UserError(f"prompts={path}: no such file; expected one prompt a line, or a csv with the columns label,prompt")
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".csv":
        rows = list(csv.DictReader(text.splitlines()))
        if not rows or not {"label", "prompt"} <= rows[0].keys():
            raise UserError(f"prompts={path}: expected the columns label,prompt and at least one row")
        return [(row["prompt"], class_of(row["label"], card)) for row in rows]
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise UserError(f"prompts={path}: the file is empty; expected one prompt a line")
    return [(line, 0) for line in lines]


def class_of(label: str, card: DataCard) -> int:
    """The number of a class given by name or number. Raises UserError listing the classes."""
    if label in card.classes:
        return list(card.classes).index(label)
    if str(label).isdigit() and int(label) < len(card.classes):
        return int(label)
    raise UserError(f"label={label}: expected one of {', '.join(card.classes)}, or 0..{len(card.classes) - 1}")


@contextmanager
def world() -> Iterator[None]:
    """A process group while several processes were launched; nothing otherwise."""
    import torch

    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def draw(model: "LatentDiffusion", request: Request) -> "dict[int, Tensor]":
    """This process's share of the images: seed -> (C, H, W) uint8; saved as they come."""
    from hydra.utils import instantiate

    from ldm import picture
    from ldm.metrics.features import to_uint8
    from ldm.progress import Bar
    from ldm.score import mine, samples

    cfg = request.cfg
    if request.in_words and "caption" not in model.conditioner.keys:
        other = "label=..." if "label" in model.conditioner.keys else "no prompt"
        raise UserError(f"{request.in_words}: this model is not told words; expected {other}")
    ts = instantiate(cfg.grid)(model.denoiser.schedule, cfg.steps)
    rows = list(mine(len(request.told)))
    images: dict[int, Tensor] = {}
    bar = Bar("sampling", len(rows), unit="images")
    drawn = samples(
        model, request.batch, rows, cfg.seed, cfg.batch_size, ts, instantiate(cfg.sampler), instantiate(cfg.guidance), str(cfg.precision)
    )
    for image, batch in drawn:
        for i, one in zip(batch["index"], to_uint8(image).cpu(), strict=True):
            images[cfg.seed + i] = one
            if cfg.save == "all":
                text = {"prompt": request.told[i][0], "seed": str(cfg.seed + i), "run": str(cfg.run)}
                picture.save(request.out / f"{cfg.seed + i:06d}.png", one, text)
        bar.at(len(images))
    return images


def score(request: Request, images: "dict[int, Tensor]") -> dict[str, Any]:
    """The numbers of cfg.metrics over all processes; empty for metrics=none."""
    import torch

    if "_target_" not in request.cfg.metrics:
        return {}
    from ldm.stage import judge

    make, _ = judge.scorer(config_of(request.folder), request.cfg.metrics)
    scores = make()
    rows = [seed - request.cfg.seed for seed in images]
    for start in range(0, len(rows), 500):
        part = rows[start : start + 500]
        image = torch.stack([images[request.cfg.seed + i] for i in part]).float() / 127.5 - 1
        scores.update(image, torch.tensor([request.told[i][1] for i in part]))
    return {**scores.compute(), **{f"score/{name}": value for name, value in scores.provenance.items()}}


def gathered(images: "dict[int, Tensor]", most: int) -> "dict[int, Tensor]":
    """The `most` images of the lowest seeds over all processes, by seed."""
    import torch.distributed as dist

    parts: list[Any] = [dict(list(images.items())[:most])]
    if dist.is_available() and dist.is_initialized():
        parts = parts * dist.get_world_size()
        dist.all_gather_object(parts, parts[0])
    whole = {seed: image for part in parts for seed, image in part.items()}
    return {seed: whole[seed] for seed in sorted(whole)[:most]}


def keep(request: Request, images: "dict[int, Tensor]", score: dict[str, Any]) -> float | None:
    """Write grid.png and metrics.json, the numbers with everything needed to repeat them; returns the distance if there is one."""
    import torch

    from ldm import picture

    cfg, out = request.cfg, request.out
    first = gathered(images, 400) if cfg.save != "none" else {}
    if int(os.environ.get("RANK", 0)):
        return None
    if cfg.save != "none":
        shown = torch.stack(list(first.values()))
        columns = 16 if len(shown) > 64 else max(1, round(len(shown) ** 0.5))
        picture.save(out / "grid.png", picture.grid(shown, columns, zoom=2))
    asked = {name: value for name, value in plain(cfg).items() if name not in ("trainer", "out", "save")}
    first_stage = request.folder / "first_stage.safetensors"
    space = Space.carried(durable.read_metadata(first_stage), first_stage)
    record = {**score, "autoencoder": space.name, "request": asked, "provenance": runs.provenance(Path(__file__).parent)}
    durable.write_json(out / "metrics.json", record)
    for name, value in score.items():
        print(f"{name:<16}{value:.4g}" if isinstance(value, float) else f"{name:<16}{value}")
    print(f"{len(request.told)} images, seeds {cfg.seed}..{cfg.seed + len(request.told) - 1}, in {out}")
    return next((value for name, value in score.items() if name.startswith("fd_")), None)
