"""Every part of one's own, from a package and a config folder outside the repository, through the commands."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import assert_one_line_error
from hydra.errors import InstantiationException
from omegaconf import OmegaConf
from own_package import CONF, FILES, write_package
from PIL import Image, ImageSequence
from smoke import ROOT, command, composed, here
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ldm.app.session import Session
from ldm.checkpoint.load import load_model, load_run_config
from ldm.config import build, trust
from ldm.config.validate import validate
from ldm.diffusion.grids import trailing, uniform_grid
from ldm.errors import UserError
from ldm.io import atomic
from ldm.io.images import save_png
from ldm.recipes import checks
from ldm.sampling.tasks import sample, txt2img


@pytest.fixture(scope="module", autouse=True)
def conf(tmp_path_factory):
    """The package on the path, and its config folder."""
    folder = tmp_path_factory.mktemp("package")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield write_package(folder)


def config(*typed: str):
    """A small config whose parts are ldm's but for those typed."""
    return composed("budget=smoke", "data.size=16", "data.num=20", *typed)


def check(cfg) -> None:
    checks.check_parts(cfg, build.build_degraded_dataset(cfg, "train"))


def nodes(cfg, **changed):
    """A config with whole nodes replaced."""
    cfg = cfg.copy()
    for path, node in changed.items():
        OmegaConf.update(cfg, path.replace("__", "."), node, merge=False, force_add=True)
    validate(build.to_container(cfg))
    return cfg


CODE = {"z_channels": 4, "factor": 4}
FITTING = {
    "net": {"net": {"_target_": "our_paper.CrossNet"}},
    "subclass": {"net": {"_target_": "our_paper.ops.CrossNet", "width": 8, "heads": 1}},
    "encoder": {
        "autoencoder__z_channels": 4,
        "autoencoder__encoder": {"_target_": "our_paper.load.Encoder", **CODE},
        "autoencoder__decoder": {"_target_": "our_paper.load.Decoder", **CODE},
    },
    "conditioner": {"conditioner": {"_target_": "our_paper.open.Tokens"}},
    "composed": {
        "conditioner": {
            "_target_": "ldm.conditioner.compose.Compose",
            "ours": {"_target_": "our_paper.open.Tokens", "dim": 6},
            "theirs": {"_target_": "ldm.conditioner.label.Label", "dim": 8},
        }
    },
    "data": {"data": {"_target_": "our_paper.classes.Stripes"}},
    "objective": {"objective": {"_target_": "our_paper.compile.Absolute"}},
    "schedule": {"schedule": {"_target_": "our_paper.package.Quarter"}},
    "sampler": {"sampler": {"_target_": "our_paper.jit.renoise", "_partial_": True}},
    "guidance": {"guidance": {"_target_": "our_paper.jit.rising", "_partial_": True}},
    "optimizer": {"training__optimizer": {"_target_": "our_paper.exec.Sign", "_partial_": True, "lr": 0.1}},
    "rate": {"training__lr_schedule": {"_target_": "our_paper.system.linear", "_partial_": True}},
    "logger": {"logger": {"_target_": "our_paper.eval.Notes"}},
    "metric": {"metrics__metrics__spread": {"_target_": "our_paper.hub.Spread", "_partial_": True}},
}


@pytest.mark.parametrize("name", FITTING)
def test_part_of_another_package_passes_its_checks(name, monkeypatch):
    calls = []
    monkeypatch.setattr(checks, "require_shape", lambda *a, f=checks.require_shape: (calls.append(a[0]), f(*a)))
    cfg = nodes(config(), **FITTING[name])
    check(cfg)
    expected = {"encoder": "autoencoder.decoder", "data": "data", "objective": "objective", "sampler": "sampler"}
    if name not in ("optimizer", "rate", "logger", "metric"):
        assert expected.get(name, "net") in calls
    trust.sanitize_config(build.to_container(cfg), "a file")


