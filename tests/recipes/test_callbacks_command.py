"""Callbacks as commands: what can be typed, names of runs, what is written and stored, kills and two processes."""

import shutil
import signal
import sys
from functools import partial

import pytest
from omegaconf import OmegaConf
from smoke import command, composed, here, plan_of, processes

from ldm.config import serialize
from ldm.config.build import to_container
from ldm.config.trust import sanitize_config
from ldm.errors import UserError
from ldm.recipes.resume import differing_keys
from ldm.report.browse import read_run
from ldm.report.compare import format_comparison
from ldm.runs import cache, identity
from ldm.runs.metrics_log import read_metrics_log

PACKAGE = """
import lightning as L
import torch

class Trace(L.Callback):
    def __init__(self, factor: float = 1.0):
        self.factor, self.steps, self.total = factor, [], 0.0

    def state_dict(self):
        return {"steps": self.steps, "total": self.total}

    def load_state_dict(self, state):
        self.steps, self.total = state["steps"], state["total"]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps.append((batch["step"], trainer.global_step))
        self.total += float(outputs["loss"])
        pl_module.log("train/trace", self.factor * self.total)

    def on_train_start(self, trainer, pl_module):
        with open(f"{trainer.log_dir}/started.txt", "a") as file:
            file.write(f"{len(self.steps)} ")

class Ranks(L.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        rank = float(trainer.global_rank)
        pl_module.log("train/rank", rank + 5)
        pl_module.log("train/mean_rank", rank + 5, sync_dist=True)
        trainer.logger.log_metrics({"train/direct": rank + 5})
"""
TRACE = "callbacks.trace._target_=traced.Trace"
SMOKE = ("train.py", "budget=smoke", "metrics=none", "training.steps=4", "training.sample_every=100")


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The folder of a user's package `traced`, importable, and a folder of options for it."""
    folder = tmp_path_factory.mktemp("package")
    (folder / "traced").mkdir()
    (folder / "traced" / "__init__.py").write_text(PACKAGE)
    (folder / "conf" / "callbacks").mkdir(parents=True)
    for name in ("first", "second"):
        text = f"# A callback\n{name}:\n  _target_: traced.Trace\n  factor: 2.0\n"
        (folder / "conf" / "callbacks" / f"{name}.yaml").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield folder


def add_path(folder: str, rank: int) -> None:
    """Let a process of `processes` import the package."""
    sys.path.insert(0, folder)


def configs(*typed: str) -> list[dict]:
    """Return the node `callbacks` of each job of a command line, after the strict check."""
    return [OmegaConf.to_container(one.callbacks) for one in plan_of(*typed).check()]


def test_callbacks_are_added_and_taken_out_on_the_command_line(package):
    node = {"_target_": "traced.Trace"}
    assert configs("budget=smoke") == [{}]
    assert configs(TRACE, "callbacks.trace.factor=3.0") == [{"trace": {**node, "factor": 3.0}}]
    assert configs(TRACE, "callbacks.two._target_=traced.Trace", "~callbacks.trace") == [{"two": node}]
    assert configs(TRACE, "callbacks.trace=null") == [{"trace": None}]
    swept = configs("-m", TRACE, "callbacks.trace.factor=1.0,2.0")
    assert swept == [{"trace": {**node, "factor": factor}} for factor in (1.0, 2.0)]


@pytest.mark.parametrize(
    ("typed", "text"),
    [
        ((TRACE, "callbacks.trace.facto=1.0"), "callbacks.trace.facto=1.0: traced.Trace takes no 'facto'; did you"),
        ((TRACE, "callbacks.trace.factor=a"), "callbacks.trace.factor=a: traced.Trace expects float"),
        ((TRACE, "callbacks.tace.factor=1.0"), "callbacks.tace={...}: a callback needs its _target_, as in"),
        ((TRACE, "callbacks.tace.factor=1.0"), "did you mean 'trace'?"),
        (("callbacks.trace=3",), "callbacks.trace=3: a callback needs its _target_"),
        ((f"+{TRACE}",), f"the command line cannot add keys, nothing would read them; write {TRACE}"),
    ],
)
def test_misspelt_callbacks_are_refused_by_the_strict_check(package, typed, text):
    with pytest.raises(UserError) as error:
        plan_of(*typed).check()
    assert text in str(error.value)
    assert "\n" not in str(error.value)


def test_empty_callbacks_are_no_part_of_a_runs_name(package):
    config, traced = to_container(composed("budget=smoke")), to_container(composed("budget=smoke", TRACE))
    older = {key: value for key, value in config.items() if key != "callbacks"}
    assert config["callbacks"] == {}
    assert identity.run_id(config) == identity.run_id(older) != identity.run_id(traced)
    assert differing_keys(older, config, None) == []
    assert differing_keys(config, traced, None) == ["callbacks: absent -> {'trace': {'_target_': 'traced.Trace'}}"]


def test_first_stage_and_evaluator_trained_on_the_way_have_no_callbacks(package):
    plain, traced = composed("budget=smoke"), composed("budget=smoke", TRACE)
    for entry in (cache.first_stage_entry, cache.evaluator_entry):
        assert entry(traced).folder == entry(plain).folder
        assert entry(traced).config["callbacks"] == {}
    alone = [composed("budget=smoke", "training=autoencoder", "~training.score", *more) for more in ((), (TRACE,))]
    assert cache.first_stage_dir(alone[0]) != cache.first_stage_dir(alone[1])
    alone = [
        composed("budget=smoke", "training=evaluator", "~training.score", "~training.sample_every", *more)
        for more in ((), (TRACE,))
    ]
    assert cache.evaluator_dir(alone[0]) != cache.evaluator_dir(alone[1])


