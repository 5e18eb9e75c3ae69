"""Names and outputs of CompVis' own networks (recorded by record_sdkit.py) and of diffusers': ours, from their weights,
answer the same.
"""

import json
from functools import cache, partial
from pathlib import Path

import diffusers as theirs
import pytest
import torch
from hydra.utils import instantiate
from seeded import digest, fill, numbers, some, state

from ldm.autoencoder.kl import AutoencoderKL
from ldm.condition import Condition
from ldm.errors import UserError
from ldm.interop import compvis, compvis_config, diffusers, diffusers_config
from ldm.interop.pipeline import STATISTICS
from ldm.net.blocks import timestep_embedding
from ldm.net.unet import UNet

SDKIT = json.loads((Path(__file__).parent / "sdkit.json").read_text())
TOLERANCE = {"float32": 1e-4, "float64": 1e-5}
TIMES = torch.tensor([3.0, 700.0])


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference over the largest value."""
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())


def net_of(options: dict) -> UNet:
    """Ours, from CompVis' own options."""
    node = compvis_config.net({name: value for name, value in options.items() if name != "context_dim"})
    context = options.get("context_dim")
    dim = context[0] if isinstance(context, list) else context
    return instantiate(
        node, in_channels=options["in_channels"], out_channels=options["out_channels"], context_dim=dim
    ).eval()


def stage_of(dd: dict) -> AutoencoderKL:
    return instantiate(compvis_config.first_stage({"params": {"embed_dim": dd["z_channels"], "ddconfig": dd}})).eval()


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value for name, value in module.state_dict().items() if name not in STATISTICS}


@cache
def on_meta(kind: str, name: str) -> dict[str, torch.Tensor]:
    """Our network's names and shapes."""
    options = SDKIT[kind][name]["options"]
    with torch.device("meta"):
        return weights(net_of(options) if "unet" in kind else stage_of(options))


@cache
def shapes(kind: str, name: str) -> dict[str, tuple[int, ...]]:
    """CompVis' names and shapes: ours translated, and proven to be theirs by the recorded digest."""
    case, ours, unet = SDKIT[kind][name], on_meta(kind, name), "unet" in kind
    made = {n: tuple(v.shape) for n, v in (compvis.export_unet if unet else compvis.export_autoencoder)(ours).items()}
    assert (len(made), digest(made)) == (case["tensors"], case["digest"])
    return made


QUICK = ("sd1", "kl_f8")  # of those at paper scale


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        pytest.param(kind, name, marks=[pytest.mark.slow] if "paper" in kind and name not in QUICK else [])
        for kind, cases in SDKIT.items()
        for name in cases
    ],
)
def test_import_covers_every_name_and_shape(kind, name):
    case = SDKIT[kind][name]
    there = shapes(kind, name)
    assert sum(torch.Size(shape).numel() for shape in there.values()) == case["parameters"]
    fake = {n: torch.empty(shape, device="meta") for n, shape in there.items()}
    back = compvis.import_unet(fake) if "unet" in kind else compvis.import_autoencoder(fake)
    assert {n: v.shape for n, v in back.items()} == {n: v.shape for n, v in on_meta(kind, name).items()}


def same_shapes(read: dict[str, torch.Tensor], node: dict, **supplied: int) -> None:
    """What was read is the state dict of what the node makes."""
    with torch.device("meta"):
        made = weights(instantiate(node, **supplied))
    assert {n: v.shape for n, v in read.items()} == {n: v.shape for n, v in made.items()}


def there_and_back(given, read, write):
    """Our state dict of theirs, after it was written again to the bit."""
    ours = read(given)
    again = write(ours)
    assert again.keys() == given.keys()
    assert all(torch.equal(again[name], value) and again[name].dtype == value.dtype for name, value in given.items())
    return ours


@torch.no_grad()
def unet_differences(kind: str, name: str, size: int = 8) -> dict[str, float]:
    case = SDKIT[kind][name]
    options = case["options"]
    ours = there_and_back(state(shapes(kind, name)), compvis.import_unet, compvis.export_unet)
    found = {}
    for precision, answer in case["output"].items():
        dtype = getattr(torch, precision)
        net = net_of(options).to(dtype)
        net.load_state_dict(ours)
        x = numbers("x", (2, options["in_channels"], size, size)).to(dtype)
        context = options.get("context_dim")
        dim = context[0] if isinstance(context, list) else context
        told = Condition(context=numbers("context", (2, 5, dim)).to(dtype)) if dim else Condition()
        found[precision] = relative(torch.tensor(some(net(x, TIMES.to(dtype), told))), torch.tensor(answer))
    return found


