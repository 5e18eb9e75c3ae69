"""Whole models out of other projects' files and into them, and the one error of each damaged file."""

import json
import shutil
from collections import OrderedDict
from types import ModuleType

import pytest
import torch
from pipelines import PROMPT, START, drawn, whole
from safetensors.torch import load_file, save_file
from seeded import numbers

from ldm.checkpoint import external
from ldm.cli import export
from ldm.errors import UserError
from ldm.interop import checkpoint
from ldm.interop.checkpoint import EMA, NET, STAGE
from ldm.interop.folder import is_folder
from ldm.interop.pipeline import fold_scale
from ldm.io import atomic
from ldm.runs import folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return whole(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def sd2(tmp_path_factory):
    """Stable Diffusion 2's ways: linear projections, v, the last layer but one, padding with 0, one scale."""
    return whole(tmp_path_factory.mktemp("whole"), layer=-2, pad=0, per_channel=False)


@pytest.fixture(scope="module")
def image(pipeline):
    """What the pipeline draws."""
    return drawn(external.build_from_pipeline(pipeline))


def far(a, b):
    return float((a - b).abs().max())


def same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def exported(pipeline, tmp_path_factory):
    out = tmp_path_factory.mktemp("diffusers") / "out"
    export.export_diffusers(pipeline, out)
    return out


def test_diffusers_pipeline_draws_same_image(exported, image):
    from diffusers import StableDiffusionPipeline

    theirs = StableDiffusionPipeline.from_pretrained(exported)
    theirs.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 5, "guidance_scale": 3.0, "height": 32, "width": 32, "output_type": "pt"}
    found = theirs(PROMPT, latents=START.clone(), **options).images
    assert image.std() > 0.05
    assert far(found, image) <= 2e-3  # measured: 4e-7


def test_exported_files_follow_umask(exported, pipeline, tmp_path):
    export.export_compvis(pipeline, tmp_path / "one.safetensors")
    export.export_safetensors(pipeline, tmp_path / "two.safetensors")
    (tmp_path / "plain").touch()
    files = [*tmp_path.iterdir(), *(path for path in exported.rglob("*") if path.is_file())]
    assert sum(path.suffix == ".safetensors" for path in files) == 5
    assert {path.stat().st_mode & 0o777 for path in files} == {(tmp_path / "plain").stat().st_mode & 0o777}


def test_diffusers_folder_round_trip(exported, pipeline, image):
    back = external.open_pipeline(exported)
    same(back.net, pipeline.net)
    assert {**back.config, "conditioner": 0} == {**pipeline.config, "conditioner": 0}
    assert far(drawn(external.build_from_pipeline(back)), image) <= 1e-5


@pytest.fixture(scope="module")
def inpainting(tmp_path_factory):
    """Stable Diffusion's inpainting model: told a mask and the masked image's latent as well."""
    return whole(tmp_path_factory.mktemp("whole"), inpaints=True)


@pytest.fixture(scope="module")
def hole():
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 8:24, 4:20] = 1
    return {"image": numbers("photo", (1, 3, 32, 32)).clamp(-1, 1), "mask": mask}


def test_diffusers_inpaint_pipeline_draws_same_image(inpainting, hole, tmp_path):
    from diffusers import StableDiffusionInpaintPipeline

    image = drawn(external.build_from_pipeline(inpainting), **hole)
    export.export_diffusers(inpainting, tmp_path / "out")
    theirs = StableDiffusionInpaintPipeline.from_pretrained(tmp_path / "out")
    theirs.set_progress_bar_config(disable=True)
    options = {
        "num_inference_steps": 5,
        "guidance_scale": 3.0,
        "height": 32,
        "width": 32,
        "output_type": "pt",
        "strength": 1.0,
    }
    found = theirs(PROMPT, hole["image"], hole["mask"], latents=START.clone(), **options).images
    assert far(found, image) <= 2e-3
    assert (
        far(drawn(external.build_from_pipeline(inpainting), image=hole["image"], mask=1 - hole["mask"]), image) > 0.01
    )
    back = external.open_pipeline(tmp_path / "out")
    same(back.net, inpainting.net)
    assert far(drawn(external.build_from_pipeline(back), **hole), image) <= 1e-5


