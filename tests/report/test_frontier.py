"""The frontier: a point is what sample.py draws and scores, all begin at the same noise, and what is done is not drawn
again.
"""

import json

import pytest
from smoke import ROOT, command, here

from ldm.cli.errors import run_guarded
from ldm.errors import UserError
from ldm.report import frontier, rows
from ldm.sampling import run as run_module
from ldm.sampling.run import generate_images

SMALL = ("num=6", "batch_size=6", "metrics=fd", "steps=2")


@pytest.fixture
def place(smoke, lively, tmp_path):
    with here(tmp_path, LDM_CACHE=str(smoke.kept)):
        yield tmp_path


def run(*typed: object) -> int:
    return run_guarded(lambda: frontier.main([str(word) for word in typed]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*biased")
def test_frontier_points_equal_sample_command_and_are_skipped_when_done(place, lively, monkeypatch, capsys):
    drawn: list = []
    draw = generate_images
    monkeypatch.setattr(run_module, "generate_images", lambda *a: drawn.append(draw(*a)) or drawn[-1])
    (place / "study").mkdir()
    (place / "study" / "points.yaml").write_text(
        "timestep_spacing: uniform\nguidance.scale: 1.0\npoints:\n"
        "- {sampler: ddim, sampler.eta: '0.0,1.0'}\n- {sampler: heun}\n"
    )
    assert run("study", f"run={lively}", *SMALL) == 0
    table = rows.read(place / "study" / "results.csv")
    assert [(row["sampler"], row["sampler.eta"], float(row["nfe"])) for row in table] == [
        ("ddim", "0", 2),
        ("ddim", "1", 2),
        ("heun", "", 3),
    ]
    assert len({row["fd_fashion"] for row in table}) == len({row["protocol"] for row in table}) == 3
    assert {"run", "seed", "n", "commit", "seconds", "score/identity"} <= table[0].keys()

    assert run("study", f"run={lively}", *SMALL) == 0  # resumes: nothing is left
    assert len(drawn) == 3
    assert "3 points, 0 evaluated now" in capsys.readouterr().out
    rows.write(place / "study" / "results.csv", table[:2])
    assert run("study", f"run={lively}", *SMALL) == 0
    assert len(drawn) == 4
    assert [row["sampler"] for row in rows.read(place / "study" / "results.csv")] == ["ddim", "ddim", "heun"]
    assert all((drawn[2][seed] == drawn[3][seed]).all() for seed in drawn[2])

    monkeypatch.undo()
    with here(place):
        typed = (
            f"run={lively}",
            *SMALL,
            "timestep_spacing=uniform",
            "guidance.scale=1.0",
            "seed=3000000",
            "sampler=ddim",
            "sampler.eta=0.0",
            "save=none",
            "output_dir=alone",
        )
        assert command("sample.py", *typed) == 0
    alone = json.loads((place / "alone" / "metrics.json").read_text())
    assert rows.format_cell(alone["fd_fashion"]) == table[0]["fd_fashion"]
    assert alone["protocol"] == table[0]["protocol"]


@pytest.mark.slow
def test_frontier_counts_guidance_and_varies_weights(place, smoke, lively):
    typed = ("guidance.scale=1,3", "guidance.interval=[0,1]", "sampler=ddim", *SMALL[:3], "steps=2")
    assert run(f"run={lively}", f"out={place / 'a.csv'}", *typed) == 0
    assert [float(row["nfe"]) for row in rows.read(place / "a.csv")] == [2, 4]
    assert 1000 < (place / "a.png").stat().st_size < 100_000
    assert run(f"run={smoke.run}", f"out={place / 'b.csv'}", "weights=ema,raw", *SMALL) == 0
    ema, raw = rows.read(place / "b.csv")
    assert (ema["weights"], raw["weights"]) == ("ema", "raw")
    assert ema["model"] != raw["model"]


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (("guidance.scale=1",), "run=... must be given"),
        (("nowhere", "run=."), "no points.yaml in it"),
        (("run=.", "sampler=dimm"), "did you mean 'ddim'"),
        (("run=.", "stepz=3"), "did you mean 'steps'"),
    ],
)
def test_frontier_rejects_invalid_arguments(place, typed, said, capsys):
    assert run(*typed) == 2
    assert said in capsys.readouterr().err
    assert not (place / "frontier.csv").exists()


def test_frontier_rejects_damaged_points_file(tmp_path):
    (tmp_path / "points.yaml").write_text("points: [")
    with pytest.raises(UserError, match=r"points\.yaml cannot be read"):
        frontier.sampling_points(tmp_path / "points.yaml", {})


@pytest.mark.slow
@pytest.mark.parametrize("study", sorted(file.parent.name for file in ROOT.glob("experiments/*/points.yaml")))
def test_frontier_points_of_study_compose(study, monkeypatch):
    monkeypatch.setenv("CLASSIFIER", "a run")
    found, keys = frontier.sampling_points(ROOT / "experiments" / study / "points.yaml", {})
    assert 2 <= len(found) <= 30
    assert len({frontier.point_id(job) for job in found}) == len(found)
    assert all(job.config["num"] == 1000 for job in found)
    assert keys


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*biased")
@pytest.mark.parametrize("study", sorted(file.parent.name for file in ROOT.glob("experiments/*/points.yaml")))
def test_frontier_first_point_of_study_is_sampled(study, place, smoke, monkeypatch):
    monkeypatch.setenv("CLASSIFIER", "a run")
    found, keys = frontier.sampling_points(
        ROOT / "experiments" / study / "points.yaml", dict(word.split("=") for word in SMALL[:3])
    )
    assert frontier.evaluate_points(str(smoke.run), found[:1], keys, place / "a.csv") == 1