WAVES = {"_target_": "our_paper.fields.Waves"}
FREE = {"conditioner": {"_target_": "ldm.conditioner.none.Unconditional"}, "metrics": {}, "data": WAVES}
IDENTITY = {"_target_": "ldm.autoencoder.identity.Identity"}
SOUND = {**FREE, "data": {**WAVES, "shape": [2, 64]}}
WRONG = [
    (
        {"data": {"_target_": "our_paper.fields.Shapeless"}},
        "data._target_=our_paper.fields.Shapeless: its shape is None; expected that of a sample, (C, L), (C, H, W) or",
    ),
    (
        {**FREE, "data": {**WAVES, "shape": [1, 2, 3, 4, 5]}},
        "data._target_=our_paper.fields.Waves: its shape is (1, 2, 3, 4, 5); expected that of a sample",
    ),
    (
        {**FREE, "autoencoder__factor": 5},
        "data.size=[24, 40]: all sides must be multiples of 5, the first stage's factor",
    ),
    (
        {**FREE, "metrics": {"_target_": "ldm.metrics.distribution.MetricSuite", "_partial_": True}},
        "metrics: samples of shape (2, 24, 40) are no images of 1 or 3 channels, as feature networks take; choose",
    ),
    (
        {**FREE, "conditioner": {"_target_": "ldm.conditioner.label.Label", "dim": 8}},
        "ldm.conditioner.label.Label reads each sample's label, and these data have no classes; choose",
    ),
    (
        {
            **FREE,
            "conditioner": {
                "_target_": "ldm.conditioner.compose.Compose",
                "text": {"_target_": "ldm.conditioner.transformer.WordPiece"},
            },
        },
        "WordPiece reads each sample's caption, and these data have no captions; choose",
    ),
    (
        SOUND,
        "autoencoder: ldm.autoencoder.patch.PatchEncoder takes samples with 2 sides besides the channels, these are of "
        "shape (2, 64); set autoencoder.factor=[n], a number for each side, or choose autoencoder=identity",
    ),
    (
        {**SOUND, "autoencoder": IDENTITY},
        "net: ldm.net.unet.UNet takes samples with 2 sides besides the channels, these are of shape (2, 64); "
        "set net.dims=1",
    ),
    (
        {"net": {"_target_": "our_paper.ops.Doubled"}},
        "net: our_paper.ops.Doubled's output is (2, 8, 8, 8); expected (2, 8,",
    ),
    (
        {"net": {"_target_": "our_paper.ops.Unary"}},
        "net: our_paper.ops.Unary.forward is called with (x, t, cond): too many",
    ),
    ({"net": {"_target_": "our_paper.ops.Block"}}, "net: our_paper.ops.Block also needs width, heads"),
    (
        {"conditioner": {"_target_": "our_paper.open.NullLess"}},
        "conditioner: our_paper.open.NullLess has no null; expected",
    ),
    (
        {"conditioner": {"_target_": "ldm.conditioner.compose.Compose", "a": {"_target_": "our_paper.open.NullLess"}}},
        "conditioner.a: NullLess has no null; expected what ldm.interfaces.Conditioner lists",
    ),
    (
        {"conditioner": {"_target_": "our_paper.open.Wide"}},
        "conditioner: our_paper.open.Wide.forward gives cond.context (2, 2, 8) for 2 rows; expected context_dim=16",
    ),
    (
        {"autoencoder__encoder": {"_target_": "our_paper.load.Half", "z_channels": 8, "factor": 4}},
        "autoencoder.encoder: the latent is (2, 8, 8, 8); expected (2, 8, 4, 4)",
    ),
    (
        {"autoencoder__decoder": {"_target_": "our_paper.load.Small", "z_channels": 8, "factor": 4}},
        "autoencoder.decoder: the image is (2, 1, 16, 15); expected (2, 1, 16, 16)",
    ),
    (
        {"autoencoder__decoder": {"_target_": "our_paper.load.Unbalanced", "z_channels": 8, "factor": 4}},
        "autoencoder.decoder: Unbalanced has no last_layer; expected what ldm.interfaces.Decoder lists",
    ),
    ({"autoencoder__factor": 3}, "data.size=16: all sides must be multiples of 3, the first stage's factor"),
    (
        {"data": {"_target_": "our_paper.classes.Bare"}},
        "data: our_paper.classes.Bare has no fingerprint, batch_metadata, pixels; expected what",
    ),
    (
        {"schedule": {"_target_": "our_paper.package.Half"}},
        "our_paper.package.Half has no log_snr, t_from_log_snr, net_time",
    ),
    (
        {"objective": {"_target_": "our_paper.compile.Mean"}},
        "objective: our_paper.compile.Mean's loss is (); expected (2,)",
    ),
    (
        {"objective": {"_target_": "our_paper.compile.Bare"}},
        "our_paper.compile.Bare returns Tensor; expected terms, with",
    ),
    (
        {"objective": {"_target_": "our_paper.jit.renoise", "_partial_": True}},
        "objective: what our_paper.jit.renoise gives is no nn.Module; expected one",
    ),
    (
        {"sampler": {"_target_": "our_paper.jit.cropped", "_partial_": True}},
        "sampler: our_paper.jit.cropped's image is (2, 1, 16, 12); expected (2, 1, 16, 16)",
    ),
    (
        {"training__optimizer": {"_target_": "our_paper.exec.nothing", "_partial_": True}},
        "training.optimizer: our_paper.exec.nothing gives a list; expected a torch.optim.Optimizer",
    ),
    (
        {"training__lr_schedule": {"_target_": "our_paper.system.text", "_partial_": True}},
        "training.lr_schedule: our_paper.system.text(0, 2) gives a str; expected a number",
    ),
    (
        {"logger": {"_target_": "our_paper.eval.Mute"}},
        "logger: our_paper.eval.Mute has no log_metrics, log_file, log_table",
    ),
    (
        {"metrics__metrics__mine": {"_target_": "our_paper.hub.Unfinished", "_partial_": True}},
        "metrics.metrics.mine: our_paper.hub.Unfinished has no compute; expected what ldm.metrics.distribution.Met",
    ),
]


