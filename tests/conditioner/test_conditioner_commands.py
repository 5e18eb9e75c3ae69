"""Conditioners by the commands, trained for three steps and sampled with; small encoders stand for downloaded ones."""

import json
from pathlib import Path

import pytest
import torch
from boxed import Boxed, bounding_box
from helpers import read_pngs, run_sample, write_image
from PIL import Image
from smoke import enliven, here, train
from towers import conditioner_overrides, write_towers

from ldm.conditioner.transformer import Layout
from ldm.data.synthetic import Synthetic
from ldm.io import atomic
from ldm.io.images import save_png

STEPS = (
    *("metrics=none", "training.steps=3", "training.save_every=1", "keep_last=3", "training.sample_every=500"),
    *("training.lr_schedule.warmup=1", "training.optimizer.weight_decay=0", "training.cond_drop_prob=0"),
)
PROMPTS = ("prompt=a white disc on black", "prompt=one ring of some size")
BOXED = "data._target_=boxed.Boxed"
CASES = {  # what is typed for training; two requests that differ in the condition; what learns of the condition alone
    **{
        name: ((f"conditioner={name}",), PROMPTS, "cross_attention.kv.weight")
        for name in ("clip", "clip_context", "t5", "minilm", "wordpiece")
    },
    "clip_image": (("conditioner=clip_image",), ("image=a.png", "image=b.png"), "cross_attention.kv.weight"),
    "retrieval": (("conditioner=retrieval",), ("image=shape0.png", "image=shape1.png"), "cross_attention.kv.weight"),
    "nearest_captions": (
        ("conditioner=retrieval", "conditioner.database=captions"),
        PROMPTS,
        "cross_attention.kv.weight",
    ),
    "compose": (("conditioner=[clip,t5]",), PROMPTS, "conditioner.widen.t5.weight"),
    "layout": (
        ("conditioner=layout", "conditioner.dim=16", "conditioner.layers=1", BOXED),
        ("boxes=disc.json", "boxes=ring.json"),
        "conditioner.transformer.token.weight",
    ),
    "size_crop": (
        ("conditioner=size_crop", "augmentation=random_resized_crop", "training.latents=online"),
        ("original_size=[64,64]", "crop=[20,3]"),
        "vector.0.weight",
    ),
    "source_image": (
        ("conditioner=[label,source_image]", "degradation=edits", "training.latents=online"),
        ("source=a.png", "source=b.png"),
        "stem.weight",
    ),
    "semantic_map": (
        ("conditioner=semantic_map", BOXED),
        ("map=left.png", "map=right.png"),
        "conditioner.mix.weight",
    ),
}
TASKS = {
    "clip_image": "image_variations",
    "retrieval": "image_variations",
    "layout": "layout",
    "semantic_map": "semantic",
    "source_image": "instruct",
}


@pytest.fixture(scope="module", autouse=True)
def place(smoke, tmp_path_factory):
    with here(tmp_path_factory.mktemp("conditioners"), LDM_CACHE=str(smoke.folder / "cache")):
        for seed, name in enumerate("ab"):
            write_image(f"{name}.png", (32, 32), seed)
        for i in range(2):  # of the training data, nearest to themselves
            save_png(Path(f"shape{i}.png"), Synthetic().images[i])
        for name, side in (("left", 0), ("right", 16)):
            image = Image.new("L", (32, 32), 0)
            image.paste(1, (side, 0, side + 16, 32))
            image.save(f"{name}.png")
        for name, left in (("disc", 0.0), ("ring", 0.5)):  # as many as there is room for, or few tokens differ
            boxes = [[name, left + k / 100, left, 0.9, left + k / 100] for k in range(30)]
            Path(f"{name}.json").write_text(json.dumps(boxes))
        yield Path.cwd()


@pytest.fixture(scope="module")
def towers(place) -> Path:
    return write_towers(place / "towers")


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_conditioner_trains_and_samples_by_command(name, towers):
    """What reads the condition learns from the data, and two conditions give two images of one seed."""
    typed, requests, learned = CASES[name]
    parts = ("clip", "t5") if name == "compose" else ("retrieval",) if name == "nearest_captions" else (name,)
    prefixes = {part: f"conditioner.{part}" if len(parts) > 1 else "conditioner" for part in parts}
    files = [word for part in parts for word in conditioner_overrides(part, towers, prefixes[part])]
    run = train(*typed, *files, *STEPS)
    first, last = (atomic.read_tensors(run / f"checkpoints/step-0000000{step}/model.safetensors") for step in (1, 3))
    moved = {key: (last[key] - first[key]).abs() for key in first if key.endswith(learned)}
    assert moved
    assert all(value.max() > 0 for value in moved.values()), moved
    if name == "layout":
        assert_only_tokens_of_boxes_learn(next(iter(moved.values())))
    enliven(run)
    task = TASKS.get(name, "generate")
    settings = (f"run={run}", f"task={task}", "num=2", "steps=2", "guidance.scale=40")  # beyond rounding to grey levels
    one, other = (
        read_pngs(run_sample(*settings, request, output_dir=f"drawn{i}")) for i, request in enumerate(requests)
    )
    assert one.shape == (2, 32, 32)
    assert (one != other).any(2).any(1).all()  # bit for bit the same where the condition is not read


def assert_only_tokens_of_boxes_learn(moved: torch.Tensor) -> None:
    """Of Layout's table (8192, D), the rows of absent boxes and of tokens in the data learn, no other."""
    data, layout = Boxed(), Layout(dim=16, layers=1)
    boxes = data.batch([(0, i) for i in range(len(data))])["boxes"]
    rows = set(moved.amax(1).nonzero()[:, 0].tolist())
    assert rows <= {token for one in boxes for token in layout.ids(one)}
    assert layout.none in rows
    assert rows & set(range(10))
    assert len(rows) > 20  # two corners of each of 24 images, at a resolution finer than theirs


def test_bounding_box_encloses_shape():
    where = torch.zeros(8, 16)
    where[2:4, 4:12] = 1
    assert bounding_box(where) == (0.25, 0.25, 0.75, 0.5)


def test_boxed_data_has_boxes_and_maps_of_images():
    batch = Boxed(flip=True).batch([(0, i) for i in range(12)])
    for image, where, ((label, *corners),) in zip(batch["image"][:, 0], batch["map"], batch["boxes"], strict=True):
        assert torch.equal(where, (image > 0).long())
        left, top, right, bottom = (round(32 * x) for x in corners)
        assert where[top:bottom, left:right].sum() == where.sum() > 0
        assert 0 <= label < 10