def test_stored_config_is_built_without_its_callbacks():
    config = to_container(composed("budget=smoke")) | {"callbacks": {"gone": {"_target_": "not_installed.Callback"}}}
    assert "callbacks" not in sanitize_config(config, "run")


@pytest.mark.parametrize(
    ("target", "text"),
    [
        ("traced.Trac", "callbacks.trace._target_=traced.Trac: traced has no 'Trac'; did you mean 'Trace'?"),
        ("torch.nn.Identity", "callbacks.trace._target_=torch.nn.Identity gives Identity: expected a subclass of"),
    ],
)
def test_what_is_no_callback_is_refused_before_training(package, target, text, tmp_path, capsys):
    with here(tmp_path):
        assert command(*SMOKE, f"callbacks.trace._target_={target}") == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith(f"error: {text}")
        assert not (tmp_path / "runs").exists()
        assert not (tmp_path / "cache").exists()


def rows_of(run) -> list[dict]:
    """Return the numbers of a run's callbacks."""
    names = ("step", "train/trace", "train/rank", "train/mean_rank", "train/direct")
    rows = [{key: row[key] for key in names if key in row} for row in read_metrics_log(run / "metrics.jsonl")]
    return [row for row in rows if len(row) > 1]


JOB = (*SMOKE, TRACE, "training.save_every=2", "training.log_every=1", "trainer=cpu", "trainer.precision='64'")


@pytest.fixture(scope="module")
def whole(package, smoke, tmp_path_factory):
    """A run with a callback that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    shutil.copytree(smoke.kept, folder / "cache")
    job = (*JOB, "trainer.accumulate_grad_batches=2")
    (done,) = processes(job, cwd=folder, harm=partial(add_path, str(package)))
    assert done.returncode == 0, done.stdout
    (run,) = (folder / "runs").iterdir()
    return run


@pytest.mark.slow
def test_killed_and_resumed_run_has_numbers_of_callbacks_of_one_never_killed(whole, package, smoke, tmp_path):
    shutil.copytree(smoke.kept, tmp_path / "cache")
    job = (*JOB, "trainer.accumulate_grad_batches=2")
    run = partial(processes, job, cwd=tmp_path, harm=partial(add_path, str(package)))
    assert run(kill_at=3, kill=signal.SIGKILL)[0].returncode == -signal.SIGKILL
    (done,) = run()
    assert done.returncode == 0, done.stdout
    assert "resuming from step 2 " in done.stdout
    (folder,) = (tmp_path / "runs").iterdir()
    assert [row["step"] for row in rows_of(whole)] == [1, 2, 3, 4]
    assert rows_of(folder) == rows_of(whole)
    assert (folder / "started.txt").read_text() == "0 4 ", "two batches to a step"


@pytest.mark.slow
def test_run_with_callbacks_is_compared_and_sampled_without_their_package(whole, smoke, tmp_path):
    assert serialize.load_config(whole / "config.yaml")["callbacks"] == {"trace": {"_target_": "traced.Trace"}}
    assert "train/trace" in format_comparison([read_run(whole), read_run(whole)])
    (done,) = processes(
        ("sample.py", f"run={whole}", "num=2", "steps=1", f"output_dir={tmp_path / 'drawn'}"), cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("training", ["autoencoder", "evaluator", "classifier"])
def test_every_training_has_the_callbacks(training, package, smoke, tmp_path):
    shutil.copytree(smoke.kept, tmp_path / "cache")
    extra = ("~training.score",) if training == "autoencoder" else ("~training.score", "~training.sample_every")
    typed = ("train.py", "budget=smoke", f"training={training}", *extra, TRACE, "trainer=cpu", "logger=tensorboard")
    known = set((tmp_path / "cache").glob("*/*"))
    with here(tmp_path):
        assert command(*typed) == 0
    (run,) = {*(tmp_path / "cache").glob("*/*/started.txt"), *tmp_path.glob("runs/*/started.txt")}
    assert run.parent not in known
    assert [row["step"] for row in rows_of(run.parent)] == [1, 2]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.parent / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/trace")] == [1, 2]


@pytest.mark.slow
def test_two_processes_write_number_of_the_first_or_the_mean(package, smoke, tmp_path):
    shutil.copytree(smoke.kept, tmp_path / "cache")
    typed = (*SMOKE, "callbacks.ranks._target_=traced.Ranks", "trainer=ddp", "trainer.accelerator=cpu")
    done = processes(*[(*typed, "trainer.precision='32'")] * 2, cwd=tmp_path, harm=partial(add_path, str(package)))
    assert not any(one.returncode for one in done), done
    (run,) = (tmp_path / "runs").iterdir()
    rows = rows_of(run)
    assert [row for row in rows if "train/direct" in row] == [{"step": n, "train/direct": 5.0} for n in (1, 2, 3, 4)]
    logged = [row for row in rows if "train/rank" in row]
    assert logged == [{"step": n, "train/rank": 5.0, "train/mean_rank": 5.5} for n in (1, 2, 3, 4)]
