"""Single files of CompVis and Stability: U-Net, first stage and text tower, along with much that is not a weight."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ldm.errors import UserError
from ldm.interop import bert, compvis, config_nodes, text
from ldm.interop.keymap import State, reject_unknown, strip_prefix
from ldm.interop.pipeline import Pipeline, fold_scale, unknown_data_info, with_scale

NET, STAGE, COND_STAGE, EMA = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "model_ema."
TRANSFORMERS, OPEN_CLIP, CLASSES = f"{COND_STAGE}transformer.", f"{COND_STAGE}model.", f"{COND_STAGE}embedding.weight"
SCALE = "scale_factor"  # a buffer, if the model was trained with scale_by_std
TABLES = (  # of the noise schedule, computed from its config
    *("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"),
    *("log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance"),
    *("posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2", "lvlb_weights", "logvar"),
)
COUNTERS = ("decay", "num_updates")  # of the EMA
_LAYERS = {1: (0, 2), 2: (5, 7), 3: (10, 12, 14), 4: (17, 19, 21), 5: (24, 26, 28)}  # layers of VGG16 in LPIPS' slices
LOSS = (  # of the losses that a first stage was trained with
    *("loss.logvar", "loss.perceptual_loss.scaling_layer.shift", "loss.perceptual_loss.scaling_layer.scale"),
    *(
        f"loss.perceptual_loss.net.slice{n}.{i}.{leaf}"
        for n, layers in _LAYERS.items()
        for i in layers
        for leaf in ("weight", "bias")
    ),
    *(f"loss.perceptual_loss.lin{n}.model.1.weight" for n in range(5)),
    *(f"loss.discriminator.main.{n}.{leaf}" for n in (0, 2, 3, 5, 6, 8, 9, 11) for leaf in ("weight", "bias")),
    *(
        f"loss.discriminator.main.{n}.{leaf}"
        for n in (3, 6, 9)
        for leaf in ("running_mean", "running_var", "num_batches_tracked")
    ),
)
_VIT = (
    *(
        "norm1.weight",
        "norm1.bias",
        "attn.qkv.weight",
        "attn.qkv.bias",
        "attn.proj.weight",
        "attn.proj.bias",
        "ls1.gamma",
    ),
    *("norm2.weight", "norm2.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias", "ls2.gamma"),
)
FOUNDATION = (  # the network that VA-VAE's latent space was aligned with, and the projection onto its features
    *("linear_proj.weight", "linear_proj.bias"),
    *(
        f"foundation_model.model.{name}"
        for name in ("cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias")
    ),
    *(f"foundation_model.model.{name}" for name in ("norm.weight", "norm.bias")),
    *(f"foundation_model.model.blocks.{n}.{name}" for n in range(24) for name in _VIT),
)


@dataclass(frozen=True)
class Parts:
    """A single file split into parts, each with the names of its own layout.  scale: of the latent, if in the file."""

    net: dict[str, Tensor]
    stage: dict[str, Tensor]
    text_tower: dict[str, Tensor]
    scale: float | None


def first_stage(state: State, kind: str = "ema") -> dict[str, Tensor]:
    """Convert the weights of a file that contains only a first stage: CompVis' autoencoders, Stability's VAE, VA-VAE.

    kind: "ema" or "raw", if the file has both.  Raises UserError for a name that is neither a weight nor listed here.
    """
    averages = strip_prefix(EMA, state)
    rest = {
        name: value for name, value in state.items() if not name.startswith(EMA) and name not in (*LOSS, *FOUNDATION)
    }
    return compvis.import_autoencoder(apply_ema(rest, averages, {name: name for name in rest}, kind))


def apply_ema(raw: State, averages: State, names: Mapping[str, str], kind: str) -> dict[str, Tensor]:
    """Return `raw` with each weight replaced by its EMA, if there is one and kind is "ema".

    names: name in `raw` -> the module's name when the EMA was taken; the EMA is stored under that name without dots.
    Raises UserError if the averages do not belong to `raw` or cover only a part of it.
    """
    flat = {name.replace(".", ""): raw_name for raw_name, name in names.items()}
    reject_unknown(averages.keys() - flat.keys() - set(COUNTERS), "the moving averages (model_ema)")
    averaged = {flat[name]: value for name, value in averages.items() if name in flat}
    if kind == "raw" or not averaged:
        return dict(raw)
    if missing := sorted(names.keys() - averaged.keys()):
        raise UserError(f"{len(missing)} weights have no moving average, the first is {missing[0]}; use weights=raw")
    return {**raw, **averaged}


def split_parts(state: State, kind: str = "ema") -> Parts:
    """Split a complete pipeline in one file into its parts.

    Raises UserError for a file without a U-Net or a first stage, and for unknown names.
    """
    net, stage = strip_prefix(NET, state), strip_prefix(STAGE, state)
    if not net or not stage:
        raise UserError(
            f"this file has no {NET if not net else STAGE}*; expected a complete pipeline of CompVis or Stability"
        )
    scale = float(state[SCALE]) if SCALE in state else None
    cond = {name: value for name, value in state.items() if name.startswith(COND_STAGE)}
    ignored = {*TABLES, SCALE}
    left = [name for name in state if not name.startswith((NET, STAGE, COND_STAGE, EMA)) and name not in ignored]
    reject_unknown(left, "CompVis checkpoint")
    averages = strip_prefix(EMA, state)
    return Parts(apply_ema(net, averages, {name: f"diffusion_model.{name}" for name in net}, kind), stage, cond, scale)


def load(state: State, config: Mapping[str, Any], size: int, kind: str = "ema") -> Pipeline:
    """Convert a single file to a pipeline.

    config: the nodes and scale of `from_compvis`.  size: height and width of an image in pixels.  kind: "ema" or "raw".
    Raises UserError for unknown names, a conditioner that is not in the file, or a latent without a scale.
    """
    parts = split_parts(state, kind)
    scale = parts.scale if config.get("scale") is None else config["scale"]
    if scale is None:
        raise UserError(f"neither the config nor the file has the latent's scale ({SCALE})")
    tower, own = split_text_tower(parts.text_tower)
    weights = first_stage(parts.stage, kind)
    nodes = {name: value for name, value in config.items() if name != "scale"}
    stage = with_scale(weights, scale, config["autoencoder"]["z_channels"])
    classes = len(own["embedding.weight"]) - 1 if "embedding.weight" in own else 1
    data = unknown_data_info(weights["encoder.stem.weight"].shape[1], size, classes)
    return Pipeline(nodes, compvis.import_unet(parts.net), stage, data, tower, own)


def split_text_tower(state: State) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split the weights under cond_stage_model into (text tower in open_clip's names, conditioner's weights).

    Raises UserError for unknown names.
    """
    if not state:
        return {}, {}
    if f"{TRANSFORMERS}token_emb.weight" in state:
        return {}, bert.import_bert(strip_prefix(TRANSFORMERS, state))
    if all(name.startswith(TRANSFORMERS) for name in state):
        return text.import_text(strip_prefix(TRANSFORMERS, state)), {}
    if all(name.startswith(OPEN_CLIP) for name in state):
        return text.import_open_clip(strip_prefix(OPEN_CLIP, state)), {}
    if list(state) == [CLASSES]:
        return {}, {"embedding.weight": state[CLASSES]}
    reject_unknown([name for name in state if not name.startswith((TRANSFORMERS, OPEN_CLIP))] or state, "conditioner")
    raise AssertionError


