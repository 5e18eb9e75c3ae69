"""The loss on held-out images: that of a plain computation, at always the same pairs, leaving no trace."""

from functools import partial

import pytest
import torch
from helpers import randomize_weights
from hydra.utils import instantiate
from smoke import composed

from ldm.config import build
from ldm.data.latents import LatentDataset, encode_latents
from ldm.data.subset import Subset, choose_rows
from ldm.devices import resolve_precision
from ldm.diffusion import times
from ldm.diffusion.fixed_pairs import GOLDEN
from ldm.ema import PowerEMA
from ldm.errors import ConfigError
from ldm.tensors import KeyedNoise, derive_seed
from ldm.training import validation
from ldm.training.callbacks import EMACallback, EvaluationCallback
from ldm.training.diffusion import LitDiffusion
from ldm.training.fit import fit
from ldm.training.sharded import ShardAverages
from ldm.training.validation import HeldOutLoss, ValidationConfig

NUM = 7
SMALL = ("data.size=16", "data.num=20", "net.channel_mult=[1,2]", "net.attention_resolutions=[2]")


def make(*typed, seed=0, double=True, dropout=0.5):
    """A module with random weights, and held-out images with their latents."""
    cfg = composed("budget=smoke", f"net.dropout={dropout}", *SMALL, *typed)
    autoencoder = randomize_weights(build.build_autoencoder(cfg.autoencoder, 1))
    data = build.build_dataset(cfg, "test")
    subset = Subset(data, choose_rows(len(data), NUM, 0))
    model = build.build_model(cfg, autoencoder, data)
    randomize_weights(model.denoiser), randomize_weights(model.conditioner, 1)
    lit = LitDiffusion(model, instantiate(cfg.objective), partial(torch.optim.SGD, lr=0.1), seed=seed).train()
    held_out = LatentDataset(subset, encode_latents(autoencoder, subset))
    return lit.double() if double else lit, held_out


def measured(lit, data, **options):
    options = {"every": 1, "num": NUM, "levels": 3, "batch_size": 3, **options}
    return HeldOutLoss(lit, data, data.dataset.rows, ValidationConfig(**options), "64")()


def pairs(lit, data, level, levels=3, seed=0, density=lambda u: ((u * 1000).floor() + 1) / 1000):
    """Latents, times, noise and labels of all images at a level, drawn one by one."""
    stage, rows = lit.model.autoencoder, data.dataset.rows
    batch = data.batch([(0, i) for i in range(len(rows))])
    mean, log_variance = batch["moments"].double().chunk(2, 1)

    def draw(seed, purpose):
        seeds = [derive_seed(seed, purpose, row) for row in rows]
        generators = [torch.Generator().manual_seed(one) for one in seeds]
        return torch.stack([torch.randn(mean.shape[1:], generator=one, dtype=torch.float32) for one in generators])

    z = mean + (log_variance / 2).exp() * draw(derive_seed(seed, "validation"), "posterior").double()
    z = (z - stage.shift.view(-1, 1, 1)) * stage.scale.view(-1, 1, 1)
    u = torch.tensor([(level + (0.5 + i * GOLDEN) % 1) / levels for i in range(len(rows))], dtype=torch.float64)
    return z, density(u), draw(derive_seed(seed, "validation", level), "eps").double(), batch["label"]


def losses(lit, parameters, z, t, eps, label):
    """Errors of v and their weights by Min-SNR (B,), as functions of the parameters alone."""
    denoiser, conditioner = lit.model.denoiser, lit.model.conditioner
    alpha, sigma = denoiser.schedule.alpha_sigma(t)
    a, s = alpha.double().view(-1, 1, 1, 1), sigma.double().view(-1, 1, 1, 1)
    by_part = {
        part: {name.removeprefix(f"{part}."): p for name, p in parameters.items() if name.startswith(part)}
        for part in ("denoiser.net", "conditioner")
    }
    cond = torch.func.functional_call(conditioner, by_part["conditioner"], ({"label": label},))
    inputs = (a * z + s * eps, denoiser.schedule.net_time(t).double(), cond)
    out = torch.func.functional_call(denoiser.net, by_part["denoiser.net"], inputs)
    snr_of_v = ((alpha * alpha + sigma * sigma) / sigma) ** 2  # SNR + 1
    return ((out - (a * eps - s * z)) ** 2).mean((1, 2, 3)), ((alpha / sigma) ** 2).clamp(max=5) / snr_of_v


