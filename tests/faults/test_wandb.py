"""Weights & Biases without a key or a network: a sweep's jobs are runs of one group, and all of each is in its file."""

import json
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from smoke import ROOT
from test_input_logs import of_home

BLOCK, HEADER = (
    32768,
    struct.Struct("<IHB"),
)  # LevelDB's log: checksum, length, and whether whole, first, middle or last


def records(path: Path) -> Iterator[object]:
    """What a .wandb file holds: protobuf messages in LevelDB's log format behind seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = path.read_bytes()
    assert data.startswith(b":W&B")
    at, parts = 7, b""
    while at + HEADER.size <= len(data):
        left = BLOCK - at % BLOCK
        if left < HEADER.size:
            at += left
            continue
        _, length, kind = HEADER.unpack_from(data, at)
        parts += data[at + HEADER.size : at + HEADER.size + length]
        at += HEADER.size + length
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def nested(items: Iterable) -> dict:
    """Values by their keys, which may be several, one within the other."""
    found: dict = {}
    for item in items:
        place, keys = found, list(item.nested_key) or [item.key]
        for key in keys[:-1]:
            place = place.setdefault(key, {})
        place[keys[-1]] = json.loads(item.value_json)
    return found


def read(path: Path) -> dict:
    """A run: its group, id and tags, its config, the rows of its history, its summary and its exit code."""
    found: dict = {"history": [], "config": {}, "summary": {}}
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found |= {"group": record.run.run_group, "id": record.run.run_id, "tags": list(record.run.tags)}
            found["config"] |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "history":
            found["history"].append(nested(record.history.item))
        elif kind == "summary":
            found["summary"] |= nested(record.summary.update)
        elif kind == "exit":
            found["exit"] = record.exit.exit_code
    return found


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
