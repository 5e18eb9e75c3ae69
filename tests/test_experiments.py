"""Every study in experiments/ composes through `experiment=`, and its first job runs one step of each stage."""

import json
from pathlib import Path

import pytest
import torch
from smoke import ROOT, command, first_job, here

from ldm.config.overrides import ConfigSearchPath
from ldm.io import images
from ldm.media.sound import encode_wav

STUDIES = sorted(name for name in ConfigSearchPath((ROOT / "conf",), ROOT).studies() if not name.endswith("/sweep"))
TINY = (  # as budget=smoke has them, so that the judge and the first stages of the shared run serve again
    *(
        "training.steps=1",
        "training.batch_size=4",
        "training.sample_every=1",
        "training.save_every=1",
        "net=smoke",
        "trainer=cpu",
    ),
    *(
        "first_stage.steps=2",
        "first_stage.batch_size=8",
        "first_stage.discriminator_start=1",
        "evaluator.steps=2",
        "evaluator.batch_size=8",
    ),
)
MOLECULES = (
    "data.path=molecules.smi",
    "data.test_fraction=0.3",
    "net=dit_s2",
    "net.channels=32",
    "net.depth=1",
    "net.num_heads=2",
)
FIRST = ("~training.score",)  # a budget for the second stage has too much
STAGE_ONE = (*FIRST, "data=synthetic", "training.discriminator_start=0")
CLIP_NET = "net=dit_s2"  # net=smoke is for images
ROUGH = ("net.attention_resolutions=[2]",)
# a folder in place of the rendered notes
NOTES = ("data=sounds", "data.path=sounds", "data.seconds=0.256", "data.test_fraction=0.5")
WORDPIECE = ("dim", "layers", "num_heads", "num_head_channels", "max_length")
NEEDS = {  # what its README asks of the person, or what a budget for the second stage has too much
    "own_images": ("data.path=images",),
    "own_sounds": ("data.path=sounds", "data.seconds=0.256", "data.test_fraction=0.5", "conditioner=label", *ROUGH),
    "notes": (*NOTES, "conditioner=label", *(f"~conditioner.{key}" for key in WORDPIECE), *ROUGH),
    "notes/vocoder": (*FIRST, "~training.sample_every", *NOTES, "training.net.width=8", "training.net.depth=1"),
    "first_stage": (*STAGE_ONE, "training.seed=2"),  # else it may be in the shared cache
    "first_stage/emoji": (*STAGE_ONE, "training.seed=1"),  # else it is the same job
    "emoji": ("data=synthetic", "conditioner=label"),
    "blue_marble": ("data=synthetic", "data._target_=boxed.Boxed", "~data.stride", "~data.land", "~data.band"),
    "cifar10": ("data=synthetic",),
    "emoji/clip": (*FIRST, "~training.sample_every", "data=synthetic"),
    "schedules/full": ("data=synthetic", "metrics=fd"),
    "classifier_guidance": (*FIRST, "~training.sample_every"),
    **dict.fromkeys(
        ("schedules", "predictions", "predictions/flow", "weightings", "downsampling", "kl_weight"),
        ("training.score.num=20",),
    ),
    **dict.fromkeys(("terminal_snr", "ema_length"), ("training.score.num=20",)),
    **dict.fromkeys(("conditioning", "text_encoder"), ("training.score.num=20", "conditioner=label")),
    "text_encoder/scratch": (
        *("training.score.num=20", "conditioner=label"),
        *(f"~conditioner.{name}" for name in ("layers", "num_heads", "num_head_channels", "max_length")),
    ),
    "text_encoder/clip": (*FIRST, "~training.sample_every"),
    "text_encoder/small_clip": (
        "training.score.num=20",
        "conditioner=label",
        "~conditioner.max_length",
        "~conditioner.encoder",
    ),
    "lora": ("data=synthetic", "~data.styles"),
    "controlnet": ("data=synthetic",),
    "instruct_pix2pix": (
        *("data=synthetic", "conditioner=[label,source_image]", "~conditioner.drop", "~conditioner.minilm"),
    ),
    "kuramoto_sivashinsky": (
        *("data=kuramoto_sivashinsky", "conditioner=state_before", "data.trajectories=2", "data.states=3"),
        *("data.warmup=2.0", "net=unet_1d", "net.channels=8"),
    ),
    "own_clips": ("data.path=clips", "data.frames=8", "conditioner=label", CLIP_NET),
    **dict.fromkeys(
        ("moving", "moving/frames", "moving/factorised"),
        (
            "data=clips",
            "data.path=clips",
            "data.frames=8",
            "data.size=32",
            "data.channels=1",
            "conditioner=label",
            CLIP_NET,
        ),
    ),
    "moving/large": ("data=clips", "data.path=clips", "data.channels=1", "conditioner=label", CLIP_NET),
    "molecules": MOLECULES,
    "molecules/qm9": ("data=moses", "autoencoder=identity", *MOLECULES),
}
ON_TOP = ("lora", "controlnet", "distillation")  # of a run that is trained


