"""The page of runs: one file that asks no network, escapes all it is told, and lists what is broken with the reason."""

import json
import re
from base64 import b64encode
from html.parser import HTMLParser

import pytest
import torch
from tiny_media import chain_molecule, grey_clip, row_sound

from ldm.cli.errors import run_guarded
from ldm.errors import UserError
from ldm.io import images
from ldm.report.browse import config_differences, find_runs, main, metric_curves, read_run, render_page
from ldm.report.html import chart, decades, ticks

EVIL = "<script>alert('x')</script>&\"><img src=x onerror=alert(1)>"


def make(folder, loss=0.5, lr=0.002, fd=3.5, finished=True, **config):
    (folder / "grids").mkdir(parents=True)
    nodes = {"seed": 0, "runs": str(folder), "net": {"channels": 48}, "optimizer": {"lr": lr}, **config}
    (folder / "config.yaml").write_text(json.dumps(nodes))
    (folder / "choices.json").write_text(json.dumps({"schedule": "cosine"}))
    rows = [{"step": step, "wall": 1e9, "train/loss": loss / step, "train/lr": lr} for step in (1, 2, 3, 4)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step in (2, 4):
        images.save_png(folder / "grids" / f"step-{step}.png", torch.full((1, 4, 4), step, dtype=torch.uint8))
    if finished:
        (folder / "metrics.json").write_text(json.dumps({"n": 20, "fd_fashion": fd, "baseline/test/fd": 0.2}))
    return folder


class Parsed(HTMLParser):
    """Every tag with its attributes, the text of each tag's kind, and that tags are closed in order."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self.open = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "input", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    def all(self, tag, **wanted):
        return [attrs for name, attrs in self.tags if name == tag and all(attrs.get(k) == v for k, v in wanted.items())]


def test_page_contains_curves_grids_table_and_differences(tmp_path):
    runs = [read_run(make(tmp_path / "a")), read_run(make(tmp_path / "b", loss=0.7, lr=0.004, fd=4.25))]
    parsed = Parsed(render_page(runs))
    said = "".join(parsed.words)
    assert [attrs["data-run"] for attrs in parsed.all("polyline")] == ["0", "1", "0", "1"]  # loss, lr
    assert len(parsed.all("input", type="range", max="1")) == 2
    assert [("hidden" in attrs, attrs["alt"]) for attrs in parsed.all("img")] == [
        (True, "step-2"),
        (False, "step-4"),
    ] * 2
    assert {attrs["data-value"] for attrs in parsed.all("td") if "data-value" in attrs} >= {"3.5", "4.25", "20", "4"}
    assert "optimizer.lr" in said
    assert "net.channels" not in said  # the same in both
    assert len(parsed.all("td", **{"class": "other"})) == 1
    assert "Broken" not in said


def test_page_needs_no_network(tmp_path):
    text = render_page([read_run(make(tmp_path / "a"))])
    assert "http://" not in text
    assert "https://" not in text
    assert not re.search(r"(@import|url\(|fetch\(|XMLHttpRequest|<link|<iframe|srcset)", text)
    for tag, attrs in Parsed(text).tags:
        for name in ("src", "href", "action", "data", "xlink:href"):
            assert attrs.get(name, "data:").startswith("data:image/png;base64,") or attrs.get(name) is None, (
                tag,
                attrs,
            )
    assert "default-src 'none'" in text


def play(folder, step="step-4"):
    """Add the files of a clip, a sound and a molecule that a training writes beside its grids."""
    sample = torch.linspace(-1, 1, 1024).reshape(1, 32, 32)
    for i, medium in enumerate((grey_clip, row_sound, chain_molecule)):
        medium.write(folder / "players" / step / f"00{i}", sample, {"rate": "8"})
    return folder


def test_page_embeds_sounds_clips_and_molecules_of_the_last_grid(tmp_path):
    run = play(play(make(tmp_path / "a"), "step-2"), "step-4")
    page = render_page([read_run(run)])
    found = Parsed(page)
    for tag, file, kind in (("video", "000.mp4", "video/mp4"), ("audio", "001.wav", "audio/wav")):
        (player,) = found.all(tag)  # of the last step only
        data = b64encode((run / "players" / "step-4" / file).read_bytes()).decode()
        assert player["src"] == f"data:{kind};base64,{data}"
    assert "CCCCCCO 002" in found.words
    assert len(found.all("img")) == 2 + 3  # two grids, three pictures of samples
    assert "media-src data:" in page
    play(run, "samples")
    (run / "players" / "samples" / "001.wav").unlink()
    assert not Parsed(render_page([read_run(run)])).all("audio")  # the final samples come after every step


def test_page_escapes_text_of_runs(tmp_path):
    evil = make(tmp_path / "<b>'&\"x", name=EVIL, prompt=EVIL, **{EVIL.replace(".", ""): 1})
    (evil / "metrics.json").write_text(json.dumps({EVIL: 1.5}))
    with open(evil / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps({"step": step, EVIL: step}) + "\n" for step in (5, 6))
    images.save_png(evil / "grids" / "a<b>.png", torch.zeros(1, 4, 4, dtype=torch.uint8))
    (evil / "samples.png").write_text(EVIL)
    text = render_page([read_run(evil), read_run(make(tmp_path / "b"))])
    parsed = Parsed(text)
    assert len(parsed.all("script")) == 1
    assert not [attrs for _, attrs in parsed.tags if "onerror" in attrs]
    assert not parsed.all("img", src="x")
    assert not parsed.all("b")
    assert text.count("alert(") == text.count("alert(&#x27;x&#x27;)") + text.count("alert(1)&gt;")


def test_page_lists_broken_runs_with_reason(tmp_path):
    make(tmp_path / "whole")
    make(tmp_path / "running", finished=False)
    torn = make(tmp_path / "torn")
    (torn / "config.yaml").write_text("a: [1")
    (torn / "metrics.json").write_text('{"n": 2')
    (torn / "choices.json").write_text("[]")
    (torn / "grids" / "step-4.png").write_bytes((torn / "grids" / "step-4.png").read_bytes()[:-9])
    (torn / "metrics.jsonl").write_bytes(b'{"step": 1, "train/loss": 0.5}\n{"step": 2, "train/loss": 0.4}\n{"ste\xff')
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").write_text("")
    faults = {folder.name: " | ".join(read_run(folder).problems) for folder in find_runs([str(tmp_path)])}
    assert list(faults) == ["empty", "running", "torn", "whole"]
    assert faults["whole"] == ""
    assert faults["running"] == "metrics.json: missing, the run has not finished"
    for said in (
        "config.yaml cannot be read",
        "metrics.json: ",
        "choices.json: holds list, expected dict",
        "step-4.png: not a complete PNG",
    ):
        assert said in faults["torn"]
    assert "metrics.jsonl: no row yet" in faults["empty"]
    assert "config.yaml is not there" in faults["empty"]
    text = render_page([read_run(folder) for folder in find_runs([str(tmp_path)])])
    assert "Broken or not finished" in text
    assert "cannot be read" in text
    Parsed(text)


def test_metric_curves_are_thinned_with_ends():
    rows = [
        {"step": i, "wall": 0, "loss": 1 / (i + 1), "none": None, "flag": True, "bad": float("nan")}
        for i in range(1000)
    ]
    (name,) = line = metric_curves(rows, 50)
    assert name == "loss"
    assert len(line["loss"]) == 50
    assert line["loss"][0] == (0, 1.0)
    assert line["loss"][-1] == (999, 0.001)


def test_chart_axes_point_up_and_right():
    text = chart("x", {0: [(0, 1.0), (5, 3.0), (10, 2.0)]}, ["a"])
    points = [tuple(map(float, pair.split(","))) for pair in re.search(r'points="([^"]+)"', text)[1].split()]
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x0 < x1 < x2
    assert y1 < y2 < y0
    for line in ([(3, 0.0), (4, 0.0)], [(3, 2.0), (3, 2.0)], [(0, 1e-9), (1, 1e9)], [(0, -5.0), (1, 5.0)]):
        assert "nan" not in chart("x", {0: line}, ["a"])


def test_ticks_are_round_and_inside():
    assert ticks(0.03, 1.02) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(0, 2100, 6) == pytest.approx([0, 500, 1000, 1500, 2000])
    assert ticks(1.0, 1.0) == [1.0]
    assert decades(-0.5, 0.8) == pytest.approx([0.5, 1, 2, 5])
    assert decades(-4.2, 0.1) == pytest.approx([1e-4, 1e-3, 1e-2, 0.1, 1])


def test_config_differences_list_differing_keys_only(tmp_path):
    a, b = read_run(make(tmp_path / "a", seed=1, extra=3)), read_run(make(tmp_path / "b", seed=2))
    assert dict(config_differences([a, b])) == {"seed": [1, 2], "extra": [3, "absent"]}


def test_browse_command_writes_one_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "runs" / "a")
    assert main(["runs", "out=page.html", "points=3"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("page.html: 1 run, ")
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    assert {entry.name for entry in tmp_path.iterdir()} == {"runs", "page.html"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "which runs?"),
        (["nowhere"], "nowhere: no such folder"),
        (["."], ".: no run in it"),
        ([".", "uot=a.html"], "uot=a.html: no key 'uot'; did you mean 'out'?"),
        ([".", "points=1"], "points=1: expected a whole number, 2 or more"),
        ([".", "points=many"], "points=many: expected"),
    ],
)
def test_browse_reports_error_in_one_line(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_guarded(lambda: main(words)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {said}")


def test_find_runs_skips_runs_inside_runs(tmp_path):
    make(make(tmp_path / "a") / "samples" / "x")
    assert [folder.name for folder in find_runs([str(tmp_path), str(tmp_path / "a")])] == ["a"]
    with pytest.raises(UserError):
        find_runs([str(tmp_path / "a" / "grids")])
