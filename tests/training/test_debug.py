"""What looks at a training finds what is there."""

import pytest
from rows import Line, Rows, Seen, train
from torch import nn

from ldm.data.stream import BatchStream
from ldm.errors import NonFiniteError, UserError
from ldm.training.debug import NonFiniteDetector, OverfitOneBatch, Profile
from ldm.training.profiler import ORDER


class Deep(Line):
    """A line behind two layers, the second of which may divide by nothing; `harm` says where what is not finite comes
    from.
    """

    def __init__(self, harm):
        super().__init__()
        self.before, self.inner, self.harm = nn.Sequential(nn.Linear(1, 1), nn.Identity()), Root(), harm

    def training_step(self, batch, batch_idx):
        at = batch["step"] == 2
        self.inner.by = 0.0 if at and self.harm == "module" else 1.0
        if at and self.harm == "weight":
            self.line.weight.data.fill_(float("inf"))
        answer = self.line(self.inner(self.before(batch["x"])))
        loss = (answer - 1).square().mean()
        if at and self.harm == "loss":
            loss = loss / 0
        if at and self.harm == "gradient":
            loss = loss + (self.line.bias - self.line.bias.detach()).abs().sqrt().sum()
        return {"loss": loss}


class Root(nn.Module):
    by = 1.0

    def forward(self, x):
        return x / self.by


SAID = {
    "module": r"step 3: inner \(Root\) gives numbers that are not finite; its input was finite$",
    "weight": r"step 3: line \(Linear\) gives .*; its input was finite, and its weight$",
    "loss": "step 3: every module's answer is finite, the loss made of them is not",
    "gradient": "step 3: the loss is finite, its gradient by line.bias is not",
}


@pytest.mark.parametrize("harm", SAID)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_non_finite_detector_names_first_module(harm, accumulate, tmp_path):
    with pytest.raises(NonFiniteError, match=SAID[harm]):
        train(Deep(harm), Rows(), [NonFiniteDetector(tmp_path)], steps=5, accumulate_grad_batches=accumulate)


def test_non_finite_detector_leaves_no_hooks(tmp_path):
    lit = Deep(None)
    train(lit, Rows(), [NonFiniteDetector(tmp_path)], steps=3)
    assert not any(module._forward_hooks for module in lit.modules())


@pytest.mark.parametrize(
    ("step", "said"), [(2, None), (3, r"step 3: inner"), (4, r"step 4: before.0 .* and its weight, bias$")]
)
def test_debug_step_inspects_one_step_and_stops(step, said, tmp_path, capfd):
    """The third is harmed, and the weights after it."""
    seen = Seen()
    with pytest.raises(NonFiniteError if said else SystemExit, match=said or "^0$"):
        train(Deep("module"), Rows(), [NonFiniteDetector(tmp_path, step), seen], steps=6)
    assert ("every module's answer, the loss and its gradient are finite" in capfd.readouterr().out) == (said is None)
    assert len(seen.terms) == step - 1


def test_debug_step_before_start_is_refused(tmp_path):
    with pytest.raises(
        UserError, match=r"debug.step=2: this begins with step 4; choose an earlier checkpoint by resume="
    ):
        train(Line(), Rows(), [NonFiniteDetector(tmp_path, 2)], steps=6, start=3)


def test_overfit_one_batch_repeats_batch(tmp_path):
    keys, losses = [], Seen()

    class Keys(Seen):
        def on_train_batch_end(self, trainer, lit, outputs, batch, batch_idx):
            keys.append((batch["step"], list(zip(batch["epoch"], batch["index"], strict=True))))

    train(Line(), Rows(), [OverfitOneBatch(tmp_path), losses, Keys()], steps=40)
    first = BatchStream(16, 4, 1).batch_at(0).samples
    assert keys == [(step, first) for step in range(40)]
    assert losses.terms[-1]["loss"] < 0.1 * losses.terms[0]["loss"]


@pytest.mark.parametrize("steps", [4, 12])
def test_profile_writes_table_and_trace(steps, tmp_path, capfd):
    train(Line(), Rows(), [Profile(tmp_path, 2, 2, 5)], steps=steps)
    text = (tmp_path / "profile" / "table.txt").read_text()
    assert "aten::addmm" in text
    assert (tmp_path / "profile" / "trace.json").read_text().lstrip().startswith("{")
    rows = {line[:12].strip(): (float(line[12:24]), float(line[27:37])) for line in text.split("\n\n")[0].splitlines()}
    assert list(rows) == [*ORDER, "a step"]
    *kinds, (whole, share) = rows.values()
    assert sum(ms for ms, _ in kinds) == pytest.approx(whole, abs=0.01)
    assert sum(part for _, part in kinds) == pytest.approx(share, abs=0.1)
    assert share == 100
    assert min(rows[kind][0] for kind in ("forward", "backward", "optimiser")) > 0
    assert (rows["data"][0] > 0) == (steps > 4), "the last batch comes before the last step"
    assert capfd.readouterr().out.count("backward") == 1


def test_profile_of_short_training_reports_too_few_steps(tmp_path):
    train(Line(), Rows(), [Profile(tmp_path, 2, 3, 5)], steps=3)
    assert (tmp_path / "profile" / "table.txt").read_text().startswith("too few steps to time")
