"""What sample.py does with a request: images one by one by seed, files, scores, and in each file the words to make it again."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.checkpoint.latent_space import require_same_latent_space
from ldm.checkpoint.load import latent_space_of, load_run_config
from ldm.checkpoint.weights import hash_model
from ldm.config.build import to_container
from ldm.errors import UserError
from ldm.io import atomic, npz
from ldm.runs import identity, provenance
from ldm.sampling.request import SampleRequest

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.diffusion.sampler import Sampler
    from ldm.model import LatentDiffusion


def generate_images(
    model: "LatentDiffusion", request: SampleRequest, around: "Callable[[Sampler], Sampler]" = lambda sampler: sampler
) -> "dict[int, Tensor]":
    """This process's share of the images: seed -> (C, H, W) uint8; saved as they come. Raises UserError before any is drawn.

    around: what wraps the sampler, to look at it.
    """
    from hydra.utils import instantiate

    from ldm.autoencoder.tiled import Tiled
    from ldm.io.images import save_png
    from ldm.io.progress import ProgressBar
    from ldm.metrics.features import to_uint8
    from ldm.model import LatentDiffusion
    from ldm.sampling.generate import generate_samples, rank_slice

    cfg = request.cfg
    check_conditions(model, request)
    note_cleaned(model, request)
    weights = hash_model(model)
    if request.record and request.record["weights"] != weights:
        raise UserError(
            f"reproduce={cfg.reproduce} was drawn with other weights than run={cfg.run} has now; run=... says where they are"
        )
    config = identity.hash_config([to_container(load_run_config(request.folder)), weights])[:16]
    ts = instantiate(cfg.timestep_spacing)(model.denoiser.schedule, cfg.steps)
    sampler, guidance, task = (instantiate(cfg[name]) for name in ("sampler", "guidance", "task"))
    rows = [request.rows[i] for i in rank_slice(len(request.rows))]
    images: dict[int, Tensor] = {}
    if cfg.tile is not None:
        model = LatentDiffusion(
            Tiled(model.autoencoder, cfg.tile, cfg.tile // 4), model.conditioner, model.denoiser, model.size
        )
    bar = ProgressBar("sampling", len(rows), unit="images")
    looked = around(sampler)
    drawn = generate_samples(
        model,
        request.batch,
        rows,
        cfg.seed,
        cfg.batch_size,
        ts,
        looked,
        guidance,
        str(cfg.precision),
        task,
        list(cfg.keep_conditions),
    )
    for image, batch in drawn:
        memory = request.reproduction_record(batch, weights) if cfg.save == "all" else {}
        for place, (i, one) in enumerate(zip(batch["index"], to_uint8(image).cpu(), strict=True)):
            if i not in request.saved_rows:
                continue
            images[cfg.seed + i] = one
            if cfg.save == "all":
                text = {
                    "prompt": batch["caption"][place] if "caption" in batch else "",
                    "seed": str(cfg.seed + i),
                    "run": str(cfg.run),
                }
                carried = {"config": config, "reproduce": json.dumps({**memory, "row": i}, ensure_ascii=False)}
                save_png(request.output_dir / f"{cfg.seed + i:06d}.png", one, text | carried)
        bar.update(len(images))
    return images


def check_conditions(model: "LatentDiffusion", request: SampleRequest) -> None:
    """Raises UserError for words or keys that this model is not told, and for a classifier or weak model of another latent space."""
    keys, label = model.conditioner.keys, request.cfg.label
    asked = {"caption": request.text_option, "label": None if label is None else f"label={label}"}
    if request.cfg.negative is not None and asked["caption"] is None:
        asked["caption"] = f"negative={request.cfg.negative}"
    if asked["caption"] and "caption" not in keys:
        raise UserError(
            f"{asked['caption']}: this model is not told words; expected {'label=...' if 'label' in keys else 'no prompt'}"
        )
    if missing := [name for name in request.cfg.keep_conditions if name not in keys]:
        raise UserError(f"keep_conditions={missing[0]}: this model is told {', '.join(keys) or 'nothing'}")
    if (run := request.cfg.guidance.get("classifier")) is not None:
        from ldm.sampling import classifier_guidance

        classifier_guidance.check_latent_space(run, latent_space_of(request.folder))
    if (run := request.cfg.guidance.get("weak")) is not None:
        model = "this model", latent_space_of(request.folder)
        require_same_latent_space(
            (f"guidance.weak={run}", latent_space_of(run)), model, "choose one trained in its latents"
        )


def note_cleaned(model: "LatentDiffusion", request: SampleRequest) -> None:
    """Print one line on a prompt for a pipeline folder of diffusers that diffusers itself may read as other tokens."""
    from ldm.checkpoint.external import text_tower
    from ldm.interop.folder import is_folder

    if not is_folder(request.folder) or text_tower(model) is None or os.environ.get("RANK", "0") != "0":
        return
    from ldm.conditioner.clip import clean_text

    texts = [caption for caption, _ in request.prompts.values()] + [request.cfg.negative or ""]
    for text in dict.fromkeys(texts):
        if (after := clean_text(text)) is not None:
            print(
                f"prompt {text!r} is read as {after!r}, as CLIP was trained; diffusers with transformers 5 takes typographic quotes and "
                "HTML entities as they stand and draws another image of the same seed",
                file=sys.stderr,
            )
            return


def gather_images(images: "dict[int, Tensor]", most: int) -> "dict[int, Tensor]":
    """The `most` images of the lowest seeds over all processes, by seed."""
    import torch.distributed as dist

    parts: list[Any] = [dict(list(images.items())[:most])]
    if dist.is_available() and dist.is_initialized():
        parts = parts * dist.get_world_size()
        dist.all_gather_object(parts, parts[0])
    whole = {seed: image for part in parts for seed, image in part.items()}
    return {seed: whole[seed] for seed in sorted(whole)[:most]}


def save_results(request: SampleRequest, images: "dict[int, Tensor]", score: dict[str, Any]) -> float | None:
    """Write grid.png and metrics.json, the numbers with everything needed to repeat them; returns the distance if there is one."""
    import torch

    from ldm.io.images import make_grid, save_png

    cfg, out = request.cfg, request.output_dir
    first = gather_images(images, 400) if cfg.save != "none" else {}
    if cfg.save == "npz":
        height, width = next(iter(first.values())).shape[1:]
        place = {cfg.seed + i: row for row, i in enumerate(request.saved_rows)}
        npz.write_npz(
            out / "samples.npz", {place[seed]: one for seed, one in images.items()}, (len(place), height, width)
        )
    if int(os.environ.get("RANK", 0)):
        return None
    if cfg.save != "none":
        shown = torch.stack(list(first.values()))
        columns = 16 if len(shown) > 64 else max(1, round(len(shown) ** 0.5))
        save_png(out / "grid.png", make_grid(shown, columns, zoom=2))
    asked = {name: value for name, value in to_container(cfg).items() if name not in ("trainer", "out", "save")}
    record = {
        **score,
        "autoencoder": latent_space_of(request.folder),
        "request": asked,
        "provenance": provenance.provenance(Path(__file__).parent),
    }
    atomic.write_json(out / "metrics.json", record)
    for name, value in (pair for pair in score.items() if not pair[0].startswith("score/")):
        print(f"{name:<16}{value:.4g}" if isinstance(value, float) else f"{name:<16}{value}")
    if cfg.reproduce is not None:
        print(
            f"{cfg.reproduce}: made again, {compare_with_file(Path(cfg.reproduce).expanduser(), next(iter(images.values())))}"
        )
    print(
        f"{len(request.saved_rows)} images, seeds {cfg.seed + request.saved_rows[0]}..{cfg.seed + request.saved_rows[-1]}, in {out}"
    )
    return next((value for name, value in score.items() if name.startswith("fd_")), None)


def compare_with_file(path: Path, image: "Tensor") -> str:
    """How an image (C, H, W) uint8 compares with a file, in words."""
    import numpy as np
    import torch
    from PIL import Image

    with Image.open(path, formats=("PNG",)) as file:
        before = torch.from_numpy(np.array(file)).reshape(*image.shape[1:], -1).permute(2, 0, 1)
    largest = int((before.int() - image.int()).abs().max())
    return "bit for bit the same" if largest == 0 else f"the largest difference is {largest} of 255 grey levels"
