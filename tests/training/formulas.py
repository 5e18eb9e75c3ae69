"""The papers' equations in plain float64 tensors: keyed draws, schedules, predictions, weights and times."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.tensors import derive_seed

HALF_PI = math.pi / 2
# hyperparameters of the cases, other than the defaults of the code
SIGMA_DATA, GAMMA, P2_GAMMA, P2_K = 0.7, 3.0, 1.5, 0.8
LOG_MEAN, LOG_STD, LOGIT_MEAN, LOGIT_STD, LOGIT_SHIFT = -0.4, 1.1, 0.3, 0.9, 2.0


def draw(distribution: Callable[..., Tensor], seed: int, purpose: str, rows, shape=()) -> Tensor:
    """Draw float32 numbers for each row (epoch, index) from a generator seeded for it; returns (B, ...) float64."""
    values = []
    for row in rows:
        generator = torch.Generator().manual_seed(derive_seed(seed, purpose, row))
        values.append(distribution(shape, generator=generator, dtype=torch.float32))
    return torch.stack(values).double()


def expand(value: Tensor) -> Tensor:
    """Reshape (B,) to (B, 1, 1, 1)."""
    return value[:, None, None, None]


@dataclass
class Path:
    """A schedule: t (B,) -> (alpha, sigma), t -> the network's time, and the number of its entries, None without."""

    alpha_sigma: Callable[[Tensor], tuple[Tensor, Tensor]]
    net_time: Callable[[Tensor], Tensor]
    steps: int | None = None
    alpha_bar: Tensor | None = None

    def noised(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = map(expand, self.alpha_sigma(t))
        return alpha * x0 + sigma * eps


def table(alpha_bar: Tensor) -> Path:
    """Interpolate alpha_bar (T,) linearly in t, from 1 at t = 0; the network's time is the entry's index."""
    bar, T = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar]), len(alpha_bar)

    def alpha_sigma(t: Tensor) -> tuple[Tensor, Tensor]:
        x = t * T
        x = torch.where((x - x.round()).abs() < 1e-4, x.round(), x)  # float32 times of entries
        low = x.floor().long().clamp(max=T - 1)
        value = (1 - (x - low)) * bar[low] + (x - low) * bar[low + 1]
        return value.sqrt(), (1 - value).sqrt()

    return Path(alpha_sigma, lambda t: (t * T - 1).clamp(min=0), T, alpha_bar)


def of_betas(betas: Tensor) -> Path:
    """Return Ho et al. 2020, eq. 4: alpha_bar_i is the product of 1 - beta_1, ..., 1 - beta_i."""
    return table(torch.stack([(1 - betas[: i + 1]).prod() for i in range(len(betas))]))


def of_function(f: Callable[[float], float], T: int) -> Path:
    """Return Nichol & Dhariwal 2021, section 3.2: beta_i = 1 - f(i/T) / f((i-1)/T), at most 0.999."""
    return of_betas(torch.tensor([min(1 - f((i + 1) / T) / f(i / T), 0.999) for i in range(T)], dtype=torch.float64))


def ramp(low: float, high: float, T: int, value: Callable[[float], float]) -> Path:
    """Return betas that go from low to high as value(i / (T - 1)) does; both are for T = 1000."""
    betas = [(low + (high - low) * value(i / (T - 1))) * 1000 / T for i in range(T)]
    return of_betas(torch.tensor(betas, dtype=torch.float64))


def cosine_function(t: float) -> float:
    return math.cos(HALF_PI * (t + 0.008) / 1.008) ** 2


def logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def shifted_cosine() -> Path:
    bar = of_function(cosine_function, 1000).alpha_bar
    return table(1 / (1 + 4 * (1 - bar) / bar))  # sigma / alpha doubles


