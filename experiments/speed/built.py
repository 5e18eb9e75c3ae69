"""The same network twice, diffusers' and ours, with the same weights."""

from typing import Any, NamedTuple

import torch
from hydra.utils import instantiate
from torch import Tensor, nn

from ldm.condition import Condition
from ldm.interop import diffusers as names
from ldm.interop import diffusers_config

UNETS: dict[str, dict[str, Any]] = {  # as UNet2DConditionModel has them
    "small": {
        **{"block_out_channels": (64, 128, 256), "layers_per_block": 2, "cross_attention_dim": 512, "attention_head_dim": 8},
        **{"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")},
        **{"up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")},
    },
    "tiny": {
        **{"block_out_channels": (32, 64), "layers_per_block": 1, "cross_attention_dim": 32, "attention_head_dim": 4},
        **{"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")},
    },
    "sd1": {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768, "attention_head_dim": 8},
}
VAES: dict[str, dict[str, Any]] = {  # as AutoencoderKL
    "tiny": {"block_out_channels": (32, 32), "layers_per_block": 1},
    "small": {"block_out_channels": (64, 128, 256), "layers_per_block": 1},
    "sd1": {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2},
}
STATISTICS = ("shift", "scale")  # of our latents, which diffusers keeps in a config


class Pair(NamedTuple):
    ours: Any
    theirs: Any

    def to(self, device: str) -> "Pair":
        return Pair(self.ours.to(device), self.theirs.to(device))


@torch.no_grad()
def lively(module: nn.Module) -> nn.Module:
    """The module with weights that keep what passes through it alive, those that begin as zeros among them."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        if parameter.ndim > 1:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter[0].numel() ** -0.5)
    return module.eval()


def unet(name: str, size: int) -> Pair:
    import diffusers

    theirs = lively(diffusers.UNet2DConditionModel(sample_size=size, in_channels=4, out_channels=4, **UNETS[name]))
    node = diffusers_config.net(dict(theirs.config))
    ours = instantiate(node, in_channels=4, out_channels=4, context_dim=UNETS[name]["cross_attention_dim"])
    ours.load_state_dict(names.import_unet(theirs.state_dict()))
    return Pair(ours.eval(), theirs)


def vae(name: str) -> Pair:
    import diffusers

    levels = len(VAES[name]["block_out_channels"])
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    theirs = lively(diffusers.AutoencoderKL(latent_channels=4, **VAES[name], **blocks))
    ours = instantiate(diffusers_config.first_stage(dict(theirs.config))).eval()
    read = names.import_autoencoder(theirs.state_dict())
    ours.load_state_dict({**{key: value for key, value in ours.state_dict().items() if key not in read}, **read})
    return Pair(ours, theirs)


class Told(NamedTuple):
    """What a batch is told with and without words, for both."""

    x: Tensor
    both: Condition
    context: Tensor

    def to(self, device: str) -> "Told":
        return Told(self.x.to(device), self.both.to(device), self.context.to(device))


def told(name: str, size: int, batch: int, tokens: int = 77) -> Told:
    """x (B, 4, size, size), and contexts (2B, 77, D), those with words first."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 4, size, size, generator=generator)
    context = torch.randn(2 * batch, tokens, UNETS[name]["cross_attention_dim"], generator=generator)
    return Told(x, Condition(context=context), context)
