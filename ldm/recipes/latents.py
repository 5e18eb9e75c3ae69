"""Latents of a data set: read from a cache, or computed from its images in each training step."""

from typing import Any

import torch
from hydra.utils import get_object

from ldm.checkpoint.latent_space import LatentSpace
from ldm.data.latents import LatentDataset, read_latents, write_latents
from ldm.data.shape import format_size
from ldm.data.stream import length_of
from ldm.errors import UserError
from ldm.io import atomic
from ldm.io.download import cache_dir


def check_latents(cfg: Any, data: Any) -> None:
    """Check that the data can be trained on with cfg.training.latents, and scored by cfg.metrics.

    Raises UserError, naming the remedy, for cached latents of images that change in each epoch or have no end, or of a
    first stage that is trained, and for metrics that compare samples with all images, or with images of another size.
    """
    if trains_first_stage(cfg):
        for key, value, reason in (
            ("training.latents", "cached", "its latents change in each step; choose training.latents=online"),
            ("trainer.strategy", "fsdp", "it is not sharded; choose trainer=ddp"),
        ):
            group, name = key.split(".")
            if cfg[group].get(name) == value:
                raise UserError(f"{key}={value}: this objective trains the first stage, and {reason}")
        if cfg.get("adapter"):
            raise UserError("adapter=: this objective trains the first stage, and an adapter freezes it; leave it out")
    scored, length = "_target_" in cfg["metrics"], length_of(data)
    if cfg["training"]["latents"] == "cached" and (changes := getattr(data, "changed_by", [])):
        raise UserError(
            f"{changes[0]}: cached latents are those of each image and of its mirror image; "
            "choose training.latents=online, or leave it out"
        )
    if length is None:
        if cfg["training"]["latents"] == "cached":
            raise UserError(
                "training.latents=cached: these data have no length, and all images are encoded before the first step; "
                "choose training.latents=online"
            )
        if scored:
            raise UserError(
                "metrics: these data have no length, and samples are compared with all images; choose metrics=none"
            )
    if scored and (stored := getattr(data, "stored_shape", data.shape)) != data.shape:
        size, stored = (format_size(shape[1:]) for shape in (data.shape, stored))
        raise UserError(
            f"metrics: samples of {size} px, as augmentation.crop makes them, would be compared with images of "
            f"{stored} px; choose metrics=none, or a crop of {stored} px"
        )


def trains_first_stage(cfg: Any) -> bool:
    """Return whether the config's objective is a JointObjective."""
    return bool(getattr(get_object(cfg["objective"]["_target_"]), "trains_first_stage", False))


def training_data(latents: str, autoencoder: Any, space: LatentSpace, data: Any, image: bool) -> Any:
    """Return the data set that training steps read: with cached moments, or as it is, to be encoded in the steps.

    latents: cached or online.  image: whether batches with cached moments have the image too.
    """
    return data if latents == "online" else LatentDataset(data, cached_moments(autoencoder, space, data), image)


def cached_moments(autoencoder, space: LatentSpace, data) -> Any:
    """Read the data set's posterior moments (flips, N, 2C, h, w) from the cache, computed now if they are not there.

    Those of a data set of several shapes are joined.  Raises UserError for a file of another autoencoder or data set.
    """
    from filelock import FileLock

    if hasattr(data, "joined"):
        return data.joined([cached_moments(autoencoder, space, part) for part in data.parts])
    name = f"{data.fingerprint}-{space.identity[:16]}-{'both' if data.flip else 'plain'}.safetensors"
    path = cache_dir() / "latents" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if not path.is_file():
            autoencoder.to("cuda" if torch.cuda.is_available() else "cpu")
            write_latents(path, autoencoder, data, {**space.metadata, "data": data.fingerprint})
            autoencoder.to("cpu")
    metadata, remedy = atomic.read_metadata(path), "remove it, and the same command computes the right ones"
    space.require_same(metadata, path, remedy)
    if metadata.get("data") != data.fingerprint:
        raise UserError(f"{path} holds latents of the data {metadata.get('data')}, not of {data.fingerprint}; {remedy}")
    return read_latents(path)
