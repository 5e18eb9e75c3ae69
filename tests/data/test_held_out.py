"""The quickstart's prompts say what no training caption says."""

import csv
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

from ldm.data.fashion_mnist import CAPTIONS
from ldm.data.memory import read_captions

FOLDER = Path(__file__).parents[2] / "experiments" / "quickstart"
FILES = {
    "prompts.csv": 2,
    "prompts_more.csv": 4,
    "prompts_dev.csv": 2,
}  # a class; the captions were made with the last in view
STOP = frozenset(re.findall("[a-z]+", "a an and at by for from in is it its my of off on or that the to with you your"))
ENDINGS = ("s", "es", "ed", "d", "er", "ers", "ing", "y", "ly")


def stems(word: str) -> set[str]:
    """The word and what is left of it without a plural's, a verb's or an adjective's ending: runner, runners, running
    -> run.
    """
    out = {word, re.sub("ies$", "y", word)} | {word.removesuffix(e) for e in ENDINGS if len(word) - len(e) > 2}
    return out | {s[:-1] for s in out if len(s) > 3 and (s[-1] == s[-2] or s[-1] == "e")}


def shared(prompt: str, captions: Iterable[str]) -> set[str]:
    """The content words of a prompt that the captions have too, in whatever form."""
    known = {s for text in captions for word in re.findall(r"[a-z0-9]+", text.lower()) for s in stems(word)}
    return {word for word in re.findall(r"[a-z0-9]+", prompt.lower()) if word not in STOP and stems(word) & known}


def prompts(name: str) -> list[dict]:
    with (FOLDER / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def captions() -> list[str]:
    return [text for texts in read_captions(CAPTIONS).values() for text in texts]


@pytest.mark.parametrize("name", FILES)
def test_held_out_prompts_are_balanced_over_classes(name):
    assert Counter(row["label"] for row in prompts(name)) == dict.fromkeys(read_captions(CAPTIONS), FILES[name])
    assert len({row["prompt"].lower() for row in prompts(name)}) == 10 * FILES[name]


@pytest.mark.parametrize("name", FILES)
def test_held_out_prompts_share_no_content_word_with_training_captions(name):
    texts = captions()
    assert {row["prompt"]: words for row in prompts(name) if (words := shared(row["prompt"], texts))} == {}


@pytest.mark.parametrize(
    ("added", "prompt", "word"),
    [
        ("a small purse", "purse", "purse"),
        ("Purses.", "purse", "purse"),
        ("a shoe", "tennis shoes", "shoes"),
        ("a sneaker for runners", "running shoe", "running"),
        ("a walk on the beaches", "beach shoes", "beach"),
        ("warmer", "warm jumper", "warm"),
        ("for a hike", "tough hiking shoes", "hiking"),
    ],
)
def test_held_out_check_detects_shared_word(added, prompt, word):
    assert prompt in {row["prompt"] for row in prompts("prompts_dev.csv")}
    assert shared(prompt, [*captions(), added]) == {word}


def test_captions_are_many_short_and_without_colours():
    texts = captions()
    assert all(len(some) >= 40 for some in read_captions(CAPTIONS).values())
    assert max(len(text.split()) for text in texts) <= 16
    colours = {
        "red",
        "blue",
        "green",
        "yellow",
        "brown",
        "pink",
        "purple",
        "orange",
        "beige",
        "navy",
        "golden",
        "silver",
    }
    assert not colours & {word for text in texts for word in re.findall("[a-z]+", text.lower())}
