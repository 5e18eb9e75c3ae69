"""A whole small model of Stable Diffusion's shape, drawn at random: ADM U-Net, conventional KL-f4, CLIP-layout text
tower.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import OmegaConf
from seeded import fill, numbers

from ldm.checkpoint.external import text_tower
from ldm.config import build
from ldm.diffusion import grids
from ldm.diffusion.guidance import cfg
from ldm.diffusion.sampler import ddim
from ldm.interop import config_nodes
from ldm.interop.pipeline import Pipeline, unknown_data_info
from ldm.interop.text import NOT_TEXT

IMAGE = {"image_size": 16, "layers": 1, "width": 16, "patch_size": 16, "head_width": 16}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 3}
PROMPT = "a photo of a sneaker, isn't it? (v2)"
START = numbers("start", (1, 4, 8, 8))


@dataclass
class Card:
    classes = ("image",)
    shape = (3, 32, 32)


def whole(
    folder: Path, layer: int = -1, pad: int = 49407, per_channel: bool = True, inpaints: bool = False
) -> Pipeline:
    """A pipeline whose every weight is drawn by its name; folder: where the tower's config goes."""
    tower = folder / f"tower{-layer}.json"
    tower.write_text(json.dumps({"embed_dim": 8, "vision_cfg": IMAGE, "text_cfg": TEXT, "quick_gelu": layer == -1}))
    config = {
        "net": config_nodes.unet(32, (1, 2), 1, (1, 2), config_nodes.transformer(layer == -1), heads=4, groups=16),
        "autoencoder": config_nodes.first_stage(4, 16, (1, 2, 2), 1, groups=8),
        "conditioner": config_nodes.clip(str(tower), layer, pad),
        "schedule": config_nodes.betas("scaled_linear", 1000, 0.00085, 0.012),
        "prediction": config_nodes.prediction("Eps" if layer == -1 else "V"),
        "seed": 0,
    }
    config["conditioner"] = config_nodes.inpainting(config["conditioner"]) if inpaints else config["conditioner"]
    built = OmegaConf.create(config)
    config_nodes.encoder_of(built.conditioner).random = True
    stage = fill(build.build_autoencoder(built.autoencoder, 3))
    if inpaints:  # diffusers draws the masked image's latent from its posterior: here a point
        torch.nn.init.zeros_(stage.encoder.moments.weight[4:].data)
        stage.encoder.moments.bias.data[4:] = -30.0
    stage.scale.copy_(torch.tensor([0.9, 1.1, 0.7, 1.3]) if per_channel else torch.full((4,), 0.18215))
    stage.shift.copy_(torch.tensor([0.1, -0.2, 0.0, 0.3]) * per_channel)
    model = build.build_model(built, stage, Card)
    text = {name: value for name, value in fill(text_tower(model)).state_dict().items() if name not in NOT_TEXT}
    return Pipeline(
        config, fill(model.denoiser.net).state_dict(), stage.state_dict(), unknown_data_info(3, 32), text, {}
    )


@torch.inference_mode()
def drawn(model, steps: int = 5, scale: float = 3.0, **hole: torch.Tensor) -> torch.Tensor:
    """Our image in [0, 1] from START, with diffusers' DDIM grid for Stable Diffusion. hole: image and mask, for a model
    that inpaints.
    """
    denoiser = model.denoiser
    told, untold = model.condition({"caption": [PROMPT], **hole}), model.condition({"caption": [""], **hole})
    ts = grids.replace_end(grids.leading(denoiser.schedule, steps, offset=1), 1 / 1000)
    z = ddim(cfg(denoiser, told, untold, scale=scale), denoiser.schedule, START, ts, lambda x: x)
    return (model.decode(z) + 1) / 2
