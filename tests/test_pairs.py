"""Each pair of options of trainer, data, launcher, logger and precision against the simplest reference."""

import csv
import json
import os
import re
import sqlite3
import subprocess
import sys
from contextlib import closing

import pytest
import sources
import torch
import wandb_file
from filelock import FileLock
from smoke import ROOT, composed, plan_of
from worlds import rank_variables, train_all

import ldm.config.search_path  # noqa: F401  makes experiments/ a group
from ldm.config import build, serialize
from ldm.config.compose import Composition, compose_option, resolved_config
from ldm.config.overrides import ConfigSearchPath
from ldm.data.stream import BatchDataset, BatchStream
from ldm.devices import PRECISION, rank_and_world_size
from ldm.io import atomic
from ldm.runs.metrics_log import read_metrics_log

sys.path.insert(0, str(ROOT / "experiments" / "engines"))
import option_pairs

TRAINED = [case for case in (*option_pairs.SINGLE, *option_pairs.PARALLEL) if case not in option_pairs.REFERENCES]
SIZES = ("budget=smoke", "autoencoder=identity", "metrics=none", "conditioner=label", "training.batch_size=4")
SIZES += ("training.score.guidance_scales=[1.0]", "training.lr_schedule.warmup=1")
LAUNCHERS = {  # overrides of each, with which it runs jobs here
    "basic": (),
    "joblib": ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2"),
    "gpus": ("hydra/launcher=gpus", "hydra.launcher.n_jobs=2"),
    "submitit_local": ("hydra/launcher=submitit_local",),
    "optuna": ("hydra/sweeper=optuna", "hydra/sweeper/sampler=grid", "hydra.sweeper.n_jobs=1"),
}


def test_table_has_a_row_for_each_pair_of_conf():
    with option_pairs.TABLE.open() as file:
        assert list(csv.DictReader(file)) == option_pairs.rows(), "run python experiments/engines/option_pairs.py"


def test_table_has_every_launcher_and_precision():
    from hydra.core.config_store import ConfigStore
    from hydra.core.plugins import Plugins

    Plugins.instance()  # registers the options of those that are installed
    listed = [name for kind in ("launcher", "sweeper") for name in ConfigStore.instance().list(f"hydra/{kind}")]
    names = {name.removesuffix(".yaml") for name in listed if name.endswith(".yaml")}
    assert set(option_pairs.AXES["launcher"]) == names | set(option_pairs.options("hydra/launcher"))
    assert set(option_pairs.AXES["precision"]) == {"auto", *PRECISION}
    assert set(LAUNCHERS) == {*option_pairs.AXES["launcher"]} - {"submitit_slurm"}


def test_table_names_tests_that_exist():
    ids = {case.id for case in TRAINED} | set(LAUNCHERS) | set(option_pairs.AXES["data"])
    for row in option_pairs.rows():
        assert row["test"] or (row["reference"].startswith("needs ") and row["before"] == "no"), row
        if row["test"]:
            path, name, case = re.fullmatch(r"(.*)::(\w+)(?:\[(.*)\])?", row["test"]).groups()
            assert f"def {name}(" in (ROOT / path).read_text(), row
            assert case is None or case in ids, row


