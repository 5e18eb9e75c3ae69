"""Every preset composes, passes the strict check, and has the number of parameters that its paper prints."""

import csv
import hashlib
import re
from functools import cache

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from smoke import ROOT, plan_of
from test_conf import Card as Small
from test_conf import drawn, trained

from ldm.config import build
from ldm.config.overrides import ConfigSearchPath
from ldm.config.validate import validate
from ldm.plan import flops
from ldm.plan.data_info import card_of
from ldm.plan.placeholders import placeholder_batch, stub_text_encoders, use_random_weights
from ldm.plan.table import counts_match

# by preset and part: sha256 of the names and shapes of its weights, each file's format
with (ROOT / "tests/state_dicts.csv").open() as file:
    STATE_DICTS = {(row["preset"], row["part"]): row["sha256"] for row in csv.DictReader(file)}
PRESETS = ConfigSearchPath((ROOT / "conf",), ROOT).groups()["preset"]
MISSING = {
    "sdxl": "no conditioner yet joins two text encoders along their channels: 2,567,463,684",
}
NARROW = {  # preset -> what makes it small; its process, objective, conditioner, sampler and grid stay
    "ldm4_cin256": ("net.channels=32", "net.channel_mult=[1,2]"),
    "ldm8_churches256": ("net.channels=32", "net.channel_mult=[1,2]"),
    "dit_s2": ("net.channels=32", "net.num_heads=2", "net.depth=1", "conditioner.dim=32"),
    "sit_xl2": ("net.channels=32", "net.num_heads=2", "net.depth=1", "conditioner.dim=32"),
    "ddpm_cifar10": ("net.channels=32", "net.channel_mult=[1,2]"),
    "iddpm_cifar10": ("net.channels=32", "net.channel_mult=[1,2]"),
    "adm_imagenet64": ("net.channels=64", "net.channel_mult=[1,2]", "conditioner.dim=256"),
}


@cache
def composed(preset: str, *typed: str):
    """The config of `train.py preset=... data.path=.` after the strict check; not to be changed."""
    of_folder = not preset.endswith("cifar10") and not any(word.startswith("data=") for word in typed)
    path = ("data.path=.",) if of_folder else ()
    job = plan_of(f"preset={preset}", *path, *typed)
    config = job.compose(job.overrides)
    bare = OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])
    validate(OmegaConf.to_container(bare, resolve=True))
    return bare


