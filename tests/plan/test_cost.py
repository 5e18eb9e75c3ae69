"""The figures of a plan are those of closed forms."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from ldm.conditioner.features import FeatureCache
from ldm.data.captions import known_captions
from ldm.data.synthetic import Synthetic
from ldm.errors import UserError
from ldm.plan.__main__ import main, plan
from ldm.plan.config import composed
from ldm.plan.cost import count_parameters, estimate, text_feature_bytes
from ldm.plan.data_info import DataInfo, card_of
from ldm.plan.placeholders import placeholder_batch, use_random_weights
from ldm.plan.table import format_bytes, table

SMALL = (
    "data=synthetic",
    "conditioner=label",
    "net=smoke",
    "autoencoder=kl_f4_small",
    "training.batch_size=8",
    "training.steps=100",
)


@pytest.fixture(scope="module")
def small():
    return plan([*SMALL, "throughput=50"])


def test_plan_counts_parameters_of_parts(small):
    from ldm.config import build

    cfg, _ = composed(SMALL)
    data = build.build_dataset(cfg)
    model = build.build_model(cfg, build.build_autoencoder(cfg.autoencoder, 1), data)
    for name, part in (
        ("network", model.denoiser.net),
        ("conditioner", model.conditioner),
        ("first stage", model.autoencoder),
    ):
        count = sum(p.numel() for p in part.parameters())
        assert small.parts[name] == {"parameters": count, "trained": 0 if name == "first stage" else count}


def test_plan_memory_independent_of_batch(small):
    weights = 4 * (small.parts["network"]["trained"] + small.parts["conditioner"]["trained"])
    assert small.memory["weights"] == small.memory["gradients"] == small.memory["average"] == weights
    assert small.memory["frozen weights"] == 4 * small.parts["first stage"]["parameters"]
    assert (
        2 * weights < small.memory["optimizer"] < 2 * weights + 4096
    )  # AdamW: two moments, and a step for each tensor
    assert small.memory["network in bf16"] == 2 * small.parts["network"]["parameters"]
    assert small.disk["a checkpoint"] == 2 * weights + small.memory["optimizer"]


def test_plan_activations_scale_with_batch_and_precision(small):
    one, eight = (small.activations["32"][batch] for batch in (1, 8))
    assert eight["saved_for_backward"] == pytest.approx(8 * one["saved_for_backward"], rel=0.02)
    assert eight["flops"] == pytest.approx(8 * one["flops"], rel=1e-3)
    assert small.activations["bf16"][8]["saved_for_backward"] < eight["saved_for_backward"] < eight["peak"]
    assert small.flops["training step, one device"] == eight["flops"]
    assert 2.8 < small.flops["training, an image"] / small.flops["network, an image"] <= 3.1


def test_plan_latents_images_and_hours(small):
    assert small.z == (4, 8, 8)
    assert small.disk["cached latents"] == 2 * (2 * 4 * 8 * 8) * 512  # float16 means and log-variances
    assert small.images == 800
    assert small.text_features == {}
    assert small.device_hours == pytest.approx(800 / 50 / 3600)


def test_plan_of_several_devices_shares_batch(small):
    found = plan([*SMALL, "trainer=ddp", "trainer.devices=4", "data.flip=true"])
    assert found.disk["cached latents"] == 2 * small.disk["cached latents"]
    assert found.devices == 4
    assert "cached latents" not in plan([*SMALL, "training.latents=online"]).disk
    assert set(found.activations["32"]) == {1, 2}
    assert found.device_hours is None


def test_plan_table_and_json_agree(small, tmp_path, capsys):
    file = tmp_path / "plan.json"
    assert main([*SMALL, "throughput=50", f"json={file}", "batches=2,4"]) == 0
    said, kept = capsys.readouterr().out, json.loads(file.read_text())
    assert kept["parts"] == small.parts
    assert set(kept["activations"]["bf16"]) == {"2", "4", "8"}
    assert f"{small.parts['network']['parameters']:,}" in said
    for words in ("images seen", "800", "device-hours", "512 of synthetic", "4 x 8 x 8", "precision bf16, batch 4"):
        assert words in said, words
    assert kept["device_hours"] == small.device_hours
    assert not list(tmp_path.glob("runs"))


def tiny(**training):
    """A config of a small U-Net on latents of 4 x 2 x 2 for images of 8 x 8, and its data."""
    unet = {"in_channels": None, "out_channels": None, "channels": 16, "channel_mult": [1], "attention_resolutions": []}
    coders = {
        kind: {"_target_": f"ldm.autoencoder.patch.Patch{kind.title()}", "z_channels": 4, "factor": 4, "width": 8}
        for kind in ("encoder", "decoder")
    }
    cfg = OmegaConf.create(
        {
            "training": {
                "_target_": "ldm.recipes.diffusion.DiffusionRecipe",
                "batch_size": 6,
                "steps": 10,
                "latents": "cached",
                "cond_drop_prob": 0.1,
                "optimizer": {"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 1.0, "fused": True},
                **training,
            },
            "trainer": {"devices": 2},
            "autoencoder": {"_target_": "ldm.autoencoder.kl.AutoencoderKL", "z_channels": 4, "factor": 4, **coders},
            "conditioner": {"_target_": "ldm.conditioner.label.LabelVector", "dim": 8, "num_classes": 3},
            "net": {"_target_": "ldm.net.unet.UNet", **unet, "num_res_blocks": 1, "num_groups": 2},
        }
    )
    return cfg, DataInfo("some", ["a", "b", "c"], (1, 8, 8), 100, 2)


def test_figures_of_a_tiny_training():
    found = estimate(*tiny(), [2])
    weights = 4 * (found.parts["network"]["parameters"] + found.parts["conditioner"]["parameters"])
    assert (found.z, found.devices, found.images) == ((4, 2, 2), 2, 60)
    assert set(found.activations["32"]) == {2, 3}
    assert found.activations["32"][3]["flops"] == 3 * found.flops["training, an image"]
    assert found.flops["training step, one device"] == 3 * found.flops["training, an image"]
    assert found.disk["cached latents"] == 2 * (2 * 4 * 2 * 2) * 100 * 2
    assert found.memory["optimizer"] >= 2 * weights
    assert found.disk["a checkpoint"] == 2 * weights + found.memory["optimizer"]
    assert (found.published, found.text_features, found.device_hours) == ({}, {}, None)
    found.throughput = 0.5
    assert found.device_hours == 60 / 0.5 / 3600
    found.published = {"modules": ["network", "none"], "extra_parameters": 7}
    assert found.published_count == found.parts["network"]["parameters"] + 7


def test_figures_of_other_options_of_a_tiny_training():
    """No dropout saves no mask, latents online no file; `auto` counts as one device; a paper is kept."""
    (cfg, data), paper = tiny(cond_drop_prob=0, latents="online", batch_size=3), {"modules": [], "extra_parameters": 0}
    cfg.trainer.devices, cfg.paper = "auto", paper
    found, dropped = estimate(cfg, data), estimate(*tiny())
    saved = [one.activations["32"][3]["saved_for_backward"] for one in (found, dropped)]
    assert saved[0] < saved[1]
    assert (found.devices, found.published) == (1, paper)
    assert "cached latents" not in found.disk
    cfg.training._target_ = "ldm.recipes.evaluator.EvaluatorRecipe"
    with pytest.raises(UserError, match="only training=diffusion can be planned"):
        estimate(cfg, data)


def test_config_of_a_preset_needs_no_data():
    cfg, paper = composed(["preset=dit_s2"])
    assert (cfg.data.path, paper["images"]) == (".", 1281167)
    assert "hydra" not in cfg
    given, paper = composed(["preset=dit_s2", "data.path=some"])
    assert (given.data.path, paper) == ("some", None)


def test_plan_has_text_encoders_without_their_weights():
    node = OmegaConf.create({"a": {"random": False, "weights": "some"}, "b": {"dim": 3}, "dim": 4})
    use_random_weights(node)
    assert node == {"a": {"random": True, "weights": None}, "b": {"dim": 3}, "dim": 4}


def test_plan_restores_default_device(small):
    assert torch.get_default_device().type == "cpu"
    assert torch.ones(1).item() == 1


def test_data_of_a_paper_is_its_own_unless_the_config_says_more():
    paper = {"data": "x", "classes": 2, "channels": 1, "size": 64, "images": 9}
    for data, size, flips in (({"flip": False}, 64, 1), ({"flip": True, "size": 32}, 32, 2)):
        made = card_of(OmegaConf.create({"data": data}), paper)
        assert made == DataInfo("x", ["0", "1"], (1, size, size), 9, flips, 9)


def test_parameters_are_counted_with_and_without_gradient():
    frozen = nn.Linear(5, 2).requires_grad_(False)
    assert count_parameters([nn.Linear(3, 2), frozen]) == {"parameters": 8 + 12, "trained": 8}


PLAIN = ["image", "mask", "source", "caption", "label", "boxes", "original_size", "crop", "target_size"]


def test_placeholder_batch_has_what_conditioners_read():
    class Reader(nn.Module):
        def __init__(self, *keys, **options):
            super().__init__()
            self.keys = keys
            for name, value in options.items():
                setattr(self, name, value)

    card, plain = DataInfo("x", ["a"], (3, 16, 16), 9, 1), set(PLAIN)
    assert placeholder_batch(2, card, SimpleNamespace(modules=list)).keys() == plain
    readers = nn.Sequential(
        nn.ModuleDict(), Reader("map", classes=7), Reader("low_res", scale=4), Reader("relief", concat_channels=3)
    )
    batch = placeholder_batch(2, card, readers)
    assert batch.keys() == plain | {"map", "low_res", "relief"}
    shapes = {name: tuple(batch[name].shape) for name in ("image", "mask", "map", "low_res", "relief", "label")}
    assert shapes == {
        **{"image": (2, 3, 16, 16), "mask": (2, 1, 16, 16), "map": (2, 7, 16, 16), "label": (2,)},
        **{"low_res": (2, 3, 4, 4), "relief": (2, 2, 16, 16)},
    }
    assert (batch["caption"], batch["boxes"]) == (["", ""], [[], []])


def text_features(rows: int, captions: int | None) -> dict[str, int]:
    caches = [FeatureCache(SimpleNamespace(context_dim=8, vector_dim=3), length) for length in (77, 16)]
    return text_feature_bytes(caches, captions, rows)


def test_text_features_count_captions_and_tokens():
    caption = 4 * ((77 + 16) * 8 + 3 + 3)  # bytes
    assert text_features(2, 10) == {"memory": 10 * caption, "disk": 10 * caption, "online": 2 * caption}
    assert text_features(2, None) == {"online": 2 * caption}


def test_data_of_a_config_are_counted():
    for node, count in (({"encoder": {}}, len(known_captions(Synthetic()))), ({}, None)):
        for flip in (False, True):
            data = {"_target_": "ldm.data.synthetic.Synthetic", "num": 40, "flip": flip}
            found = card_of(OmegaConf.create({"data": data, "conditioner": {"_target_": "x", **node}}), None)
            assert (found.images, found.flips, found.captions) == (40, 1 + flip, count)


def test_plan_says_what_text_features_take(small):
    taken = text_features(2, 10)
    said = table(replace(small, data=replace(small.data, captions=10), text_features=taken))
    assert "text features of 10 captions, at most, by training.text_features" in said
    assert f"memory, each device{'':<19}{format_bytes(taken['memory']):>16}" in said
