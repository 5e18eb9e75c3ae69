"""Record what CompVis' own networks answer: their names and shapes at paper scale, their outputs at reduced width and
at SD 1's own.

    pip install --no-deps --target FOLDER stable-diffusion-sdkit==2.1.5
    PYTHONPATH=FOLDER:tests/interop python tests/tools/record_sdkit.py

The package (Stability's fork of CompVis' code) is called `ldm` too, so this is a program of its own, away from ours.
Writes sdkit.json: for each case the options, how many parameters of which names and shapes there are, and some numbers
of each output.
"""

import json
import sys
from pathlib import Path

import torch

sys.path = [place for place in sys.path if place not in ("", str(Path(__file__).parents[2]))]
import ldm  # noqa: E402

assert "diffusionmodules" in " ".join(str(p) for p in Path(ldm.__path__[0]).rglob("*")), (
    "PYTHONPATH must lead to stable-diffusion-sdkit"
)
from ldm.models.autoencoder import AutoencoderKL  # noqa: E402
from ldm.modules import attention  # noqa: E402
from ldm.modules.diffusionmodules import openaimodel, util  # noqa: E402
from seeded import digest, fill, numbers, some  # noqa: E402

COMMON = {"image_size": 8, "in_channels": 4, "out_channels": 4, "num_res_blocks": 2, "legacy": False}
SD = {"use_spatial_transformer": True, "transformer_depth": 1, **COMMON}
PAPER = {"image_size": 64, "num_res_blocks": 2}
UNETS = {
    "sd": {
        **SD,
        "model_channels": 32,
        "attention_resolutions": [2, 1],
        "channel_mult": [1, 2, 2],
        "num_heads": 4,
        "context_dim": 24,
    },
    "sd2": {
        **{**SD, "model_channels": 32, "attention_resolutions": [2], "channel_mult": [1, 2], "num_head_channels": 16},
        **{"use_linear_in_transformer": True, "transformer_depth": 2, "context_dim": [24, 24]},
    },
    "ffhq": {
        **COMMON,
        "model_channels": 32,
        "attention_resolutions": [2],
        "channel_mult": [1, 2],
        "num_head_channels": 16,
    },
    "churches": {
        **{**COMMON, "model_channels": 32, "attention_resolutions": [1, 2], "channel_mult": [1, 2, 2], "num_heads": 4},
        **{"use_scale_shift_norm": True, "resblock_updown": True},
    },
    "new_order": {
        **{
            **COMMON,
            "model_channels": 32,
            "attention_resolutions": [2],
            "channel_mult": [1, 2],
            "num_head_channels": 16,
        },
        **{"use_new_attention_order": True},
    },
}
PAPER_UNETS = {
    "sd1": {
        **{**SD, **PAPER, "model_channels": 320, "attention_resolutions": [4, 2, 1], "channel_mult": [1, 2, 4, 4]},
        **{"num_heads": 8, "context_dim": 768},
    },
    "sd2": {
        **{**SD, **PAPER, "model_channels": 320, "attention_resolutions": [4, 2, 1], "channel_mult": [1, 2, 4, 4]},
        **{"num_head_channels": 64, "context_dim": 1024, "use_linear_in_transformer": True},
    },
    "ldm4_ffhq": {
        **{
            **COMMON,
            **PAPER,
            "in_channels": 3,
            "out_channels": 3,
            "model_channels": 224,
            "attention_resolutions": [8, 4, 2],
        },
        **{"channel_mult": [1, 2, 3, 4], "num_head_channels": 32},
    },
    "ldm8_churches": {
        **{
            **COMMON,
            **PAPER,
            "model_channels": 192,
            "attention_resolutions": [1, 2, 4, 8],
            "channel_mult": [1, 2, 2, 4, 4],
        },
        **{"num_heads": 8, "use_scale_shift_norm": True, "resblock_updown": True},
    },
    "ldm4_cin256": {
        **{
            **SD,
            **PAPER,
            "in_channels": 3,
            "out_channels": 3,
            "model_channels": 192,
            "attention_resolutions": [8, 4, 2],
        },
        **{"channel_mult": [1, 2, 3, 5], "num_heads": 1, "context_dim": 512},
    },
}
VAE = {"double_z": True, "in_channels": 3, "out_ch": 3, "num_res_blocks": 2, "dropout": 0.0}
AUTOENCODERS = {
    "kl_f4": {**VAE, "z_channels": 3, "resolution": 16, "ch": 32, "ch_mult": [1, 2, 2], "attn_resolutions": []},
    "kl_f4_attn": {
        **VAE,
        "z_channels": 4,
        "resolution": 16,
        "ch": 32,
        "ch_mult": [1, 1, 2],
        "attn_resolutions": [4, 8],
    },
}
PAPER_AUTOENCODERS = {
    "kl_f8": {**VAE, "z_channels": 4, "resolution": 256, "ch": 128, "ch_mult": [1, 2, 4, 4], "attn_resolutions": []},
    "kl_f16": {
        **VAE,
        "z_channels": 16,
        "resolution": 256,
        "ch": 128,
        "ch_mult": [1, 1, 2, 2, 4],
        "attn_resolutions": [16],
    },
}
in_float32 = openaimodel.timestep_embedding
util.GroupNorm32.forward = torch.nn.GroupNorm.forward  # which it is, but for a detour over float32
attention._ATTN_PRECISION = "the input's"  # no such detour there either


