"""Training of the first stage together with the denoiser: gradients, parameter groups, what is saved, and refusals."""

import shutil
import signal
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from linear_model import SCALE, SHIFT, make_model
from smoke import command, here, processes
from torch import nn

from ldm.checkpoint.load import load_model, open_model
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.objective import Objective
from ldm.diffusion.prediction import V
from ldm.diffusion.schedule import cosine
from ldm.diffusion.times import independent, uniform
from ldm.diffusion.weighting import output
from ldm.io import atomic
from ldm.tensors import mean_per_sample
from ldm.training import optimizers
from ldm.training.callbacks import LearningRate
from ldm.training.diffusion import LitDiffusion, batch_noise

OPTIMIZERS = {
    "torch": partial(torch.optim.AdamW, lr=1e-2),
    "adamw": partial(optimizers.adamw, lr=1e-2),
    "muon": partial(optimizers.muon, lr=1e-2, matrix_lr=1e-2),
}
PLAIN = Objective(partial(independent, density=uniform), output)


class Joint(nn.Module):
    """A denoising loss that does not reach the encoder, and a reconstruction that trains the first stage."""

    trains_first_stage = True

    def __init__(self, first_stage_lr: float = 1e-3, weight: float = 0.5, detach: bool = True, **options):
        super().__init__()
        self.objective = Objective(**options) if options else PLAIN
        self.first_stage_lr, self.weight, self.detach = first_stage_lr, weight, detach

    def forward(self, denoiser, x0, cond, noise, batch, *, first_stage):
        terms = self.objective(denoiser, x0.detach() if self.detach else x0, cond, noise, batch)
        error = mean_per_sample((first_stage.decode(x0) - batch["image"]).square())
        return terms | {"loss": terms["loss"] + self.weight * error, "reconstruction": error}


def make_lit(objective, build=OPTIMIZERS["torch"]):
    model = make_model(lambda net: Denoiser(net, cosine(), V()), "label").double()
    model.autoencoder.decoder = nn.ConvTranspose2d(2, 3, 2, 2).double().requires_grad_(False)
    return LitDiffusion(model, objective.double(), build, 0.0)


def make_batch(n=5):
    generator = torch.Generator().manual_seed(0)
    return {
        "image": torch.rand(n, 3, 4, 4, generator=generator, dtype=torch.float64) * 2 - 1,
        "label": torch.arange(n) % 4,
        "index": list(range(n)),
        "epoch": [0] * n,
        "position": list(range(n)),
        "total": n,
        "step": 0,
    }


def test_frozen_first_stage_gets_no_gradient_and_no_graph():
    lit = make_lit(PLAIN)
    batch = make_batch()
    assert not lit.sample_latent(batch, batch_noise(0, batch)).requires_grad
    assert not any(p.requires_grad for p in lit.model.autoencoder.parameters())
    (group,) = lit.configure_optimizers().param_groups
    assert "name" not in group