def test_inpainting_checkpoint_is_read(inpainting, tmp_path, monkeypatch, small_tower):
    from ldm.interop import compvis_config, config_nodes

    (told, _) = config_nodes.parts_of(inpainting.config["conditioner"])
    monkeypatch.setitem(compvis_config.CONDITIONERS, "FrozenCLIPEmbedder", lambda given: told)
    save_file(checkpoint.save(inpainting), tmp_path / "inpaint.safetensors")
    said = yaml(inpainting)
    said["model"]["params"] |= {"conditioning_key": "hybrid", "finetune_keys": None}
    said["model"]["params"]["unet_config"]["params"]["in_channels"] = 9
    (tmp_path / "inpaint.yaml").write_text(json.dumps(said))
    found = external.open_pipeline(tmp_path / "inpaint.safetensors")
    assert found.config == inpainting.config
    same(found.net, inpainting.net)
    said["model"]["params"]["unet_config"]["params"]["in_channels"] = 5
    (tmp_path / "inpaint.yaml").write_text(json.dumps(said))
    with pytest.raises(UserError, match=r"in_channels=5: expected 4, or 9"):
        external.open_pipeline(tmp_path / "inpaint.safetensors")


def test_fold_scale_folds_channel_scales_into_weights(pipeline):
    weights, scale = fold_scale(pipeline.autoencoder)
    assert scale == 1.0
    folded = external.build_from_pipeline(pipeline).autoencoder
    x = numbers("image", (1, 3, 32, 32)).clamp(-1, 1)
    z, image = folded.encode(x), folded.decode(START)
    before = folded.posterior(x)
    folded.load_state_dict({**folded.state_dict(), **weights, "shift": torch.zeros(4), "scale": torch.ones(4)})
    assert far(folded.encode(x), z) < 1e-5
    assert far(folded.decode(START), image) < 1e-5
    wanted = before.logvar + 2 * pipeline.autoencoder["scale"].log()[:, None, None]
    assert far(folded.posterior(x).logvar, wanted) < 1e-5


def test_fold_scale_of_one_number_shares_weights(sd2):
    weights, scale = fold_scale(sd2.autoencoder)
    assert scale == pytest.approx(0.18215)
    assert all(weights[name] is sd2.autoencoder[name] for name in weights)