@pytest.mark.parametrize(("changed", "message"), WRONG)
def test_wrong_part_is_one_line_before_training(changed, message):
    with pytest.raises(UserError) as caught:
        check(nodes(config(), **changed))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_checks_try_no_model_of_ldm_alone(monkeypatch):
    monkeypatch.setattr(build, "build_model", lambda *_: pytest.fail("a model is built"))
    check(config())
    with pytest.raises(UserError, match=r"data\.size=18: all sides must be multiples of 4"):
        check(config("data.size=18"))


def test_checks_leave_the_random_state_alone():
    before = torch.get_rng_state()
    check(nodes(config(), **FITTING["net"]))
    assert torch.equal(before, torch.get_rng_state())


def test_checks_skip_the_model_of_a_resumed_run(monkeypatch):
    cfg = nodes(config(), **FITTING["net"])
    monkeypatch.setattr(checks, "check_model", lambda *_: pytest.fail("a model is built"))
    checks.check_parts(cfg, build.build_degraded_dataset(cfg, "train"), is_new=False)


def test_constructor_gets_what_its_signature_names():
    cfg = nodes(config(), net={"_target_": "our_paper.ops.Doubled", "in_channels": 5}, **FITTING["conditioner"])
    autoencoder = build.build_autoencoder(cfg.autoencoder, 1)
    conditioner = build.build_conditioner(cfg.conditioner, autoencoder, build.build_dataset(cfg))
    assert conditioner.table.num_embeddings == 11
    net = build.build_network(cfg, autoencoder, conditioner)
    assert (net.stem.in_channels, net.stem.out_channels, net.out.out_channels) == (8, 16, 8)  # not 5: code knows
    assert net.block.attention.kdim == 8
    node = {"_target_": "our_paper.load.Encoder", "channels": 7, **CODE}
    assert build.supplied_kwargs({"encoder": node}, {"channels": 1}) == {}  # what its node sets is its own
    with pytest.raises(InstantiationException):  # its signature names none of them
        build.build_network(nodes(cfg, net={"_target_": "our_paper.ops.built"}), autoencoder, conditioner)


def run(conf: Path, *typed: str, flags: tuple[str, ...] = ()) -> int:
    small = ("budget=smoke", "data=stripes", "conditioner=tokens", "net=cross", "training.steps=4")  # a budget's differ
    return command(
        "train.py", *flags, "--config-dir", str(conf), *small, "preset=ours", "training.save_every=2", *typed
    )


