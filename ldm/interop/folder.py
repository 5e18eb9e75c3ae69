"""A diffusers pipeline folder: model_index.json and a folder for each part, read and written."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.errors import UserError
from ldm.interop import diffusers, diffusers_config, weights_file
from ldm.interop.pipeline import Pipeline, fold_scale, unknown_data_info, with_scale
from ldm.interop.text_tower import KINDS, kind_of, read_config
from ldm.io import atomic

INDEX = "model_index.json"
MADE_WITH = "0.35.0"  # of diffusers: whose layout this is
WEIGHTS = "diffusion_pytorch_model.safetensors"


def is_folder(path: Path) -> bool:
    """Whether this is a whole pipeline of diffusers."""
    return (path / INDEX).is_file()


def load(folder: Path) -> Pipeline:
    """A text-to-image or inpainting pipeline of diffusers as ours. Raises UserError, CorruptFileError naming the file."""
    named = {kind.name: kind for kind in KINDS.values()}
    name = read_config(folder, INDEX).get("_class_name")
    if name not in named:
        raise UserError(f"{folder / INDEX}: _class_name={name}: expected one of {', '.join(named)}")
    stage, net = folder / named[name].stage, folder / "unet"
    unet, vae = read_config(net), read_config(stage)
    scheduler = read_config(folder / "scheduler", "scheduler_config.json")
    node = diffusers_config.first_stage(vae)
    heard = named[name].read(folder / named[name].text_folder, folder / "tokenizer")
    z = vae["latent_channels"]
    expected = 2 * z + 1 if "masked_image" in heard.node else z
    if unet["in_channels"] != expected:
        raise UserError(
            f"{net / 'config.json'}: in_channels={unet['in_channels']}; expected {expected} for a first stage of {z} channels"
        )
    config = {
        "net": diffusers_config.net(unet),
        "autoencoder": node,
        "conditioner": heard.node,
        "schedule": diffusers_config.schedule(scheduler),
        "prediction": diffusers_config.prediction(scheduler),
        "seed": 0,
    }
    first_stage = diffusers.import_autoencoder(weights_file.read_weights(stage))
    scaled = with_scale(first_stage, vae.get("scaling_factor", 0.18215), z, vae.get("shift_factor") or 0.0)
    data = unknown_data_info(vae.get("in_channels", 3), pixels(unet, node["factor"]))
    return Pipeline(
        config, diffusers.import_unet(weights_file.read_weights(net)), scaled, data, heard.text, heard.conditioner_state
    )


def pixels(unet: Mapping[str, Any], factor: int) -> int:
    """Height and width of the images that a U-Net was trained on."""
    side = unet.get("sample_size") or 64
    return factor * (side if isinstance(side, int) else side[0])


def save(pipeline: Pipeline, folder: Path, betas: list[float]) -> None:
    """Write a folder that diffusers' StableDiffusionPipeline, its Inpaint one or LDMTextToImagePipeline opens; betas: of the schedule.

    Everything is checked before anything is written.  Raises UserError for a model that diffusers has no counterpart for.
    """
    config = pipeline.config
    kind = kind_of(config["conditioner"])
    if "vector.0.weight" in pipeline.net:
        raise UserError(
            "the net is told a vector too, which to=diffusers has no place for; expected conditioner=clip_context"
        )
    weights, scale = fold_scale(pipeline.autoencoder)
    size, channels = pipeline.data["size"], pipeline.data["channels"]
    told = kind.write(pipeline)
    ends = pipeline.net["stem.weight"].shape[1], pipeline.net["out.2.weight"].shape[0]
    parts = {
        "unet": (
            diffusers_config.export_net(config["net"], *ends, told.dim, size // config["autoencoder"]["factor"]),
            diffusers.export_unet(pipeline.net),
        ),
        kind.stage: (
            diffusers_config.export_first_stage(config["autoencoder"], channels, scale, size),
            diffusers.export_autoencoder(weights),
        ),
    }
    scheduler = diffusers_config.export_schedule(config["schedule"], config["prediction"], betas)
    made = {"_diffusers_version": MADE_WITH}
    for part, (said, state) in parts.items():
        atomic.write_json(folder / part / "config.json", {**said, **made})
        atomic.write_tensors(folder / part / WEIGHTS, state, {"format": "pt"})
    atomic.write_json(folder / kind.text_folder / "config.json", told.config)
    atomic.write_tensors(folder / kind.text_folder / "model.safetensors", told.state, {"format": "pt"})
    for name, content in told.words.items():
        atomic.write_text(folder / "tokenizer" / name, content)
    atomic.write_json(folder / "scheduler" / "scheduler_config.json", {**scheduler, **made})
    index = {
        **{"_class_name": kind.name, **made, **kind.more},
        **{part: ["diffusers", str(said["_class_name"])] for part, (said, _) in parts.items()},
        **{"scheduler": ["diffusers", "DDIMScheduler"], kind.text_folder: told.listed[0], "tokenizer": told.listed[1]},
    }
    atomic.write_json(folder / INDEX, index)
