"""python train.py experiment=own_images data.path=DIR: what is said, chosen and named before anything is trained."""

import json
import re

import pytest
import torch
from PIL import Image
from smoke import command, composed, here

from ldm.config import build, serialize
from ldm.errors import UserError
from ldm.io.progress import format_duration
from ldm.recipes import autoencoder, estimate
from ldm.recipes.estimate import format_estimate
from ldm.runs import cache, identity, metrics_log

SMALL = (
    *(
        "experiment=own_images",
        "budget=smoke",
        "conditioner=label",
        "first_stage.steps=2",
        "first_stage.batch_size=4",
        "first_stage.discriminator_start=1",
    ),
    *("training.steps=2", "training.batch_size=4", "metrics=none"),
)


@pytest.fixture
def place(tmp_path):
    """A working folder with a folder of forty small grey images."""
    (tmp_path / "images").mkdir()
    for i in range(40):
        Image.new("L", (70, 70), 6 * i).save(tmp_path / "images" / f"grey {i}.png")
    (tmp_path / "images" / "empty.png").touch()
    with here(tmp_path):
        yield tmp_path


@pytest.mark.slow
def test_own_images_reports_data_choices_and_estimate_first(place, capsys, monkeypatch):
    assert command("train.py", *SMALL, "data.path=images") == 0
    out = re.sub(r"reading .*\n?", "", capsys.readouterr().out)
    first, chosen, second = [line for line in re.split(r"[\r\n]+", out) if line.strip()][:3]
    assert chosen == "first stage as typed"
    assert first.startswith("images: 40 images, captions from their names, 64 px, grey, fits in memory, ")
    assert "1 skipped: empty.png" in first
    first_stage = r"1 steps of the autoencoder at \d+ ms, 1 steps of it with its adversary at \d+ ms"
    assert re.match(rf"about \d+ s of training: {first_stage}, 2 steps of the diffusion model at \d+ ms", second)
    assert out.count("40 images") == 1, "said once, whatever processes there are"
    (run,) = (place / "runs").iterdir()
    chosen = serialize.load_config(run / "config.yaml")["data"]
    assert (chosen["size"], chosen["channels"]) == (64, 1)
    assert chosen["content_hash"] == build.build_dataset(composed(*SMALL, "data.path=images")).content
    assert json.loads((run / "data.json").read_text())["shape"][1:] == [64, 64]

    monkeypatch.setattr("ldm.recipes.diffusion.print_estimate", lambda cfg, data: None)
    assert command("train.py", *SMALL, "data.path=images", "runs=others") == 0
    journals = [
        metrics_log.read_metrics_log(folder / run.name / "metrics.jsonl")
        for folder in (place / "runs", place / "others")
    ]
    losses = [[row["train/loss"] for row in rows if "train/loss" in row] for rows in journals]
    assert losses[0] == losses[1] != [], "to be timed leaves the training as it is"


def test_run_id_depends_on_images_and_captions(place):
    def names():
        config = build.to_container(build.resolve_dataset_config(composed(*SMALL, "data.path=images").copy()))
        first = {**config, "training": config["first_stage"]}
        return identity.run_id(config), cache.first_stage_cache_key(first).key

    one = names()
    assert names() == one
    (place / "images" / "grey 3.txt").write_text("a grey field")
    two = names()
    Image.new("L", (70, 70), 1).save(place / "images" / "grey 3.png")
    three = names()
    assert len({*one, *two, *three}) == 6


def test_format_estimate():
    assert format_estimate(("it", 100, 0.5)) == "about 50 s of training: 100 steps of it at 500 ms (timed now)"
    assert format_estimate(("a", 2000, 0.08), ("b", 4000, 0.575)).startswith(
        "about 41 min of training: 2,000 steps of a at 80 ms, 4,000 steps of b"
    )
    assert [format_duration(s) for s in (119, 150, 7100, 7300)] == ["119 s", "2 min", "118 min", "2.0 h"]


def test_time_stages_skips_cached_first_stage(place):
    cfg = build.resolve_dataset_config(composed(*SMALL, "data.path=images").copy())
    data = build.build_dataset(cfg)
    assert [(name, steps) for name, steps, _ in estimate.time_stages(cfg, data)] == [
        ("the autoencoder", 1),
        ("it with its adversary", 1),
        ("the diffusion model", 2),
    ]
    folder = cache.first_stage_dir({**build.to_container(cfg), "training": build.to_container(cfg.first_stage)})
    metrics_log.write_final_metrics(folder, {})
    assert [name for name, *_ in estimate.time_stages(cfg, data)] == ["the diffusion model"]


@pytest.fixture
def weights(place):
    """A tiny AutoencoderKL with weights, as diffusers saves one, of factor 8 and for grey images."""
    import diffusers

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    widths = {"block_out_channels": (8, 8, 8, 16), "norm_num_groups": 4, "layers_per_block": 1, "scaling_factor": 0.5}
    theirs = diffusers.AutoencoderKL(in_channels=1, out_channels=1, latent_channels=4, **blocks, **widths).eval()
    theirs.save_pretrained(place / "cache" / "autoencoder" / "tiny")
    return theirs


