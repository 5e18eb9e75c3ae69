"""Weights & Biases without a key or a network: a sweep's jobs are runs of one group, and all of each is in its file."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
from smoke import ROOT
from test_input_logs import of_home
from wandb_file import read


@pytest.mark.slow
def test_wandb_jobs_of_sweep_share_a_group(smoke, tmp_path):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "LDM"))}
    home = tmp_path / "home"
    home.mkdir()
    env = {
        **kept,
        "HOME": str(home),
        "NETRC": str(home / "none"),
        "LDM_CACHE": str(shutil.copytree(smoke.kept, tmp_path / "cache")),
    }
    words = (
        "-m",
        "budget=smoke",
        "logger=wandb",
        "logger.tags=[mine]",
        "seed=0,1",
        "schedule=linear,cosine",
        "name=study",
    )
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *words],
        cwd=tmp_path,
        env={**env, "OMP_NUM_THREADS": "1", "LDM_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr
    runs = {}
    for folder in (tmp_path / "runs").iterdir():
        (file,) = folder.glob("wandb/offline-run-*/*.wandb")
        runs[folder.name] = read(file)
        run, metrics = runs[folder.name], json.loads((folder / "metrics.json").read_text())
        assert (run["id"], run["group"], run["tags"], run["exit"]) == (folder.name, "study", ["mine"], 0)
        assert run["config"]["net"]["channels"] > 0
        losses = [row["train/loss"] for row in run["history"] if "train/loss" in row]
        journal = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert losses == pytest.approx([row["train/loss"] for row in journal if "train/loss" in row])
        pictures = [
            value
            for row in run["history"]
            for value in row.values()
            if isinstance(value, dict) and value.get("_type") == "image-file"
        ]
        assert pictures
        assert all((file.parent / "files" / one["path"]).read_bytes().startswith(b"\x89PNG") for one in pictures)
        (table,) = (row["scores"] for row in run["history"] if "scores" in row)
        shown = json.loads((file.parent / "files" / table["path"]).read_text())
        assert dict(zip(shown["columns"], shown["data"][0], strict=True))["fd_fashion"] == pytest.approx(
            metrics["fd_fashion"]
        )
        assert run["summary"]["fd_fashion"] == pytest.approx(metrics["fd_fashion"])
    assert len(runs) == 4
    chosen = {(run["config"]["choice"]["schedule"], run["config"]["seed"]) for run in runs.values()}
    assert chosen == {(schedule, seed) for schedule in ("linear", "cosine") for seed in (0, 1)}
    for _ in range(3000):  # its service may take a moment to end
        if not (left := of_home(home)):
            break
        time.sleep(0.2)
    assert left == []