@pytest.fixture(scope="module")
def trained(conf, tmp_path_factory) -> Path:
    """One run of `train.py --config-dir`, of which every part is ours."""
    folder = tmp_path_factory.mktemp("ours")
    with here(folder):
        assert run(conf) == 0
        (folder,) = Path("runs").iterdir()
        return folder.absolute()


@pytest.fixture
def at(trained):
    """The folder where the run was made."""
    with here(trained.parents[1]):
        yield


@pytest.mark.slow
def test_training_uses_every_part(trained):
    metrics = json.loads((trained / "metrics.json").read_text())
    assert metrics["n"] == 20
    assert metrics["spread"] > 0
    assert (trained / "note.txt").read_text() == "all of it is ours"
    notes = (trained / "notes.txt").read_text().splitlines()
    assert notes[0] == "start cross"
    assert notes[-2:] == ["finish", "close"]
    assert {"image 4 samples", "table scores"} <= {*notes}
    assert any(line.startswith("metrics 4 ") for line in notes)
    node = build.to_container(load_run_config(trained))
    parts = ("data", "autoencoder", "conditioner", "net", "schedule", "objective", "sampler", "guidance", "metrics")
    assert all(checks.user_targets(node[part]) for part in parts)
    assert {"our_paper.pickle.Noted", "our_paper.exec.Sign", "our_paper.system.linear"} <= {
        *checks.user_targets(node["training"])
    }
    state = torch.load(trained / "checkpoints" / "step-00000004" / "train_state.pt", weights_only=True)
    assert "mean" in state["optimizers"][0]["state"][0]