def unet(options: dict, dtype: torch.dtype) -> openaimodel.UNetModel:
    net = fill(openaimodel.UNetModel(**options)).to(dtype)
    net.dtype = dtype  # what it casts its input to
    openaimodel.timestep_embedding = lambda *args, **kwargs: in_float32(*args, **kwargs).to(dtype)
    return net


def autoencoder(options: dict) -> AutoencoderKL:
    return AutoencoderKL(options, {"target": "torch.nn.Identity"}, embed_dim=options["z_channels"])


def shapes(module: torch.nn.Module) -> dict:
    names = {name: list(value.shape) for name, value in module.state_dict().items()}
    return {"tensors": len(names), "parameters": sum(p.numel() for p in module.parameters()), "digest": digest(names)}


@torch.no_grad()
def asked(options: dict, size: int) -> dict:
    """What a U-Net answers in both precisions."""
    answers = {}
    for dtype in (torch.float32, torch.float64):
        net = unet(options, dtype)
        x = numbers("x", (2, options["in_channels"], size, size)).to(dtype)
        dims = [dim for dim in [options.get("context_dim")] if dim is not None]
        dims = dims[0] if dims and isinstance(dims[0], list) else dims  # one for each block of a transformer
        context = [numbers("context", (2, 5, dim)).to(dtype) for dim in dims] or None
        answers[str(dtype)[6:]] = some(net(x, torch.tensor([3.0, 700.0], dtype=dtype), context))
    return answers


@torch.no_grad()
def reconstructed(options: dict, size: int) -> dict:
    """The moments and the image of an autoencoder in both precisions."""
    answers = {}
    for dtype in (torch.float32, torch.float64):
        both = fill(autoencoder(options)).to(dtype)
        posterior = both.encode(numbers("image", (2, 3, size, size)).to(dtype))
        moments = torch.cat([posterior.mean, posterior.logvar], 1)
        answers[str(dtype)[6:]] = {"moments": some(moments), "image": some(both.decode(posterior.mean))}
    return answers


def main() -> None:
    made: dict = {"unet": {}, "autoencoder": {}, "paper_unet": {}, "paper_autoencoder": {}}
    for name, options in UNETS.items():
        made["unet"][name] = {
            "options": options,
            **shapes(openaimodel.UNetModel(**options)),
            "output": asked(options, 8),
        }
    for name, options in AUTOENCODERS.items():
        made["autoencoder"][name] = {
            "options": options,
            **shapes(autoencoder(options)),
            "output": reconstructed(options, 16),
        }
    for name, options in PAPER_UNETS.items():
        with torch.device("meta"):
            made["paper_unet"][name] = {"options": options, **shapes(openaimodel.UNetModel(**options))}
    for name, options in PAPER_AUTOENCODERS.items():
        with torch.device("meta"):
            made["paper_autoencoder"][name] = {"options": options, **shapes(autoencoder(options))}
    made["paper_unet"]["sd1"]["output"] = asked(PAPER_UNETS["sd1"], 8)
    made["paper_autoencoder"]["kl_f8"]["output"] = reconstructed(PAPER_AUTOENCODERS["kl_f8"], 32)
    (Path(__file__).parents[1] / "interop" / "sdkit.json").write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
