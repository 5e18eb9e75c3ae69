import pytest
import torch
from torch import nn

from ldm.ema import PowerEMA, power_of


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97), (0.10, 6.94), (0.15, 3.6)])
def test_exponents_of_the_paper(sigma_rel, gamma):
    """EDM2: sigma_rel = 0.05 and 0.10 are gamma = 16.97 and 6.94; and the width, in closed form (eq. 126), comes back."""
    assert abs(power_of(sigma_rel) - gamma) < 0.05
    g = power_of(sigma_rel)
    assert abs((g + 1) ** 0.5 * (g + 2) ** -1 * (g + 3) ** -0.5 - sigma_rel) < 1e-9


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.28, 1.0])
def test_a_width_that_no_exponent_has_is_refused(sigma_rel):
    with pytest.raises(ValueError, match="sigma_rel="):
        power_of(sigma_rel)


def averaged(steps: int, sigma_rel: float) -> tuple[PowerEMA, torch.Tensor]:
    """An average over weights that are a unit vector of their own at every step: its entries are the weights of the steps."""
    module = nn.Linear(1, steps + 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        module.weight.zero_()
        module.weight[0] = 1.0  # before the first step
    ema = PowerEMA(module, sigma_rel)
    for step in range(1, steps + 1):
        with torch.no_grad():
            module.weight.zero_()
            module.weight[step] = 1.0
        ema.update(step)
    return ema, ema.shadow["weight"][:, 0]


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.2])
def test_weights_of_the_steps_are_the_closed_form(sigma_rel):
    """Step t of T weighs (t/T)^(g+1) - ((t-1)/T)^(g+1), the integral of the power function over the step."""
    steps = 60
    ema, weights = averaged(steps, sigma_rel)
    edges = (torch.arange(steps + 1, dtype=torch.float64) / steps) ** (ema.gamma + 1)
    torch.testing.assert_close(weights[1:], edges.diff())
    assert weights[0] == 0  # the initial weights leave no trace
    torch.testing.assert_close(weights.sum(), torch.ones((), dtype=torch.float64))


def test_relative_width_is_sigma_rel():
    steps = 2000
    _, weights = averaged(steps, 0.1)
    t = (torch.arange(1, steps + 1, dtype=torch.float64) - 0.5) / steps
    mean = (weights[1:] * t).sum()
    assert abs(((weights[1:] * (t - mean) ** 2).sum()) ** 0.5 - 0.1) < 1e-3


def test_only_what_is_trained_is_averaged():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False))
    assert set(PowerEMA(module).shadow) == {"0.weight", "0.bias"}


def test_applied_lends_the_average_and_gives_the_weights_back():
    module = nn.Linear(2, 2)
    ema = PowerEMA(module)
    live = module.weight.detach().clone()
    ema.shadow["weight"].fill_(5.0)

    def fail():
        with ema.applied():
            assert (module.weight == 5).all()
            raise RuntimeError("mid-way")

    with pytest.raises(RuntimeError, match="mid-way"):
        fail()
    assert torch.equal(module.weight, live)
    assert (ema.shadow["weight"] == 5).all()


def test_the_average_shares_no_memory_with_the_weights():
    module = nn.Linear(2, 2)
    ema = PowerEMA(module)
    before = ema.shadow["weight"].clone()
    with torch.no_grad():
        module.weight.add_(1.0)
    assert torch.equal(ema.shadow["weight"], before)


def test_load_takes_over_the_same_names_only():
    ema, other = PowerEMA(nn.Linear(2, 2)), PowerEMA(nn.Linear(2, 2))
    other.load(ema.shadow)
    assert torch.equal(other.shadow["bias"], ema.shadow["bias"])
    with pytest.raises(KeyError, match="other weights"):
        other.load({"weight": ema.shadow["weight"]})


def test_the_average_follows_its_module_to_another_type():
    module = nn.Linear(2, 2)
    ema = PowerEMA(module)
    module.double()
    ema.update(1)
    assert ema.shadow["weight"].dtype == torch.float64
    assert torch.equal(ema.shadow["weight"], module.weight.detach())
    assert ema.shadow["weight"] is not module.weight
