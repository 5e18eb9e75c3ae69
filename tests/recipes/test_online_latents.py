"""Latents encoded in the training steps: the same as cached ones, exact after a kill and on two ranks, and refusals."""

import json
import shutil
import signal

import pytest
import torch
from smoke import command, composed, here, processes

from ldm.config import build
from ldm.data.augment import AugmentedDataset, RandomCrop
from ldm.data.synthetic import SHAPES, Synthetic, render
from ldm.errors import UserError
from ldm.io import atomic
from ldm.recipes.latents import check_latents, training_data
from ldm.recipes.resume import differing_keys
from ldm.runs import metrics_log
from ldm.runs.identity import drop_keys, run_id
from ldm.tensors import derive_seed

ONLINE = ("training.latents=online", "metrics=none")
CROPS = ("augmentation=crop_and_color", *ONLINE)
TRAIN = ("train.py", "budget=smoke", "training.sample_every=100", "trainer=cpu")


class EndlessShapes:
    """Shapes without an end: sample i is rendered from i alone."""

    shape, flip, fingerprint = (1, 32, 32), False, "endless-shapes"
    classes, captions = list(SHAPES), [[shape] for shape in SHAPES]

    def __init__(self, split: str = "train", num: int | None = None):
        self.num = num

    def batch(self, samples):
        index = [i for _, i in samples]
        images = [render(torch.tensor([i % 10]), self.shape[1], derive_seed("endless", i)) for i in index]
        return {
            "image": torch.cat(images).float() / 127.5 - 1,
            "caption": [SHAPES[i % 10] for i in index],
            "label": torch.tensor([i % 10 for i in index]),
            "flip": torch.zeros(len(index), dtype=torch.bool),
            "index": index,
            "epoch": [epoch for epoch, _ in samples],
        }


class OnlyIterable:
    """A stream that cannot be asked for a sample."""

    shape = (1, 32, 32)

    def __init__(self, split: str = "train", num: int | None = None):
        pass

    def __iter__(self):
        return iter(())


STREAM = ("data._target_=test_online_latents.EndlessShapes", *(f"~data.{name}" for name in ("seed", "size", "flip")))


def losses(run):
    return [
        {name: value for name, value in row.items() if name.startswith("train/")}
        for row in metrics_log.read_metrics_log(run / "metrics.jsonl")
    ]


def only_run(folder):
    (run,) = (folder / "runs").iterdir()
    return run


def weights_of(run):
    return atomic.read_tensors(run / "weights.safetensors")


def assert_equal_weights(a, b):
    one, two = weights_of(a), weights_of(b)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], value) for name, value in two.items())


def test_latents_option_is_strict():
    assert composed("budget=smoke").training.latents == "cached"
    for value in ("lazy", "true", "null"):
        with pytest.raises(UserError, match=r"^training.latents.*expects Literal\['cached', 'online'\]"):
            composed("budget=smoke", f"training.latents={value}")


def test_cached_latents_are_not_in_names_of_runs():
    """A run of before the option has the name that it had, and its checkpoints go on."""
    config = {"training": {"steps": 3, "latents": "cached"}, "latents": "cached", "seed": 1}
    older = {"training": {"steps": 3}, "latents": "cached", "seed": 1}
    online = {"training": {"steps": 3, "latents": "online"}, "latents": "cached", "seed": 1}
    assert drop_keys(config, ()) == older
    assert run_id(config) == run_id(older) != run_id(online)
    assert differing_keys(older, config, None) == []
    assert differing_keys(older, online, None) == ["training.latents: absent -> online"]
    assert "augmentation" not in build.to_container(composed("budget=smoke"))


def cfg_of(latents="cached", metrics="full"):
    node = {"_target_": "x"} if metrics == "full" else {}
    objective = {"_target_": "ldm.diffusion.objective.Objective"}
    return {"training": {"latents": latents}, "metrics": node, "objective": objective}


SMALL = Synthetic(num=4, size=16)


@pytest.mark.parametrize(
    ("cfg", "data", "text"),
    [
        (
            cfg_of(),
            AugmentedDataset(SMALL, training=True, crop=RandomCrop(16)),
            "augmentation.crop: cached latents are those of each image and of its mirror image; "
            "choose training.latents=online, or leave it out",
        ),
        (cfg_of(), EndlessShapes(), "training.latents=cached: these data have no length, and all images are"),
        (cfg_of("online"), EndlessShapes(), "metrics: these data have no length, and samples are compared with all"),
        (
            cfg_of("online"),
            AugmentedDataset(SMALL, training=True, crop=RandomCrop(8)),
            "metrics: samples of 8 px, as augmentation.crop makes them, would be compared with images of 16 px; "
            "choose metrics=none, or a crop of 16 px",
        ),
    ],
)
def test_data_that_latents_or_metrics_cannot_use_are_refused(cfg, data, text):
    with pytest.raises(UserError) as error:
        check_latents(cfg, data)
    assert str(error.value).startswith(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("cfg", "data"),
    [
        (cfg_of(), SMALL),
        (cfg_of("online"), SMALL),
        (cfg_of(), AugmentedDataset(SMALL, training=True, flip=0.5)),
        (cfg_of("online"), AugmentedDataset(SMALL, training=True, crop=RandomCrop(16))),
        (cfg_of("online", "none"), AugmentedDataset(SMALL, training=True, crop=RandomCrop(8))),
        (cfg_of("online", "none"), EndlessShapes()),
    ],
)
def test_data_that_latents_and_metrics_can_use_are_accepted(cfg, data):
    check_latents(cfg, data)
    assert training_data("online", None, None, data, image=False) is data


