"""training.text_features: the same training in all three places, and what cannot be done is one line."""

import pytest
import torch
from smoke import command, composed, here
from torch import nn
from towers import conditioner_overrides, write_towers

from ldm.conditioner.label import Label
from ldm.conditioner.text import Text
from ldm.data.captions import known_captions
from ldm.data.memory import InMemoryDataset
from ldm.data.stream import length_of
from ldm.data.wrapper import WrappedDataset
from ldm.errors import UserError
from ldm.io import atomic
from ldm.recipes import text_features
from ldm.recipes.text_features import check_text_features, text_features_callbacks
from ldm.runs import metrics_log

MODES = ("memory", "disk", "online")


class Encoder(nn.Module):
    context_dim, vector_dim, length, identity = 4, 2, 16, "encoder"


class Endless:
    """Data without a length."""

    captions = (("a ring",),)

    def all_captions(self):
        raise AssertionError("there is no end of them")


def captioned(texts=(["a disc", "one disc"], ["a disc"], [])):
    images = torch.zeros(3, 1, 4, 4, dtype=torch.uint8)
    return InMemoryDataset("some", images, torch.zeros(3), {"shape": ["a shape"]}, texts=texts)


def test_text_features_option_is_strict_and_not_in_names_of_runs():
    from ldm.runs.identity import run_id

    assert composed("budget=smoke").training.text_features == "memory"
    with pytest.raises(UserError, match=r"^training.text_features.*expects Literal\['memory', 'disk', 'online'\]"):
        composed("budget=smoke", "training.text_features=lazy")
    older, disk = {"training": {"steps": 3}}, {"training": {"steps": 3, "text_features": "disk"}}
    assert run_id(older) == run_id(disk)


def test_known_captions_are_those_of_samples_and_classes_and_the_empty_one():
    assert known_captions(captioned()) == ["", "a disc", "one disc", "a shape"]
    assert known_captions(WrappedDataset(captioned(None))) == ["", "a shape"]
    assert known_captions(Endless()) is None
    assert length_of(Endless()) is None


def test_captions_are_encoded_ahead_if_the_training_reads_as_many():
    conditioner = Text(Encoder(), 16)
    for mode, rows, number in (("memory", 4, 4), ("memory", 3, 0), ("disk", 1, 4), ("online", 9, 0)):
        (callback,) = text_features_callbacks(mode, conditioner, captioned(), rows, "cpu")
        assert len(callback.captions) == number
        assert callback.mode == mode
    assert text_features_callbacks("disk", Label(3, 4), captioned(), 9, "cpu") == []
    (callback,) = text_features_callbacks("memory", conditioner, Endless(), 9, "cpu")
    assert callback.captions == []


def test_text_features_that_cannot_be_had_are_one_line(monkeypatch):
    check_text_features("disk", captioned())
    check_text_features("memory", Endless())
    with pytest.raises(UserError) as error:
        check_text_features("disk", Endless())
    assert str(error.value).startswith("training.text_features=disk: these data do not list their captions")
    needed = 4 * 4 * (16 * 4 + 2)  # bytes of four captions
    monkeypatch.setattr(text_features, "memory_of", lambda device: needed)
    text_features_callbacks("memory", Text(Encoder(), 16), captioned(), 9, "cpu")
    monkeypatch.setattr(text_features, "memory_of", lambda device: needed - 1)
    text_features_callbacks("disk", Text(Encoder(), 16), captioned(), 9, "cpu")
    with pytest.raises(UserError) as error:
        text_features_callbacks("memory", Text(Encoder(), 16), captioned(), 9, "cpu")
    assert str(error.value).startswith("training.text_features=memory: the features of 4 captions take up to 0.0 GiB")
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_training_is_the_same_wherever_the_features_are(smoke, tmp_path):
    """Three steps by command: bit for bit the same in memory and on disk, up to rounding online."""
    losses, weights = {}, {}
    with here(tmp_path, LDM_CACHE=str(smoke.folder / "cache")):
        files = conditioner_overrides("minilm", write_towers(tmp_path / "towers"))
        for mode in MODES:
            words = ("metrics=none", "trainer=cpu", "training.steps=3", "training.batch_size=32", f"runs={mode}")
            typed = ("budget=smoke", "conditioner=minilm", *files, *words, f"training.text_features={mode}")
            assert command("train.py", *typed) == 0
            (run,) = (tmp_path / mode).iterdir()
            rows = metrics_log.read_metrics_log(run / "metrics.jsonl")
            losses[mode] = [row["train/loss"] for row in rows if "train/loss" in row]
            weights[mode] = run.name, atomic.read_tensors(run / "weights.safetensors")
    assert len(losses["memory"]) == 3
    assert losses["disk"] == losses["memory"]
    assert losses["online"] == pytest.approx(losses["memory"], rel=1e-5)
    for name, value in weights["memory"][1].items():
        assert torch.equal(weights["disk"][1][name], value), name
        torch.testing.assert_close(weights["online"][1][name], value, rtol=1e-3, atol=1e-5)
    assert len({name for name, _ in weights.values()}) == 1
    assert list((smoke.folder / "cache" / "text").glob("*/00000.safetensors"))
