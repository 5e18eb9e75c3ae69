"""Choice of first stage and network for a person's own images: a published first stage if its weights are on disk."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ldm.data.shape import parse_size
from ldm.errors import UserError
from ldm.io.download import cache_dir
from ldm.tensors import divide_sides

# first stages that are used where the Hugging Face hub's library has downloaded them, the best first
KNOWN_VAES = (
    *("stabilityai/sd-vae-ft-mse", "stabilityai/sd-vae-ft-ema", "stable-diffusion-v1-5/stable-diffusion-v1-5/vae"),
    *("runwayml/stable-diffusion-v1-5/vae", "CompVis/stable-diffusion-v1-4/vae"),
)
MIN_LATENT_SIZE = 8  # positions per side of a latent; fewer carry too little of an image
MAX_SMALL_LATENT = 16  # positions per side up to which the experiment's own network is large enough


def choose_first_stage_and_net(cfg: Any, pretrained: str = "auto", large: str | None = None) -> str:
    """Set the first stage and the network of a config that suit its images, unless the command line names them.

    pretrained: auto, never, or a folder with an autoencoder in diffusers' layout.  large: option of net= for a GPU and
    large latents.  Returns a message that says which were chosen, and why.  Raises UserError for a folder that is not
    suitable.
    """
    message = f"first stage {_first_stage(cfg, pretrained)}"
    height, width = divide_sides(parse_size(cfg.data.size), cfg.autoencoder.get("factor", 1))
    if (
        large is not None
        and torch.cuda.is_available()
        and max(height, width) > MAX_SMALL_LATENT
        and not _was_overridden("net")
    ):
        cfg.net = _net(large)
        message += f"\nnet         {large}, for latents of {height} x {width}"
    return message


def _first_stage(cfg: Any, pretrained: str) -> str:
    """Set cfg.autoencoder and cfg.first_stage; return the choice and its reason."""
    if _was_overridden("autoencoder", "first_stage"):
        return "as typed"
    if pretrained == "never":
        return "its own (auto.pretrained=never)"
    folders = list(find_pretrained_autoencoders()) if pretrained == "auto" else [Path(pretrained).expanduser()]
    reasons = []
    for folder in folders:
        try:
            cfg.autoencoder, cfg.first_stage = pretrained_config(folder, cfg.data.size, cfg.data.channels)
        except UserError as error:
            if pretrained != "auto":
                raise UserError(f"auto.pretrained={error}") from None
            reasons.append(str(error))
        else:
            return f"pretrained, {folder}, factor {cfg.autoencoder.factor}, {cfg.autoencoder.z_channels} channels"
    default = f"no pretrained one in {cache_dir() / 'autoencoder'}/*, nor among the Hugging Face hub's"
    return f"its own ({'; '.join(reasons) or default})"


def _net(option: str) -> Any:
    """Return the node of an option of net=. Raises UserError for an option that does not exist."""
    from ldm.config.compose import compose_option

    try:
        return compose_option("net", option)
    except UserError as error:
        choices = str(error).partition("no such option")[2]
        raise UserError(f"auto.large={option}: expected an option of net={choices}") from None


def find_pretrained_autoencoders() -> Iterator[Path]:
    """Yield folders with a first stage in diffusers' layout: those in the cache, then the hub library's downloads."""
    yield from sorted(config.parent for config in (cache_dir() / "autoencoder").glob("*/config.json"))
    home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    hub = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    for name in KNOWN_VAES:
        owner, repository, *inner = name.split("/")
        snapshots = sorted(hub.glob(f"models--{owner}--{repository}/snapshots/*"))
        folders = [snapshot.joinpath(*inner) for snapshot in snapshots]
        yield from (folder for folder in folders if (folder / "config.json").is_file())


def pretrained_config(folder: Path, size: int | Sequence[int], channels: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the nodes autoencoder and first_stage for the first stage in a folder.

    size: of the images in pixels, one number or [height, width].
    Raises UserError for a folder without one, or one that does not suit such images.
    """
    from ldm.interop import diffusers_config
    from ldm.interop.text_tower import read_config
    from ldm.recipes import pretrained_autoencoder

    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder}: no config.json there; expected a folder with an AutoencoderKL as diffusers saves it"
        )
    config = read_config(folder)
    try:
        node = diffusers_config.first_stage(config)
    except KeyError as error:
        raise UserError(f"{folder}: its config.json has no {error}; expected an AutoencoderKL's") from None
    if config.get("in_channels", 3) != channels:
        raise UserError(f"{folder}: for images of {config.get('in_channels', 3)} channels, these have {channels}")
    factor = node["factor"]
    if wrong := [side for side in parse_size(size) if side % factor or side // factor < MIN_LATENT_SIZE]:
        latent = f"{wrong[0] / factor:g}"
        raise UserError(f"{folder}: of factor {factor}, images of {size} px give latents of {latent} on a side")
    return node, pretrained_autoencoder.config_node(folder)


def _was_overridden(*names: str) -> bool:
    """Return whether the command line sets one of these parts of the config, or a key in it."""
    from hydra.core.hydra_config import HydraConfig

    words = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    keys = {word.lstrip("+~").partition("=")[0] for word in words}
    return any(
        key == name or key.startswith((f"{name}.", f"{name}@")) or key.endswith(f"@{name}")
        for key in keys
        for name in names
    )
