"""A diffusers pipeline folder: model_index.json and a folder for each part, read and written."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm import durable
from ldm.errors import UserError
from ldm.interop import clip_config, diffusers, diffusers_config, nodes, read, text
from ldm.interop.pipeline import Pipeline, one_scale, unseen, with_scale

INDEX = "model_index.json"
MADE_WITH = "0.35.0"  # of diffusers: whose layout this is
PLACES = {  # the folder of each part, by the pipeline's class: first stage, U-Net, text tower
    "StableDiffusionPipeline": ("vae", "unet", "text_encoder"),
    "StableDiffusionInpaintPipeline": ("vae", "unet", "text_encoder"),
}


def is_folder(path: Path) -> bool:
    """Whether this is a whole pipeline of diffusers."""
    return (path / INDEX).is_file()


def config_in(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """A part's config. Raises UserError for a part that is not there, DamagedError for one that is no JSON object."""
    path = folder / name
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a whole pipeline folder of diffusers")
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise durable.DamagedError(f"{path} is damaged ({error}); fetch it again") from None


def load(folder: Path) -> Pipeline:
    """A Stable Diffusion pipeline of diffusers as ours. Raises UserError, DamagedError naming the file."""
    kind = config_in(folder, INDEX).get("_class_name")
    if kind not in PLACES:
        raise UserError(f"{folder / INDEX}: _class_name={kind}: expected one of {', '.join(PLACES)}")
    stage, net, told = (folder / place for place in PLACES[kind])
    unet, vae = config_in(net), config_in(stage)
    scheduler = config_in(folder / "scheduler", "scheduler_config.json")
    node = diffusers_config.first_stage(vae)
    conditioner, tower = text_of(told, folder / "tokenizer")
    if unet["in_channels"] != vae["latent_channels"]:
        raise UserError(f"{net / 'config.json'}: in_channels={unet['in_channels']}; expected the first stage's {vae['latent_channels']}")
    size = vae_size(unet, node["factor"])
    config = {
        "net": diffusers_config.net(unet),
        "autoencoder": node,
        "conditioner": conditioner,
        "schedule": diffusers_config.schedule(scheduler),
        "prediction": diffusers_config.prediction(scheduler),
        "seed": 0,
    }
    first_stage = diffusers.import_autoencoder(read.weights(stage))
    scaled = with_scale(first_stage, vae.get("scaling_factor", 0.18215), vae["latent_channels"], vae.get("shift_factor") or 0.0)
    return Pipeline(config, diffusers.import_unet(read.weights(net)), scaled, unseen(vae.get("in_channels", 3), size), tower, {})


def vae_size(unet: Mapping[str, Any], factor: int) -> int:
    """Height and width in pixels of the images that a U-Net was trained on."""
    side = unet.get("sample_size") or 64
    return factor * (side if isinstance(side, int) else side[0])


def text_of(folder: Path, tokenizer: Path) -> tuple[nodes.Node, dict[str, Any]]:
    """Our conditioner, and the text tower's weights in open_clip's names, of transformers' CLIPTextModel."""
    given = config_in(folder)
    config, state = clip_config.of_transformers(given.get("text_config", given)), text.import_text(read.weights(folder))
    special = config_in(tokenizer, "special_tokens_map.json").get("pad_token", "<|endoftext|>")
    pad = clip_config.END if (special["content"] if isinstance(special, dict) else special) == "<|endoftext|>" else 0
    name, layer = clip_config.named(config) or (clip_config.written(config), -1)
    return nodes.clip(name, layer, pad, config["text_cfg"]["context_length"]), state


def save(pipeline: Pipeline, folder: Path, betas: list[float]) -> None:
    """Write a folder that diffusers.StableDiffusionPipeline opens; betas: of the schedule.

    Everything is checked before anything is written.  Raises UserError for a model that diffusers has no counterpart for.
    """
    config = pipeline.config
    clip = config["conditioner"].get("encoder", {})
    if not pipeline.text or not str(clip.get("_target_")).endswith(".CLIP"):
        raise UserError(f"conditioner={config['conditioner'].get('_target_')}: to=diffusers expects a CLIP text tower")
    if "vector.0.weight" in pipeline.net:
        raise UserError(
            "the net is told a vector beside the tokens, which to=diffusers has no place for; train with conditioner=clip_context"
        )
    weights, scale = one_scale(pipeline.autoencoder)
    stem, last = pipeline.net["stem.weight"], pipeline.net["out.2.weight"]
    open_clip = clip_config.open_clip_config(clip["model"])
    depth = open_clip["text_cfg"]["layers"] + clip["layer"] + 1
    size, channels = pipeline.data["size"], pipeline.data["channels"]
    width = int(open_clip["text_cfg"]["width"])
    parts: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
        "unet": (
            diffusers_config.export_net(config["net"], stem.shape[1], last.shape[0], width, size // config["autoencoder"]["factor"]),
            "diffusion_pytorch_model.safetensors",
            diffusers.export_unet(pipeline.net),
        ),
        "vae": (
            diffusers_config.export_first_stage(config["autoencoder"], channels, scale, size),
            "diffusion_pytorch_model.safetensors",
            diffusers.export_autoencoder(weights),
        ),
        "text_encoder": (
            clip_config.to_transformers(open_clip, depth, clip["pad"]),
            "model.safetensors",
            text.export_text(pipeline.text, depth),
        ),
    }
    scheduler = diffusers_config.export_schedule(config["schedule"], config["prediction"], betas)
    words = clip_config.tokenizer_files(clip["pad"], open_clip["text_cfg"]["context_length"])
    for part, (said, name, state) in parts.items():
        versions = {"_diffusers_version": MADE_WITH} if part != "text_encoder" else {}
        durable.write_json(folder / part / "config.json", {**said, **versions})
        durable.write_tensors(folder / part / name, state, {"format": "pt"})
    for name, content in words.items():
        durable.write_text(folder / "tokenizer" / name, content)
    durable.write_json(folder / "scheduler" / "scheduler_config.json", {**scheduler, "_diffusers_version": MADE_WITH})
    durable.write_json(
        folder / INDEX,
        {
            "_class_name": "StableDiffusionPipeline",
            "_diffusers_version": MADE_WITH,
            "feature_extractor": [None, None],
            "image_encoder": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", "DDIMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", str(parts["vae"][0]["_class_name"])],
        },
    )
