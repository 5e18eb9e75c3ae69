"""CompVis' and Stability's single files: a U-Net, a first stage and a text tower under one roof, beside much that is no weight."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ldm.errors import UserError
from ldm.interop import bert, compvis, config_nodes, text
from ldm.interop.keymap import State, reject_unknown, strip_prefix
from ldm.interop.pipeline import Pipeline, fold_scale, unknown_data_info, with_scale

NET, STAGE, TOLD, EMA = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "model_ema."
TRANSFORMERS, OPEN_CLIP, CLASSES = f"{TOLD}transformer.", f"{TOLD}model.", f"{TOLD}embedding.weight"
SCALE = "scale_factor"  # a buffer, where the model was trained with scale_by_std
TABLES = (  # of the noise schedule, computed from its config
    *("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"),
    *("log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod", "posterior_variance"),
    *("posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2", "lvlb_weights", "logvar"),
)
COUNTERS = ("decay", "num_updates")  # of an average
_LAYERS = {1: (0, 2), 2: (5, 7), 3: (10, 12, 14), 4: (17, 19, 21), 5: (24, 26, 28)}  # VGG16's, by LPIPS' slices
LOSS = (  # what a first stage was trained with
    *("loss.logvar", "loss.perceptual_loss.scaling_layer.shift", "loss.perceptual_loss.scaling_layer.scale"),
    *(
        f"loss.perceptual_loss.net.slice{n}.{i}.{leaf}"
        for n, places in _LAYERS.items()
        for i in places
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
FOUNDATION = (  # the network that VA-VAE's latent was aligned with, and the projection onto it
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
    """A single file taken apart, each part by its own layout's names.  scale: of the latent, where the file says it."""

    net: dict[str, Tensor]
    stage: dict[str, Tensor]
    text_tower: dict[str, Tensor]
    scale: float | None


def first_stage(state: State, kind: str = "ema") -> dict[str, Tensor]:
    """Our first stage's weights of a file that holds one alone: CompVis' autoencoders, Stability's VAE, VA-VAE.

    kind: ema or raw, where the file has both.  Raises UserError for a name that is neither a weight nor listed here.
    """
    averages = strip_prefix(EMA, state)
    rest = {
        name: value for name, value in state.items() if not name.startswith(EMA) and name not in (*LOSS, *FOUNDATION)
    }
    return compvis.import_autoencoder(apply_ema(rest, averages, {name: name for name in rest}, kind))


def apply_ema(raw: State, averages: State, names: Mapping[str, str], kind: str) -> dict[str, Tensor]:
    """raw, each weight replaced by its average where there are any and kind is ema.

    names: of raw, to the name that its module had where the average was taken; the average is kept under that without its dots.
    Raises UserError for averages of something else, or of a part only.
    """
    flat = {name.replace(".", ""): mine for mine, name in names.items()}
    reject_unknown(averages.keys() - flat.keys() - set(COUNTERS), "the moving averages (model_ema)")
    there = {flat[name]: value for name, value in averages.items() if name in flat}
    if kind == "raw" or not there:
        return dict(raw)
    if missing := sorted(names.keys() - there.keys()):
        raise UserError(
            f"{len(missing)} weights have no moving average, the first is {missing[0]}; ask for weights=raw"
        )
    return {**raw, **there}


def split_parts(state: State, kind: str = "ema") -> Parts:
    """The parts of a whole pipeline in one file. Raises UserError for a file without a U-Net or a first stage, and for unknown names."""
    net, stage = strip_prefix(NET, state), strip_prefix(STAGE, state)
    if not net or not stage:
        raise UserError(
            f"this file has no {NET if not net else STAGE}*; expected a whole pipeline of CompVis or Stability"
        )
    scale = float(state[SCALE]) if SCALE in state else None
    told = {name: value for name, value in state.items() if name.startswith(TOLD)}
    mine = {*TABLES, SCALE}
    left = [name for name in state if not name.startswith((NET, STAGE, TOLD, EMA)) and name not in mine]
    reject_unknown(left, "CompVis checkpoint")
    averages = strip_prefix(EMA, state)
    return Parts(apply_ema(net, averages, {name: f"diffusion_model.{name}" for name in net}, kind), stage, told, scale)


