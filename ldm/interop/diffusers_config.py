"""Convert diffusers' config.json of U-Net, first stage and scheduler to our nodes and back."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ldm.errors import UserError
from ldm.interop import config_nodes
from ldm.interop.config_nodes import Node
from ldm.interop.pipeline import require_values

NET = {  # values that a UNet2DConditionModel must have for ours to be equivalent
    **{
        "act_fn": "silu",
        "center_input_sample": False,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "downsample_padding": 1,
    },
    **{
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "mid_block_scale_factor": 1,
        "only_cross_attention": False,
        "encoder_hid_dim": None,
    },
    **{
        "dual_cross_attention": False,
        "class_embed_type": None,
        "num_class_embeds": None,
        "resnet_skip_time_act": False,
    },
    **{
        "resnet_out_scale_factor": 1.0,
        "time_embedding_type": "positional",
        "time_embedding_dim": None,
        "timestep_post_act": None,
    },
    **{
        "time_cond_proj_dim": None,
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "attention_type": "default",
        "cross_attention_norm": None,
    },
    **{"time_embedding_act_fn": None, "class_embeddings_concat": False, "mid_block_only_cross_attention": None},
    **{"reverse_transformer_layers_per_block": None, "addition_embed_type": None},
}
STAGE = {
    "act_fn": "silu",
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "latents_mean": None,
    "latents_std": None,
}
NAMES = ("_class_name", "_diffusers_version", "_name_or_path", "_use_default_values")
SIZES = (
    *(
        "sample_size",
        "in_channels",
        "out_channels",
        "block_out_channels",
        "layers_per_block",
        "down_block_types",
        "up_block_types",
    ),
    *("norm_num_groups",),
)
NET_READ = (  # options that are read below, or that do not change the result
    *(
        *NAMES,
        *SIZES,
        "cross_attention_dim",
        "attention_head_dim",
        "num_attention_heads",
        "transformer_layers_per_block",
    ),
    *(
        "use_linear_projection",
        "dropout",
        "resnet_time_scale_shift",
        "norm_eps",
        "upcast_attention",
        "addition_embed_type_num_heads",
    ),
)
STAGE_READ = (
    *(*NAMES, *SIZES, "latent_channels", "mid_block_add_attention", "scaling_factor", "shift_factor", "force_upcast"),
    *("num_vq_embeddings", "norm_type", "lookup_from_codebook"),
)
SCHEDULE = {"thresholding": False, "trained_betas": None}
BETAS = {"linear": "linear", "scaled_linear": "scaled_linear"}
PREDICTION = {"epsilon": "Eps", "v_prediction": "V", "sample": "X0"}
ATTENDED = "CrossAttnDownBlock2D"
ENCODER_BLOCKS = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}


def net(options: Mapping[str, Any]) -> Node:
    """Convert a UNet2DConditionModel's config to ldm.net.unet.UNet.

    Raises UserError naming an option without a counterpart in ours.
    """
    what = "unet/config.json"
    require_values(options, NET, what)
    refuse_others(options, (*NET, *NET_READ), what)
    widths, kinds = options["block_out_channels"], list(options["down_block_types"])
    mirrored = [{ATTENDED: "CrossAttnUpBlock2D", "DownBlock2D": "UpBlock2D"}.get(kind) for kind in reversed(kinds)]
    if None in mirrored or list(options.get("up_block_types", mirrored)) != mirrored:
        raise UserError(
            f"{what}: down_block_types={kinds}: expected {ATTENDED} and DownBlock2D, and the same on the way up"
        )
    heads, head_channels = heads_of(options, widths)
    depth = options.get("transformer_layers_per_block", 1)
    return config_nodes.unet(
        widths[0],
        mult_of(widths, what),
        options["layers_per_block"],
        # the middle block has attention in any case
        [2**level for level, kind in enumerate(kinds) if kind == ATTENDED] or [2 ** len(kinds)],
        config_nodes.transformer(not options.get("use_linear_projection", False)),
        heads=heads,
        head_channels=head_channels,
        depth=depth if isinstance(depth, int) else list(depth),
        dropout=float(options.get("dropout", 0.0)),
        scale_shift=options.get("resnet_time_scale_shift", "default") == "scale_shift",
        groups=options.get("norm_num_groups", 32),
        eps=options.get("norm_eps", 1e-5),
    )


def refuse_others(options: Mapping[str, Any], known: Collection[str], what: str) -> None:
    """Raise UserError for an option that is set but not known; what: the file, for the message."""
    for name, value in options.items():
        if name not in known and value not in (None, False):
            raise UserError(f"{what}: {name}={value!r:.60} has no counterpart in ours")


def heads_of(options: Mapping[str, Any], widths: list[int]) -> tuple[int | None, int]:
    """Return (number of heads, channels per head); diffusers stores the number of heads as attention_head_dim.

    Raises UserError if neither of the two is the same at all widths.
    """
    heads = options.get("num_attention_heads") or options.get("attention_head_dim", 8)
    if isinstance(heads, int):
        return heads, 64
    sizes = {width // number for width, number in zip(widths, heads, strict=True)}
    if len(sizes) > 1:
        raise UserError(
            f"unet/config.json: attention_head_dim={heads} at widths {widths}; "
            "expected the same number of channels per head"
        )
    return None, sizes.pop()


def mult_of(widths: list[int], what: str) -> list[int]:
    """Return the widths as multiples of the first.  Raises UserError if they are not multiples of it."""
    if any(width % widths[0] for width in widths):
        raise UserError(f"{what}: block_out_channels={widths}; expected multiples of the first")
    return [width // widths[0] for width in widths]


def first_stage(options: Mapping[str, Any]) -> Node:
    """Convert the config of an AutoencoderKL or a VQModel.

    Raises UserError naming an option without a counterpart in ours.
    """
    what = "vae/config.json"
    require_values(options, STAGE, what)
    refuse_others(options, (*STAGE, *STAGE_READ), what)
    quantised = "num_vq_embeddings" in options
    if quantised:
        require_values(options, {"norm_type": "group", "lookup_from_codebook": False}, what)
    kinds = options["down_block_types"]
    if unknown := set(kinds) - ENCODER_BLOCKS.keys():
        raise UserError(f"{what}: down_block_types has {min(unknown)}; expected {' and '.join(ENCODER_BLOCKS)}")
    return config_nodes.first_stage(
        options["latent_channels"],
        options["block_out_channels"][0],
        mult_of(options["block_out_channels"], what),
        options["layers_per_block"],
        attention=[2**level for level, kind in enumerate(kinds) if ENCODER_BLOCKS[kind]],
        middle_attention=options.get("mid_block_add_attention", True),
        groups=options.get("norm_num_groups", 32),
        num_codes=options.get("num_vq_embeddings"),
    )


def schedule(options: Mapping[str, Any]) -> Node:
    """Convert the config of any scheduler that is defined by betas.  Raises UserError for others."""
    require_values(options, SCHEDULE, "scheduler/scheduler_config.json")
    kind, T = options.get("beta_schedule", "linear"), options.get("num_train_timesteps", 1000)
    if kind == "squaredcos_cap_v2":
        node = config_nodes.cosine(T)
    elif kind in BETAS:
        node = config_nodes.betas(BETAS[kind], T, options.get("beta_start", 1e-4), options.get("beta_end", 0.02))
    else:
        raise UserError(
            f"scheduler/scheduler_config.json: beta_schedule={kind}: expected {', '.join(BETAS)} or squaredcos_cap_v2"
        )
    return config_nodes.zero_terminal_snr(node) if options.get("rescale_betas_zero_snr") else node


def prediction(options: Mapping[str, Any]) -> Node:
    """Convert a scheduler's prediction type.  Raises UserError for an unknown one."""
    name = options.get("prediction_type", "epsilon")
    if name not in PREDICTION:
        raise UserError(
            f"scheduler/scheduler_config.json: prediction_type={name}: expected one of {', '.join(PREDICTION)}"
        )
    return config_nodes.prediction(PREDICTION[name])