def save(pipeline: Pipeline) -> dict[str, Tensor]:
    """Convert a pipeline to the state dict of a single CompVis file.

    The text tower has transformers' names if the last layer is used (SD 1), else open_clip's (SD 2).
    Raises UserError for a model without a counterpart in CompVis' code.
    """
    weights, scale = fold_scale(pipeline.autoencoder)
    state = {f"{NET}{name}": value for name, value in compvis.export_unet(pipeline.net).items()}
    state |= {f"{STAGE}{name}": value for name, value in compvis.export_autoencoder(weights).items()}
    state[SCALE] = pipeline.autoencoder["scale"].new_tensor(scale)
    if pipeline.text:
        last = config_nodes.encoder_of(pipeline.config["conditioner"])["layer"] == -1
        tower = text.export_text(pipeline.text) if last else dict(pipeline.text)
        prefix = TRANSFORMERS if last else OPEN_CLIP
        state |= {f"{prefix}{name}": value for name, value in tower.items()}
    own = pipeline.conditioner
    if "transformer.token.weight" in own:
        state |= {f"{TRANSFORMERS}{name}": value for name, value in bert.export_bert(own).items()}
    elif own.keys() == {"embedding.weight"}:
        state[CLASSES] = own["embedding.weight"]
    elif own:
        raise UserError(
            f"conditioner={pipeline.config['conditioner'].get('_target_')}: to=compvis has no name for its weights"
        )
    return state


def detect_sd1(state: State) -> dict[str, Any] | None:
    """Return the config of Stable Diffusion 1 or its inpainting model if a file has its names and shapes, else None.

    Its files are usually passed on without the YAML.
    """
    shapes = {
        f"{NET}input_blocks.0.0.bias": [320],
        f"{NET}time_embed.0.weight": [1280, 320],
        f"{NET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": [320, 768],
    }
    tower = f"{TRANSFORMERS}text_model.final_layer_norm.weight"
    if any(name not in state or list(state[name].shape) != shape for name, shape in {**shapes, tower: [768]}.items()):
        return None
    prompt = config_nodes.clip("ViT-L-14-quickgelu", layer=-1, pad=49407)
    return {
        "net": config_nodes.unet(320, (1, 2, 4, 4), 2, (4, 2, 1), config_nodes.transformer(conv=True), heads=8),
        "autoencoder": config_nodes.first_stage(4, 128, (1, 2, 4, 4), 2),
        "conditioner": config_nodes.inpainting(prompt)
        if state[f"{NET}input_blocks.0.0.weight"].shape[1] == 9
        else prompt,
        "schedule": config_nodes.betas("scaled_linear", 1000, 0.00085, 0.012),
        "prediction": config_nodes.prediction("Eps"),
        "seed": 0,
        "scale": 0.18215,
    }
