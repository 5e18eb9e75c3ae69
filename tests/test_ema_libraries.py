"""Averages of weights beside those of torch, diffusers, ema-pytorch and LDM, and the table of experiments/averages."""

import sys
from collections.abc import Callable

import pytest
import torch
from diffusers.training_utils import EMAModel
from ema_pytorch import EMA
from ema_pytorch.post_hoc_ema import KarrasEMA
from smoke import ROOT
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ldm.ema import ConstantEMA, PowerEMA, WeightAverage

sys.path.insert(0, str(ROOT / "experiments" / "averages"))
import table

STEPS = 60


def make_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()


def walk(net: nn.Module, step: int) -> None:
    """Move the weights by numbers of a step."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype))


def assert_equal_from(start: int, make: Callable[[nn.Module], WeightAverage], update, values) -> None:
    """Check that an average made after `start` steps equals another one that is updated in every step.

    update: net -> None.  values: () -> the other's tensors.
    """
    net = make_net()
    update_other, values_of = update(net), values
    average = make(net) if start == 0 else None
    for step in range(1, STEPS + 1):
        walk(net, step)
        update_other()
        if average is not None:
            average.update()
        elif step == start:
            average = make(net)
        if average is not None:
            for ours, theirs in zip(average.shadow.values(), values_of(), strict=True):
                assert ours.dtype == torch.float64
                torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.9999])
def test_constant_decay_equals_torch(decay):
    other = {}

    def update(net):
        other["average"] = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(decay))
        return lambda: other["average"].update_parameters(net)

    assert_equal_from(1, lambda net: ConstantEMA(net, decay), update, lambda: other["average"].module.parameters())


@pytest.mark.parametrize(("decay", "warmup"), [(0.9, False), (0.9999, False), (0.9999, True), (0.5, True)])
def test_constant_decay_equals_diffusers(decay, warmup):
    """diffusers' default warm-up is LDM's one update later; with min_decay there is none."""
    other = {}

    def update(net):
        other["average"] = EMAModel(net.parameters(), decay=decay, min_decay=0.0 if warmup else decay)
        return lambda: other["average"].step(net.parameters())

    assert_equal_from(1, lambda net: ConstantEMA(net, decay, warmup), update, lambda: other["average"].shadow_params)


@pytest.mark.parametrize("decay", [0.9, 0.9999])
def test_constant_decay_equals_ema_pytorch(decay):
    """Its decay is rounded to float32."""
    other = {}

    def update(net):
        options = {"beta": decay, "min_value": decay, "update_after_step": 0, "update_every": 1}
        other["average"] = EMA(net, include_online_model=False, **options)
        return other["average"].update

    rounded = float(torch.tensor(decay))
    assert_equal_from(1, lambda net: ConstantEMA(net, rounded), update, lambda: other["average"].ema_model.parameters())


@pytest.mark.parametrize("decay", [0.5, 0.9999])
def test_warmup_equals_formula_of_ldm(decay):
    """LitEma: n is counted from 1; shadow -= (1 - min(decay, (1 + n) / (10 + n))) (shadow - weight)."""
    other = {}

    def update(net):
        other["shadow"], other["n"] = [p.detach().clone() for p in net.parameters()], 0

        def step():
            other["n"] += 1
            rest = 1.0 - min(decay, (1 + other["n"]) / (10 + other["n"]))
            for shadow, p in zip(other["shadow"], net.parameters(), strict=True):
                shadow.sub_(rest * (shadow - p.detach()))

        return step

    assert_equal_from(0, lambda net: ConstantEMA(net, decay, warmup=True), update, lambda: other["shadow"])


def test_power_function_of_ema_pytorch_is_one_update_ahead():
    """In its n-th update it has our decay of update n + 1, and its first update copies the weights."""
    net = make_net()
    theirs = KarrasEMA(net, sigma_rel=0.1, update_every=1)
    walk(net, 0)
    theirs.update()
    ours = PowerEMA(net, 0.1)
    ours.updates = 2
    for step in range(1, STEPS):
        walk(net, step)
        theirs.update()
        ours.update()
    for one, two in zip(ours.shadow.values(), theirs.ema_model.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)  # its gamma is another root finder's


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5, float("nan")])
def test_constant_decay_is_checked(decay):
    with pytest.raises(ValueError, match=r"decay=.*: expected a factor on the average from 0 to below 1"):
        ConstantEMA(make_net(), decay)


def test_constant_average_of_no_decay_is_last_weights():
    net = make_net()
    average = ConstantEMA(net, 0.0)
    walk(net, 1)
    average.update()
    assert all(torch.equal(average.shadow[name], p) for name, p in net.named_parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_average_of_low_precision_weights_is_in_float32(dtype):
    net = nn.Linear(1, 1, bias=False, dtype=dtype)
    average, start = ConstantEMA(net, 0.9999), float(net.weight.detach())
    with torch.no_grad():
        net.weight.fill_(start + 1)
    end = float(net.weight.detach())
    for _ in range(1000):
        average.update()
    assert average.shadow["weight"].dtype == torch.float32
    expected = end + (start - end) * 0.9999**1000
    assert float(average.shadow["weight"]) == pytest.approx(expected, abs=1000 * 2**-24)
    with average.swapped_in():
        assert net.weight.dtype == dtype
        assert float(net.weight.detach()) == float(torch.tensor(float(average.shadow["weight"])).to(dtype))


def test_table_of_averages_is_measured():
    """Numbers of float32 libraries agree to 1e-6 on other machines."""
    rows = table.read()
    for row, written in zip([table.measure(one) for one in table.ROWS], rows, strict=True):
        assert row.keys() == written.keys()
        for name, value in row.items():
            if name.startswith(("decay", "first")):
                assert float(value) == pytest.approx(float(written[name]), rel=1e-6, abs=1e-12), (row, name)
            else:
                assert value == written[name], (row, name)
    text = table.README.read_text()
    assert table.with_table(text, rows) == text
