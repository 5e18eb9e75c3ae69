"""Read and write pipeline folders of diffusers: model_index.json and a folder per part."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.errors import UserError
from ldm.interop import diffusers, diffusers_config, weights_file
from ldm.interop.pipeline import Pipeline, fold_scale, unknown_data_info, with_scale
from ldm.interop.text_tower import KINDS, kind_of, read_config
from ldm.io import atomic

INDEX = "model_index.json"
MADE_WITH = "0.35.0"  # version of diffusers whose layout is written
WEIGHTS = "diffusion_pytorch_model.safetensors"


def is_folder(path: Path) -> bool:
    """Return whether a folder is a pipeline of diffusers."""
    return (path / INDEX).is_file()


def load(folder: Path) -> Pipeline:
    """Convert a text-to-image or inpainting pipeline of diffusers.

    Raises UserError or CorruptFileError naming the file.
    """
    kinds = {kind.name: kind for kind in KINDS.values()}
    name = read_config(folder, INDEX).get("_class_name")
    if name not in kinds:
        raise UserError(f"{folder / INDEX}: _class_name={name}: expected one of {', '.join(kinds)}")
    stage, net = folder / kinds[name].stage, folder / "unet"
    unet, vae = read_config(net), read_config(stage)
    scheduler = read_config(folder / "scheduler", "scheduler_config.json")
    node = diffusers_config.first_stage(vae)
    kind = kinds[name]
    tower = kind.read(folder / kind.text_folder, folder / "tokenizer")
    z = vae["latent_channels"]
    expected = 2 * z + 1 if "masked_image" in tower.node else z
    if unet["in_channels"] != expected:
        raise UserError(
            f"{net / 'config.json'}: in_channels={unet['in_channels']}; "
            f"expected {expected} for a first stage of {z} channels"
        )
    config = {
        "net": diffusers_config.net(unet),
        "autoencoder": node,
        "conditioner": tower.node,
        "schedule": diffusers_config.schedule(scheduler),
        "prediction": diffusers_config.prediction(scheduler),
        "seed": 0,
    }
    first_stage = diffusers.import_autoencoder(weights_file.read_weights(stage))
    scaled = with_scale(first_stage, vae.get("scaling_factor", 0.18215), z, vae.get("shift_factor") or 0.0)
    data = unknown_data_info(vae.get("in_channels", 3), pixels(unet, node["factor"]))
    return Pipeline(
        config, diffusers.import_unet(weights_file.read_weights(net)), scaled, data, tower.text, tower.conditioner_state
    )


def pixels(unet: Mapping[str, Any], factor: int) -> int:
    """Return the height and width of the images that a U-Net was trained on."""
    side = unet.get("sample_size") or 64
    return factor * (side if isinstance(side, int) else side[0])


def save(pipeline: Pipeline, folder: Path, betas: list[float]) -> None:
    """Write a folder for diffusers' StableDiffusionPipeline, StableDiffusionInpaintPipeline or LDMTextToImagePipeline.

    betas: of the schedule.  Everything is checked before anything is written.
    Raises UserError for a model without a counterpart in diffusers.
    """
    config = pipeline.config
    kind = kind_of(config["conditioner"])
    if "vector.0.weight" in pipeline.net:
        raise UserError(
            "the net also takes a vector condition, which to=diffusers does not support; "
            "expected conditioner=clip_context"
        )
    weights, scale = fold_scale(pipeline.autoencoder)
    channels, *sides = pipeline.data["shape"]
    latent = [side // config["autoencoder"]["factor"] for side in sides]
    tower = kind.write(pipeline)
    ends = pipeline.net["stem.weight"].shape[1], pipeline.net["out.2.weight"].shape[0]
    parts = {
        "unet": (
            diffusers_config.export_net(config["net"], *ends, tower.dim, latent),
            diffusers.export_unet(pipeline.net),
        ),
        kind.stage: (
            diffusers_config.export_first_stage(config["autoencoder"], channels, scale, sides),
            diffusers.export_autoencoder(weights),
        ),
    }
    scheduler = diffusers_config.export_schedule(config["schedule"], config["prediction"], betas)
    version = {"_diffusers_version": MADE_WITH}
    for part, (part_config, state) in parts.items():
        atomic.write_json(folder / part / "config.json", {**part_config, **version})
        atomic.write_tensors(folder / part / WEIGHTS, state, {"format": "pt"})
    atomic.write_json(folder / kind.text_folder / "config.json", tower.config)
    atomic.write_tensors(folder / kind.text_folder / "model.safetensors", tower.state, {"format": "pt"})
    for name, content in tower.words.items():
        atomic.write_text(folder / "tokenizer" / name, content)
    atomic.write_json(folder / "scheduler" / "scheduler_config.json", {**scheduler, **version})
    index = {
        **{"_class_name": kind.name, **version, **kind.more},
        **{part: ["diffusers", str(part_config["_class_name"])] for part, (part_config, _) in parts.items()},
        **{
            "scheduler": ["diffusers", "DDIMScheduler"],
            kind.text_folder: tower.listed[0],
            "tokenizer": tower.listed[1],
        },
    }
    atomic.write_json(folder / INDEX, index)
