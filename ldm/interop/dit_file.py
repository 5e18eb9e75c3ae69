"""Read a released file of DiT or SiT and the first stage of Stable Diffusion next to it as one model."""

import re
from pathlib import Path

from ldm.errors import UserError
from ldm.interop import config_nodes, diffusers, diffusers_config, weights_file
from ldm.interop.dit import import_dit, import_labels, import_sit
from ldm.interop.keymap import State, count
from ldm.interop.pipeline import Pipeline, unknown_data_info, with_scale
from ldm.interop.text_tower import read_config

PATCHES = "x_embedder.proj.weight"  # (channels, z_channels, patch, patch)
# Heads by channels, for S, B, L and XL of both papers; no weight's shape depends on it.
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
STAGE = "vae"  # folder of diffusers' AutoencoderKL next to the file
SCALE = 0.18215  # latent scale in both codes, independent of the first stage's config


def is_dit(state: State) -> bool:
    """Return whether these weights have the names of DiT and SiT."""
    return PATCHES in state and "t_embedder.mlp.0.weight" in state


def load_dit(state: State, path: Path) -> Pipeline:
    """Build the class-conditional model of a released file, with the first stage in the folder `vae` next to it.

    DiT and SiT have the same names and shapes, so the file's name decides, as released: DiT-XL-2-256x256.pt,
    SiT-XL-2-256x256.pt.  Raises UserError if the file has neither name or another width, and if the first stage is
    missing or has other channels.
    """
    kinds = re.findall(r"(?i)(?<![a-z])[ds]it(?![a-z])", path.stem)
    if len(kinds) != 1:
        raise UserError(
            "DiT and SiT have weights of the same names; expected one of the two in the file's name, "
            "as in DiT-XL-2-256x256.pt"
        )
    sit = kinds[0].lower() == "sit"
    channels, z_channels, patch, _ = state[PATCHES].shape
    if channels not in HEADS or "pos_embed" not in state:
        raise UserError(
            f"a network of {channels} channels; expected DiT or SiT of {', '.join(map(str, HEADS))} channels, "
            "with pos_embed"
        )
    stage = path.parent / STAGE
    if not (stage / "config.json").is_file():
        raise UserError(f"no first stage; put diffusers' AutoencoderKL (stabilityai/sd-vae-ft-ema) into {stage}")
    vae, labels = read_config(stage), import_labels(state)
    node = diffusers_config.first_stage(vae)
    if node["z_channels"] != z_channels:
        raise UserError(f"{stage} has {node['z_channels']} latent channels; expected the file's {z_channels}")
    classes = len(labels["embedding.weight"]) - 1
    config = {
        "net": config_nodes.dit(patch, channels, count(r"(?m)^blocks\.(\d+)\.", state), HEADS[channels], sit),
        "autoencoder": node,
        "conditioner": config_nodes.label_vector(classes, channels),
        "schedule": {"_target_": "ldm.diffusion.schedule.Flow", "shift": 1.0}
        if sit
        else config_nodes.betas("linear", 1000, 1e-4, 0.02),
        "prediction": config_nodes.prediction("Flow" if sit else "Eps"),
        "seed": 0,
        **({} if sit else {"learned_variance": True}),
    }
    net = import_sit(state) if sit else import_dit(state)
    size = round(state["pos_embed"].shape[1] ** 0.5) * patch * node["factor"]
    data = unknown_data_info(vae.get("in_channels", 3), size, classes)
    autoencoder = with_scale(diffusers.import_autoencoder(weights_file.read_weights(stage)), SCALE, z_channels)
    return Pipeline(config, net, autoencoder, data, {}, labels)
