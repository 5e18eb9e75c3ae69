"""sample.py: the same seed gives the same image, whatever the batch, the number of processes or the day; every mistake
is one line.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_one_line_error, read_pngs, run_sample
from PIL import Image
from smoke import command, here, processes

from ldm.checkpoint.weights import load_weights_dict
from ldm.config import serialize
from ldm.io import atomic

FEW = ("num=10", "steps=3")


@pytest.fixture(scope="module", autouse=True)
def place(smoke, tmp_path_factory):
    with here(tmp_path_factory.mktemp("sample"), LDM_CACHE=str(smoke.folder / "cache")):
        yield Path.cwd()


@pytest.fixture(scope="module")
def drawn(lively, place):
    """Ten images of a model that hears what it is told."""
    return draw(lively, *FEW)


def draw(run: Path, *overrides: str, out: str = "drawn") -> Path:
    return run_sample(f"run={run}", *overrides, output_dir=out)


def said(folder: Path) -> dict[str, dict[str, str]]:
    return {file.name: Image.open(file).text for file in sorted(folder.glob("[0-9]*.png"))}


def test_sample_writes_one_image_per_seed_grid_and_record(lively, drawn):
    assert sorted(p.name for p in drawn.iterdir()) == [*(f"{i:06d}.png" for i in range(10)), "grid.png", "metrics.json"]
    assert read_pngs(drawn).float().std((1, 2)).min() > 1
    assert (read_pngs(drawn)[0] != read_pngs(drawn)[1]).any()
    words = said(drawn)
    assert words["000003.png"]["seed"] == "3"
    assert words["000003.png"]["run"] == str(lively)
    assert words["000003.png"]["prompt"]
    assert Image.open(drawn / "grid.png").size == (3 * 66 + 2, 4 * 66 + 2)


def test_sample_records_infinite_options(lively, place):
    folder = draw(lively, "num=2", "steps=2", "sampler=heun", out="heun")
    request = json.loads((folder / "metrics.json").read_text())["request"]
    assert request["sampler"]["s_range"] == [0.0, ".inf"]
    assert command("sample.py", f"reproduce={folder / '000001.png'}", "output_dir=heun-again") == 0


def test_sample_request_reads_run_config_once(lively, place, monkeypatch):
    reads, load_config = [], serialize.load_config
    monkeypatch.setattr(serialize, "load_config", lambda path: reads.append(path) or load_config(path))
    draw(lively, "num=1", "steps=1", out="once")
    assert reads == [lively / "config.yaml"]


@pytest.mark.slow  # a process of its own, because the tests' process has trained
def test_sampling_does_not_import_lightning(lively):
    code = (
        "import sys, ldm.sampling.run; from ldm.checkpoint.load import load_model; load_model(sys.argv[1]); "
        "print([name for name in sys.modules if 'lightning' in name.split('.')[0]])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(lively)], capture_output=True, text=True, timeout=600)
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stderr


@pytest.mark.slow
def test_autoguidance_with_weak_run_changes_image(smoke, lively, place):
    """weak + s (model - weak): itself as the weak one changes nothing; another one does, and more at a larger scale."""
    other = broken(lively, place, "weak")
    metadata = atomic.read_metadata(lively / "weights.safetensors")
    atomic.write_tensors(
        other / "weights.safetensors", atomic.read_tensors(smoke.run / "weights.safetensors"), metadata
    )
    plain = draw(lively, *FEW, "guidance=cfg", "guidance.scale=1", out="plain")
    itself = draw(lively, *FEW, "guidance=autoguidance", f"guidance.weak={lively}", "guidance.scale=3", out="itself")
    assert (read_pngs(plain) - read_pngs(itself)).abs().max() <= 1
    far = [
        (
            read_pngs(
                draw(
                    lively,
                    *FEW,
                    "guidance=autoguidance",
                    f"guidance.weak={other}",
                    f"guidance.scale={scale}",
                    out="far",
                )
            )
            - read_pngs(plain)
        )
        for scale in (1, 1.5, 2)
    ]
    assert far[0].abs().max() <= 1
    assert 1 < far[1].float().abs().mean() < far[2].float().abs().mean()


def test_sample_is_bit_equal_after_reload(lively, drawn):
    again = draw(lively, *FEW, out="again")
    for file in drawn.glob("*.png"):
        assert (again / file.name).read_bytes() == file.read_bytes(), file.name


@pytest.mark.parametrize("size", [1, 3])
def test_sample_is_independent_of_batch_size(size, lively, drawn):
    other = read_pngs(draw(lively, *FEW, f"batch_size={size}", out="batches"))
    assert (other - read_pngs(drawn)).abs().max() <= 1


def test_sample_tile_changes_only_larger_images(lively, drawn):
    assert torch.equal(read_pngs(draw(lively, *FEW, "tile=64", out="one_tile")), read_pngs(drawn))
    tiled = draw(lively, *FEW, "tile=2", out="tiles")
    assert (read_pngs(tiled) != read_pngs(drawn)).any()
    weights = [{json.loads(one["reproduce"])["weights"] for one in said(folder).values()} for folder in (drawn, tiled)]
    assert weights[0] == weights[1]  # `reproduce` finds the same model with and without tiles


def test_sample_on_two_processes_matches_one(smoke, lively, drawn, place):
    job = ("sample.py", f"run={lively}", f"output_dir={place / 'two'}", *FEW)
    done = processes(job, job, cwd=place, LDM_CACHE=str(smoke.folder / "cache"))
    assert not any(one.returncode for one in done), done
    assert (read_pngs(place / "two") - read_pngs(drawn)).abs().max() <= 1
    two, one = (torch.tensor(list(Image.open(f / "grid.png").tobytes())) for f in (place / "two", drawn))
    assert (two - one).abs().max() <= 2
    assert json.loads((place / "two" / "metrics.json").read_text())["request"]["num"] == 10


def test_sample_seed_starts_sequence(lively, drawn):
    later = draw(lively, "num=4", "steps=3", "seed=2", "label=disc", out="later")
    assert sorted(said(later)) == [f"{i:06d}.png" for i in range(2, 6)]
    label = draw(lively, "num=1", "steps=3", "seed=0", "label=0", out="label")
    assert (read_pngs(label)[0] - read_pngs(drawn)[0]).abs().max() <= 1  # image 0 of all classes in turn is class 0


def test_sample_label_by_name_equals_number(lively):
    by_name, by_number = (read_pngs(draw(lively, "num=2", "steps=2", f"label={x}", out=x)) for x in ("ring", "1"))
    assert torch.equal(by_name, by_number)
    assert not torch.equal(by_name, read_pngs(draw(lively, "num=2", "steps=2", "label=square", out="square")))


def test_sample_reads_labels_and_prompts_of_csv(lively, place):
    (place / "some.csv").write_text('label,prompt\nring,"a ring, thin"\n2,a square\n')
    folder = draw(lively, "prompts=some.csv", "num=2", "steps=2", out="csv")
    assert [words["prompt"] for words in said(folder).values()] == ["a ring, thin"] * 2 + ["a square"] * 2
    ring = read_pngs(draw(lively, "num=2", "steps=2", "label=ring", out="ring"))
    assert (read_pngs(folder)[:2] - ring).abs().max() <= 1


def test_sample_reads_prompts_of_text_file(prompted, place):
    (place / "some.txt").write_text("it's a=b\n\n[x], ü!\n", encoding="utf-8")
    folder = draw(prompted, "prompts=some.txt", "num=1", "steps=2", out="txt")
    assert [words["prompt"] for words in said(folder).values()] == ["it's a=b", "[x], ü!"]


def test_sample_scores_images(lively):
    folder = draw(lively, "num=20", "steps=2", "metrics=full", "save=grid", out="scored")
    record = json.loads((folder / "metrics.json").read_text())
    assert {"fd_fashion", "kid_fashion", "precision", "recall", "accuracy"} <= record.keys()
    assert record["n"] == 20
    assert [p.name for p in folder.glob("*.png")] == ["grid.png"]
    assert list(draw(lively, "num=1", "steps=1", "save=none", out="none").glob("*.png")) == []


def test_sample_scores_on_two_processes_match_one(smoke, lively, place):
    typed = (f"run={lively}", "num=20", "steps=2", "metrics=full", "save=none", "batch_size=5")
    one = json.loads((draw(lively, *typed[1:], out="one") / "metrics.json").read_text())
    job = ("sample.py", *typed, f"output_dir={place / 'both'}")
    done = processes(job, job, cwd=place, LDM_CACHE=str(smoke.folder / "cache"))
    assert not any(one.returncode for one in done), done
    both = json.loads((place / "both" / "metrics.json").read_text())
    for name in ("n", "fd_fashion", "accuracy", "precision"):
        assert both[name] == pytest.approx(one[name], rel=1e-4), name


def test_sample_record_reproduces_images(lively, place):
    folder = draw(
        lively,
        "num=3",
        "steps=4",
        "seed=5",
        "sampler=ddim",
        "sampler.eta=0.5",
        "guidance.scale=1.5",
        "label=disc",
        out="first",
    )
    record = json.loads((folder / "metrics.json").read_text())
    assert {"command", "commit", "packages"} <= record["provenance"].keys()
    rest = {"trainer": {"devices": 1}, "save": "all", "output_dir": str(place / "second")}
    rest |= {"medium": None, "vocoder": None}
    serialize.write_config({**record["request"], **rest}, place / "record")
    assert command("sample.py", "--config-path", str(place / "record"), "--config-name", "config") == 0
    for file in folder.glob("*.png"):
        assert (place / "second" / file.name).read_bytes() == file.read_bytes(), file.name


def test_sample_accepts_checkpoint_file_and_raw_weights(smoke):
    step = smoke.run / "checkpoints" / "step-00000002"
    by_step = read_pngs(draw(step, *FEW, out="step"))
    assert torch.equal(by_step, read_pngs(draw(smoke.run, *FEW, out="run")))
    assert torch.equal(read_pngs(draw(smoke.run / "weights.safetensors", *FEW, out="file")), by_step)
    raw, ema = load_weights_dict(step, "raw"), load_weights_dict(step, "ema")
    assert raw.keys() == ema.keys()
    assert any(not torch.equal(raw[name], ema[name]) for name in raw)
    assert len(read_pngs(draw(step, *FEW, "weights=raw", out="raw"))) == 10


def broken(run: Path, place: Path, name: str) -> Path:
    copy = place / name
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(run, copy)
    return copy


MISTAKES = {
    "no such folder": (lambda run: None, "run=nowhere: no such folder"),
    "not a run": (lambda run: (run / "data.json").unlink(), "not a run folder"),
    "weights cut short": (lambda run: cut(run / "weights.safetensors"), r"weights\.safetensors \(500 bytes\)"),
    "first stage cut short": (
        lambda run: cut(run / "first_stage.safetensors"),
        r"first_stage\.safetensors \(500 bytes\)",
    ),
    "no first stage": (lambda run: (run / "first_stage.safetensors").unlink(), "first_stage"),
    "config cut short": (lambda run: (run / "config.yaml").write_text("{x: [1"), "config.yaml"),
    "data card cut short": (lambda run: (run / "data.json").write_text('{"classes": ['), "data.json"),
}


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:500])


@pytest.mark.parametrize("name", MISTAKES)
def test_sample_reports_broken_run_in_one_line(name, smoke, place, capfd):
    damage, expected = MISTAKES[name]
    run = broken(smoke.run, place, "broken")
    damage(run)
    one_line(capfd, expected, "run=nowhere" if name == "no such folder" else f"run={run}")


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (("label=sneaker",), "label=sneaker: expected one of disc"),
        (("label=10",), "label=10: expected"),
        (("num=0",), "num=0: expected 1 or more"),
        (("tile=0",), "tile=0: expected null, or the side of a tile in latent cells"),
        (("save=some",), "save=some: expected all, grid, npz or none"),
        (("prompts=nowhere.txt",), "prompts=nowhere.txt: no such file"),
        (("prompt=a ring", "label=disc"), "prompt and label were given"),
        (("prompt=a ring",), "prompt=a ring: this model has no text condition; expected label="),
        (("weights=best",), "weights=best: expected ema, raw, or ema:0.15"),
        (("precision=16",), "precision=16: expected"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, tuple) else "",
)
def test_sample_reports_error_in_one_line(typed, expected, smoke, capfd):
    one_line(capfd, re.escape(expected), f"run={smoke.run}", *typed)


def one_line(capfd, expected: str, *overrides: str) -> None:
    error = assert_one_line_error(capfd, "", "sample.py", "output_dir=nothing", *overrides)
    assert re.match(rf"error: .*{expected}", error), error
    assert not Path("nothing").exists()
