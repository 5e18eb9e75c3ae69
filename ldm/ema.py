"""Moving averages of weights, and post-hoc averages of any length from the snapshots of two."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from ldm.compat import lerp_
from ldm.errors import ConfigError

SIGMA_RELS = (0.05, 0.10)  # relative widths of the averages that snapshots store (EDM2, section 3.2)


def std_to_exponent(sigma_rel: float) -> float:
    """Return the exponent gamma of the power-function average of relative width sigma_rel (EDM2 eq. 126, algorithm 2).

    Raises ConfigError unless 0 < sigma_rel < 0.28.
    """
    if not 0 < sigma_rel < 0.28:
        raise ConfigError(f"sigma_rel={sigma_rel}: expected a fraction of the training above 0 and below 0.28")
    t = sigma_rel**-2
    return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())


def profile_correlation(gamma_a, t_a, gamma_b, t_b):
    """Integrate over time the product of two averages' densities (gamma + 1) t^gamma / T^(gamma + 1).

    T = t_a and t_b > 0; the arguments are arrays that broadcast (EDM2, algorithm 3, p_dot_p).
    """
    exponent = np.where(t_a < t_b, gamma_b, -gamma_a)
    return (gamma_a + 1) * (gamma_b + 1) * (t_a / t_b) ** exponent / ((gamma_a + gamma_b + 1) * np.maximum(t_a, t_b))


def posthoc_coefficients(
    snapshots: Sequence[tuple[float, int]], sigma_rel: float, step: int
) -> tuple[list[float], float]:
    """Compute the weights of snapshots that best approximate the average of length sigma_rel at `step`.

    snapshots: length and step (sigma_rel, t) of each stored average.
    Returns the weights and the error, relative to the target's norm.  Least squares of densities over time (EDM2,
    algorithm 3).
    The weights are constrained to a sum of 1, so that a constant parameter is reproduced exactly; the paper relies on
    the number of snapshots.
    Raises ConfigError for a length that no average has.
    """
    gamma = np.array([std_to_exponent(length) for length, _ in snapshots])
    t = np.array([t_snapshot / step for _, t_snapshot in snapshots])
    target = std_to_exponent(sigma_rel)
    gram, towards = (
        profile_correlation(gamma[:, None], t[:, None], gamma, t),
        profile_correlation(gamma, t, target, 1.0),
    )
    n = len(snapshots)
    system = np.block([[gram, np.ones((n, 1))], [np.ones((1, n)), np.zeros((1, 1))]])  # with a Lagrange multiplier
    x = np.linalg.lstsq(system, np.append(towards, 1.0), rcond=None)[0][:n]
    norm = profile_correlation(target, 1.0, target, 1.0)
    return x.tolist(), float(np.sqrt(max(0.0, norm - 2 * x @ towards + x @ gram @ x) / norm))


def _stored(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class WeightAverage:
    """Moving average of a module's trainable parameters, from their values now on.

    shadow: the averages by parameter name, in the parameters' dtype but at least float32: in bfloat16 an average of
    decay 0.999 or more never moves.  updates: number of updates so far.
    """

    def __init__(self, module: nn.Module):
        self.module, self.updates = module, 0
        self.shadow = {name: p.detach().to(_stored(p.dtype), copy=True) for name, p in self._live().items()}

    def decay_at(self, update: int) -> float:
        """Return the factor on the average in an update, counted from 1; the weights have the rest of 1."""
        raise NotImplementedError

    def _live(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self) -> None:
        """Update the average with the weights after an optimiser step."""
        self.updates += 1
        # the trainer may have changed the weights' device or dtype
        live = {name: p.to(_stored(p.dtype)) for name, p in self._live().items()}
        self.shadow = {name: value.to(live[name]) for name, value in self.shadow.items()}
        lerp_(list(self.shadow.values()), list(live.values()), 1 - self.decay_at(self.updates))

    @torch.no_grad()
    def load(self, state: dict[str, Tensor], updates: int) -> None:
        """Load a saved average, after so many updates, in the precision it was saved in.

        Raises KeyError if the names differ.
        """
        if state.keys() != self.shadow.keys():
            raise KeyError(
                f"average of other weights: {sorted(state.keys() ^ self.shadow.keys())[:4]} are in one of the two only"
            )
        for name, value in state.items():
            self.shadow[name] = torch.empty_like(self.shadow[name], dtype=value.dtype).copy_(value)
        self.updates = updates

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Give the module the averaged weights within the block."""
        live = self._live()
        with torch.no_grad():
            saved = {name: p.clone() for name, p in live.items()}
            for name, p in live.items():
                p.copy_(self.shadow[name])
        try:
            yield
        finally:
            with torch.no_grad():
                for name, p in live.items():
                    p.copy_(saved[name])


class PowerEMA(WeightAverage):
    """Power-function moving average (EDM2, Karras et al. 2024, eq. 122-127).

    The weight of update t in the average after T updates is proportional to (t / T)^gamma: no warm-up to tune, the
    length grows with training.
    sigma_rel: relative width, in (0, 0.28).
    """

    def __init__(self, module: nn.Module, sigma_rel: float = 0.1):
        self.gamma = std_to_exponent(sigma_rel)
        super().__init__(module)

    def decay_at(self, update: int) -> float:
        return (1 - 1 / update) ** (self.gamma + 1)  # beta of eq. 127


class ConstantEMA(WeightAverage):
    """Exponential moving average: the average times `decay` plus the weights times 1 - decay.

    DDPM (Ho et al. 2020, appendix B), ADM, DiT and SiT: 0.9999; the first weights keep decay^T after T updates.
    warmup: whether the decay is at most (1 + n) / (10 + n) in update n, as in LDM's code: they fade
    as n^-9.
    Raises ConfigError unless 0 <= decay < 1; a decay of 0 gives the last weights.
    """

    def __init__(self, module: nn.Module, decay: float = 0.9999, warmup: bool = False):
        if not 0 <= decay < 1:
            raise ConfigError(f"decay={decay}: expected a factor on the average from 0 to below 1")
        self.decay, self.warmup = decay, warmup
        super().__init__(module)

    def decay_at(self, update: int) -> float:
        return min(self.decay, (1 + update) / (10 + update)) if self.warmup else self.decay
