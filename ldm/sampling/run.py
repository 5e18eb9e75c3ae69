"""Execute a sampling request: sample the images by seed and save them with the record that reproduces them."""

import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ldm.checkpoint.latent_space import require_same_latent_space
from ldm.checkpoint.load import open_model
from ldm.checkpoint.weights import hash_model
from ldm.config.build import to_container
from ldm.config.tree import map_leaves
from ldm.errors import UserError
from ldm.io import atomic, npz
from ldm.media.files import picture_of
from ldm.media.medium import Medium
from ldm.runs import identity, provenance
from ldm.sampling.request import SampleRequest

if TYPE_CHECKING:
    from torch import Tensor

    from ldm.diffusion.sampler import Sampler
    from ldm.model import LatentDiffusion

UNRECORDED_OPTIONS = (
    "trainer",
    "output_dir",
    "save",
    "medium",
    "vocoder",
)  # what metrics.json leaves out of the request
GRID_IMAGES = 400  # images in grid.png at most


def generate_images(
    model: "LatentDiffusion",
    request: SampleRequest,
    wrap_sampler: "Callable[[Sampler], Sampler]" = lambda sampler: sampler,
) -> "dict[int, Tensor]":
    """Sample this process's share of the images and return them as seed -> (C, H, W) uint8, each saved by the request's
    medium when its batch is complete; samples that are no images as seed -> (C, ...) float32.

    wrap_sampler: applied to the request's sampler, to observe it (see SamplerMonitor).
    Raises UserError before sampling if the request does not fit the model.
    """
    from ldm.autoencoder.tiled import Tiled
    from ldm.io.images import to_uint8
    from ldm.io.progress import ProgressBar
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
    if request.fault and request.save != "none" and os.environ.get("RANK", "0") == "0":
        print(f"{request.fault}: they are written to samples.npz")
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
        saves = request.save == "all" and not request.fault
        record = request.reproduction_record(batch, weights) if saves else {}
        for position, (i, sample) in enumerate(zip(batch["index"], image.cpu(), strict=True)):
            if i not in request.saved_rows:
                continue
            seed = request.seed + i
            images[seed] = to_uint8(sample) if request.is_image else sample
            if saves:
                text = {
                    "prompt": batch["caption"][position] if "caption" in batch else "",
                    "seed": str(seed),
                    "run": request.run,
                    "config": config,
                    "reproduce": json.dumps({**record, "row": i}, ensure_ascii=False),
                }
                rate = request.source.data_card.rate
                request.medium.write(
                    request.output_dir / f"{seed:06d}", sample, text | ({} if rate is None else {"rate": str(rate)})
                )
        bar.update(len(images))
    return images


def check_conditions(model: "LatentDiffusion", request: SampleRequest) -> None:
    """Check that the model accepts every condition in `request`.

    Raises UserError if the request has a prompt, a size, an input or a `keep_conditions` entry that neither the model's
    conditioner nor the task uses, or if the guidance classifier or the weak model for autoguidance was trained in a
    different latent space.
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
    queries = [key for part in model.conditioner.modules() for key in getattr(part, "query_keys", ())]
    if used is not None and (ignored := [name for name in request.inputs if name not in (*keys, *queries, *used)]):
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

    Samples that are no images are in samples.npz as the array `samples` (N, C, ...) float32, in the order of seeds; it
    is also written for samples that their medium cannot show.
    images: this process's images by seed.  score: the values of `evaluate_samples`.
    Returns the Frechet distance if it was measured; None on all ranks but the first.
    """
    from ldm.io.images import save_png, to_float, to_uint8

    out, seeds = request.output_dir, [request.seed + i for i in request.saved_rows]
    first = gather_images(images, GRID_IMAGES) if request.save != "none" else {}
    row_of = {seed: row for row, seed in enumerate(seeds)}
    rows = {row_of[seed]: image for seed, image in images.items()}
    if first and (request.save == "npz" or request.fault):
        shape = next(iter(first.values())).shape
        if request.is_image:
            npz.write_npz(out / "samples.npz", rows, (len(seeds), *shape[1:]))
        else:
            arrays = {row: sample.numpy() for row, sample in rows.items()}
            npz.write_rows(out / "samples.npz", "samples", arrays, (len(seeds), *shape), "float32")
    if int(os.environ.get("RANK", 0)):
        return None
    if first and not request.fault:
        columns = 16 if len(first) > 64 else max(1, round(len(first) ** 0.5))
        sheet = request.medium.sheet([to_float(image) for image in first.values()], columns)
        save_png(out / "grid.png", to_uint8(sheet))
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
        path, image = Path(request.reproduce).expanduser(), next(iter(images.values()))
        comparison = compare_with_file(path, image, request.medium)
        print(f"{request.reproduce}: made again, {comparison}")
    print(f"{len(seeds)} images, seeds {seeds[0]}..{seeds[-1]}, in {out}")
    return next((value for name, value in score.items() if name.startswith("fd_")), None)


def _as_json(leaf: Any) -> Any:
    """Return a leaf of a config as JSON can hold it: an infinite number, as in s_range, is written as in yaml."""
    if isinstance(leaf, float) and not math.isfinite(leaf):
        return {math.inf: ".inf", -math.inf: "-.inf"}.get(leaf, ".nan")
    return leaf


def compare_with_file(path: Path, sample: "Tensor", medium: Medium) -> str:
    """Describe in words how the picture of a sample, (C, ...) uint8 or in [-1, 1], differs from that of a file.

    path: the sample's picture, or another of its files.
    """
    import numpy as np
    from PIL import Image

    from ldm.io.images import to_float

    def pixels(file: Path) -> Any:
        with Image.open(file, formats=("PNG",)) as picture:
            return np.array(picture).astype(int)

    with TemporaryDirectory() as folder:
        medium.write(Path(folder) / path.stem, to_float(sample), {})
        before, after = pixels(picture_of(path.with_suffix(""))), pixels(picture_of(Path(folder) / path.stem))
    if before.shape != after.shape:
        return (
            f"its picture is {after.shape[1]} x {after.shape[0]} pixels, it was {before.shape[1]} x {before.shape[0]}"
        )
    largest = abs(before - after).max()
    return "bit for bit the same" if largest == 0 else f"the largest difference is {largest} of 255 grey levels"
