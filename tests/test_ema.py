import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from smoke import command, here
from torch import nn

from ldm.checkpoint.step import Checkpoint
from ldm.checkpoint.weights import load_weights_dict, parse_ema_length
from ldm.ema import SIGMA_RELS, ConstantEMA, PowerEMA, posthoc_coefficients, profile_correlation, std_to_exponent
from ldm.errors import UserError
from ldm.io import atomic
from ldm.training.checkpoints import CheckpointRestorer


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97), (0.10, 6.94), (0.15, 3.6)])
def test_std_to_exponent_matches_edm2(sigma_rel, gamma):
    """EDM2: sigma_rel = 0.05 and 0.10 are gamma = 16.97 and 6.94; the width (eq. 126) comes back."""
    assert abs(std_to_exponent(sigma_rel) - gamma) < 0.05
    g = std_to_exponent(sigma_rel)
    assert abs((g + 1) ** 0.5 * (g + 2) ** -1 * (g + 3) ** -0.5 - sigma_rel) < 1e-9


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.28, 1.0])
def test_std_to_exponent_rejects_invalid_width(sigma_rel):
    with pytest.raises(ValueError, match="sigma_rel="):
        std_to_exponent(sigma_rel)


def test_loaded_average_is_exact():
    """A training in float64 makes its average before the trainer has widened the weights."""
    ema, saved = PowerEMA(nn.Linear(2, 1, bias=False)), torch.tensor([[1 / 3, 2 / 3]], dtype=torch.float64)
    ema.load({"weight": saved}, 7)
    assert torch.equal(ema.shadow["weight"], saved)
    assert ema.updates == 7
    assert ema.shadow["weight"].data_ptr() != saved.data_ptr()


def averaged(steps: int, sigma_rel: float) -> tuple[PowerEMA, torch.Tensor]:
    """An average over weights that are a unit vector of their own at every step: its entries are the weights of the
    steps.
    """
    module = nn.Linear(1, steps + 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        module.weight.zero_()
        module.weight[0] = 1.0  # before the first step
    ema = PowerEMA(module, sigma_rel)
    for step in range(1, steps + 1):
        with torch.no_grad():
            module.weight.zero_()
            module.weight[step] = 1.0
        ema.update()
    return ema, ema.shadow["weight"][:, 0]


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.2])
def test_power_ema_weights_match_closed_form(sigma_rel):
    """Step t of T weighs (t/T)^(g+1) - ((t-1)/T)^(g+1), the integral of the power function over the step."""
    steps = 60
    ema, weights = averaged(steps, sigma_rel)
    edges = (torch.arange(steps + 1, dtype=torch.float64) / steps) ** (ema.gamma + 1)
    torch.testing.assert_close(weights[1:], edges.diff())
    assert weights[0] == 0  # the initial weights leave no trace
    torch.testing.assert_close(weights.sum(), torch.ones((), dtype=torch.float64))


def test_power_ema_relative_width_is_sigma_rel():
    steps = 2000
    _, weights = averaged(steps, 0.1)
    t = (torch.arange(1, steps + 1, dtype=torch.float64) - 0.5) / steps
    mean = (weights[1:] * t).sum()
    assert abs(((weights[1:] * (t - mean) ** 2).sum()) ** 0.5 - 0.1) < 1e-3


def test_power_ema_averages_trainable_parameters_only():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
    assert set(PowerEMA(module).shadow) == {"0.weight", "0.bias"}


def test_warmup_bounds_decay_of_constant_ema():
    decays = [ConstantEMA(nn.Linear(1, 1), 0.9, warmup=True).decay_at(update) for update in (0, 8, 79, 81, 10**6)]
    assert decays == [1 / 10, 9 / 18, 80 / 89, 0.9, 0.9]
    assert ConstantEMA(nn.Linear(1, 1), 0.9).decay_at(0) == 0.9


def test_swapped_in_restores_weights_after_error():
    module = nn.Linear(2, 2)
    ema = PowerEMA(module)
    live = module.weight.detach().clone()
    ema.shadow["weight"].fill_(5.0)

    def fail():
        with ema.swapped_in():
            assert (module.weight == 5).all()
            raise RuntimeError("mid-way")

    with pytest.raises(RuntimeError, match="mid-way"):
        fail()
    assert torch.equal(module.weight, live)
    assert (ema.shadow["weight"] == 5).all()


def test_power_ema_does_not_share_memory_with_weights():
    module = nn.Linear(2, 2)
    ema = PowerEMA(module)
    before = ema.shadow["weight"].clone()
    with torch.no_grad():
        module.weight.add_(1.0)
    assert torch.equal(ema.shadow["weight"], before)


def test_power_ema_load_requires_same_names():
    ema, other = PowerEMA(nn.Linear(2, 2)), PowerEMA(nn.Linear(2, 2))
    other.load(ema.shadow, 0)
    assert torch.equal(other.shadow["bias"], ema.shadow["bias"])
    with pytest.raises(KeyError, match="other weights"):
        other.load({"weight": ema.shadow["weight"]}, 0)


def test_power_ema_follows_module_dtype():
    module = nn.Linear(2, 2)
    ema = PowerEMA(module)
    module.double()
    ema.update()
    assert ema.shadow["weight"].dtype == torch.float64
    assert torch.equal(ema.shadow["weight"], module.weight.detach())
    assert ema.shadow["weight"] is not module.weight


