"""Every option of every group composes with the smoke budget, passes the strict check, and is used for one step."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from hydra.utils import instantiate
from omegaconf import OmegaConf
from smoke import ROOT, command, composed, here
from tools.conf_readme import description, groups, readme
from towers import conditioner_overrides, write_towers

from ldm.conditioner.size import uncropped
from ldm.config import build
from ldm.config.compose import compose_option
from ldm.config.overrides import ConfigSearchPath, help_text, normalize_override
from ldm.config.signatures import read_signature
from ldm.config.slots import slot_of
from ldm.config.tree import iter_nodes
from ldm.diffusion.distill import Teacher
from ldm.ema import PowerEMA
from ldm.errors import UserError
from ldm.io.download import AssetNotFoundError
from ldm.sampling.tasks import sample
from ldm.training.diffusion import LitDiffusion

CONF = ROOT / "conf"
GROUPS = ConfigSearchPath((CONF,), ROOT).groups()
OPTIONS = [  # of presets: tests/test_presets.py
    f"{group}/{option}" for group, options in GROUPS.items() if group != "preset" for option in options
]
SMALL = (
    "net.channels=16",
    "net.channel_mult=[1,2]",
    "net.num_res_blocks=1",
    "net.attention_resolutions=[2]",
    "net.num_groups=8",
)
PARTNERS = {  # overrides that an option needs; one of each kind of large network is narrowed
    "net/sd1": (*SMALL, "net.num_heads=2"),
    "net/sdxl": (*SMALL, "net.num_head_channels=16", "net.transformer_depth=[1,2]"),
    "net/ddpm_cifar": (*SMALL, "conditioner=none"),
    "net/adm_64": (
        *SMALL,
        "net.num_head_channels=16",
        "conditioner=label_vector",
        "conditioner.dim=64",
        "objective=hybrid",
    ),
    **dict.fromkeys(
        ("net/dit_xl2", "net/lightningdit_xl1"),
        (
            "net.channels=32",
            "net.depth=2",
            "net.num_heads=2",
            "conditioner=label_vector",
            "conditioner.dim=32",
            "objective=hybrid",
        ),
    ),
    **{
        f"data/{name}": ("data.path=here",)
        for name in (
            *(
                "folder",
                "clips",
                "buckets",
                "webdataset",
                "huggingface",
                "imagenet",
                "coco",
                "lsun",
                "sounds",
                "trajectories",
            ),
        )
    },
    "autoencoder/tokens_f4": ("autoencoder.factor=4",),  # of images, in which a pixel is a symbol
    "autoencoder/atoms": ("autoencoder.scale=[2.0]",),
    "schedule/edm": ("process=edm",),
    "prediction/edm": ("process=edm",),
    "weighting/edm": ("process=edm",),
    "timestep_sampling/log_normal": ("process=edm",),
    "timestep_spacing/karras": ("process=edm",),
    **dict.fromkeys(("training/autoencoder", "training/autoencoder_tokens"), ("~training.score",)),
    "training/autoencoder_ldm": ("~training.score", "training.loss.perceptual=null"),  # LPIPS wants half a gigabyte
    "training/evaluator": ("~training.score", "~training.sample_every"),
    **dict.fromkeys(
        ("training/classifier", "training/clip", "training/vocoder"), ("~training.score", "~training.sample_every")
    ),
    **dict.fromkeys(("schedule/flow", "schedule/flow_3", "schedule/flow_at"), ("process=sit",)),
    **dict.fromkeys(("schedule/vp", "schedule/gvp"), ("timestep_sampling=uniform", "timestep_spacing=uniform")),
    "objective/repa": (
        "objective.encoder._target_=test_conf.Features",
        "objective.channels=32",
        "objective.features=2",
    ),
    **{
        f"objective/{way}": ("objective.teacher._target_=test_conf.Taught",)
        for way in ("progressive", "consistency", "knowledge_distillation")
    },
    "objective/guidance_distillation": ("objective.teacher._target_=test_conf.Taught", "net=smoke_guidance_embed"),
    "net/unet_1d": ("net.dims=2", "conditioner=none"),
    "sampler/ddpm_learned": ("objective=hybrid",),
    "conditioner/layout": ("conditioner.dim=16", "conditioner.layers=1"),
    "adapter/textual_inversion": ("adapter.placeholder_token=zorbo",),
    "augmentation/random_crop": ("augmentation.crop.size=16",),
    "sampler/repaint": ("sampler.jump_length=1", "sampler.num_resamples=1"),
}
PAPER = [  # first stages at a paper's scale: built on the meta device
    o for o in OPTIONS if o.startswith(("autoencoder/kl_f", "autoencoder/vq_f")) and not o.endswith("_small")
]
PAPER_NETS = [  # networks at a paper's scale, which tests/net/test_counts.py builds on the meta device
    o for o in OPTIONS if o.startswith("net/") and o not in (*PARTNERS, "net/quick", "net/smoke")
]
ALONE = (
    *(
        "budget",
        "debug",
        "data",
        "augmentation",
        "degradation",
        "trainer",
        "training",
        "logger",
        "callbacks",
        "metrics",
        "reconstruction_metrics",
        "guidance",
        "task",
        "adapter",
        "hint",
    ),
)  # no part of the model or of its step


BY_CALLER = {  # target -> parameters with a default that the code which calls a `_partial_` node passes
    "ldm.autoencoder.discriminator.PatchDiscriminator": ("channels", "dims"),
    "ldm.evaluation.evaluate.EvaluationConfig": ("precision",),  # the trainer's
    "ldm.metrics.paired.Reconstruction": ("device", "net", "reference"),
    "ldm.net.blocks.Downsample": ("dims", "padding_mode"),
    "ldm.training.fit.fit": ("seed", "start"),
    **dict.fromkeys((f"ldm.net.positions.{name}" for name in ("rope", "sincos", "unordered")), ("device",)),
    **dict.fromkeys(("ldm.net.attention.sdpa", "ldm.net.attention.softmax_attention"), ("mask",)),
    **{f"ldm.diffusion.variance.{name}": ("floor",) for name in ("fixed_small", "fixed_large", "learned_range")},
    **{
        f"ldm.net.attention.{name}": ("attend", "context_dim", "depth", "dims", "groups")
        for name in ("SpatialTransformer", "QKVAttention")
    },
}


NESTED = {"ema": "ema@training.ema"}  # groups of which an option of another group chooses one


def typed(option: str) -> tuple[str, ...]:
    group, name = option.split("/", 1)
    partners = PARTNERS.get(option, ())
    return (
        "budget=smoke",
        *(p for p in partners if p.startswith("process=")),
        f"{NESTED.get(group, group)}={name}",
        *(p for p in partners if p[:8] != "process="),
    )


@dataclass
class Card:
    classes = ("a", "b", "c")
    shape = (1, 16, 16)


class Features(torch.nn.Module):
    """An image encoder in the place of a downloaded one."""

    def __init__(self, size: int, scale: float, weights: None):
        super().__init__()

    def features(self, image: torch.Tensor) -> list[torch.Tensor]:
        return [image.repeat(1, 2, 1, 1)] * 5


class Taught(Teacher):
    """A teacher that is no run."""

    def __init__(self, run: None, scale: float, interval: list[float]):
        super().__init__(model_of(composed("budget=smoke")), scale, (interval[0], interval[1]))


def batch(n: int = 4) -> dict:
    rows = list(range(n))
    label = torch.tensor(rows) % 3
    image = torch.rand(n, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return {
        "image": image,
        "caption": [f"a thing {i}" for i in rows],
        "label": label,
        "map": torch.ones(n, 16, 16, dtype=torch.long),
        **dict.fromkeys(("relief", "before"), image),
        "source": image,
        **uncropped(n, 16, 16),
        "low_res": image[:, :, ::4, ::4],
        "mask": (image > 0).float(),
        "boxes": [[(1, 0.0, 0.0, 0.5, 1.0)]] * n,
        "index": rows,
        "epoch": [0] * n,
        "position": rows,
        "total": n,
        "step": 0,
    }


def model_of(cfg):
    """The model of a config."""
    return build.build_model(cfg, build.build_autoencoder(cfg.autoencoder, 1), Card)


@pytest.fixture(scope="session")
def towers(tmp_path_factory) -> Path:
    """Small encoders in the place of those that are downloaded."""
    return write_towers(tmp_path_factory.mktemp("towers"))


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("LDM_OFFLINE", "1")


@pytest.mark.parametrize("option", OPTIONS)
def test_option_composes_with_every_default(option):
    """Every parameter with a default is in the composed config: `--cfg job` shows it, and a run folder records it."""
    group = option.split("/")[0]
    config = (
        composed(option.replace("/", "=", 1), name="sample")
        if group in ("task", "reconstruction_metrics")
        else composed(*typed(option))
    )
    assert group in ("budget", "process", "optimizer", "ema") or option == "debug/smoke" or group in config
    plain = OmegaConf.to_container(config)
    nodes = dict(iter_nodes(plain))
    missing = {}
    for path, node in nodes.items():
        target, parent = node["_target_"], path.rpartition(".")[0]
        signature = read_signature(target) if target.startswith("ldm.") else None
        optional = {name for name, one in signature.parameters.items() if not one.required} if signature else set()
        passed = {*slot_of(path).supplied, *BY_CALLER.get(target, ()), *nodes.get(parent, ())}
        if absent := optional - node.keys() - passed:
            missing[path] = absent
    assert missing == ({"trainer": {"torch_compile"}} if option == "trainer/fsdp" else {})  # it cannot be compiled


@pytest.mark.parametrize(
    "option",
    [
        o
        for o in OPTIONS
        if o.split("/")[0] not in ALONE and o not in (*PAPER, *PAPER_NETS, "conditioner/compose")  # which is a list
    ],
)
def test_option_trains_and_samples(option, towers):
    torch.manual_seed(0)
    group, name = option.split("/", 1)
    cfg = composed(*typed(option), *(conditioner_overrides(name, towers) if group == "conditioner" else ()))
    model = model_of(cfg)
    assert all(torch.isfinite(term).all() for term in trained(cfg, model).values())
    if option != "sampler/ddim_invert":  # which goes from an image to noise
        image = drawn(cfg, model)
        assert image.shape == (2, 1, 16, 16)
        assert torch.isfinite(image).all()


@pytest.mark.parametrize("option", PAPER)
def test_paper_scale_autoencoder_round_trip_shapes(option):
    with torch.device("meta"):
        autoencoder = build.build_autoencoder(composed(*typed(option)).autoencoder, 3)
        size = 2 * autoencoder.factor
        z = autoencoder.encode(torch.empty(1, 3, size, size))
        assert z.shape == (1, autoencoder.z_channels, 2, 2)
        assert autoencoder.decode(z).shape == (1, 3, size, size)


MISSING = {  # of the conditioners whose weights are not there, what the one line names
    **dict.fromkeys(("clip", "clip_context", "clip_image"), "CLIP ViT-L-14-quickgelu has no weights"),
    "t5": "T5 has no weights",
    "minilm": "is missing",
    "wordpiece": "is missing",
    "compose": "a composed conditioner needs at least one conditioner",
}


@pytest.mark.parametrize("name", MISSING)
def test_conditioner_option_names_missing_weights(name, monkeypatch, tmp_path):
    monkeypatch.setenv("LDM_CACHE", str(tmp_path))
    with pytest.raises(Exception, match=MISSING[name]) as found:
        model_of(composed("budget=smoke", f"conditioner={name}"))
    cause = found.value.__cause__ or found.value
    assert isinstance(cause, AssetNotFoundError | UserError)
    assert "\n" not in str(cause)


@pytest.mark.parametrize("some", ["label,relief", "label_vector,semantic_map,low_res"])
def test_conditioner_list_composes(some):
    drop = "{relief: 0.5}" if "relief" in some else "null"
    cfg = composed("budget=smoke", f"conditioner=[{some}]", f"conditioner.drop={drop}")
    model = model_of(cfg)
    assert list(model.conditioner.conditioners) == some.split(",")
    assert model.conditioner.drop == ({"relief": 0.5} if "relief" in some else {})
    assert all(torch.isfinite(term).all() for term in trained(cfg, model).values())
    assert torch.isfinite(drawn(cfg, model)).all()


def test_conditioner_list_with_unknown_option_is_named():
    with pytest.raises(
        UserError, match=r"conditioner=\[label,lowres\]: no such option 'lowres'; did you mean 'low_res'"
    ):
        composed("budget=smoke", "conditioner=[label,lowres]")


def trained(cfg, model) -> dict:
    """The terms of one step."""
    lit = LitDiffusion(
        model, instantiate(cfg.objective), instantiate(cfg.training.optimizer), cfg.training.cond_drop_prob
    )
    terms = lit.training_step(batch(), 0)
    optimizer = lit.configure_optimizers()
    terms["loss"].backward()
    assert not lit.has_unused_parameters
    assert [
        name for name, p in lit.named_parameters() if p.requires_grad and p.grad is None
    ] == []  # so DDP need not search for them
    optimizer.step()
    return terms


def drawn(cfg, model) -> torch.Tensor:
    """Two images."""
    ts = instantiate(cfg.timestep_spacing)(model.denoiser.schedule, min(4, getattr(model.denoiser.schedule, "T", 4)))
    return sample(model, batch(2), [0, 1], ts, instantiate(cfg.sampler), instantiate(cfg.guidance))


@pytest.mark.parametrize("option", [o for o in OPTIONS if o.split("/")[0] in ("training", "guidance", "logger")])
def test_option_is_built(option):
    group, _ = option.split("/", 1)
    built = instantiate(composed(*typed(option))[group])
    assert callable(
        {"training": getattr(built, "train", None), "logger": getattr(built, "start", None)}.get(group, built)
    )


@pytest.mark.parametrize("precision", ["64", "32", "bf16", "auto"])
@pytest.mark.parametrize("option", [o for o in OPTIONS if o.startswith("trainer/")])
def test_trainer_option_accepts_every_precision(option, precision):
    trainer = composed(*typed(option), f"trainer.precision={precision}").trainer
    assert instantiate(trainer).keywords.keys() == {
        *(
            "accelerator",
            "devices",
            "strategy",
            "precision",
            "num_workers",
            "accumulate_grad_batches",
            "num_nodes",
            "timeout_minutes",
        ),
        *(() if option == "trainer/fsdp" else ("torch_compile",)),
    }


@pytest.mark.parametrize("option", [o for o in OPTIONS if o.startswith("data/")])
def test_data_option_builds_or_reports_missing_files(option, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        data = build.build_dataset(composed(*typed(option)), "train")
    except Exception as error:
        cause = error.__cause__ or error
        assert isinstance(cause, AssetNotFoundError | ValueError | FileNotFoundError), cause
        assert "\n" not in str(cause)
    else:
        assert data.batch([(0, 0)])["image"].shape[1:] == data.shape


@pytest.mark.parametrize("option", [o for o in OPTIONS if o.startswith("degradation/")])
def test_degradation_option_extends_batch(option):
    cfg = composed(*typed(option))
    batch = build.build_degraded_dataset(cfg).batch([(0, 0), (0, 1)])
    side = batch["image"].shape[-1]
    for name, channels, sides in (("low_res", 1, (side // 2, side // 4)), ("mask", 1, (side,))):
        assert (name in batch) == (cfg.degradation.get(name) is not None)
        assert name not in batch or batch[name].shape in {(2, channels, n, n) for n in sides}


@pytest.mark.parametrize("option", [o for o in OPTIONS if o.startswith("augmentation/")])
def test_augmentation_option_changes_batch(option):
    cfg = composed(*typed(option))
    samples = [(0, i) for i in range(20)]
    batch, plain = build.build_degraded_dataset(cfg).batch(samples), build.build_dataset(cfg).batch(samples)
    side = 16 if option == "augmentation/random_crop" else 32
    assert batch["image"].shape == (20, 1, side, side)
    assert batch["image"].shape != plain["image"].shape or not torch.equal(batch["image"], plain["image"])
    still = build.build_degraded_dataset(cfg, "test").batch(samples)["image"]
    margin = (32 - side) // 2
    whole = build.build_dataset(cfg, "test").batch(samples)["image"]
    assert torch.equal(still, whole[..., margin : margin + side, margin : margin + side])


@pytest.mark.parametrize("process", [p.stem for p in (CONF / "process").glob("*.yaml")])
def test_process_option_sets_four_groups_that_can_be_overridden(process):
    text = (CONF / "process" / f"{process}.yaml").read_text()
    for group in ("schedule", "prediction", "weighting", "timestep_sampling"):
        (option,) = re.findall(rf"override /{group}: (\w+)", text)
        assert composed("budget=smoke", f"process={process}")[group] == compose_option(group, option), group
    assert composed("budget=smoke", f"process={process}", "schedule=gvp").schedule._target_.endswith("GVP")


@pytest.mark.parametrize("option", ["sampler/heun", "timestep_spacing/karras", "guidance/cfg", "metrics/fid"])
def test_sampling_option_equals_training_option(option):
    group, name = option.split("/")
    assert composed("run=x", f"{group}={name}", name="sample")[group] == composed(*typed(option))[group]


def test_conf_does_not_interpolate_modules():
    """`${net}` in two places would be built twice."""
    for path in CONF.rglob("*.yaml"):
        found = re.findall(r"\$\{(net|autoencoder|conditioner|first_stage|evaluator|objective)[}.]", path.read_text())
        assert not found, path


def test_modules_are_built_once(smoke, tmp_path, monkeypatch):
    """A whole run builds one network and one conditioner, holds them in one model, and averages that."""
    made: dict[str, list] = {}

    def count(owner, name):
        build_one = owner.__init__

        def init(self, *args, **kwargs):
            made.setdefault(name, []).append(self)
            build_one(self, *args, **kwargs)

        monkeypatch.setattr(owner, "__init__", init)

    from ldm.conditioner.label import Label
    from ldm.model import LatentDiffusion
    from ldm.net.unet import UNet

    for owner in (UNet, Label, LatentDiffusion, PowerEMA):
        count(owner, owner.__name__)
    with here(tmp_path, LDM_CACHE=str(smoke.folder / "cache")):
        assert command("train.py", "budget=smoke", "seed=11", "metrics=none") == 0
    assert {name: len(found) for name, found in made.items()} == {
        "UNet": 1,
        "Label": 1,
        "LatentDiffusion": 1,
        "PowerEMA": 2,
    }
    (model,), (_, ema) = made["LatentDiffusion"], made["PowerEMA"]  # the first one, of no module, checks the options
    assert model.denoiser.net is made["UNet"][0]
    assert model.conditioner is made["Label"][0]
    assert ema.module is model
    assert not any(name.startswith("autoencoder") for name in ema.shadow)


@pytest.mark.parametrize("typed", [("objective=denoising", "objective.vlb=0.001"), ("sampler=ddpm_learned",)])
def test_learned_variance_sampler_requires_learned_variance_net(typed):
    cfg = composed("budget=smoke", *typed)
    use = drawn if "sampler" in typed[0] else trained
    with pytest.raises(ValueError, match="train with learned_variance=true"):
        use(cfg, model_of(cfg))


def test_learned_variance_net_supports_other_options():
    """Twice the channels: plain losses leave the second output alone, samplers with a variance of their own do not ask
    for it.
    """
    cfg = composed("budget=smoke", "learned_variance=true", "sampler=ddpm")
    model = model_of(cfg)
    assert model.denoiser.net.out[-1].out_channels == 2 * model.autoencoder.z_channels
    assert torch.isfinite(trained(cfg, model)["loss"])
    assert torch.isfinite(drawn(cfg, model)).all()


@pytest.mark.parametrize("option", ["cfg", "cfg_interval", "cfg_channels", "clip_x0", "dynamic_threshold"])
def test_guidance_option_samples(option):
    cfg = composed("budget=smoke", f"guidance={option}", "guidance.scale=3.0")
    assert torch.isfinite(drawn(cfg, model_of(cfg))).all()


def test_every_group_is_in_a_defaults_list():
    named = set(
        re.findall(r"^  - (\w+)", (CONF / "train.yaml").read_text() + (CONF / "sample.yaml").read_text(), re.MULTILINE)
    )
    # launchers are Hydra's own group; averages are named in the defaults lists of training/
    assert {p.name for p in CONF.iterdir() if p.is_dir()} - {"hydra", "ema"} <= named
    assert Path(CONF / "train.yaml").is_file()


BASES = sorted((path.parent.name, path.stem) for path in CONF.glob("*/_*.yaml"))


def test_base_options_are_not_listed():
    assert not [option for options in GROUPS.values() for option in options if option.startswith("_")]
    tree = ConfigSearchPath((CONF,), ROOT)
    assert {group for group, _ in BASES} >= {"net", "autoencoder", "preset"}
    assert tree.options("net") == GROUPS["net"]  # Hydra's own list, which glob() selects from
    assert "_unet" not in help_text(CONF, "train", "")


@pytest.mark.parametrize("sweep", ["", "quick,"])
@pytest.mark.parametrize(("group", "base"), BASES)
def test_base_option_is_refused_as_choice(group, base, sweep):
    tree = ConfigSearchPath((CONF,), ROOT)
    with pytest.raises(UserError, match=f"^{group}={sweep}{base}: {base} is the base of other options") as error:
        normalize_override(f"{group}={sweep}{base}", tree, (), (), bool(sweep))
    assert "\n" not in str(error.value)


def test_every_base_option_is_used():
    used = {
        (path.parent.name, name)
        for path in CONF.glob("*/*.yaml")
        for entry in yaml.safe_load(path.read_text()).get("defaults", [])
        for name in ([entry.partition("@")[0]] if isinstance(entry, str) else [])
    }
    assert set(BASES) <= used


def test_compose_option_names_existing_options():
    assert compose_option("net", "sd1").block == {
        "_target_": "ldm.net.attention.SpatialTransformer",
        "_partial_": True,
        "conv": True,
        "eps": 1e-6,
        "twice": False,
    }
    with pytest.raises(UserError, match=r"net=sdd1: no such option; did you mean 'sd1'\?"):
        compose_option("net", "sdd1")
    with pytest.raises(UserError, match=r"net=_unet: no such option"):
        compose_option("net", "_unet")


def test_conf_readme_is_generated_from_files():
    assert (CONF / "README.md").read_text() == readme(), "run python tests/tools/conf_readme.py"
    assert set(groups()) == set(GROUPS)


@pytest.mark.parametrize("path", sorted(CONF.glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_conf_file_begins_with_its_description(path):
    assert len(description(path)) > 9