@torch.no_grad()
def stage_differences(kind: str, name: str, size: int = 16) -> dict[str, float]:
    case = SDKIT[kind][name]
    ours = there_and_back(state(shapes(kind, name)), compvis.import_autoencoder, compvis.export_autoencoder)
    found = {}
    for precision, answer in case["output"].items():
        dtype = getattr(torch, precision)
        stage = stage_of(case["options"]).to(dtype)
        stage.load_state_dict({**ours, **{n: v for n, v in stage.state_dict().items() if n in STATISTICS}})
        posterior = stage.posterior(numbers("image", (2, 3, size, size)).to(dtype))
        each = {"moments": posterior.moments, "image": stage.decode_raw(posterior.mean)}
        found[precision] = max(
            relative(torch.tensor(some(value)), torch.tensor(answer[n])) for n, value in each.items()
        )
    return found


@pytest.mark.parametrize("name", SDKIT["unet"])
def test_unet_matches_compvis(name):
    for precision, difference in unet_differences("unet", name).items():
        assert difference <= TOLERANCE[precision], precision


@pytest.mark.parametrize("name", SDKIT["autoencoder"])
def test_autoencoder_matches_compvis(name):
    for precision, difference in stage_differences("autoencoder", name).items():
        assert difference <= TOLERANCE[precision], precision


@pytest.mark.slow
def test_stable_diffusion_1_matches_compvis():
    found = {"unet": unet_differences("paper_unet", "sd1"), "vae": stage_differences("paper_autoencoder", "kl_f8", 32)}
    print(found)
    assert all(found[part][precision] <= TOLERANCE[precision] for part in found for precision in TOLERANCE)


SMALL = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "cross_attention_dim": 24,
    "norm_num_groups": 16,
}
UNETS = {
    "sd1": {
        **{**SMALL, "block_out_channels": (32, 64, 64), "attention_head_dim": 4},
        **{"down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")},
        **{"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")},
    },
    "sd2": {
        **{**SMALL, "block_out_channels": (32, 64), "attention_head_dim": (2, 4), "use_linear_projection": True},
        **{
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        },
        **{"transformer_layers_per_block": (1, 2), "resnet_time_scale_shift": "scale_shift"},
    },
    "the middle alone attends": {
        **{**SMALL, "block_out_channels": (32, 64), "attention_head_dim": 4},
        **{"down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D")},
    },
}


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("name", UNETS)
@torch.no_grad()
def test_unet_matches_diffusers(name, precision):
    dtype = getattr(torch, precision)
    net = fill(theirs.UNet2DConditionModel(**UNETS[name])).to(dtype)
    ours = (
        instantiate(diffusers_config.net(dict(net.config)), in_channels=4, out_channels=4, context_dim=24)
        .to(dtype)
        .eval()
    )
    ours.load_state_dict(there_and_back(net.state_dict(), diffusers.import_unet, diffusers.export_unet))
    x, context = numbers("x", (2, 4, 8, 8)).to(dtype), numbers("context", (2, 5, 24)).to(dtype)
    expected = net(x, TIMES.to(dtype), context).sample
    assert relative(ours(x, TIMES.to(dtype), Condition(context=context)), expected) <= TOLERANCE[precision]


@torch.no_grad()
def test_unet_with_sdxl_vector_matches_diffusers():
    """SDXL adds the pooled text and six embedded sizes to the time; the U-Net alone is ours, who hears both is told one
    vector.
    """
    more = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 58,
    }
    net = fill(theirs.UNet2DConditionModel(**UNETS["sd2"], **more))
    node = diffusers_config.net({**net.config, "addition_embed_type": None, **dict.fromkeys(list(more)[1:])})
    ours = instantiate(node, in_channels=4, out_channels=4, context_dim=24, vector_dim=58).eval()
    ours.load_state_dict(there_and_back(net.state_dict(), diffusers.import_unet, diffusers.export_unet))
    there_and_back(compvis.export_unet(ours.state_dict()), compvis.import_unet, compvis.export_unet)
    assert "label_emb.0.2.weight" in compvis.export_unet(ours.state_dict())
    x, context, pooled = numbers("x", (2, 4, 8, 8)), numbers("context", (2, 5, 24)), numbers("pooled", (2, 10))
    sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64], [32, 48, 5, 9, 64, 64]])
    expected = net(x, TIMES, context, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes}).sample
    vector = torch.cat([pooled, timestep_embedding(sizes.flatten(), 8).view(2, 48)], dim=1)
    assert relative(ours(x, TIMES, Condition(context=context, vector=vector)), expected) <= TOLERANCE["float32"]