@pytest.mark.slow
def test_resumed_training_is_bit_identical(trained, at, conf):
    before = atomic.read_tensors(trained / "weights.safetensors")
    scores = json.loads((trained / "metrics.json").read_text())
    for name in ("metrics.json", "weights.safetensors", "checkpoints/step-00000004"):
        path = trained / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert run(conf, "resume=must") == 0
    after = atomic.read_tensors(trained / "weights.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    again = json.loads((trained / "metrics.json").read_text())
    assert {**again, "seconds": 0} == {**scores, "seconds": 0}


def images(path: Path, prompts: list[str], seed: int, scale: float) -> torch.Tensor:
    label = {"label": torch.tensor([3])}
    return txt2img(load_model(path), prompts, 1, seed, 3, scale, grid=uniform_grid, **label)


@pytest.mark.slow
def test_samples_depend_on_guidance_and_not_on_the_batch(trained):
    several = [images(trained, ["a", "b"], 0, scale) for scale in (1.0, 1.0, 4.0)]
    assert torch.equal(several[0], several[1])
    assert not torch.equal(several[0], several[2])
    torch.testing.assert_close(several[0][1:], images(trained, ["b"], 1, 1.0))


@pytest.mark.slow
def test_sample_command_scores_with_parts_of_the_package(trained, at, conf):
    small = ("num=10", "steps=2", "batch_size=5", "output_dir=drawn")
    ours = ("sampler=renoise", "guidance=rising", "metrics=spread", "timestep_spacing=uniform")
    assert command("sample.py", "--config-dir", str(conf), f"run={trained}", *ours, *small) == 0
    assert json.loads(Path("drawn/metrics.json").read_text())["spread"] > 0


@pytest.mark.slow
def test_sweep_over_parts_trains_each_job(trained, at, conf, capfd):
    assert run(conf, "net.width=8,16", flags=("-m",)) == 0
    out = capfd.readouterr().out
    assert "job 1 of 2" in out
    assert "2 of 2 jobs done, 1 of them before" in out  # width 16 is the shared run
    assert len([*trained.parent.iterdir()]) == 2


@pytest.mark.slow
def test_exported_file_gives_the_same_images(trained, at, tmp_path, capfd):
    from ldm.cli import export

    assert export.main([f"run={trained}", "to=safetensors", f"out={tmp_path / 'ours.safetensors'}"]) == 0
    assert torch.equal(*(images(path, ["a"], 0, 2.0) for path in (trained, tmp_path / "ours.safetensors")))
    assert export.main([f"run={trained}", "to=diffusers", f"out={tmp_path / 'folder'}"]) == 2
    assert len(capfd.readouterr().err.strip().splitlines()) == 1


def test_package_changes_no_file_of_the_repository():
    assert not {name for name in CONF if (ROOT / "conf" / f"{name}.yaml").exists()}
    assert {"ops.py", "load.py", "open.py", "classes.py"} <= FILES.keys()


TINY_DIT = ("net=dit_s2", "net.channels=24", "net.depth=1", "net.num_heads=2")
CONV = ("autoencoder=kl_f4_small", "autoencoder.encoder.width=8", "autoencoder.decoder.width=8")
SHAPES = {  # of samples -> what trains on them: a network and a first stage of ldm, or none and a network of our own
    (2, 24, 40): ("net=smoke", "net.channel_mult=[1,2]"),
    (2, 64): ("net=smoke", "net.dims=1", "autoencoder.factor=[4]", "training.latents=online"),
    (1, 48): (*TINY_DIT, "net.patch_size=[2]", *CONV, "autoencoder.factor=[4]"),
    (1, 4, 12, 20): ("net=smoke", "net.dims=3", "net.padding_mode=circular", *CONV, "autoencoder.factor=[2,4,4]"),
    (3, 4, 16, 24): (*TINY_DIT, "net.patch_size=[1,2,2]", "autoencoder.factor=[2,4,4]"),
    (1, 4, 6, 10): ("net=local", "net.sides=3", "autoencoder=identity", "training.latents=online"),
}


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_samples_of_any_shape_train_resume_and_sample(conf, shape, tmp_path, capfd):
    typed = (
        *("--config-dir", str(conf), "budget=smoke", "data=waves", f"data.shape={list(shape)}", "conditioner=none"),
        *("metrics=none", "training.steps=4", "training.save_every=2", *SHAPES[shape]),
    )
    fault = f"samples of shape {shape} are no images"
    with here(tmp_path):
        assert command("train.py", *typed) == 0
        assert f"grids       none: {fault} of 1 or 3 or 4 channels" in capfd.readouterr().out
        (folder,) = Path("runs").iterdir()
        card = {"fingerprint": f"waves-train-20-{list(shape)}", "shape": list(shape), "classes": [], "captions": []}
        assert json.loads((folder / "data.json").read_text()) == {**card, "medium": "image", "rate": None}
        before = atomic.read_tensors(folder / "weights.safetensors")
        for name in ("metrics.json", "weights.safetensors"):
            (folder / name).unlink()
        shutil.rmtree(folder / "checkpoints" / "step-00000004")
        assert command("train.py", *typed, "resume=must") == 0
        after = atomic.read_tensors(folder / "weights.safetensors")
        assert before.keys() == after.keys()
        assert all(torch.equal(value, after[name]) for name, value in before.items())
        small = (f"run={folder}", "steps=3", "output_dir=drawn")
        assert command("sample.py", *small, "num=3", "batch_size=2") == 0
        (line,) = (line for line in capfd.readouterr().out.splitlines() if "samples.npz" in line)
        assert line == f"{fault} of 1 or 3 or 4 channels: they are written to samples.npz"
        assert not [*Path().rglob("*.png")]
        with np.load("drawn/samples.npz") as file:
            samples = torch.from_numpy(file["samples"])
        assert samples.shape == (3, *shape)
        assert samples.dtype == torch.float32
        model = load_model(folder)
        for i in range(3):  # each in the row of its seed, as it is sampled alone
            alone = sample(model, {"index": [i]}, [i], trailing(model.denoiser.schedule, 3))
            torch.testing.assert_close(samples[i : i + 1], alone, rtol=0, atol=1e-4)
        image = Path("a.png")
        save_png(image, torch.zeros(1, 8, 8, dtype=torch.uint8))
        for more, line in (
            (("metrics=fid",), f"metrics=... is for images: {fault} of 1 or 3 channels; leave it out"),
            (("task=img2img", f"image={image}"), f"image=a.png is for images: {fault} of 1 or 3 or 4 channels"),
            (("label=0",), "label=0: the data of this run have no classes; leave it out"),
            (("prompt=a",), "prompt=a: this model has no text condition; expected no prompt"),
        ):
            assert_one_line_error(capfd, line, "sample.py", *small, *more)
        with pytest.raises(UserError, match=r"are no images of .* channels, which the page cannot show; sample\.py"):
            Session.open(str(folder))


@pytest.mark.slow
def test_samples_of_a_medium_are_written_logged_and_made_again(conf, tmp_path, capfd):
    typed = (
        *("--config-dir", str(conf), "budget=smoke", "data=waves", "data.shape=[1,4,6,10]", "data.medium=clip"),
        *("conditioner=none", "metrics=none", "net=local", "net.sides=3", "autoencoder=identity"),
        *("training.latents=online", "training.steps=4", "training.sample_every=2", "logger=tensorboard"),
    )
    with here(tmp_path):
        assert command("train.py", *typed) == 0
        (folder,) = Path("runs").iterdir()
        card = json.loads((folder / "data.json").read_text())
        assert (card["medium"], card["rate"]) == ("clip", 12.5)
        assert (folder / "grids" / "step-000002.png").is_file()
        written = {file.relative_to(folder).as_posix() for file in (folder / "players").rglob("*.*")}
        some = [f"{i:03d}.{ending}" for i in (0, 3, 6, 9) for ending in ("gif", "mp4", "png")]
        assert written == {
            f"players/{name}/{file}" for name in ("step-000002", "step-000004", "samples") for file in some
        }
        events = EventAccumulator(str(folder / "tensorboard")).Reload()
        assert [one.step for one in events.Images("players/3/gif")] == [2, 4, 4]
        small = (f"run={folder}", "steps=3", "output_dir=drawn")
        assert command("sample.py", *small, "num=3", "batch_size=2") == 0
        names = sorted(file.name for file in Path("drawn").iterdir())
        clips = [f"00000{i}.{ending}" for i in range(3) for ending in ("gif", "mp4", "png")]
        assert names == [*clips, "grid.png", "metrics.json"]
        with Image.open("drawn/000001.png") as picture:
            assert (picture.text["seed"], picture.text["rate"]) == ("1", "12.5")
        for file in (Path("drawn/000001.gif"), folder / "players" / "samples" / "000.gif"):
            with Image.open(file) as gif:
                assert sum(frame.info["duration"] for frame in ImageSequence.Iterator(gif)) == 320
        assert command("sample.py", "reproduce=drawn/000001.mp4") == 0
        assert "drawn/000001.mp4: made again, bit for bit the same" in capfd.readouterr().out
        assert (Path("drawn") / "000001-again" / "000001.mp4").is_file()
        for save, files in (
            ("npz", ["grid.png", "metrics.json", "samples.npz"]),
            ("grid", ["grid.png", "metrics.json"]),
        ):
            assert command("sample.py", *small[:2], f"output_dir={save}", f"save={save}", "num=3") == 0
            assert sorted(file.name for file in Path(save).iterdir()) == files
        with np.load("npz/samples.npz") as file:
            assert file["samples"].shape == (3, 1, 4, 6, 10)
            assert file["samples"].dtype == np.float32
        assert command("sample.py", *small[:2], "output_dir=typed", "medium=field", "num=2") == 0
        assert not [*Path("typed").rglob("*.png")]  # no fields: they have three sides
        fault = "samples of shape (1, 4, 6, 10) are no fields (C, L) or (C, H, W): they are written to samples.npz"
        assert fault in capfd.readouterr().out
        unknown = "medium=scope: expected clip, field, image"
        assert_one_line_error(capfd, unknown, "sample.py", *small, "medium=scope")
        assert_one_line_error(capfd, unknown, "train.py", *typed, "data.medium=scope", "name=b")
        (folder / "data.json").write_text(json.dumps({**card, "medium": "shutil.which"}))
        assert_one_line_error(capfd, "medium=shutil.which is refused: data that come with a file", "sample.py", *small)