def test_validation_equals_plain_computation_of_losses_and_gradients():
    lit, data = make("weighting=min_snr")
    values = measured(lit, data, grad_norms=True)
    lit.eval()
    parameters = {name: p for name, p in lit.model.named_parameters() if p.requires_grad}
    totals = []
    torch.set_default_dtype(torch.float64)
    try:
        for level in range(3):
            error, weight = losses(lit, parameters, *pairs(lit, data, level))
            loss = (weight * error).mean()
            grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            norm = sum(float(grad.square().sum()) for grad in grads if grad is not None) ** 0.5
            expected = {"loss": loss.item(), "error": error.mean().item(), "grad_norm": norm}
            for name, value in expected.items():
                assert values[f"val/{name}_{level}"] == pytest.approx(value, rel=1e-10), (name, level)
            totals.append((loss.item(), error.mean().item()))
    finally:
        torch.set_default_dtype(torch.float32)
    for name, column in zip(("loss", "error"), zip(*totals, strict=True), strict=True):
        assert values[f"val/{name}"] == pytest.approx(sum(column) / 3, rel=1e-10)
    assert len({round(value, 6) for value in values.values()}) == len(values) == 11
    assert values.keys() == ValidationConfig(every=1, levels=3, grad_norms=True).metric_names(9)


def test_levels_are_ordered_by_time_and_densities_replaced():
    """The quantiles of a uniform density fall with t, and level 0 is still the least noisy one."""
    lit, data = make("weighting=min_snr", "timestep_sampling=logit_normal")
    values = measured(lit, data, density=times.uniform)
    grid = lambda u: (((1 - u) * 1000).round().clamp(1, 1000)) / 1000  # noqa: E731
    lit.eval()
    parameters = {name: p for name, p in lit.model.named_parameters() if p.requires_grad}
    torch.set_default_dtype(torch.float64)
    try:
        for level in range(3):
            drawn = pairs(lit, data, 2 - level, density=grid)
            assert float(drawn[1].min()) > level / 3 - 1e-3
            error, _ = losses(lit, parameters, *drawn)
            assert values[f"val/error_{level}"] == pytest.approx(error.mean().item(), rel=1e-10)
    finally:
        torch.set_default_dtype(torch.float32)
    lit.train()
    assert measured(lit, data) != values


def test_validation_is_same_at_each_call_batch_size_and_run_seed():
    lit, data = make()
    values = measured(lit, data)
    torch.manual_seed(1)
    assert measured(lit, data) == values
    other, _ = make(seed=5)
    assert measured(other, data) == values
    for size in (1, 64):
        assert measured(lit, data, batch_size=size) == pytest.approx(values, rel=1e-12)
    assert measured(lit, data, seed=1) != pytest.approx(values, rel=1e-3)
    assert measured(lit, data, grad_norms=True).items() >= values.items()


def test_validation_leaves_no_trace():
    lit, data = make()
    lit.train()
    lit.model.denoiser.net.eval()  # any mode comes back
    modes = [part.training for part in lit.modules()]
    for p in lit.parameters():
        p.grad = torch.full_like(p, 3.0) if p.requires_grad else None
    weights = {name: value.clone() for name, value in lit.state_dict().items()}
    random = torch.get_rng_state()
    measured(lit, data, grad_norms=True, density=times.uniform)
    assert torch.equal(torch.get_rng_state(), random)
    assert [part.training for part in lit.modules()] == modes
    assert all(bool((p.grad == 3).all()) if p.requires_grad else p.grad is None for p in lit.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in lit.state_dict().items())
    assert lit.objective.times.func is times.stratified


@pytest.mark.parametrize("ranks", [2, 3, 9])
def test_processes_share_images_and_have_result_of_one(ranks, monkeypatch):
    """Nine for seven images: two of them have none, and take part in every sum."""
    lit, data = make()
    expected = measured(lit, data, grad_norms=True)
    sums = []
    for rank in range(ranks):
        sums.append([])
        monkeypatch.setattr(validation, "rank_and_world_size", lambda rank=rank: (rank, ranks))
        monkeypatch.setattr(validation, "all_reduce_sum", lambda x, part=sums[-1]: part.append(x.clone()) or x + 1)
        measured(lit, data, grad_norms=True)
    totals = iter([sum(parts) for parts in zip(*sums, strict=True)])
    monkeypatch.setattr(validation, "all_reduce_sum", lambda x: next(totals))
    assert measured(lit, data, grad_norms=True) == pytest.approx(expected, rel=1e-12)
    assert next(totals, None) is None


