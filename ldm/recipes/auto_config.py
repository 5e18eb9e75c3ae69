"""What a training on somebody's own images begins with: a first stage that others trained, where its weights are there, and a net."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ldm.errors import UserError
from ldm.io.download import cache_dir

KNOWN_VAES = (  # first stages of the Hugging Face hub that are taken where its own library has fetched them, the best first
    *("stabilityai/sd-vae-ft-mse", "stabilityai/sd-vae-ft-ema", "stable-diffusion-v1-5/stable-diffusion-v1-5/vae"),
    *("runwayml/stable-diffusion-v1-5/vae", "CompVis/stable-diffusion-v1-4/vae"),
)
MIN_LATENT_SIZE = 8  # places on a side of a latent: fewer say too little of an image
MAX_SMALL_LATENT = 16  # and up to so many the experiment's own net serves


def choose_first_stage_and_net(cfg: Any, pretrained: str = "auto", large: str | None = None) -> str:
    """Give a settled config the first stage and the net that suit its images, unless they were typed; returns in words which, and why.

    pretrained: auto, never, or a folder with an autoencoder in diffusers' layout.  large: option of net= for a GPU and large latents.
    Raises UserError for a folder that does not serve.
    """
    said = f"first stage {_first_stage(cfg, pretrained)}"
    side = cfg.data.size // cfg.autoencoder.get("factor", 1)
    if large is not None and torch.cuda.is_available() and side > MAX_SMALL_LATENT and not _was_overridden("net"):
        cfg.net = _net(large)
        said += f"\nnet         {large}, for latents of {side} x {side}"
    return said


def _first_stage(cfg: Any, pretrained: str) -> str:
    if _was_overridden("autoencoder", "first_stage"):
        return "as typed"
    if pretrained == "never":
        return "its own (auto.pretrained=never)"
    places = list(find_pretrained_autoencoders()) if pretrained == "auto" else [Path(pretrained).expanduser()]
    reasons = []
    for place in places:
        try:
            cfg.autoencoder, cfg.first_stage = pretrained_config(place, cfg.data.size, cfg.data.channels)
        except UserError as error:
            if pretrained != "auto":
                raise UserError(f"auto.pretrained={error}") from None
            reasons.append(str(error))
        else:
            return f"pretrained, {place}, factor {cfg.autoencoder.factor}, {cfg.autoencoder.z_channels} channels"
    nowhere = f"no pretrained one in {cache_dir() / 'autoencoder'}/*, nor among the Hugging Face hub's"
    return f"its own ({'; '.join(reasons) or nowhere})"


def _net(option: str) -> Any:
    """Return the node of an option of net=. Raises UserError for an option that does not exist."""
    from ldm.config.compose import compose_option

    try:
        return compose_option("net", option)
    except UserError as error:
        choices = str(error).partition("no such option")[2]
        raise UserError(f"auto.large={option}: expected an option of net={choices}") from None


def find_pretrained_autoencoders() -> Iterator[Path]:
    """Folders with a first stage in diffusers' layout: those in the cache by name, then what the Hugging Face hub's library has fetched."""
    yield from sorted(config.parent for config in (cache_dir() / "autoencoder").glob("*/config.json"))
    home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    for name in KNOWN_VAES:
        owner, repository, *inner = name.split("/")
        places = hub.glob(f"models--{owner}--{repository}/snapshots/*")
        yield from (
            place.joinpath(*inner) for place in sorted(places) if place.joinpath(*inner, "config.json").is_file()
        )


def pretrained_config(place: Path, size: int, channels: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The nodes autoencoder and first_stage for the first stage in a folder. Raises UserError where it does not suit such images."""
    from ldm.interop import diffusers_config
    from ldm.interop.text_tower import read_config
    from ldm.recipes import pretrained_autoencoder

    if not (place / "config.json").is_file():
        raise UserError(f"{place}: no config.json there; expected a folder with an AutoencoderKL as diffusers saves it")
    given = read_config(place)
    try:
        node = diffusers_config.first_stage(given)
    except KeyError as error:
        raise UserError(f"{place}: its config.json has no {error}; expected an AutoencoderKL's") from None
    if given.get("in_channels", 3) != channels:
        raise UserError(f"{place}: for images of {given.get('in_channels', 3)} channels, these have {channels}")
    if size % node["factor"] or size // node["factor"] < MIN_LATENT_SIZE:
        raise UserError(
            f"{place}: of factor {node['factor']}, images of {size} px give latents of {size / node['factor']:g} on a side"
        )
    return node, pretrained_autoencoder.config_node(place)


def _was_overridden(*names: str) -> bool:
    """Whether the command line says anything of these parts of the config."""
    from hydra.core.hydra_config import HydraConfig

    words = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    keys = {word.lstrip("+~").partition("=")[0] for word in words}
    return any(
        key == name or key.startswith((f"{name}.", f"{name}@")) or key.endswith(f"@{name}")
        for key in keys
        for name in names
    )