@pytest.mark.parametrize("detach", [True, False])
def test_first_stage_gradient_equals_that_of_its_terms(detach):
    lit, batch = make_lit(Joint(detach=detach)), make_batch()
    lit.train()
    assert not lit.model.autoencoder.training
    terms = lit.training_step(batch, 0)
    terms["loss"].backward()
    model, noise = lit.model, batch_noise(0, batch)
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.autoencoder.named_parameters()}
    moments = nn.functional.conv2d(batch["image"], weights["encoder.weight"], weights["encoder.bias"], stride=2)
    mean, log_variance = moments.chunk(2, 1)
    raw = mean + (log_variance / 2).exp() * noise.normal("posterior", mean)
    shift, scale = (torch.tensor(value, dtype=torch.float64)[:, None, None] for value in (SHIFT, SCALE))
    z = (raw - shift) * scale
    decoded = nn.functional.conv_transpose2d(raw, weights["decoder.weight"], weights["decoder.bias"], stride=2)
    error = (decoded - batch["image"]).square().flatten(1).mean(1)
    cond = model.condition({**batch, "noise": noise})
    loss = PLAIN(model.denoiser, z.detach() if detach else z, cond, noise, batch)["loss"]
    expected = torch.autograd.grad((loss + 0.5 * error).mean(), list(weights.values()))
    for (name, p), gradient in zip(model.autoencoder.named_parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-9, atol=1e-12, msg=name)
        assert gradient.abs().max() > 0
    torch.testing.assert_close(terms["reconstruction"], error.mean().detach(), rtol=1e-9, atol=1e-12)
    with torch.no_grad():
        assert not lit.sample_latent(batch, noise).requires_grad, "as where the loss is only measured"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_parameter_groups_have_their_own_rates(name):
    lit = make_lit(Joint(first_stage_lr=3e-4), OPTIMIZERS[name])
    optimizer = lit.configure_optimizers()
    parts = {part: [g for g in optimizer.param_groups if g["name"] == part] for part in ("denoiser", "first_stage")}
    assert sum(map(len, parts.values())) == len(optimizer.param_groups)
    first = {id(p) for group in parts["first_stage"] for p in group["params"]}
    others = {id(p) for group in parts["denoiser"] for p in group["params"]}
    assert first == {id(p) for p in lit.model.autoencoder.parameters()}
    assert others == {id(p) for p in lit.parameters()} - first
    assert {group["lr"] for group in parts["first_stage"]} == {3e-4}
    assert {group["lr"] for group in parts["denoiser"]} == {1e-2}

    trainer = SimpleNamespace(optimizers=[optimizer])
    LearningRate(lambda step, total: 0.5, 10).on_train_batch_start(trainer, lit, {"step": 3}, 0)
    assert {group["lr"] for group in parts["first_stage"]} == {1.5e-4}
    before = {key: p.detach().clone() for key, p in lit.named_parameters()}
    lit.training_step(make_batch(), 0)["loss"].backward()
    optimizer.step()
    moved = {key for key, p in lit.named_parameters() if not torch.equal(p, before[key])}
    assert {"model.autoencoder.encoder.weight", "model.autoencoder.decoder.weight"} <= moved
    assert "model.denoiser.net.mix.weight" in moved


JOB = (
    *("train.py", "budget=smoke", "metrics=none", "training.sample_every=100", "trainer=cpu"),
    *("training.steps=4", "training.save_every=2", "training.latents=online"),
    *("training.validation.every=2", "training.validation.num=4", "training.validation.levels=2"),
    "objective._target_=test_joint_training.Joint",
)


@pytest.mark.parametrize(
    ("typed", "text"),
    [
        (
            ("training.latents=cached",),
            "training.latents=cached: this objective trains the first stage, and its latents",
        ),
        (
            ("trainer=fsdp", "trainer.devices=1"),
            "trainer.strategy=fsdp: this objective trains the first stage, and it is not sharded",
        ),
    ],
)
def test_joint_training_refuses_in_one_line(typed, text, tmp_path, capsys):
    with here(tmp_path):
        assert command(*JOB, *typed) == 2
        assert capsys.readouterr().err.strip().splitlines()[-1].startswith(f"error: {text}")
        assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_joint_run_saves_resumes_and_samples_with_trained_first_stage(smoke, tmp_path):
    for name in ("whole", "killed"):
        shutil.copytree(smoke.kept, tmp_path / name / "cache")
    (done,) = processes(JOB, cwd=tmp_path / "whole")
    assert done.returncode == 0, done.stdout
    (killed,) = processes(JOB, cwd=tmp_path / "killed", kill_at=3)
    assert killed.returncode == -signal.SIGKILL
    (resumed,) = processes(JOB, cwd=tmp_path / "killed")
    assert resumed.returncode == 0, resumed.stdout
    (run,), (other,) = ((tmp_path / name / "runs").iterdir() for name in ("whole", "killed"))
    weights, again = (atomic.read_tensors(folder / "weights.safetensors") for folder in (run, other))
    assert weights.keys() == again.keys()
    assert all(torch.equal(again[name], value) for name, value in weights.items())
    begun = atomic.read_tensors(run / "first_stage.safetensors")
    prefix = "autoencoder."
    trained = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    assert trained.keys() == begun.keys() - {"shift", "scale", "calibrated_on"}
    assert all((trained[name] != begun[name]).any() for name in trained)
    for kind, expected in (("ema", trained), ("raw", None)):
        model = load_model(run, kind)
        assert not any(p.requires_grad for p in model.autoencoder.parameters())
        state = dict(model.autoencoder.named_parameters())
        assert all(torch.equal(state[name].cpu(), value) for name, value in (expected or {}).items())
        assert all((state[name].cpu() != begun[name]).any() for name in trained)
    space, first = open_model(run).latent_space, open_model(smoke.run).latent_space
    assert space.split("-")[0] == first.split("-")[0]
    assert space != first
    with here(tmp_path / "whole"):
        assert command("sample.py", f"run={run}", "num=2", "steps=2", "output_dir=drawn") == 0
