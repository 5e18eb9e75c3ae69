"""CompVis' yaml in, our nodes out: the published models are the options of conf/."""

from copy import deepcopy

import pytest
import torch
from hydra.utils import instantiate
from smoke import composed

from ldm.config.build import to_container
from ldm.diffusion.schedule import from_betas
from ldm.errors import UserError
from ldm.interop.compvis_config import from_compvis

KL = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 128,
    "ch_mult": [1, 2, 4, 4],
}
KL |= {"num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0}
STAGE = {
    "target": "ldm.models.autoencoder.AutoencoderKL",
    "params": {"embed_dim": 4, "monitor": "val/rec_loss", "ddconfig": KL},
}
STAGE["params"]["lossconfig"] = {"target": "torch.nn.Identity"}
UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "attention_resolutions": [4, 2, 1],
}
UNET |= {
    "num_res_blocks": 2,
    "channel_mult": [1, 2, 4, 4],
    "num_heads": 8,
    "use_spatial_transformer": True,
    "transformer_depth": 1,
}
UNET |= {"context_dim": 768, "use_checkpoint": True, "legacy": False}
PARAMS = {"linear_start": 0.00085, "linear_end": 0.012, "num_timesteps_cond": 1, "log_every_t": 200, "timesteps": 1000}
PARAMS |= {
    "first_stage_key": "jpg",
    "cond_stage_key": "txt",
    "image_size": 64,
    "channels": 4,
    "cond_stage_trainable": False,
}
PARAMS |= {"conditioning_key": "crossattn", "monitor": "val/loss_simple_ema", "scale_factor": 0.18215, "use_ema": False}
PARAMS |= {
    "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": UNET},
    "first_stage_config": STAGE,
}
PARAMS |= {"cond_stage_config": {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"}}
SD1 = {"model": {"base_learning_rate": 1e-4, "target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": PARAMS}}
VQ = {**KL, "double_z": False, "z_channels": 3, "ch_mult": [1, 2, 4]}


def changed(unet=None, stage=None, **params):
    config = deepcopy(SD1)
    config["model"]["params"] |= params
    config["model"]["params"]["unet_config"]["params"] |= unet or {}
    if stage:
        config["model"]["params"]["first_stage_config"] = stage
    return config


def without(config, *names):
    for name in names:
        config["model"]["params"]["unet_config"]["params"].pop(name)
    return config


SD2 = without(
    changed({"num_head_channels": 64, "use_linear_in_transformer": True, "context_dim": 1024}, parameterization="v"),
    "num_heads",
)
SD2["model"]["params"]["cond_stage_config"] = {
    "target": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder",
    "params": {"freeze": True, "layer": "penultimate"},
}
FFHQ = {
    "model_channels": 224,
    "attention_resolutions": [8, 4, 2],
    "channel_mult": [1, 2, 3, 4],
    "num_head_channels": 32,
}
FFHQ = without(
    changed({**FFHQ, "in_channels": 3, "out_channels": 3}), "num_heads", "use_spatial_transformer", "context_dim"
)
FFHQ["model"]["params"] |= {"linear_start": 0.0015, "linear_end": 0.0195, "cond_stage_config": "__is_unconditional__"}
FFHQ["model"]["params"]["first_stage_config"] = {
    "target": "ldm.models.autoencoder.VQModelInterface",
    "params": {
        "embed_dim": 3,
        "n_embed": 8192,
        "ckpt_path": "vq.ckpt",
        "ddconfig": VQ,
        "lossconfig": {"target": "torch.nn.Identity"},
    },
}
CHURCHES = {
    "model_channels": 192,
    "attention_resolutions": [1, 2, 4, 8],
    "channel_mult": [1, 2, 2, 4, 4],
    "num_heads": 8,
}
CHURCHES |= {"use_scale_shift_norm": True, "resblock_updown": True}
CHURCHES = without(changed(CHURCHES, scale_by_std=True, loss_type="l1"), "use_spatial_transformer", "context_dim")


@pytest.mark.parametrize(
    ("config", "net", "stage"),
    [(SD1, "sd1", "kl_f8"), (SD2, "sd2", "kl_f8"), (FFHQ, "ldm4_ffhq", "vq_f4"), (CHURCHES, "ldm8_churches", "kl_f8")],
    ids=["sd1", "sd2", "ffhq", "churches"],
)
def test_published_compvis_configs_equal_conf_options(config, net, stage):
    found = from_compvis(config)
    wanted = to_container(composed("budget=full", f"net={net}", f"autoencoder={stage}"))
    mine = {**wanted["net"]}
    if mine["num_heads"]:
        mine["num_head_channels"] = found["net"]["num_head_channels"]  # unread
    assert found["net"] == mine
    assert found["autoencoder"] == wanted["autoencoder"]


def test_compvis_config_of_stable_diffusion_1():
    found = from_compvis(SD1)
    assert found["scale"] == 0.18215
    assert found["prediction"] == {"_target_": "ldm.diffusion.prediction.Eps"}
    assert found["conditioner"]["encoder"]["model"] == "ViT-L-14-quickgelu"
    assert (found["conditioner"]["encoder"]["layer"], found["conditioner"]["encoder"]["pad_token_id"]) == (-1, 49407)


def test_compvis_config_of_other_models():
    assert from_compvis(SD2)["prediction"] == {"_target_": "ldm.diffusion.prediction.V"}
    assert from_compvis(SD2)["conditioner"]["encoder"] | {"weights": 0} == {
        **{"_target_": "ldm.conditioner.clip.CLIP", "model": "ViT-H-14", "weights": 0, "hub": False},
        **{"layer": -2, "pad_token_id": 0, "random": False},
    }
    assert from_compvis(FFHQ)["conditioner"] == {"_target_": "ldm.conditioner.none.Unconditional"}
    assert from_compvis(CHURCHES)["scale"] is None
    classes = {
        "target": "ldm.modules.encoders.modules.ClassEmbedder",
        "params": {"n_classes": 1001, "embed_dim": 512, "key": "class_label"},
    }
    node = from_compvis(changed(cond_stage_config=classes))["conditioner"]
    assert (node["num_classes"], node["dim"]) == (1000, 512)
    words = {"target": "ldm.modules.encoders.modules.BERTEmbedder", "params": {"n_embed": 1280, "n_layer": 32}}
    node = from_compvis(changed(cond_stage_config=words))["conditioner"]
    assert (node["dim"], node["layers"], node["max_length"]) == (1280, 32, 77)
    attended = {**STAGE, "params": {**STAGE["params"], "ddconfig": {**KL, "attn_resolutions": [32, 16]}}}
    assert from_compvis(changed(stage=attended))["autoencoder"]["encoder"]["attention_resolutions"] == [
        8
    ]  # 16 px is none of its four levels
    plain_middle = {**STAGE, "params": {**STAGE["params"], "ddconfig": {**KL, "attn_type": "none"}}}
    assert from_compvis(changed(stage=plain_middle))["autoencoder"]["decoder"]["middle_attention"] is False


@pytest.mark.parametrize("T", [1000, 500])
@pytest.mark.parametrize(
    ("named", "betas"),
    [
        ("linear", lambda a, b, T: torch.linspace(a**0.5, b**0.5, T, dtype=torch.float64) ** 2),
        ("sqrt_linear", lambda a, b, T: torch.linspace(a, b, T, dtype=torch.float64)),
    ],
)
def test_compvis_linear_schedule_is_scaled_linear(named, betas, T):
    found = instantiate(from_compvis(changed(beta_schedule=named, timesteps=T))["schedule"])
    assert torch.allclose(found.alpha_bar, from_betas(betas(0.00085, 0.012, T)).alpha_bar, rtol=1e-12)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (changed(beta_schedule="sqrt"), "beta_schedule=sqrt: expected one of linear, sqrt_linear, cosine"),
        (changed(parameterization="mu"), "parameterization=mu: expected one of eps, v, x0"),
        (changed(embedding_dropout=0.25), r"model\.params\.embedding_dropout=0\.25: ours has no counterpart"),
        (changed({"disable_self_attentions": [True]}), r"unet_config\.params\.disable_self_attentions"),
        (changed({"dims": 3}), "expected dims=2"),
        (
            changed(cond_stage_config={"target": "x.SpatialRescaler"}),
            "cond_stage_config=SpatialRescaler: expected one of",
        ),
        (
            changed(stage={**STAGE, "params": {**STAGE["params"], "embed_dim": 8}}),
            "embed_dim=8 and z_channels=4; expected the same",
        ),
        (
            changed(stage={**STAGE, "params": {**STAGE["params"], "remap": "x"}}),
            r"first_stage_config\.params\.remap='x'",
        ),
        ({"model": {"params": {}}}, "this config has no unet_config with params"),
    ],
)
def test_compvis_config_rejects_unsupported(config, said):
    with pytest.raises(UserError, match=said):
        from_compvis(config)
