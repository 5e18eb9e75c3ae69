"""What sample.py does with a request: images one by one by seed, files, scores, and in each file the words to make it again."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm import adm, durable, protocol, runs
from ldm.build import plain
from ldm.errors import UserError
from ldm.load import config_of, length_of, space_of
from ldm.request import Request
from ldm.space import require_same_latent_space

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.diffusion.sampler import Sampler
    from ldm.metrics.distribution import Score
    from ldm.model import LatentDiffusion


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


def draw(
    model: "LatentDiffusion", request: Request, around: "Callable[[Sampler], Sampler]" = lambda sampler: sampler
) -> "dict[int, Tensor]":
    """This process's share of the images: seed -> (C, H, W) uint8; saved as they come. Raises UserError before any is drawn.

    around: what wraps the sampler, to look at it.
    """
    from hydra.utils import instantiate

    from ldm import picture
    from ldm.autoencoder.tiled import Tiled
    from ldm.metrics.features import to_uint8
    from ldm.model import LatentDiffusion
    from ldm.progress import Bar
    from ldm.score import mine, samples

    cfg = request.cfg
    heard(model, request)
    note_cleaned(model, request)
    weights = fingerprint(model)
    if request.carried and request.carried["weights"] != weights:
        raise UserError(f"again={cfg.again} was drawn with other weights than run={cfg.run} has now; run=... says where they are")
    config = runs.fingerprint([plain(config_of(request.folder)), weights])[:16]
    ts = instantiate(cfg.grid)(model.denoiser.schedule, cfg.steps)
    sampler, guidance, task = (instantiate(cfg[name]) for name in ("sampler", "guidance", "task"))
    rows = [request.rows[i] for i in mine(len(request.rows))]
    images: dict[int, Tensor] = {}
    if cfg.tile is not None:
        model = LatentDiffusion(Tiled(model.autoencoder, cfg.tile, cfg.tile // 4), model.conditioner, model.denoiser, model.size)
    bar = Bar("sampling", len(rows), unit="images")
    looked = around(sampler)
    drawn = samples(model, request.batch, rows, cfg.seed, cfg.batch_size, ts, looked, guidance, str(cfg.precision), task, list(cfg.hold))
    for image, batch in drawn:
        memory = request.memory(batch, weights) if cfg.save == "all" else {}
        for place, (i, one) in enumerate(zip(batch["index"], to_uint8(image).cpu(), strict=True)):
            if i not in request.kept:
                continue
            images[cfg.seed + i] = one
            if cfg.save == "all":
                text = {"prompt": batch["caption"][place] if "caption" in batch else "", "seed": str(cfg.seed + i), "run": str(cfg.run)}
                carried = {"config": config, "again": json.dumps({**memory, "row": i}, ensure_ascii=False)}
                picture.save(request.out / f"{cfg.seed + i:06d}.png", one, text | carried)
        bar.at(len(images))
    return images


def heard(model: "LatentDiffusion", request: Request) -> None:
    """Raises UserError for words or keys that this model is not told, and for a classifier or weak model of another latent space."""
    keys, label = model.conditioner.keys, request.cfg.label
    asked = {"caption": request.in_words, "label": None if label is None else f"label={label}"}
    if request.cfg.negative is not None and asked["caption"] is None:
        asked["caption"] = f"negative={request.cfg.negative}"
    if asked["caption"] and "caption" not in keys:
        raise UserError(f"{asked['caption']}: this model is not told words; expected {'label=...' if 'label' in keys else 'no prompt'}")
    if missing := [name for name in request.cfg.hold if name not in keys]:
        raise UserError(f"hold={missing[0]}: this model is told {', '.join(keys) or 'nothing'}")
    if (run := request.cfg.guidance.get("classifier")) is not None:
        from ldm.stage import classifier

        classifier.admit(run, space_of(request.folder))
    if (run := request.cfg.guidance.get("weak")) is not None:
        model = "this model", space_of(request.folder)
        require_same_latent_space((f"guidance.weak={run}", space_of(run)), model, "choose one trained in its latents")


def note_cleaned(model: "LatentDiffusion", request: Request) -> None:
    """Print one line on a prompt for a pipeline folder of diffusers that diffusers itself may read as other tokens."""
    from ldm.foreign import tower_of
    from ldm.interop.folder import is_folder

    if not is_folder(request.folder) or tower_of(model) is None or os.environ.get("RANK", "0") != "0":
        return
    from ldm.conditioner.clip import cleaned

    texts = [caption for caption, _ in request.told.values()] + [request.cfg.negative or ""]
    for text in dict.fromkeys(texts):
        if (after := cleaned(text)) is not None:
            print(
                f"prompt {text!r} is read as {after!r}, as CLIP was trained; diffusers with transformers 5 takes typographic quotes and "
                "HTML entities as they stand and draws another image of the same seed",
                file=sys.stderr,
            )
            return


def fingerprint(model: "LatentDiffusion") -> str:
    """sha256 (hex) of everything in a model that a file of weights may change."""
    from ldm.tensors import hash_state_dict

    return hash_state_dict(model.state_dict())


def score(request: Request, images: "dict[int, Tensor]") -> dict[str, Any]:
    """The numbers of cfg.metrics over all processes, and of held-out images how near they were come to; empty for metrics=none."""
    from ldm.stage import judge

    make, _ = judge.scorer(config_of(request.folder), request.cfg.metrics)
    return {} if make is None else measured(request, images, make())


def measured(request: Request, images: "dict[int, Tensor]", scores: "Score") -> dict[str, Any]:
    """As score, by a Score that may have measured others before."""
    import torch
    from hydra.utils import instantiate

    scores.reset()
    pairs = instantiate(request.cfg.paired)()
    rows = [seed - request.cfg.seed for seed in images]
    paired = request.held_out is not None and "image" not in request.inputs
    for start in range(0, len(rows), 500):
        part = rows[start : start + 500]
        batch = request.batch(part)
        image = torch.stack([images[request.cfg.seed + i] for i in part]).float() / 127.5 - 1
        scores.update(image, batch.get("label", torch.zeros(len(part), dtype=torch.long)), batch.get("caption"))
        if paired and batch["image"].shape == image.shape:
            pairs.update(batch["image"], image)
    near = pairs.compute() if paired else {}
    values = scores.compute()
    return {**values, **near, **protocol.stated({**scores.provenance, "n": values["n"], **how(request)})}


def how(request: Request) -> dict[str, Any]:
    """What the protocol of a score says of its samples."""
    from ldm.training.fit import precision_here

    cfg = plain(request.cfg)
    told = next((f"{name}={cfg[name]}" for name in ("prompt", "prompts", "label") if cfg[name] is not None), cfg["labels"])
    lengths = {"ema": config_of(request.folder).training.get("sigma_rel"), "raw": None}
    sigma_rel = lengths[cfg["weights"]] if cfg["weights"] in lengths else length_of(cfg["weights"])
    scale, arithmetic = float(cfg["guidance"].get("scale", 1.0)), precision_here(str(cfg["precision"]))
    said = {"data": request.card.fingerprint, "labels": "held out" if request.held_out is not None else told}
    said |= {"autoencoder": space_of(request.folder), "task": protocol.spelled(cfg["task"])}
    said |= {} if cfg["tile"] is None else {"tile": cfg["tile"]}
    return said | protocol.drawn(cfg, steps=cfg["steps"], scale=scale, sigma_rel=sigma_rel, arithmetic=arithmetic)


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
    if cfg.save == "npz":
        height, width = next(iter(first.values())).shape[1:]
        place = {cfg.seed + i: row for row, i in enumerate(request.kept)}
        adm.write(out / "samples.npz", {place[seed]: one for seed, one in images.items()}, (len(place), height, width))
    if int(os.environ.get("RANK", 0)):
        return None
    if cfg.save != "none":
        shown = torch.stack(list(first.values()))
        columns = 16 if len(shown) > 64 else max(1, round(len(shown) ** 0.5))
        picture.save(out / "grid.png", picture.grid(shown, columns, zoom=2))
    asked = {name: value for name, value in plain(cfg).items() if name not in ("trainer", "out", "save")}
    record = {**score, "autoencoder": space_of(request.folder), "request": asked, "provenance": runs.provenance(Path(__file__).parent)}
    durable.write_json(out / "metrics.json", record)
    for name, value in (pair for pair in score.items() if not pair[0].startswith("score/")):
        print(f"{name:<16}{value:.4g}" if isinstance(value, float) else f"{name:<16}{value}")
    if cfg.again is not None:
        print(f"{cfg.again}: made again, {difference(Path(cfg.again).expanduser(), next(iter(images.values())))}")
    print(f"{len(request.kept)} images, seeds {cfg.seed + request.kept[0]}..{cfg.seed + request.kept[-1]}, in {out}")
    return next((value for name, value in score.items() if name.startswith("fd_")), None)


def difference(path: Path, image: "Tensor") -> str:
    """How an image (C, H, W) uint8 compares with a file, in words."""
    import numpy as np
    import torch
    from PIL import Image

    with Image.open(path, formats=("PNG",)) as file:
        before = torch.from_numpy(np.array(file)).reshape(*image.shape[1:], -1).permute(2, 0, 1)
    largest = int((before.int() - image.int()).abs().max())
    return "bit for bit the same" if largest == 0 else f"the largest difference is {largest} of 255 grey levels"