def chosen(*typed):
    cfg = composed("experiment=own_images", "budget=smoke", "conditioner=label", "data.path=images", *typed).copy()
    return build.resolve_dataset_config(cfg)


def test_pretrained_first_stage_is_chosen_when_available(weights, place, capsys):
    cfg = chosen()
    said = capsys.readouterr().out
    assert f"first stage pretrained, {place / 'cache' / 'autoencoder' / 'tiny'}, factor 8, 4 channels" in said
    assert said.index("40 images") < said.index("first stage")
    assert cfg.first_stage["_target_"] == "ldm.recipes.pretrained_autoencoder.PretrainedAutoencoderRecipe"
    assert cfg.autoencoder.z_channels == 4
    data = build.build_dataset(cfg)
    assert next((name, steps) for name, steps, _ in estimate.time_stages(cfg, data)) == (
        "encoding an image",
        2 * len(data),
    )
    ours, space, measured = autoencoder.load_or_train_first_stage(cfg, 1)
    image = data.pixels([0, 7])
    with torch.no_grad():
        assert torch.allclose(ours.encode(image), 0.5 * weights.encode(image).latent_dist.mean, atol=1e-5)
        assert torch.allclose(
            ours.decode(ours.encode(image)), weights.decode(weights.encode(image).latent_dist.mean).sample, atol=1e-4
        )
    assert measured["psnr"] > 0
    assert space.identity == measured["identity"]
    (place / "cache" / "autoencoder" / "tiny" / "config.json").write_text("{}")
    recipe = "ldm.recipes.autoencoder.AutoencoderRecipe"
    assert chosen().first_stage["_target_"] == recipe, "and what is broken is passed over"


def test_auto_config_explains_trained_first_stage(weights, place, capsys, monkeypatch):
    def why(*typed):
        cfg = chosen(*typed)
        assert cfg.first_stage["_target_"] == "ldm.recipes.autoencoder.AutoencoderRecipe"
        return re.search(r"first stage (.*)", capsys.readouterr().out)[1]

    assert "tiny: for images of 1 channels, these have 3)" in why("data.channels=3")
    assert "tiny: of factor 8, images of 32 px give latents of 4 on a side)" in why("data.size=32")
    assert "tiny: of factor 8, images of [64, 36] px give latents of 4.5 on a side)" in why("data.size=[64,36]")
    assert why("auto.pretrained=never") == "its own (auto.pretrained=never)"
    with pytest.raises(UserError, match=r"auto\.pretrained=images: no config\.json there; expected"):
        chosen("auto.pretrained=images")
    (place / "cache" / "autoencoder" / "tiny").rename(place / "elsewhere")
    assert why().startswith(f"its own (no pretrained one in {place / 'cache' / 'autoencoder'}/*, nor among")
    assert chosen("auto.pretrained=elsewhere").autoencoder.factor == 8
    hub = place / "hub" / "models--stabilityai--sd-vae-ft-mse" / "snapshots" / "0"
    hub.parent.mkdir(parents=True)
    (place / "elsewhere").rename(hub)
    monkeypatch.setenv("HF_HUB_CACHE", str(place / "hub"))
    assert chosen().autoencoder.factor == 8
    (hub / "diffusion_pytorch_model.safetensors").unlink()
    capsys.readouterr()
    assert "no weights in it" in why()


def test_auto_config_respects_overrides(weights, place, capsys):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "ldm.recipes.diffusion.DiffusionRecipe.train",
            lambda self, cfg: print(cfg.autoencoder["factor"], cfg.first_stage["_target_"]),
        )
        assert command("train.py", *SMALL, "data.path=images", "autoencoder=kl_f4_small") == 0
    assert "first stage as typed\n4 ldm.recipes.autoencoder.AutoencoderRecipe" in capsys.readouterr().out


def test_auto_config_chooses_larger_net_for_gpu_and_large_latents(place, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert chosen("data.size=256").net.channels == 128
    assert "net         small, for latents of 32 x 32" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"auto\.large=huge"):
        chosen("data.size=256", "auto.large=huge")
    assert chosen("data.size=128").net.channels == 16, "the budget's own"


@pytest.mark.slow
def test_own_images_trains_on_pretrained_first_stage(weights, place, capsys):
    typed = [word for word in SMALL if not word.startswith("first_stage")]
    assert command("train.py", *typed, "data.path=images") == 0
    (run,) = (place / "runs").iterdir()
    out = capsys.readouterr().out
    assert "steps of encoding an image at" in out
    assert json.loads((run / "metrics.json").read_text())["first_stage/psnr"] > 0
    assert command("sample.py", f"run={run}", "num=1", "steps=2", "output_dir=drawn") == 0
    assert Image.open("drawn/000000.png").size == (64, 64)
