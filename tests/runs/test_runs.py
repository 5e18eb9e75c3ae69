"""Run folders: names that follow what matters, journals that survive kills and resumes, locks, recipes."""

import json
import subprocess
import sys

import numpy as np
import pytest

from ldm.config.serialize import load_config, save_config
from ldm.errors import UserError
from ldm.runs import identity, provenance
from ldm.runs.folder import lock_run
from ldm.runs.identity import cache_key, config_diff, hash_source, run_id
from ldm.runs.metrics_log import MetricsLog, read_final_metrics, read_metrics_log, write_final_metrics

CONFIG = {"seed": 3, "runs": "runs", "trainer": {"devices": 1}, "net": {"width": 32, "mult": [1, 2]}, "prompt": "x"}


def test_run_id_depends_on_relevant_config_only():
    name = run_id(CONFIG, ("fashion_mnist", "cosine/v"))
    assert name.startswith("fashion_mnist-cosine_v-")
    assert name.endswith("-s3")
    assert len(name.split("-")[2]) == 8
    other = {**CONFIG, "runs": "/elsewhere", "trainer": {"devices": 2}}
    assert run_id(dict(reversed(other.items())), ("fashion_mnist", "cosine/v")) == name
    assert run_id({**CONFIG, "seed": 4}) == run_id(CONFIG).replace("-s3", "-s4")
    assert run_id({**CONFIG, "net": {"width": 33, "mult": [1, 2]}}) != run_id(CONFIG)
    assert run_id(
        {**CONFIG, "net": {"width": 33, "mult": [1, 2]}}, ignore=(*identity.NOT_HASHED, "net.width")
    ) == run_id({**CONFIG, "net": {"mult": [1, 2]}})


def test_config_diff_names_each_key():
    new = {**CONFIG, "seed": 4, "net": {"width": 32, "mult": [1], "deep": True}}
    assert config_diff(CONFIG, new) == ["net.deep: absent -> True", "net.mult: [1, 2] -> [1]", "seed: 3 -> 4"]
    assert config_diff(CONFIG, CONFIG) == []


def test_saved_config_round_trips_and_is_read_by_omegaconf(tmp_path):
    from omegaconf import OmegaConf

    config = {
        "prompts": ["${x}", "\\${y}", "???", "null", "3", "", "ü 🐈", "a: b\nc", "yes", "1e-3"],
        "lr": 1e-5,
        "n": 3,
        "none": None,
        "on": True,
    }
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert OmegaConf.to_container(OmegaConf.load(tmp_path / "config.yaml"), resolve=True) == config


def test_load_config_reports_damage_in_one_line(tmp_path):
    with pytest.raises(UserError, match="is not a run folder"):
        load_config(tmp_path / "config.yaml")
    for text in ("a: [", "- 1", "", "a: !!python/object/apply:os.system ['true']"):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(UserError, match=r"config\.yaml") as caught:
            load_config(tmp_path / "config.yaml")
        assert "\n" not in str(caught.value)


def test_metrics_log_survives_kill_and_resume(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    journal = MetricsLog(path)
    for step in (1, 2, 3, 4):
        journal.write(step, {"loss": step * 1.0})
    journal.write(4, {"val": np.float32(0.5)})
    path.write_text(path.read_text() + '{"step": 5, "lo')  # killed within a line
    again = MetricsLog(path, resume=2)
    again.write(3, {"loss": 30.0})
    again.write(3, {"loss": float("nan"), "skipped": np.int64(1)})
    again.write(3, {"loss": 31.0})
    again.close()
    told = [{key: value for key, value in row.items() if key != "wall"} for row in read_metrics_log(path)]
    assert told == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 2.0},
        {"step": 3, "loss": None, "skipped": 1},
        {"step": 3, "loss": 31.0},
    ]
    assert all(isinstance(row["wall"], float) for row in read_metrics_log(path))
    assert read_metrics_log(tmp_path / "absent") == []


def test_metrics_log_rows_are_durable(tmp_path):
    code = "import os\nfrom ldm.runs.metrics_log import MetricsLog\n"
    code += f"j = MetricsLog({str(tmp_path / 'm')!r})\nj.write(1, dict(a=1))\nos.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code])
    assert [row["a"] for row in read_metrics_log(tmp_path / "m")] == [1]


def test_final_metrics_round_trip(tmp_path):
    assert read_final_metrics(tmp_path) is None
    write_final_metrics(tmp_path, {"fd": np.float64(1.5), "curve": [1, float("inf")], "nested": {"n": 1}})
    assert read_final_metrics(tmp_path) == {"fd": 1.5, "curve": [1, None], "nested": {"n": 1}}


