"""Convert the model configs of CompVis and Stability (the YAML of a released checkpoint) to nodes of ours."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from ldm.errors import UserError
from ldm.interop import config_nodes
from ldm.interop.config_nodes import Node

PREDICTION = {"eps": "Eps", "v": "V", "x0": "X0"}
TRAINING = (  # options of LatentDiffusion for training and logging, which do not define the model
    *(
        "base_learning_rate",
        "ckpt_path",
        "first_stage_key",
        "cond_stage_key",
        "cond_stage_trainable",
        "num_timesteps_cond",
        "log_every_t",
    ),
    *(
        "monitor",
        "use_ema",
        "loss_type",
        "scheduler_config",
        "image_size",
        "concat_mode",
        "cond_stage_forward",
        "l_simple_weight",
    ),
    *(
        "original_elbo_weight",
        "v_posterior",
        "logvar_init",
        "learn_logvar",
        "use_positional_encodings",
        "clip_denoised",
        "ignore_keys",
    ),
    *(
        "concat_keys",
        "masked_image_key",
        "finetune_keys",
        "keep_finetune_dims",
        "make_it_fit",
        "ucg_training",
        "force_null_conditioning",
    ),
)
IS = (  # options that are read below
    *(
        "linear_start",
        "linear_end",
        "timesteps",
        "beta_schedule",
        "cosine_s",
        "parameterization",
        "channels",
        "scale_factor",
    ),
    *("scale_by_std", "conditioning_key", "unet_config", "first_stage_config", "cond_stage_config"),
)
NET = (
    *(
        "image_size",
        "in_channels",
        "model_channels",
        "out_channels",
        "num_res_blocks",
        "attention_resolutions",
        "dropout",
        "channel_mult",
    ),
    *(
        "num_heads",
        "num_head_channels",
        "use_spatial_transformer",
        "transformer_depth",
        "context_dim",
        "use_linear_in_transformer",
    ),
    *(
        "use_scale_shift_norm",
        "resblock_updown",
        "use_new_attention_order",
        "use_checkpoint",
        "use_fp16",
        "legacy",
        "num_classes",
    ),
    *("adm_in_channels", "spatial_transformer_attn_type", "dims", "conv_resample"),
)


def from_compvis(config: Mapping[str, Any]) -> Node:
    """Convert the `model` of a CompVis config to plain nodes.

    Returns net, autoencoder, conditioner, schedule, prediction, seed and scale. scale is the latent's, None if the
    checkpoint contains it (scale_by_std). Their schedule `linear` is our scaled_linear, their `sqrt_linear` our linear.
    Raises UserError naming an option without a counterpart in ours.
    """
    params = config.get("model", config).get("params", {})
    reject_unknown_options(params, (*TRAINING, *IS), "model.params")
    if params.get("parameterization", "eps") not in PREDICTION:
        raise UserError(
            f"model.params.parameterization={params['parameterization']}: expected one of {', '.join(PREDICTION)}"
        )
    unet = part(params, "unet_config")
    cond_node, z = conditioner(params.get("cond_stage_config", "__is_unconditional__")), unet["out_channels"]
    # Inputs of an inpainting model: x_t, mask, masked image.
    inpaints = params.get("conditioning_key") == "hybrid" and unet["in_channels"] == 2 * z + 1
    if unet["in_channels"] != z and not inpaints:
        raise UserError(
            f"unet_config.params.in_channels={unet['in_channels']}: expected {z}, or {2 * z + 1} for hybrid inpainting"
        )
    return {
        "net": net(unet),
        "autoencoder": first_stage(params["first_stage_config"]) if "first_stage_config" in params else None,
        "conditioner": config_nodes.inpainting(cond_node) if inpaints else cond_node,
        "schedule": schedule(params),
        "prediction": config_nodes.prediction(PREDICTION[params.get("parameterization", "eps")]),
        "seed": 0,
        "scale": None if params.get("scale_by_std") else float(params.get("scale_factor", 1.0)),
    }


def reject_unknown_options(options: Mapping[str, Any], names: Collection[str], where: str) -> None:
    """Raise UserError for an option that is not among `names`; where: its position in the config, for the message."""
    for name, value in options.items():
        if name not in names:
            raise UserError(f"{where}.{name}={value!r:.60}: ours has no counterpart for this option")


def part(params: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the params of a part of the model.  Raises UserError if it is missing."""
    if name not in params or "params" not in params[name]:
        raise UserError(f"this config has no {name} with params; expected the model config of latent diffusion")
    return dict(params[name]["params"])


def schedule(params: Mapping[str, Any]) -> Node:
    """Convert the noise schedule; their `linear` is linear in the square root of beta."""
    kind, T = params.get("beta_schedule", "linear"), int(params.get("timesteps", 1000))
    if kind == "cosine":
        return config_nodes.cosine(T, float(params.get("cosine_s", 0.008)))
    ours = {"linear": "scaled_linear", "sqrt_linear": "linear"}
    if kind not in ours:
        raise UserError(f"model.params.beta_schedule={kind}: expected one of {', '.join(ours)}, cosine")
    return config_nodes.betas(
        ours[kind], T, float(params.get("linear_start", 1e-4)), float(params.get("linear_end", 2e-2))
    )


