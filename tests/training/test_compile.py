"""trainer.torch_compile=true: the same training by torch.compile, with what it cost said."""

from functools import partial

import pytest
import torch
from rows import Line, Rows, Seen, train
from smoke import command, here

from ldm.training.autoencoder import LitAutoencoder
from ldm.training.classifier import LitClassifier
from ldm.training.clip import LitCLIP
from ldm.training.diffusion import LitDiffusion
from ldm.training.evaluator import LitEvaluator
from ldm.training.lr import cosine
from ldm.training.startup_report import StartupReport


class Compiled(Line):
    """Its line by the part of torch.compile that needs no compiler."""

    def compile(self, *args, **kwargs):
        self.line.compile(*args, backend="eager", **kwargs)


def fitted(lit, steps, **given):
    seen = Seen()
    train(lit, Rows(), [StartupReport("a line", steps, partial(cosine, end=1.0)), seen], steps=steps, **given)
    return seen.weights


def test_compiled_training_matches_eager_and_reports_time(capfd):
    plain = fitted(Line(), 20)
    assert "compiled" not in capfd.readouterr().out
    assert fitted(Compiled(), 20, torch_compile=True) == pytest.approx(plain, rel=1e-6)
    assert "a line      compiled in " in capfd.readouterr().out


def test_compile_with_fsdp_is_refused():
    with pytest.raises(ValueError, match="torch_compile=true with strategy=fsdp: expected one of the two"):
        train(Line(), Rows(), [], steps=1, torch_compile=True, strategy="fsdp")


@pytest.mark.parametrize("lit", [LitDiffusion, LitClassifier, LitCLIP])
def test_compile_applies_to_network(lit):
    net = torch.nn.Linear(1, 1)
    one = lit.__new__(lit)
    torch.nn.Module.__init__(one)
    one.net = net
    one.model = torch.nn.Module()
    one.model.denoiser = torch.nn.Module()
    one.model.denoiser.net = net
    one.compile(backend="eager")
    assert net._compiled_call_impl is not None
    assert one._compiled_call_impl is None


@pytest.mark.parametrize("lit", [LitAutoencoder, LitEvaluator])
def test_compile_without_network_does_nothing(lit):
    one = lit.__new__(lit)
    torch.nn.Module.__init__(one)
    one.compile()
    assert one._compiled_call_impl is None


@pytest.mark.slow
def test_diffusion_model_trains_compiled(smoke, tmp_path, monkeypatch, capfd):
    whole = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **given: whole(self, backend="eager", **given))
    with here(tmp_path, LDM_CACHE=str(smoke.folder / "cache")):
        assert (
            command("train.py", "budget=smoke", "trainer.torch_compile=true", "training.steps=12", "metrics=none") == 0
        )
    assert "diffusion   compiled in " in capfd.readouterr().out