def test_lock_run_refuses_second_process(tmp_path):
    with lock_run(tmp_path / "run"):
        code = f"from ldm.runs.folder import lock_run\nwith lock_run({str(tmp_path / 'run')!r}): print('in')"
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "UserError" in other.stderr
        assert "is in use by process" in other.stderr
        assert other.stdout == ""
    with lock_run(tmp_path / "run"):
        pass


@pytest.fixture
def package(tmp_path, monkeypatch):
    folder = tmp_path / "paper_of_mine"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "loss.py").write_text(
        "import os\nfrom paper_of_mine.inner import helper\n\ndef mine(x): return helper(x)\n"
    )
    (folder / "inner.py").write_text("def helper(x): return x\n")
    (folder / "apart.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def test_cache_key_depends_on_config_and_source(package):
    nodes = {
        "loss": {"_target_": "paper_of_mine.loss.mine", "weight": 1.0},
        "optimizer": {"_target_": "torch.optim.AdamW"},
    }
    first = cache_key(nodes)
    assert first == cache_key(dict(reversed(nodes.items())))
    assert cache_key({**nodes, "seed": 1}).key != first.key
    assert cache_key({**nodes, "seed": 1}).source == first.source
    (package / "apart.py").write_text("x = 1\n")
    assert cache_key(nodes) == first
    (package / "inner.py").write_text("def helper(x): return -x\n")
    assert cache_key(nodes).key == first.key
    assert cache_key(nodes).source != first.source
    assert cache_key(nodes, ["paper_of_mine.apart"]).source != cache_key(nodes).source
    assert "paper_of_mine.loss" not in sys.modules


@pytest.mark.parametrize(
    "line", ["from .inner import helper", "from . import inner", "from ..paper_of_mine import inner"]
)
def test_hash_source_follows_relative_imports(package, line):
    (package / "loss.py").write_text(f"{line}\n")
    first = hash_source(["paper_of_mine.loss.mine"])
    (package / "inner.py").write_text("def helper(x): return -x\n")
    assert (hash_source(["paper_of_mine.loss.mine"]) != first) == (".." not in line)  # which leaves the package


def test_hash_source_follows_imports():
    assert hash_source(["ldm.net.unet.UNet"]) == hash_source(["ldm.net.unet.UNet", "ldm.net.blocks", "torch.nn.Linear"])
    assert hash_source(["ldm.net.unet.UNet"]) != hash_source(["ldm.net.blocks"])
    assert hash_source([]) == hash_source(["torch.optim.AdamW", "os"])


def test_provenance_inside_and_outside_git(tmp_path):
    outside = provenance.provenance(tmp_path)
    assert (outside["commit"], outside["changed"], provenance.git_diff(tmp_path)) == (None, None, "")
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / "f").write_text("1\n")
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["add", "f"], [*who, "commit", "-q", "-m", "one"]):
        subprocess.run(["git", "-C", tmp_path, *words], check=True)
    told = provenance.provenance(tmp_path)
    assert len(told["commit"]) == 40
    assert told["changed"] is False
    (tmp_path / "f").write_text("2\n")
    assert provenance.provenance(tmp_path)["changed"] is True
    assert "+2" in provenance.git_diff(tmp_path)
    assert "torch" in json.loads(json.dumps(told))["packages"]
    provenance.write_provenance(tmp_path / "run", tmp_path)
    assert json.loads((tmp_path / "run" / "provenance.json").read_text())["commit"] == told["commit"]
    assert "+2" in (tmp_path / "run" / "changes.diff").read_text()
    assert any(line.startswith("torch==") for line in (tmp_path / "run" / "environment.txt").read_text().splitlines())


def test_tee_output_records_prints_and_exception(tmp_path, capsys):
    with pytest.raises(KeyError), provenance.tee_output(tmp_path / "log.txt"):  # noqa: PT012
        print("a word")
        print("\rredrawn", end="")
        print("a warning", file=sys.stderr)
        raise KeyError("gone")
    print("outside")
    kept = (tmp_path / "log.txt").read_text()
    assert "a word\na warning\nTraceback" in kept
    assert kept.endswith("KeyError: 'gone'\n")
    assert "redrawn" not in kept
    assert capsys.readouterr().out == "a word\n\rredrawnoutside\n"
    with provenance.tee_output(tmp_path / "log.txt"):
        print("again")
    assert "gone" in (tmp_path / "log.txt").read_text()