@pytest.mark.parametrize(
    ("typed", "text"),
    [
        (("augmentation=random_crop", "augmentation.crop.size=16"), "augmentation.crop: cached latents are"),
        (("degradation=edits",), "degradation.edits: cached latents are"),
        (
            ("conditioner=source_image",),
            "conditioner: ldm.conditioner.spatial.SourceImage needs source, which these data do not have; "
            "choose degradation=edits",
        ),
        (
            ("conditioner=[label,size_crop]",),
            "conditioner: ldm.conditioner.size.SizeCrop needs original_size, which these data do not have; "
            "choose augmentation=random_crop",
        ),
        (("augmentation=random_crop",), "augmentation.crop.size=... must be given"),
        ((*STREAM, "training.latents=online", "metrics=full"), "metrics: these data have no length"),
        (
            ("data._target_=test_online_latents.OnlyIterable", *STREAM[1:]),
            "data._target_=test_online_latents.OnlyIterable: it has no batch(samples); expected a data set that",
        ),
        (
            ("training=classifier", "~training.score", "~training.sample_every", "augmentation=flip"),
            "augmentation= is only for training=diffusion: leave it out",
        ),
    ],
)
def test_command_refuses_in_one_line_before_training(typed, text, tmp_path, capsys):
    with here(tmp_path):
        assert command("train.py", "budget=smoke", "metrics=none", *typed) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith(f"error: {text}")
        assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_online_step_equals_cached_step_up_to_float16(smoke, tmp_path):
    """The same posterior noise of the same images: latents differ by the rounding of the cache."""
    with here(tmp_path, LDM_CACHE=str(smoke.folder / "cache")):
        for latents in ("cached", "online"):
            words = ("training.validation.every=2", "training.validation.num=6", "training.validation.levels=2")
            assert command(*TRAIN, "metrics=none", f"training.latents={latents}", f"runs={latents}", *words) == 0
    (cached,), (online,) = (list((tmp_path / name).iterdir()) for name in ("cached", "online"))
    assert cached.name != online.name
    for a, b in zip(losses(cached), losses(online), strict=True):
        assert a.keys() == b.keys()
        if "train/loss" in a:
            assert a["train/loss"] != b["train/loss"]
            assert b["train/loss"] == pytest.approx(a["train/loss"], rel=1e-3)
    a, b = (json.loads((run / "metrics.json").read_text())["val/loss"] for run in (cached, online))
    assert b == pytest.approx(a, rel=1e-3)


@pytest.mark.slow
def test_online_run_with_crops_is_exact_after_a_kill_and_again(smoke, tmp_path):
    job = (*TRAIN, *CROPS, "training.steps=5", "training.save_every=2", "trainer.num_workers=1")
    for name in ("whole", "again", "killed"):
        shutil.copytree(smoke.kept, tmp_path / name / "cache")
    (whole,) = processes(job, cwd=tmp_path / "whole")
    assert whole.returncode == 0, whole.stdout
    (again,) = processes(tuple(w for w in job if "num_workers" not in w), cwd=tmp_path / "again")
    assert again.returncode == 0, again.stdout
    (killed,) = processes(job, cwd=tmp_path / "killed", kill_at=3)
    assert killed.returncode == -signal.SIGKILL
    (resumed,) = processes(job, cwd=tmp_path / "killed")
    assert resumed.returncode == 0, resumed.stdout
    assert "resuming from step 2" in resumed.stdout
    runs = [only_run(tmp_path / name) for name in ("whole", "again", "killed")]
    assert_equal_weights(runs[0], runs[1])
    assert_equal_weights(runs[0], runs[2])


@pytest.mark.slow
@pytest.mark.parametrize("typed", [CROPS, (*STREAM, *ONLINE, "autoencoder=identity")], ids=["crops", "stream"])
def test_two_ranks_equal_one(typed, smoke, tmp_path):
    found = []
    for ranks, trainer in ((1, "cpu"), (2, "ddp")):
        shutil.copytree(smoke.kept, tmp_path / str(ranks) / "cache")
        job = (*TRAIN[:-1], *typed, f"trainer={trainer}", "trainer.accelerator=cpu", "trainer.precision='64'")
        done = processes(*[(*job, "training.steps=3")] * ranks, cwd=tmp_path / str(ranks))
        assert not any(one.returncode for one in done), done
        found.append(losses(only_run(tmp_path / str(ranks))))
    for a, b in zip(*found, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert abs(a[name] - b[name]) <= 1e-9 * max(abs(a[name]), 1e-3), name
