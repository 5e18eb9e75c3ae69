"""Cached latents of a data set."""

from typing import Any

import torch

from ldm.checkpoint.latent_space import LatentSpace
from ldm.data.latents import read_latents, write_latents
from ldm.errors import UserError
from ldm.io import atomic
from ldm.io.download import cache_dir


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
