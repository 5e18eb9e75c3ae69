"""The benchmarks of experiments/speed start, and what they compare is the same network."""

import csv
import itertools
import json
import subprocess
import sys
from functools import partial

import pytest
import torch
from smoke import ROOT

SPEED = ROOT / "experiments" / "speed"


@pytest.fixture
def speed(monkeypatch):
    monkeypatch.syspath_prepend(str(SPEED))


@torch.inference_mode()
def test_speed_compares_same_network(speed):
    import first_stage
    import sampling
    from built import told, unet, vae

    made, given = unet("tiny", 8), told("tiny", 8, 2)
    ours = sampling.ours_once(sampling.guided(sampling.denoiser_of(made), given), given)
    theirs = sampling.theirs_once(made.theirs, given)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))
    stages, z = vae("tiny"), torch.randn(1, 4, 4, 4)
    torch.testing.assert_close(
        first_stage.decode(stages.ours, z), first_stage.decode(stages.theirs, z), rtol=1e-4, atol=1e-4
    )


@pytest.mark.slow
@torch.inference_mode()
def test_speed_compares_same_dit(speed):
    import sampling
    from built import drawing

    made, given = drawing("tiny DiT", 8, 2)
    x, t = torch.cat([given.x, given.x]), torch.full((4,), 500.0)
    theirs = made.theirs(x, t, given.context).sample
    assert (made.ours(x, t, given.both)[:, :4] - theirs).abs().max() <= 1e-4
    assert (
        made.ours(x, t, given.both.index([2, 3, 0, 1]))[:, :4] - theirs
    ).abs().max() > 0.1  # with the classes changed about
    for row in (sampling.Asked(), sampling.Asked(sampling.STEPS)):
        a, b = (call() for call in sampling.calls(row, made, given, "cpu"))
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_speed_ratios_are_paired_and_rows_replaced(speed, monkeypatch, tmp_path):
    import pairs

    monkeypatch.setattr(pairs, "TABLE", tmp_path / "results.csv")
    work = pairs.Work("a", "b", "c", flops=4e9)
    for peer in (3.0, 4.0):
        pairs.keep(pairs.told(work, 1, [1.0, 2.0, 4.0], [peer, peer, peer], "yes", peak=8e9))
    (row,) = csv.DictReader((tmp_path / "results.csv").open())
    assert (row["ratio"], row["low"], row["high"]) == ("2", "1", "4")
    assert (row["ours_ms"], row["theirs_ms"], row["ours_share"], row["theirs_share"]) == (
        "2000",
        "4000",
        "0.25",
        "0.125",
    )


def test_speed_row_has_unit_and_gpu_utilization(speed):
    import measure
    import pairs

    work = pairs.Work("a", "b", "c")
    memory = pairs.told(work, 1, [90.0], [100.0], "", unit="mib")
    assert (memory["ours_mib"], memory["theirs_mib"], memory["ratio"]) == (90.0, 100.0, 1.111)
    gpu = pairs.told(work, 1, [0.5], [1.0], "", images_per_s=8.0, gib=1.5, theirs_gib=2.0)
    as_read = [{name: str(value) for name, value in row.items()} for row in (memory, gpu)]
    assert measure.cells(as_read[0])[4:6] == ["90.0 MiB", "100.0 MiB"]
    assert measure.cells({**as_read[1], "ours_mib": ""})[4:6] == ["500.0 ms", "1000.0 ms"]
    assert measure.cells(as_read[1])[-1] == "8.0 images/s; 1.5, 2.0 GiB"


