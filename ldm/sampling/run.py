"""Execute a sampling request: sample the images by seed and save them with the record that reproduces them."""

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldm.checkpoint.latent_space import require_same_latent_space
from ldm.checkpoint.load import open_model
from ldm.checkpoint.weights import hash_model
from ldm.config.build import to_container
from ldm.config.tree import map_leaves
from ldm.data.shape import image_fault
from ldm.errors import UserError
from ldm.io import atomic, npz
from ldm.runs import identity, provenance
from ldm.sampling.request import SampleRequest

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.diffusion.sampler import Sampler
    from ldm.model import LatentDiffusion

UNRECORDED_OPTIONS = ("trainer", "output_dir", "save")  # what metrics.json leaves out of the request
GRID_IMAGES = 400  # images in grid.png at most


def generate_images(
    model: "LatentDiffusion",
    request: SampleRequest,
    wrap_sampler: "Callable[[Sampler], Sampler]" = lambda sampler: sampler,
) -> "dict[int, Tensor]":
    """Sample this process's share of the images and return them as seed -> (C, H, W) uint8, each saved when its batch
    is complete; samples that are no images as seed -> (C, ...) float32.

    wrap_sampler: applied to the request's sampler, to observe it (see SamplerMonitor).
    Raises UserError before sampling if the request does not fit the model.
    """
    from ldm.autoencoder.tiled import Tiled
    from ldm.io.images import save_png
    from ldm.io.progress import ProgressBar
    from ldm.metrics.features import to_uint8
    from ldm.model import LatentDiffusion
    from ldm.sampling.generate import generate_samples, rank_slice

    check_conditions(model, request)
    note_cleaned(model, request)
    weights = hash_model(model)
    if request.record and request.record["weights"] != weights:
        raise UserError(
            f"reproduce={request.reproduce} was sampled with other weights than run={request.run} has now; "
            "run=RUN names the run that has them"
        )
    config = identity.hash_config([to_container(request.source.config), weights])[:16]
    ts = request.timestep_spacing(model.denoiser.schedule, request.steps)
    rows = [request.rows[i] for i in rank_slice(len(request.rows))]
    if request.tile is not None:
        tiled = Tiled(model.autoencoder, request.tile, request.tile // 4)
        model = LatentDiffusion(tiled, model.conditioner, model.denoiser, model.size)
    fault = image_fault(request.source.data_card.shape)
    if fault and request.save != "none" and os.environ.get("RANK", "0") == "0":
        print(f"{fault}: they are written to samples.npz, not as PNG files")
    bar = ProgressBar("sampling", len(rows), unit="images")
    samples = generate_samples(
        model,
        request.batch,
        rows,
        request.seed,
        request.batch_size,
        ts,
        wrap_sampler(request.sampler),
        request.guidance,
        request.precision,
        request.task,
        request.keep_conditions,
    )
    images: dict[int, Tensor] = {}
    for image, batch in samples:
        saves = request.save == "all" and not fault
        record = request.reproduction_record(batch, weights) if saves else {}
        values = image.cpu() if fault else to_uint8(image).cpu()
        for position, (i, pixels) in enumerate(zip(batch["index"], values, strict=True)):
            if i not in request.saved_rows:
                continue
            seed = request.seed + i
            images[seed] = pixels
            if saves:
                text = {
                    "prompt": batch["caption"][position] if "caption" in batch else "",
                    "seed": str(seed),
                    "run": request.run,
                    "config": config,
                    "reproduce": json.dumps({**record, "row": i}, ensure_ascii=False),
                }
                save_png(request.output_dir / f"{seed:06d}.png", pixels, text)
        bar.update(len(images))
    return images


def check_conditions(model: "LatentDiffusion", request: SampleRequest) -> None:
    """Check that the model accepts every condition in `request`.

    Raises UserError if the request has a prompt, a size, an input or a `keep_conditions` entry that neither the model's
    conditioner nor the task uses, or if the guidance classifier or the weak model for autoguidance was trained in a different latent space.
    """
    keys = model.conditioner.keys
    text = request.text_option
    if text is None and request.negative is not None:
        text = f"negative={request.negative}"
    if text and "caption" not in keys:
        remedy = "label=..." if "label" in keys else "no prompt"
        raise UserError(f"{text}: this model has no text condition; expected {remedy}")
    for name, size in request.sizes.items():
        if name not in keys:
            raise UserError(f"{name}={list(size)}: this model has no size condition; leave it out")
    used = getattr(getattr(request.task, "func", request.task), "keys", None)
    if used is not None and (ignored := [name for name in request.inputs if name not in (*keys, *used)]):
        raise UserError(
            f"{ignored[0]}: this model has no such condition, and the image would not depend on it; expected a model "
            f"trained with a conditioner that reads {ignored[0]}"
        )
    if missing := [name for name in request.keep_conditions if name not in keys]:
        raise UserError(f"keep_conditions={missing[0]}: this model's conditions are {', '.join(keys) or 'none'}")
    if request.classifier_run is not None:
        from ldm.sampling import classifier_guidance

        classifier_guidance.check_latent_space(request.classifier_run, request.source.latent_space)
    if request.weak_run is not None:
        require_same_latent_space(
            (f"guidance.weak={request.weak_run}", open_model(request.weak_run).latent_space),
            ("this model", request.source.latent_space),
            "choose one trained in its latents",
        )


def note_cleaned(model: "LatentDiffusion", request: SampleRequest) -> None:
    """Print one line on the first prompt that diffusers may tokenize differently, for a folder of diffusers."""
    from ldm.checkpoint.external import text_tower
    from ldm.interop.folder import is_folder

    if not is_folder(request.source.folder) or text_tower(model) is None or os.environ.get("RANK", "0") != "0":
        return
    from ldm.conditioner.clip import clean_text

    texts = [caption for caption, _ in request.prompts.values()] + [request.negative or ""]
    for text in dict.fromkeys(texts):
        if (cleaned := clean_text(text)) is not None:
            print(
                f"prompt {text!r} is read as {cleaned!r}, as CLIP was trained; "
                "diffusers with transformers 5 takes typographic quotes and HTML entities as they stand "
                "and draws another image of the same seed",
                file=sys.stderr,
            )
            return


def gather_images(images: "dict[int, Tensor]", most: int) -> "dict[int, Tensor]":
    """Gather the `most` images of the lowest seeds from all processes, by seed; all processes must call it."""
    import torch.distributed as dist

    parts: list[Any] = [dict(list(images.items())[:most])]
    if dist.is_available() and dist.is_initialized():
        parts = parts * dist.get_world_size()
        dist.all_gather_object(parts, parts[0])
    gathered = {seed: image for part in parts for seed, image in part.items()}
    return {seed: gathered[seed] for seed in sorted(gathered)[:most]}


def save_results(request: SampleRequest, images: "dict[int, Tensor]", score: dict[str, Any]) -> float | None:
    """Write grid.png, samples.npz for save=npz, and metrics.json, which holds the scores with everything needed to
    repeat them.

    Samples that are no images are written to samples.npz as the array `samples` (N, C, ...) float32, in the order of
    seeds.
    images: this process's images by seed.  score: the values of `evaluate_samples`.
    Returns the Frechet distance if it was measured; None on all ranks but the first.
    """
    import torch

    from ldm.io.images import make_grid, save_png

    out, seeds = request.output_dir, [request.seed + i for i in request.saved_rows]
    first = gather_images(images, GRID_IMAGES) if request.save != "none" else {}
    is_image = not image_fault(request.source.data_card.shape)
    row_of = {seed: row for row, seed in enumerate(seeds)}
    rows = {row_of[seed]: image for seed, image in images.items()}
    if first and not is_image:
        shape = len(seeds), *next(iter(first.values())).shape
        npz.write_rows(out / "samples.npz", "samples", {row: x.numpy() for row, x in rows.items()}, shape, "float32")
    elif request.save == "npz":
        npz.write_npz(out / "samples.npz", rows, (len(seeds), *next(iter(first.values())).shape[1:]))
    if int(os.environ.get("RANK", 0)):
        return None
    if first and is_image:
        stack = torch.stack(list(first.values()))
        columns = 16 if len(stack) > 64 else max(1, round(len(stack) ** 0.5))
        save_png(out / "grid.png", make_grid(stack, columns, zoom=2))
    options = {name: value for name, value in request.options.items() if name not in UNRECORDED_OPTIONS}
    record = {
        **score,
        "autoencoder": request.source.latent_space,
        "request": map_leaves(options, _as_json),
        "provenance": provenance.provenance(Path(__file__).parent),
    }
    atomic.write_json(out / "metrics.json", record)
    for name, value in score.items():
        if not name.startswith("score/"):
            print(f"{name:<16}{value:.4g}" if isinstance(value, float) else f"{name:<16}{value}")
    if request.reproduce is not None:
        comparison = compare_with_file(Path(request.reproduce).expanduser(), next(iter(images.values())))
        print(f"{request.reproduce}: made again, {comparison}")
    print(f"{len(seeds)} images, seeds {seeds[0]}..{seeds[-1]}, in {out}")
    return next((value for name, value in score.items() if name.startswith("fd_")), None)


def _as_json(leaf: Any) -> Any:
    """Return a leaf of a config as JSON can hold it: an infinite number, as in s_range, is written as in yaml."""
    if isinstance(leaf, float) and not math.isfinite(leaf):
        return {math.inf: ".inf", -math.inf: "-.inf"}.get(leaf, ".nan")
    return leaf


def compare_with_file(path: Path, image: "Tensor") -> str:
    """Describe in words how an image (C, H, W) uint8 differs from a PNG file."""
    import numpy as np
    import torch
    from PIL import Image

    with Image.open(path, formats=("PNG",)) as file:
        before = torch.from_numpy(np.array(file)).reshape(*image.shape[1:], -1).permute(2, 0, 1)
    largest = int((before.int() - image.int()).abs().max())
    return "bit for bit the same" if largest == 0 else f"the largest difference is {largest} of 255 grey levels"
