"""Nodes of our config from the numbers that other projects' configs hold, every option written out as in conf/."""

from collections.abc import Mapping, Sequence
from typing import Any

Node = dict[str, Any]
SDPA: Node = {"_target_": "ldm.net.attention.sdpa", "_partial_": True}


def transformer(conv: bool) -> Node:
    """The block of a U-Net that hears a context; conv: its projections are 1x1 convolutions (SD 1), not linear (SD 2, SDXL)."""
    return {"_target_": "ldm.net.attention.SpatialTransformer", "_partial_": True, "conv": conv, "eps": 1e-6}


def qkv(new_order: bool) -> Node:
    """ADM's attention, which hears none."""
    return {"_target_": "ldm.net.attention.QKVAttention", "_partial_": True, "new_order": new_order, "eps": 1e-5}


def unet(
    channels: int,
    mult: Sequence[int],
    blocks: int,
    attention: Sequence[int],
    block: Node,
    heads: int | None = None,
    head_channels: int = 64,
    depth: int | Sequence[int] = 1,
    dropout: float = 0.0,
    scale_shift: bool = False,
    resblock_updown: bool = False,
    groups: int = 32,
    eps: float = 1e-5,
) -> Node:
    """ldm.net.unet.UNet."""
    return {
        "_target_": "ldm.net.unet.UNet",
        "channels": channels,
        "channel_mult": list(mult),
        "num_res_blocks": blocks,
        "attention_resolutions": list(attention),
        "concat_channels": 0,
        "num_heads": heads,
        "num_head_channels": head_channels,
        "transformer_depth": depth if isinstance(depth, int) else list(depth),
        "dropout": dropout,
        "use_scale_shift_norm": scale_shift,
        "resblock_updown": resblock_updown,
        "num_groups": groups,
        "eps": eps,
        "block": block,
        "downsample": {"_target_": "ldm.net.blocks.Downsample", "_partial_": True, "asymmetric": False},
        "time_embedding": {"_target_": "ldm.net.blocks.timestep_embedding", "_partial_": True, "max_period": 10_000.0},
        "vector_embedding": {"_target_": "ldm.net.blocks.mlp", "_partial_": True},
        "attention_fn": SDPA,
        "gradient_checkpointing": False,
    }


def first_stage(
    z_channels: int,
    width: int,
    mult: Sequence[int],
    blocks: int,
    attention: Sequence[int] = (),
    middle_attention: bool = True,
    groups: int = 32,
    num_codes: int | None = None,
) -> Node:
    """ldm.autoencoder.kl.AutoencoderKL, or AutoencoderVQ of num_codes codes; attention: downsample factors."""
    shape = {
        "z_channels": z_channels,
        "width": width,
        "channel_mult": list(mult),
        "num_res_blocks": blocks,
        "attention_resolutions": list(attention),
    }
    shape |= {"middle_attention": middle_attention, "num_groups": groups, "attention_fn": SDPA}
    kind: Node = {"_target_": "ldm.autoencoder.kl.AutoencoderKL"}
    if num_codes is not None:
        kind = {
            "_target_": "ldm.autoencoder.vq.AutoencoderVQ",
            "num_codes": num_codes,
            "codebook_weight": 1.0,
            "commitment_weight": 0.25,
        }
    return {
        **kind,
        "z_channels": z_channels,
        "factor": 2 ** (len(mult) - 1),
        "encoder": {"_target_": "ldm.autoencoder.conv.Encoder", **shape, "double_z": num_codes is None},
        "decoder": {"_target_": "ldm.autoencoder.conv.Decoder", **shape},
    }


def clip(model: str, layer: int, pad: int, length: int = 77) -> Node:
    """A prompt's tokens through CLIP's text tower; its weights are not in the config yet (`weights`)."""
    encoder = {"model": model, "weights": None, "hub": False, "layer": layer, "pad": pad, "random": False}
    return {
        "_target_": "ldm.conditioner.text.TextTokensOnly",
        "encoder": {"_target_": "ldm.conditioner.clip.CLIP", **encoder},
        "length": length,
    }


def inpainting(told: Node) -> Node:
    """A prompt, the mask and the masked image's latent: what Stable Diffusion's inpainting models are told."""
    masked = {"_target_": "ldm.conditioner.spatial.MaskedImage"}
    return {"_target_": "ldm.conditioner.compose.Compose", "drop": None, "clip_context": told, "masked_image": masked}


def parts_of(conditioner: Mapping[str, Any]) -> list[Any]:
    """The nodes that a conditioner is composed of; itself alone where it is not."""
    inside = [part for part in conditioner.values() if isinstance(part, Mapping)]
    return inside if str(conditioner["_target_"]).endswith(".Compose") else [conditioner]


def encoder_of(conditioner: Mapping[str, Any]) -> Any:
    """The node of a conditioner's text encoder. Raises StopIteration for one without."""
    return next(part["encoder"] for part in parts_of(conditioner) if "encoder" in part)


def label(classes: int, dim: int) -> Node:
    """A class as one token; classes: without the null's."""
    return {"_target_": "ldm.conditioner.label.Label", "num_classes": classes, "dim": dim}


def label_vector(classes: int, dim: int) -> Node:
    """A class as a vector added to the time embedding; classes: without the null's."""
    return {"_target_": "ldm.conditioner.label.LabelVector", "num_classes": classes, "dim": dim}


def dit(patch: int, channels: int, depth: int, heads: int, toward_data: bool) -> Node:
    """DiT's transformer; reversed_timestep_embedding: its time runs from noise to data, as SiT's."""
    reads: Node = {"_target_": "ldm.net.blocks.timestep_embedding", "max_period": 10_000.0}
    return {
        "_target_": "ldm.net.dit.DiT",
        **{
            "patch_size": patch,
            "channels": channels,
            "depth": depth,
            "num_heads": heads,
            "concat_channels": 0,
            "frequencies": 256,
        },
        "norm": {"_target_": "torch.nn.LayerNorm", "_partial_": True, "elementwise_affine": False, "eps": 1e-6},
        "feed_forward": {"_target_": "ldm.net.dit.MLP", "_partial_": True, "mult": 4.0},
        "qk_norm": None,
        "positions": {"_target_": "ldm.net.positions.sincos_2d", "_partial_": True},
        "rotary": None,
        "time_embedding": {
            **(
                {"_target_": "ldm.net.blocks.reversed_timestep_embedding", "max_period": 10_000.0}
                if toward_data
                else reads
            ),
            "_partial_": True,
        },
        "vector_embedding": {"_target_": "ldm.net.blocks.identity_embedding", "_partial_": True},
        "attention_fn": SDPA,
        "gradient_checkpointing": False,
    }


NOTHING: Node = {"_target_": "ldm.conditioner.none.Unconditional"}


def betas(kind: str, T: int, start: float, end: float) -> Node:
    """schedule.linear or scaled_linear whose betas, as given, are those for this T; ours are those for T = 1000."""
    return {
        "_target_": f"ldm.diffusion.schedule.{kind}",
        "T": T,
        "beta_start": start * T / 1000,
        "beta_end": end * T / 1000,
    }


def cosine(T: int, s: float = 0.008) -> Node:
    return {"_target_": "ldm.diffusion.schedule.cosine", "T": T, "s": s}


def zero_terminal_snr(schedule: Node) -> Node:
    return {"_target_": "ldm.diffusion.schedule.zero_terminal_snr", "schedule": schedule}


def prediction(name: str) -> Node:
    """name: Eps, V or X0."""
    return {"_target_": f"ldm.diffusion.prediction.{name}"}
