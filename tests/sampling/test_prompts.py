"""Twenty awkward prompts reach the text conditioner as they were typed."""

import json
from pathlib import Path

import pytest
from PIL import Image
from smoke import ROOT, command, here, process

PROMPTS = [
    "it's a boot",
    "a shirt, a bag, a dress",
    "a=b",
    "[a, b]",
    "{x: 1}",
    "(a shoe) (really)",
    "wow! a bag!",
    "über schöne Stiefel",
    "a 👟 on 🧱",
    "3",
    "-1.5e3",
    "null",
    "true",
    " ".join(["a very long description of one ordinary boot that goes on"] * 25 + ["and", "on"] * 25),
    'she said "hello" \\ and left',
    "${oc.env:HOME} ${seed}",
    "???",
    "  blanks before and after  ",
    "semi;colon & ampersand | pipe > file # hash",
    "two\nlines and a\ttab",
    "choice(a,b)",
    "",
    "prompt=prompt",
    "'quoted'",
    "中文 и русский",
]


def told(place: Path) -> list[str]:
    return [json.loads(line) for line in place.read_text(encoding="utf-8").splitlines()]


def test_prompts_are_twenty_with_a_long_one():
    assert len(PROMPTS) >= 20
    assert max(len(prompt.split()) for prompt in PROMPTS) >= 300


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda p: repr(p[:24]))
def test_prompt_reaches_conditioner_unchanged(prompt, prompted, tmp_path):
    with here(tmp_path, LDM_SPY=str(tmp_path / "told.jsonl")):
        assert command("sample.py", f"run={prompted}", f"prompt={prompt}", "num=2", "steps=1", "output_dir=drawn") == 0
    assert told(tmp_path / "told.jsonl") == [prompt, prompt]
    assert Image.open(tmp_path / "drawn" / "000000.png").text["prompt"] == prompt
    assert json.loads((tmp_path / "drawn" / "metrics.json").read_text())["request"]["prompt"] == prompt


@pytest.mark.slow
def test_prompt_reaches_conditioner_unchanged_in_subprocess(prompted, tmp_path):
    prompt = "".join(PROMPTS[:9])
    env = {"PYTHONPATH": str(ROOT / "tests"), "LDM_SPY": str(tmp_path / "told.jsonl")}
    done = process("sample.py", f"run={prompted}", f"prompt={prompt}", "num=1", "steps=1", cwd=tmp_path, **env)
    assert done.returncode == 0, done.stderr
    assert told(tmp_path / "told.jsonl") == [prompt]
