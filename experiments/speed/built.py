"""The same network twice, diffusers' and ours, with the same weights."""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from hydra.utils import instantiate
from torch import Tensor, nn

from ldm.condition import Condition
from ldm.interop import diffusers_config
from ldm.interop.diffusers import import_autoencoder, import_unet
from ldm.interop.keymap import KeyMapping, import_state, layer_rows
from ldm.net.blocks import timestep_embedding
from ldm.net.dit import DiT

UNETS: dict[str, dict[str, Any]] = {  # as UNet2DConditionModel has them
    "small": {
        **{
            "block_out_channels": (64, 128, 256),
            "layers_per_block": 2,
            "cross_attention_dim": 512,
            "attention_head_dim": 8,
        },
        **{"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")},
        **{"up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")},
    },
    "tiny": {
        **{"block_out_channels": (32, 64), "layers_per_block": 1, "cross_attention_dim": 32, "attention_head_dim": 4},
        **{
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        },
    },
    "sd1": {
        **{
            "block_out_channels": (320, 640, 1280, 1280),
            "layers_per_block": 2,
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
        },
        **{"down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)},
        **{"up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3},
    },
}
DITS: dict[str, dict[str, Any]] = {  # as DiTTransformer2DModel
    "DiT-XL/2": {"num_layers": 28, "num_attention_heads": 16, "attention_head_dim": 72, "num_embeds_ada_norm": 1000},
    "tiny DiT": {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "num_embeds_ada_norm": 10},
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


def theirs_unet(name: str, size: int) -> nn.Module:
    import diffusers

    return lively(diffusers.UNet2DConditionModel(sample_size=size, in_channels=4, out_channels=4, **UNETS[name]))


def ours_unet(name: str, size: int) -> nn.Module:
    """The same network, as it begins."""
    node = diffusers_config.net({**UNETS[name], "sample_size": size})
    return instantiate(node, in_channels=4, out_channels=4, context_dim=UNETS[name]["cross_attention_dim"]).eval()


def unet(name: str, size: int) -> Pair:
    ours, theirs = ours_unet(name, size), theirs_unet(name, size)
    ours.load_state_dict(import_unet(theirs.state_dict()))
    return Pair(ours, theirs)


class Noise(NamedTuple):
    """What diffusers' U-Net answers with."""

    sample: Tensor


class Labelled(nn.Module):
    """diffusers' DiT called as its U-Net is: labels (B,) in the context's place, and of its answer the noise alone."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, t: Tensor | int, labels: Tensor) -> Noise:
        times = torch.as_tensor(t, device=x.device).expand(len(x))
        return Noise(self.net(x, timestep=times, class_labels=labels).sample[:, : x.shape[1]])


TIME = "transformer_blocks.0.norm1.emb"  # each block has time and class embeddings of its own, which hold the same
DIT_ENDS = {
    **{"patch": "pos_embed.proj", "head.modulation": "proj_out_1", "head.out": "proj_out_2"},
    **{"time.0": f"{TIME}.timestep_embedder.linear_1", "time.2": f"{TIME}.timestep_embedder.linear_2"},
}
DIT_BLOCK = {
    **{"modulation": "norm1.linear", "attention.out": "attn1.to_out.0"},
    **{"feed_forward.up": "ff.net.0.proj", "feed_forward.down": "ff.net.2"},
}


def dit_rows(depth: int) -> Iterator[KeyMapping]:
    """Every tensor of a DiT of so many blocks, by its name in ours and in diffusers'."""
    yield from layer_rows(DIT_ENDS, "", "")
    for n in range(depth):
        theirs = f"transformer_blocks.{n}."
        yield from layer_rows(DIT_BLOCK, f"blocks.{n}.", theirs)
        for part in ("weight", "bias"):
            yield KeyMapping(
                f"blocks.{n}.attention.qkv.{part}", tuple(f"{theirs}attn1.to_{one}.{part}" for one in "qkv")
            )


def dit(name: str, size: int) -> Pair:
    """With DiT's own epsilon, and diffusers' rates of the time's sinusoid, which fall a little sooner than DiT's."""
    import diffusers

    given = DITS[name]
    theirs = lively(diffusers.DiTTransformer2DModel(sample_size=size, out_channels=8, norm_eps=1e-6, **given))
    first = theirs.get_submodule(TIME)
    for block in theirs.transformer_blocks:
        block.norm1.emb.load_state_dict(first.state_dict())
    width, half = given["num_attention_heads"] * given["attention_head_dim"], 128
    rates = partial(timestep_embedding, max_period=10_000.0 ** (half / (half - 1)))
    ours = DiT(
        4,
        8,
        2,
        width,
        given["num_layers"],
        given["num_attention_heads"],
        vector_dim=width,
        frequencies=2 * half,
        time_embedding=rates,
    )
    told_once = {
        key: value
        for key, value in theirs.state_dict().items()
        if ".emb." not in key or key.startswith(f"{TIME}.timestep")
    }
    ours.load_state_dict(import_state(dit_rows(given["num_layers"]), told_once, "DiTTransformer2DModel"))
    return Pair(ours.eval(), Labelled(theirs))


def vae(name: str) -> Pair:
    import diffusers

    levels = len(VAES[name]["block_out_channels"])
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    theirs = lively(diffusers.AutoencoderKL(latent_channels=4, **VAES[name], **blocks))
    ours = instantiate(diffusers_config.first_stage(dict(theirs.config))).eval()
    read = import_autoencoder(theirs.state_dict())
    ours.load_state_dict({**{key: value for key, value in ours.state_dict().items() if key not in read}, **read})
    return Pair(ours, theirs)


class Told(NamedTuple):
    """What a batch is told with and without words or a class, for both; theirs: context (2B, L, D), or labels (2B,)."""

    x: Tensor
    both: Condition
    context: Tensor

    def to(self, device: str) -> "Told":
        return Told(self.x.to(device), self.both.to(device), self.context.to(device))

    def low(self) -> "Told":
        """For weights of bfloat16."""
        context = self.context.to(torch.bfloat16) if self.context.is_floating_point() else self.context
        return self._replace(x=self.x.to(torch.bfloat16), context=context)


def told(name: str, size: int, batch: int, tokens: int = 77) -> Told:
    """x (B, 4, size, size), and contexts (2B, 77, D), those with words first."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 4, size, size, generator=generator)
    context = torch.randn(2 * batch, tokens, UNETS[name]["cross_attention_dim"], generator=generator)
    return Told(x, Condition(context=context), context)


def labelled(made: Pair, size: int, batch: int) -> Told:
    """x (B, 4, size, size), and classes (2B,), last the null's; ours is told their rows of the table, which its
    conditioner holds.
    """
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 4, size, size, generator=generator)
    table = made.theirs.net.get_submodule(TIME).class_embedder.embedding_table.weight.detach()
    null = len(table) - 1
    labels = torch.cat([torch.randint(null, (batch,), generator=generator), torch.full((batch,), null)])
    return Told(x, Condition(vector=table[labels]), labels)


def drawing(name: str, size: int, batch: int) -> tuple[Pair, Told]:
    """Two networks that draw, by a name of UNETS or of DITS, and what a batch is told."""
    if name in DITS:
        made = dit(name, size)
        return made, labelled(made, size, batch)
    return unet(name, size), told(name, size, batch)
