"""The commands as a person types them: prompts intact, studies found, mistakes in one line, sweeps of separate
processes.
"""

import json
import os
import re
import runpy
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from ldm.config.overrides import (
    ConfigSearchPath,
    did_you_mean,
    escape,
    explain_override_error,
    normalize_override,
    unescape,
)
from ldm.errors import UserError

SCRIPT = '''
"""Trains nothing.

Examples:
  python train.py schedule=cosine
"""
import json, os, sys
from ldm.config.compose import current_choices; from ldm.cli.main import run_command


def main(cfg):
    from ldm.config.overrides import did_you_mean
    print(json.dumps({"prompt": cfg.prompt, "seed": cfg.seed, "run": cfg.run, "runs": cfg.runs, "net": cfg.net.width,
                      "pid": os.getpid(), "choices": current_choices(), "torch": "torch" in sys.modules},
                      ensure_ascii=True))
    if cfg.fail == "bug":
        raise RuntimeError("a bug")
    if cfg.fail == "contract":
        from ldm.io.parse import check_plain_data
        check_plain_data(object())
    if cfg.fail == "config":
        from hydra.utils import instantiate
        instantiate({"ema": {"_target_": "ldm.ema.std_to_exponent", "sigma_rel": 3.0}})
    if cfg.fail == "user":
        from ldm.errors import UserError
        raise UserError("mend\\nthis")
    if cfg.fail == "file":
        raise FileNotFoundError("no weights: put them there")
    if cfg.fail == "interrupt":
        raise KeyboardInterrupt
    if cfg.fail == "preempt":
        sys.exit(85)
    return cfg.seed * 1.5


if __name__ == "__main__":
    run_command(main, "train", text=("prompt",), paths=("run",))
'''

FILES = {
    "conf/train.yaml": """
        defaults:
          - _self_
          - schedule: linear
          - net: unet
          - experiments: null
        prompt: ""  # what to draw
        run: null
        runs: runs
        seed: 0  # of everything
        fail: none
        trainer: {devices: 1, precision: auto}
        """,
    "conf/schedule/linear.yaml": "beta: 1.0",
    "conf/schedule/cosine.yaml": "s: 0.008",
    "conf/net/unet.yaml": "{width: 32, channel_mult: [1, 2], lr: 1.0e-3}",
    "conf/net/nan.yaml": "{width: 1, channel_mult: [1, 2], lr: 1.0e-3}",
    "experiments/noise/sweep.yaml": """
        # @package _global_
        defaults:
          - override /schedule: cosine
        seed: 3
        """,
    "experiments/noise/long.yaml": """
        # @package _global_
        hydra: {mode: MULTIRUN, sweeper: {params: {seed: "4,5"}}}
        """,
    "runs/some/config.yaml": "x: 1",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("a root, with=odd name")
    for name, text in {**FILES, "train.py": SCRIPT}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(textwrap.dedent(text).lstrip())
    return root


def typed(root, *arguments, cwd=None, **env):
    """The command in a process of its own, which must leave nothing on the disk."""
    before = sorted(root.rglob("*"))
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("HYDRA", "LDM"))}
    words = [sys.executable, str(root / "train.py"), *arguments]
    done = subprocess.run(words, cwd=cwd or root, env={**clean, **env}, capture_output=True, text=True, timeout=600)
    assert [path for path in sorted(root.rglob("*")) if path not in before] == []
    return done


@pytest.fixture
def here(root, capsys, monkeypatch):
    """The command in this process, for speed: (exit code, stdout, stderr) of what is typed."""

    def call(*arguments):
        before = sorted(root.rglob("*"))
        monkeypatch.chdir(root)
        monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
        monkeypatch.setattr(sys, "argv", [str(root / "train.py"), *arguments])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(root / "train.py"), run_name="__main__")
        said = capsys.readouterr()
        assert [path for path in sorted(root.rglob("*")) if path not in before] == []
        return subprocess.CompletedProcess(arguments, end.value.code or 0, said.out, said.err)

    return call


def rows(done):
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


PROMPTS = [
    *(
        "a photo of a sneaker",
        "the cat's hat",
        'a "quoted" word',
        "both ' and \"",
        "a boot, brown, old",
        "a=b",
        "x=1, y=[2]",
        "[brackets]",
    ),
    *(
        "{braces}",
        "(round)",
        "f(x)",
        "$HOME",
        "${x}",
        "${",
        "\\${x}",
        "\\\\${oc.env:HOME}",
        "wow!",
        "this & that",
        "a; b",
        "a\\b",
        "ends in \\",
    ),
    *(
        "ends in \\'",
        "\\",
        "'",
        '"',
        "''",
        "grün, süß",
        "日本",
        "a 🐈 emoji",
        "3",
        "3.5e-4",
        "null",
        "None",
        "true",
        "",
        " leading and trailing ",
    ),
    *(
        "two\nlines",
        "tab\there",
        "a:b",
        "C:\\new\\table",
        "50% off @ #1 ~ ^ * ? | < > `",
        "-dash",
        "+plus",
        "~tilde",
        "choice(a,b)",
        "range(3)",
    ),
    *("???", "word " * 300),
]


