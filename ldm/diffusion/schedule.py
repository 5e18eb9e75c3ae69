"""Noise schedules: x_t = alpha(t) x0 + sigma(t) eps, with t in [0, 1], data at 0 and noise at 1, for every schedule."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ldm.errors import ConfigError
from ldm.tensors import at_least_float32, expand


class Schedule(Protocol):
    """What samplers and objectives need of a schedule.

    t may have any shape; float64 t gives float64, t of any other dtype float32: in bfloat16 alpha and sigma are
    off by 0.2%, and the network's times 999 and 1000 are one.
    """

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the coefficients of x0 and eps at t."""
        ...

    def log_snr(self, t: Tensor) -> Tensor:
        """Return 2 log(alpha / sigma), which is +inf at t = 0 and falls with t."""
        ...

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        """Return the t with this log_snr, the inverse of `log_snr`."""
        ...

    def net_time(self, t: Tensor) -> Tensor:
        """Return the input of the network's time embedding at t."""
        ...


def widen(t: Tensor) -> Tensor:
    """Return t in float64 if that is its dtype, else in float32."""
    return t.to(at_least_float32(t.dtype))


def add_noise(schedule: Schedule, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """Compute the state x_t = alpha(t) x0 + sigma(t) eps (B, ...) at t () or (B,), rounded once to the dtype of x0."""
    clean, noise = widen(x0), widen(eps)
    alpha, sigma = (expand(part, x0).to(clean) for part in schedule.alpha_sigma(t))
    return (alpha * clean + sigma * noise).to(x0.dtype)


@dataclass(frozen=True, eq=False)
class DiscreteSchedule:
    """A variance-preserving schedule given by alpha_bar = alpha^2 (T,), float64, entry i at t = (i + 1) / T.

    Between entries alpha_bar is linear in t, from 1 at t = 0; sigma^2 = 1 - alpha_bar, computed in float64. The
    network's time is i in 0..T-1.
    Raises ConfigError unless alpha_bar falls strictly from below 1 (0 is allowed at the end: zero terminal SNR).
    """

    alpha_bar: Tensor
    _nodes: dict = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self):
        bar = torch.cat([torch.ones(1, dtype=torch.float64), self.alpha_bar.double()])
        if not (bar.diff() < 0).all() or bar[-1] < 0:
            raise ConfigError("alpha_bar must fall strictly, from below 1 to no less than 0; lower the betas or T")

    @property
    def T(self) -> int:
        """Number of entries."""
        return len(self.alpha_bar)

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        signal, noise = self._squares(t)
        return signal.sqrt(), noise.sqrt()

    def log_snr(self, t: Tensor) -> Tensor:
        signal, noise = self._squares(t)
        return signal.log() - noise.log()

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        signal, noise = self._on(log_snr.device, torch.float64)
        target = log_snr.double()
        i = (torch.searchsorted(noise.log() - signal.log(), -target, right=True) - 1).clamp(0, self.T - 1)
        part = (signal.take(i) - target.sigmoid()) / (signal.take(i) - signal.take(i + 1))
        return ((i + part.clamp(0, 1)) / self.T).to(at_least_float32(log_snr.dtype))

    def net_time(self, t: Tensor) -> Tensor:
        return (self._position(widen(t)) - 1).clamp(min=0)

    def _position(self, t: Tensor) -> Tensor:
        # t T, snapped to an entry if it differs by rounding only: float32 (i + 1) / T gives net_time i exactly.
        x = t * self.T
        nearest = x.round()
        return torch.where((x - nearest).abs() <= torch.finfo(t.dtype).eps * self.T, nearest, x)

    def _squares(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = widen(t)
        signal, noise = self._on(t.device, t.dtype)
        x = self._position(t)
        i = x.floor().clamp(0, self.T - 1)
        k, w = i.long(), x - i
        return torch.lerp(signal.take(k), signal.take(k + 1), w), torch.lerp(noise.take(k), noise.take(k + 1), w)

    def _on(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if (device, dtype) not in self._nodes:
            bar = torch.cat([torch.ones(1, dtype=torch.float64), self.alpha_bar.double()])
            self._nodes[device, dtype] = bar.to(device, dtype), (1 - bar).to(device, dtype)
        return self._nodes[device, dtype]


def from_betas(betas: Tensor) -> DiscreteSchedule:
    """Build a schedule from forward variances beta (T,).

    alpha_bar is the running product of 1 - beta (Ho 2020, eq. 4).
    """
    return DiscreteSchedule((1 - betas.double()).cumprod(0))


def from_alpha_bar(alpha_bar: Callable[[Tensor], Tensor], T: int) -> DiscreteSchedule:
    """Build a schedule of T entries from alpha_bar as a function of t.

    beta is clipped to at most 0.999 (Nichol & Dhariwal 2021, section 3.2).
    """
    bar = alpha_bar(torch.arange(T + 1, dtype=torch.float64) / T)
    return from_betas((1 - bar[1:] / bar[:-1]).clamp(max=0.999))


def linear(T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> DiscreteSchedule:
    """Return the schedule with beta linear in i (Ho et al. 2020, section 4).

    The two betas are those for T = 1000; another T refines the same process.
    """
    return from_betas(torch.linspace(beta_start, beta_end, T, dtype=torch.float64) * (1000 / T))


def scaled_linear(T: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> DiscreteSchedule:
    """Return the schedule with sqrt(beta) linear in i (Rombach et al. 2022, their code's "linear").

    The two betas are those for T = 1000.
    """
    return from_betas(torch.linspace(beta_start**0.5, beta_end**0.5, T, dtype=torch.float64) ** 2 * (1000 / T))


def cosine(T: int = 1000, s: float = 0.008) -> DiscreteSchedule:
    """Return alpha_bar = cos^2(pi/2 (t + s) / (1 + s)), relative to t = 0 (Nichol & Dhariwal 2021, eq. 17)."""
    return from_alpha_bar(lambda t: torch.cos(math.pi / 2 * (t + s) / (1 + s)) ** 2, T)


def sigmoid(T: int = 1000, start: float = -3.0, end: float = 3.0, tau: float = 1.0) -> DiscreteSchedule:
    """Return alpha_bar as a sigmoid of t over [start, end] / tau, scaled to 1..0 and clipped below at 1e-9.

    Chen 2023 (arXiv 2301.10972), algorithm 1.
    """
    t = torch.arange(T + 1, dtype=torch.float64) / T
    y = torch.sigmoid((start + t * (end - start)) / tau)
    return DiscreteSchedule(((y[-1] - y) / (y[-1] - y[0]))[1:].clamp(min=1e-9))


def sigmoid_beta(T: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> DiscreteSchedule:
    """Return the schedule with beta a sigmoid of i over [-6, 6] (Xu et al. 2022, GeoDiff's code).

    The two betas are those for T = 1000.
    """
    rise = torch.sigmoid(torch.linspace(-6, 6, T, dtype=torch.float64))
    return from_betas((beta_start + rise * (beta_end - beta_start)) * (1000 / T))


def sqrt(T: int = 1000, s: float = 1e-4) -> DiscreteSchedule:
    """Return alpha_bar = 1 - sqrt(t + s), relative to t = 0 (Li et al. 2022 (Diffusion-LM), appendix A)."""
    return from_alpha_bar(lambda t: 1 - (t + s).sqrt(), T)


def pde_refiner(steps: int = 3, min_variance: float = 4e-7) -> DiscreteSchedule:
    """Return the schedule of PDE-Refiner's first prediction and its `steps` refinements, T = steps + 1.

    Its betas are min_variance^(k / steps) for k = steps, ..., 0 (Lippe et al. 2023, section 3.2 and appendix C): the
    noise that the last refinement removes has the variance `min_variance`, and no signal is left at t = 1. With
    steps=0 this is t = 1 alone: a regression.
    Raises ConfigError unless min_variance is in (0, 1) and steps 0 or more.
    """
    if steps < 0 or not 0 < min_variance < 1:
        raise ConfigError(f"steps={steps} min_variance={min_variance}: expected 0 steps or more, a variance below 1")
    exponent = torch.linspace(1, 0, steps + 1, dtype=torch.float64) if steps else torch.zeros(1)
    return from_betas(min_variance**exponent)


def zero_terminal_snr(schedule: DiscreteSchedule) -> DiscreteSchedule:
    """Shift and scale alpha so that alpha(1) = 0 and the first entry stays (Lin et al. 2023, algorithm 1)."""
    alpha = schedule.alpha_bar.double().sqrt()
    return DiscreteSchedule(((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])) ** 2)


def shifted(schedule: DiscreteSchedule, shift: float) -> DiscreteSchedule:
    """Multiply sigma / alpha of a schedule by `shift`, for data of `shift` times the resolution.

    Hoogeboom et al. 2023, section 3.1.
    """
    bar = schedule.alpha_bar.double()
    return DiscreteSchedule(bar / (bar + shift**2 * (1 - bar)))


@dataclass(frozen=True)
class VP:
    """The continuous variance-preserving SDE with beta(t) from beta_min to beta_max (Song et al. 2021b, appendix C).

    The network's time is 999 t.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        beta = self._integral(t)
        return (-beta / 2).exp(), (-torch.expm1(-beta)).sqrt()

    def log_snr(self, t: Tensor) -> Tensor:
        return -torch.expm1(self._integral(t)).log()

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        beta = softplus(-widen(log_snr))
        return 2 * beta / (self.beta_min + (self.beta_min**2 + 2 * (self.beta_max - self.beta_min) * beta).sqrt())

    def net_time(self, t: Tensor) -> Tensor:
        return 999 * widen(t)

    def _integral(self, t: Tensor) -> Tensor:
        t = widen(t)
        return t * self.beta_min + t**2 * (self.beta_max - self.beta_min) / 2


@dataclass(frozen=True)
class GVP:
    """The trigonometric path alpha = cos(pi t / 2), sigma = sin(pi t / 2) (Ma et al. 2024 (SiT), "GVP").

    The network's time is 1000 t.
    """

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = widen(t)
        return torch.sin(math.pi / 2 * (1 - t)), torch.sin(math.pi / 2 * t)  # sin, not cos: exactly 0 at t = 1

    def log_snr(self, t: Tensor) -> Tensor:
        alpha, sigma = self.alpha_sigma(t)
        return 2 * (alpha.log() - sigma.log())

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        return 2 / math.pi * torch.atan(torch.exp(-widen(log_snr) / 2))

    def net_time(self, t: Tensor) -> Tensor:
        return 1000 * widen(t)


@dataclass(frozen=True)
class EDM:
    """alpha = 1, sigma = sigma_max t (Karras et al. 2022, table 1); the network's time is c_noise = log(sigma) / 4."""

    sigma_max: float = 80.0

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = widen(t)
        return torch.ones_like(t), self.sigma_max * t

    def log_snr(self, t: Tensor) -> Tensor:
        return -2 * (self.sigma_max * widen(t)).log()

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        return torch.exp(-widen(log_snr) / 2) / self.sigma_max

    def net_time(self, t: Tensor) -> Tensor:
        return (self.sigma_max * widen(t)).log() / 4


@dataclass(frozen=True)
class Flow:
    """Rectified flow: alpha = 1 - u, sigma = u, with u = shift t / (1 + (shift - 1) t).

    Liu 2022; Esser 2024, eq. 13, and eq. 23 for the shift.
    The network's time is 1000 u, so that one network serves every shift.
    """

    shift: float = 1.0

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = widen(t)
        total = 1 + (self.shift - 1) * t
        return (1 - t) / total, self.shift * t / total

    def log_snr(self, t: Tensor) -> Tensor:
        t = widen(t)
        return 2 * ((1 - t).log() - (self.shift * t).log())

    def t_from_log_snr(self, log_snr: Tensor) -> Tensor:
        return torch.sigmoid(-widen(log_snr) / 2 - math.log(self.shift))

    def net_time(self, t: Tensor) -> Tensor:
        return 1000 * self.alpha_sigma(t)[1]


def flow_at(dim: int, base_dim: int = 4096) -> Flow:
    """Return a Flow shifted for data of `dim` numbers per sample: shift = sqrt(dim / base_dim) (Esser 2024, eq. 23).

    base_dim: the number for which shift 1 is right.
    """
    return Flow(math.sqrt(dim / base_dim))


def schedules_equal(a: Schedule, b: Schedule) -> bool:
    """Return whether two schedules are equal: the same log_snr and the same network time at every t."""
    t = torch.linspace(0.001, 1, 1000, dtype=torch.float64)
    return torch.equal(a.log_snr(t), b.log_snr(t)) and torch.equal(a.net_time(t), b.net_time(t))
