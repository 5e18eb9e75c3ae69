"""python train.py experiment=own_images data.path=DIR: what is said, chosen and named before anything is trained."""

import json
import re

import pytest
from PIL import Image
from smoke import command, composed, here

from ldm import build, runs
from ldm.stage import cache, estimate
from ldm.stage.estimate import length, said

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
def test_it_says_first_what_there_is_and_how_long_it_will_take(place, capsys, monkeypatch):
    assert command("train.py", *SMALL, "data.path=images") == 0
    out = re.sub(r"reading .*\n?", "", capsys.readouterr().out)
    first, second = [line for line in re.split(r"[\r\n]+", out) if line.strip()][:2]
    assert first.startswith("images: 40 images, captions from their names, 64 px, grey, fits in memory, ")
    assert "1 skipped: empty.png" in first
    first_stage = r"1 steps of the autoencoder at \d+ ms, 1 steps of it with its adversary at \d+ ms"
    assert re.match(rf"about \d+ s of training: {first_stage}, 2 steps of the diffusion model at \d+ ms", second)
    assert out.count("40 images") == 1, "said once, whatever processes there are"
    (run,) = (place / "runs").iterdir()
    chosen = runs.load_config(run / "config.yaml")["data"]
    assert (chosen["size"], chosen["channels"]) == (64, 1)
    assert chosen["content"] == build.dataset(composed(*SMALL, "data.path=images")).content
    assert json.loads((run / "data.json").read_text())["size"] == 64

    monkeypatch.setattr("ldm.stage.diffusion.announce", lambda cfg, data: None)
    assert command("train.py", *SMALL, "data.path=images", "runs=others") == 0
    journals = [runs.read_journal(folder / run.name / "metrics.jsonl") for folder in (place / "runs", place / "others")]
    losses = [[row["train/loss"] for row in rows if "train/loss" in row] for rows in journals]
    assert losses[0] == losses[1] != [], "to be timed leaves the training as it is"


def test_names_of_runs_depend_on_the_images_and_their_captions(place):
    def names():
        config = build.plain(build.settled(composed(*SMALL, "data.path=images").copy()))
        first = {**config, "training": config["first_stage"]}
        return runs.run_id(config), cache.first_stage_recipe(first).key

    one = names()
    assert names() == one
    (place / "images" / "grey 3.txt").write_text("a grey field")
    two = names()
    Image.new("L", (70, 70), 1).save(place / "images" / "grey 3.png")
    three = names()
    assert len({*one, *two, *three}) == 6


def test_the_estimate_in_words():
    assert said(("it", 100, 0.5)) == "about 50 s of training: 100 steps of it at 500 ms (timed now)"
    assert said(("a", 2000, 0.08), ("b", 4000, 0.575)).startswith("about 41 min of training: 2,000 steps of a at 80 ms, 4,000 steps of b")
    assert [length(s) for s in (119, 150, 7100, 7300)] == ["119 s", "2 min", "118 min", "2.0 h"]


def test_a_first_stage_that_is_kept_costs_nothing(place):
    cfg = build.settled(composed(*SMALL, "data.path=images").copy())
    data = build.dataset(cfg)
    assert [(name, steps) for name, steps, _ in estimate.measured(cfg, data)] == [
        ("the autoencoder", 1),
        ("it with its adversary", 1),
        ("the diffusion model", 2),
    ]
    folder = cache.first_stage_folder({**build.plain(cfg), "training": build.plain(cfg.first_stage)})
    runs.finish(folder, {})
    assert [name for name, *_ in estimate.measured(cfg, data)] == ["the diffusion model"]
