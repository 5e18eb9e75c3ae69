"""Build config nodes from the numbers in other projects' configs, with every option written out as in conf/."""

from collections.abc import Mapping, Sequence
from typing import Any

Node = dict[str, Any]
SDPA: Node = {"_target_": "ldm.net.attention.sdpa", "_partial_": True}


def transformer(conv: bool) -> Node:
    """Return the block of a U-Net with cross-attention; conv: 1x1 convolutions (SD 1) as projections, not linear."""
    return {
        "_target_": "ldm.net.attention.SpatialTransformer",
        "_partial_": True,
        "conv": conv,
        "eps": 1e-6,
        "twice": False,
    }


def qkv(new_order: bool) -> Node:
    """Return ADM's attention block, without cross-attention."""
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
    """Return the node of ldm.net.unet.UNet."""
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
        "downsample": {"_target_": "ldm.net.blocks.Downsample", "_partial_": True, "asymmetric": False, "stride": 2},
        "time_embedding": {"_target_": "ldm.net.blocks.timestep_embedding", "_partial_": True, "max_period": 10_000.0},
        "vector_embedding": {"_target_": "ldm.net.blocks.mlp", "_partial_": True},
        "attention_fn": SDPA,
        "gradient_checkpointing": False,
        "concat_vector": False,
        "dims": 2,
        "padding_mode": "zeros",
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
    """Return the node of AutoencoderKL, or of AutoencoderVQ with num_codes codes; attention: downsampling factors."""
    shape = {
        "z_channels": z_channels,
        "width": width,
        "channel_mult": list(mult),
        "num_res_blocks": blocks,
        "attention_resolutions": list(attention),
    }
    shape |= {"middle_attention": middle_attention, "num_groups": groups, "attention_fn": SDPA}
    shape |= {"factor": 2 ** (len(mult) - 1), "padding_mode": "zeros"}
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
    """Return a conditioner on the token features of CLIP's text tower, whose weights are not set yet."""
    encoder = {"model": model, "weights": None, "hub": False, "layer": layer, "pad_token_id": pad, "random": False}
    return {
        "_target_": "ldm.conditioner.text.TextTokensOnly",
        "encoder": {"_target_": "ldm.conditioner.clip.CLIP", **encoder},
        "max_length": length,
    }


def inpainting(prompt: Node) -> Node:
    """Return the conditioner of Stable Diffusion's inpainting models: prompt, mask, and latent of the masked image."""
    masked = {"_target_": "ldm.conditioner.spatial.MaskedImage"}
    return {"_target_": "ldm.conditioner.compose.Compose", "drop": None, "clip_context": prompt, "masked_image": masked}


def parts_of(conditioner: Mapping[str, Any]) -> list[Any]:
    """Return the nodes that a conditioner is composed of, or the conditioner itself if it is a single one."""
    inside = [part for part in conditioner.values() if isinstance(part, Mapping)]
    return inside if str(conditioner["_target_"]).endswith(".Compose") else [conditioner]


def encoder_of(conditioner: Mapping[str, Any]) -> Any:
    """Return the node of a conditioner's text encoder.  Raises StopIteration if there is none."""
    return next(part["encoder"] for part in parts_of(conditioner) if "encoder" in part)


def label(classes: int, dim: int) -> Node:
    """Return a conditioner on a class as one token; classes: without the null class."""
    return {"_target_": "ldm.conditioner.label.Label", "num_classes": classes, "dim": dim}


def label_vector(classes: int, dim: int) -> Node:
    """Return a conditioner on a class as a vector added to the time embedding; classes: without the null class."""
    return {"_target_": "ldm.conditioner.label.LabelVector", "num_classes": classes, "dim": dim}


def dit(patch: int, channels: int, depth: int, heads: int, toward_data: bool) -> Node:
    """Return DiT's transformer; toward_data: its time runs from noise to data, as in SiT."""
    embedding: Node = {"_target_": "ldm.net.blocks.timestep_embedding", "max_period": 10_000.0}
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
        "positions": {"_target_": "ldm.net.positions.sincos", "_partial_": True},
        "rotary": None,
        "time_embedding": {
            **(
                {"_target_": "ldm.net.blocks.reversed_timestep_embedding", "max_period": 10_000.0}
                if toward_data
                else embedding
            ),
            "_partial_": True,
        },
        "vector_embedding": {"_target_": "ldm.net.blocks.identity_embedding", "_partial_": True},
        "attention_fn": SDPA,
        "gradient_checkpointing": False,
    }


NOTHING: Node = {"_target_": "ldm.conditioner.none.Unconditional"}


def betas(kind: str, T: int, start: float, end: float) -> Node:
    """Return schedule.linear or scaled_linear.

    start, end: betas for this T; those of our schedules are for T = 1000.
    """
    return {
        "_target_": f"ldm.diffusion.schedule.{kind}",
        "T": T,
        "beta_start": start * T / 1000,
        "beta_end": end * T / 1000,
    }


def cosine(T: int, s: float = 0.008) -> Node:
    """Return the cosine schedule with offset s."""
    return {"_target_": "ldm.diffusion.schedule.cosine", "T": T, "s": s}


def zero_terminal_snr(schedule: Node) -> Node:
    """Return a schedule rescaled to zero terminal SNR."""
    return {"_target_": "ldm.diffusion.schedule.zero_terminal_snr", "schedule": schedule}


def prediction(name: str) -> Node:
    """Return the node of a prediction type; name: Eps, V or X0."""
    return {"_target_": f"ldm.diffusion.prediction.{name}"}