def zero_terminal() -> Path:
    root = scaled_linear().alpha_bar.sqrt()
    return table(((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2)


def scaled_linear() -> Path:
    low, high = 0.00085**0.5, 0.012**0.5
    return of_betas(torch.tensor([(low + (high - low) * i / 999) ** 2 for i in range(1000)], dtype=torch.float64))


def flow(shift: float) -> Path:
    def sigma(t: Tensor) -> Tensor:
        return shift * t / (1 + (shift - 1) * t)

    return Path(lambda t: (1 - sigma(t), sigma(t)), lambda t: 1000 * sigma(t))


def vp_integral(t: Tensor) -> Tensor:
    return 0.1 * t + 19.9 / 2 * t**2


# by the names of conf/schedule
SCHEDULES: dict[str, Callable[[], Path]] = {
    "linear": lambda: ramp(1e-4, 0.02, 1000, lambda x: x),
    "scaled_linear": scaled_linear,
    "cosine": lambda: of_function(cosine_function, 1000),
    "cosine_4000": lambda: of_function(cosine_function, 4000),
    "sigmoid": lambda: table(
        torch.tensor(
            [
                max((logistic(3) - logistic(6 * (i + 1) / 1000 - 3)) / (logistic(3) - logistic(-3)), 1e-9)
                for i in range(1000)
            ],
            dtype=torch.float64,
        )
    ),
    "sigmoid_beta": lambda: ramp(1e-4, 0.02, 1000, lambda x: logistic(12 * x - 6)),
    "sqrt": lambda: of_function(lambda t: 1 - math.sqrt(t + 1e-4), 1000),
    "shifted": shifted_cosine,
    "zero_terminal_snr": zero_terminal,
    "vp": lambda: Path(
        lambda t: ((-vp_integral(t) / 2).exp(), (1 - (-vp_integral(t)).exp()).sqrt()), lambda t: 999 * t
    ),
    "gvp": lambda: Path(lambda t: ((HALF_PI * t).cos(), (HALF_PI * t).sin()), lambda t: 1000 * t),
    "edm": lambda: Path(lambda t: (torch.ones_like(t), 80 * t), lambda t: (80 * t).log() / 4),
    "pde_refiner": lambda: of_betas(torch.tensor([4e-7, 4e-7 ** (2 / 3), 4e-7 ** (1 / 3), 1.0], dtype=torch.float64)),
    "regression": lambda: of_betas(torch.ones(1, dtype=torch.float64)),
    "flow": lambda: flow(1.0),
    "flow_3": lambda: flow(3.0),
    "flow_at": lambda: flow(math.sqrt(8 / 4096)),
}


def edm_scales(alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return c_skip, c_out and c_in at sigma / alpha (Karras et al. 2022, table 1)."""
    s, d = sigma / alpha, SIGMA_DATA
    return d**2 / (s**2 + d**2), s * d / (s**2 + d**2).sqrt(), 1 / (s**2 + d**2).sqrt()


def input_factor(name: str, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return the factor on x_t at the network's input."""
    if name == "regression":
        return torch.zeros_like(alpha)
    return edm_scales(alpha, sigma)[2] / alpha if name == "edm" else torch.ones_like(alpha)


def output_of(name: str, alpha: Tensor, sigma: Tensor, x0: Tensor, eps: Tensor) -> Tensor:
    """Return the output of an exact network (B, C, h, w)."""
    if name == "edm":
        c_skip, c_out, _ = map(expand, edm_scales(alpha, sigma))
        return (x0 - c_skip * (x0 + expand(sigma / alpha) * eps)) / c_out
    alpha, sigma = expand(alpha), expand(sigma)
    return {"eps": eps, "x0": x0, "regression": x0, "v": alpha * eps - sigma * x0, "flow": eps - x0}[name]


def x0_of(name: str, alpha: Tensor, sigma: Tensor, x_t: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Return the x0 that an output at x_t stands for, and the derivative of x0 by the output (B, 1, 1, 1)."""
    if name == "edm":
        c_skip, c_out, _ = map(expand, edm_scales(alpha, sigma))
        return c_skip * x_t / expand(alpha) + c_out * out, c_out
    name = "x0" if name == "regression" else name
    a, s = expand(alpha), expand(sigma)
    slope = {"eps": -s / a, "x0": torch.ones_like(a), "v": -s / (a**2 + s**2), "flow": -s / (a + s)}[name]
    offset = {"eps": x_t / a, "x0": 0 * x_t, "v": a * x_t / (a**2 + s**2), "flow": x_t / (a + s)}[name]
    return offset + slope * out, slope


def gain(name: str, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return the squared error of the output for a unit error of x0 at fixed x_t."""
    shape = expand(alpha)
    return 1 / x0_of(name, alpha, sigma, 0 * shape, 0 * shape)[1].flatten() ** 2


def weight(name: str, prediction: str, path: Path, t: Tensor) -> Tensor:
    """Return the weight (B,) on the squared error of x0 of a weighting of conf/weighting."""
    alpha, sigma = path.alpha_sigma(t)
    snr = (alpha / sigma) ** 2
    if name == "vlb":
        t = t.clamp(min=2 / 1000)
        earlier, now = (a**2 / s**2 for a, s in (path.alpha_sigma(t - 1 / 1000), path.alpha_sigma(t)))
        return 1000 / 2 * (earlier - now)
    return {
        "output": lambda: gain(prediction, alpha, sigma),
        "eps": lambda: snr,
        "x0": lambda: torch.ones_like(snr),
        "v": lambda: (alpha**2 + sigma**2) ** 2 / sigma**2,
        "flow": lambda: (alpha + sigma) ** 2 / sigma**2,
        "edm": lambda: (sigma**2 / alpha**2 + SIGMA_DATA**2) / (sigma / alpha * SIGMA_DATA) ** 2,
        "min_snr": lambda: snr.clamp(max=GAMMA),
        "soft_min_snr": lambda: snr * GAMMA / (snr + GAMMA),
        "p2": lambda: snr / (P2_K + snr) ** P2_GAMMA,
        "debiased": lambda: alpha / sigma,
    }[name]()


def times(name: str, path: Path, seed: int, rows, positions, total: int) -> Tensor:
    """Return the time t (B,) of each row, as conf/timestep_sampling names it."""
    u = draw(torch.rand, seed, "t", rows)
    if name.startswith("stratified"):
        u = (torch.tensor(positions) + u) / total
    if name in ("discrete", "stratified"):
        return ((u * path.steps).floor() + 1) / path.steps
    if name in ("uniform", "stratified_uniform"):
        return 1 - u
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0)
    if name == "logit_normal":
        t = 1 / (1 + (-(LOGIT_MEAN + LOGIT_STD * normal.icdf(u))).exp())
        return LOGIT_SHIFT * t / (1 + (LOGIT_SHIFT - 1) * t)
    assert name == "log_normal"  # of sigma = 80 t, at most 80
    below = normal.cdf(torch.tensor((math.log(80) - LOG_MEAN) / LOG_STD, dtype=torch.float64))
    return (LOG_MEAN + LOG_STD * normal.icdf(u * below)).exp() / 80