def some_images(folder: Path) -> None:
    """Pictures of two kinds."""
    for i in range(12):
        image = torch.randint(0, 256, (3, 70, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
        images.save_png(folder / f"kind {i % 2}" / f"{i}.png", image)


def some_clips(folder: Path) -> None:
    """Clips of 16 frames, of two kinds."""
    from PIL import Image

    for i in range(6):
        grey = torch.randint(0, 256, (16, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
        first, *others = map(Image.fromarray, grey.numpy())
        (folder / f"kind {i % 2}").mkdir(parents=True, exist_ok=True)
        first.save(folder / f"kind {i % 2}" / f"{i}.gif", save_all=True, append_images=others, duration=100)


def tiny(study: str) -> list[str]:
    """The options of a tiny training of a study: TINY, but what NEEDS has otherwise, and NEEDS."""
    needs = NEEDS.get(study, ())
    chosen = {word.partition("=")[0] for word in needs}
    return [*(word for word in TINY if word.partition("=")[0] not in chosen), *needs]


def some_sounds(folder: Path) -> None:
    """Tones of two kinds."""
    folder.mkdir()
    for i in range(8):
        tone = torch.sin(torch.arange(4_096) * (0.1 + 0.05 * i)) / 2
        (folder / f"tone {'ab'[i % 2]}{i}.wav").write_bytes(encode_wav(tone))


def some_molecules(file: Path) -> None:
    """Alcohols, and an ether, as SMILES."""
    file.write_text("COC\n" + "".join("C" * n + "O\n" for n in range(1, 20)))


def finished(cache: Path, folder: Path) -> set[Path]:
    """The marks of runs, and of first stages that are a study of their own, that came to their end."""
    return {*folder.glob("runs/*/metrics.json"), *cache.glob("cache/first_stage/*/metrics.json")}


@pytest.mark.parametrize(
    "study", [s if s == "quickstart" else pytest.param(s, marks=pytest.mark.slow) for s in STUDIES]
)
def test_study_runs_its_first_job(study, smoke, tmp_path):
    some_images(tmp_path / "images")
    some_clips(tmp_path / "clips")
    some_sounds(tmp_path / "sounds")

    some_molecules(tmp_path / "molecules.smi")
    before, base = finished(smoke.folder, tmp_path), [f"init={smoke.run}"] * (study in ON_TOP)
    base += [f"objective.teacher.run={smoke.run}"] * (study == "distillation")
    with here(tmp_path, LDM_CACHE=str(smoke.folder / "cache")):
        assert command("train.py", *first_job("budget=smoke", f"experiment={study}", *tiny(study), *base)) == 0
        made = finished(smoke.folder, tmp_path) - before
    assert made
    assert all(json.loads(done.read_text())["seconds"] > 0 for done in made)


def test_every_study_has_readme():
    for folder in (ROOT / "experiments").iterdir():
        if folder.is_dir() and list(folder.glob("*.yaml")):
            assert (folder / "README.md").is_file(), f"{folder.name} says nowhere what it asks and what came of it"