VAE = {"block_out_channels": (32, 64, 64), "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 16}
STAGES = {
    "kl": partial(theirs.AutoencoderKL, 3, 3, ("DownEncoderBlock2D",) * 3, ("UpDecoderBlock2D",) * 3, **VAE),
    "vq": partial(
        theirs.VQModel, 3, 3, ("DownEncoderBlock2D",) * 3, ("UpDecoderBlock2D",) * 3, **VAE, num_vq_embeddings=16
    ),
}


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("name", STAGES)
@torch.no_grad()
def test_autoencoder_matches_diffusers(name, precision):
    dtype = getattr(torch, precision)
    stage = fill(STAGES[name]()).to(dtype)
    ours = instantiate(diffusers_config.first_stage(dict(stage.config))).to(dtype).eval()
    read = there_and_back(stage.state_dict(), diffusers.import_autoencoder, diffusers.export_autoencoder)
    ours.load_state_dict({**read, **{n: v for n, v in ours.state_dict().items() if n in STATISTICS}})
    image = numbers("image", (2, 3, 16, 16)).to(dtype)
    encoded, mine = stage.encode(image), ours.posterior(image)
    latent = encoded.latent_dist.mean if name == "kl" else encoded.latents
    assert relative(mine.mode, latent) <= TOLERANCE[precision]
    assert name != "kl" or relative(mine.moments, encoded.latent_dist.parameters) <= TOLERANCE[precision]
    assert relative(ours.decode_raw(latent), stage.decode(latent).sample) <= TOLERANCE[precision]


def test_stable_diffusion_1_config_matches_diffusers():
    with torch.device("meta"):
        unet = theirs.UNet2DConditionModel(
            sample_size=64, block_out_channels=(320, 640, 1280, 1280), cross_attention_dim=768, attention_head_dim=8
        )
        vae = theirs.AutoencoderKL(
            **{"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2},
            **{"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4},
        )
    fake = {name: torch.empty(shape, device="meta") for name, shape in shapes("paper_unet", "sd1").items()}
    made = diffusers.export_unet(compvis.import_unet(fake))
    assert {n: v.shape for n, v in made.items()} == {n: v.shape for n, v in unet.state_dict().items()}
    fake = {name: torch.empty(shape, device="meta") for name, shape in shapes("paper_autoencoder", "kl_f8").items()}
    made = diffusers.export_autoencoder(compvis.import_autoencoder(fake))
    assert {n: v.shape for n, v in made.items()} == {n: v.shape for n, v in vae.state_dict().items()}


def test_older_autoencoder_names_are_read():
    stage = fill(STAGES["kl"]())
    new = stage.state_dict()
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, value in new.items():
        for now, before in older.items():
            name = name.replace(f".attentions.0.{now}.", f".attentions.0.{before}.")
        old[name] = value
    assert sum(a != b for a, b in zip(old, new, strict=True)) == 16  # four layers' weight and bias, on both sides
    read, expected = diffusers.import_autoencoder(old), diffusers.import_autoencoder(new)
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[name], expected[name]) for name in read)


@pytest.mark.parametrize("module", [compvis, diffusers])
def test_import_rejects_unknown_tensors(module):
    unet = state(shapes("unet", "sd"))
    ours = compvis.import_unet(unet)
    given = module.export_unet(ours)
    extra = next(iter(given.values()))
    with pytest.raises(UserError, match=r"U-Net: unknown names lora_up\.weight; expected"):
        module.import_unet({**given, "lora_up.weight": extra})
    with pytest.raises(UserError, match=r"U-Net: unknown names controls\.0\.weight; expected"):
        module.export_unet({**ours, "controls.0.weight": extra})
    part = next(name for name in given if name.endswith("attn2.to_v.weight"))
    with pytest.raises(UserError, match=r"attn2\.to_v\.weight is missing, but .*attn2\.to_k\.weight"):
        module.import_unet({name: value for name, value in given.items() if name != part})
    with pytest.raises(UserError, match="these are not the weights of"):
        module.import_unet({"encoder.conv_in.weight": extra})
    with pytest.raises(UserError, match="these are not the weights of"):
        module.export_unet({"encoder.stem.weight": extra})
    stage = compvis.import_autoencoder(state(shapes("autoencoder", "kl_f4_attn")))
    with pytest.raises(UserError, match="autoencoder: unknown names scale, shift"):
        module.export_autoencoder({**stage, "shift": extra, "scale": extra})
    with pytest.raises(UserError, match=r"autoencoder: unknown names loss\.logvar"):
        module.import_autoencoder({**module.export_autoencoder(stage), "loss.logvar": extra})


def test_codebook_round_trip():
    given = {**state(shapes("autoencoder", "kl_f4")), "quantize.embedding.weight": numbers("codes", (16, 3))}
    ours = there_and_back(given, compvis.import_autoencoder, compvis.export_autoencoder)
    assert torch.equal(ours["codebook.weight"], given["quantize.embedding.weight"])