def load(state: State, config: Mapping[str, Any], size: int, kind: str = "ema") -> Pipeline:
    """A pipeline of a single file; config: the nodes and scale of from_compvis.  size: of an image in pixels.

    Raises UserError for names without a place, a conditioner that the file does not hold, or a latent without a scale.
    """
    parts = split_parts(state, kind)
    scale = parts.scale if config.get("scale") is None else config["scale"]
    if scale is None:
        raise UserError(f"neither the config nor the file says the latent's scale ({SCALE})")
    tower, own = split_text_tower(parts.text_tower)
    weights = first_stage(parts.stage, kind)
    kept = {name: value for name, value in config.items() if name != "scale"}
    stage = with_scale(weights, scale, config["autoencoder"]["z_channels"])
    classes = len(own["embedding.weight"]) - 1 if "embedding.weight" in own else 1
    data = unknown_data_info(weights["encoder.stem.weight"].shape[1], size, classes)
    return Pipeline(kept, compvis.import_unet(parts.net), stage, data, tower, own)


def split_text_tower(state: State) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(text tower in open_clip's names, the conditioner's own weights) of what is under cond_stage_model. Raises UserError."""
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
    """The state dict of a single CompVis file: transformers' names of the text tower for the last layer (SD 1), open_clip's else (SD 2).

    Raises UserError for a model that CompVis' code has no counterpart for.
    """
    weights, scale = fold_scale(pipeline.autoencoder)
    made = {f"{NET}{name}": value for name, value in compvis.export_unet(pipeline.net).items()}
    made |= {f"{STAGE}{name}": value for name, value in compvis.export_autoencoder(weights).items()}
    made[SCALE] = pipeline.autoencoder["scale"].new_tensor(scale)
    if pipeline.text:
        last = config_nodes.encoder_of(pipeline.config["conditioner"])["layer"] == -1
        told = text.export_text(pipeline.text) if last else dict(pipeline.text)
        prefix = TRANSFORMERS if last else OPEN_CLIP
        made |= {f"{prefix}{name}": value for name, value in told.items()}
    own = pipeline.conditioner
    if "transformer.token.weight" in own:
        made |= {f"{TRANSFORMERS}{name}": value for name, value in bert.export_bert(own).items()}
    elif own.keys() == {"embedding.weight"}:
        made[CLASSES] = own["embedding.weight"]
    elif own:
        raise UserError(
            f"conditioner={pipeline.config['conditioner'].get('_target_')}: to=compvis has no name for its weights"
        )
    return made


def detect_sd1(state: State) -> dict[str, Any] | None:
    """The config of Stable Diffusion 1, whose yaml everybody has mislaid, or of its inpainting model, by a file's names and shapes.

    None for another file.
    """
    shapes = {
        f"{NET}input_blocks.0.0.bias": [320],
        f"{NET}time_embed.0.weight": [1280, 320],
        f"{NET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": [320, 768],
    }
    tower = f"{TRANSFORMERS}text_model.final_layer_norm.weight"
    if any(name not in state or list(state[name].shape) != shape for name, shape in {**shapes, tower: [768]}.items()):
        return None
    told = config_nodes.clip("ViT-L-14-quickgelu", layer=-1, pad=49407)
    return {
        "net": config_nodes.unet(320, (1, 2, 4, 4), 2, (4, 2, 1), config_nodes.transformer(conv=True), heads=8),
        "autoencoder": config_nodes.first_stage(4, 128, (1, 2, 4, 4), 2),
        "conditioner": config_nodes.inpainting(told) if state[f"{NET}input_blocks.0.0.weight"].shape[1] == 9 else told,
        "schedule": config_nodes.betas("scaled_linear", 1000, 0.00085, 0.012),
        "prediction": config_nodes.prediction("Eps"),
        "seed": 0,
        "scale": 0.18215,
    }
