"""Which file the weights of a run are read from, and averages of any length from its snapshots."""

import pytest
import torch
from torch import nn

from ldm.checkpoint.adapters import copy_parameters
from ldm.checkpoint.state import load_trainable, trainable_parameters
from ldm.checkpoint.step import save_checkpoint
from ldm.checkpoint.weights import load_weights, posthoc_ema
from ldm.ema import posthoc_coefficients
from ldm.errors import UserError
from ldm.io import atomic


@pytest.fixture
def run(tmp_path):
    """A run with two steps: w is 10 step, its average 1 more."""
    (tmp_path / "config.yaml").write_text("{}")
    for step in (1, 2):
        raw, ema = torch.tensor(10.0 * step), torch.tensor(10.0 * step + 1)
        tensors = {"model": {"model.w": raw, "objective.w": torch.zeros(())}, "ema": {"w": ema}}
        save_checkpoint(tmp_path / "checkpoints", step, tensors, {}, metadata={"from": str(step)})
    return tmp_path


def test_load_weights_prefers_final_average_then_newest_step(run):
    def w(path, kind="ema"):
        (value,) = load_weights(path, run, kind).tensors.values()
        return value

    final, step = run / "weights.safetensors", run / "checkpoints" / "step-00000001"
    assert (w(run), w(run, "raw")) == (21, 20)
    atomic.write_tensors(final, {"w": torch.tensor(7.0)})
    assert (w(run), w(run, "raw")) == (7, 20)
    assert w(run / "config.yaml") == w(final) == w(final, "raw") == 7  # a file that has no weights stands for its run
    assert (w(step), w(step, "raw")) == (11, 10)
    assert load_weights(step, run, "raw").tensors.keys() == {"w"}
    assert load_weights(step, run).metadata["from"] == "1"


def test_load_weights_reports_run_without_weights(run):
    with pytest.raises(UserError, match=r"empty: no weights in it yet; run train\.py"):
        load_weights(run / "empty", run / "empty")
    for file in run.glob("checkpoints/*/train_state.pt"):
        file.write_bytes(b"")
    with pytest.raises(UserError, match=r"no weights in it yet; .*00002/train_state\.pt has 0 bytes.*; run train\.py"):
        load_weights(run, run)


def test_posthoc_ema_sums_snapshots_by_their_updates(tmp_path):
    folder, generator = tmp_path / "averages", torch.Generator().manual_seed(0)
    values = {
        (length, step): torch.randn(3, generator=generator) for length in (0.05, 0.1) for step in range(100, 900, 100)
    }
    with pytest.raises(UserError, match=r"weights=ema:0\.07: .* holds no snapshots"):
        load_weights(tmp_path, tmp_path, "ema:0.07")
    for (length, step), value in values.items():
        name = f"ema_{length:.3f}-{step:08d}.safetensors"
        atomic.write_tensors(folder / name, {"w": value}, {"updates": str(step - 10)})  # ten steps were skipped
    parts, _ = posthoc_coefficients([(length, step - 10) for length, step in values], 0.07, 790)
    made = load_weights(tmp_path, tmp_path, "ema:0.07").tensors["w"]
    torch.testing.assert_close(made, torch.tensor(parts) @ torch.stack([*values.values()]))
    assert torch.equal(posthoc_ema(folder, 0.1).tensors["w"], values[0.1, 800])
    with pytest.raises(
        UserError, match=r"weights=ema:0\.27: the nearest that its 16 snapshots .* expected 10% or less"
    ):
        posthoc_ema(folder, 0.27)


@pytest.mark.parametrize(
    "load", [load_trainable, lambda module, state: copy_parameters(trainable_parameters(module), state)]
)
def test_loaded_parameters_must_match_by_name_and_shape(load):
    module = nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    load(module, {"weight": torch.arange(4.0).reshape(2, 2)})
    assert module.weight.tolist() == [[0, 1], [2, 3]]
    with pytest.raises(ValueError, match="weight do not match"):  # torch would broadcast it
        load(module, {"weight": torch.ones(1, 2)})
    with pytest.raises(ValueError, match="bias, weight do not match"):
        load(module, {"bias": torch.ones(2)})
    assert module.weight.tolist() == [[0, 1], [2, 3]]