@pytest.fixture(scope="module")
def tree(root):
    return ConfigSearchPath((root / "conf",), root)


def test_prompt_is_passed_unchanged(root, tree):
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    keys = [f"prompt{place}" for place in range(len(PROMPTS))]
    quoted = [
        normalize_override(f"{key}={prompt}", tree, keys, (), False) for key, prompt in zip(keys, PROMPTS, strict=True)
    ]
    with initialize_config_dir(str(root / "conf"), version_base="1.3"):
        cfg = compose("train", [f"+{override}" for override in quoted])
    assert [cfg[key] for key in keys] == PROMPTS
    resolved = OmegaConf.to_container(cfg, resolve=True)
    assert [resolved[key] for key in keys] == PROMPTS


@pytest.mark.parametrize("prompt", ["ü 🐈, the cat's \n${x} \\${y} a=b\\"])
def test_prompt_is_passed_unchanged_through_command_and_sweep(root, prompt):
    assert rows(typed(root, f"prompt={prompt}"))[0]["prompt"] == prompt
    swept = typed(root, "-m", f"prompt={prompt}", "seed=1,2")
    assert [row["prompt"] for row in rows(swept)] == [prompt, prompt], swept.stderr


def test_unescape_inverts_escape():
    for prompt in PROMPTS:
        assert unescape(escape(prompt)) == prompt


def test_path_is_text_and_null_is_null(here, tree):
    assert normalize_override("run=runs/a=1,b", tree, (), ("run",), False) == "run='runs/a=1,b'"
    assert normalize_override("run=null", tree, (), ("run",), False) == "run=null"
    row = rows(here("run=runs/a=1,b 'c'", "runs=/elsewhere"))[
        0
    ]  # `runs` is also a folder beside the script, and no group
    assert (row["run"], row["runs"]) == ("runs/a=1,b 'c'", "/elsewhere")


def test_option_named_nan_is_accepted(here):
    assert rows(here("net=nan"))[0]["net"] == 1


def test_study_is_available_from_any_folder(root, here, tmp_path):
    row = rows(typed(root, "experiment=noise", cwd=tmp_path))[0]
    assert row["seed"] == 3
    assert row["choices"] == {"schedule": "cosine", "net": "unet", "experiments": "noise/sweep"}
    assert list(tmp_path.iterdir()) == []
    assert [row["seed"] for row in rows(typed(root, "experiment=noise/long", cwd=tmp_path))] == [4, 5]