def hash_shapes(part: torch.nn.Module) -> str:
    """Hash the names and shapes of a part's weights, in their order."""
    lines = [f"{name} {tuple(value.shape)}" for name, value in part.state_dict().items()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


ALIKE = re.compile(
    "ablation_.*|ldm4_(bedrooms|celebahq)256|dit_[bl]2|small|base"
)  # others of their kind are in the quick suite


@pytest.mark.parametrize(
    "preset", [pytest.param(p, marks=pytest.mark.slow) if ALIKE.fullmatch(p) else p for p in (*PRESETS, *MISSING)]
)
def test_preset_has_published_parameter_count(preset):
    if preset in MISSING:
        pytest.skip(MISSING[preset])
    cfg = composed(preset).copy()
    said = cfg.paper
    card = card_of(cfg, {"size": 32, **OmegaConf.to_container(said)})
    use_random_weights(cfg.conditioner)
    with flops.meta_device():
        autoencoder = build.build_autoencoder(cfg.autoencoder, card.shape[0])
        conditioner = build.build_conditioner(cfg.conditioner, autoencoder, card)
        parts = {"network": build.build_network(cfg, autoencoder, conditioner), "conditioner": conditioner}
        if "classifier" in said.modules:
            parts["classifier"] = instantiate(cfg.training.net)(
                in_channels=card.shape[0], classes=said.classes, size=card.shape[1:]
            )
        for name, part in {**parts, "first stage": autoencoder}.items():
            assert hash_shapes(part) == STATE_DICTS[preset, name], f"weights of the {name} have other names or shapes"
        stub_text_encoders(conditioner)
        told = conditioner.eval()(placeholder_batch(2, card, conditioner))  # a plan can make a batch for it
    assert (told.context is None) == (conditioner.context_dim is None)
    assert (told.concat is None) == (not conditioner.concat_channels)
    count = sum(p.numel() for name in said.modules for p in parts[name].parameters())
    assert counts_match(count + said.extra_parameters, said.parameters), (
        f"{count + said.extra_parameters:,} {said.parameters}"
    )


def test_preset_is_validated_like_overrides():
    """Against its own values too: of another kind, or misspelt, they are refused, and every preset's pass."""
    job = plan_of("preset=ldm4_inpaint_big", "data.path=.", "schedule.beta_end=0.02")
    job.check()
    with pytest.raises(ValueError, match="beta_end=high"):
        plan_of("preset=ldm4_inpaint_big", "data.path=.", "schedule.beta_end=high").check()


@pytest.mark.parametrize(
    ("preset", "key", "value"),
    [
        ("ldm8_churches256", "schedule.beta_end", 0.0155),
        ("ldm4_sr_x4", "schedule.beta_end", 0.0155),
        ("ldm4_layout256", "schedule.beta_end", 0.0205),
        ("ldm4_inpaint_big", "schedule.beta_end", 0.0205),
        ("ldm4_semantic256", "schedule.beta_end", 0.0205),
        ("ldm4_ffhq256", "schedule.beta_end", 0.0195),
        ("ldm8_txt2img", "schedule.beta_end", 0.012),
        ("sd1", "schedule.beta_start", 0.00085),
        ("ldm8_churches256", "objective.error._target_", "ldm.diffusion.objective.l1"),
        ("ldm4_sr_x4", "objective.error._target_", "ldm.diffusion.objective.l2"),
        ("ldm8_churches256", "net.use_scale_shift_norm", True),
        ("ldm8_churches256", "training.lr_schedule.warmup", 10000),
        ("ldm4_cin256", "training.batch_size", 1200),
        ("ldm4_ffhq256", "training.optimizer.lr", 8.4e-5),
        ("ldm4_inpaint_big", "autoencoder.encoder.middle_attention", False),
        ("ablation_imagenet_f32", "autoencoder.encoder.z_channels", 32),
        ("adm_imagenet64", "schedule._target_", "ldm.diffusion.schedule.cosine"),
        ("adm_imagenet256", "schedule._target_", "ldm.diffusion.schedule.linear"),
        ("dit_xl2", "learned_variance", True),
        ("ddpm_cifar10", "training.optimizer.weight_decay", 0.0),
    ],
)
def test_preset_has_special_values(preset, key, value):
    assert OmegaConf.select(composed(preset), key) == value


@pytest.mark.parametrize("preset", NARROW)
def test_preset_trains_and_samples_when_narrow(preset):
    torch.manual_seed(0)
    first_stage = () if composed(preset).autoencoder._target_.endswith("Identity") else ("autoencoder=patch_f4",)
    cfg = composed(preset, "data=synthetic", "data.size=16", *first_stage, *NARROW[preset]).copy()
    cfg.pop("paper")
    model = build.build_model(cfg, build.build_autoencoder(cfg.autoencoder, 1), Small)
    assert all(torch.isfinite(term).all() for term in trained(cfg, model).values())
    assert torch.isfinite(drawn(cfg, model)).all()


def test_preset_header_names_paper():
    for preset in PRESETS:
        first, second = (ROOT / "conf/preset" / f"{preset}.yaml").read_text().splitlines()[:2]
        assert first == "# @package _global_"
        assert second.startswith("# ")
        assert len(second) > 40


@pytest.mark.parametrize(
    ("preset", "first_decay"),
    [
        *dict.fromkeys(("ddpm_cifar10", "iddpm_cifar10", "adm_imagenet256", "dit_xl2", "sit_xl2"), 0.9999).items(),
        *dict.fromkeys(("ldm4_cin256", "ldm8_churches256", "sd1"), 2 / 11).items(),  # LDM's warm-up
        ("tiny", 0.0),  # ours: the power function
    ],
)
def test_preset_has_average_of_its_paper(preset, first_decay):
    cfg = composed(preset)
    average = instantiate(cfg.training.ema)(torch.nn.Linear(1, 1))
    assert average.decay_at(1) == first_decay
    if preset != "tiny":
        assert average.decay_at(1_000_000) == 0.9999
    if cfg.autoencoder._target_.endswith(("AutoencoderKL", "AutoencoderVQ")):  # the first stages of LDM have none
        assert cfg.first_stage.ema.decay == 0


def test_options_of_average_are_checked_before_training():
    with pytest.raises(Exception, match=r"decay=1\.5: expected a factor on the average from 0 to below 1"):
        instantiate(composed("dit_s2", "training.ema.decay=1.5").training)