def released(pipeline, monkeypatch, averages=True):
    """A checkpoint built as the released sd-v1-4.ckpt is: Lightning's classes, tables of the schedule, and moving
    averages.
    """
    import sys

    module = ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    callback = type("ModelCheckpoint", (), {"__module__": module.__name__})
    module.ModelCheckpoint = callback
    for name in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    state = checkpoint.save(pipeline)
    state |= {name: torch.linspace(0.1, 0.2, 5) for name in checkpoint.TABLES}
    state["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    if averages:
        for name in [name for name in state if name.startswith(NET)]:
            state[EMA + name.removeprefix("model.").replace(".", "")] = state[name]
            state[name] = state[name] + 1
        state |= {f"{EMA}decay": torch.tensor(0.9999), f"{EMA}num_updates": torch.tensor(7)}
    best = callback()
    best.best_model_path, best.kth = "epoch=0.ckpt", callback
    return {
        "epoch": 4,
        "global_step": 470000,
        "callbacks": {callback: {"best": best}},
        "state_dict": OrderedDict(state),
    }


def yaml(pipeline):
    """CompVis' config of the pipeline."""
    net, stage = pipeline.config["net"], pipeline.config["autoencoder"]["encoder"]
    dd = {
        "double_z": True,
        "z_channels": 4,
        "resolution": 32,
        "in_channels": 3,
        "out_ch": 3,
        "ch": stage["width"],
        "dropout": 0.0,
    }
    dd |= {"ch_mult": stage["channel_mult"], "num_res_blocks": stage["num_res_blocks"], "attn_resolutions": []}
    unet = {
        "image_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": 32,
        "channel_mult": net["channel_mult"],
        "num_res_blocks": 1,
    }
    unet |= {
        "attention_resolutions": net["attention_resolutions"],
        "num_heads": 4,
        "use_spatial_transformer": True,
        "context_dim": 16,
    }
    params = {
        "linear_start": 0.00085,
        "linear_end": 0.012,
        "timesteps": 1000,
        "image_size": 8,
        "channels": 4,
        "monitor": "val/loss",
    }
    params |= {"unet_config": {"target": "x.UNetModel", "params": unet}, "scale_by_std": True}
    params |= {"first_stage_config": {"target": "x.AutoencoderKL", "params": {"embed_dim": 4, "ddconfig": dd}}}
    params |= {"cond_stage_config": {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"}}
    return {
        "model": {"base_learning_rate": 1e-4, "target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}
    }


@pytest.fixture
def small_tower(pipeline, monkeypatch):
    """FrozenCLIPEmbedder means the small tower; groups are the small networks'."""
    from ldm.interop import compvis_config, config_nodes

    def sized(make, groups):
        return lambda *args, **kwargs: make(*args, **{**kwargs, "groups": groups})

    monkeypatch.setitem(compvis_config.CONDITIONERS, "FrozenCLIPEmbedder", lambda given: pipeline.config["conditioner"])
    monkeypatch.setattr(config_nodes, "unet", sized(config_nodes.unet, 16))
    monkeypatch.setattr(config_nodes, "first_stage", sized(config_nodes.first_stage, 8))


def test_released_checkpoint_is_read(pipeline, image, tmp_path, monkeypatch, small_tower):
    with monkeypatch.context() as patch:
        torch.save(released(pipeline, patch), tmp_path / "model.ckpt")
    (tmp_path / "model.yaml").write_text(json.dumps(yaml(pipeline)))  # which is yaml as well
    found = external.open_pipeline(tmp_path / "model.ckpt")
    same(found.net, pipeline.net)
    assert found.text.keys() == pipeline.text.keys() - {"text_projection"}
    assert found.config == pipeline.config
    assert found.data == pipeline.data
    assert far(drawn(external.build_from_pipeline(found)), image) <= 1e-5
    raw = external.open_pipeline(tmp_path / "model.ckpt", "raw")
    same(raw.net, {name: value + 1 for name, value in pipeline.net.items()})


def test_checkpoint_with_foreign_averages_is_refused(pipeline, tmp_path, monkeypatch, small_tower):
    (tmp_path / "config.yaml").write_text(json.dumps(yaml(pipeline)))
    state = released(pipeline, monkeypatch)["state_dict"]
    for broken, said in (
        (
            {**state, f"{EMA}diffusion_modelother": torch.ones(1)},
            r"moving averages \(model_ema\): unknown names diffusion_modelother",
        ),
        (
            {n: v for n, v in state.items() if n != f"{EMA}diffusion_modelout0bias"},
            r"1 weights have no moving average, .* out\.0\.bias",
        ),
        ({**state, "lora.down": torch.ones(1)}, r"CompVis checkpoint: unknown names lora\.down"),
        ({**state, f"{STAGE}encoder.extra": torch.ones(1)}, r"unknown names encoder\.extra"),
        ({**state, "cond_stage_model.transformer.extra": torch.ones(1)}, r"CLIP text model: unknown names extra"),
        ({n: v for n, v in state.items() if not n.startswith(STAGE)}, r"this file has no first_stage_model\.\*"),
        (
            {n: v for n, v in state.items() if n != "scale_factor"},
            r"neither the config nor the file has the latent's scale",
        ),
    ):
        save_file({n: v.contiguous().clone() for n, v in broken.items()}, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=said) as error:
            external.open_pipeline(tmp_path / "model.safetensors", yaml=tmp_path / "config.yaml")
        assert str(error.value).startswith(str(tmp_path / "model.safetensors"))


def test_checkpoint_without_yaml_is_refused(pipeline, tmp_path):
    export.export_compvis(pipeline, tmp_path / "model.ckpt")
    with pytest.raises(UserError, match=r"nothing says what model it is; put its yaml beside it as model\.yaml"):
        external.open_pipeline(tmp_path / "model.ckpt")
    with pytest.raises(UserError, match=r"config=.*gone\.yaml: no such file"):
        external.open_pipeline(tmp_path / "model.ckpt", yaml=tmp_path / "gone.yaml")
    for text, said in (("{", "is no yaml"), ("a: 1", r"has no model\.params")):
        (tmp_path / "model.yaml").write_text(text)
        with pytest.raises(UserError, match=said):
            external.open_pipeline(tmp_path / "model.ckpt")


def test_compvis_round_trip_is_identical(sd2):
    state = checkpoint.save(sd2)
    assert sum(name.startswith("cond_stage_model.model.") for name in state) == len(
        sd2.text
    )  # open_clip's names, as Stable Diffusion 2
    back = checkpoint.load(state, {**sd2.config, "scale": None}, 32)
    same(checkpoint.save(back), state)
    same(back.net, sd2.net)
    same(back.text, sd2.text)
    same(
        {**back.autoencoder, "calibrated_on": 0 * START[0, 0, 0, 0]},
        {**sd2.autoencoder, "calibrated_on": 0 * START[0, 0, 0, 0]},
    )


def test_stable_diffusion_2_reads_all_but_last_layer(sd2, tmp_path):
    expected = drawn(external.build_from_pipeline(sd2))
    export.export_diffusers(sd2, tmp_path / "out")
    held = load_file(tmp_path / "out" / "text_encoder" / "model.safetensors")
    assert not any(".layers.2." in name for name in held)
    assert json.loads((tmp_path / "out" / "text_encoder" / "config.json").read_text())["num_hidden_layers"] == 2
    back = external.open_pipeline(tmp_path / "out")
    assert back.config["conditioner"]["encoder"]["layer"] == -1  # of the two that are there
    assert back.config["prediction"] == sd2.config["prediction"]
    assert far(drawn(external.build_from_pipeline(back)), expected) <= 1e-5
    other = {**sd2.text, "transformer.resblocks.2.mlp.c_fc.bias": sd2.text["transformer.resblocks.2.mlp.c_fc.bias"] + 1}
    from dataclasses import replace

    assert far(drawn(external.build_from_pipeline(replace(sd2, text=other))), expected) == 0


def test_safetensors_file_contains_config(pipeline, image, tmp_path):
    export.export_safetensors(pipeline, tmp_path / "model.safetensors")
    found = external.open_pipeline(tmp_path / "model.safetensors")
    assert found.config == pipeline.config
    same(found.autoencoder, pipeline.autoencoder)
    assert torch.equal(drawn(external.build_from_pipeline(found)), image)


def test_older_diffusers_vae_folder_is_read(exported, pipeline, tmp_path):
    shutil.copytree(exported, tmp_path / "old")
    vae = tmp_path / "old" / "vae"
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for name, value in load_file(vae / "diffusion_pytorch_model.safetensors").items():
        for now, before in names.items():
            name = name.replace(f".{now}.", f".{before}.")
        state[name] = value
    (vae / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(state, vae / "diffusion_pytorch_model.bin")
    config = json.loads((vae / "config.json").read_text())
    kept = {
        name: config[name]
        for name in ("block_out_channels", "down_block_types", "latent_channels", "layers_per_block", "norm_num_groups")
    }
    (vae / "config.json").write_text(
        json.dumps({**kept, "scaling_factor": config["scaling_factor"], "_diffusers_version": "0.2.2"})
    )
    assert "encoder.mid_block.attentions.0.query.weight" in state
    same(external.open_pipeline(tmp_path / "old").autoencoder, external.open_pipeline(exported).autoencoder)


def changed(path, **options):
    given = json.loads(path.read_text())
    path.write_text(json.dumps({**given, **options}))


@pytest.mark.parametrize(
    ("place", "options", "said"),
    [
        (
            "model_index.json",
            {"_class_name": "FluxPipeline"},
            "_class_name=FluxPipeline: expected one of StableDiffusionPipeline",
        ),
        ("unet/config.json", {"act_fn": "gelu"}, "act_fn='gelu' has no counterpart in ours; expected 'silu'"),
        ("unet/config.json", {"in_channels": 9}, "in_channels=9; expected 4 for a first stage of 4"),
        ("unet/config.json", {"block_out_channels": [32, 48]}, r"block_out_channels=\[32, 48\]; expected multiples"),
        ("unet/config.json", {"attention_head_dim": [8, 8]}, "expected the same number of channels per head"),
        ("unet/config.json", {"down_block_types": ["DownBlock2D", "KDownBlock2D"]}, "down_block_types="),
        ("unet/config.json", {"new_option": 2}, "new_option=2 has no counterpart in ours"),
        ("unet/config.json", {"up_block_types": ["UpBlock2D", "UpBlock2D"]}, "and the same on the way up"),
        ("vae/config.json", {"new_option": 2}, "new_option=2 has no counterpart in ours"),
        ("vae/config.json", {"latents_mean": [0.0]}, r"latents_mean=\[0\.0\] has no counterpart"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "sigmoid"}, "beta_schedule=sigmoid: expected"),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "prediction_type=flow: expected"),
        ("text_encoder/config.json", {"hidden_act": "relu"}, "hidden_act=relu: expected"),
    ],
)
def test_diffusers_config_rejects_unsupported_options(exported, tmp_path, place, options, said):
    shutil.copytree(exported, tmp_path / "out")
    changed(tmp_path / "out" / place, **options)
    with pytest.raises(UserError, match=said):
        external.open_pipeline(tmp_path / "out")


def test_damaged_diffusers_folder_is_one_error(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "out")
    (tmp_path / "out" / "vae" / "config.json").write_text("{")
    with pytest.raises(atomic.CorruptFileError, match=r"vae/config\.json is damaged"):
        external.open_pipeline(tmp_path / "out")
    (tmp_path / "out" / "vae" / "config.json").unlink()
    with pytest.raises(UserError, match=r"vae/config\.json: no such file"):
        external.open_pipeline(tmp_path / "out")
    shutil.copy(exported / "vae" / "config.json", tmp_path / "out" / "vae")
    weights = tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(
        atomic.CorruptFileError,
        match=r"unet/diffusion_pytorch_model\.safetensors .* is not a complete safetensors file",
    ):
        external.open_pipeline(tmp_path / "out")
    weights.unlink()
    with pytest.raises(UserError, match=r"unet: no weights in it"):
        external.open_pipeline(tmp_path / "out")


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        (
            "net",
            {"stem.weight": torch.zeros(32, 9, 3, 3)},
            r"U-Net: stem\.weight is \[32, 9, 3, 3\], the config's model has \[32, 4, 3, 3\]",
        ),
        ("net", {"stem.bias": None}, r"U-Net: 1 weights are missing, the first is stem\.bias"),
        (
            "net",
            {"more": torch.zeros(1)},
            "U-Net: 1 weights belong to another architecture than the config's, the first is more",
        ),
        ("autoencoder", {"encoder.out.0.bias": torch.zeros(3)}, r"first stage: encoder\.out\.0\.bias is \[3\]"),
        ("text", {"ln_final.bias": None}, r"text tower: 1 weights are missing, the first is ln_final\.bias"),
        (
            "net",
            {"stem.bias": torch.ones(32, dtype=torch.int8)},
            r"U-Net: stem\.bias is int8; expected floating-point weights",
        ),
        ("net", {"stem.bias": torch.ones(32, dtype=torch.complex64)}, r"U-Net: stem\.bias is complex64; expected"),
        (
            "autoencoder",
            {"encoder.out.2.bias": torch.ones(8, dtype=torch.bool)},
            r"first stage: encoder\.out\.2\.bias is bool; expected",
        ),
        (
            "text",
            {"ln_final.bias": torch.ones(16, dtype=torch.int64)},
            r"text tower: ln_final\.bias is int64; expected",
        ),
    ],
)
def test_weights_of_wrong_shape_are_one_error(pipeline, part, change, said):
    from dataclasses import replace

    state = {name: value for name, value in {**getattr(pipeline, part), **change}.items() if value is not None}
    with pytest.raises(UserError, match=said):
        external.build_from_pipeline(replace(pipeline, **{part: state}))


def test_pipeline_config_targets_are_restricted(pipeline, tmp_path):
    from dataclasses import replace

    for target in ("os.system", "torch.load", "builtins.eval", "subprocess.run"):
        planted = replace(pipeline, config={**pipeline.config, "schedule": {"_target_": target, "command": "true"}})
        export.export_safetensors(planted, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match="is refused"):
            external.open_pipeline(tmp_path / "model.safetensors")


def test_damaged_header_is_one_error(tmp_path):
    for header in ("{", "{}", '{"config": {}, "data": 1}'):
        save_file({"net.a": torch.ones(1)}, tmp_path / "a.safetensors", {"ldm": header})
        with pytest.raises(atomic.CorruptFileError, match=r"a\.safetensors: its header is damaged"):
            external.open_pipeline(tmp_path / "a.safetensors")
    save_file({"net.a": torch.ones(1)}, tmp_path / "a.safetensors", {"ldm": '{"config": {}, "data": {}}'})
    with pytest.raises(UserError, match="has no net or no autoencoder"):
        external.open_pipeline(tmp_path / "a.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors", {"ldm": '{"config": {}, "data": {}}'})
    with pytest.raises(UserError, match=r"a\.safetensors: unknown names a"):
        external.open_pipeline(tmp_path / "a.safetensors")


def test_export_diffusers_rejects_unsupported_parts(pipeline, tmp_path):
    from dataclasses import replace

    def with_(**parts):
        return replace(pipeline, config={**pipeline.config, **parts})

    net = pipeline.config["net"]
    for broken, said in (
        (with_(conditioner={"_target_": "ldm.conditioner.label.Label"}), "to=diffusers expects a CLIP text tower"),
        (with_(net={**net, "resblock_updown": True}), "resblock_updown=True has no counterpart"),
        (with_(net={**net, "num_groups": 24}), "num_groups=24 does not divide"),
        (with_(net={**net, "_target_": "ldm.net.dit.DiT"}), "expects a UNet of transformer blocks"),
        (with_(prediction={"_target_": "ldm.diffusion.prediction.Flow"}), "to=diffusers expects one of Eps, V, X0"),
        (with_(schedule={"_target_": "ldm.diffusion.schedule.Flow"}), "expects a schedule with a table of betas"),
        (
            with_(autoencoder={"_target_": "ldm.autoencoder.identity.Identity", "factor": 4}),
            "expects the convolutional encoder",
        ),
    ):
        with pytest.raises(UserError, match=said):
            export.export_diffusers(broken, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_folder_without_index_is_not_a_pipeline(tmp_path):
    assert not folder.is_external(tmp_path)
    assert not is_folder(tmp_path)
    (tmp_path / "model.ckpt").write_bytes(b"")
    assert folder.is_external(tmp_path / "model.ckpt")
    for name in ("config.yaml", "data.json"):
        (tmp_path / name).write_text("")
    assert not folder.is_external(tmp_path / "model.ckpt")  # a run's own