MISTAKES = {
    ("sed=3",): "sed=3: no key 'sed'; did you mean 'seed'?",
    ("net.widht=3",): "net.widht=3: no key 'net.widht'; did you mean 'net.width'?",
    ("width=3",): "width=3: no key 'width'; did you mean 'net.width'?",
    ("schedul=cosine",): "schedul=cosine: no key 'schedul'; did you mean 'schedule'?",
    ("schedule=cosin",): "schedule=cosin: no such option; did you mean 'cosine'? (one of cosine, linear)",
    ("-m", "schedule=linear,cosin", "seed=0,1"): "schedule=cosin: no such option; did you mean 'cosine'?",
    ("schedule=3",): "schedule=3: schedule is a choice between configs, not a value (one of cosine, linear)",
    ("schedule=cosine", "schedule.beta=1"): "schedule.beta=1: no key 'schedule.beta'",
    ("experiment=nois",): "did you mean 'noise'? (one of noise, noise/long)",
    ("experiments=noise",): "experiments is the folder; type experiment=noise",
    ("experiment=noise", "sed=3"): "did you mean 'seed'?",
    ("+extra=1",): "+extra=1: the command line cannot add keys, nothing would read them; write extra=1",
    ("~seeed",): "seeed: no key 'seeed'; did you mean 'seed'?",
    ("seed=0,1",): "seed=0,1 is a sweep over several values: add -m, or quote the value",
    ("net.width=a b'",): 'cannot read "net.width=a b\'"',
    ("cosine",): "'cosine' is not key=value (see --help)",
    ("--mulitrun",): "unrecognized arguments: --mulitrun (see --help)",
    ("seed=1.5",): "seed=1.5: expected a whole number, as in seed=0",
    ("seed=abc",): "seed=abc: expected a whole number, as in seed=0",
    ("net.channel_mult=3",): "net.channel_mult=3: expected a list, as in net.channel_mult=[1,2]",
    ("-m", "seed=1,x"): "seed=x: expected a whole number",
    ("--config-dir", "/nowhere"): "--config-dir /nowhere: no such folder",
    ("--config-path", "/nowhere", "--config-name", "config"): "no config config.yaml in /nowhere",
    ("fail=user",): "mend this",
    ("fail=file",): "no weights: put them there",
    ("fail=config",): "sigma_rel=3.0: expected a fraction of the training above 0 and below 0.28 (in ema)",
    ("--cfg", "job", "sed=3"): "did you mean 'seed'?",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_error_is_one_line_with_exit_code_2(here, words):
    done = here(*words)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert MISTAKES[words] in done.stderr


@pytest.mark.parametrize("words", [("net.widht=3",), ("fail=user",)])
def test_error_in_subprocess_is_one_line_with_exit_code_2(root, words):
    done = typed(root, *words)
    assert (done.returncode, done.stderr.startswith("error: "), done.stderr.count("\n")) == (2, True, 1)
    assert MISTAKES[words] in done.stderr


def test_torch_is_not_imported_before_task(root):
    assert rows(typed(root))[0]["torch"] is False


def test_bug_preserves_traceback(root):
    done = typed(root, "fail=bug")
    assert (done.returncode, "Traceback" in done.stderr, "RuntimeError: a bug" in done.stderr) == (1, True, True)


def test_contract_error_preserves_traceback(here):
    done = here("fail=contract")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ValueError: holds object, expected text, numbers, lists and mappings" in done.stderr


def test_interrupt_and_preemption_have_exit_codes(here):
    assert here("fail=interrupt").returncode == 130
    assert here("fail=preempt").returncode == 85


def test_failed_job_does_not_stop_sweep(here):
    done = here("-m", "fail=bug,none", "seed=1")
    assert done.returncode == 1
    bad, good = (re.split("  +", line.strip()) for line in done.stdout.splitlines() if line.startswith("  fail"))
    assert (*bad[:2], bad[-1]) == ("fail=bug seed=1", "failed (1)", "RuntimeError: a bug")
    assert good[:3] == ["fail=none seed=1", "done", "1.5"]
    assert "1 of 2 jobs done, 1 failed" in done.stdout


def test_preempted_job_ends_sweep(here):
    done = here("-m", "fail=preempt,none")
    assert (done.returncode, done.stdout.count("\njob ")) == (85, 1)


def test_help_lists_options_and_examples(root):
    shown = typed(root, "--help").stdout
    for line in (
        "python train.py schedule=cosine",
        "schedule         linear  cosine",
        "noise/long",
        "what to draw",
        "seed=0",
    ):
        assert line in shown


def test_cfg_flag_prints_config(here):
    shown = here("--cfg", "job", "schedule=cosine", "seed=4")
    assert "s: 0.008" in shown.stdout
    assert "seed: 4" in shown.stdout


def test_config_dir_adds_user_options(here, tmp_path):
    (tmp_path / "schedule").mkdir()
    (tmp_path / "schedule" / "mine.yaml").write_text("gamma: 2.0")
    assert (
        rows(here("--config-dir", str(tmp_path), "schedule=mine", "schedule.gamma=3"))[0]["choices"]["schedule"]
        == "mine"
    )


def test_flags_may_come_after_overrides(here, tmp_path):
    (tmp_path / "schedule").mkdir()
    (tmp_path / "schedule/mine.yaml").write_text("gamma: 2.0")
    (row,) = rows(here("net=unet", "--config-dir", str(tmp_path), "schedule=mine", "seed=5"))
    assert (row["choices"]["schedule"], row["seed"]) == ("mine", 5)
    assert here("seed=3,4", "-m", "net=unet").returncode == 0
    assert "--wrong" in here("seed=3", "--wrong", "net=unet").stderr


def test_user_errors_are_distinguished_from_bugs():
    import torch

    from ldm.cli.errors import describe_overflow, user_error_message
    from ldm.ema import std_to_exponent
    from ldm.io.atomic import write_tensors
    from ldm.tensors import KeyedNoise

    def caught(call):
        try:
            call()
        except Exception as error:
            return error

    assert user_error_message(caught(lambda: write_tensors("/nowhere", {"w": torch.tensor(float("nan"))}))).startswith(
        "/nowhere w: 1 of 1 values"
    )
    assert user_error_message(caught(lambda: int("x"))) is None
    assert (
        user_error_message(caught(lambda: KeyedNoise(0, [0]).normal("eps", torch.zeros(2)))) is None
    )  # a wrong call of our own function
    assert user_error_message(caught(lambda: std_to_exponent(3.0))).startswith("sigma_rel=3.0: expected")
    assert describe_overflow(caught(lambda: torch.empty(10**40))) == "a number is too large"
    assert describe_overflow(caught(lambda: torch.empty(2**60))) == "too large for this machine's memory"
    assert describe_overflow(ValueError("x")) is None
    assert (
        user_error_message(caught(lambda: normalize_override("x", None, (), (), False)))
        == "'x' is not key=value (see --help)"
    )
    assert user_error_message(caught(lambda: Path("/nowhere").read_text())) is not None
    assert user_error_message(caught(lambda: (_ for _ in ()).throw(OSError(28, "No space left on device")))) is not None


def test_did_you_mean_suggests_close_match():
    assert did_you_mean("cosin", ["cosine", "linear"]) == "; did you mean 'cosine'?"
    assert did_you_mean("zzz", ["cosine", "linear"]) == ""


def test_explain_override_error_preserves_reason(tree):
    assert (
        explain_override_error(ValueError("why\nnot"), ["seed=1"], tree, lambda overrides: {"seed": 0}, False)
        == "why not"
    )
    with pytest.raises(UserError, match="not key=value"):
        normalize_override("seed", tree, (), (), False)
