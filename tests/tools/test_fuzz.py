"""A small slice of tests/tools/fuzz.py, and that it would notice what it looks for."""

import random
import time
from collections import Counter
from pathlib import Path

import fuzz
import pytest
from smoke import here

SEED = 100


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_CACHE", str(tmp_path / "cache"))


def test_fuzzed_overrides_pass_or_fail_in_one_line(tmp_path):
    tally = fuzz.Tally(Counter(), [])
    with here(tmp_path):
        fuzz.fuzz_overrides(fuzz.overrides(6, SEED), tmp_path, tally)
    assert tally.broken == []
    assert tally.counts.total() == 6


def test_fuzzed_files_are_read_or_reported(smoke, lively, tmp_path):
    tally = fuzz.Tally(Counter(), [])
    with here(tmp_path):
        every = fuzz.cases(lively, fuzz.checkpoint_of(lively, tmp_path / "whole.safetensors"))
        fuzz.fuzz_files(every, 20, SEED, tmp_path, tally)
    assert tally.broken == []
    assert tally.counts.total() == 20
    assert {end for _, end in tally.counts} == {"done", "refused"}


def test_fuzz_detects_crashes_and_leftover_files(tmp_path):
    def left() -> int:
        (tmp_path / "runs" / "a").mkdir(parents=True)
        (tmp_path / "runs" / "a" / "metrics.json").write_text("{")
        return 0

    def bug(path: Path) -> None:
        raise KeyError("x")

    assert fuzz.outcome(lambda: fuzz.as_command(bug, tmp_path), tmp_path).kind == "traceback"
    assert fuzz.outcome(lambda: 2, tmp_path).kind == "refused"
    assert fuzz.outcome(left, tmp_path).kind == "left"
    with pytest.raises(fuzz.Hang), fuzz.limited(idle=1):
        time.sleep(30)


def test_fuzz_damage_is_reproducible():
    data = bytes(range(256)) * 4
    changed = [fuzz.damage(data, random.Random(number)) for number in range(40)]
    assert changed == [fuzz.damage(data, random.Random(number)) for number in range(40)]
    assert sum(one != data for one in changed) > 30
