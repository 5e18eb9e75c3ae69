"""What lies beside the weights in released files is known by name: first stages with their losses, averages, VA-VAE's
foundation.
"""

import pytest
import torch
from seeded import fill, state
from test_tables import same_shapes, shapes

from ldm.errors import UserError
from ldm.interop import checkpoint, compvis, config_nodes
from ldm.interop.checkpoint import COND_STAGE, EMA, FOUNDATION, LOSS, NET, STAGE


@pytest.fixture
def stage():
    return state(shapes("autoencoder", "kl_f4_attn"))


def same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_first_stage_loss_weights_are_recognized(stage):
    same(
        checkpoint.first_stage({**stage, **{name: torch.zeros(1) for name in LOSS}}), compvis.import_autoencoder(stage)
    )
    for unknown in (
        "loss.discriminator.main.12.weight",
        "loss.perceptual_loss.net.slice6.0.bias",
        "loss.logvars",
        "model_emas.decay",
    ):
        with pytest.raises(UserError, match=f"unknown names {unknown}"):
            checkpoint.first_stage({**stage, unknown: torch.zeros(1)})


def test_first_stage_reads_va_vae_extras(stage):
    assert len(FOUNDATION) == 2 + 6 + 24 * 14
    beside = {name: torch.zeros(1) for name in (*FOUNDATION, *LOSS)}
    same(checkpoint.first_stage({**stage, **beside}), compvis.import_autoencoder(stage))


def test_first_stage_prefers_averages(stage):
    averages = {EMA + name.replace(".", ""): value + 1 for name, value in stage.items()}
    counters = {f"{EMA}decay": torch.tensor(0.999), f"{EMA}num_updates": torch.tensor(3)}
    given = {**stage, **averages, **counters}
    same(checkpoint.first_stage(given), compvis.import_autoencoder({name: value + 1 for name, value in stage.items()}))
    same(checkpoint.first_stage(given, "raw"), compvis.import_autoencoder(stage))


def test_discriminator_names_match_real_network():
    norm = torch.nn.BatchNorm2d
    layers, wide = [torch.nn.Conv2d(3, 64, 4), torch.nn.LeakyReLU()], 64
    for width in (128, 256, 512):
        layers += [torch.nn.Conv2d(wide, width, 4, bias=False), norm(width), torch.nn.LeakyReLU()]
        wide = width
    main = torch.nn.Sequential(*layers, torch.nn.Conv2d(wide, 1, 4))
    assert {f"loss.discriminator.main.{name}" for name in main.state_dict()} <= set(LOSS)


def test_perceptual_loss_names_match_vgg16():
    from torchvision.models import vgg16

    with torch.device("meta"):
        real = {name.removeprefix("features.") for name in vgg16(weights=None).features.state_dict()}
    listed = {name.split(".", 4)[4] for name in LOSS if ".net.slice" in name}
    assert listed == real


def test_stable_diffusion_1_is_recognized_by_shapes():
    with torch.device("meta"):
        named = {f"{NET}{name}": torch.empty(shape) for name, shape in shapes("paper_unet", "sd1").items()}
        named |= {f"{STAGE}{name}": torch.empty(shape) for name, shape in shapes("paper_autoencoder", "kl_f8").items()}
        named[f"{COND_STAGE}transformer.text_model.final_layer_norm.weight"] = torch.empty(768)
    found = checkpoint.detect_sd1(named)
    assert found is not None
    assert (found["scale"], found["prediction"]["_target_"]) == (0.18215, "ldm.diffusion.prediction.Eps")
    parts = checkpoint.split_parts({**named, **{name: torch.empty(0, device="meta") for name in checkpoint.TABLES}})
    same_shapes(compvis.import_unet(parts.net), found["net"], in_channels=4, out_channels=4, context_dim=768)
    same_shapes(compvis.import_autoencoder(parts.stage), found["autoencoder"])
    stem, small = f"{NET}input_blocks.0.0.weight", f"{NET}time_embed.0.weight"
    inpaints = checkpoint.detect_sd1({**named, stem: torch.empty(320, 9, 3, 3, device="meta")})
    assert inpaints == {**found, "conditioner": config_nodes.inpainting(found["conditioner"])}
    assert checkpoint.detect_sd1({**named, small: torch.empty(64, 32)}) is None
    assert checkpoint.detect_sd1({}) is None


def test_seeded_fill_and_state_agree():
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.GroupNorm(1, 2))
    same(state({name: value.shape for name, value in net.state_dict().items()}), fill(net).state_dict())