def export_net(
    node: Mapping[str, Any], in_channels: int, out_channels: int, context_dim: int | None, size: Sequence[int]
) -> dict[str, Any]:
    """Convert our U-Net's node to a UNet2DConditionModel's config; size: (height, width) of z.

    Raises UserError for a network without a counterpart in diffusers.
    """
    if (
        not str(node["_target_"]).endswith(".UNet")
        or not str(node["block"]["_target_"]).endswith(".SpatialTransformer")
        or not context_dim
    ):
        raise UserError(
            f"net={node['_target_']}: to=diffusers expects a UNet of transformer blocks with cross-attention"
        )
    require_values(node, {"resblock_updown": False}, "net")
    widths = [factor * node["channels"] for factor in node["channel_mult"]]
    if odd := [width for width in widths if width % node["num_groups"]]:
        raise UserError(
            f"net: num_groups={node['num_groups']} does not divide a level's {odd[0]} channels, as diffusers requires"
        )
    attended = [2**level in node["attention_resolutions"] for level in range(len(widths))]
    heads = [node["num_heads"] or width // node["num_head_channels"] for width in widths]
    return {
        "_class_name": "UNet2DConditionModel",
        "in_channels": in_channels,
        "out_channels": out_channels,
        "sample_size": size[0] if len({*size}) == 1 else list(size),
        "block_out_channels": widths,
        "layers_per_block": node["num_res_blocks"],
        "down_block_types": [ATTENDED if one else "DownBlock2D" for one in attended],
        "up_block_types": ["CrossAttnUpBlock2D" if one else "UpBlock2D" for one in reversed(attended)],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "cross_attention_dim": context_dim,
        "attention_head_dim": heads[0] if node["num_heads"] else heads,
        "transformer_layers_per_block": node["transformer_depth"],
        "use_linear_projection": not node["block"].get("conv", False),
        "dropout": node["dropout"],
        "resnet_time_scale_shift": "scale_shift" if node["use_scale_shift_norm"] else "default",
        "norm_num_groups": node["num_groups"],
        "norm_eps": node["eps"],
    }


def export_first_stage(node: Mapping[str, Any], channels: int, scale: float, size: Sequence[int]) -> dict[str, Any]:
    """Convert our first stage's node to an AutoencoderKL's or VQModel's config; size: (height, width) of an image.

    Raises UserError for another kind of first stage.
    """
    kind = str(node["_target_"]).rpartition(".")[2]
    if kind not in ("AutoencoderKL", "AutoencoderVQ") or not str(node["encoder"]["_target_"]).endswith(".Encoder"):
        raise UserError(
            f"autoencoder={node['_target_']}: to=diffusers expects "
            "the convolutional encoder and decoder of latent diffusion"
        )
    part = node["encoder"]
    same = {name: value for name, value in part.items() if name not in ("_target_", "double_z", "attention_fn")}
    require_values(node["decoder"], same, "autoencoder.decoder")
    levels = range(len(part["channel_mult"]))
    attended = [2**level in part["attention_resolutions"] for level in levels]
    quantised = kind == "AutoencoderVQ"
    return {
        "_class_name": "VQModel" if quantised else "AutoencoderKL",
        "in_channels": channels,
        "out_channels": channels,
        "sample_size": size[0] if len({*size}) == 1 else list(size),
        "block_out_channels": [factor * part["width"] for factor in part["channel_mult"]],
        "layers_per_block": part["num_res_blocks"],
        "down_block_types": ["AttnDownEncoderBlock2D" if one else "DownEncoderBlock2D" for one in attended],
        "up_block_types": ["AttnUpDecoderBlock2D" if one else "UpDecoderBlock2D" for one in reversed(attended)],
        "latent_channels": node["z_channels"],
        "norm_num_groups": part["num_groups"],
        "mid_block_add_attention": part["middle_attention"],
        "scaling_factor": scale,
        **({"num_vq_embeddings": node["num_codes"]} if quantised else {}),
    }


def export_schedule(node: Mapping[str, Any], prediction: Mapping[str, Any], betas: list[float]) -> dict[str, Any]:
    """Convert our schedule to a DDIMScheduler's config with Stable Diffusion's timestep spacing.

    betas: of the schedule, written out if diffusers has no name for it.
    Raises UserError for a prediction without a counterpart in diffusers.
    """
    kinds = {ours: theirs for theirs, ours in PREDICTION.items()}
    name = str(prediction["_target_"]).rpartition(".")[2]
    if name not in kinds:
        raise UserError(f"prediction={prediction['_target_']}: to=diffusers expects one of {', '.join(kinds)}")
    kind = str(node["_target_"]).rpartition(".")[2]
    options: dict[str, Any] = {"beta_schedule": "linear", "trained_betas": betas}
    if kind == "cosine" and node["s"] == 0.008:
        options = {"beta_schedule": "squaredcos_cap_v2"}
    if kind in BETAS:
        start, end = (node[part] * 1000 / node["T"] for part in ("beta_start", "beta_end"))
        options = {"beta_schedule": kind, "beta_start": start, "beta_end": end}
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": len(betas),
        **options,
        "prediction_type": kinds[name],
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "timestep_spacing": "leading",
    }
