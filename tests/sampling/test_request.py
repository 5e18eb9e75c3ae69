"""Requests of sample.py from a config alone: what is refused, what a batch holds, and how one is repeated."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import write_image
from omegaconf import OmegaConf
from smoke import composed

from ldm.data.degrade import DegradedDataset
from ldm.data.synthetic import Synthetic
from ldm.errors import UserError
from ldm.io.images import save_png
from ldm.runs.data_card import DataCard
from ldm.sampling import prompts, request
from ldm.sampling.prompts import captions_and_labels, read_prompts
from ldm.sampling.request import SampleRequest
from ldm.sampling.sizes import check_shape, given_sizes
from ldm.tensors import choose, derive_seed

CLASSES, CAPTIONS = ("cat", "dog", "cow"), (("a cat", "one cat"), ("a dog", "one dog"), ("a cow", "one cow"))
CARD = DataCard("some", (1, 8, 12), CLASSES, CAPTIONS)
PLAIN = DataCard("some", (1, 8, 12))


def source(folder: Path, card: DataCard = CARD, hints: int = 0, degraded: bool = False, has_dataset: bool = True):
    """A run with nothing but its config, of data of four held-out images of 8 x 12 pixels."""
    config = {"data": {"_target_": "ldm.data.synthetic.Synthetic", "num": 4, "size": [8, 12]}}
    if degraded:
        config["degradation"] = OmegaConf.to_container(composed("degradation=mask", "conditioner=label").degradation)
    node = {"hint": {"extractor": {"_target_": "ldm.conditioner.edges.Canny"}}}
    adapters = [SimpleNamespace(config=OmegaConf.create({"adapter": node}))] * hints
    return SimpleNamespace(
        folder=folder,
        config=OmegaConf.create(config),
        data_card=card,
        adapters=adapters,
        latent_space="f2c1-some",
        has_dataset=has_dataset,
    )


@pytest.fixture
def ask(tmp_path, monkeypatch):
    """Return a function (changes, task, options of `source`) -> the request of a config with these changes."""

    def asked(task: str = "generate", reproduce: str | None = None, *, run="run", changes=None, **options):
        made = source(tmp_path / "run", **options)
        monkeypatch.setattr(request, "open_model", lambda name: made)
        cfg = composed("run=x", f"task={task}", name="sample").copy()
        for name, value in {"run": run, "num": 2, "reproduce": reproduce, **(changes or {})}.items():
            OmegaConf.update(cfg, name, value, merge=False)
        return SampleRequest.from_config(cfg)

    (tmp_path / "run").mkdir()
    return asked


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"run": None}, "run=... must be given"),
        ({"num": 0}, "num=0: expected 1 or more"),
        ({"steps": -1}, "steps=-1: expected 1 or more"),
        ({"tile": 0}, "tile=0: expected null"),
        ({"tile": "8"}, "tile=8: expected null"),
        ({"tile": True}, "tile=True: expected null"),
        ({"save": "some"}, "save=some: expected all"),
        ({"labels": "equal"}, "labels=equal: expected balanced"),
        ({"prompt": "a", "label": "cat"}, "prompt and label were given"),
        ({"held_out": True, "num": 5}, "num=5: expected at most 4"),
        ({"size": [8]}, "size=[8]: expected [height,width] in pixels"),
        ({"size": [8, 0]}, "size=[8, 0]: expected [height,width]"),
        ({"size": [8, 12.5]}, "size=[8, 12.5]: expected [height,width]"),
        ({"crop": [0, -1]}, "crop=[0, -1]: expected [top,left] in pixels, 0 or more"),
    ],
    ids=str,
)
def test_requests_that_make_no_sense_are_refused(changes, said, ask):
    with pytest.raises(UserError) as raised:
        ask(changes=changes)
    assert said in str(raised.value)


def test_a_request_has_what_its_config_says(ask, tmp_path):
    made = ask(changes={"tile": 1, "num": 1, "steps": 1, "batch_size": 1, "size": [4, 4]})
    assert (made.tile, made.steps, list(made.rows), made.held_out, made.record) == (1, 1, [0], None, None)
    assert made.prompts == {0: (choose(CAPTIONS[0], 0, "told", 0), 0)}
    assert made.output_dir.parent == tmp_path / "run" / "samples"
    assert made.output_dir.name.startswith("0-")
    assert ask(changes={"output_dir": "out"}).output_dir == Path("out")
    again = ask(changes={"num": 3, "save": "grid"}).output_dir  # the number of images does not name the folder
    assert again == ask().output_dir != ask(changes={"steps": 3}).output_dir
    file = source(tmp_path / "some.safetensors")
    assert request.default_output_dir({"reproduce": None, "seed": 3}, file).parent == tmp_path / "some" / "samples"
    assert request.default_output_dir({"reproduce": "a/b.png"}, file) == Path("a/b-again")
    texts = [request.text_option(*given) for given in (("a", None), (None, "a.txt"), (None, "a.csv"), (None, None))]
    assert texts == ["prompt=a", "prompts=a.txt", None, None]


def test_held_out_conditions_are_those_of_the_runs_data(ask):
    asked = {"held_out": True, "num": 4}
    made = ask(changes=asked)
    assert isinstance(made.held_out, Synthetic)
    assert (made.prompts, list(made.rows)) == ({}, [0, 1, 2, 3])
    assert torch.equal(made.batch([2, 1])["image"], made.held_out.batch([(0, 2), (0, 1)])["image"])
    assert isinstance(ask(changes=asked, degraded=True).held_out, DegradedDataset)
    told = ask(changes={**asked, "label": "dog"})
    assert [kind for _, kind in told.prompts.values()] == [1] * 4
    assert told.batch([0, 3])["label"].tolist() == [1, 1]
    for changes in ({"held_out": True}, {"metrics": {"_target_": "builtins.dict"}}):
        with pytest.raises(UserError, match="was not trained here"):
            ask(changes=changes, has_dataset=False)
    assert ask(has_dataset=False).held_out is None


def test_a_batch_has_a_row_for_each_image(ask):
    made = ask(changes={"prompt": "a", "negative": "b", "original_size": [8, 9], "crop": [0, 2]})
    batch = made.batch([1, 0, 1])
    assert (batch["index"], batch["caption"], batch["negative"]) == ([1, 0, 1], ["a"] * 3, ["b"] * 3)
    assert batch["original_size"].tolist() == [[8, 9]] * 3
    assert batch["crop"].tolist() == [[0, 2]] * 3
    assert "label" not in batch


def test_inputs_are_the_users_or_those_held_out(ask, tmp_path):
    image = str(write_image(tmp_path / "a.png", (12, 8)))
    assert ask("img2img", changes={"image": image}).batch([0, 1])["image"].shape == (2, 1, 8, 12)
    assert ask("img2img", changes={"image": image, "size": [4, 6]}).batch([0])["image"].shape == (1, 1, 4, 6)
    with pytest.raises(UserError, match="image=FILE must be given"):
        ask("img2img")
    assert ask("img2img", changes={"held_out": True}).inputs == {}
    assert ask("img2img", changes={"held_out": True, "image": image}).inputs.keys() == {"image"}
    with pytest.raises(UserError, match="hints=FILE must be given"):
        ask(hints=1)
    assert ask(changes={"held_out": True}, hints=1).hints.keys() == {"hint"}
    given = ask("img2img", changes={"image": image}, hints=1)
    assert given.batch([0])["hint"].shape == (1, 3, 8, 12)
    assert ask(changes={"hints": [image]}, hints=1).hints == {}


def test_a_request_is_repeated_from_the_record_in_its_image(ask, tmp_path):
    image = write_image(tmp_path / "a.png", (12, 8))
    made = ask("img2img", changes={"image": str(image), "num": 3, "seed": 5, "steps": 7})
    record = made.reproduction_record(made.batch([2, 1]), "w")
    file = tmp_path / "000007.png"

    def write(**changes):
        save_png(file, torch.zeros(1, 8, 12, dtype=torch.uint8), {"reproduce": json.dumps({**record, **changes})})

    write(row=2)
    again = ask("img2img", str(file), run=None)
    assert (again.seed, again.steps, again.rows, again.saved_rows) == (5, 7, [2, 1], [2])
    assert again.batch_size == 2
    assert again.prompts == {row: made.prompts[row] for row in (2, 1)}
    assert again.run == record["request"]["run"] == str(tmp_path / "run")
    assert ask("img2img", str(file), run="moved").run == "moved"
    assert again.held_out is None
    write(row=2, request={**record["request"], "held_out": True})
    assert isinstance(ask("img2img", str(file), run=None).held_out, Synthetic)
    del record["told"]
    for row in (0, 2):  # of another batch; without all that is needed
        write(row=row, **({"told": []} if row == 0 else {}))
        with pytest.raises(UserError, match="does not say how it was made"):
            ask("img2img", str(file), run=None)
    record["told"] = []
    write(row=2)
    write_image(image, (12, 8), seed=1)
    with pytest.raises(UserError, match="has changed since"):
        ask("img2img", str(file), run=None)
    file.write_bytes(b"none")
    with pytest.raises(UserError, match="cannot identify image file"):
        ask("img2img", str(file), run=None)


def test_a_record_names_the_run_itself(ask, tmp_path):
    """run= may name a folder of runs, whose newest is another one later."""
    for run, recorded in (("", "run"), ("run/step", "run/step")):
        made = ask(run=str(tmp_path / run))
        record = made.reproduction_record(made.batch([0]), "w")
        assert record["request"]["run"] == str(tmp_path / recorded)
        assert record["told"] == [made.prompts[0]]
    held_out = ask(changes={"held_out": True})
    assert held_out.reproduction_record(held_out.batch([0]), "w")["told"] == []


def test_prompts_and_classes_of_images():
    told = partial(captions_and_labels, CARD)
    assert told(2, prompt="a") == [("a", None)] * 2
    assert told(2, label="cow") == [(choose(CAPTIONS[2], 0, "told", i), 2) for i in range(2)]
    assert told(5) == [(choose(CAPTIONS[i % 3], 0, "told", i), i % 3) for i in range(5)]
    kinds = [kind for _, kind in told(8, labels="random", seed=4)]
    assert kinds == [derive_seed(4 + i, "label") % 3 for i in range(8)]
    assert captions_and_labels(PLAIN, 2) == []
    assert captions_and_labels(DataCard("some", (1, 8, 12), CLASSES), 2) == [("", 0), ("", 1)]
    one_list = DataCard("some", (1, 8, 12), (), (("a", "b"),))
    assert captions_and_labels(one_list, 2) == [(choose(["a", "b"], 0, "told", i), None) for i in range(2)]


def test_prompts_are_read_from_text_or_csv(tmp_path):
    text, table = tmp_path / "a.txt", tmp_path / "a.csv"
    text.write_text("one,two\n\n three\n")
    assert read_prompts(text, CARD) == [("one,two", None), (" three", None)]
    assert captions_and_labels(CARD, 2, prompts=str(text)) == [("one,two", None)] * 2 + [(" three", None)] * 2
    table.write_text("label,prompt,more\ndog,a dog,1\n0,a cat,2\n")
    assert read_prompts(table, CARD) == [("a dog", 1), ("a cat", 0)]
    for file, content, said in (
        (tmp_path / "b.txt", None, "no such file"),
        (text, " \n", "the file is empty"),
        (table, "label,prompt\n", "expected the columns label,prompt and at least one row"),
        (table, "label,text\ndog,a dog\n", "expected the columns label,prompt"),
        (table, "label,prompt\ndog,a dog\ncat\n", "line 3: expected a label and a prompt"),
    ):
        if content is not None:
            file.write_text(content)
        with pytest.raises(UserError, match=said):
            read_prompts(file, CARD)


def test_classes_are_named_or_numbered():
    assert [prompts.parse_class(label, CARD) for label in ("dog", "2", 0)] == [1, 2, 0]
    for label, card, said in (
        ("3", CARD, "0..2"),
        ("bird", CARD, "expected one of cat, dog, cow"),
        ("dog", PLAIN, "have no classes"),
    ):
        with pytest.raises(UserError, match=said):
            prompts.parse_class(label, card)


def test_sizes_are_two_pixel_numbers():
    given = {"original_size": [1, 9], "crop": [0, 0]}
    assert given_sizes(given) == given
    assert given_sizes({"original_size": None, "crop": None}) == {}
    for name, size in (
        ("original_size", [0, 9]),
        ("original_size", [9]),
        ("crop", "ab"),
        ("crop", [1, 2.0]),
        ("crop", [-1, 0]),
    ):
        form = "[height,width] in pixels, 1" if name == "original_size" else "[top,left] in pixels, 0"
        with pytest.raises(UserError) as raised:
            given_sizes({"original_size": None, "crop": None, name: size})
        assert str(raised.value) == f"{name}={size}: expected {form} or more"


@pytest.mark.parametrize(
    ("changes", "shape", "refused"),
    [
        ({"save": "npz"}, (3, 8, 8), False),
        ({"save": "npz"}, (4, 8, 8), True),
        ({"save": "npz"}, (1, 16), False),  # written as an array of its own
        ({"save": "all"}, (4, 8, 8), False),
        ({"metrics": {"_target_": "x"}}, (4, 8, 8), True),
        ({"hints": "a.png"}, (4, 8, 8), False),
        ({"hints": "a.png"}, (1, 16), True),
        ({"tile": 8}, (7, 8, 8), False),
        ({"tile": 8}, (1, 16), True),
    ],
    ids=str,
)
def test_what_is_for_images_is_refused_for_other_shapes(changes, shape, refused):
    cfg = OmegaConf.create(
        {"metrics": {}, "save": "all", "hints": None, "tile": None, "inputs": {}, "task": {"_target_": "x"}, **changes}
    )
    if refused:
        with pytest.raises(UserError, match="is for images"):
            check_shape(cfg, shape)
    else:
        check_shape(cfg, shape)


def test_sizes_of_other_shapes_are_as_many_as_their_sides(ask):
    line = DataCard("some", (2, 16))
    assert ask(card=line, changes={"size": [8]}).task.keywords["size"] == [8]
    with pytest.raises(UserError, match="expected 1 sides in a list"):
        ask(card=line, changes={"size": [8, 8]})