def test_cover_has_each_pair_that_a_cpu_can_run():
    covered = {pair for case in (*option_pairs.SINGLE, *option_pairs.PARALLEL) for pair in case.pairs}
    possible = {
        pair for case in option_pairs.product(option_pairs.WORLDS, option_pairs.AXES["data"]) for pair in case.pairs
    }
    shared = {(("trainer", t), ("data", d)) for t in ("ddp", "fsdp", "slurm") for d in option_pairs.AXES["data"]}
    assert possible - covered <= shared
    for axis in option_pairs.Case._fields:
        assert {getattr(job, axis) for job in option_pairs.JOBS} == set(option_pairs.AXES[axis])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Each data set on the disk, by its option."""
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("pairs")
        patch.setenv("LDM_CACHE", str(root / "cache"))
        patch.setenv("LDM_OFFLINE", "1")
        data = sources.make_all(root / "data")
        assert set(data) == set(option_pairs.AXES["data"])
        sources.replace_downloads(root / "data", patch.setattr)
        yield root, data


def assert_equal_batches(one, other, keys):
    for key in keys:
        same = torch.equal(one[key], other[key]) if isinstance(one[key], torch.Tensor) else one[key] == other[key]
        assert same, key


@pytest.mark.parametrize("kind", option_pairs.AXES["data"])
def test_data_equal_arrays_in_files(kind, made):
    """Images, labels, captions and flips of seven epochs are those of the arrays that were written, bit for bit."""
    source = made[1][kind]
    data = build.build_dataset(composed(*source.overrides, "data.flip=true"), "train")
    expected = source.in_memory()
    assert (len(data), data.classes, data.captions) == (len(expected), expected.classes, expected.captions)
    assert len(set(expected.images.flatten(1).float().mean(1).tolist())) == len(expected) or kind == "synthetic"
    for part in BatchStream(len(expected), 10, 7 * len(expected) // 10):
        one, other = BatchDataset(data)[part], BatchDataset(expected)[part]
        assert_equal_batches(one, other, other)


@pytest.mark.parametrize("kind", option_pairs.AXES["data"])
def test_ranks_share_batches_of_one_process(kind, made, monkeypatch):
    """Two processes of torchrun or of Slurm have the samples of one between them, in its order."""
    data = build.build_dataset(composed(*made[1][kind].overrides, "data.flip=true"), "train")
    make = getattr(data, "stream", None) or (lambda *options: BatchStream(len(data), *options))
    whole = [BatchDataset(data)[part] for part in make(4, 9, 0, 0, 0, 1)]
    for launcher in ("torchrun", "slurm"):
        ranks = []
        for rank in range(2):
            with monkeypatch.context() as patch:
                for name in ("RANK", "WORLD_SIZE", "SLURM_NTASKS", "SLURM_PROCID"):
                    patch.delenv(name, raising=False)
                for name, value in rank_variables(launcher, rank, 2).items():
                    patch.setenv(name, value)
                ranks.append([BatchDataset(data)[part] for part in make(4, 9, 0, 0, *rank_and_world_size())])
        for batch, *parts in zip(whole, *ranks, strict=True):
            for key, value in batch.items():
                if isinstance(value, torch.Tensor):
                    assert torch.equal(torch.cat([part[key] for part in parts]), value), key
                elif isinstance(value, list):
                    assert [one for part in parts for one in part[key]] == value, key
                else:
                    assert all(part[key] == value for part in parts), key


def write_configs(cases, made, root):
    """Write the config of each case as its command composes it, with runs of its own."""
    from omegaconf import OmegaConf, open_dict

    groups = ("trainer", "logger")
    nodes = {(group, name): compose_option(group, name) for group in groups for name in option_pairs.AXES[group]}
    for data in option_pairs.AXES["data"]:
        plan = plan_of(*SIZES, *made[data].overrides)
        full = plan.compose(plan.overrides)
        choices = {key: value for key, value in full.hydra.runtime.choices.items() if value and "hydra" not in key}
        for case in (case for case in cases if case.data == data):
            config = OmegaConf.masked_copy(full, [key for key in full if key != "hydra"])
            with open_dict(config):
                for group in groups:
                    config[group] = nodes[group, getattr(case, group)].copy()
            config.trainer.precision, config.runs = case.precision, str(root / "runs" / case.id)
            folder = root / "configs" / case.id
            folder.mkdir(parents=True)
            OmegaConf.save(config, folder / "config.yaml")
            (folder / "choices.json").write_text(
                json.dumps(choices | {g: getattr(case, g) for g in ("trainer", "logger")})
            )


@pytest.fixture(scope="module")
def trained(request, tmp_path_factory, worker_id):
    """The folder of the trainings that are compared, all by one test process, and what those that failed printed."""
    base = tmp_path_factory.getbasetemp()
    root = (base if worker_id == "master" else base.parent) / "trainings_of_pairs"
    with FileLock(f"{root}.lock"):
        if not (root / "failed.json").is_file():
            for name in ("printed", "codes"):
                (root / name).mkdir(parents=True)
            tests = [
                item for item in request.session.items if item.originalname == test_training_equals_reference.__name__
            ]
            chosen = [item.callspec.params["case"] for item in tests]
            cases = list(dict.fromkeys([*map(option_pairs.reference, chosen), *chosen]))
            write_configs(cases, sources.make_all(root / "data"), root)
            failed = {}
            for launcher, trainers in (("", ("auto", "cpu")), ("torchrun", ("ddp", "fsdp")), ("slurm", ("slurm",))):
                names = [case.id for case in cases if case.trainer in trainers]
                failed |= train_all(names, root, launcher, option_pairs.WORLDS[trainers[0]]) if names else {}
            (root / "failed.json").write_text(json.dumps(failed))
    return root, json.loads((root / "failed.json").read_text())


def outcome(root, case):
    """The run folder of a case, its rows of losses, and its averaged weights."""
    (folder,) = (root / "runs" / case.id).iterdir()
    rows = [row for row in read_metrics_log(folder / "metrics.jsonl") if "train/loss" in row]
    return folder, rows, atomic.read_tensors(folder / "weights.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("case", TRAINED, ids=lambda case: case.id)
def test_training_equals_reference(case, trained):
    """Losses and weights are those of one process: bit for bit if it is one with this precision, else to rounding."""
    root, failed = trained
    for one in (case, option_pairs.reference(case)):
        assert one.id not in failed, failed[one.id]
    folder, rows, weights = outcome(root, case)
    _, expected, weights_expected = outcome(root, option_pairs.reference(case))
    precision, same = case.precision, case.precision == option_pairs.reference(case).precision
    rounding = option_pairs.BOUNDS["32" if precision == "64" and not same else precision]
    bound = 0.0 if same and case in option_pairs.SINGLE else rounding
    assert [row["step"] for row in rows] == [row["step"] for row in expected] == [1, 2]
    for row, other in zip(rows, expected, strict=True):
        names = {name for name in row if name.startswith("train/")}
        assert names == {name for name in other if name.startswith("train/")}
        for name in names:
            assert abs(row[name] - other[name]) <= bound * max(abs(other[name]), 1e-3), (name, row[name], other[name])
    if not same:  # the first output is zero in any precision, as the last layer of a network is
        assert rows[1]["train/loss"] != expected[1]["train/loss"], f"{precision} is not what was computed in"
    assert weights.keys() == weights_expected.keys()
    if same and case in option_pairs.SINGLE:
        assert all(torch.equal(value, weights_expected[name]) for name, value in weights.items())
    assert_logger_has_what_the_run_folder_has(case.logger, folder)


def assert_logger_has_what_the_run_folder_has(logger, folder):
    """Every number of metrics.jsonl at its step, in float32 in TensorBoard; the images; the final scores."""
    rows = [row for row in read_metrics_log(folder / "metrics.jsonl") if "step" in row]
    expected = {(name, row["step"]): row[name] for row in rows for name in row if "/" in name}
    assert expected
    if logger == "trackio":
        with closing(sqlite3.connect(folder.parents[2] / "trackio" / "ldm.db")) as database:
            (run,) = (
                run
                for run, config in database.execute("SELECT run_id, config FROM configs")
                if json.loads(config)["runs"] == str(folder.parent)
            )
            query = "SELECT step, metrics FROM metrics WHERE run_id = ?"
            logged = [(step, json.loads(values)) for step, values in database.execute(query, (run,))]
        found = {(name, step): value for step, row in logged for name, value in row.items()}
        assert {key: value for key, value in found.items() if "/" in key[0] and isinstance(value, float)} == expected
        assert {"grids/step-000002", "samples"} <= {name for name, _ in found}
    elif logger == "none":
        assert not [path for path in folder.iterdir() if path.name in ("wandb", "tensorboard")]
    elif logger == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(folder / "tensorboard"))
        events.Reload()
        tags = events.Tags()
        found = {(name, one.step): one.value for name in tags["scalars"] for one in events.Scalars(name)}
        assert found == {key: torch.tensor(value).float().item() for key, value in expected.items()}
        assert sorted(tags["images"]) == ["grids/step-000002", "samples"]
    else:
        (file,) = folder.glob("wandb/offline-run-*/*.wandb")
        run = wandb_file.read(file)
        found = {(k, row["_step"]): v for row in run["history"] for k, v in row.items() if isinstance(v, int | float)}
        assert {key: value for key, value in found.items() if "/" in key[0]} == expected
        assert {"grids/step-000002", "samples"} <= {key for row in run["history"] for key in row}
        assert (run["id"], run["exit"]) == (folder.name, 0)
        assert run["summary"]["seconds"] == json.loads((folder / "metrics.json").read_text())["seconds"]


# A command whose jobs record what they are started with.  A launcher's own processes get the class by its code.
RECORD = """
import json, os
from pathlib import Path
from ldm.cli import sweep
from ldm.cli.main import run_command
from ldm.config.compose import Composition
from ldm.launch import process

