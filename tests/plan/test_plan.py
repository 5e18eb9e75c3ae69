"""The plan of a training: its figures are those of closed forms, its mistakes one line, and nothing is computed or
written.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from smoke import ROOT, process

from ldm.conditioner.features import FeatureCache
from ldm.data.captions import known_captions
from ldm.data.synthetic import Synthetic
from ldm.errors import UserError
from ldm.plan.__main__ import main, plan
from ldm.plan.config import composed, differences
from ldm.plan.cost import text_feature_bytes
from ldm.plan.data_info import card_of
from ldm.plan.table import counts_match, format_bytes, table

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


def test_plan_of_text_features_counts_captions_and_tokens(small):
    caches = [FeatureCache(SimpleNamespace(context_dim=8, vector_dim=3), length) for length in (77, 16)]
    caption = 4 * ((77 + 16) * 8 + 3 + 3)  # bytes
    expected = {"memory": 10 * caption, "disk": 10 * caption, "online": 2 * caption}
    assert text_feature_bytes(caches, 10, 2) == expected
    assert text_feature_bytes(caches, None, 2) == {"online": 2 * caption}
    data = replace(small.data, captions=10)
    said = table(replace(small, data=data, text_features=expected))
    assert "text features of 10 captions, at most, by training.text_features" in said
    assert f"memory, each device{'':<19}{format_bytes(10 * caption):>16}" in said
    for node, count in (({"encoder": {}}, len(known_captions(Synthetic()))), ({}, None)):
        config = {"data": {"_target_": "ldm.data.synthetic.Synthetic"}, "conditioner": {"_target_": "x", **node}}
        assert card_of(OmegaConf.create(config), None).captions == count


def test_plan_of_preset_needs_no_data_and_lists_differences():
    typed = ["preset=dit_s2", "net.depth=2", "training.batch_size=2", "batches=2"]
    found = plan(typed)
    assert found.data.images == 1281167
    assert found.images == 2 * 400000
    assert sorted(found.differences) == ["net.depth: 12 -> 2", "training.batch_size: 256 -> 2"]
    assert "DiT tab. 4, S/2 (network + conditioner): 32,963,360, ours has" in table(found)


def test_plan_differences_to_paper():
    cfg, said = composed(["preset=dit_s2"])
    assert said["images"] == 1281167
    assert differences(cfg, "dit_s2") == []
    assert differences(cfg, "dit_b2") == [
        "conditioner.dim: 768 -> 384",
        "net.channels: 768 -> 384",
        "net.num_heads: 12 -> 6",
    ]


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (["net=tinny"], "net=tinny: no such option; did you mean 'tiny'"),
        (["net.width=3"], "no key 'net.width'"),
        (["net.channels=many"], "net.channels=many: ldm.net.unet.UNet expects int"),
        (["preset=sd9"], "paper=sd9: no such preset (one of"),
        (["paper=sd9"], "paper=sd9: no such preset (one of"),
        (["throughput=0"], "throughput=0: expected a number above 0"),
        (["throughput=fast"], "throughput=fast: expected a number above 0"),
        (["batches=1,none"], "batches=none: expected a number above 0"),
        (["data=folder"], "data.path=... must be given"),
        ([*SMALL[:1], "training=evaluator"], "only training=diffusion can be planned"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_plan_error_is_one_line(typed, expected):
    with pytest.raises(UserError) as error:
        plan(typed)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("count", "printed", "same"),
    [(5, 5, True), (5, 6, False), (390_888_578, "390.89M", True), (390_884_999, "390.89M", False)],
)
def test_counts_match_rounds_like_printed(count, printed, same):
    assert counts_match(count, printed) == same


@pytest.mark.slow
def test_plan_of_stable_diffusion_needs_little_memory(tmp_path):
    """As a process of its own, of whose memory torch itself is most."""
    code = (  # not ru_maxrss, which a process inherits from the one that started it
        "import sys; from ldm.plan.__main__ import main; code = main(['preset=sd1', 'json=sd1.json']);"
        "(peak,) = [line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')];"
        "assert int(peak) < 1.5e6, peak; sys.exit(code)"
    )
    (tmp_path / "code.py").write_text(code)
    done = process(tmp_path / "code.py", cwd=tmp_path, timeout=900)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "sd1.json").read_text())
    assert found["parts"]["network"]["parameters"] == 859_520_964
    assert found["memory"]["network in bf16"] == 2 * 859_520_964
    assert found["flops"]["network, an image"] == pytest.approx(803.3e9, rel=1e-3)
    assert "Stable Diffusion 1 (network): 859,520,964, the same" in done.stdout
    stored = json.loads((ROOT / "experiments" / "scale" / "plan.json").read_text())  # the same on a thousand GPUs
    assert stored["parts"] == found["parts"]
    assert stored["images"] == found["images"]
    assert stored["disk"] == found["disk"]
    for name in ("training, an image", "first stage encodes an image"):
        assert stored["flops"][name] == found["flops"][name]
    for name in ("weights", "gradients", "optimizer", "average"):
        assert stored["memory"][name] == found["memory"][name]


def test_plan_restores_default_device(small):
    assert torch.get_default_device().type == "cpu"
    assert torch.ones(1).item() == 1


def test_plan_command_error_has_exit_code_2(tmp_path):
    env = {**os.environ, "LDM_CACHE": str(tmp_path), "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-m", "ldm.plan", "net=tinny"]
    done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2
    assert done.stderr.startswith("error: net=tinny: no such option")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