def net(params: Mapping[str, Any]) -> Node:
    """Convert the params of openaimodel.UNetModel to ldm.net.unet.UNet."""
    reject_unknown_options(params, NET, "unet_config.params")
    if params.get("dims", 2) != 2 or not params.get("conv_resample", True):
        raise UserError("unet_config.params: expected dims=2 and conv_resample=true")
    spatial = params.get("use_spatial_transformer", False)
    head_channels = params.get("num_head_channels", -1)
    heads = params.get("num_heads", -1) if head_channels in (-1, None) else None
    depth = params.get("transformer_depth", 1)
    return config_nodes.unet(
        params["model_channels"],
        params.get("channel_mult", (1, 2, 4, 8)),
        params["num_res_blocks"],
        params["attention_resolutions"],
        config_nodes.transformer(not params.get("use_linear_in_transformer", False))
        if spatial
        else config_nodes.qkv(bool(params.get("use_new_attention_order"))),
        heads=heads,
        head_channels=64 if heads else head_channels,
        depth=depth if isinstance(depth, int) else list(depth),
        dropout=float(params.get("dropout", 0.0)),
        scale_shift=bool(params.get("use_scale_shift_norm")),
        resblock_updown=bool(params.get("resblock_updown")),
    )


def first_stage(config: Mapping[str, Any]) -> Node:
    """Convert CompVis' AutoencoderKL, VQModel or VQModelInterface to AutoencoderKL or AutoencoderVQ.

    Resolutions with attention become downsampling factors.
    """
    params = dict(config["params"])
    reject_unknown_options(
        params,
        ("embed_dim", "n_embed", "ddconfig", "lossconfig", "monitor", "ckpt_path", "ema_decay", "learn_logvar"),
        "first_stage_config.params",
    )
    dd = params["ddconfig"]
    reject_unknown_options(
        dd,
        (
            *(
                "double_z",
                "z_channels",
                "resolution",
                "in_channels",
                "out_ch",
                "ch",
                "ch_mult",
                "num_res_blocks",
                "attn_resolutions",
            ),
            *("dropout", "attn_type"),
        ),
        "first_stage_config.params.ddconfig",
    )
    if dd["z_channels"] != params["embed_dim"]:
        raise UserError(
            f"first_stage_config: embed_dim={params['embed_dim']} and z_channels={dd['z_channels']}; expected the same"
        )
    levels = range(len(dd["ch_mult"]))
    return config_nodes.first_stage(
        dd["z_channels"],
        dd["ch"],
        dd["ch_mult"],
        dd["num_res_blocks"],
        attention=[2**level for level in levels if dd["resolution"] // 2**level in dd["attn_resolutions"]],
        middle_attention=dd.get("attn_type", "vanilla") != "none",
        num_codes=params.get("n_embed"),
    )


def _clip(params: Mapping[str, Any]) -> Node:
    reject_unknown_options(params, ("version", "device", "max_length", "freeze", "layer"), "cond_stage_config.params")
    version = params.get("version", "openai/clip-vit-large-patch14")
    if version != "openai/clip-vit-large-patch14" or params.get("layer", "last") != "last":
        raise UserError(
            f"cond_stage_config.params={dict(params)}: expected the last layer of openai/clip-vit-large-patch14"
        )
    return config_nodes.clip("ViT-L-14-quickgelu", layer=-1, pad=49407, length=params.get("max_length", 77))


def _open_clip(params: Mapping[str, Any]) -> Node:
    reject_unknown_options(
        params, ("arch", "version", "device", "max_length", "freeze", "layer"), "cond_stage_config.params"
    )
    layer = {"last": -1, "penultimate": -2}[params.get("layer", "last")]
    return config_nodes.clip(params.get("arch", "ViT-H-14"), layer=layer, pad=0, length=params.get("max_length", 77))


def _classes(params: Mapping[str, Any]) -> Node:
    reject_unknown_options(params, ("embed_dim", "n_classes", "key"), "cond_stage_config.params")
    # The last of their classes is the null class (1001 for ImageNet).
    return config_nodes.label(params.get("n_classes", 1000) - 1, params["embed_dim"])


def _bert(params: Mapping[str, Any]) -> Node:
    reject_unknown_options(
        params,
        ("n_embed", "n_layer", "vocab_size", "max_seq_len", "device", "use_tokenizer"),
        "cond_stage_config.params",
    )
    return {
        "_target_": "ldm.conditioner.transformer.WordPiece",
        **{"dim": params["n_embed"], "layers": params["n_layer"], "num_heads": 8, "num_head_channels": 64},
        **{"max_length": params.get("max_seq_len", 77), "keep_logits_head": True, "vocabulary": None},
    }


CONDITIONERS: Mapping[str, Callable[[Mapping[str, Any]], Node]] = {
    "FrozenCLIPEmbedder": _clip,
    "FrozenOpenCLIPEmbedder": _open_clip,
    "ClassEmbedder": _classes,
    "BERTEmbedder": _bert,
}


def conditioner(config: Any) -> Node:
    """Convert a cond_stage_config to our conditioner.  Raises UserError for one without a counterpart in ours."""
    if config == "__is_unconditional__":
        return config_nodes.NOTHING
    name = (
        str(config["target"]).rpartition(".")[2] if isinstance(config, Mapping) and "target" in config else str(config)
    )
    if name not in CONDITIONERS:
        raise UserError(f"cond_stage_config={name}: expected one of {', '.join(CONDITIONERS)}, __is_unconditional__")
    return CONDITIONERS[name](config.get("params") or {})