def test_validation_in_bfloat16_is_near_float32():
    lit, data = make(double=False)
    options = ValidationConfig(every=1, num=NUM, levels=2, grad_norms=True)
    low, high = (HeldOutLoss(lit, data, data.dataset.rows, options, precision)() for precision in ("bf16", "32"))
    assert low != high
    assert low == pytest.approx(high, rel=0.05)


def test_gradient_norms_in_float16_are_near_float32(monkeypatch):
    """Those of a loss whose gradients float16 would round to zero: scaled for the backward pass, and back."""
    lit, data = make(double=False)
    forward = lit.objective.forward

    def small(*given):
        terms = forward(*given)
        return terms | {"loss": terms["loss"] * 1e-7}

    monkeypatch.setattr(lit.objective, "forward", small)
    options = ValidationConfig(every=1, num=NUM, levels=2, grad_norms=True)
    low, high = (HeldOutLoss(lit, data, data.dataset.rows, options, precision)() for precision in ("fp16", "32"))
    assert low != high
    assert low == pytest.approx(high, rel=0.05)


def test_times_of_levels_are_reported_once():
    lit, data = make()
    lines = []
    options = ValidationConfig(every=1, num=NUM, levels=2)
    held_out = HeldOutLoss(lit, data, data.dataset.rows, options, "64", lines.append)
    held_out(), held_out()
    assert len(lines) == 1
    assert lines[0].startswith("validation  mean t of the levels: 0.2")


def test_arithmetic_is_that_of_weights_in_float64():
    for dtype in (torch.float64, torch.float32):
        with validation.arithmetic("32", torch.zeros(1, dtype=dtype)):
            assert torch.ones(1).dtype == dtype


def trained(strategy="auto", watch=True, accumulate=1, dropout=0.5, steps=4):
    """Rows and final weights of a training, with or without validation."""
    lit, data = make("objective=log_variance", double=False, dropout=dropout)
    rows, ema = {}, PowerEMA(lit.model, 0.1)
    held_out = HeldOutLoss(lit, data, data.dataset.rows, ValidationConfig(2, NUM, 3, grad_norms=True), "32")
    watching = [EvaluationCallback(held_out, lambda step, values: rows.update({step: values}), 2, ema, steps)]
    torch.manual_seed(0)
    options = {"batch_size": 4, "steps": steps, "accelerator": "cpu", "precision": "32", "strategy": strategy}
    callbacks = [ShardAverages([ema]), EMACallback(ema), *watching * watch]
    fit(lit, data, callbacks, accumulate_grad_batches=accumulate, **options)
    return rows, lit.state_dict()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_with_validation_has_weights_of_one_without(accumulate, alone):
    rows, weights = trained(accumulate=accumulate)
    nothing, expected = trained(watch=False, accumulate=accumulate)
    assert not nothing
    assert list(rows) == [2, 4]
    assert rows[2] != rows[4]
    assert all(torch.equal(value, expected[name]) for name, value in weights.items())


def test_validation_of_sharded_training_matches_unsharded(alone):
    """The objective has weights too, without average: the sharded ones."""
    expected, _ = trained(dropout=0.0)
    rows, _ = trained("fsdp", dropout=0.0)
    assert rows.keys() == expected.keys()
    for step, values in rows.items():
        assert values == pytest.approx(expected[step], rel=1e-5), step


def test_validation_after_last_step_is_of_last_step(alone):
    rows, _ = trained(steps=3)
    assert list(rows) == [2, 3]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"every": 0}, "training.validation.every=0: expected null, or 1 or more steps"),
        ({"num": 0}, "training.validation.num=0: expected 1 or more"),
        ({"levels": -1}, "training.validation.levels=-1: expected 1 or more"),
        ({"batch_size": 0}, "training.validation.batch_size=0: expected 1 or more"),
        ({"density": "uniform"}, "training.validation.density=uniform: expected null or a node, as in"),
    ],
)
def test_validation_config_rejects_invalid_numbers(options, text):
    with pytest.raises(ConfigError) as error:
        ValidationConfig(**options)
    assert str(error.value).startswith(text)


def test_metric_names_are_those_written():
    assert ValidationConfig().metric_names(10) == set()
    assert ValidationConfig(every=3, levels=1).metric_names(10) == {
        *("val/loss", "val/error", "val/loss_0", "val/error_0")
    }
    assert resolve_precision("64") == "64"
    assert KeyedNoise(0, [0]).index == [0]