def test_profile_covariance_matches_integral():
    t = (np.arange(200_000) + 0.5) / 200_000

    def density(gamma, end):
        return np.where(t < end, (gamma + 1) * t**gamma / end ** (gamma + 1), 0)

    for a, b in (((17.0, 0.4), (7.0, 0.9)), ((7.0, 0.9), (17.0, 0.4)), ((3.0, 0.5), (3.0, 0.5))):
        assert profile_correlation(*a, *b) == pytest.approx((density(*a) * density(*b)).mean(), rel=1e-4)


def snapshots(steps: int, every: int) -> dict[tuple[float, int], torch.Tensor]:
    """(length, step) -> the weights of steps 0..`steps` in the average kept then."""
    kept = {}
    for length in SIGMA_RELS:
        for step in range(every, steps + 1, every):
            kept[length, step] = torch.zeros(steps + 1, dtype=torch.float64)
            kept[length, step][: step + 1] = averaged(step, length)[1]
    return kept


@pytest.mark.parametrize("sigma_rel", [0.04, 0.07, 0.12, 0.15, 0.2])
def test_posthoc_average_matches_tracked_average(sigma_rel):
    """Of a toy sequence too: parameters that walk."""
    steps = 320
    kept, tracked = snapshots(steps, 20), averaged(steps, sigma_rel)[1]
    parts, off = posthoc_coefficients(list(kept), sigma_rel, steps)
    made = sum(part * one for part, one in zip(parts, kept.values(), strict=True))
    assert off < 0.03
    assert (made - tracked).norm() / tracked.norm() < 1.2 * off + 1e-3
    walk = torch.randn(steps + 1, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64).cumsum(0)
    nearest_kept = min(((one @ walk - tracked @ walk).norm() for (_, step), one in kept.items() if step == steps))
    assert (made @ walk - tracked @ walk).norm() < 0.06 * nearest_kept
    assert sum(parts) == pytest.approx(1, abs=1e-9)


def test_posthoc_of_tracked_length_is_exact_and_improves_with_snapshots():
    for place, length in enumerate(SIGMA_RELS):
        parts, off = posthoc_coefficients(
            [(one, step) for step in range(20, 320, 20) for one in SIGMA_RELS], length, 300
        )
        assert parts[28 + place] == pytest.approx(1, abs=1e-9)
        assert np.abs(np.delete(parts, 28 + place)).max() < 1e-9
        assert off < 1e-6
    few, many = (
        posthoc_coefficients([(one, step) for step in range(320 // n, 321, 320 // n) for one in SIGMA_RELS], 0.15, 320)[
            1
        ]
        for n in (4, 16)
    )
    assert many < few / 5


@pytest.mark.parametrize("kind", ["average", "ema:", "ema:long", "ema:0.3", "raw:0.1", "0.1"])
def test_parse_ema_length_rejects_invalid(kind):
    with pytest.raises(UserError, match=f"weights={kind}: expected ema, raw, or ema:0.15"):
        parse_ema_length(kind)


def read_averages(run: Path) -> dict[str, tuple]:
    """What the files of a run's snapshots hold; safetensors writes the metadata in any order."""
    return {
        path.name: (
            atomic.read_metadata(path),
            {name: value.numpy().tobytes() for name, value in atomic.read_tensors(path).items()},
        )
        for path in (run / "averages").iterdir()
    }


@pytest.mark.slow
def test_run_with_snapshots_serves_any_ema_length(smoke, tmp_path):
    with here(tmp_path, LDM_CACHE=str(smoke.folder / "cache")):
        typed = (
            "train.py",
            "budget=smoke",
            "metrics=none",
            "training.steps=3",
            "training.snapshot_every=1",
            "training.save_every=1",
        )
        assert command(*typed) == 0
        (run,) = (tmp_path / "runs").iterdir()
        first = read_averages(run)
        assert sorted(first) == [
            f"ema_{length}-{step:08d}.safetensors" for length in ("0.05", "0.1") for step in (1, 2, 3)
        ]
        (run / "metrics.json").unlink()
        for path in (run / "averages").glob("*3.safetensors"):
            path.unlink()
        shutil.rmtree(run / "checkpoints" / "step-00000003")
        assert command(*typed) == 0  # goes on after step 2 as if it had not been stopped
        assert read_averages(run) == first
        kept = atomic.read_tensors(run / "averages" / "ema_0.1-00000003.safetensors")
        made = load_weights_dict(run, "ema:0.1")
        assert all(torch.equal(made[name], kept[name]) for name in kept)
        own, near = load_weights_dict(run), load_weights_dict(run, "ema:0.06")
        assert own.keys() == near.keys()

        def apart(a: dict, b: dict) -> float:
            return sum((a[name] - b[name]).square().sum().item() for name in a) ** 0.5

        assert 0 < apart(near, own) < 1e-4 * apart(own, dict.fromkeys(own, torch.zeros(())))
        assert command("sample.py", f"run={run}", "weights=ema:0.08", "num=2", "steps=1", "output_dir=drawn") == 0
        with pytest.raises(UserError, match=r"the nearest that its 6 snapshots make is \d+% off"):
            load_weights_dict(run, "ema:0.2")
        with pytest.raises(UserError, match="holds no snapshots"):
            load_weights_dict(smoke.run, "ema:0.08")


def test_resume_of_run_without_snapshots_is_refused():
    module = nn.Linear(2, 2)
    step = Checkpoint(3, {"model": {name: value.detach() for name, value in module.named_parameters()}}, {}, "", {})
    restoring = CheckpointRestorer(step, None, {"ema_0.1": PowerEMA(module)})
    with pytest.raises(UserError, match=r"step 3 has no ema_0\.1, so this run began without snapshots"):
        restoring.on_fit_start(None, module)