OUT = Path(__file__).parent / "jobs"


class Recorded(sweep.SweepJob):
    def _run_subprocess(self, cfg, devices):
        def record(script, folder, devices, env):
            config = [(Path(folder) / name).read_text() for name in ("config.yaml", "choices.json")]
            facts = {"devices": devices, "environ": dict(os.environ), "env": dict(env)}
            (OUT / f"{cfg.seed}.json").write_text(json.dumps([*config, facts]))
            Path(env["LDM_RESULT"]).write_text(json.dumps({"result": cfg.seed}))
            return 0

        process.run_in_subprocess = record
        return super()._run_subprocess(cfg, devices)


if __name__ == "__main__":
    sweep.SweepJob = Recorded
    Composition.check = lambda self: self.job_overrides() and []  # composed, and not built
    run_command(lambda cfg: None, "train")
"""
SMI = "#!/bin/sh\nprintf '0, GPU-aa, 3\\n1, GPU-bb, 0\\n'\n"


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launcher_starts_jobs_of_plain_command(launcher, tmp_path):
    """Each job has the config, the choices, the processes and the variables that it has without a sweep."""
    (tmp_path / "conf").symlink_to(ROOT / "conf")
    (tmp_path / "train.py").write_text(RECORD)
    (tmp_path / "nvidia-smi").write_text(SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    (tmp_path / "jobs").mkdir()
    for i, job in enumerate(option_pairs.JOBS):
        chosen = job._asdict()
        precision = chosen.pop("precision")
        lines = ["# @package _global_", "defaults:", *(f"  - override /{key}: {chosen[key]}" for key in chosen)]
        lines += [f"seed: {i}", f"trainer: {{precision: {precision}}}"]
        lines += ["data: {path: files}"] if "path: ???" in (ROOT / f"conf/data/{job.data}.yaml").read_text() else []
        (tmp_path / "experiments" / f"job{i}").mkdir(parents=True)
        (tmp_path / "experiments" / f"job{i}" / "sweep.yaml").write_text("\n".join(lines))
    names = [f"job{i}" for i in range(len(option_pairs.JOBS))]
    words = ["-m", f"experiment={','.join(names)}", *LAUNCHERS[launcher], "name=pairs"]
    words += [f"hydra.sweeper.n_trials={len(names)}"] if launcher == "optuna" else []
    env = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "TMPDIR": str(tmp_path)}
    line = [sys.executable, str(tmp_path / "train.py"), *words]
    done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(names)} of {len(names)} jobs done" in done.stdout
    tree = ConfigSearchPath((tmp_path / "conf",), tmp_path)
    for i, name in enumerate(names):
        text, choices, facts = json.loads((tmp_path / "jobs" / f"{i}.json").read_text())
        plain = Composition(tree, "train", False, [f"experiments={name}/sweep", "name=pairs"])
        config = plain.compose(plain.overrides)
        serialize.save_config(resolved_config(config), tmp_path / "plain.yaml")
        assert text == (tmp_path / "plain.yaml").read_text()
        expected = {k: v for k, v in config.hydra.runtime.choices.items() if v is not None and "hydra/" not in k}
        assert json.loads(choices) == expected
        assert facts["devices"] == config.trainer.devices
        assert facts["env"].pop("LDM_SWEEP") == "pairs"
        assert set(facts["env"]) == {"LDM_RESULT", *(["CUDA_VISIBLE_DEVICES"] if launcher == "gpus" else [])}
        # joblib shares the cores out among its workers, by variables that are not set
        typed = {key: value for key, value in env.items() if key.startswith(("LDM_", "WANDB_", "OMP_"))}
        assert facts["environ"] == {**facts["environ"], **typed}