def test_speed_expectations_name_rows_of_commands(speed):
    import measure
    import sampling
    import training

    made = []
    for name, size, images in measure.SAMPLED["cuda"]:
        made += [("sampling", row, sampling.setting(name, size, images)) for row in sampling.asked(size, "cuda")]
    for name, size in measure.TRAINED["cuda"]:
        made += [("training", row, sampling.setting(name, size, training.BATCH)) for row in training.asked("cuda")]
    told = json.loads((SPEED / "expected.json").read_text())
    command = "python experiments/speed/measure.py {} device=cuda"
    assert [(row["command"], row["what"], row["setting"], row["peer"]) for row in told["rows"]] == [
        (command.format(part), row.what, setting, row.peer) for part, row, setting in made
    ]
    for row in told["rows"]:
        assert row["state"] == "not run"
        assert row["ratio_at_least"] >= 1
        assert (row["images_per_s"], row["mfu"], row["gib"]) == (None, None, None)
    for _, rows in itertools.groupby(made, key=lambda one: (one[0], one[2])):  # networks are compiled where they are
        compiled = [bool(row.compiled) for _, row, _ in rows]
        assert compiled == sorted(compiled)
        assert any(compiled)


def test_speed_gpu_peak_includes_weights(speed, monkeypatch):
    import sampling

    gib = 2**30
    for name, answer in {
        "synchronize": None,
        "reset_peak_memory_stats": None,
        "memory_allocated": gib,
        "max_memory_allocated": 3 * gib,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda answer=answer: answer)
    net, halved = (
        torch.nn.Linear(2**13, 2**13, bias=False, dtype=dtype, device="meta")
        for dtype in (torch.float32, torch.bfloat16)
    )
    calls: list[str] = []
    told = sampling.on_gpu(4.0, (partial(calls.append, "ours"), net), (partial(calls.append, "theirs"), halved), held=4)
    assert calls == ["ours", "theirs"]
    assert told == {
        "images_per_s": 4.0,
        "gib": 3.0,
        "theirs_gib": 2.5,
    }  # a quarter of a GiB four times, or half of that, and two more


def test_exponent_fits_power_law(speed):
    import curves

    xs = [2.0, 8.0, 32.0]
    assert curves.exponent(xs, [5 * x**1.5 for x in xs]) == pytest.approx(1.5)


@pytest.mark.slow
def test_speed_gpu_rows_compile_on_cpu(speed, monkeypatch, tmp_path):
    import pairs
    import sampling

    def compiled(net: torch.nn.Module, **_: object) -> None:
        net._compiled_call_impl = torch.compile(net._call_impl, backend="eager", fullgraph=True)

    asked = sampling.asked
    monkeypatch.setattr(pairs, "TABLE", tmp_path / "results.csv")
    monkeypatch.setattr(sampling, "STEPS", 4)
    monkeypatch.setattr(sampling, "asked", lambda size, device, compiled: asked(size, "cuda"))
    monkeypatch.setattr("ldm.net.inference.pack_copy", lambda net, dtype: net)  # as on a GPU, where nothing is packed
    monkeypatch.setattr(torch.nn.Module, "compile", compiled)
    sampling.measure("tiny DiT", 8, 2, 1, 1)
    found = {
        (row["what"], row["peer"].split(", ", 1)[1]): row["equal"].split()[0]
        for row in csv.DictReader(pairs.TABLE.open())
    }
    assert list(found) == [(row.what, row.peer.split(", ", 1)[1]) for row in asked(8, "cuda")]
    assert all(float(equal) <= (0.1 if "bf16" in what else 1e-4) for (what, _), equal in found.items()), found


@pytest.mark.slow
def test_every_benchmark_starts(tmp_path):
    parts = ("sampling", "training", "latents", "processes", "memory", "first_stage", "data", "distance", "curves")
    done = subprocess.run(
        [sys.executable, str(SPEED / "measure.py"), *parts, "smoke=true", "pairs=1"], cwd=tmp_path, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    found = list(csv.DictReader((tmp_path / "speed.csv").open()))
    assert len(found) >= 24
    whats = {row["what"] for row in found}
    assert {
        "guided evaluation",
        "training step",
        "training step, latents=online",
        "training step, latents=online, crops and colours",
        "decode",
        "packed folder",
        "Frechet distance",
        "mean and covariance",
    } <= whats
    assert "tiny DiT, 8x8 latents, 4 images" in {row["setting"] for row in found}
    (memory,) = (row for row in found if row["what"] == "peak memory of a training step")
    assert float(memory["ours_mib"]) > 0
    assert float(memory["theirs_mib"]) > 0
    assert len(list(csv.DictReader((tmp_path / "curves.csv").open()))) == 5
